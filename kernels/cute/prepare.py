"""What runs before and after the compiled kernels, in Triton: one launch that aligns, quantises and zeroes; the sum.

With few tokens every launch is a share of the layer's time (about 2 us, where Qwen3-30B takes 55 us for 8 tokens), so
the work before the first GEMM is one launch where the batch is small enough for the one-launch alignment. All of them,
like the compiled kernels, start while the launch before them ends (programmatic dependent launch): each waits for that
one's results itself, so that each may rely on everything before it.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl

from rampwrap.kernels.triton.align import BY_EXPERT_MAX_SLOTS, BY_EXPERT_MAX_WORK, TokenBlocks, align_tokens
from rampwrap.kernels.triton.align_kernels import expert_histogram, place_expert
from rampwrap.kernels.triton.gemm import sum_kernel
from rampwrap.kernels.triton.interpreter import INTERPRETED, downcast
from rampwrap.kernels.triton.quantise import GROUP, quantise_groups, quantise_rows

# Groups of 128 columns of a CTA that quantises or zeroes.
GROUPS = 8
# Passed only where something compiles: the interpreter knows neither.
OPTIONS: dict[str, Any] = {} if INTERPRETED.value else {"launch_pdl": True}


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "block_m", "capacity"])
def prepare_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    block_m,
    capacity,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first num_local_experts CTAs align, the others take GROUPS groups of a row: quantise x, zero the output."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    if program < num_local_experts:
        counts = expert_histogram(
            topk_ids_ptr, expert_map_ptr, 0, num_slots, num_slots, num_experts, num_local_experts, CHUNK, BINS
        )
        place_expert(
            program,
            counts,
            block_m,
            capacity,
            num_local_experts,
            topk_ids_ptr,
            expert_map_ptr,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            num_tokens_post_padded_ptr,
            expert_counts_ptr,
            num_slots,
            num_experts,
            num_local_experts,
            CHUNK,
            BINS,
        )
    else:
        parts = (COLUMNS + GROUPS * 128 - 1) // (GROUPS * 128)
        index = program - num_local_experts
        row = (index // parts).to(tl.int64)
        group = index % parts * GROUPS + tl.arange(0, GROUPS)
        at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        if q_ptr is not None:
            x = tl.load(x_ptr + row * COLUMNS + at, mask=at < COLUMNS, other=0.0).to(tl.float32)
            q, scale = quantise_groups(x, q_ptr.dtype.element_ty)
            tl.store(q_ptr + row * COLUMNS + at, q, mask=at < COLUMNS)
            tl.store(scale_ptr + row * (COLUMNS // 128) + group, scale, mask=group < COLUMNS // 128)
        if zero_ptr is not None:
            zero = tl.zeros((GROUPS, 128), dtype=tl.float32).to(zero_ptr.dtype.element_ty)
            tl.store(zero_ptr + row * COLUMNS + at, zero, mask=at < COLUMNS)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def sum_after_kernel(
    out_ptr,
    y_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """The Triton layer's sum over top-k, launched while the down kernel ends."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sum_kernel(
        out_ptr,
        y_ptr,
        topk_ids_ptr,
        expert_map_ptr,
        None,
        num_slots,
        num_experts,
        num_local_experts,
        TOP_K,
        HIDDEN,
        1,
        0,
        BLOCK_H,
    )


@triton.jit
def narrow_after_kernel(out_ptr, sums_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A row of float32 sums to the type of the output, launched while the kernel that adds them ends."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * COLUMNS + columns
    sums = tl.load(sums_ptr + at, mask=columns < COLUMNS, other=0.0)
    tl.store(out_ptr + at, downcast(sums, out_ptr.dtype.element_ty), mask=columns < COLUMNS)


def prepare(
    hidden_states: torch.Tensor,
    quantised: tuple[torch.Tensor, torch.Tensor] | None,
    zeroed: torch.Tensor | None,
    topk_ids: torch.Tensor,
    block_m: int,
    num_local_experts: int,
    *,
    expert_map: torch.Tensor | None,
    memory: TokenBlocks,
    aligned: bool = False,
) -> None:
    """Aligns the batch into `memory`, quantises the tokens, zeroes the output: whatever of these is asked for.

    Args:
        hidden_states: bf16 [T, H].
        quantised: e4m3 [T, H] and float32 [T, H/128], written; None for a bf16 layer.
        zeroed: float32 [T, H], written; None where the output is not added to.
        topk_ids: int32 or int64 [T, top_k].
        block_m: rows of a block.
        num_local_experts: experts whose weights are here.
        expert_map: int32 [num_experts], or None.
        memory: blocks for this batch and block_m, filled.
        aligned: `memory` already holds the alignment.
    """
    num_tokens, hidden = hidden_states.shape
    num_slots = topk_ids.numel()
    small = num_slots <= BY_EXPERT_MAX_SLOTS and num_slots * num_local_experts <= BY_EXPERT_MAX_WORK
    if aligned or not small:
        if quantised is not None:
            quantise_rows(hidden_states, *quantised)
        if zeroed is not None:
            zeroed.zero_()
        if not aligned:
            align_tokens(topk_ids, block_m, num_local_experts, expert_map=expert_map, blocks=memory)
        return
    rows = 0 if quantised is None and zeroed is None else num_tokens * triton.cdiv(hidden, GROUPS * GROUP)
    chunk = min(4096, max(256, triton.next_power_of_2(num_slots)))
    q, scale = quantised or (None, None)
    prepare_kernel[(num_local_experts + rows,)](
        topk_ids,
        expert_map,
        memory.sorted_token_ids,
        memory.expert_ids,
        memory.num_tokens_post_padded,
        memory.expert_counts,
        hidden_states,
        q,
        scale,
        zeroed,
        num_slots,
        num_local_experts if expert_map is None else expert_map.numel(),
        num_local_experts,
        block_m,
        memory.sorted_token_ids.numel(),
        COLUMNS=hidden,
        GROUPS=GROUPS,
        CHUNK=chunk,
        # One more than the experts, for the slots that take no row.
        BINS=max(32, 1 << num_local_experts.bit_length()),
        PDL=bool(OPTIONS),
        num_warps=8 if chunk > 1024 else 4,
        **OPTIONS,
    )


def sum_rows(
    out: torch.Tensor,
    rows: torch.Tensor,
    topk_ids: torch.Tensor,
    num_local_experts: int,
    *,
    expert_map: torch.Tensor | None,
) -> None:
    """out[t] = sum of the rows of t's slots that have an expert here, in slot order; other rows are not read.

    Args:
        out: bf16 [T, H], written.
        rows: bf16 [T * top_k, H], weighted.
        topk_ids: int32 or int64 [T, top_k].
        num_local_experts: experts whose weights are here.
        expert_map: int32 [num_experts], or None.
    """
    num_tokens, hidden = out.shape
    block_h = min(1024, triton.next_power_of_2(hidden))
    sum_after_kernel[(num_tokens, triton.cdiv(hidden, block_h))](
        out,
        rows,
        topk_ids,
        expert_map,
        topk_ids.numel(),
        num_local_experts if expert_map is None else expert_map.numel(),
        num_local_experts,
        TOP_K=topk_ids.shape[1],
        HIDDEN=hidden,
        BLOCK_H=block_h,
        PDL=bool(OPTIONS),
        **OPTIONS,
    )


def narrow_rows(out: torch.Tensor, sums: torch.Tensor) -> None:
    """out = sums, rounded: float32 [T, H] to bf16 [T, H]."""
    num_tokens, hidden = out.shape
    block = min(1024, triton.next_power_of_2(hidden))
    narrow_after_kernel[(num_tokens, triton.cdiv(hidden, block))](
        out, sums, COLUMNS=hidden, BLOCK=block, PDL=bool(OPTIONS), **OPTIONS
    )
