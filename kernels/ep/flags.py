"""Flags between GPUs: one cell a peer and phase, written by a release after everything that it announces.

A cell is an int64, (epoch << 32) | tokens of the writer. Cells are compared for equality and never cleared: every rank waits
for every other in both phases, so no cell can run ahead of its reader (`tests/ep/test_protocol.py`). A wait ends after a
time limit; what was missing is left where the host sees it, and later waits do not wait again until the host starts anew.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.triton.interpreter import INTERPRETED

EPOCH, FAULT = 0, 16
"Places in the header, in int64: lines of their own."
DISPATCH, COMBINE = 1, 2
LATE, COUNTS = 1, 2
"Kinds of fault: a rank did not arrive in time, or with another number of tokens than was expected."
MOST_RANKS = 8
"Of one host; counts of tokens are arguments, one a rank."
_EPOCH, _FAULT = tl.constexpr(EPOCH), tl.constexpr(FAULT)
_LATE, _COUNTS = tl.constexpr(LATE), tl.constexpr(COUNTS)
_EPOCHS = tl.constexpr((1 << 31) - 1)


@triton.jit
def peer_at(bases_ptr, peer, at, TYPE: tl.constexpr):
    """A pointer into the memory of a peer, `at` bytes behind its start, a multiple of 16.

    Without the hint a loaded address has unknown alignment, and stores become narrow.
    """
    address = tl.load(bases_ptr + peer) + at
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def load_acquire(ptr):
    """int64 cells, of any shape, with acquire at system scope."""
    if INTERPRETED:
        return tl.load(ptr)
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [ptr], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def now_ns():
    """The GPU's clock; without one, time does not pass."""
    if INTERPRETED:
        return tl.full((), 0, tl.int64)
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def is_last(ticket_ptr):
    """Whether this CTA is the last of its launch to come here; it then sees all that the others stored before.

    The count starts anew for the next launch.
    """
    tl.debug_barrier()  # the atomic is one thread's, and must come after the stores of all
    done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    last = done == tl.num_programs(0) * tl.num_programs(1) - 1
    if last:
        tl.store(ticket_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def next_epoch(header_ptr):
    """That of the step in progress. Only the last launch of a step writes it, so no CTA of this one sees it change."""
    return (tl.load(header_ptr + _EPOCH) + 1) & _EPOCHS


@triton.jit
def tell_all(bases_ptr, cells_at, rank, epoch, num_tokens, RANKS: tl.constexpr, LANES: tl.constexpr):
    """Writes this rank's cell on RANKS ranks, itself included; whatever the CTA stored or saw is visible before.

    `cells_at` is where the phase's cells begin. One thread a peer: the barrier orders the other threads' stores before.
    """
    peer = tl.arange(0, LANES)
    here = peer < RANKS
    bases = tl.load(bases_ptr + peer, mask=here, other=0)
    cells = (bases + cells_at + rank * 8).to(tl.pointer_type(tl.int64))
    value = (epoch << 32) | num_tokens
    tl.debug_barrier()
    tl.atomic_xchg(cells, tl.zeros((LANES,), tl.int64) + value, mask=here, sem="release", scope="sys")


@triton.jit
def await_all(
    cells_ptr,
    header_ptr,
    fault_ptr,
    epoch,
    counts,
    limit_ns,
    PHASE: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    first=0,
):
    """Waits for the cells of RANKS ranks; everything that they announce is then visible to all threads of the CTA.

    Args:
        cells_ptr: of this phase, in this rank's memory; that of the `first` rank.
        header_ptr: of this rank's memory.
        fault_ptr: int64 [1] that the host reads: epoch, kind, phase and a bit a rank, from the highest (`host.said_by`).
        epoch: of the step.
        counts: int32 [LANES], tokens that each rank must announce.
        limit_ns: nanoseconds after which the wait ends.
    """
    peer = tl.arange(0, LANES)
    own = cells_ptr + tl.where(peer < RANKS, peer, 0)
    patient = tl.load(header_ptr + _FAULT, volatile=True) == 0  # ahead of the acquire, which nothing overtakes
    cells = load_acquire(own)
    late = (peer < RANKS) & ((cells >> 32) != epoch)
    start = now_ns()
    waiting = patient & (tl.max(late.to(tl.int32), 0) > 0)
    while waiting:
        cells = load_acquire(own)
        late = (peer < RANKS) & ((cells >> 32) != epoch)
        in_time = now_ns() - start < limit_ns
        if INTERPRETED:
            in_time = False  # nobody runs beside this launch
        waiting = in_time & (tl.max(late.to(tl.int32), 0) > 0)
    tl.debug_barrier()
    other = (peer < RANKS) & ((cells & 0xFFFFFFFF) != counts) & ~late
    bits = tl.full((LANES,), 1, tl.int64) << (peer + first)
    missing = tl.sum(tl.where(late, bits, 0), 0)
    wrong = tl.sum(tl.where(other, bits, 0), 0)
    if patient & ((missing | wrong) != 0):
        kind = tl.where(missing != 0, _LATE, _COUNTS).to(tl.int64)
        fault = (epoch << 32) | (kind << 16) | (PHASE << 8) | tl.where(missing != 0, missing, wrong)
        tl.store(header_ptr + _FAULT, fault)
        tl.store(fault_ptr, fault)


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
    ids = tl.load(topk_ids_ptr + at + slot, mask=slot < top_k, other=-1)
    valid = (ids >= 0) & (ids < num_experts)
    return ids, tl.load(table_ptr + ids, mask=valid, other=-1)
