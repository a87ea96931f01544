"""Padding ids and duplicates mean the same everywhere, against one reading in plain Python (`rampwrap.routing.workloads` says which)."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap import Dispatcher, MoEShape, Plan
from rampwrap.dispatch.lagged import Lagged
from rampwrap.errors import InputError
from rampwrap.measure.full import profile
from rampwrap.model import compiled as native
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.conformance import check
from rampwrap.testing.sim import SimKernel

pytest.importorskip("triton")

from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.padding import redirected

interpreted = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")


def read(ids: Any, num_experts: int, expert_map: list[int] | None = None) -> list[int]:
    """The reference: one row for each slot that names an expert which is here."""
    local = list(range(num_experts)) if expert_map is None else expert_map
    counts = [0] * sum(at >= 0 for at in local)
    for row in np.asarray(ids).tolist():
        for expert in row:
            if 0 <= expert < num_experts and local[expert] >= 0:
                counts[local[expert]] += 1
    return counts


@st.composite
def batches(draw: Callable[..., Any]) -> tuple[np.ndarray, int, list[int] | None]:
    """ids with padding and duplicates, experts, and sometimes the map of one rank."""
    num_experts, top_k = draw(st.sampled_from([(1, 1), (5, 3), (64, 8)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(-1, num_experts + 1, (draw(st.integers(0, 40)), top_k))
    kind = draw(st.sampled_from(["any", "duplicates", "only -1", "only num_experts"]))
    if kind == "duplicates":
        ids[:] = ids[:, :1]
    elif kind.startswith("only"):
        ids[:] = -1 if kind == "only -1" else num_experts
    expert_map = None
    if draw(st.booleans()):
        here = rng.permutation(num_experts)[: max(1, num_experts // 2)]
        expert_map = [-1] * num_experts
        for local, expert in enumerate(here):
            expert_map[expert] = local
    return ids.astype(draw(st.sampled_from([np.int32, np.int64]))), num_experts, expert_map


@given(batches())
def test_the_host_counts_each_slot_once_and_no_padding(batch: tuple[np.ndarray, int, list[int] | None]) -> None:
    ids, num_experts, expert_map = batch
    expected = read(ids, num_experts, expert_map)
    for given_ids in (ids, torch.from_numpy(ids), *([ids.tolist()] if len(ids) else [])):
        assert expert_counts(given_ids, num_experts, expert_map).tolist() == expected
    lagged = Lagged(len(expected))
    lagged.read(torch.from_numpy(ids), None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32))
    latest = lagged.latest()
    assert latest is not None and latest.tolist() == expected


@interpreted
@settings(max_examples=20, deadline=None)
@given(batches(), st.sampled_from(["expert", "chunks"]))
def test_alignment_on_the_gpu_counts_alike(batch: tuple[np.ndarray, int, list[int] | None], path: str) -> None:
    ids, num_experts, expert_map = batch
    expected = read(ids, num_experts, expert_map)
    its = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
    blocks = align_tokens(torch.from_numpy(ids), 16, len(expected), expert_map=its, path=path)
    assert blocks.expert_counts.tolist() == expected
    assert int(blocks.num_tokens_post_padded) == 16 * sum(-(-count // 16) for count in expected)


@functools.cache
def planned(num_experts: int) -> Plan:
    kernel = SimKernel(MoEShape(num_experts, min(8, num_experts), 2048, 1024))
    names = ("uniform", "zipf:1.2", "dirichlet:0.3")[: 1 if num_experts == 1 else 3]
    rows = workload_grid([1, 4, 16, 64, 256], [Routing.parse(name) for name in names])
    return make_plan(profile(kernel, kernel.shape, rows, quiet=True))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 80), st.integers(0, 2**32 - 1), st.sampled_from([-1, 64]), st.sampled_from(["int32", "int64"]))
def test_c_and_numpy_choose_alike_with_padding(tokens: int, seed: int, pad: int, kind: str) -> None:
    plan, rng = planned(64), np.random.default_rng(seed)
    ids = rng.integers(0, 64, (tokens, 8))
    ids[rng.random(ids.shape) < rng.choice([0.1, 0.9, 1.0])] = pad
    ids = ids.astype(kind)
    moe = Dispatcher(SimKernel(plan.shape), plan)
    chosen = moe._choose(ids, None)
    assert chosen == moe.policy.index(np.array(read(ids, 64)), tokens)
    if native.score is not None:
        assert moe.policy.index_of_ids(ids, 64) == chosen  # type: ignore[attr-defined]
    if not sum(read(ids, 64)):
        assert chosen == plan.static.index(tokens)


@pytest.mark.parametrize("pad", [-1, 64])
@pytest.mark.parametrize("model", ["wave", "ramp4"])
def test_a_step_of_padding_alone_runs_the_static_config(pad: int, model: str, sim_timings: Any) -> None:
    plan = make_plan(sim_timings, model=model)
    moe = Dispatcher(SimKernel(plan.shape), plan)
    ids = np.full((48, 8), pad)
    assert moe(ids) == 4.0
    choice = moe.select(ids)
    assert choice.index == plan.static.index(48) and "no tokens" in choice.why
    assert moe.policy.index(np.zeros(64, dtype=np.int64), 48) == choice.index


def test_fewer_rows_than_slots_are_a_padded_batch(sim_plan: Plan) -> None:
    """A histogram with the token count of the captured batch; one of too many rows is of another batch."""
    moe, ids = Dispatcher(SimKernel(sim_plan.shape), sim_plan), np.arange(64 * 8).reshape(64, 8) % 64
    ids[40:] = -1
    counts = expert_counts(ids, 64)
    assert counts.sum() == 40 * 8 and moe.select(expert_counts=counts, num_tokens=64) == moe.select(ids)
    with pytest.raises(InputError, match="sums to 320, more than tokens x top_k = 312"):
        moe.select(expert_counts=counts, num_tokens=39)


@pytest.mark.parametrize("bad", [-2, 65, -(2**31), 2**40, 2**62])
def test_other_ids_out_of_range_are_refused(bad: int, sim_plan: Plan) -> None:
    ids = np.zeros((4, 8), dtype=np.int64)
    ids[1, 2], ids[2], ids[3] = bad, -1, 64
    for call in (lambda: expert_counts(ids, 64), lambda: Dispatcher(SimKernel(sim_plan.shape), sim_plan)(ids)):
        with pytest.raises(InputError, match=f"topk_ids holds {bad}; give ids from 0 to 63, and -1 or 64 for padding"):
            call()


@given(batches())
def test_redirected_padding_has_weight_zero(batch: tuple[np.ndarray, int, list[int] | None]) -> None:
    """For kernels that cannot take padding; with a map it goes to an expert of another rank where there is one."""
    ids, num_experts, expert_map = batch
    its = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
    weights = torch.rand(ids.shape) + 0.5
    found, scaled = redirected(torch.from_numpy(ids), weights, num_experts, its)
    real = torch.from_numpy((ids >= 0) & (ids < num_experts))
    assert found.dtype == torch.from_numpy(ids).dtype and ((found >= 0) & (found < num_experts)).all()
    assert torch.equal(found[real], torch.from_numpy(ids)[real]) and torch.equal(scaled[real], weights[real])
    assert not scaled[~real].any()
    if its is not None and (its < 0).any():
        assert (its[found[~real].long()] < 0).all()


@interpreted
@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_map", [False, True])
def test_the_kernel_redirects_as_torch_does(ids_type: torch.dtype, with_map: bool) -> None:
    from rampwrap.kernels.triton.padding import redirect_kernel

    ids = torch.randint(-1, 6, (300, 8), generator=torch.Generator().manual_seed(0)).to(ids_type)
    weights, its = torch.rand(300, 8), torch.tensor([0, 1, -1, 2, 3], dtype=torch.int32) if with_map else None
    expected = redirected(ids, weights, 5, its)
    found = torch.full_like(ids, -77), torch.full_like(weights, torch.nan)
    elsewhere = None if its is None else its.argmin()
    redirect_kernel[(3,)](*found, ids, weights, elsewhere, ids.numel(), 5, BLOCK=1024)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@interpreted
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("swap_ab", [False, True])
def test_our_layers_give_padding_nothing(dtype: str, swap_ab: bool) -> None:
    from rampwrap.adapters.triton_fused_moe import TritonFusedMoE

    kernel = TritonFusedMoE(MoEShape(6, 3, 128, 128, dtype))
    row = next(config for config in kernel.configs if config["block_m"] == 16 and config["swap_ab"] == swap_ab)
    assert "padding" in check(kernel, device="cpu", configs=[row], num_tokens=(9,)).passed


def test_the_suite_names_a_kernel_that_counts_padding() -> None:
    class Counts(SimKernel):
        def launch(self, config: Any, topk_ids: Any) -> float:
            return super().launch(config, torch.where(torch.as_tensor(topk_ids) < 0, 0, torch.as_tensor(topk_ids)))

    with pytest.raises(AssertionError, match=r"with padding in topk_ids gives .* without the rows of padding"):
        check(Counts(MoEShape(8, 2, 64, 32)), device="cpu")
