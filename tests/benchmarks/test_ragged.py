"""benchmarks/ragged.py without a GPU: our stand-ins of the compiled kernels, timed by numbers."""

import argparse
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.schedule import WIDTHS
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.timer import HostTimer, ReturnTimer
from rampwrap.measure.timings import Timings

SPEC = importlib.util.spec_from_file_location(
    "cute_stand_ins_of_ragged", pathlib.Path(__file__).parents[1] / "adapters" / "test_cute_moe.py"
)
cute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cute)
needs_interpreter = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")
SHAPE = MoEShape(4, 2, 256, 128, "fp8")
GIVEN = {
    **{"kernels": ["cute_moe"], "tokens": [2], "routings": ["uniform"], "most_configs": 1},
    **{"rounds": 1, "budget_seconds": None, "seed": 0, "library": None},
}


@pytest.fixture
def ragged(script, monkeypatch):
    found = script("ragged")
    monkeypatch.setattr("rampwrap.adapters.cute_moe.load", lambda library: cute.StandIns())
    monkeypatch.setattr(found, "load", lambda library: cute.StandIns())
    monkeypatch.setitem(found.LAYERS, "small", SHAPE)
    return found


def test_bands_hold_the_mean_over_the_floor_the_oracle_and_the_static_config(ragged):
    """Three configs, of which the first is ours: the second is best when even, the third when skewed."""
    labels = ("M=64 uniform", "M=64 zipf1.2", "M=1 uniform")
    us = np.array([[100.0, 110.0, 140.0], [80.0, 120.0, 100.0], [20.0, 19.0, 30.0]])
    counts = np.array([[128, 128, 128, 128], [500, 12, 0, 0], [1, 1, 0, 0]])
    configs = tuple({"kernel": name, "n": n} for n, name in enumerate(("cute_ragged", "cute_moe", "cute_moe")))
    shape = MoEShape(4, 2, 2048, 1024, "fp8")
    table = Timings(us, counts, ("train",) * 3, labels, "x", SIMULATED, shape, configs, (CtaGrid(8, 1),) * 3)
    some = [row | {"tokens": tokens} for row, tokens in zip(ragged.rows(table, SIMULATED), (64, 64, 1), strict=True)]
    assert [row["oracle_us"] for row in some] == [110, 100, 19]
    bands = {(band["tokens"], band["even"]): band for band in ragged.summary(some, "fp8")}
    assert set(bands) == {("1", True), ("6-96", True), ("6-96", False)}
    assert bands["6-96", False]["static"] == pytest.approx(120 / 80) and bands["6-96", False]["aim"] == 1.10
    assert bands["1", True]["oracle"] == bands["1", True]["oracle_worst"] == pytest.approx(19 / 20)
    bytes_us = shape.weight_bytes / SIMULATED.copy_gbps / 1e3
    assert bands["6-96", True]["floor"] == pytest.approx(100 / (bytes_us + 2))
    assert bands["1", True]["floor"] == pytest.approx(20 / (bytes_us / 2 + 2))


@needs_interpreter
def test_a_race_on_stand_ins(ragged, script, monkeypatch, tmp_path, capsys):
    race, out = script("race"), tmp_path / "out.json"
    monkeypatch.setattr(race, "CHECK_TOKENS", (1,))
    profile, sweep = race.profile, race.sweep
    monkeypatch.setattr(race, "profile", lambda *its, **more: profile(*its, **more, timer=HostTimer(samples=1)))
    monkeypatch.setattr(race, "sweep", lambda *its, **more: sweep(*its, **more, timer=HostTimer(samples=1)))
    monkeypatch.setattr(cute.CuteFusedMoE, "configs", property(lambda self: self.few[:3], lambda self, its: setattr(self, "few", its)), raising=False)  # fmt: skip
    told = ["--layers", "small", "--dtype", "fp8", "--tokens", "2", "--routings", "uniform", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["ragged.py", *told, "--most-configs", "0", "--out", str(out)])
    ragged.main()
    found = json.loads(out.read_text())["found"]["small fp8"]
    (row,) = found["rows"]
    assert found["wrong"] == {} and row["ragged_us"] > 0 and row["oracle"].startswith("kernel=cute_moe")
    assert "small fp8" in capsys.readouterr().out


@needs_interpreter
def test_launches_share_one_workspace_that_grows(ragged):
    """Its marks are zeroed once, not by every launch."""
    kernel = ragged.Ragged(SHAPE)
    (config,) = kernel.configs
    held = []
    for tokens in (2, 1, 3):
        inputs = kernel.inputs(SHAPE, cute.routing(SHAPE, tokens))
        out = kernel.launch(config, **inputs)
        assert cute.error(out, kernel.reference(SHAPE, inputs)) < 5e-3
        held.append(kernel._held)
    assert held[0] is held[1] is not held[2] and not held[2].marks.any()


@needs_interpreter
def test_a_wrong_ragged_form_is_not_raced(ragged, script, monkeypatch):
    race = script("race")
    monkeypatch.setattr(race, "wrong", lambda portfolio, shape, seed: {
        race.format_config(config): "off" for config in portfolio.configs if config["kernel"] == "cute_ragged"
    })  # fmt: skip
    monkeypatch.setattr(race, "sweep", lambda kernel, *its, configs, **more: list(configs)[:1])
    profile = race.profile
    monkeypatch.setattr(race, "profile", lambda *its, **more: profile(*its, **more, timer=HostTimer(samples=1)))
    found = ragged.against("small", "fp8", argparse.Namespace(**GIVEN))
    assert "rows" not in found and list(found["wrong"].values()) == ["off"]


@needs_interpreter
def test_points_are_of_steps_and_units(ragged, monkeypatch, capsys):
    """A step takes 100 + n clocks and a unit 500, as the stand-in of the timer says."""
    clock = ragged.POINTS["fp8"].clock_mhz
    made = []

    class Known(ReturnTimer):
        def __init__(self, *_):
            pass

        def prepare(self, calls):
            tensors = calls[0].args
            tokens, experts = len(tensors[0]) // len(tensors[5]), len(tensors[5])
            steps = experts * tensors[0].shape[1] // 128 / ragged.FEW_CTAS
            made.append(tokens)
            us = (steps * (100 + tokens) + experts / ragged.FEW_CTAS * 500) / clock
            return super().prepare([lambda: us])

    for part in ("prepare", "sum_rows"):  # minutes in the interpreter
        monkeypatch.setattr(f"rampwrap.kernels.cute.host.ragged.{part}", lambda *its, **more: None)
    monkeypatch.setattr(ragged, "GraphTimer", Known)
    monkeypatch.setitem(ragged.WIDTHS, "fp8", (8, 96))
    found = ragged.points("fp8", argparse.Namespace(**GIVEN))
    assert sorted(set(made)) == [8, 96] and found["unit_clocks"] == {8: pytest.approx(500), 96: pytest.approx(500)}
    assert found["step_clocks"][96] - found["step_clocks"][8] == pytest.approx(88)
    assert found["steps"]["long"] == found["steps"]["short"] == 56
    assert "clocks of a step" in capsys.readouterr().out
    assert WIDTHS is ragged.WIDTHS
