"""Far from the profile: what serves is bounded by the kernel's own default, and said to be far."""

from typing import Any

import numpy as np
import pytest
import torch

from rampwrap import Dispatcher, MoEShape, Plan
from rampwrap.dispatch.spans import Spans
from rampwrap.kernel.protocol import Config
from rampwrap.measure.full import profile
from rampwrap.plan.make import make_plan
from rampwrap.policy.static import StaticTable, default_table
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, Workload, workload_grid
from rampwrap.testing.sim import SimKernel

BOUND = 1.15
"Of the kernel's own default's time, as `rampwrap.policy.reach` states it."


class Own(SimKernel):
    """With defaults by tokens per expert, as engines have them; a plan for few tokens has none of those for many."""

    def default_config(self, num_tokens: int) -> Config:
        per_expert = num_tokens * self.shape.top_k / self.shape.num_experts
        block_m = 16 if per_expert < 16 else 32 if per_expert < 64 else 64 if per_expert < 256 else 128
        return {"block_m": block_m, "block_n": 128, "stages": 4}


def planned(kernel: SimKernel, tokens: list[int], *names: str, seed: int = 0) -> Plan:
    rows = workload_grid(tokens, [Routing.parse(name) for name in names], seed=seed)
    return make_plan(profile(kernel, kernel.shape, rows, quiet=True), static="averaged")


def counts(shape: MoEShape, tokens: int, name: str) -> Any:
    drawn = Workload(min(tokens, 2048), Routing.parse(name)).topk_ids(shape.num_experts, shape.top_k)
    return expert_counts(drawn, shape.num_experts) * (tokens // len(drawn))


def test_the_kernels_own_default_serves_beyond_the_profiled_batches() -> None:
    kernel = Own(MoEShape(64, 8, 2048, 1024))
    plan = planned(kernel, [4, 8, 16, 32], "uniform", "zipf:1.2")
    moe, taken = Dispatcher(kernel, plan), []
    for tokens in (1, 65, 100, 1024, 4096, 65536, 200_000):
        choice = moe.select(expert_counts=counts(kernel.shape, tokens, "zipf:1.2"), num_tokens=tokens)
        assert "beyond the profiled batches (2 to 64 tokens are within reach): the kernel's own default" in choice.why
        taken.append(choice.index)
        if tokens & tokens - 1 == 0:
            assert choice.config == kernel.default_config(tokens)
    assert max(taken) >= len(plan.configs), "a default that the plan lacks is launched all the same"
    ids = Workload(1024, Routing.parse("uniform")).topk_ids(64, 8)
    assert moe(ids) == kernel.time_us(kernel.default_config(1024), expert_counts(ids, 64))
    for tokens in (2, 3, 16, 64):
        assert "beyond" not in moe.select(expert_counts=counts(kernel.shape, tokens, "uniform"), num_tokens=tokens).why


def test_graphs_hold_the_same_beyond() -> None:
    kernel = Own(MoEShape(64, 8, 2048, 1024))
    plan = planned(kernel, [4, 8, 16, 32], "uniform", "zipf:1.2")
    policy = Dispatcher(kernel, plan).policy
    spans = Spans(plan, policy, False, None, 4, torch.device("cpu"))
    for tokens in (1, 2, 64, 65, 128, 1024, 50_000):
        bucket = spans.of(tokens)
        if policy.beyond(tokens):  # type: ignore[attr-defined]
            assert bucket.configs == (policy.configs[policy.index(counts(kernel.shape, tokens, "uniform"), tokens)],)
            assert "beyond the profiled batches" in bucket.shortlist.why
        else:
            assert all(config in plan.configs for config in bucket.configs)
    assert len({bucket.position for bucket in spans}) == len(list(spans))


def test_too_few_active_experts_run_the_default_on_both_paths() -> None:
    kernel = Own(MoEShape(64, 2, 2048, 1024))
    plan = planned(kernel, [64, 128, 256], "uniform", "zipf:0.8")
    moe, ids = Dispatcher(kernel, plan), np.tile(np.array([[0, 1]]), (128, 1))
    choice = moe.select(ids)
    assert choice.config == kernel.default_config(128) and "outside the profiled spread" in choice.why
    assert moe(ids) == kernel.time_us(choice.config, expert_counts(ids, 64))
    bare = Dispatcher(SimKernel(kernel.shape), plan)
    assert bare.select(ids).index == plan.static.index(128) and "outside the profiled spread" in bare.select(ids).why


def test_a_spread_that_was_not_profiled_is_said() -> None:
    kernel = SimKernel(MoEShape(64, 8, 2048, 1024))
    moe = Dispatcher(kernel, planned(kernel, [16, 64, 256, 1024], "uniform", "lognormal:0.3"))
    assert "outside the profiled spread" in moe.explain(Workload(1024, Routing.parse("hot:1")).topk_ids(64, 8))
    assert "outside" not in moe.explain(Workload(1024, Routing.parse("uniform"), seed=9).topk_ids(64, 8))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
def test_never_worse_than_the_kernels_own_by_more_than_the_bound(seed: int) -> None:
    shapes = (MoEShape(64, 8, 2048, 1024), MoEShape(8, 2, 4096, 1792), MoEShape(256, 8, 7168, 256, "fp8"))
    shape, rng = shapes[seed % 3], np.random.default_rng(seed)
    names = [["uniform", "zipf:1.2"], ["hot:1"], ["dirichlet:0.05", "uniform"]][seed // 3 % 3]
    low = int(rng.integers(0, 5))
    plan = planned(SimKernel(shape, noise=0.01, seed=seed), [2**i for i in range(low, low + 5)], *names, seed=seed)
    own, bare = Own(shape), SimKernel(shape)
    for tokens in (3 << low, 2 << low + 4, 3 << low + 4, 2048, 8192):
        few = np.zeros(shape.num_experts, dtype=np.int64)
        few[: shape.top_k] = tokens
        for its in (few, *(counts(shape, tokens, name) for name in ("uniform", "hot:1", "zipf:3"))):
            choice = Dispatcher(own, plan).select(expert_counts=its, num_tokens=tokens)
            us = own.time_us(choice.config, its)
            assert us <= BOUND * own.time_us(own.default_config(tokens), its), (tokens, str(choice))
            choice = Dispatcher(bare, plan).select(expert_counts=its, num_tokens=tokens)
            assert bare.time_us(choice.config, its) <= BOUND * bare.time_us(bare.configs[0], its), (tokens, str(choice))


def test_defaults_tuned_for_another_gpu_break_nothing() -> None:
    class Larger(SimKernel):
        def default_config(self, num_tokens: int) -> Config:
            return {"block_m": 256 if num_tokens > 64 else 16, "block_n": 256, "stages": 4}

    kernel = Larger(MoEShape(64, 8, 2048, 1024))
    table = default_table(kernel)
    assert table.source == "default (20 of 32 cannot run here, the nearest configs serve)"
    assert kernel.configs[table.index(4096)] == {"block_m": 128, "block_n": 256, "stages": 4}
    assert isinstance(table, StaticTable) and Dispatcher(kernel).select(expert_counts=[8] * 64).config["block_m"] == 16
