"""Steps whose rows go by copy engines: kernels that tell and wait and move nothing, and one that sends what is small.

None of these launches overlaps the one before it (`pdl`): they stand on streams of their own, between events.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import await_cells, end_step, has_all, next_epoch, spread, tell


@triton.jit(do_not_specialize=["rank", "peer", "num_tokens"])
def tell_kernel(bases_ptr, header_ptr, rank, peer, num_tokens, CELLS_AT: tl.constexpr, RANKS: tl.constexpr):
    """Writes the cell of this rank's first CTA at RANKS ranks from a peer on, after all that the stream did before."""
    epoch = next_epoch(header_ptr)
    if has_all(header_ptr):
        tell(bases_ptr + peer, CELLS_AT + rank * 8, epoch, num_tokens, RANKS)


@triton.jit(do_not_specialize=["wanted", "limit_ns", *(f"count_{rank}" for rank in range(8))])
def wait_kernel(
    cells_ptr,
    header_ptr,
    fault_ptr,
    wanted,
    limit_ns,
    count_0,
    count_1,
    count_2,
    count_3,
    count_4,
    count_5,
    count_6,
    count_7,
    PHASE: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Waits for the cells of the first CTA of some ranks: `wanted` has a bit for each."""
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    here = ((wanted >> tl.arange(0, LANES)) & 1) != 0
    epoch, expected = next_epoch(header_ptr), spread(counts, RANKS, LANES)
    await_cells(cells_ptr, header_ptr, fault_ptr, epoch, expected, here, limit_ns, PHASE, LANES)


@triton.jit(do_not_specialize=["num_tokens", *(f"first_{rank}" for rank in range(8))])
def routing_kernel(
    bases_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    scales_ptr,
    num_tokens,
    first_0,
    first_1,
    first_2,
    first_3,
    first_4,
    first_5,
    first_6,
    first_7,
    RANKS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALES: tl.constexpr,
    IDS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ids, weights and scales of a rank's tokens, to all ranks: each has them from a row of its own on, `first`. Each field is a run of
    values, of which a CTA takes BLOCK."""
    firsts = (first_0, first_1, first_2, first_3, first_4, first_5, first_6, first_7)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots, groups = at < num_tokens * TOP_K, at < num_tokens * SCALES
    ids = tl.load(topk_ids_ptr + at, mask=slots, other=-1)
    weights = tl.load(topk_weights_ptr + at, mask=slots, other=0.0)
    scales = tl.zeros((BLOCK,), tl.float32)
    if SCALES:
        scales = tl.load(scales_ptr + at, mask=groups, other=0.0)
    for rank in tl.static_range(RANKS):
        base, first = tl.load(bases_ptr + rank), tl.cast(firsts[rank], tl.int64)
        slot, group = first * TOP_K + at, first * SCALES + at
        tl.store((base + IDS_AT).to(tl.pointer_type(tl.int32)) + slot, ids, mask=slots)
        tl.store((base + WEIGHTS_AT).to(tl.pointer_type(tl.float32)) + slot, weights, mask=slots)
        if SCALES:
            tl.store((base + SCALES_AT).to(tl.pointer_type(tl.float32)) + group, scales, mask=groups)


@triton.jit
def end_kernel(header_ptr):
    """The end of a step source by source, when all that read its epoch has ended."""
    end_step(header_ptr, next_epoch(header_ptr))
