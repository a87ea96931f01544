"""The end of a combine of few tokens: a sum is its own flag, so that no push waits for its stores to arrive before it tells of them.

A word of shared memory that holds no sum holds a mark: -0.0, two of them where sums have 16 bits. Words arrive whole. No sum is sent as -0.0:
it goes as 0.0, which gives the same bits, for sums of ranks are added to 0.0. Who reads a sum puts the mark back. All ranks have awaited
that before the next one is pushed: this rank's next dispatch begins after the end of this launch, and no rank pushes before it has
awaited that dispatch.

Cells go without order here (`flags.tell`). They say that a CTA of the push has read its routing, that its rank missed nobody, and so
that there will be sums. A CTA ends when it has the cells of its number of all ranks and every sum of its token.

What each CTA reads and writes, and why it may:

    memory of this rank     written by                        read here when
    the step in progress    the dispatch of this rank         it had ended before the push began, which lets this launch begin
    its routing's copy      the dispatch of this rank         likewise; the next one begins after the end of this launch
    cells of its number     the push of each rank             they hold this step; the next push comes after the next dispatch
    a sum                   the push of one rank, once        it is no mark; then the mark is written, by the same thread
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import (
    COMBINE,
    FAULT,
    LATE,
    await_cells,
    epoch_in_progress,
    first_row,
    has_sum,
    now_ns,
    record,
    spread,
)
from rampwrap.kernels.triton.interpreter import INTERPRETED, downcast
from rampwrap.kernels.triton.pdl import begin_next_launch, end_after_launch_before

_COMBINE, _LATE, _FAULT = tl.constexpr(COMBINE), tl.constexpr(LATE), tl.constexpr(FAULT)
_DONE, _GAVE_UP, _WAITS, _FAILED = (tl.constexpr(its) for its in range(4))
"Of a thread that waits; the highest of all counts."


@triton.jit
def mark_of(TYPE: tl.constexpr):
    """-0.0 of a type, as an integer; of two that share a word where they are narrower."""
    return -0x80000000 if TYPE.primitive_bitwidth == 32 else -0x7FFF8000


@triton.jit
def unmarked(total):
    """Sums as they travel: 0.0 for -0.0, all others as they are."""
    if INTERPRETED:  # which adds bits of bf16
        return downcast(total.to(tl.float32) + 0.0, total.dtype)
    return total + 0.0


@triton.jit
def floats_of(words, TYPE: tl.constexpr):
    """The sums that words hold, one or two each, in float32."""
    if TYPE.primitive_bitwidth == 32:
        return words.to(tl.float32, bitcast=True)
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        return tl.interleave(low, high).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "rank",
        "limit_ns",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def take_kernel(
    out_ptr,
    marked_ptr,
    routing_ptr,
    cells_ptr,
    header_ptr,
    fault_ptr,
    rank,
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
    ROOM: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    EAGER: tl.constexpr,
    PDL: tl.constexpr,
):
    """A CTA for each token of this rank along axis 0, one where there is none, and for each BLOCK words of a row along axis 1.

    `marked_ptr` points at sums as words of 32 bits, ROOM tokens of each rank, `routing_ptr` at the routing as `push_kernel` has it. EVERY
    adds the sums of all ranks. EAGER looks for sums before their cells are there: a trip to memory less, and more traffic while it waits.
    The launch before is that push, which has begun on all its SMs when this one begins, and is waited for at the end.
    """
    begin_next_launch(PDL)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    epoch = epoch_in_progress(header_ptr)
    _first, num_tokens = first_row(counts, rank, RANKS)
    token = tl.program_id(0)
    inside = (token < num_tokens).to(tl.int32)
    owners = tl.full((SLOTS,), -1, tl.int32)
    if not EVERY:
        slot = tl.arange(0, SLOTS)
        its = routing_ptr + (tl.cast(rank, tl.int64) * MAX_TOKENS + token) * (TOP_K * 2)
        owners = tl.load(its + 2 * slot, mask=slot < TOP_K * inside, other=-1, cache_modifier=".cg")
    expected = spread(counts, RANKS, LANES)
    wanted = tl.arange(0, LANES) < RANKS
    cells = cells_ptr + token * RANKS
    if INTERPRETED:  # nobody runs beside this launch
        await_cells(cells, header_ptr, fault_ptr, epoch, expected, wanted, limit_ns, _COMBINE, LANES)
    due = (tl.cast(epoch, tl.int64) << 32) | expected
    own = cells + tl.where(wanted, tl.arange(0, LANES), 0)
    limit = tl.cast(limit_ns, tl.int64)
    begun, waited = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    to_word: tl.constexpr = 32 // PARTIAL.primitive_bitwidth
    row_words: tl.constexpr = COLUMNS // to_word
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.cast(token, tl.int64) * row_words + word
    total, absent = tl.zeros((BLOCK * to_word,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    state, looks = tl.full((), _WAITS, tl.int32), tl.full((), 1, tl.int32)
    while state == _WAITS:
        # All that is waited for is under way together: masks and no branches, and no sum before the last load.
        seen = tl.load(own, volatile=True)
        fault = tl.load(header_ptr + _FAULT, volatile=True)
        parts, unseen = (), tl.where(looks > 0, 0, mark_of(PARTIAL))
        for peer in tl.static_range(RANKS):
            mask = word < row_words * inside * looks * has_sum(owners, peer, EVERY)
            from_ptr = marked_ptr + peer * (ROOM * row_words) + at
            parts += (tl.load(from_ptr, mask=mask, other=unseen, volatile=True),)  # type: ignore[assignment]
        absent = tl.zeros((BLOCK,), tl.int32)
        for peer in tl.static_range(RANKS):
            absent |= tl.where(parts[peer] == mark_of(PARTIAL), 1 << peer, 0)
        # Each thread sees cells, faults and the time for itself, but all go on together, by what any of them saw.
        late = tl.max((wanted & ((seen >> 32) != epoch)).to(tl.int32), 0)
        other = tl.max((wanted & ((seen >> 32) == epoch) & (seen != due)).to(tl.int32), 0)
        waits = tl.where((waited < limit) & (fault == 0), _WAITS, _GAVE_UP)
        of_cells = tl.where(other > 0, _FAILED, tl.where(late > 0, waits, _DONE))
        state = tl.max(tl.maximum(tl.where(absent != 0, waits, _DONE), of_cells), 0)
        if INTERPRETED:
            state = tl.minimum(state, _GAVE_UP)
        if state == _WAITS:
            now = now_ns()  # not before: the clock would be waited for
            begun = tl.where(begun == 0, now, begun)
            waited = now - begun
            if not EAGER:
                looks = 1 - late
        else:
            total = tl.zeros((BLOCK * to_word,), tl.float32)
            for peer in tl.static_range(RANKS):
                more = total + floats_of(parts[peer], PARTIAL)
                total = tl.where(has_sum(owners, peer, EVERY) > 0, more, total)
    if state != _DONE:  # ranks whose cells are missing, or count differently; otherwise those whose sums are
        await_cells(cells, header_ptr, fault_ptr, epoch, expected, wanted, 0, _COMBINE, LANES)
        bits = tl.full((), 0, tl.int64)
        for peer in tl.static_range(RANKS):
            lost = tl.max((absent >> peer) & 1, 0) * inside * has_sum(owners, peer, EVERY)
            bits |= lost.to(tl.int64) << peer
        fault = (tl.cast(epoch, tl.int64) << 32) | (_LATE << 16) | (_COMBINE << 8) | bits
        record(header_ptr, fault_ptr, tl.where(bits != 0, fault, 0))
    column = tl.program_id(1) * (BLOCK * to_word) + tl.arange(0, BLOCK * to_word)
    to = out_ptr + tl.cast(token, tl.int64) * COLUMNS + column
    tl.store(to, downcast(total, out_ptr.dtype.element_ty), mask=column < COLUMNS * inside)
    for peer in tl.static_range(RANKS):
        mask = word < row_words * inside * has_sum(owners, peer, EVERY)
        tl.store(marked_ptr + peer * (ROOM * row_words) + at, tl.full((BLOCK,), mark_of(PARTIAL), tl.int32), mask=mask)
    end_after_launch_before(PDL)
