"""The GPU code of `select`: scoring of candidates, and alignment for the one that is chosen.

Exactness. All features are integers: logarithms are the bits of a float32 (`features.float_log2` of an integer below
2**22 is the same number), and distances are sums of integers in units of 2**-23. What is left to float64 are three
operations that IEEE fixes, division, floor and a product; sums are exact. The kernels are compiled without fusing
multiply and add, since a fused last step would round differently from the host's.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl
from rampwrap.ingraph import INTS_HEAD
from rampwrap.kernels.triton.align_kernels import expert_histogram, place_expert, scan_own, sum_chunks

_HEAD = tl.constexpr(INTS_HEAD)
_INF_US = tl.constexpr(float("inf"))


@triton.jit
def load_candidates(ints_ptr, C: tl.constexpr, S: tl.constexpr, LAUNCHES: tl.constexpr):
    """The support points and weights, loaded before the histogram is made, so that their latency hides behind it."""
    c = tl.arange(0, C)[:, None]
    s = tl.arange(0, S)[None, :]
    points = ints_ptr + (_HEAD + LAUNCHES) * C + 8
    slots = tl.load(points + tl.arange(0, S))
    active = tl.load(points + S + tl.arange(0, S))
    blocks = tl.load(points + 2 * S + c * S + s)
    waves = tl.load(points + (2 + C) * S + c * S + s)
    unused = tl.load(points + (2 + 2 * C) * S + c * S + s)
    weights = tl.load(points + (2 + 3 * C) * S + c * S + s)
    return slots, active, blocks, waves, unused, weights


@triton.jit
def log2_bits(value):
    """`features.float_log2` of an integer of 1 to 2**22, in units of 2**-23."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) - 0x3F800000


@triton.jit
def clip(value, low, high):
    """Into [low, high]."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def choose_candidate(
    counts,
    near_slots,
    near_active,
    near_blocks,
    near_waves,
    near_unused,
    weights,
    ints_ptr,
    reals_ptr,
    fallback,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
):
    """Place of the candidate that `CostModel.choose` takes for this histogram (int32), and its block_m."""
    c = tl.arange(0, C)
    block_m = tl.load(ints_ptr + c)
    reciprocal = tl.load(ints_ptr + C + c)
    at_a_time = tl.load(ints_ptr + 2 * C + c)
    ctas_per_block = tl.load(ints_ptr + 3 * C + c)
    shared_ptr = ints_ptr + (_HEAD + LAUNCHES) * C

    # One reduction for both: slots below 2^32, active experts above.
    both = tl.sum(counts.to(tl.int64) + ((counts > 0).to(tl.int64) << 32), 0)
    slots = both.to(tl.int32)
    active = (both >> 32).to(tl.int32)
    rounded = (counts[None, :] + (block_m - 1)[:, None]).to(tl.uint32)
    blocks = tl.sum(tl.umulhi(rounded, tl.zeros_like(rounded) + reciprocal.to(tl.uint32)[:, None]).to(tl.int32), 1)

    waves = tl.zeros((C,), dtype=tl.int32)
    for launch in tl.static_range(LAUNCHES):
        ctas = tl.load(ints_ptr + (_HEAD + launch) * C + c)
        waves += (blocks * ctas + at_a_time - 1) // at_a_time
    idle = waves * at_a_time - blocks * ctas_per_block
    unused = tl.floor(idle.to(tl.float64) / at_a_time.to(tl.float64) * 1048576.0).to(tl.int32)

    # Divided by `features.SCALES`; beyond the profiled range the correction stays what it is at its edge.
    far_slots = clip(log2_bits(slots) >> 2, tl.load(shared_ptr), tl.load(shared_ptr + 1))
    far_active = clip(log2_bits(active) >> 1, tl.load(shared_ptr + 2), tl.load(shared_ptr + 3))
    far_blocks = clip(log2_bits(blocks) >> 1, tl.load(ints_ptr + 6 * C + c), tl.load(ints_ptr + 7 * C + c))
    far_waves = clip(log2_bits(waves) >> 1, tl.load(ints_ptr + 8 * C + c), tl.load(ints_ptr + 9 * C + c))
    far_unused = clip(unused, tl.load(ints_ptr + 10 * C + c), tl.load(ints_ptr + 11 * C + c))
    shared = 8388608 + tl.abs(near_slots - far_slots) + tl.abs(near_active - far_active)
    distance = (
        shared[None, :]
        + tl.abs(near_blocks - far_blocks[:, None])
        + tl.abs(near_waves - far_waves[:, None])
        + tl.abs(near_unused - far_unused[:, None])
    )
    # 2^43 / distance = 2^20 / (distance in units of one).
    near = tl.floor(8796093022208.0 / distance.to(tl.float64))
    moved = tl.sum(near * weights.to(tl.float64), 1) * 9.094947017729282e-13
    moved = clip(moved, tl.load(reals_ptr + 5 * C), tl.load(reals_ptr + 5 * C + 1))
    trend = (
        tl.load(reals_ptr + c)
        + tl.load(reals_ptr + C + c) * waves.to(tl.float64)
        + tl.load(reals_ptr + 2 * C + c) * (blocks * ctas_per_block).to(tl.float64)
        + tl.load(reals_ptr + 3 * C + c) * active.to(tl.float64)
        + tl.load(reals_ptr + 4 * C + c) * slots.to(tl.float64)
    )
    us = trend * (1.0 + moved)
    us = tl.where(tl.load(ints_ptr + 12 * C + c) != 0, us, _INF_US)

    static_us = tl.sum(tl.where(c == fallback, us, 0.0), 0)
    inside = (tl.load(ints_ptr + 4 * C + c) <= 2 * slots) & (slots <= tl.load(ints_ptr + 5 * C + c))
    us = tl.where(inside, us, _INF_US)
    best_us = tl.min(us, 0)
    best = tl.min(tl.where(us == best_us, c, C), 0)

    # The margin is a step function of the slots.
    m = tl.arange(0, MARGINS)
    step = tl.sum((2 * slots > tl.load(shared_ptr + 8 + (2 + 4 * C) * S + m)).to(tl.int32), 0)
    margins = tl.load(reals_ptr + 5 * C + 4 + m)
    margin = tl.sum(tl.where(m == step, margins, 0.0), 0)
    asked = margin * best_us + tl.load(reals_ptr + 5 * C + 2)
    leaves = (slots > 0) & (static_us < _INF_US) & (best_us < _INF_US) & (static_us - best_us > asked)
    choice = tl.where(leaves, best, fallback)
    return choice, tl.sum(tl.where(c == choice, block_m, 0), 0)


@triton.jit
def record_choice(
    choice, block_m, capacity, counts, record_ptr, post_padded_ptr, counters_ptr, C: tl.constexpr, STRIDE: tl.constexpr
):
    """What one CTA writes of a choice: rows of each candidate, the choice for later launches, the counter."""
    c = tl.arange(0, C)
    rows = tl.sum((counts + block_m - 1) // block_m, 0) * block_m
    tl.store(post_padded_ptr + c * STRIDE, tl.where(c == choice, rows, 0))
    tl.store(record_ptr, choice)
    tl.store(record_ptr + STRIDE, rows)
    tl.store(record_ptr + 2 * STRIDE, capacity)
    # Atomic, because graphs of several streams may share a plan.
    tl.atomic_add(counters_ptr + choice, 1, sem="relaxed")


@triton.jit
def capacity_of(block_m, num_slots, num_local_experts):
    """`alignment_capacity` on the device."""
    return tl.minimum(num_slots + num_local_experts * (block_m - 1), num_slots * block_m)


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
    counters_ptr,
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
):
    """Selection and alignment in one launch of num_local_experts CTAs."""
    slots, active, blocks, waves, unused, weights = load_candidates(ints_ptr, C, S, LAUNCHES)
    counts = expert_histogram(
        topk_ids_ptr, expert_map_ptr, 0, num_slots, num_slots, num_experts, num_local_experts, CHUNK, BINS
    )
    choice, block_m = choose_candidate(
        counts,
        slots,
        active,
        blocks,
        waves,
        unused,
        weights,
        ints_ptr,
        reals_ptr,
        fallback,
        C,
        S,
        LAUNCHES,
        MARGINS,
    )
    capacity = capacity_of(block_m, num_slots, num_local_experts)
    if tl.program_id(0) == 0:
        record_choice(choice, block_m, capacity, counts, record_ptr, post_padded_ptr, counters_ptr, C, STRIDE)
    place_expert(
        tl.program_id(0),
        counts,
        block_m,
        capacity,
        tl.num_programs(0),
        topk_ids_ptr,
        expert_map_ptr,
        sorted_token_ids_ptr,
        expert_ids_ptr,
        record_ptr + STRIDE,
        expert_counts_ptr,
        num_slots,
        num_experts,
        num_local_experts,
        CHUNK,
        BINS,
    )


@triton.jit(do_not_specialize=["num_chunks", "num_slots", "num_local_experts", "fallback"])
def select_chunks_kernel(
    chunk_counts_ptr,
    chunk_offsets_ptr,
    ints_ptr,
    reals_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    post_padded_ptr,
    record_ptr,
    expert_counts_ptr,
    counters_ptr,
    num_chunks,
    num_slots,
    num_local_experts,
    fallback,
    BINS: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    LAUNCHES: tl.constexpr,
    MARGINS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """The scan of the three-launch path, with selection before it."""
    slots, active, blocks, waves, unused, weights = load_candidates(ints_ptr, C, S, LAUNCHES)
    counts = sum_chunks(chunk_counts_ptr, num_chunks, BINS, ROWS)
    choice, block_m = choose_candidate(
        counts,
        slots,
        active,
        blocks,
        waves,
        unused,
        weights,
        ints_ptr,
        reals_ptr,
        fallback,
        C,
        S,
        LAUNCHES,
        MARGINS,
    )
    if tl.program_id(0) == 0:
        capacity = capacity_of(block_m, num_slots, num_local_experts)
        record_choice(choice, block_m, capacity, counts, record_ptr, post_padded_ptr, counters_ptr, C, STRIDE)
    scan_own(
        counts,
        block_m,
        chunk_counts_ptr,
        chunk_offsets_ptr,
        sorted_token_ids_ptr,
        expert_ids_ptr,
        record_ptr + STRIDE,
        expert_counts_ptr,
        num_chunks,
        num_slots,
        num_local_experts,
        BINS,
        OWN,
        ROWS,
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
    slots, active, blocks, waves, unused, weights = load_candidates(ints_ptr, C, S, LAUNCHES)
    bins = tl.arange(0, BINS)
    row = tl.program_id(0).to(tl.int64) * num_local_experts
    counts = tl.load(counts_ptr + row + bins, mask=bins < num_local_experts, other=0)
    choice, _ = choose_candidate(
        counts,
        slots,
        active,
        blocks,
        waves,
        unused,
        weights,
        ints_ptr,
        reals_ptr,
        fallback,
        C,
        S,
        LAUNCHES,
        MARGINS,
    )
    tl.store(choice_ptr + tl.program_id(0), choice)
