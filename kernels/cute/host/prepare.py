"""What runs before and after the compiled kernels, in Triton: one launch that aligns, quantises and zeroes; the sum.

With few tokens every launch is a share of the layer's time (about 2 us, where Qwen3-30B takes 55 us for 8 tokens), so
the work before the first GEMM is one launch where the batch is small enough for the one-launch alignment. All of them,
like the compiled kernels, start while the launch before them ends (programmatic dependent launch): each waits for that
one's results itself, so that each may rely on everything before it.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align.by_expert import ids_and_histogram, place_expert
from rampwrap.kernels.triton.align.chunks import count_and_fill
from rampwrap.kernels.triton.align.host import (
    PIECE,
    TokenBlocks,
    chunks_of,
    fits_one_launch,
    histogram_bins,
    one_launch,
    overlap,
    place_chunks,
)
from rampwrap.kernels.triton.interpreter import downcast
from rampwrap.kernels.triton.moe.gemm import sum_kernel
from rampwrap.kernels.triton.pdl import wait_for_launch_before
from rampwrap.kernels.triton.quantise import quantise_at, quantise_rows

# Groups of 128 columns of a CTA that quantises or zeroes beside CTAs that align: few CTAs, so that all run at once. By itself
# this takes 7.3 us with 64 where it takes 12.2 with 32 (128 experts, 512 tokens, H100), a layer 139.6 where it takes 140.7.
GROUPS = 64
# And where the alignment is two launches: so many CTAs that those of the second do not start early on the few SMs that have
# room. By itself 1024 tokens: 11.8 us with 8, 23 with 16 or 32, and 12.7 in three launches; 8192: 34.1, and 38.8 in three.
GROUPS_BEHIND = 8


@triton.jit
def prepare_groups(program, x_ptr, q_ptr, scale_ptr, zero_ptr, num_groups, GROUPS: tl.constexpr):
    """Quantises x and zeroes the output, GROUPS groups of 128 columns; whatever of these has memory."""
    # Rows lie one behind the other, so groups are numbered through all of them.
    group = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < num_groups
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    if q_ptr is not None:
        quantise_at(q_ptr, scale_ptr, x_ptr, at, inside[:, None], group, inside)
    if zero_ptr is not None:
        zero = tl.zeros((GROUPS, 128), dtype=tl.float32).to(zero_ptr.dtype.element_ty)
        tl.store(zero_ptr + at, zero, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "block_m", "capacity", "num_groups"])
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
    num_groups,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    WIDEST_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first num_local_experts CTAs align, the others take GROUPS groups of 128 columns: quantise x, zero the output."""
    wait_for_launch_before(PDL)
    program = tl.program_id(0)
    if program < num_local_experts:
        ids, counts = ids_and_histogram(
            topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts, CHUNK, BINS
        )
        place_expert(
            program,
            ids,
            counts,
            block_m,
            capacity,
            num_local_experts,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            num_tokens_post_padded_ptr,
            expert_counts_ptr,
            num_slots,
            num_local_experts,
            CHUNK,
            BINS,
            WIDEST_FIRST,
        )
    else:
        prepare_groups(program - num_local_experts, x_ptr, q_ptr, scale_ptr, zero_ptr, num_groups, GROUPS)


@triton.jit(
    do_not_specialize=[
        "num_chunks",
        "pieces",
        "num_slots",
        "num_experts",
        "num_local_experts",
        "most_rows",
        "num_groups",
    ]
)
def count_and_prepare_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    scratch_ptr,
    sorted_token_ids_ptr,
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    num_chunks,
    pieces,
    num_slots,
    num_experts,
    num_local_experts,
    most_rows,
    num_groups,
    GROUPS: tl.constexpr,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first `num_chunks` CTAs do the first launch of an alignment in two, the others as in `prepare_kernel`."""
    wait_for_launch_before(PDL)
    program = tl.program_id(0)
    if program < num_chunks:
        count_and_fill(
            program,
            num_chunks,
            topk_ids_ptr,
            expert_map_ptr,
            scratch_ptr,
            sorted_token_ids_ptr,
            pieces,
            num_slots,
            num_experts,
            num_local_experts,
            most_rows,
            PIECE,
            BINS,
        )
    else:
        prepare_groups(program - num_chunks, x_ptr, q_ptr, scale_ptr, zero_ptr, num_groups, GROUPS)


@triton.jit
def narrow_after_kernel(out_ptr, sums_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A row of float32 sums to the type of the output, launched while the kernel that adds them ends."""
    wait_for_launch_before(PDL)
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
    widest_first: bool = False,
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
        widest_first: experts stand by their counts, not their numbers (`place_chunks`).
    """
    num_tokens, hidden = hidden_states.shape
    num_slots = topk_ids.numel()
    if aligned:
        if quantised is not None:
            quantise_rows(hidden_states, *quantised)
        if zeroed is not None:
            zeroed.zero_()
        return
    q, scale = quantised or (None, None)
    num_groups = 0 if quantised is None and zeroed is None else num_tokens * hidden // GROUP
    num_experts = num_local_experts if expert_map is None else expert_map.numel()
    bins = histogram_bins(num_local_experts)
    if fits_one_launch(num_slots, num_local_experts):
        prepare_kernel[(num_local_experts + triton.cdiv(num_groups, GROUPS),)](
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
            num_experts,
            num_local_experts,
            block_m,
            memory.sorted_token_ids.numel(),
            num_groups,
            GROUPS=GROUPS,
            BINS=bins,
            WIDEST_FIRST=widest_first,
            **one_launch(num_slots),
            **pdl.arguments(),
        )
        return
    num_chunks, pieces = chunks_of(num_slots)
    count_and_prepare_kernel[(num_chunks + triton.cdiv(num_groups, GROUPS_BEHIND),)](
        topk_ids,
        expert_map,
        memory.scratch,
        memory.sorted_token_ids,
        hidden_states,
        q,
        scale,
        zeroed,
        num_chunks,
        pieces,
        num_slots,
        num_experts,
        num_local_experts,
        memory.sorted_token_ids.numel(),
        num_groups,
        GROUPS=GROUPS_BEHIND,
        PIECE=PIECE,
        BINS=bins,
        **overlap(num_chunks),
    )
    place_chunks(memory, num_local_experts, widest_first=widest_first)


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
    sum_kernel[(num_tokens, triton.cdiv(hidden, block_h))](
        out,
        rows,
        topk_ids,
        expert_map,
        None,
        topk_ids.numel(),
        num_local_experts if expert_map is None else expert_map.numel(),
        num_local_experts,
        TOP_K=topk_ids.shape[1],
        HIDDEN=hidden,
        SPLIT_K=1,
        SPLIT_OF=0,
        BLOCK_H=block_h,
        **pdl.arguments(),
    )


def narrow_rows(out: torch.Tensor, sums: torch.Tensor) -> None:
    """out = sums, rounded: float32 [T, H] to bf16 [T, H]."""
    num_tokens, hidden = out.shape
    block = min(1024, triton.next_power_of_2(hidden))
    narrow_after_kernel[(num_tokens, triton.cdiv(hidden, block))](
        out, sums, COLUMNS=hidden, BLOCK=block, **pdl.arguments()
    )
