"""benchmarks/race.py without a GPU: simulated kernels, and our Triton kernel by the clock of the CPU."""

import argparse
import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timer import HostTimer
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(4, 2, 128, 64)


class Twice(SimKernel):
    """Takes two times as long."""

    name = "twice"

    def launch(self, config, topk_ids):
        return 2 * super().launch(config, topk_ids)


class Few(TritonFusedMoE):
    def __init__(self, shape):
        super().__init__(shape)
        self.configs = self.configs[:3]


class Wrong(Few):
    """Its second config is right for one token alone, its third raises."""

    name = "wrong"

    def __init__(self, shape):
        super().__init__(shape)
        launch = self.launch
        self.launch = functools.wraps(launch, updated=())(functools.partial(self.off, launch))

    def off(self, launch, config, *args, **kwargs):
        out = launch(config, *args, **kwargs)
        assert config != self.configs[2], "out of order"
        return out.mul_(1.1) if config == self.configs[1] and len(out) > 1 else out


def raced(race, *names, tokens=(2,), routings=("uniform", "zipf:1.2"), most_configs=0):
    return race.race(
        SHAPE,
        argparse.Namespace(
            kernels=names, tokens=list(tokens), routings=list(routings), most_configs=most_configs, rounds=2,
            budget_seconds=None, seed=0,
        ),
    )  # fmt: skip


def test_a_race_is_of_best_against_best(script, capsys):
    race = script("race")
    found = race.report("layer", raced(race, "sim", f"{__name__}:Twice", "nosuch", tokens=(1, 64), most_configs=5))
    assert found["over"]["twice"] == {"mean": pytest.approx(2), "worst": pytest.approx(2), "workloads": 4}
    assert "unknown" in found["left_out"]["nosuch"]
    for row in found["rows"]:
        ours = SimKernel(SHAPE)
        ids = race.Workload(row["tokens"], row["label"].split()[1].replace("zipf", "zipf:")).topk_ids(4, 2)
        least = min(ours.launch(config, ids) for config in ours.configs)
        assert row["best"]["sim"]["us"] == pytest.approx(least)
        assert row["best"]["sim"]["roofline_share"] == pytest.approx(row["roofline_us"] / least)
    assert "sim over twice: 2.000x" in capsys.readouterr().out


def test_what_is_wrong_does_not_race(script, monkeypatch):
    """Checked against float64 on poisoned memory; the clock of the CPU times the rest."""
    race = script("race")
    monkeypatch.setattr(race, "CHECK_TOKENS", (1, 3))
    monkeypatch.setattr(race, "profile", functools.partial(race.profile, timer=HostTimer(samples=1)))
    found = raced(race, f"{__name__}:Few", f"{__name__}:Wrong", routings=["uniform"])
    tagged = [race.format_config({"kernel": "wrong", **config}) for config in Few(SHAPE).configs]
    assert sorted(found["wrong"]) == sorted(tagged[1:])
    assert found["wrong"][tagged[1]].startswith("relative error 0.1 at 3 tokens")
    assert found["wrong"][tagged[2]] == "AssertionError: out of order"
    for row in found["rows"]:
        assert row["best"]["wrong"]["config"] == dict(Few(SHAPE).configs[0])
        assert row["best"]["triton_fused_moe"]["us"] > 0
