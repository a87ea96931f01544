"""benchmarks/place.py and ep_choice.py without a GPU: a simulated kernel's rank."""

import argparse
import math

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
    options = argparse.Namespace(steps=12, seed=1, measured=3, rounds=1, hindsight=True)
    found = place.case(its, 0.3, (64,), 0, options)
    assert set(found["held_out"]) == set(found["hindsight"]) == set(found["measured"]["gain"]["measured"])
    us = found["measured"]["slowest_us"]
    assert (
        found["measured"]["time_over_tokens"]["measured"]
        == us["measured"]["token-balanced"] / us["measured"]["predicted time"]
    )
    assert 0 < found["measured"]["rank_error"]["mean"] < 0.1  # the model is not the simulation
    assert "x" in place.line(found | {"dtype": "fp8", "dirichlet": 0.3, "tokens": (64,)})


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
    assert set(us) == {"static", "plan", "oracle"}
    assert all(
        oracle <= min(static, plan) for static, plan, oracle in zip(us["static"], us["plan"], us["oracle"], strict=True)
    )
    assert found["gain"]["oracle"] >= found["gain"]["plan"] and found["gain"]["static"] == 1
    row = found | {"layer": "x", "dtype": "fp8", "local": 4, "tokens": 16, "profiled_configs": len(its.configs)}
    assert "x" in choice.line(row) and math.isfinite(found["captured"]["plan"])


def test_a_wrong_config_is_named_and_left_out(script, monkeypatch, capsys):
    shard = script("ep_shard")
    import torch

    class Half:
        configs = ({"block_m": 16}, {"block_m": 32})

        def inputs(self, shape, topk_ids, *, seed=0):
            return {"hidden_states": torch.ones(2), "topk_ids": topk_ids}

        def reference(self, shape, inputs):
            return torch.ones(2, dtype=torch.float64)

        def launch(self, config, hidden_states, topk_ids):
            return hidden_states * (1.0 if config["block_m"] == 16 else 1.2)

    assert shard.right(Half(), SHAPE, Half.configs) == ({"block_m": 16},)
    assert "left out: block_m=32" in capsys.readouterr().err
