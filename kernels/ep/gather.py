"""All-gather by low latency, for callers who know no owners of experts: rows of several tensors go to fixed places at every rank.

One launch, as in `dispatch`: a CTA copies all rows of a token, tells the CTAs of its number on other ranks, and waits for them. The
launches of `combine` take the sums back, of every rank for every token.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import first_row, has_all, meet, next_epoch
from rampwrap.kernels.triton.pdl import wait_for_launch_before

MOST_FIELDS = 5
"Tensors of one launch."


@triton.jit
def send_row(bases_ptr, field_ptr, token, row, rank, RANKS: tl.constexpr, WORDS: tl.constexpr, AT: tl.constexpr):
    """Copies a token's WORDS int32 of one tensor, read once, to a row of the region AT bytes into each rank's memory."""
    # A whole row at once: loads of a next piece would wait for the stores of the one before, which may alias.
    block: tl.constexpr = 64 if WORDS <= 64 else 1024 if WORDS <= 1024 else 4096
    for start in tl.static_range(0, WORDS, block):
        word = start + tl.arange(0, block)
        data = tl.load(field_ptr + token * WORDS + word, mask=word < WORDS, other=0)
        for step in tl.static_range(RANKS):
            base = tl.load(bases_ptr + (rank + 1 + step) % RANKS) + AT + row * (WORDS * 4)
            to = base.to(tl.pointer_type(tl.int32))
            if WORDS % 4 == 0:  # a loaded address has unknown alignment, and stores would become narrow
                to = tl.multiple_of(to, 16)
            tl.store(to + word, data, mask=word < WORDS)


@triton.jit(do_not_specialize=["rank", "limit_ns", *(f"count_{rank}" for rank in range(8))])
def gather_kernel(
    bases_ptr,
    field_0_ptr,
    field_1_ptr,
    field_2_ptr,
    field_3_ptr,
    field_4_ptr,
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
    WORDS_0: tl.constexpr,
    WORDS_1: tl.constexpr,
    WORDS_2: tl.constexpr,
    WORDS_3: tl.constexpr,
    WORDS_4: tl.constexpr,
    AT_0: tl.constexpr,
    AT_1: tl.constexpr,
    AT_2: tl.constexpr,
    AT_3: tl.constexpr,
    AT_4: tl.constexpr,
    CELLS_AT: tl.constexpr,
    MOST: tl.constexpr,
    SENDS: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As many CTAs as `dispatch_kernel` has; a field of no words is absent.

    SENDS or WAITS is only off where ranks are emulated one after the other: all send, then all wait.
    """
    wait_for_launch_before(PDL)
    epoch, sound = next_epoch(header_ptr), has_all(header_ptr)
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7)
    first, num_tokens = first_row(counts, rank, RANKS)
    if SENDS:
        for number in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
            token = tl.cast(number, tl.int64)
            row = first + token
            send_row(bases_ptr, field_0_ptr, token, row, rank, RANKS, WORDS_0, AT_0)
            send_row(bases_ptr, field_1_ptr, token, row, rank, RANKS, WORDS_1, AT_1)
            send_row(bases_ptr, field_2_ptr, token, row, rank, RANKS, WORDS_2, AT_2)
            send_row(bases_ptr, field_3_ptr, token, row, rank, RANKS, WORDS_3, AT_3)
            send_row(bases_ptr, field_4_ptr, token, row, rank, RANKS, WORDS_4, AT_4)
    meet(
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
        CELLS_AT,
        RANKS,
        LANES,
        MOST,
        SENDS,
        WAITS,
    )
