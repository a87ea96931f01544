"""benchmarks/place.py and ep_choice.py without a GPU: a simulated kernel's rank."""

import argparse
import json
import math
import sys

import attrs
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.kernel.shape import MoEShape
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(16, 2, 2048, 768, "fp8", num_local_experts=4)


@pytest.fixture
def its(script):
    return script("ep_shard").shard("sim", SHAPE, (4, 16, 64), rounds=1)


def test_a_rank_is_timed_by_its_own_experts():
    kernel, config = SimKernel(SHAPE), SimKernel(SHAPE).configs[0]
    ids = np.array([[0, 15], [3, 9]], dtype=np.int32)
    assert kernel.launch(config, ids) == kernel.time_us(config, [1, 0, 0, 1])


def test_placements_are_measured_on_their_own_ranks(script, monkeypatch, its):
    place = script("place")
    monkeypatch.setattr(place, "SHAPE", attrs.evolve(SHAPE, num_local_experts=16))
    options = argparse.Namespace(steps=12, seed=1, measured=3, rounds=1, hindsight=True, shares=None)
    found = place.case(its, 0.3, (64,), 0, options)
    assert set(found["held_out"]) == set(found["hindsight"]) == set(found["measured"]["gain"]["measured"])
    us = found["measured"]["slowest_us"]
    assert (
        found["measured"]["time_over_tokens"]["measured"]
        == us["measured"]["token-balanced"] / us["measured"]["predicted time"]
    )
    assert 0 < found["measured"]["rank_error"]["mean"] < 0.1  # the model is not the simulation
    assert "x" in place.line(found | {"dtype": "fp8", "dirichlet": 0.3, "tokens": (64,)})


def test_steps_held_out_are_of_the_last_text(script, monkeypatch, tmp_path):
    place = script("place")
    monkeypatch.setattr(place, "SHAPE", SHAPE)
    seen, unseen = np.eye(SHAPE.num_experts)[[0, 1, 2, 3] * 2], np.eye(SHAPE.num_experts)[[4, 5, 6, 7] * 2]
    other = np.ones((8, 3))  # of another model
    np.savez(tmp_path / "loads.npz", b=unseen.astype(np.float16), a=seen, c=other)
    shares = place.loads_in(tmp_path / "loads.npz")
    assert shares.shape == (2, place.LAYERS, SHAPE.num_experts)
    counts = place.recorded(place.LOADS, (5,), 6, 1, shares)
    assert (counts.sum(2) == 5 * SHAPE.top_k).all()
    for step, text in enumerate([shares[0]] * 3 + [shares[1]] * 3):
        assert (np.take_along_axis(counts[step], text.argmax(1)[:, None], 1) == 5).all()  # each token's first choice


def test_a_launch_is_of_the_ranks_histogram(script, its):
    place = script("place")
    slots = np.array([[3, 0, 1, 0], [2, 2, 0, 0], [0, 0, 0, 6], [0, 1, 1, 0]])
    for rank in range(4):
        call = place.launch(its, slots, rank, 8)
        counts = np.bincount(call.keywords["topk_ids"].ravel(), minlength=16)
        np.testing.assert_array_equal(counts[:4], slots[rank])
        assert call() == its.kernel.time_us(call.args[0], slots[rank])


def test_choosing_is_judged_by_what_was_measured(script, its):
    choice = script("ep_choice")
    found = choice.one(its, 16, 5, 1, 0)
    us = found["us"]
    assert set(us) == {"static", "in graph", "plan", "oracle"} and found["candidates"] == 1
    for static, graph, plan, oracle in zip(*us.values(), strict=True):
        assert oracle <= min(static, graph, plan)
    assert found["gain"]["oracle"] >= found["gain"]["plan"] and found["gain"]["static"] == 1
    row = found | {"layer": "x", "dtype": "fp8", "local": 4, "tokens": 16, "profiled_configs": len(its.configs)}
    assert "x" in choice.line(row) and math.isfinite(found["captured"]["plan"])


def test_what_serves_without_a_plan_is_timed_beside_it(script, its, monkeypatch):
    """A default that is no candidate is timed all the same, and may win."""
    choice, default = script("ep_choice"), {"block_m": 16, "block_n": 64, "stages": 4}
    monkeypatch.setattr(SimKernel, "default_config", lambda self, tokens: default, raising=False)
    few = attrs.evolve(its, configs=tuple(config for config in its.configs if config != default))
    found = choice.one(few, 16, 2, 1, 0)
    counts = [choice.first_counts(work.topk_ids(16, 2), SHAPE) for work in choice.steps(16, 2, 0)]
    assert found["us"]["no plan"] == [its.kernel.time_us(default, each) for each in counts]
    assert found["gain"]["oracle"] >= found["gain"]["no plan"]


@pytest.mark.parametrize("name", ["place", "ep_choice"])
def test_a_run_whose_time_is_over_keeps_its_rows(name, script, its, monkeypatch, tmp_path, capsys):
    """Each row is printed and written when it is there, and every layer has one."""
    run, out = script(name), tmp_path / "found.json"
    monkeypatch.setattr(run, "shard", lambda *_, **__: its)
    monkeypatch.setattr(run, "stamp", dict)
    clock = iter(range(10**6))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    seconds = "8" if name == "place" else "40"
    options = ["--kernel", "sim", "--seconds", seconds, "--steps", "6", "--rounds", "1", "--out", str(out)]
    if name == "place":
        monkeypatch.setattr(run, "SHAPE", attrs.evolve(SHAPE, num_local_experts=16))
        monkeypatch.setattr(run, "CASES", ((0.3, (8,)), (0.3, (16,))) * 8)
        options += ["--dtype", "fp8", "bf16", "--redundant", "0", "--measured", "2"]
    monkeypatch.setattr(sys, "argv", [name, *options])
    run.main()
    found, said = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    rows = found["cases" if name == "place" else "rows"]
    assert found["kernel"] == "sim" and {row["dtype"] for row in rows} == {"fp8", "bf16"}
    assert 2 <= len(rows) < 16 and len(said) == len(rows) + (4 if name == "place" else 2)


def test_the_chosen_configs_are_compiled_ahead(script):
    """A dozen of each type, all in the library; what serves a rank without a plan comes first."""
    from rampwrap.adapters.cute_moe import CuteFusedMoE
    from rampwrap.kernel.shape import SHAPES
    from rampwrap.kernels.cute.build.library import Library
    from rampwrap.kernels.cute.configs import all_configs, from_keys

    shard = script("ep_shard")
    whole = Library(None)
    whole.can_compile = True  # lists all configs, compiles none
    for dtype in ("fp8", "bf16"):
        for name, local in (("qwen3-30b", 32), ("deepseek-v3", 8)):
            shape = attrs.evolve(SHAPES[name], num_local_experts=local, dtype=dtype)
            kernel = CuteFusedMoE(shape, library=whole)
            found = shard.candidates(kernel, shape)
            assert len(found) == shard.MOST and kernel.default_config(512) in found
            ahead = [config for form in ("two", "one", "prefill", "ragged") for config in all_configs(form, dtype)]
            assert all(from_keys(config, dtype) in ahead for config in found)
            assert {config["form"] for config in found} == {"two", "one", "prefill", "ragged"}


def test_a_wrong_config_is_named_and_left_out(script, monkeypatch, capsys):
    shard = script("ep_shard")
    import torch

    class Half:
        configs, shape = ({"block_m": 16}, {"block_m": 32}, {"block_m": 64}), SHAPE

        def inputs(self, shape, topk_ids, *, seed=0):
            return {"hidden_states": torch.ones(2), "topk_ids": topk_ids}

        def reference(self, shape, inputs):
            return torch.ones(2, dtype=torch.float64)

        def launch(self, config, hidden_states, topk_ids):
            if config["block_m"] == 64:
                raise ValueError("no room")
            return hidden_states * (1.0 if config["block_m"] == 16 else 1.2)

    assert shard.right(Half(), SHAPE, Half.configs) == ({"block_m": 16},)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("left out: block_m=32, 0.2 off at 1 ") and "block_m=64, ValueError('no room')" in said[1]
