"""The GPU code of `align`: histograms of expert ids, and the placing of slots in blocks.

`block_m` is a runtime argument throughout, so that a kernel that chooses it on the device can use the helpers as
they are: `ids_and_histogram`, then `place_expert`, with the chosen block_m.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.pdl import wait_for_launch_before


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def sum3(a, b, c):
    """Sums of three vectors of one length, in one pass over the CTA instead of three."""
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)
    return tl.reduce((a, b, c), 0, _add3)


@triton.jit
def count_ids(ids, num_local_experts, BINS: tl.constexpr):
    """Histogram of local ids, int32 [BINS]; those at `num_local_experts` are not counted."""
    valid = ids < num_local_experts
    return tl.histogram(tl.where(valid, ids, 0), BINS, mask=valid)


@triton.jit
def local_expert_ids(
    topk_ids_ptr,
    expert_map_ptr,
    offsets,
    num_slots,
    num_experts,
    num_local_experts,
):
    """Local expert of each slot as int32; `num_local_experts` for slots that take no row."""
    ids = tl.load(topk_ids_ptr + offsets, mask=offsets < num_slots, other=-1)
    # Compared in the ids' own width: an int64 id of 2^32 is out of range, not expert 0.
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map_ptr is not None:
        ids = tl.load(expert_map_ptr + ids, mask=valid, other=-1)
        valid = (ids >= 0) & (ids < num_local_experts)
    return tl.where(valid, ids, num_local_experts).to(tl.int32)


@triton.jit
def ids_and_histogram(
    topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """Local ids of all slots, int32 [CHUNK], and their histogram; CHUNK >= num_slots: they are read once."""
    ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, tl.arange(0, CHUNK), num_slots, num_experts, num_local_experts)
    return ids, count_ids(ids, num_local_experts, BINS)


@triton.jit
def capacity_of(num_slots, num_local_experts, block_m):
    """As `alignment_capacity` on the host."""
    return tl.minimum(num_slots + num_local_experts * (block_m - 1), num_slots * block_m)


@triton.jit
def fill(ptr, first, end, value, step, TILE: tl.constexpr):
    """ptr[i] = value for the TILE-wide pieces of [first, end) that start at first, first + step, ..."""
    lane = tl.arange(0, TILE)
    for start in range(first, end, step):
        offsets = start + lane
        tl.store(ptr + offsets, tl.full((TILE,), 0, tl.int32) + value, mask=offsets < end)


@triton.jit
def place_expert(
    expert,
    ids,
    counts,
    block_m,
    capacity,
    num_programs,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_slots,
    num_local_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    WIDEST_FIRST: tl.constexpr = False,
):
    """Writes the blocks of one expert, and this CTA's share of the sentinels after the last block.

    `ids` are those of all slots and `counts` their histogram (`ids_and_histogram`). Without `expert_counts_ptr` somebody
    else writes the histogram and the number of rows. With WIDEST_FIRST experts stand by their counts, not their numbers.
    """
    bins = tl.arange(0, BINS)
    blocks = (counts + block_m - 1) // block_m
    ahead = bins < expert
    if WIDEST_FIRST:
        own = tl.sum(tl.where(bins == expert, counts, 0), 0)
        ahead = (counts > own) | ((counts == own) & ahead)
    num_blocks, first_block, own_blocks = sum3(blocks, tl.where(ahead, blocks, 0), tl.where(bins == expert, blocks, 0))
    post_padded = num_blocks * block_m
    base = first_block * block_m

    mine = (ids == expert).to(tl.int32)
    before = tl.cumsum(mine, 0) - mine
    tl.store(sorted_token_ids_ptr + base + before, tl.arange(0, CHUNK), mask=mine != 0)

    placed = tl.sum(tl.where(bins == expert, counts, 0), 0)
    fill(sorted_token_ids_ptr, base + placed, base + own_blocks * block_m, num_slots, 128, 128)
    fill(expert_ids_ptr, first_block, first_block + own_blocks, expert, 128, 128)
    fill(sorted_token_ids_ptr, post_padded + expert * 256, capacity, num_slots, num_programs * 256, 256)
    if expert_counts_ptr is not None:  # noqa: SIM102  (known when compiled)
        if expert == 0:
            tl.store(num_tokens_post_padded_ptr, post_padded)
            tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "block_m", "capacity"])
def align_by_expert_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    block_m,
    capacity,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The whole alignment in one launch of num_local_experts CTAs."""
    wait_for_launch_before(PDL)
    ids, counts = ids_and_histogram(
        topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts, CHUNK, BINS
    )
    place_expert(
        tl.program_id(0),
        ids,
        counts,
        block_m,
        capacity,
        tl.num_programs(0),
        sorted_token_ids_ptr,
        expert_ids_ptr,
        num_tokens_post_padded_ptr,
        expert_counts_ptr,
        num_slots,
        num_local_experts,
        CHUNK,
        BINS,
    )
