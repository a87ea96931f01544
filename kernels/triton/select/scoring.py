"""The GPU code that scores candidates: from a histogram to the place that `CostModel.choose` takes on the host.

Exactness. All features are integers: logarithms are the bits of a float32 (`features.float_log2` of an integer below
2**22 is the same number), and distances are sums of integers in units of 2**-23. What is left to float64 are three
operations that IEEE fixes, division, floor and a product; sums are exact. The kernels are compiled without fusing
multiply and add, since a fused last step would round differently from the host's.

Speed. What counts is the length of the chain from the histogram to the choice. Whatever belongs to one candidate is a
scalar, the same in every thread, so that threads exchange something in two places only: one sum over the experts, of
all candidates' blocks, and one over the support points. What does not depend on the routing is loaded by `load_tables`
before the histogram is made.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl
from rampwrap.kernels.triton.align.by_expert import sum3
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.model.packed import CONFIG, CUT, SHARED

_SHARED, _CUT, _CONFIG = tl.constexpr(SHARED), tl.constexpr(CUT), tl.constexpr(CONFIG)
_INF_US = tl.constexpr(float("inf"))


@triton.jit
def load_pair(ptr, at):
    """Two int32 that stand side by side, in one load."""
    both = tl.load((ptr + at).to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def load_candidate(ints_ptr, reals_ptr, PLACE: tl.constexpr, C: tl.constexpr, S: tl.constexpr, LAUNCHES: tl.constexpr):
    """(scalars, coefficients, vectors over the support points) of one candidate; of the first where there is none."""
    place = PLACE if PLACE < C else 0
    # Each candidate has a cut of its own, at its place.
    cut = ints_ptr + _SHARED + place * _CUT
    block_m, reciprocal = load_pair(cut, 0)
    at_a_time, ctas_per_block = load_pair(cut, 2)
    blocks_low, blocks_high = load_pair(cut, 4)
    waves_low, waves_high = load_pair(cut, 6)
    unused_low, unused_high = load_pair(cut, 8)
    first, second = load_pair(cut, 10)
    third, fourth = load_pair(cut, 12 if LAUNCHES > 2 else 10)
    config = ints_ptr + _SHARED + C * _CUT + place * _CONFIG
    least, twice_most = load_pair(config, 0)
    fitted, _ = load_pair(config, 2)
    coef = reals_ptr + place * 5
    points = ints_ptr + _SHARED + C * (_CUT + _CONFIG) + (2 + place) * S + tl.arange(0, S)
    return (
        (
            block_m,
            reciprocal,
            at_a_time,
            ctas_per_block,
            least,
            twice_most,
            blocks_low,
            blocks_high,
            waves_low,
            waves_high,
            unused_low,
            unused_high,
            fitted,
            first,
            second,
            third,
            fourth,
        ),
        (tl.load(coef), tl.load(coef + 1), tl.load(coef + 2), tl.load(coef + 3), tl.load(coef + 4)),
        (
            tl.load(points),
            tl.load(points + C * S),
            tl.load(points + 2 * C * S),
            tl.load(points + 3 * C * S),
        ),
    )


@triton.jit
def load_tables(ints_ptr, reals_ptr, C: tl.constexpr, S: tl.constexpr, LAUNCHES: tl.constexpr, MARGINS: tl.constexpr):
    """Everything of a `Packed`, in registers: (candidates, shared scalars, shared vectors, shared reals)."""
    slots_low, slots_high = load_pair(ints_ptr, 0)
    active_low, active_high = load_pair(ints_ptr, 2)
    s = tl.arange(0, S)
    near = ints_ptr + _SHARED + C * (_CUT + _CONFIG) + s
    limits = near + (2 + 4 * C) * S
    reals = reals_ptr + 5 * C
    return (
        (
            load_candidate(ints_ptr, reals_ptr, 0, C, S, LAUNCHES),
            load_candidate(ints_ptr, reals_ptr, 1, C, S, LAUNCHES),
            load_candidate(ints_ptr, reals_ptr, 2, C, S, LAUNCHES),
            load_candidate(ints_ptr, reals_ptr, 3, C, S, LAUNCHES),
        ),
        (slots_low, slots_high, active_low, active_high),
        (
            tl.load(near),
            tl.load(near + S),
            tl.load(limits, mask=s < MARGINS, other=2147483647),
            tl.load(limits + 1, mask=s < MARGINS, other=0),
            tl.load(reals + 4 + s, mask=s < MARGINS, other=0.0),
        ),
        (tl.load(reals), tl.load(reals + 1), tl.load(reals + 2)),
    )


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def sum5(a, b, c, d, e):
    """Sums of five vectors of one length, in one pass over the CTA; those that nobody reads are left out."""
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0), tl.sum(e, 0)
    return tl.reduce((a, b, c, d, e), 0, _add5)


@triton.jit
def log2_bits(value):
    """`features.float_log2` of an integer of 1 to 2**22, in units of 2**-23."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) - 0x3F800000


@triton.jit
def clip(value, low, high):
    """Into [low, high]."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def blocks_of(counts, table):
    """M blocks of each expert at a candidate's block_m, int64."""
    rounded = (counts + (table[0][0] - 1)).to(tl.uint32)
    factor = tl.zeros_like(rounded) + table[0][1].to(tl.uint32)
    return tl.umulhi(rounded, factor).to(tl.int64)


@triton.jit
def ceil_div(a, b):
    """ceil(a / b) of non-negative int32."""
    return ((a + b - 1).to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)


@triton.jit
def trend_of(table, blocks, slots, active, LAUNCHES: tl.constexpr):
    """(trend in microseconds, waves, unused waves) of a candidate."""
    ints, coef = table[0], table[1]
    at_a_time = ints[2]
    waves = ceil_div(blocks * ints[13], at_a_time)
    if LAUNCHES > 1:
        waves += ceil_div(blocks * ints[14], at_a_time)
    if LAUNCHES > 2:
        waves += ceil_div(blocks * ints[15], at_a_time)
    if LAUNCHES > 3:
        waves += ceil_div(blocks * ints[16], at_a_time)
    ctas = blocks * ints[3]
    idle = waves * at_a_time - ctas
    unused = tl.floor(idle.to(tl.float64) / at_a_time.to(tl.float64) * 1048576.0).to(tl.int32)
    trend = (
        coef[0]
        + coef[1] * waves.to(tl.float64)
        + coef[2] * ctas.to(tl.float64)
        + coef[3] * active.to(tl.float64)
        + coef[4] * slots.to(tl.float64)
    )
    return trend, waves, unused


@triton.jit
def nearness(table, shared, blocks, waves, unused):
    """Weighted nearness of the support points, in units of 2**-40; `shared` is their distance by slots and experts."""
    ints, near = table[0], table[2]
    # Divided by `features.SCALES`; beyond the profiled range the correction stays what it is at its edge.
    far_blocks = clip(log2_bits(blocks) >> 1, ints[6], ints[7])
    far_waves = clip(log2_bits(waves) >> 1, ints[8], ints[9])
    far_unused = clip(unused, ints[10], ints[11])
    distance = shared + tl.abs(near[0] - far_blocks) + tl.abs(near[1] - far_waves) + tl.abs(near[2] - far_unused)
    # 2^43 / distance = 2^20 / (distance in units of one).
    return tl.floor(8796093022208.0 / distance.to(tl.float64)) * near[3].to(tl.float64)


@triton.jit
def corrected(table, trend, moved, low, high):
    """Predicted microseconds of a candidate; infinite where it was not fitted."""
    us = trend * (1.0 + clip(moved * 9.094947017729282e-13, low, high))
    return tl.where(table[0][12] != 0, us, _INF_US)


@triton.jit
def serves(table, slots):
    """Whether a candidate was profiled near so many slots."""
    return (table[0][4] <= 2 * slots) & (slots <= table[0][5])


@triton.jit
def better(place, us, best, best_us):
    """The faster of a candidate and the best one before it."""
    take = us < best_us
    return tl.where(take, place, best), tl.where(take, us, best_us)


@triton.jit
def choose_candidate(counts, tables, fallback, C: tl.constexpr, LAUNCHES: tl.constexpr):
    """What `CostModel.choose` takes for this histogram, and what a tally keeps of it.

    Returns the candidate's place (int32), its block_m, and float64 predicted microseconds of the static config and of
    the choice, experts with tokens, and 1 where the launch was outside everything profiled, else 0.
    """
    t0, t1, t2, t3 = tables[0]
    slots_low, slots_high, active_low, active_high = tables[1]
    near_slots, near_active, limit_low, limit_high, margins = tables[2]
    low, high, choosing_us = tables[3]

    # Slots below 2^32, active experts above; two candidates' blocks in one sum alike. What C leaves out is dropped.
    pairs, more = blocks_of(counts, t0), tl.zeros_like(counts).to(tl.int64)
    if C > 1:
        pairs += blocks_of(counts, t1) << 32
    if C > 2:
        more += blocks_of(counts, t2)
    if C > 3:
        more += blocks_of(counts, t3) << 32
    both, pairs, more = sum3(counts.to(tl.int64) + ((counts > 0).to(tl.int64) << 32), pairs, more)
    slots, active = both.to(tl.int32), (both >> 32).to(tl.int32)
    blocks0, blocks1 = pairs.to(tl.int32), (pairs >> 32).to(tl.int32)
    blocks2, blocks3 = more.to(tl.int32), (more >> 32).to(tl.int32)

    far_slots = clip(log2_bits(slots) >> 2, slots_low, slots_high)
    far_active = clip(log2_bits(active) >> 1, active_low, active_high)
    # Fewer active experts than were ever profiled: static serves.
    strange = (log2_bits(active) >> 1) < active_low
    shared = 8388608 + tl.abs(near_slots - far_slots) + tl.abs(near_active - far_active)
    # The margin is a step function of the slots: one entry lies between its limits.
    margin = tl.where((limit_low < 2 * slots) & (2 * slots <= limit_high), margins, 0.0)
    trend0, waves0, unused0 = trend_of(t0, blocks0, slots, active, LAUNCHES)
    near0 = nearness(t0, shared, blocks0, waves0, unused0)
    near1, near2, near3 = tl.zeros_like(near0), tl.zeros_like(near0), tl.zeros_like(near0)
    trend1, trend2, trend3 = trend0, trend0, trend0
    if C > 1:
        trend1, waves1, unused1 = trend_of(t1, blocks1, slots, active, LAUNCHES)
        near1 = nearness(t1, shared, blocks1, waves1, unused1)
    if C > 2:
        trend2, waves2, unused2 = trend_of(t2, blocks2, slots, active, LAUNCHES)
        near2 = nearness(t2, shared, blocks2, waves2, unused2)
    if C > 3:
        trend3, waves3, unused3 = trend_of(t3, blocks3, slots, active, LAUNCHES)
        near3 = nearness(t3, shared, blocks3, waves3, unused3)
    margin, moved0, moved1, moved2, moved3 = sum5(margin, near0, near1, near2, near3)

    us0 = corrected(t0, trend0, moved0, low, high)
    static_us, block_m, others = us0, t0[0][0], (fallback != 0) & serves(t0, slots)
    best, best_us = better(0, tl.where(serves(t0, slots), us0, _INF_US), 0, slots.to(tl.float64) * 0.0 + _INF_US)
    us1, us2, us3 = us0, us0, us0
    if C > 1:
        us1 = corrected(t1, trend1, moved1, low, high)
        static_us = tl.where(fallback == 1, us1, static_us)
        best, best_us = better(1, tl.where(serves(t1, slots), us1, _INF_US), best, best_us)
        others |= (fallback != 1) & serves(t1, slots)
    if C > 2:
        us2 = corrected(t2, trend2, moved2, low, high)
        static_us = tl.where(fallback == 2, us2, static_us)
        best, best_us = better(2, tl.where(serves(t2, slots), us2, _INF_US), best, best_us)
        others |= (fallback != 2) & serves(t2, slots)
    if C > 3:
        us3 = corrected(t3, trend3, moved3, low, high)
        static_us = tl.where(fallback == 3, us3, static_us)
        best, best_us = better(3, tl.where(serves(t3, slots), us3, _INF_US), best, best_us)
        others |= (fallback != 3) & serves(t3, slots)

    asked = margin * best_us + choosing_us
    leaves = (slots > 0) & ~strange & (static_us < _INF_US) & (best_us < _INF_US) & (static_us - best_us > asked)
    choice = tl.where(leaves, best, fallback)
    block_m = tl.where(choice == 1, t1[0][0], block_m)
    block_m = tl.where(choice == 2, t2[0][0], block_m)
    block_m = tl.where(choice == 3, t3[0][0], block_m)
    known = (static_us < _INF_US) & (slots > 0)
    chosen_us = tl.where(leaves, best_us, static_us)
    return (
        choice,
        block_m,
        tl.where(known, static_us, 0.0),
        tl.where(known, chosen_us, 0.0),
        active.to(tl.float64),
        ((slots == 0) | strange | (others == 0)).to(tl.float64),
    )
