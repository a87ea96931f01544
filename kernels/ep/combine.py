"""Combine by low latency: owners push sums to fixed places at the source, which adds them by rank. Two launches.

A CTA of the first sums and pushes tokens of one source, and tells that source. CTAs of the second wait for those of the first that
pushed their tokens, of all ranks, and for no others, so that tokens are added while others travel. They begin while the first launch
runs, for cells tell all that they need of it, and end after it. Of few tokens the second launch is another: `marked`.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import (
    COMBINE,
    await_cells,
    ctas_of,
    end_step,
    epoch_in_progress,
    first_row,
    has_all,
    has_sum,
    next_epoch,
    owner_of,
    peer_at,
    spread,
    tell,
)
from rampwrap.kernels.ep.marked import unmarked
from rampwrap.kernels.triton.interpreter import downcast
from rampwrap.kernels.triton.pdl import begin_next_launch, end_after_launch_before, wait_for_launch_before

_COMBINE = tl.constexpr(COMBINE)


@triton.jit(
    do_not_specialize=[
        "rank",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def push_kernel(
    bases_ptr,
    y_ptr,
    routing_ptr,
    header_ptr,
    rank,
    count_0,
    count_1,
    count_2,
    count_3,
    count_4,
    count_5,
    count_6,
    count_7,
    RANKS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_SLOT: tl.constexpr,
    PARTIAL: tl.constexpr,
    PARTIAL_BYTES: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    CELLS_AT: tl.constexpr,
    MOST: tl.constexpr,
    SUMS_AT: tl.constexpr,
    ROOM: tl.constexpr,
    MARKED: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sources along axis 1, each of whose tokens up to MOST CTAs along axis 0 share. There is room for ROOM sums of each rank; MARKED ones
    are their own flags (`take_kernel`).

    The routing is a copy of that received, by source, token and slot: the owner, and the bits of the weight. Rows of the next step may lie elsewhere, so a source that has
    its sums may write its ids over those of another that are still to be read here. EVERY pushes all rows, by a caller who knows no
    owners: without them, and summed. `y_ptr` points at rows that are summed already, or BY_SLOT at one row a slot: weighted and added
    here in the order of slots, in float32.

    What does not depend on each other is loaded together: a trip to memory takes 0.6 us, as long as 200 KB take on the link.
    So rows are read before it is known whether they are wanted.
    """
    wait_for_launch_before(PDL)
    epoch, sound = epoch_in_progress(header_ptr), has_all(header_ptr)
    sends = sound.to(tl.int32)  # a rank that was missed may still add the sums of the step before
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    # The next rank first, so that not all push to the same one.
    source = (rank + 1 + tl.program_id(1)) % RANKS
    first, num_tokens = first_row(counts, source, RANKS)
    slot = tl.arange(0, SLOTS)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        row = tl.cast(first + token, tl.int64)
        here = tl.full((SLOTS,), 1, tl.int32)
        its = (tl.cast(source, tl.int64) * MAX_TOKENS + token) * (TOP_K * 2)
        if not EVERY:
            owners = tl.load(routing_ptr + its + 2 * slot, mask=slot < TOP_K, other=-1)
            here = (owners == rank).to(tl.int32)
        wanted = tl.max(here, 0) * sends
        to = peer_at(
            bases_ptr,
            source,
            SUMS_AT + (tl.cast(rank, tl.int64) * ROOM + token) * (COLUMNS * PARTIAL_BYTES),
            PARTIAL,
        )
        for start in tl.static_range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            if BY_SLOT:
                total = tl.zeros((BLOCK,), tl.float32)
                for k in tl.static_range(TOP_K):
                    if tl.sum(tl.where(slot == k, here, 0), 0) > 0:
                        weight = tl.load(routing_ptr + its + (2 * k + 1)).to(tl.float32, bitcast=True)
                        y = tl.load(y_ptr + (row * TOP_K + k) * COLUMNS + column, mask=column < COLUMNS, other=0.0)
                        total += weight * y.to(tl.float32)
                total = downcast(total, PARTIAL)
            else:
                y = tl.load(y_ptr + row * COLUMNS + column, mask=column < COLUMNS, other=0.0)
                total = y if y.dtype == PARTIAL else downcast(y.to(tl.float32), PARTIAL)
            if MARKED:
                total = unmarked(total)
            tl.store(to + column, total, mask=column < COLUMNS * wanted)
    if sound & (tl.program_id(0) < ctas_of(num_tokens, MOST)):
        _first, own = first_row(counts, rank, RANKS)
        tell(bases_ptr + source, CELLS_AT + (tl.program_id(0) * RANKS + rank) * 8, epoch, own, 1, not MARKED)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        end_step(header_ptr, epoch)


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
    BY_SOURCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Along axis 0 as many CTAs as push this rank's tokens at each rank; those along axis 1 share the columns.

    Ids are those that the rank sent. EVERY adds the sums of all ranks. BY_SOURCE waits for one cell of each rank, told after all its sums.

    Without BY_SOURCE the launch before is `push_kernel`, which is waited for at the end. What is read here beside sums was there when it
    began: each CTA of it lets this launch begin after its own wait, when the dispatch and what made the ids had ended and all that they
    wrote was in L2. The step in progress and the ids are read from there (.cg); the table never changes; nobody writes the header's
    step before the end of this launch.
    """
    if BY_SOURCE:
        wait_for_launch_before(PDL)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    epoch = next_epoch(header_ptr) if BY_SOURCE else epoch_in_progress(header_ptr)
    _first, num_tokens = first_row(counts, rank, RANKS)
    token = tl.program_id(0)
    # Before the wait: it is this rank's own, and would be a trip to memory behind it.
    owners = owners_of(topk_ids_ptr, rank_of_expert_ptr, token, num_tokens, num_experts, TOP_K, SLOTS, EVERY)
    expected = spread(counts, RANKS, LANES)
    wanted = tl.arange(0, LANES) < RANKS
    cells = cells_ptr if BY_SOURCE else cells_ptr + token * RANKS
    await_cells(cells, header_ptr, fault_ptr, epoch, expected, wanted, limit_ns, _COMBINE, LANES)
    if not BY_SOURCE:
        begin_next_launch(PDL)  # not sooner: it would take room from the push
    while token < num_tokens:
        for start in range(tl.program_id(1) * BLOCK, COLUMNS, tl.num_programs(1) * BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < COLUMNS
            # Masks and no branches, and no sum before the last load: those of all ranks are under way together.
            parts = ()
            for peer in tl.static_range(RANKS):
                at = (tl.cast(peer, tl.int64) * MAX_TOKENS + token) * COLUMNS + column
                part = tl.load(partials_ptr + at, mask=column < COLUMNS * has_sum(owners, peer, EVERY), other=0.0)
                parts += (part,)  # type: ignore[assignment]
            total = tl.zeros((BLOCK,), tl.float32)
            for peer in tl.static_range(RANKS):
                total = tl.where(has_sum(owners, peer, EVERY) > 0, total + parts[peer].to(tl.float32), total)
            at = tl.cast(token, tl.int64) * COLUMNS + column
            tl.store(out_ptr + at, downcast(total, out_ptr.dtype.element_ty), mask=mask)
        token += tl.num_programs(0)
        owners = owners_of(topk_ids_ptr, rank_of_expert_ptr, token, num_tokens, num_experts, TOP_K, SLOTS, EVERY)
    if not BY_SOURCE:
        end_after_launch_before(PDL)
