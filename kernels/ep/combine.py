"""Combine by low latency: owners push sums to fixed places at the source, which adds them by rank. Two launches.

The first sums and pushes, and ends with this rank's flags. The second waits for those of the others, with at most as many
CTAs as the GPU has SMs, and ends the step: only then the epoch moves on.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import (
    COMBINE,
    EPOCH,
    await_all,
    first_row,
    is_last,
    next_epoch,
    owner_of,
    peer_at,
    spread,
    tell_all,
)
from rampwrap.kernels.triton.interpreter import downcast
from rampwrap.kernels.triton.pdl import wait_for_launch_before

_COMBINE, _EPOCH = tl.constexpr(COMBINE), tl.constexpr(EPOCH)


@triton.jit(
    do_not_specialize=[
        "rank",
        "num_experts",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def push_kernel(
    bases_ptr,
    y_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    expert_map_ptr,
    header_ptr,
    ticket_ptr,
    rank,
    num_experts,
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
    BY_SLOT: tl.constexpr,
    PARTIAL: tl.constexpr,
    PARTIAL_BYTES: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    CELLS_AT: tl.constexpr,
    PARTIALS_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sources along axis 1, each of whose tokens the CTAs along axis 0 share; ids and weights are those received.

    EVERY pushes all rows, by a caller who knows no owners: without ids, and summed. `y_ptr` points at rows that are summed
    already, or BY_SLOT at one row a slot: weighted and added here in the order of slots, in float32.

    What does not depend on each other is loaded together: a trip to memory takes 0.6 us, as long as 200 KB take on the link.
    So rows are read before it is known whether they are wanted.
    """
    wait_for_launch_before(PDL)
    epoch = next_epoch(header_ptr)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    # The next rank first, so that not all push to the same one.
    source = (rank + 1 + tl.program_id(1)) % RANKS
    first, num_tokens = first_row(counts, source, RANKS)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        row = tl.cast(first + token, tl.int64)
        here = tl.full((SLOTS,), 1, tl.int32)
        if not EVERY:
            _ids, local = owner_of(topk_ids_ptr, expert_map_ptr, row * TOP_K, num_experts, TOP_K, SLOTS)
            here = (local >= 0).to(tl.int32)
        wanted = tl.max(here, 0)
        to = peer_at(
            bases_ptr,
            source,
            PARTIALS_AT + (rank.to(tl.int64) * MAX_TOKENS + token) * (COLUMNS * PARTIAL_BYTES),
            PARTIAL,
        )
        slot = tl.arange(0, SLOTS)
        for start in tl.static_range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < COLUMNS
            if BY_SLOT:
                total = tl.zeros((BLOCK,), tl.float32)
                for k in tl.static_range(TOP_K):
                    if tl.sum(tl.where(slot == k, here, 0), 0) > 0:
                        weight = tl.load(topk_weights_ptr + row * TOP_K + k)
                        y = tl.load(y_ptr + (row * TOP_K + k) * COLUMNS + column, mask=mask, other=0.0)
                        total += weight * y.to(tl.float32)
            else:
                total = tl.load(y_ptr + row * COLUMNS + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(to + column, downcast(total, PARTIAL), mask=column < COLUMNS * wanted)
    if is_last(ticket_ptr):
        _first, own = first_row(counts, rank, RANKS)
        tell_all(bases_ptr, CELLS_AT, rank, epoch, own, RANKS, LANES)


@triton.jit
def owners_of(
    topk_ids_ptr,
    table_ptr,
    token,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    EVERY: tl.constexpr,
):
    """The rank of each slot of one token, int32 [SLOTS]; -1 beyond the last token, and where nobody knows them."""
    owners = tl.full((SLOTS,), -1, tl.int32)
    if not EVERY:
        slots = tl.where(token < num_tokens, TOP_K, 0)
        _ids, owners = owner_of(topk_ids_ptr, table_ptr, token * TOP_K, num_experts, slots, SLOTS)
    return owners


@triton.jit
def has_sum(owners, peer, EVERY: tl.constexpr):
    """1 where a rank has a sum for a token, else 0."""
    if EVERY:
        return tl.full((), 1, tl.int32)
    return tl.max((owners == peer).to(tl.int32), 0)


@triton.jit(
    do_not_specialize=[
        "rank",
        "num_experts",
        "limit_ns",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def sum_kernel(
    out_ptr,
    partials_ptr,
    topk_ids_ptr,
    rank_of_expert_ptr,
    cells_ptr,
    header_ptr,
    fault_ptr,
    ticket_ptr,
    rank,
    num_experts,
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
    MAX_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Any number of CTAs, which share this rank's tokens; ids are those that the rank sent. EVERY adds those of all ranks."""
    wait_for_launch_before(PDL)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    epoch = next_epoch(header_ptr)
    _first, num_tokens = first_row(counts, rank, RANKS)
    token = tl.program_id(0)
    # Before the wait: it is this rank's own, and would be a trip to memory behind it.
    owners = owners_of(topk_ids_ptr, rank_of_expert_ptr, token, num_tokens, num_experts, TOP_K, SLOTS, EVERY)
    expected = spread(counts, RANKS, LANES)
    await_all(cells_ptr, header_ptr, fault_ptr, epoch, expected, limit_ns, _COMBINE, RANKS, LANES)
    while token < num_tokens:
        for start in tl.static_range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < COLUMNS
            total = tl.zeros((BLOCK,), tl.float32)
            # Masks and no branches, so that the loads of all ranks are under way together.
            for peer in tl.static_range(RANKS):
                here = has_sum(owners, peer, EVERY)
                at = (tl.cast(peer, tl.int64) * MAX_TOKENS + token) * COLUMNS + column
                part = tl.load(partials_ptr + at, mask=column < COLUMNS * here, other=0.0).to(tl.float32)
                total = tl.where(here > 0, total + part, total)
            at = tl.cast(token, tl.int64) * COLUMNS + column
            tl.store(out_ptr + at, downcast(total, out_ptr.dtype.element_ty), mask=mask)
        token += tl.num_programs(0)
        owners = owners_of(topk_ids_ptr, rank_of_expert_ptr, token, num_tokens, num_experts, TOP_K, SLOTS, EVERY)
    if is_last(ticket_ptr):
        tl.store(header_ptr + _EPOCH, epoch)
