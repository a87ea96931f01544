"""`rampwrap profile --engine` on simulated kernels: refused before it measures, foretold while it does, of use when stopped."""

import json
import pathlib
import types
from typing import Any

import attrs
import pytest

from rampwrap.cli import profiling
from rampwrap.cli.main import main
from rampwrap.cli.profile_request import ProfileRequest
from rampwrap.engines import installed
from rampwrap.errors import InputError
from rampwrap.kernel import catalog
from rampwrap.kernel.activation import Activation
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure import full
from rampwrap.measure.outlook import Phase, current
from rampwrap.plan.folder import Plans
from rampwrap.testing.sim import SimKernel

CONFIG = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 1024, "moe_intermediate_size": [256, 512], "num_experts": 16, "num_experts_per_tok": 2},
    **{"hidden_act": "silu", "dtype": "bfloat16"},
}
SHAPES = [MoEShape(16, 2, 1024, 256), MoEShape(16, 2, 1024, 512)]
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
FEW = ["--batch-size", "4", "16", "64", "--eval-batch-size", "--rounds", "2", "--most-configs", "6"]


@pytest.fixture
def command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Profiles the two shapes of a model."""
    monkeypatch.setattr(installed, "_version", lambda engine: "")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return [
        "profile",
        "--engine",
        "vllm",
        "--model",
        str(tmp_path),
        "--kernel",
        "sim",
        "--out",
        str(tmp_path / "plans"),
    ]


@pytest.fixture
def portfolio(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of two simulated kernels behind one, under the names of ours."""
    module = types.ModuleType("two_kernels")

    class Ours(SimKernel):
        name = "triton_fused_moe"

    class Theirs(SimKernel):
        name = "cute_moe"

    module.__dict__.update(ours=Ours, theirs=Theirs)
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    monkeypatch.setitem(catalog.KERNELS, "triton_fused_moe", "two_kernels:ours")
    monkeypatch.setitem(catalog.KERNELS, "cute_moe", "two_kernels:theirs")
    monkeypatch.setattr(catalog, "missing_gpu", lambda name: None)
    return "portfolio:triton_fused_moe+cute_moe"


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name.partition("-E16")[0] for path in folder.glob("*.plan.json"))


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Ends the command when its `at`-th table is begun; what was said of each until then."""
    real, said = full.profile, []

    def profile(*arguments: Any, **named: Any) -> Any:
        found = current()
        said.append("" if found is None else str(found))
        if len(said) == at:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    for place in ("rampwrap.measure.full", "rampwrap.measure.sweep"):
        monkeypatch.setattr(f"{place}.profile", profile)
    return said


@pytest.mark.parametrize(("at", "have"), [(1, []), (2, ["sweep"]), (3, ["table"]), (4, ["table", "sweep"])])
def test_every_phase_leaves_a_plan(
    command: list[str], at: int, have: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a later phase, what is done serves; by the same command the rest follows."""
    with monkeypatch.context() as patched:
        said = stopping(patched, at)
        assert main([*command, *FEW, "--quiet"]) == 130
    assert [its.split(",")[0] for its in said] == [f"phase {number} of 6" for number in (1, 2, 4, 5)[:at]]
    plans = Plans.read(tmp_path / "plans")
    for shape, step in zip(SHAPES, have, strict=False):
        fit = plans.find(shape, SIMULATED, ("sim",))
        assert fit is not None and (".sweep." in fit.plan.provenance["table"]) is (step == "sweep")
    assert len(plans.found) == len(have)
    assert main([*command, *FEW, "--quiet"]) == 0
    plans = Plans.read(tmp_path / "plans")
    assert all(".sweep." not in plan.provenance["table"] for _, plan in plans.found) and len(plans.found) == 2


def test_one_kernel_of_several_serves_until_all_do(
    command: list[str], portfolio: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [portfolio if its == "sim" else its for its in command]
    with monkeypatch.context() as patched:
        said = stopping(patched, 4)  # the first shape's second table
        assert main([*command, *FEW, "--quiet"]) == 130
    assert [its.split(",")[0] for its in said] == [f"phase {number} of 10" for number in (1, 2, 3, 4)]
    assert names(tmp_path / "plans") == ["cute_moe-simulated", "triton_fused_moe-simulated"]
    assert main([*command, *FEW, "--quiet"]) == 0
    assert names(tmp_path / "plans") == ["portfolio-triton_fused_moe+cute_moe-simulated"] * 2


def test_what_was_foretold_is_told_with_what_it_took(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, *FEW, "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    starts = [at for at, _ in found["foretold"]]
    assert len(starts) == 6 and sorted(starts) == starts and starts[-1] < found["seconds"] < 600


def test_phases_of_a_shape(command: list[str], portfolio: str) -> None:
    both = ("triton_fused_moe", "cute_moe")

    def asked(**more: Any) -> list[tuple[str, ...]]:
        return [
            its.kind for its in profiling.phases(ProfileRequest(engine="vllm", kernel=portfolio, **more), SHAPES[0])
        ]

    each = [(name, step) for name in both for step in ("sweep", "table")]
    assert asked(most_configs=6) == [*each, ("plan",)]
    assert asked() == [*((name, "table") for name in both), ("plan",)]  # it has fewer than 40
    found = profiling.phases(ProfileRequest(kernel=portfolio, budget=60.0), SHAPES[0])
    assert found == [Phase((name, "budget"), 30.0) for name in both]


def test_the_engine_is_looked_at_first(
    command: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installed, "_version", lambda engine: "0.12.0")
    monkeypatch.setitem(installed._FAULTS, "vllm", lambda version: ["it is too old", "it has no experts"])
    assert main([*command, *FEW, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert (
        "rampwrap leaves vLLM 0.12.0 as it is: it is too old; it has no experts; " in said and "--ignore-engine" in said
    )
    assert not (tmp_path / "plans").exists()
    assert main([*command, *FEW, "--dry-run"]) == 0  # which costs nothing, and says it
    assert "rampwrap leaves vLLM 0.12.0 as it is: it is too old.\n" in capsys.readouterr().out
    assert main([*command, *FEW, "--quiet", "--ignore-engine"]) == 0


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        ({"quantization_config": BLOCKS}, ("--tp-size", "2", "--ep"), "with FlashInfer CUTLASS (DeepGEMM where"),
        ({"quantization_config": BLOCKS}, (), None),
        ({"quantization_config": CHANNEL}, (), None),
        (
            {"quantization_config": BLOCKS | {"weight_block_size": None, "activation_scheme": "static"}},
            (),
            "with FlashInfer CUTLASS (Triton where FlashInfer is not there); plans serve where it is started with --moe-backend",
        ),
        ({}, ("--tp-size", "2", "--ep"), None),
    ],
)
def test_a_dry_run_names_the_engines_own_kernel(
    more: dict[str, Any],
    options: tuple[str, ...],
    said: str | None,
    command: list[str],
    tmp_path: pathlib.Path,
    capsys: Any,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | more))
    assert main([*command, *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert ("vLLM itself runs E=" in out) is (said is not None) and (said or "") in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "triton_kernels of OpenAI"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "channels or tensors.\n"),
    ],
)
def test_a_refusal_names_it_too(
    more: dict[str, Any], said: str, command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | more))
    assert main([*command, "--dry-run"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["sglang", "transformers"])
def test_hooks_that_know_silu_alone(engine: str) -> None:
    from rampwrap.engines.profile import kernels_of

    with pytest.raises(
        InputError, match=f"the hook of {installed.NAMES[engine]} runs no layer with silu:limit=10; leave it"
    ):
        kernels_of(engine, attrs.evolve(SHAPES[0], activation=Activation(limit=10.0)))
