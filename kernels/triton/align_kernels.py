"""The GPU code of `align`: histograms of expert ids, and the placing of slots in blocks.

`block_m` is a runtime argument throughout, so that a kernel that chooses it on the device can use the helpers as
they are: `ids_and_histogram`, then `place_expert`; or `expert_histogram` of a chunk, then `scan_own`, with the chosen block_m.
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
def expert_histogram(
    topk_ids_ptr,
    expert_map_ptr,
    first_slot,
    end_slot,
    num_slots,
    num_experts,
    num_local_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Slots of each local expert among slots [first_slot, end_slot), int32 [BINS]; BINS >= num_local_experts."""
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(first_slot, end_slot, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, offsets, num_slots, num_experts, num_local_experts)
        counts += count_ids(ids, num_local_experts, BINS)
    return counts


@triton.jit
def ids_and_histogram(
    topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """Local ids of all slots, int32 [CHUNK], and their histogram; CHUNK >= num_slots: they are read once."""
    ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, tl.arange(0, CHUNK), num_slots, num_experts, num_local_experts)
    return ids, count_ids(ids, num_local_experts, BINS)


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
):
    """Writes the blocks of one expert, and this CTA's share of the sentinels after the last block.

    `ids` are those of all slots and `counts` their histogram (`ids_and_histogram`). Without `expert_counts_ptr` somebody
    else writes the histogram and the number of rows.
    """
    bins = tl.arange(0, BINS)
    blocks = (counts + block_m - 1) // block_m
    num_blocks, first_block, own_blocks = sum3(
        blocks, tl.where(bins < expert, blocks, 0), tl.where(bins == expert, blocks, 0)
    )
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


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def count_chunks_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    chunk_counts_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """chunk_counts[chunk, BINS]: the histogram of each chunk of slots."""
    first = tl.program_id(0) * CHUNK
    counts = expert_histogram(
        topk_ids_ptr, expert_map_ptr, first, first + 1, num_slots, num_experts, num_local_experts, CHUNK, BINS
    )
    row = tl.program_id(0).to(tl.int64) * BINS
    tl.store(chunk_counts_ptr + row + tl.arange(0, BINS), counts)


@triton.jit
def sum_chunks(chunk_counts_ptr, num_chunks, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The histogram of all slots from those of the chunks."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, num_chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = tl.load(
            chunk_counts_ptr + rows[:, None].to(tl.int64) * BINS + bins[None, :],
            mask=(rows < num_chunks)[:, None],
            other=0,
        )
        counts += tl.sum(tile, 0)
    return counts


@triton.jit
def scan_own(
    counts,
    block_m,
    chunk_counts_ptr,
    chunk_offsets_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_chunks,
    num_slots,
    num_local_experts,
    BINS: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """chunk_offsets[chunk, BINS]: row of each chunk's first slot of each expert; and the pads of OWN experts."""
    bins = tl.arange(0, BINS)
    blocks = (counts + block_m - 1) // block_m
    ends = tl.cumsum(blocks, 0)

    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    is_own = own[:, None] == bins[None, :]
    own_counts = tl.sum(tl.where(is_own, counts[None, :], 0), 1)
    own_blocks = tl.sum(tl.where(is_own, blocks[None, :], 0), 1)
    own_first = tl.sum(tl.where(is_own, (ends - blocks)[None, :], 0), 1)
    base = own_first * block_m

    placed = tl.zeros((OWN,), dtype=tl.int32)
    for start in range(0, num_chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * BINS + own[None, :]
        inside = (rows < num_chunks)[:, None] & (own < BINS)[None, :]
        tile = tl.load(chunk_counts_ptr + at, mask=inside, other=0)
        before = tl.cumsum(tile, 0) - tile
        tl.store(chunk_offsets_ptr + at, (base + placed)[None, :] + before, mask=inside)
        placed += tl.sum(tile, 0)

    lane = tl.arange(0, 32)
    pads = own_blocks * block_m - own_counts
    for start in range(0, tl.max(pads, 0), 32):
        at = start + lane
        tl.store(
            sorted_token_ids_ptr + (base + own_counts)[:, None] + at[None, :],
            tl.zeros((OWN, 32), tl.int32) + num_slots,
            mask=at[None, :] < pads[:, None],
        )
    for start in range(0, tl.max(own_blocks, 0), 32):
        at = start + lane
        tl.store(
            expert_ids_ptr + own_first[:, None] + at[None, :],
            tl.zeros((OWN, 32), tl.int32) + own[:, None],
            mask=at[None, :] < own_blocks[:, None],
        )
    if tl.program_id(0) == 0:
        tl.store(num_tokens_post_padded_ptr, tl.sum(blocks, 0) * block_m)
        tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)


@triton.jit(do_not_specialize=["num_chunks", "num_slots", "num_local_experts", "block_m"])
def scan_chunks_kernel(
    chunk_counts_ptr,
    chunk_offsets_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_chunks,
    num_slots,
    num_local_experts,
    block_m,
    BINS: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`scan_own` of the histogram of all chunks; num_local_experts / OWN CTAs."""
    scan_own(
        sum_chunks(chunk_counts_ptr, num_chunks, BINS, ROWS),
        block_m,
        chunk_counts_ptr,
        chunk_offsets_ptr,
        sorted_token_ids_ptr,
        expert_ids_ptr,
        num_tokens_post_padded_ptr,
        expert_counts_ptr,
        num_chunks,
        num_slots,
        num_local_experts,
        BINS,
        OWN,
        ROWS,
    )


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "capacity"])
def place_chunks_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    chunk_offsets_ptr,
    sorted_token_ids_ptr,
    num_tokens_post_padded_ptr,
    capacity_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    capacity,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Places the slots of one chunk; the rank inside the chunk is a count of equal ids before the slot."""
    if capacity_ptr is not None:
        capacity = tl.load(capacity_ptr)
    chunk = tl.program_id(0)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, offsets, num_slots, num_experts, num_local_experts)
    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, COLUMNS):
        others = start + tl.arange(0, COLUMNS)
        other_ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, others, num_slots, num_experts, num_local_experts)
        same = (ids[:, None] == other_ids[None, :]) & (others[None, :] < offsets[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    valid = ids < num_local_experts
    first = tl.load(chunk_offsets_ptr + chunk.to(tl.int64) * BINS + ids, mask=valid, other=0)
    tl.store(sorted_token_ids_ptr + first + rank, offsets, mask=valid)
    fill(
        sorted_token_ids_ptr,
        tl.load(num_tokens_post_padded_ptr) + chunk * 256,
        capacity,
        num_slots,
        tl.num_programs(0) * 256,
        256,
    )
