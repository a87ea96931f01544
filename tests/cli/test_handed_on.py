"""What is asked for on the command line reaches the function that measures, whichever that is."""

import pathlib
from typing import Any

import pytest

from rampwrap.cli.main import main
from rampwrap.errors import InputError
from rampwrap.measure import active, full, sweep

PROFILE = ["profile", "--kernel", "sim", "--model", "olmoe", "--batch-size", "3", "5", "--routing", "uniform", "hot:2"]
PROFILE += ["--eval-batch-size", "7", "--eval-routing", "zipf:1.2", "--rounds", "2", "--seed", "11"]
PROFILE += ["--patience", "7m", "--quiet", "--replace"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, workloads and keyword arguments of every call; the first one ends the command."""
    calls: list[tuple[str, Any, dict[str, Any]]] = []

    def recording(name: str) -> Any:
        def stand_in(kernel: Any, shape: Any, *positional: Any, **named: Any) -> Any:
            calls.append((name, positional, named))
            raise InputError("enough was seen; stop here.")

        return stand_in

    for module, name in ((full, "profile"), (active, "profile_active"), (sweep, "sweep")):
        monkeypatch.setattr(module, name, recording(name))
    return calls


COMMON = {"rounds": 2, "quiet": True, "seed": 11, "replace": True, "patience_s": 420.0}


@pytest.mark.parametrize(
    ("more", "function", "wanted"),
    [
        ([], "profile", COMMON),
        (["--budget", "90s"], "profile_active", {**COMMON, "budget_s": 90.0}),
        (["--most-configs", "3"], "sweep", {"quiet": True, "seed": 11}),
    ],
)
def test_profile(more: list[str], function: str, wanted: dict[str, Any], asked: Any, tmp_path: pathlib.Path) -> None:
    out = str(tmp_path / "table.npz")
    assert main([*PROFILE, *more, "--out", out]) == 1
    ((name, positional, named),) = asked
    assert name == function
    workloads = named.pop("workloads") if name == "sweep" else positional[0]
    kept = pathlib.Path(out).with_suffix("").with_suffix(".sweep.npz") if name == "sweep" else out
    assert named == {**wanted, "out": kept}
    assert name != "sweep" or positional == (3,)
    seen = sorted((its.num_tokens, str(its.routing), its.split) for its in workloads)
    train = [(tokens, routing, "train") for tokens in (3, 5) for routing in ("hot2", "uniform")]
    held_out = [] if name == "profile_active" else [(7, "zipf1.2", "eval")]  # a budget is for what is fitted
    assert seen == sorted([*train, *held_out])
