"""What a GPU needs to choose like `CostModel.choose`: one bucket's candidates as two flat arrays, and which to take.

Everything the choice reads is an integer, in `Packed.ints`, or one of the numbers in `Packed.reals`; no array is
larger than 8 KB. `kernels.triton.select` reads them; nothing here needs torch or a GPU.
"""

import itertools

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError, PlanError
from rampwrap.kernel.grid import FloatArray, IntArray, max_blocks
from rampwrap.model.base import CORRECTION_RANGE, CostModel
from rampwrap.model.features import SCALES
from rampwrap.model.wave import Wave

MAX_IN_GRAPH = 4
"Candidates of a bucket."
MAX_SLOTS = 1 << 21
"65,536 tokens x top-32. Up to twice that a float32 holds the logarithm's bits with room to halve them."

HEAD = 18
"Numbers of a candidate at the front of `ints`, an even count, so that the GPU reads two at a time."
MAX_LAUNCHES = 4
TALLY = 16
"""float64 sums over the launches of a layer, as the selecting kernel adds them up: how often each place was chosen [4],
predicted microseconds of the static config and of the choice, experts with tokens, sum_e (c_e / slots)^2, and launches
that were outside everything profiled; the rest is padding."""
UNIT = 2.0**23
"Features are integers of 1 / UNIT, after division by `features.SCALES`."
_INT32 = 2**31 - 1


@attrs.frozen(eq=False)
class Packed:
    """The candidates of a bucket.

    With C candidates, S = `points`, M = `margins`, `ints` holds, one after the other: for each candidate `HEAD` numbers
    (block_m, ceil(2^32 / block_m), CTAs at a time, CTAs of a block, least and twice the most slots served, ranges of the
    features blocks, waves and unused waves, fitted or not, 0, CTAs of a block of up to four launches); 8 shared by all
    (ranges of the features slots and active experts, zeros); the support points' slots [S] and active experts [S],
    blocks [C, S], waves [C, S], unused waves [C, S] and weights [C, S]; and the limits [M + 1] between which a margin
    holds. `reals` holds the coefficients [C, 5], range of the correction, cost of choosing, 0, and the margins [M].

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
        PlanError: another model than ``wave``, more than `MAX_IN_GRAPH`, or numbers that are not finite or too
            large to stay exact on the GPU.
    """
    if not isinstance(model, Wave):
        raise PlanError(f"model {model.name!r} cannot choose on the GPU; make the plan with the model 'wave'.")
    count = model.num_configs
    if not 1 <= count <= MAX_IN_GRAPH:
        raise PlanError(f"{count} candidates cannot be packed; give a bucket of 1 to {MAX_IN_GRAPH}.")
    tables, geometry = model._fast, model.geometry
    _finite("a margin's error", [model.error, *(error for _, error in model.local_error)])
    _finite("the cost of choosing", [choosing_us])
    features = tables.points * UNIT
    if not np.array_equal(features, np.rint(features)) or model.support.min() < 1:
        raise PlanError("the plan's support points are no positive integers; make it anew with 'rampwrap fit'.")
    low, high = features.min(axis=2), features.max(axis=2)
    cut = tables.cut_of

    block_m = geometry.block_m
    if block_m.min() < 2 or block_m.max() > 1024:
        raise PlanError(f"a candidate has block_m={block_m.min()}..{block_m.max()}; 2 to 1024 can be packed.")
    launches = geometry.launches[:, geometry.launches.any(axis=0)]
    if launches.shape[1] > MAX_LAUNCHES:
        raise PlanError(f"a candidate has {launches.shape[1]} launches; {MAX_LAUNCHES} can be packed.")
    ctas_per_block = launches.sum(axis=1)
    at_a_time = geometry.resident * geometry.num_sms
    reciprocal = 2**32 // block_m + 1  # floor(x / block_m) = high word of the product, for x below 2^32 / block_m
    steps = model.local_error
    margin_width = 1 << max(5, (max(len(steps), margin_steps or 1) - 1).bit_length())
    limits = [a[0] + b[0] for a, b in itertools.pairwise(steps)]
    margins = [model.margin(np.array([slots])) for slots, _ in steps] or [model.margin(np.zeros(1, dtype=np.int64))]
    points = max(32, margin_width, 1 << (len(model.support) - 1).bit_length())
    ranges = [bound[feature][cut] for feature in (2, 3, 4) for bound in (low, high)]
    heads = np.zeros((count, HEAD), dtype=np.int64)
    heads[:, :14] = np.column_stack(
        [
            block_m,
            np.where(reciprocal > _INT32, reciprocal - 2**32, reciprocal),
            at_a_time,
            ctas_per_block,
            model.span[:, 0],
            np.minimum(2 * model.span[:, 1], _INT32),
            *ranges,
            ~tables.unfitted,
            np.zeros(count),
        ]
    )
    heads[:, 14 : 14 + launches.shape[1]] = launches

    def wide(values: npt.ArrayLike, rows: int = count) -> IntArray:
        out = np.zeros((rows, points), dtype=np.int64)
        out[:, : len(model.support)] = values
        return out.ravel()

    ints = np.concatenate(
        [
            heads.ravel(),
            [low[0, 0], high[0, 0], low[1, 0], high[1, 0], 0, 0, 0, 0],
            wide(features[0, 0], 1),
            wide(features[1, 0], 1),
            *(wide(features[feature][cut]) for feature in (2, 3, 4)),
            wide(model.weights),
            [-1, *limits, *[_INT32] * (margin_width - len(limits))],
        ]
    ).astype(np.int64)
    reals = np.concatenate(
        [
            tables.coef.T.ravel(),
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
