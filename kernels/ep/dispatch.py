"""Dispatch by low latency: rows go to fixed places in the memory of peers, in one launch.

A CTA copies one row of this rank's to each rank that wants it, its ids and weights to all. The last CTA writes this rank's
flags, waits for those of the others, and makes of all ids what the local layer needs: histogram, M blocks, and the choice of
a config where there are candidates.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import (
    DISPATCH,
    await_all,
    first_row,
    is_last,
    next_epoch,
    owner_of,
    peer_at,
    spread,
    tell_all,
)
from rampwrap.kernels.triton.align.by_expert import capacity_of, count_ids, fill, local_expert_ids
from rampwrap.kernels.triton.align.chunks import place_chunk
from rampwrap.kernels.triton.pdl import wait_for_launch_before
from rampwrap.kernels.triton.quantise import quantise_groups
from rampwrap.kernels.triton.select.kernels import record_choice
from rampwrap.kernels.triton.select.scoring import choose_candidate, load_tables

_DISPATCH = tl.constexpr(DISPATCH)
COUNT, BLOCKS, SELECT = 1, 2, 3
"What the last CTA makes: the histogram, also the M blocks, or those of the config that it chooses."
_COUNT, _BLOCKS, _SELECT = tl.constexpr(COUNT), tl.constexpr(BLOCKS), tl.constexpr(SELECT)


@triton.jit
def wants(owners, peer, MASKED: tl.constexpr):
    """Whether a rank gets the row of a token."""
    if MASKED:
        return tl.max((owners == peer).to(tl.int32), 0) > 0
    return peer >= 0


@triton.jit
def send_words(
    bases_ptr,
    from_ptr,
    at,
    owners,
    rank,
    RANKS: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies WORDS int32 of one row to `at` bytes of each rank that wants it, read once; the next rank comes first."""
    for start in tl.static_range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        data = tl.load(from_ptr + word, mask=word < WORDS, other=0)
        for step in tl.static_range(RANKS):
            peer = (rank + 1 + step) % RANKS
            if wants(owners, peer, MASKED):
                tl.store(peer_at(bases_ptr, peer, at, tl.int32) + word, data, mask=word < WORDS)


@triton.jit
def store_scales(bases_ptr, peer, at, group, scale, SCALES: tl.constexpr):
    """Stores scales of one row with a rank; rows of them need not start at multiples of 16 bytes, as `peer_at` has it."""
    to = (tl.load(bases_ptr + peer) + at).to(tl.pointer_type(tl.float32))
    tl.store(to + group, scale, mask=group < SCALES)


@triton.jit
def send_quantised(
    bases_ptr,
    from_ptr,
    rows_at,
    scales_at,
    owners,
    rank,
    RANKS: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Quantises one row, a scale for each 128 columns, and stores both with each rank that wants it."""
    scales: tl.constexpr = COLUMNS // 128
    for start in tl.static_range(0, scales, GROUPS):
        group = start + tl.arange(0, GROUPS)
        at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(from_ptr + at, mask=at < COLUMNS, other=0.0).to(tl.float32)
        q, scale = quantise_groups(x, tl.float8e4nv)
        for step in tl.static_range(RANKS):
            peer = (rank + 1 + step) % RANKS
            if wants(owners, peer, MASKED):
                tl.store(peer_at(bases_ptr, peer, rows_at, tl.float8e4nv) + at, q, mask=at < COLUMNS)
                store_scales(bases_ptr, peer, scales_at, group, scale, scales)


@triton.jit
def send_routing(bases_ptr, ids, weights, ids_at, weights_at, rank, top_k, RANKS: tl.constexpr, SLOTS: tl.constexpr):
    """Ids and weights of one token, to every rank."""
    slot = tl.arange(0, SLOTS)
    ids = tl.where((ids >= 0) & (ids < 0x7FFFFFFF), ids, -1).to(tl.int32)
    for step in tl.static_range(RANKS):
        base = tl.load(bases_ptr + (rank + 1 + step) % RANKS)
        tl.store((base + ids_at).to(tl.pointer_type(tl.int32)) + slot, ids, mask=slot < top_k)
        tl.store((base + weights_at).to(tl.pointer_type(tl.float32)) + slot, weights, mask=slot < top_k)


@triton.jit
def make_blocks(
    topk_ids_ptr,
    expert_map_ptr,
    scratch_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    post_padded_ptr,
    expert_counts_ptr,
    record_ptr,
    tally_ptr,
    ints_ptr,
    reals_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    block_m,
    capacity,
    fallback,
    MAKES: tl.constexpr,
    COUNTS: tl.constexpr,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Histogram, M blocks and choice, as `align` and `select` make them, by one CTA.

    COUNTS slots are counted at a time, each of which costs a trip to memory and back.
    """
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    pieces = (num_slots + PIECE - 1) // PIECE
    for start in range(0, num_slots, COUNTS):
        slots = start + tl.arange(0, COUNTS)
        ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, slots, num_slots, num_experts, num_local_experts)
        counts += count_ids(ids, num_local_experts, BINS)
        if MAKES != _COUNT:
            tl.store(scratch_ptr + BINS + slots, ids, mask=slots < pieces * PIECE)
    tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)
    if MAKES == _SELECT:
        tables = load_tables(ints_ptr, reals_ptr, C, S, LAUNCHES, MARGINS)
        choice, block_m, static_us, chosen_us, active, outside = choose_candidate(counts, tables, fallback, C, LAUNCHES)
        capacity = capacity_of(num_slots, num_local_experts, block_m)
        record_choice(
            choice,
            block_m,
            static_us,
            chosen_us,
            active,
            outside,
            capacity,
            counts,
            record_ptr,
            post_padded_ptr,
            tally_ptr,
            C,
            STRIDE,
        )
    if MAKES != _COUNT:
        fill(sorted_token_ids_ptr, 0, capacity, num_slots, 1024, 1024)
        tl.debug_barrier()  # sentinels before the slots that replace some, and ids before they are read
        place_chunk(
            0,
            counts,
            tl.zeros((BINS,), dtype=tl.int32),
            block_m,
            pieces,
            1,
            scratch_ptr,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            None,
            None,
            num_slots,
            num_local_experts,
            PIECE,
            BINS,
            IDS,
            TILE,
        )
        if MAKES == _BLOCKS:
            tl.store(post_padded_ptr, tl.sum((counts + block_m - 1) // block_m, 0) * block_m)


@triton.jit(
    do_not_specialize=[
        "rank",
        "num_experts",
        "num_local_experts",
        "block_m",
        "capacity",
        "fallback",
        "limit_ns",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def dispatch_kernel(
    bases_ptr,
    x_ptr,
    x_scales_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    rank_of_expert_ptr,
    expert_map_ptr,
    own_ids_ptr,
    cells_ptr,
    header_ptr,
    fault_ptr,
    ticket_ptr,
    scratch_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    post_padded_ptr,
    expert_counts_ptr,
    record_ptr,
    tally_ptr,
    ints_ptr,
    reals_ptr,
    rank,
    num_experts,
    num_local_experts,
    block_m,
    capacity,
    fallback,
    limit_ns,
    count_0,
    count_1,
    count_2,
    count_3,
    count_4,
    count_5,
    count_6,
    count_7,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    QUANTISES: tl.constexpr,
    MASKED: tl.constexpr,
    SENDS: tl.constexpr,
    WAITS: tl.constexpr,
    CELLS_AT: tl.constexpr,
    IDS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    ROWS_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MAKES: tl.constexpr,
    COUNTS: tl.constexpr,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
    STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One CTA a token, and one where there is none.

    `x_ptr` points at int32 words of rows that are sent as they are, or at bf16 or fp16 that is quantised; `x_scales_ptr`
    at the scales of e4m3 rows. SENDS or WAITS is only off where ranks are emulated one after the other: all send, then
    all wait.
    """
    wait_for_launch_before(PDL)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    first, num_tokens = first_row(counts, rank, RANKS)
    token = tl.program_id(0)
    if SENDS & (token < num_tokens):
        row = (first + token).to(tl.int64)
        ids, owners = owner_of(topk_ids_ptr, rank_of_expert_ptr, token * TOP_K, num_experts, TOP_K, SLOTS)
        slot = tl.arange(0, SLOTS)
        weights = tl.load(topk_weights_ptr + token * TOP_K + slot, mask=slot < TOP_K, other=0.0).to(tl.float32)
        at = token.to(tl.int64)
        if QUANTISES:
            send_quantised(
                bases_ptr,
                x_ptr + at * COLUMNS,
                ROWS_AT + row * ROW_BYTES,
                SCALES_AT + row * (COLUMNS // 32),
                owners,
                rank,
                RANKS,
                MASKED,
                COLUMNS,
                GROUPS,
            )
        else:
            words: tl.constexpr = ROW_BYTES // 4
            send_words(
                bases_ptr, x_ptr + at * words, ROWS_AT + row * ROW_BYTES, owners, rank, RANKS, MASKED, words, BLOCK
            )
            if x_scales_ptr is not None:
                scales: tl.constexpr = COLUMNS // 128
                for step in tl.static_range(RANKS):
                    peer = (rank + 1 + step) % RANKS
                    if wants(owners, peer, MASKED):
                        group = tl.arange(0, BLOCK)
                        scale = tl.load(x_scales_ptr + at * scales + group, mask=group < scales)
                        store_scales(bases_ptr, peer, SCALES_AT + row * (scales * 4), group, scale, scales)
        send_routing(
            bases_ptr,
            ids,
            weights,
            IDS_AT + row * (TOP_K * 4),
            WEIGHTS_AT + row * (TOP_K * 4),
            rank,
            TOP_K,
            RANKS,
            SLOTS,
        )
    if is_last(ticket_ptr):
        epoch = next_epoch(header_ptr)
        if SENDS:
            tell_all(bases_ptr, CELLS_AT, rank, epoch, num_tokens, RANKS, LANES)
        if WAITS:
            expected = spread(counts, RANKS, LANES)
            await_all(cells_ptr, header_ptr, fault_ptr, epoch, expected, limit_ns, _DISPATCH, RANKS, LANES)
            make_blocks(
                own_ids_ptr,
                expert_map_ptr,
                scratch_ptr,
                sorted_token_ids_ptr,
                expert_ids_ptr,
                post_padded_ptr,
                expert_counts_ptr,
                record_ptr,
                tally_ptr,
                ints_ptr,
                reals_ptr,
                tl.sum(expected, 0) * TOP_K,
                num_experts,
                num_local_experts,
                block_m,
                capacity,
                fallback,
                MAKES,
                COUNTS,
                PIECE,
                BINS,
                IDS,
                TILE,
                C,
                S,
                LAUNCHES,
                MARGINS,
                STRIDE,
            )
