"""What the cost model reads of a histogram: four kinds of integers, made in one pass over the experts."""

import attrs
import numpy as np

from rampwrap.grid import CtaGrid, FloatArray, IntArray


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


@attrs.frozen(eq=False)
class Geometry:
    """How each config cuts a histogram into blocks, CTAs and waves.

    Attributes:
        num_sms: SMs of the GPU.
        block_m: int64 [C], token rows of one M block.
        launches: int64 [C, L], CTAs per M block of each launch of the layer, 0 where a config has fewer.
        resident: int64 [C], CTAs resident on one SM at a time.
    """

    num_sms: int
    block_m: IntArray
    launches: IntArray
    resident: IntArray

    @classmethod
    def of(cls, grids: tuple[CtaGrid, ...], num_sms: int) -> "Geometry":
        """Geometry of grids, one CTA resident per SM until a fit says otherwise."""
        width = max(len(grid.launches) for grid in grids)
        launches = np.array([[*grid.launches, *[0] * (width - len(grid.launches))] for grid in grids])
        block_m = np.array([grid.block_m for grid in grids])
        return cls(num_sms, block_m, launches, np.ones(len(grids), dtype=np.int64))

    @property
    def ctas_per_block(self) -> IntArray:
        """CTAs of one M block over all launches, int64 [C]."""
        out: IntArray = self.launches.sum(axis=1)
        return out

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
        slots = self.num_sms * self.resident * np.float64(1.0)
        waves: FloatArray = np.ceil(blocks[..., None] * self.launches / slots[:, None]).sum(axis=-1)
        # Counted in whole slots first, so that one division is the only rounding.
        idle = waves * slots - blocks * self.ctas_per_block
        unused: FloatArray = np.floor(idle / slots * 2.0**20) * 2.0**-20
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
