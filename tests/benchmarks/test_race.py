"""benchmarks/race.py without a GPU: simulated kernels, our Triton kernel and stand-ins of the CuTe kernels by the clock of the CPU."""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.inputs import turned
from rampwrap.measure.timer import HostTimer
from rampwrap.measure.timings import Timings
from rampwrap.testing.sim import SimKernel

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
SPEC = importlib.util.spec_from_file_location(
    "cute_stand_ins_of_race", pathlib.Path(__file__).parents[1] / "adapters" / "test_cute_moe.py"
)
cute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cute)
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
    """Its second config is right for the first routing alone, its third raises."""

    name = "wrong"

    def __init__(self, shape):
        super().__init__(shape)
        self.first, launch = None, self.launch
        self.launch = functools.wraps(launch, updated=())(functools.partial(self.off, launch))

    def off(self, launch, config, *args, **kwargs):
        out = launch(config, *args, **kwargs)
        ids = kwargs["topk_ids"].tolist()
        self.first = self.first or ids
        assert config != self.configs[2], "out of order"
        return out.mul_(1.1) if config == self.configs[1] and ids != self.first else out


def given(*names, tokens=(2,), routings=("uniform", "zipf:1.2"), **more):
    return argparse.Namespace(
        **{"kernels": names, "tokens": list(tokens), "routings": list(routings), "as_served": [], "recorded": None,
           "finalists": 3, "rounds": 2, "draws": 1, "budget_seconds": None, "seed": 0} | more
    )  # fmt: skip


def raced(race, shape, *names, monkeypatch, kept=None, **more):
    monkeypatch.setitem(race.LAYERS, "small", shape)
    return race.of_layer("small", shape.dtype, given(*names, **more), kept or (lambda found: None))


def test_a_race_is_of_what_serves_and_of_the_best(script, monkeypatch, capsys):
    race, kept = script("race"), []
    found = raced(race, SHAPE, "sim", f"{__name__}:Twice", "nosuch", tokens=(1, 64), monkeypatch=monkeypatch, kept=lambda its: kept.append(len(its["rows"])))  # fmt: skip
    assert kept == [2, 4] and "unknown" in found["left_out"]["nosuch"] and not found["wrong"]
    for row, same in ((found["rows"], True), (found["changing"], False)):
        assert [its["tokens"] for its in row] == [1, 1, 64, 64] and [its["even"] for its in row] == [True, False] * 2
        for its in row:
            best = its["best"]
            assert best["twice"]["us"] >= best["oracle"]["us"] and best["default"]["us"] >= best["oracle"]["us"]
            assert best["oracle"]["kernel"] == best["static"]["kernel"] == "sim" and its["slots"] == 2 * its["tokens"]
            assert not same or not its["even"] or best["static"] == best["oracle"]
    labels = [its["label"] for its in found["changing"]]
    assert labels[2:] == ["M=64 uniform 1", "M=64 zipf1.2 1"]
    race.report("layer", found)
    assert "6-96     skewed   1" in capsys.readouterr().out


def test_a_race_stops_in_time_and_goes_on(script, monkeypatch, tmp_path, capsys):
    race, out = script("race"), tmp_path / "out.json"
    monkeypatch.setitem(race.LAYERS, "small", SHAPE)
    told = ["race.py", "--kernels", "sim", "--layers", "small:bf16", "--tokens", "1", "4", "--out", str(out)]
    for budget, tokens in (("0", [1]), ("60", [1])):  # complete layers are not raced again, as far as they go
        monkeypatch.setattr(sys, "argv", [*told, "--budget-seconds", budget])
        assert race.main() == 0
        found = json.loads(out.read_text())["races"]["small:bf16"]
        assert sorted({row["tokens"] for row in found["rows"]}) == tokens
        assert found["gave_up"].startswith("1 of 2 token counts")
    assert "1 of 2" in capsys.readouterr().out


def test_what_is_wrong_does_not_race(script, monkeypatch):
    """Checked against float64 on poisoned memory for two routings; the clock of the CPU times the rest."""
    race, field = script("race"), script("race_field")
    monkeypatch.setattr(field, "default_timer", lambda *_, **more: HostTimer(samples=1, target_us=1.0))
    found = raced(race, SHAPE, f"{__name__}:Wrong", rounds=1, monkeypatch=monkeypatch)
    reasons = sorted(found["wrong"].values(), key=lambda its: "order" in its)
    assert "relative error" in reasons[0] and "at 2 tokens" in reasons[0] and len(reasons) == 2
    assert reasons[1].endswith("AssertionError: out of order")
    for row in found["rows"] + found["changing"]:
        assert row["best"]["oracle"]["config"] not in list(map(dict, Few(SHAPE).configs[1:]))


@pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")
def test_the_cute_kernels_race_beside_their_ragged_form(script, monkeypatch):
    """Experts elsewhere, memory that serving holds, and the default of the rule."""
    race, field, layer, shape = (
        script("race"),
        script("race_field"),
        script("race_layer"),
        MoEShape(8, 2, 256, 128, "fp8", 4),
    )
    monkeypatch.setattr("rampwrap.adapters.cute_moe.load", lambda library: cute.StandIns())
    monkeypatch.setattr(field, "default_timer", lambda *_, **more: HostTimer(samples=1, target_us=1.0))
    monkeypatch.setattr(layer, "may_win", lambda config, block_m, counts: config["form"] == "ragged" or block_m == 24)
    found = raced(race, shape, "cute_moe", routings=["uniform"], finalists=1, rounds=1, monkeypatch=monkeypatch)  # fmt: skip
    assert not found["wrong"] and not found["left_out"]
    (row,) = found["rows"]
    assert {"default", "oracle", "static", "ragged"} <= set(row["best"]) and 2 <= row["slots"] <= 4
    assert row["best"]["default"]["config"]["block_m"] == 8 and row["best"]["ragged"]["config"]["form"] == "ragged"
    assert row["best"]["oracle"]["config"]["form"] != "ragged" and row["best"]["static"]["config"]["form"] != "ragged"


def test_tokens_of_a_rank_name_an_expert_of_it(script):
    field = script("race_field")
    for routing in ("uniform", "dirichlet:0.1"):
        work = field.Arrived(5, routing, seed=3, here=8)
        ids = work.topk_ids(256, 8)
        assert ids.shape == (5, 8) and (ids < 8).any(axis=1).all() and (ids >= 8).any()
        assert np.array_equal(ids, work.topk_ids(256, 8))


def test_turns_stay_on_the_rank():
    shape, ids = MoEShape(8, 2, 256, 128, num_local_experts=4), np.array([[0, 3], [6, -1], [8, 2]], dtype=np.int32)
    assert turned(ids, shape, 1, 2).tolist() == [[2, 1], [6, -1], [8, 0]]
    assert turned(ids, shape, 0, 2).tolist() == ids.tolist()
    whole = attrs.evolve(shape, num_local_experts=8)
    assert turned(ids, whole, 1, 2).tolist() == [[4, 7], [2, -1], [8, 6]]


def test_no_winner_of_a_table_is_passed_over(script):
    may_win, rows = script("race_layer").may_win, 0
    for name in ("v2-cute-olmoe-bf16", "v2-cute-qwen3-30b-bf16", "v2-cute-qwen3-30b-fp8", "portfolio-cute-olmoe-fp8", "sweep-cute-qwen3-30b-fp8"):  # fmt: skip
        table = Timings.load(RESULTS / f"h200-{name}.npz")
        for us, counts in zip(table.us, table.counts, strict=True):
            if counts.sum() > 1024 * table.shape.top_k or not counts.any():
                continue
            mine = [may_win(its, its["block_m"], counts) for its in table.configs]
            assert np.nanmin(us[mine]) == np.nanmin(us)
            rows += 1
    assert rows == 434


def test_bands_hold_the_mean_over_the_floor_and_over_each_other(script):
    race = script("race")
    shape, counts = MoEShape(4, 2, 2048, 1024, "fp8"), np.array([500, 12, 0, 0])

    def cell(kernel, us, **config):
        return {"kernel": kernel, "config": config, "us": us, "spread": 0.0}

    cells = [cell("mine", 100.0, n=0), cell("mine", 80.0, n=1), cell("mine", 90.0, n=2), cell("mine", 70.0, form="ragged"), cell("other", 150.0)]  # fmt: skip
    row = {"label": "M=64 x", "tokens": 64, "even": False, "counts": counts, "ours": "mine", "cells": cells}
    row |= {"default": {"kernel": "mine", "n": 0}, "static": {"kernel": "mine", "n": 2}}
    found = race.line(row, shape, SIMULATED)
    floor = shape.weight_bytes / 2 / SIMULATED.copy_gbps / 1e3 + 2
    assert found["floor_us"] == pytest.approx(floor) and found["slots"] == 512 and found["active_experts"] == 2
    band, overall = race.bands([found], "fp8")
    assert overall == band | {"tokens": "all", "aim": None}
    assert (band["tokens"], band["even"], band["aim"]) == ("6-96", False, 1.10)
    told = {"default": 100 / floor, "oracle": 80 / floor, "static": 90 / floor, "ragged": 70 / floor, "d/o": 1.25, "worst": 1.25, "o:static": 1.125, "d:static": 0.9}  # fmt: skip
    assert {key: band[key] for key in told} == pytest.approx(told)
    assert band["others"]["other"] == pytest.approx({"mean": 1.5, "worst": 1.5})
    full = race.floor_us(shape, np.full(4, 1 << 20), SIMULATED)
    assert full == pytest.approx(6 * 4 * (1 << 20) * 2048 * 1024 / 1500 * 1e-6)
