"""Bulk copies between GPUs by few CTAs, and flags of one rank at a time: what steps of many tokens are made of.

A rank's rows lie together at every receiver, so a copy is a run of words and knows nothing of tokens. Each CTA loads its next block
before it stores the one at hand, and so has 32 KB under way: 24 of them 0.8 MB, which covers 2.4 us at 330 GB/s, and memory takes about one.
None of these launches overlaps the one before it (`pdl`): they stand on streams of their own, between events.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import await_all, first_row, is_last, next_epoch, tell_all


@triton.jit
def copy_words(bases_ptr, peer, from_ptr, at, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copies int32 to `at` bytes into a peer's memory; CTAs along axis 0 share them. `count` is of 16 bytes where WIDE."""
    to = (tl.load(bases_ptr + peer) + at).to(tl.pointer_type(tl.int32))
    words = count
    if WIDE:  # neither a loaded address nor a number tells its alignment, and loads and stores would become narrow
        to, words = tl.multiple_of(to, 16), count * 4
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    data = tl.load(from_ptr + word, mask=word < words, other=0)
    for _ in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        after = word + tl.num_programs(0) * BLOCK
        more = tl.load(from_ptr + after, mask=after < words, other=0)
        tl.store(to + word, data, mask=word < words)
        word, data = after, more


@triton.jit(
    do_not_specialize=[
        "at_0",
        "at_1",
        "at_2",
        "count_0",
        "count_1",
        "count_2",
        "rank",
        "first",
        "num_tokens",
    ]
)
def copy_kernel(
    bases_ptr,
    field_0_ptr,
    field_1_ptr,
    field_2_ptr,
    header_ptr,
    ticket_ptr,
    at_0,
    at_1,
    at_2,
    count_0,
    count_1,
    count_2,
    rank,
    first,
    num_tokens,
    RANKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TELLS: tl.constexpr,
    CELLS_AT: tl.constexpr,
):
    """Up to three runs of words to the peers from the `first` after this rank on, which the CTAs along axis 1 share.

    TELLS, with one peer: the last CTA then writes this rank's cell there.
    """
    peer = (rank + first + tl.program_id(1)) % RANKS
    copy_words(bases_ptr, peer, field_0_ptr, at_0, count_0, WIDE, BLOCK)
    if field_1_ptr is not None:
        copy_words(bases_ptr, peer, field_1_ptr, at_1, count_1, WIDE, BLOCK)
    if field_2_ptr is not None:
        copy_words(bases_ptr, peer, field_2_ptr, at_2, count_2, WIDE, BLOCK)
    if TELLS:  # noqa: SIM102  (only the outer one is known when it compiles)
        if is_last(ticket_ptr):
            tell_all(bases_ptr + peer, CELLS_AT, rank, next_epoch(header_ptr), num_tokens, 1, 1)


@triton.jit(do_not_specialize=["rank", "peer", "num_tokens"])
def tell_kernel(bases_ptr, header_ptr, rank, peer, num_tokens, CELLS_AT: tl.constexpr):
    """Writes this rank's cell at one peer, after all that the stream did before."""
    tell_all(bases_ptr + peer, CELLS_AT, rank, next_epoch(header_ptr), num_tokens, 1, 1)


@triton.jit(
    do_not_specialize=[
        "first",
        "limit_ns",
        *(f"count_{rank}" for rank in range(8)),
    ]
)
def wait_kernel(
    cells_ptr,
    header_ptr,
    fault_ptr,
    first,
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
    PHASE: tl.constexpr,
):
    """Each CTA waits for the cell of one rank, the first of them for that of `first`."""
    source = (first + tl.program_id(0)) % RANKS
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    _before, num_tokens = first_row(counts, source, RANKS)
    expected = tl.zeros((1,), tl.int32) + num_tokens
    epoch = next_epoch(header_ptr)
    await_all(cells_ptr + source, header_ptr, fault_ptr, epoch, expected, limit_ns, PHASE, 1, 1, source)
