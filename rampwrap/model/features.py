"""What the cost model reads of a histogram: four kinds of integers, made in one pass over the experts."""

from functools import cached_property
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import FitError
from rampwrap.kernel.grid import CtaGrid, FloatArray, IntArray
from rampwrap.schema import MOST_SIZE, between

#: Distances that halve the weight of a workload: slots, active experts, blocks, waves (powers of two each, so
#: that scaling is exact) and unused waves.
SCALES = (4.0, 2.0, 2.0, 2.0, 8.0)
_SHRINK = 1.0 / np.array(SCALES)


def float_log2(value: FloatArray) -> FloatArray:
    """The logarithm that a float's own bits hold: ``exponent + mantissa - 1``, linear between powers of two.

    It differs from log2 by at most 0.0861 and, being a bit cast, a multiplication by a power of two and a
    subtraction, gives the same bits on the host and on the GPU; for integers below 2**42 it is exact.

    Args:
        value: float64 of any shape, C-contiguous, positive.

    Returns:
        float64 of the same shape.
    """
    bits: IntArray = value.view(np.int64)
    return np.multiply(bits, 2.0**-52, dtype=np.float64) - 1023.0


def shaped(name: str, value: npt.NDArray[Any], shape: tuple[int, ...], low: float, high: float) -> None:
    """Whether a part of a model is whole.

    Raises:
        FitError: it has another shape, no entries, or one that is not from `low` to `high`; says which.
    """
    if value.shape != shape or not value.size:
        raise FitError(f"{name} has shape {value.shape} instead of {shape}; fit the model anew.")
    least, most = value.min(), value.max()
    if not (low <= least and most <= high):
        raise FitError(
            f"{name} holds {most if most > high else least}, not from {low:g} to {high:g}; fit the model anew."
        )


@attrs.frozen(eq=False, slots=False)
class Geometry:
    """How each config cuts a histogram into blocks, CTAs and waves.

    Attributes:
        num_sms: SMs of the GPU.
        block_m: int64 [C], token rows of one M block.
        launches: int64 [C, L], CTAs per M block of each launch of the layer, 0 where a config has fewer.
        resident: int64 [C], CTAs resident on one SM at a time.
    """

    num_sms: int = attrs.field(validator=between(1, 1 << 16, FitError))
    block_m: IntArray
    launches: IntArray
    resident: IntArray

    def __attrs_post_init__(self) -> None:
        configs = self.block_m.shape[:1]
        shaped("block_m", self.block_m, configs, 1, MOST_SIZE)
        shaped("launches", self.launches, (*configs, *self.launches.shape[1:2]), 0, MOST_SIZE)
        shaped("resident", self.resident, configs, 1, 1 << 10)
        if (self.launches.sum(axis=1) < 1).any():
            raise FitError("launches has a config without CTAs; fit the model anew.")

    @classmethod
    def of(cls, grids: tuple[CtaGrid, ...], num_sms: int) -> "Geometry":
        """Geometry of grids, one CTA resident per SM until a fit says otherwise."""
        width = max(len(grid.launches) for grid in grids)
        launches = np.array([[*grid.launches, *[0] * (width - len(grid.launches))] for grid in grids])
        block_m = np.array([grid.block_m for grid in grids])
        return cls(num_sms, block_m, launches, np.ones(len(grids), dtype=np.int64))

    @cached_property
    def ctas_per_block(self) -> FloatArray:
        """CTAs of one M block over all launches, float64 [C]."""
        out: FloatArray = self.launches.sum(axis=1, dtype=np.float64)
        return out

    @cached_property
    def slots(self) -> FloatArray:
        """CTAs that run at a time, float64 [C]."""
        return np.multiply(self.resident, self.num_sms, dtype=np.float64)

    @cached_property
    def _by_launch(self) -> list[FloatArray]:
        return list(self.launches.T.astype(np.float64))

    def take(self, configs: IntArray) -> "Geometry":
        """The same for some of the configs, in this order."""
        return Geometry(self.num_sms, self.block_m[configs], self.launches[configs], self.resident[configs])

    def waves(self, blocks: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Waves of all launches, and the part of them that stays unused.

        Args:
            blocks: float64 [..., C], M blocks at each config's `block_m`.

        Returns:
            (waves, unused), float64 [..., C]; `unused` is in waves, rounded down to multiples of 2**-20, so
            that sums of it are exact in any order.
        """
        waves = np.ceil(blocks * self._by_launch[0] / self.slots)
        for ctas in self._by_launch[1:]:
            waves = waves + np.ceil(blocks * ctas / self.slots)
        # Counted in whole slots first, so that one division is the only rounding.
        idle = waves * self.slots - blocks * self.ctas_per_block
        unused: FloatArray = np.floor(idle / self.slots * 2.0**20) * 2.0**-20
        return waves, unused


def pass_over(counts: IntArray, block_m: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The one pass over a histogram, or over several.

    Args:
        counts: int [E] or [W, E], tokens per local expert.
        block_m: int [B], the distinct block heights.

    Returns:
        slots: float64 [] or [W], rows routed to this rank: tokens x top_k without expert parallelism.
        active: float64 [] or [W], experts with at least one token.
        blocks: float64 [B] or [W, B], ``sum_e ceil(c_e / block_m)``. The division is IEEE and a quotient of
            integers below 2**53 is never rounded up to the next integer, so ceil is exact.
    """
    rows = np.asarray(counts, dtype=np.float64)
    blocks: FloatArray = np.ceil(rows[..., None, :] / block_m[:, None]).sum(axis=-1)
    slots: FloatArray = rows.sum(axis=-1)
    active: FloatArray = np.count_nonzero(rows, axis=-1) * np.float64(1.0)
    return slots, active, blocks


def scaled(
    slots: FloatArray, active: FloatArray, blocks: FloatArray, waves: FloatArray, unused: FloatArray
) -> FloatArray:
    """Features of the correction, divided by `SCALES`: float64 [5, ...] for blocks, waves and unused of [...].

    `slots` and `active` may lack trailing axes.
    """
    out = np.empty((5, *blocks.shape))
    out[0], out[1], out[2], out[3], out[4] = slots, active, blocks, waves, unused
    out[:4] = float_log2(out[:4])
    out *= _SHRINK.reshape(5, *[1] * blocks.ndim)
    return out


def support_features(support: IntArray, height_of: IntArray, geometry: Geometry) -> FloatArray:
    """The same for support points: float64 [5, S, C] from int64 [S, 2 + B] (slots, active, blocks by height)."""
    points = support.astype(np.float64)
    blocks = points[:, 2 + height_of]
    return scaled(points[:, :1], points[:, 1:2], blocks, *geometry.waves(blocks))


@attrs.frozen(eq=False)
class Tables:
    """What the default model's prediction reads, made once: configs that cut a histogram alike share a "cut".

    Attributes:
        cuts: geometry of the G distinct cuts.
        cut_of: int64 [C], the cut of each config.
        height_of: int64 [G], place of a cut's `block_m` among the distinct ones.
        points: float64 [5, G, S], scaled features of the support points.
        low, high: float64 [5, G], their range.
        coef: float64 [5, C], microseconds.
        weights: float64 [C, S], times the unit of the kernel.
        unfitted: bool [C].
    """

    cuts: Geometry
    cut_of: IntArray
    height_of: IntArray
    points: FloatArray
    low: FloatArray
    high: FloatArray
    coef: FloatArray
    weights: FloatArray
    unfitted: npt.NDArray[np.bool_]

    @classmethod
    def make(
        cls, geometry: Geometry, support: IntArray, block_ms: IntArray, coef: FloatArray, weights: FloatArray
    ) -> "Tables":
        """From int64 [S, 2 + B] support, [B] block heights, coefficients [C, 5] and weights [C, S]."""
        keys = np.column_stack([geometry.block_m, geometry.launches, geometry.resident])
        _, first, cut_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        cuts = geometry.take(first)
        height_of = np.searchsorted(block_ms, cuts.block_m)
        points = np.ascontiguousarray(support_features(support, height_of, cuts).transpose(0, 2, 1))
        return cls(
            cuts,
            cut_of.ravel(),
            height_of,
            points,
            points.min(axis=2),
            points.max(axis=2),
            np.ascontiguousarray(coef.T),
            weights,
            np.logical_not(coef.any(axis=1)),
        )
