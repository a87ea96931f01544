"""What a GPU needs to choose like `CostModel.choose`: one bucket's candidates as two flat arrays, and which to take.

Everything the choice reads is an integer, in `Packed.ints`, or one of the numbers in `Packed.reals`; no array is
larger than 8 KB. `kernels.triton.select` reads them; nothing here needs torch or a GPU.
"""

import itertools
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.cost import CORRECTION_RANGE, CostModel, Local
from rampwrap.errors import InputError, PlanError
from rampwrap.features import SCALES
from rampwrap.grid import FloatArray, IntArray, max_blocks
from rampwrap.plan import Plan
from rampwrap.shortlist import draw
from rampwrap.static import StaticTable

MAX_CANDIDATES = 4
MAX_SLOTS = 1 << 21
"65,536 tokens x top-32. Up to twice that a float32 holds the logarithm's bits with room to halve them."

INTS_HEAD = 13
"Rows of `ints`, each with a value per candidate, before those of the launches."
UNIT = 2.0**23
"Features are integers of 1 / UNIT, after division by `features.SCALES`."
_INT32 = 2**31 - 1


@attrs.frozen(eq=False)
class Packed:
    """The candidates of a bucket.

    With C = `width`, S = `points`, L = `launches`, M = `margins`, `ints` holds, one after the other: C values each of
    block_m, ceil(2^32 / block_m), CTAs at a time, CTAs of a block, least and twice the most slots served, range of
    the features blocks, waves and unused waves, fitted or not, and CTAs of a block by launch (L times); 8 numbers
    shared by all (range of the features slots and active experts); the support points' slots [S] and active experts
    [S], blocks, waves, unused waves and weights [C, S]; and the limits [M] at which the margin changes.
    `reals` holds the coefficients [5, C], range of the correction, cost of choosing, 0, and the margins [M].

    Attributes:
        ints: int32.
        reals: float64.
        block_ms: of the candidates, without padding.
        ctas_per_block: the largest of a candidate.
    """

    ints: npt.NDArray[np.int32]
    reals: FloatArray
    block_ms: tuple[int, ...]
    ctas_per_block: int
    width: int
    points: int
    launches: int
    margins: int

    def check_slots(self, num_slots: int, num_experts: int) -> None:
        """Whether the integers of a batch stay exact.

        Raises:
            InputError: too many slots (tokens x top_k), or too many CTAs.
        """
        blocks = max_blocks(num_slots, num_experts, min(self.block_ms))
        if num_slots > MAX_SLOTS or blocks * self.ctas_per_block > MAX_SLOTS * 128:
            raise InputError(
                f"{num_slots} slots are more than selection on the GPU is exact for ({MAX_SLOTS} slots, "
                f"{MAX_SLOTS * 128} CTAs); split the batch."
            )


def pack(model: CostModel, choosing_us: float = 0.0, margin_steps: int | None = None) -> Packed:
    """A model of a bucket's one to four candidates (`CostModel.take`) as arrays for the GPU.

    Args:
        model: of the candidates only, in the order of their places.
        choosing_us: microseconds that choosing costs.
        margin_steps: least length of the table of margins; buckets of one plan share it, so that they share a kernel.

    Raises:
        PlanError: another model than ``default``, more than `MAX_CANDIDATES`, or numbers that are not finite or too
            large to stay exact on the GPU.
    """
    if not isinstance(model, Local):
        raise PlanError(f"model {model.name!r} cannot choose on the GPU; make the plan with the model 'default'.")
    count = model.num_configs
    if not 1 <= count <= MAX_CANDIDATES:
        raise PlanError(f"{count} candidates cannot be packed; give a bucket of 1 to {MAX_CANDIDATES}.")
    tables, geometry = model._fast, model.geometry
    _finite("a margin's error", [model.error, *(error for _, error in model.local_error)])
    _finite("the cost of choosing", [choosing_us])
    width = max(2, 1 << (count - 1).bit_length())
    points = max(32, 1 << (len(model.support) - 1).bit_length())
    features = tables.points * UNIT
    if not np.array_equal(features, np.rint(features)) or model.support.min() < 1:
        raise PlanError("the plan's support points are no positive integers; make it anew with 'rampwrap fit'.")
    low, high = features.min(axis=2), features.max(axis=2)
    cut = tables.cut_of

    def row(values: npt.ArrayLike, padding: int) -> IntArray:
        return np.concatenate([np.asarray(values, dtype=np.int64), np.full(width - count, padding)])

    def wide(values: npt.ArrayLike) -> IntArray:
        out = np.zeros((width, points), dtype=np.int64)
        out[:count, : len(model.support)] = values
        return out

    def flat(values: FloatArray) -> IntArray:
        return np.concatenate([values.astype(np.int64), np.zeros(points - len(values), dtype=np.int64)])

    block_m = geometry.block_m
    if block_m.min() < 2 or block_m.max() > 1024:
        raise PlanError(f"a candidate has block_m={block_m.min()}..{block_m.max()}; 2 to 1024 can be packed.")
    launches = geometry.launches[:, geometry.launches.any(axis=0)]
    ctas_per_block = launches.sum(axis=1)
    at_a_time = geometry.resident * geometry.num_sms
    reciprocal = 2**32 // block_m + 1  # floor(x / block_m) = high word of the product, for x below 2^32 / block_m
    steps = model.local_error
    margin_width = 1 << max(5, (max(len(steps), margin_steps or 1) - 1).bit_length())
    limits = [a[0] + b[0] for a, b in itertools.pairwise(steps)]
    margins = [model.margin(np.array([slots])) for slots, _ in steps] or [model.margin(np.zeros(1, dtype=np.int64))]
    heads = [
        row(block_m, 2),
        row(np.where(reciprocal > _INT32, reciprocal - 2**32, reciprocal), 0),
        row(at_a_time, 1),
        row(ctas_per_block, 0),
        row(model.span[:, 0], _INT32),  # a padding candidate serves no number of slots
        row(np.minimum(2 * model.span[:, 1], _INT32), 0),
        *(row(bound[feature][cut], 0) for feature in (2, 3, 4) for bound in (low, high)),
        row(~tables.unfitted, 0),
        *(row(ctas, 0) for ctas in launches.T),
    ]
    assert len(heads) == INTS_HEAD + launches.shape[1]
    ints = np.concatenate(
        [
            *heads,
            [low[0, 0], high[0, 0], low[1, 0], high[1, 0], 0, 0, 0, 0],
            flat(features[0, 0]),
            flat(features[1, 0]),
            *(wide(features[feature][cut]).ravel() for feature in (2, 3, 4)),
            wide(model.weights).ravel(),
            [*limits, *[_INT32] * (margin_width - len(limits))],
        ]
    ).astype(np.int64)
    coefficients = np.zeros((5, width))
    coefficients[:, :count] = tables.coef
    reals = np.concatenate(
        [
            coefficients.ravel(),
            [*CORRECTION_RANGE, choosing_us, 0.0],
            [*margins, *[margins[-1]] * (margin_width - len(margins))],
        ]
    )
    _finite("a coefficient", reals)
    # Sums of |weight| * 2^20 and of coefficients times counts must stay below 2^53 units.
    if np.abs(ints).max() > _INT32 or np.abs(model.weights).sum(axis=1).max(initial=0) >= 2**33:
        raise PlanError("the plan's numbers do not fit 32 bits; make it anew with 'rampwrap fit'.")
    if np.abs(model.coef).max(initial=0) >= 2**53:
        raise PlanError("a coefficient of the plan is beyond all reason; make it anew with 'rampwrap fit'.")
    return Packed(
        ints.astype(np.int32),
        reals,
        tuple(block_m.tolist()),
        int(ctas_per_block.max()),
        width,
        points,
        launches.shape[1],
        margin_width,
    )


def _finite(what: str, values: npt.ArrayLike) -> None:
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        bad = numbers[~np.isfinite(numbers)][0]
        raise PlanError(f"{what} is {bad}; the plan is poisoned, make it anew with 'rampwrap fit'.")


assert SCALES == (4.0, 2.0, 2.0, 2.0, 8.0)  # the shifts in kernels.triton.select and UNIT are made for these


@attrs.frozen
class Shortlist:
    """What a captured batch of some token count chooses from.

    Attributes:
        num_tokens: of the batch.
        candidates: indices of the plan's configs, ascending, the static one among them; one means nothing to choose.
        static: index of the static config.
        expected_us: mean predicted time over the drawn routings, the cost of choosing included.
        static_us: the same for the static config alone.
    """

    num_tokens: int
    candidates: tuple[int, ...]
    static: int
    expected_us: float
    static_us: float

    @property
    def fallback(self) -> int:
        """Place of the static config among the candidates."""
        return self.candidates.index(self.static)

    @property
    def why(self) -> str:
        """In one sentence."""
        if len(self.candidates) == 1:
            return "no shortlist is predicted to gain more than choosing costs"
        gain = self.static_us / self.expected_us - 1
        return f"{len(self.candidates)} candidates are predicted {gain:.1%} faster than static, choosing included"


def shortlist(
    plan: Plan, num_tokens: int, costs: Mapping[int, float], max_candidates: int = MAX_CANDIDATES
) -> Shortlist:
    """The one to four configs with the least expected time over drawn routings, the cost of choosing included.

    Greedy from the static config; each list is judged by what its own guarded choice would run, so a candidate that
    the guard never lets win adds cost and no gain.

    Args:
        plan: its bucket for this token count, and the static config, are what may be taken.
        num_tokens: of the captured batch.
        costs: microseconds that a number of candidates costs in a graph, for the numbers that may be used.
        max_candidates: at most `MAX_CANDIDATES`.
    """
    static = plan.static.index(num_tokens)
    near = StaticTable("buckets", tuple(bucket.num_tokens for bucket in plan.buckets), tuple(range(len(plan.buckets))))
    pool = [i for i in plan.buckets[near.index(num_tokens)].shortlist if i != static] if plan.buckets else []
    counts = draw(plan.shape, [num_tokens])
    predicted = plan.model.predict(counts)
    static_us = float(predicted[:, static].mean())
    best = Shortlist(num_tokens, (static,), static, static_us, static_us)
    shape = plan.shape
    # So few slots rarely share an expert: the routing moves nothing, and kernels leave out the alignment.
    if not np.isfinite(static_us) or num_tokens * shape.top_k * 4 <= shape.num_experts:
        return best
    taken: tuple[int, ...] = (static,)
    while pool and len(taken) < max_candidates:
        found = [_expected(plan, counts, predicted, tuple(sorted((*taken, extra))), static, costs) for extra in pool]
        place = int(np.argmin(found))
        taken = tuple(sorted((*taken, pool.pop(place))))
        if found[place] < best.expected_us:
            best = Shortlist(num_tokens, taken, static, found[place], static_us)
    return best


def _expected(
    plan: Plan,
    counts: IntArray,
    predicted: FloatArray,
    candidates: Sequence[int],
    static: int,
    costs: Mapping[int, float],
) -> float:
    if len(candidates) not in costs:
        return float("inf")
    model = plan.model.take(tuple(candidates))
    fallback = list(candidates).index(static)
    chosen = [candidates[model.choose(row, fallback)] for row in counts]
    return float(predicted[np.arange(len(counts)), chosen].mean()) + costs[len(candidates)]
