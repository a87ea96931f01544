"""Flags between GPUs: each CTA tells those of its number on other ranks what it stored, by a release of its own.

A cell is an int64, (epoch << 32) | tokens of the writer. A phase has one for each CTA of each rank; those of all ranks for one CTA lie
together. No launch gathers its CTAs by a ticket before it tells: that would be two trips to memory and a second fence. Cells are
compared for equality and never cleared: every rank waits for every other in both phases, so no cell can run ahead of its reader
(`tests/ep/test_protocol.py`). A wait ends after a time limit, or when another one failed; what was missing is left where the host
sees it, and later waits do not wait again until the host starts anew.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.triton.interpreter import INTERPRETED

EPOCH, FAULT, STEP = 0, 16, 32
"""Places in the header, in int64, on lines of their own: the last step that was told, what went wrong, and the step in progress. No
launch writes one that it reads: dispatch reads the first and writes the last, push the other way round."""
DISPATCH, COMBINE = 1, 2
LATE, COUNTS = 1, 2
"Kinds of fault: a rank did not arrive in time, or with another number of tokens than was expected."
_EPOCH, _FAULT, _STEP = tl.constexpr(EPOCH), tl.constexpr(FAULT), tl.constexpr(STEP)
_DISPATCH = tl.constexpr(DISPATCH)
_LATE, _COUNTS = tl.constexpr(LATE), tl.constexpr(COUNTS)
_EPOCHS = tl.constexpr((1 << 31) - 1)

# In PTX, where one warp or thread acts and the others do not: all threads of a CTA would do it otherwise.
# A lane a rank. All that the CTA stored before its last barrier arrives before the cell.
_TELL = tl.constexpr("""{
.reg .pred mine; .reg .u32 lane; .reg .u64 at;
mov.u32 lane, %tid.x;
setp.lt.u32 mine, lane, $4;
mad.wide.u32 at, lane, 8, $1;
@mine ld.global.b64 at, [at];
add.u64 at, at, $2;
@mine st.release.sys.global.b64 [at], $3;
mov.u32 $0, 0;
}""")
# The same, behind nothing.
_NOTE = tl.constexpr(_TELL.value.replace("release", "relaxed"))
# The first warp polls, its lanes together; threads of others get what is due. A fault is read ahead of each acquire, which nothing overtakes.
_POLL = tl.constexpr("""{
.reg .pred mine, late; .reg .u32 lane; .reg .u64 begun, now, fault, due, there;
mov.u64 $0, $2;
mov.u32 lane, %tid.x;
setp.lt.u32 mine, lane, 32;
@!mine bra done;
shr.u64 due, $2, 32;
mov.u64 begun, 0;
again:
ld.relaxed.sys.global.b64 fault, [$3];
ld.acquire.sys.global.b64 $0, [$1];
shr.u64 there, $0, 32;
setp.ne.u64 late, there, due;
setp.ne.and.u32 late, $5, 0, late;
setp.eq.and.u64 late, fault, 0, late;
vote.sync.any.pred late, late, 0xffffffff;
@!late bra done;
mov.u64 now, %globaltimer;
setp.eq.u64 late, begun, 0;
selp.u64 begun, now, begun, late;
sub.u64 now, now, begun;
setp.lt.s64 late, now, $4;
vote.sync.any.pred late, late, 0xffffffff;
@late bra again;
done:
}""")
# The first thread, which is one of those that polled. The first fault stays.
_RECORD = tl.constexpr("""{
.reg .pred mine; .reg .u32 lane; .reg .u64 old;
mov.u32 $0, 0;
mov.u32 lane, %tid.x;
setp.eq.u32 mine, lane, 0;
setp.ne.and.u64 mine, $3, 0, mine;
@!mine bra done;
atom.cas.relaxed.sys.global.b64 old, [$1], 0, $3;
setp.eq.u64 mine, old, 0;
@mine st.relaxed.sys.global.b64 [$2], $3;
done:
}""")


@triton.jit
def peer_at(bases_ptr, peer, at, TYPE: tl.constexpr):
    """A pointer into the memory of a peer, `at` bytes behind its start, a multiple of 16.

    Without the hint a loaded address has unknown alignment, and stores become narrow.
    """
    address = tl.load(bases_ptr + peer) + at
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def now_ns():
    """The GPU's clock; in the interpreter time does not pass."""
    if INTERPRETED:
        return tl.full((), 0, tl.int64)
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def next_epoch(header_ptr):
    """That of the step to come; where its rows go source by source, of the step in progress. After the last comes 1: 0 is in cells that nobody wrote."""
    epoch = tl.load(header_ptr + _EPOCH)
    return tl.where(epoch == _EPOCHS, 1, epoch + 1)


@triton.jit
def begin_step(header_ptr, epoch):
    """The first CTA of a dispatch says which step is in progress."""
    if tl.program_id(0) == 0:
        tl.store(header_ptr + _STEP, epoch)


@triton.jit
def epoch_in_progress(header_ptr):
    """What `begin_step` left, its lower half, past the cache of the SM: this launch may have begun before others ended."""
    return tl.load((header_ptr + _STEP).to(tl.pointer_type(tl.int32)), cache_modifier=".cg")


@triton.jit
def end_step(header_ptr, epoch):
    """The next dispatch or the next source by source is of the step after this one."""
    tl.store(header_ptr + _EPOCH, epoch)


@triton.jit
def has_all(header_ptr):
    """Whether this rank missed nothing so far. What it has after a fault is worth nothing: it tells nothing more, so that others miss it,
    also one that came too late and finds all else there. Nor do dispatch and push store anything, for that one may still be in the step
    before, and read there. To be read early, for it is a trip to memory."""
    return tl.load(header_ptr + _FAULT, cache_modifier=".cg") == 0


@triton.jit
def tell(bases_ptr, cell_at, epoch, num_tokens, RANKS: tl.constexpr, COVERS: tl.constexpr = True):
    """Writes a cell, `cell_at` bytes into the memory of RANKS ranks; whatever the CTA stored or saw is visible before.

    Without COVERS its stores may arrive later. What it loaded is in registers, for what it stored before this depends on that.
    """
    value = (tl.cast(epoch, tl.int64) << 32) | num_tokens
    tl.debug_barrier()
    if INTERPRETED:
        for rank in tl.static_range(RANKS):
            tl.store((tl.load(bases_ptr + rank) + cell_at).to(tl.pointer_type(tl.int64)), value)
    else:
        ranks, at = tl.full((), RANKS, tl.int32), tl.cast(cell_at, tl.int64)
        code: tl.constexpr = _TELL if COVERS else _NOTE
        tl.inline_asm_elementwise(
            code, "=r,l,l,l,r", [bases_ptr, at, value, ranks], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def await_cells(
    cells_ptr,
    header_ptr,
    fault_ptr,
    epoch,
    counts,
    wanted,
    limit_ns,
    PHASE: tl.constexpr,
    LANES: tl.constexpr,
    first=0,
):
    """Waits for one cell of each wanted rank; everything that they announce is then visible to all threads of the CTA.

    Args:
        cells_ptr: of one CTA and phase, in this rank's memory; that of the `first` rank.
        header_ptr: of this rank's memory.
        fault_ptr: int64 [1] that the host reads: epoch, kind, phase and a bit a rank, from the highest (`host.said_by`).
        epoch: of the step.
        counts: int32 [LANES], tokens that each rank must announce; up to 8 lanes, which every warp then has.
        wanted: bool [LANES], ranks that are waited for.
        limit_ns: nanoseconds after which the wait ends.
    """
    peer, epoch = tl.arange(0, LANES), tl.cast(epoch, tl.int64)
    due = (epoch << 32) | counts
    own = cells_ptr + tl.where(wanted, peer, 0)
    if INTERPRETED:  # nobody runs beside this launch
        cells = tl.load(own)
    else:
        limit, asked = tl.cast(limit_ns, tl.int64), wanted.to(tl.int32)
        cells = tl.inline_asm_elementwise(
            _POLL,
            "=&l,l,l,l,l,r",
            [own, due, header_ptr + _FAULT, limit, asked],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()
    late = wanted & ((cells >> 32) != epoch)
    other = wanted & (cells != due) & ~late
    bits = tl.full((LANES,), 1, tl.int64) << (peer + first)
    missing = tl.sum(tl.where(late, bits, 0), 0)
    wrong = tl.sum(tl.where(other, bits, 0), 0)
    kind = tl.where(missing != 0, _LATE, _COUNTS).to(tl.int64)
    fault = (epoch << 32) | (kind << 16) | (PHASE << 8) | missing | tl.where(missing != 0, 0, wrong)
    record(header_ptr, fault_ptr, tl.where((missing | wrong) != 0, fault, 0))


@triton.jit
def record(header_ptr, fault_ptr, fault):
    """Leaves a fault that is not 0 where later waits and the host see it; the first one stays."""
    if INTERPRETED:
        if (fault != 0) & (tl.load(header_ptr + _FAULT) == 0):
            tl.store(header_ptr + _FAULT, fault)
            tl.store(fault_ptr, fault)
    else:
        tl.inline_asm_elementwise(
            _RECORD, "=r,l,l,l", [header_ptr + _FAULT, fault_ptr, fault], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def ctas_of(num_tokens, MOST: tl.constexpr):
    """CTAs that share the tokens of a rank; there is one where there are none, which tells so."""
    return tl.minimum(tl.maximum(num_tokens, 1), MOST)


@triton.jit
def meet(
    bases_ptr,
    cells_ptr,
    header_ptr,
    fault_ptr,
    epoch,
    sound,
    counts,
    rank,
    num_tokens,
    limit_ns,
    CELLS_AT: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    MOST: tl.constexpr,
    SENDS: tl.constexpr,
    WAITS: tl.constexpr,
):
    """The end of a launch that sends rows: each CTA tells those of its number on all ranks, and waits for them.

    There is a CTA for each number that a rank tells: one that waited for more of them would take about 1 us each, and could keep CTAs
    from beginning that others wait for. One of SENDS and WAITS is only off where ranks are emulated one after the other.

    Args:
        sound: of `has_all`, without which nothing is told.
        num_tokens: of this rank.
    """
    number = tl.program_id(0)
    if SENDS:  # noqa: SIM102, one of them is of the compiler
        if sound & (number < ctas_of(num_tokens, MOST)):
            tell(bases_ptr, CELLS_AT + (number * RANKS + rank) * 8, epoch, num_tokens, RANKS)
    begin_step(header_ptr, epoch)  # not sooner: what is read after it would wait for the epoch
    if WAITS:
        expected = spread(counts, RANKS, LANES)
        wanted = (tl.arange(0, LANES) < RANKS) & (number < ctas_of(expected, MOST))
        cells = cells_ptr + number * RANKS
        await_cells(cells, header_ptr, fault_ptr, epoch, expected, wanted, limit_ns, _DISPATCH, LANES)


@triton.jit
def spread(counts, RANKS: tl.constexpr, LANES: tl.constexpr):
    """A tuple of scalars, one a rank, as int32 [LANES]."""
    peer = tl.arange(0, LANES)
    vector = tl.zeros((LANES,), tl.int32)
    for rank in tl.static_range(RANKS):
        vector = tl.where(peer == rank, counts[rank], vector)
    return vector


@triton.jit
def first_row(counts, rank, RANKS: tl.constexpr):
    """(rows of the ranks before one, rows of the rank)."""
    before = rank * 0
    own = rank * 0
    for other in tl.static_range(RANKS):
        before += tl.where(other < rank, counts[other], 0)
        own += tl.where(other == rank, counts[other], 0)
    return before, own


@triton.jit
def owner_of(topk_ids_ptr, table_ptr, at, num_experts, top_k, SLOTS: tl.constexpr):
    """What a table of all experts holds for the slots of one token, int32 [SLOTS]: -1 for ids out of range."""
    slot = tl.arange(0, SLOTS)
    # Past the cache of the SM: `sum_kernel` begins before the launch ahead of it has ended. Nobody reads them twice.
    ids = tl.load(topk_ids_ptr + at + slot, mask=slot < top_k, other=-1, cache_modifier=".cg")
    valid = (ids >= 0) & (ids < num_experts)
    return ids, tl.load(table_ptr + ids, mask=valid, other=-1)


@triton.jit
def has_sum(owners, peer, EVERY: tl.constexpr):
    """1 where a rank has a sum for a token, by the owners of its slots; or always; else 0."""
    if EVERY:
        return tl.full((), 1, tl.int32)
    return tl.max((owners == peer).to(tl.int32), 0)
