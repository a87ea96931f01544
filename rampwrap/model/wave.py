"""The wave model: a trend in waves, CTAs, active experts and slots with a local correction, exact in float64."""

from typing import Any, ClassVar, Self

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import FitError, PlanError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.model import compiled as native
from rampwrap.model.base import COEF_UNIT, CORRECTION_RANGE, MOST_SUPPORT, MOST_WEIGHT, WEIGHT_UNIT, CostModel, _ints
from rampwrap.model.features import Tables, pass_over, scaled, shaped
from rampwrap.model.packed import Packed, lay_out
from rampwrap.schema import LARGEST, MOST_SIZE


@attrs.frozen(eq=False)
class Wave(CostModel):
    """A non-negative trend in waves, CTAs, active experts and slots, with a local correction.

    Attributes:
        coef: int64 [C, 5] in `COEF_UNIT`: start, per wave, per CTA, per active expert, per slot; all zero where a
            config could not be fitted.
        weights: int64 [C, S] in `WEIGHT_UNIT`, one for each support point.
        support: int64 [S, 2 + B], slots, active experts and blocks at each distinct `block_m`, ascending.
        block_ms: int64 [B], those of `support`.
    """

    name: ClassVar[str] = "wave"
    coef: IntArray
    weights: IntArray
    support: IntArray
    block_ms: IntArray
    _fast: Tables = attrs.field(init=False, repr=False)
    _packed: bytes = attrs.field(init=False, repr=False)
    _least: int = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        configs, heights, points = self.num_configs, len(self.block_ms), len(self.support)
        shaped("block_ms", self.block_ms, (heights,), 1, MOST_SIZE)
        shaped("support", self.support, (points, 2 + heights), 1, MOST_SUPPORT)
        shaped("coef", self.coef, (configs, 5), 0, LARGEST)
        shaped("weights", self.weights, (configs, points), -MOST_WEIGHT, MOST_WEIGHT)
        if (np.diff(self.block_ms) <= 0).any() or not np.isin(self.geometry.block_m, self.block_ms).all():
            raise FitError("block_ms is not ascending or lacks a config's block_m; fit the model anew.")
        coef = np.multiply(self.coef, COEF_UNIT, dtype=np.float64)
        weights = np.multiply(self.weights, WEIGHT_UNIT * WEIGHT_UNIT, dtype=np.float64)
        tables = Tables.make(self.geometry, self.support, self.block_ms, coef, weights)
        object.__setattr__(self, "_fast", tables)
        try:
            object.__setattr__(self, "_packed", self.packed().to_bytes())
        except PlanError:  # C could not promise numpy's bits
            object.__setattr__(self, "_packed", b"")
        object.__setattr__(self, "_least", int(min(self.support[:, 1], default=0)))

    def packed(self, **how: Any) -> Packed:
        """The layout that C and GPUs read, with the keyword arguments and errors of `packed.lay_out`."""
        margins = tuple((slots, self._margin(slots)) for slots, _ in self.local_error) or ((0, self._margin(0)),)
        return lay_out(self._fast, self.weights, self.span, margins, **how)

    def choose(self, counts: IntArray, fallback: int, choosing_us: float = 0.0, outside: int | None = None) -> int:
        """As `CostModel.choose`, in C where `rampwrap.model.compiled` can."""
        index = native.choose(self._packed, counts, 0, fallback, choosing_us, outside)
        return super().choose(counts, fallback, choosing_us, outside) if index is None else index

    def choose_ids(
        self,
        topk_ids: npt.NDArray[Any],
        num_experts: int,
        fallback: int,
        choosing_us: float = 0.0,
        outside: int | None = None,
    ) -> int | None:
        """`choose` straight from expert ids, where `rampwrap.model.compiled` can; None: count them and `choose`."""
        return native.choose(self._packed, topk_ids, num_experts, fallback, choosing_us, outside)

    @property
    def _least_active(self) -> int:
        return self._least

    def _row(self, counts: IntArray) -> FloatArray:
        us = native.predict(self._packed, counts, self.num_configs)
        return self._row_numpy(counts) if us is None else us

    def trend(self, counts: IntArray) -> FloatArray:
        """The trend without its correction, which knows the profiled range only."""
        t = self._fast
        slots, active, heights = pass_over(counts, self.block_ms)
        blocks = heights[t.height_of]
        by_cut = np.array([t.cuts.waves(blocks)[0], blocks * t.cuts.ctas_per_block]).take(t.cut_of, axis=1)
        us: FloatArray = t.coef[0] + t.coef[3] * active + t.coef[4] * slots + (t.coef[1:3] * by_cut).sum(axis=0)
        us[t.unfitted] = np.inf
        return us

    def _row_numpy(self, counts: IntArray) -> FloatArray:
        t = self._fast
        slots, active, heights = pass_over(counts, self.block_ms)
        blocks = heights[t.height_of]
        waves, unused = t.cuts.waves(blocks)
        # Beyond the profiled range the correction stays what it is at its edge, and the trend goes on.
        features = np.minimum(np.maximum(scaled(slots, active, blocks, waves, unused), t.low), t.high)
        apart = features[2:, :, None] - t.points[2:]
        np.abs(apart, out=apart)
        apart[0] += 1.0 + np.abs(features[:2, :1] - t.points[:2, 0]).sum(axis=0)
        near = np.floor(1.0 / WEIGHT_UNIT / (apart[0] + apart[1] + apart[2]))
        moved = np.einsum("cs,cs->c", near.take(t.cut_of, axis=0), t.weights)
        low, high = CORRECTION_RANGE
        by_cut = np.array([waves, blocks * t.cuts.ctas_per_block]).take(t.cut_of, axis=1)
        trend = t.coef[0] + t.coef[3] * active + t.coef[4] * slots + (t.coef[1:3] * by_cut).sum(axis=0)
        us: FloatArray = trend * (1.0 + np.minimum(np.maximum(moved, low), high))
        us[t.unfitted] = np.inf
        return us

    def take(self, configs: tuple[int, ...] | IntArray) -> Self:
        """The same model for some of the configs, in this order."""
        index = _ints(configs)
        return attrs.evolve(
            self,
            geometry=self.geometry.take(index),
            span=self.span[index],
            coef=self.coef[index],
            weights=self.weights[index],
        )
