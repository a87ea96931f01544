"""Padding ids for kernels that cannot take them: each padded slot becomes one of weight zero, without the host.

What padding is: `rampwrap.routing.workloads`. Our own kernels need none of this, since alignment gives such slots no row.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import torch

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def redirect_kernel(
    out_ids_ptr, out_weights_ptr, ids_ptr, weights_ptr, elsewhere_ptr, num_slots, num_experts, BLOCK: tl.constexpr
):
    """One slot a lane: itself where its id is in range, else an expert that is, with weight zero."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_slots
    ids = tl.load(ids_ptr + at, mask=inside, other=0)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    known = (ids >= 0) & (ids < num_experts)
    elsewhere = 0 if elsewhere_ptr is None else tl.load(elsewhere_ptr)
    tl.store(out_ids_ptr + at, tl.where(known, ids, elsewhere).to(ids.dtype), mask=inside)
    tl.store(out_weights_ptr + at, tl.where(known, weights, 0.0).to(weights.dtype), mask=inside)


def redirected(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_ids, topk_weights) of the same types with every id in range: padding goes to an expert with weight zero.

    To one of another rank where there is one, so that no kernel computes it; else to expert 0, which computes a row for
    it. One launch (two with a map), nothing that a CUDA graph could not hold.

    Args:
        topk_ids: int32 or int64 [T, top_k].
        topk_weights: floating point [T, top_k].
        num_experts: over all ranks.
        expert_map: int32 [num_experts], -1 for experts of other ranks, or None.
    """
    elsewhere = None if expert_map is None else expert_map.argmin()
    if not topk_ids.is_cuda:
        known = (topk_ids >= 0) & (topk_ids < num_experts)
        safe = torch.zeros_like(topk_ids) if elsewhere is None else elsewhere.to(topk_ids.dtype)
        return torch.where(known, topk_ids, safe), topk_weights.masked_fill(known.logical_not(), 0.0)
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    ids, weights = torch.empty_like(topk_ids), torch.empty_like(topk_weights)
    grid = (triton.cdiv(topk_ids.numel(), 1024),)
    redirect_kernel[grid](
        ids, weights, topk_ids, topk_weights, elsewhere, topk_ids.numel(), num_experts, BLOCK=1024, num_warps=4
    )
    return ids, weights
