"""One array layout of the wave model, which C (`_score.c`) and the GPU (`kernels.triton.select`) read.

Everything but coefficients and margins is an integer, so that both make numpy's choices, bit for bit. Nothing here
needs torch or a GPU.
"""

import itertools

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError, PlanError
from rampwrap.kernel.grid import FloatArray, IntArray, max_blocks
from rampwrap.model.base import CORRECTION_RANGE
from rampwrap.model.features import SCALES, Tables

MAX_SLOTS = 1 << 21
"65,536 tokens x top-32. Up to twice that a float32 holds the logarithm's bits with room to halve them."
MAX_BLOCK_M = 1024
MAX_LAUNCHES = 4
SHARED, CUT, CONFIG = 8, 16, 4
"Numbers at the front of `Packed.ints`, of a cut and of a config: even counts, so that the GPU reads two at a time."
UNIT = 2.0**23
"Features are integers of 1 / UNIT, after division by `features.SCALES`."
_INT32 = 2**31 - 1


@attrs.frozen(eq=False)
class Packed:
    """A model's configs, those that cut a histogram alike beside each other.

    With G cuts, C configs, S = `points` and M = `margins`, `ints` holds, one after the other:

    - shared by all: ranges of the features slots and active experts, G, C, S, M;
    - of each cut: block_m, ceil(2^32 / block_m), CTAs at a time, CTAs of a block, ranges of the features blocks, waves
      and unused waves, CTAs of a block of up to four launches, and its first config and the one after its last;
    - of each config: least and twice the most slots served, fitted or not, its number;
    - of the support points: slots [S], active experts [S], blocks [G, S], waves [G, S], unused waves [G, S];
    - weights [C, S], and the limits [M + 1] between which a margin holds; a zero where their number would be odd.

    `reals` holds the coefficients [C, 5], range of the correction, cost of choosing, 0, and the margins [M].

    Attributes:
        ints: int32.
        reals: float64.
        block_ms: of the cuts.
        ctas_per_block: the largest of a cut.
        launches: the most of a cut.
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

    def to_bytes(self) -> bytes:
        """What C reads."""
        return self.ints.tobytes() + self.reals.tobytes()


def lay_out(
    tables: Tables,
    weights: IntArray,
    span: IntArray,
    margins: tuple[tuple[int, float], ...],
    *,
    choosing_us: float = 0.0,
    alone: bool = False,
    least_points: int = 1,
    least_margins: int = 1,
) -> Packed:
    """The layout of a model.

    Args:
        tables: of the model.
        weights: int64 [C, S] in `WEIGHT_UNIT`.
        span: int64 [C, 2], least and most slots of each config.
        margins: (slots, margin), one or more, ascending.
        choosing_us: microseconds that choosing costs.
        alone: whether each config has a cut of its own, in the order of the configs, as the GPU reads it.
        least_points, least_margins: to which support points and margins are filled up.

    Raises:
        PlanError: numbers with which the integers would not be exact.
    """
    geometry, features = tables.cuts, tables.points * UNIT
    configs, support = weights.shape
    block_m, launches = geometry.block_m, geometry.launches[:, geometry.launches.any(axis=0)]
    if not np.array_equal(features, np.rint(features)):
        raise PlanError("the plan's support points are beyond 2^23 blocks or waves; make it anew with 'rampwrap fit'.")
    if block_m.max() > MAX_BLOCK_M:
        raise PlanError(f"a candidate has block_m={block_m.max()}; 1 to {MAX_BLOCK_M} can be packed.")
    if launches.shape[1] > MAX_LAUNCHES:
        raise PlanError(f"a candidate has {launches.shape[1]} launches; {MAX_LAUNCHES} can be packed.")
    # Sums of |weight| * 2^20 must stay below 2^53 units, products of CTAs with waves as well.
    if (
        max(np.abs(weights).max(), np.abs(features).max()) > _INT32
        or np.abs(weights).sum(axis=1).max() >= 2**33
        or geometry.ctas_per_block.max() > 2**20
    ):
        raise PlanError("the plan's numbers do not fit 32 bits; make it anew with 'rampwrap fit'.")
    if not np.isfinite(choosing_us):
        raise PlanError(
            f"the cost of choosing is {choosing_us}; the plan is poisoned, make it anew with 'rampwrap fit'."
        )

    if alone:
        cuts, order = tables.cut_of, np.arange(configs)
        ends = order + 1
    else:
        cuts, order = np.arange(len(block_m)), np.argsort(tables.cut_of, kind="stable")
        ends = np.searchsorted(tables.cut_of[order], cuts, side="right")
    low, high = features.min(axis=2), features.max(axis=2)
    points, width = max(least_points, support), max(least_margins, len(margins))
    # floor(x / block_m) is the high word of the product with it, for x below 2^32 / block_m; 1 has none.
    reciprocal = np.where(block_m > 1, 2**32 // block_m + 1, 0)
    by_cut = np.zeros((len(cuts), CUT), dtype=np.int64)
    by_cut[:, :4] = np.column_stack([block_m, reciprocal, geometry.slots, geometry.ctas_per_block])[cuts]
    by_cut[:, 4:10] = np.stack([low[2:], high[2:]], axis=1).reshape(6, -1).T[cuts]
    by_cut[:, 10 : 10 + launches.shape[1]] = launches[cuts]
    by_cut[1:, 14], by_cut[:, 15] = ends[:-1], ends
    by_config = np.column_stack([np.minimum(span * (1, 2), _INT32), ~tables.unfitted, np.arange(configs)])[order]

    def wide(values: npt.ArrayLike, rows: int) -> FloatArray:
        out = np.zeros((rows, points))
        out[:, :support] = values
        return out.ravel()

    limits = [-1, *(min(a + b, _INT32) for (a, _), (b, _) in itertools.pairwise(margins))]
    ints = np.concatenate(
        [
            [low[0, 0], high[0, 0], low[1, 0], high[1, 0], len(cuts), configs, points, width],
            by_cut.ravel(),
            by_config.ravel(),
            wide(features[:2, 0], 2),
            wide(features[2:, cuts].reshape(-1, support), 3 * len(cuts)),
            wide(weights[order], configs),
            [*limits, *[_INT32] * (width + 1 - len(limits))],
        ]
    )
    reals = np.concatenate(
        [
            tables.coef.T[order].ravel(),
            [*CORRECTION_RANGE, choosing_us, 0.0],
            [margin for _, margin in margins],
            [margins[-1][1]] * (width - len(margins)),
        ]
    )
    return Packed(
        np.append(ints, [0] * (len(ints) % 2)).astype(np.int64).astype(np.uint32).view(np.int32),
        reals,
        tuple(block_m[cuts].tolist()),
        int(geometry.ctas_per_block.max()),
        points,
        launches.shape[1],
        width,
    )


assert SCALES == (4.0, 2.0, 2.0, 2.0, 8.0)  # the shifts in C, in kernels.triton.select and UNIT are made for these
