"""The GPU code of `select`: alignment for the candidate that `scoring` chooses.

Each kernel makes a histogram as `align` does, loads the candidates before it, and takes the choice's block_m.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl
from rampwrap.kernels.triton.align.by_expert import capacity_of, ids_and_histogram, place_expert, sum3
from rampwrap.kernels.triton.align.chunks import counts_before, place_chunk
from rampwrap.kernels.triton.pdl import wait_for_launch_before
from rampwrap.kernels.triton.select.scoring import choose_candidate, load_tables
from rampwrap.model.in_graph import TALLY

_TALLY = tl.constexpr(TALLY)


@triton.jit
def record_choice(
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
    C: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """What one CTA writes of a choice: rows of each candidate, the choice for later launches, the tally."""
    squares, blocks, slots = sum3(
        counts.to(tl.int64) * counts.to(tl.int64),
        ((counts + block_m - 1) // block_m).to(tl.int64),
        counts.to(tl.int64),
    )
    rows = blocks.to(tl.int32) * block_m
    for place in tl.static_range(C):
        tl.store(post_padded_ptr + place * STRIDE, tl.where(choice == place, rows, 0))
    tl.store(record_ptr, choice)
    tl.store(record_ptr + STRIDE, rows)
    tl.store(record_ptr + 2 * STRIDE, capacity)
    concentration = squares.to(tl.float64) / tl.maximum(slots * slots, 1).to(tl.float64)
    at = tl.arange(0, _TALLY)
    sums = tl.where(at == choice, 1.0, 0.0).to(tl.float64)
    sums = tl.where(at == 4, static_us, sums)
    sums = tl.where(at == 5, chosen_us, sums)
    sums = tl.where(at == 6, active, sums)
    sums = tl.where(at == 7, concentration, sums)
    sums = tl.where(at == 8, outside, sums)
    # A pass of padding alone, as engines run before captures and in them, says nothing about routing.
    sums = tl.where(slots > 0, sums, 0.0).to(tl.float64)
    # Atomic, because graphs of several streams may share a layer.
    tl.atomic_add(tally_ptr + at, sums, mask=sums != 0.0, sem="relaxed")


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "fallback"])
def select_by_expert_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    ints_ptr,
    reals_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    post_padded_ptr,
    record_ptr,
    expert_counts_ptr,
    tally_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    fallback,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
    STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Selection and alignment in one launch of num_local_experts + 1 CTAs, of which the last writes the record."""
    wait_for_launch_before(PDL)
    tables = load_tables(ints_ptr, reals_ptr, C, S, LAUNCHES, MARGINS)
    ids, counts = ids_and_histogram(
        topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts, CHUNK, BINS
    )
    choice, block_m, static_us, chosen_us, active, outside = choose_candidate(counts, tables, fallback, C, LAUNCHES)
    capacity = capacity_of(num_slots, num_local_experts, block_m)
    if tl.program_id(0) == num_local_experts:
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
        bins = tl.arange(0, BINS)
        tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)
    else:
        place_expert(
            tl.program_id(0),
            ids,
            counts,
            block_m,
            capacity,
            num_local_experts,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            None,
            None,
            num_slots,
            num_local_experts,
            CHUNK,
            BINS,
        )


@triton.jit(do_not_specialize=["num_chunks", "pieces", "num_slots", "num_local_experts", "fallback"])
def select_and_place_kernel(
    scratch_ptr,
    ints_ptr,
    reals_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    post_padded_ptr,
    record_ptr,
    expert_counts_ptr,
    tally_ptr,
    num_chunks,
    pieces,
    num_slots,
    num_local_experts,
    fallback,
    PIECE: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    TILE: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
    STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The second launch of the two-launch path with selection before it; one CTA more than chunks, for the record."""
    wait_for_launch_before(PDL)
    tables = load_tables(ints_ptr, reals_ptr, C, S, LAUNCHES, MARGINS)
    counts, before = counts_before(scratch_ptr, num_chunks, BINS, ROWS)
    choice, block_m, static_us, chosen_us, active, outside = choose_candidate(counts, tables, fallback, C, LAUNCHES)
    if tl.program_id(0) == num_chunks:
        record_choice(
            choice,
            block_m,
            static_us,
            chosen_us,
            active,
            outside,
            capacity_of(num_slots, num_local_experts, block_m),
            counts,
            record_ptr,
            post_padded_ptr,
            tally_ptr,
            C,
            STRIDE,
        )
        bins = tl.arange(0, BINS)
        tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)
    else:
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
            None,
            None,
            num_slots,
            num_local_experts,
            PIECE,
            BINS,
            IDS,
            TILE,
        )


@triton.jit(do_not_specialize=["num_local_experts", "fallback"])
def choose_kernel(
    counts_ptr,
    choice_ptr,
    ints_ptr,
    reals_ptr,
    num_local_experts,
    fallback,
    BINS: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
):
    """The choice alone, for one histogram a CTA."""
    tables = load_tables(ints_ptr, reals_ptr, C, S, LAUNCHES, MARGINS)
    bins = tl.arange(0, BINS)
    row = tl.program_id(0).to(tl.int64) * num_local_experts
    counts = tl.load(counts_ptr + row + bins, mask=bins < num_local_experts, other=0)
    choice, _, _, _, _, _ = choose_candidate(counts, tables, fallback, C, LAUNCHES)
    tl.store(choice_ptr + tl.program_id(0), choice)
