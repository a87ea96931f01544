"""The GPU code of alignment in two launches, for batches of many slots; used by `align` and `select_kernels`.

The first launch counts each chunk of slots and fills the result with sentinels; in the second each chunk sums the
histograms of the chunks before it and places its own slots. Stable ranks come from comparing the 256 slots of a piece
with each other in registers: 256 compares a thread, no atomics, no sort.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl
from rampwrap.kernels.triton.align.by_expert import count_ids, fill, local_expert_ids
from rampwrap.kernels.triton.pdl import wait_for_launch_before


@triton.jit
def count_and_fill(
    chunk,
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
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
):
    """This CTA's share of sentinels in all `most_rows` rows; in the scratch memory its chunk's histogram, and its local ids.

    There the ids go on up to a multiple of PIECE, so that they are read four at a time without a mask.
    """
    fill(sorted_token_ids_ptr, chunk * 1024, most_rows, num_slots, num_chunks * 1024, 1024)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    local_ids_ptr = scratch_ptr + num_chunks * BINS
    first = chunk * pieces * PIECE
    for start in range(first, tl.minimum(first + pieces * PIECE, num_slots), PIECE):
        slots = start + tl.arange(0, PIECE)
        ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, slots, num_slots, num_experts, num_local_experts)
        counts += count_ids(ids, num_local_experts, BINS)
        tl.store(local_ids_ptr + slots, ids)
    tl.store(scratch_ptr + chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["pieces", "num_slots", "num_experts", "num_local_experts", "most_rows"])
def count_and_fill_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    scratch_ptr,
    sorted_token_ids_ptr,
    pieces,
    num_slots,
    num_experts,
    num_local_experts,
    most_rows,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first launch: one CTA a chunk."""
    wait_for_launch_before(PDL)
    count_and_fill(
        tl.program_id(0),
        tl.num_programs(0),
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


@triton.jit
def counts_before(scratch_ptr, num_chunks, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The histogram of all slots, and that of the slots before this chunk; int32 [BINS] each."""
    bins = tl.arange(0, BINS)
    every = tl.zeros((ROWS, BINS), dtype=tl.int32)
    earlier = tl.zeros((ROWS, BINS), dtype=tl.int32)
    for start in tl.range(0, num_chunks, ROWS, num_stages=4):
        rows = start + tl.arange(0, ROWS)
        at = scratch_ptr + rows[:, None] * BINS + bins[None, :]
        tile = tl.load(at, mask=(rows < num_chunks)[:, None], other=0)
        every += tile
        earlier += tl.where((rows < tl.program_id(0))[:, None], tile, 0)
    return tl.sum(every, 0), tl.sum(earlier, 0)


@triton.jit
def place_chunk(
    chunk,
    counts,
    before,
    block_m,
    pieces,
    num_chunks,
    scratch_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_slots,
    num_local_experts,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    WIDEST_FIRST: tl.constexpr = False,
):
    """Places the slots of one chunk and writes its share of the blocks' experts.

    Without `expert_counts_ptr` somebody else writes the histogram and the number of rows. WIDEST_FIRST as of `place_expert`.
    """
    bins = tl.arange(0, BINS)
    blocks = (counts + block_m - 1) // block_m
    if WIDEST_FIRST:
        ahead = (counts[:, None] > counts[None, :]) | (
            (counts[:, None] == counts[None, :]) & (bins[:, None] <= bins[None, :])
        )
        ends = tl.sum(tl.where(ahead, blocks[:, None], 0), 0)
    else:
        ends = tl.cumsum(blocks, 0)
    num_blocks = tl.max(ends, 0)
    rows = (ends - blocks) * block_m + before

    local_ids_ptr = scratch_ptr + num_chunks * BINS
    first = chunk * pieces * PIECE
    for start in range(first, tl.minimum(first + pieces * PIECE, num_slots), PIECE):
        slots = start + tl.arange(0, PIECE)
        ids = tl.load(local_ids_ptr + slots)
        rank = tl.zeros((PIECE,), dtype=tl.int32)
        # A thread holds one slot and all others of a tile, so that nothing is exchanged between threads.
        for others in range(start, start + PIECE, TILE):
            other = others + tl.arange(0, TILE)
            same = (tl.load(local_ids_ptr + other)[:, None] == ids[None, :]) & (other[:, None] < slots[None, :])
            rank += tl.sum(same.to(tl.int32), 0)
        valid = ids < num_local_experts
        row = tl.gather(rows, tl.where(valid, ids, 0), 0) + rank
        tl.store(sorted_token_ids_ptr + row, slots, mask=valid)
        if pieces > 1:
            rows += count_ids(ids, num_local_experts, BINS)

    for start in range(chunk * IDS, num_blocks, num_chunks * IDS):
        block = start + tl.arange(0, IDS)
        past = ends[None, :] <= block[:, None]
        if WIDEST_FIRST:
            own = ~past & ((ends - blocks)[None, :] <= block[:, None])
            expert = tl.sum(tl.where(own, bins[None, :], 0), 1)
        else:  # the number of experts whose blocks end at or before it
            expert = tl.sum(past.to(tl.int32), 1)
        tl.store(expert_ids_ptr + block, expert, mask=block < num_blocks)
    if expert_counts_ptr is not None:  # noqa: SIM102  (known when compiled)
        if chunk == 0:
            tl.store(num_tokens_post_padded_ptr, num_blocks * block_m)
            tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)


@triton.jit(do_not_specialize=["num_chunks", "pieces", "num_slots", "num_local_experts", "block_m"])
def place_kernel(
    scratch_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_chunks,
    pieces,
    num_slots,
    num_local_experts,
    block_m,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    WIDEST_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The second launch of an alignment without selection."""
    wait_for_launch_before(PDL)
    counts, before = counts_before(scratch_ptr, num_chunks, BINS, ROWS)
    place_chunk(
        tl.program_id(0),
        counts,
        before,
        block_m,
        pieces,
        num_chunks,
        scratch_ptr,
        sorted_token_ids_ptr,
        expert_ids_ptr,
        num_tokens_post_padded_ptr,
        expert_counts_ptr,
        num_slots,
        num_local_experts,
        PIECE,
        BINS,
        IDS,
        TILE,
        WIDEST_FIRST,
    )
