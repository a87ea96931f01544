"""Cost models: microseconds of every config for any histogram, from coefficients fitted to `Timings`.

``default``, for each config c with M blocks g = sum_e ceil(c_e / block_m) and CTAs n = g * ctas_per_block:

    trend = a + b * waves + p * n + q * active + r * slots            all coefficients >= 0
    waves = sum over launches of ceil(g * ctas / (num_sms * resident))   resident in 1..8, by held-out error
    us    = trend * (1 + sum_s weight[c, s] / (1 + |log2 slots - s| / 4 + |log2 active - s| / 2
                     + |log2 g - s| / 2 + |log2 waves - s| / 2 + |unused waves - s| / 8))

where s runs over the profiled workloads and log2 is `features.float_log2`. Every coefficient is an integer times a
power of two and every feature an integer or a multiple of 2**-20, so all sums are exact in float64: their order,
and whether a compiler fuses multiply and add, cannot change a bit. What rounds is two divisions and one product.

``ramp4`` is the published form (arXiv 2604.26039), untouched: ``a + b*waves + c*g + d*log(g+1)``, least squares.
"""

import abc
import bisect
import math
from functools import cached_property
from typing import Any, ClassVar, Self

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap import native
from rampwrap.correction import distinct, fit_local, ratio_errors, span_of
from rampwrap.errors import FitError, InputError
from rampwrap.features import Geometry, Tables, pass_over, scaled, shaped
from rampwrap.grid import FloatArray, IntArray
from rampwrap.schema import LARGEST, MOST_SIZE, between
from rampwrap.timings import Timings

COEF_UNIT = 2.0**-30
"Microseconds. A sum of products of it with integers is exact up to 8 seconds."
WEIGHT_UNIT = 2.0**-20
"Of the correction's weights and of its kernel, both."
CORRECTION_RANGE = (-0.6, 1.5)
"No correction moves a trend further than this; on two real tables it moves none by more than 0.25."
MOST_WEIGHT = 1 << 40
"Of one support point, in `WEIGHT_UNIT`: a correction of a million times the trend, before it is bounded."
MOST_SUPPORT = 1 << 41
"Slots, active experts and blocks of a support point: up to 2**42 their logarithm is exact."
MIN_MARGIN = 0.003
"Repeated measurements of a cell differ by 0.2-0.3 %: no gain below it can be told from noise."
MARGIN_SHARE = 0.65
"""Gain over static that is asked for, in standard errors of a ratio. Averaged over four held-out splits of two
kernels' tables, 0.4-0.8 give the same mean regret within 0.03 points; at 0.3 and below 5-6 % of workloads get more
than 1 % slower than static, at 1.0 three points of headroom are lost. The constant was chosen on those splits, not
by each fit. At equal mean regret (0.68-0.69 %) a local error leaves 2.4 % of workloads slower, a global one 4.2 %."""


@attrs.frozen(eq=False)
class CostModel(abc.ABC):
    """Predicted microseconds of every config, the error of those predictions, and the guard that follows from it.

    Attributes:
        geometry: blocks, CTAs and waves of the configs.
        span: int64 [C, 2], least and most slots (routed rows) of the workloads that each config was fitted on.
        error: standard deviation of the log ratio of two configs' times against the prediction, on token counts
            left out of the fit (single workloads for `Ramp4`), among configs within 10 % of the best; 0.02 is 2 %.
        local_error: the same near some numbers of slots, ((slots, error), ...), ascending.
    """

    name: ClassVar[str]
    geometry: Geometry
    span: IntArray = attrs.field()
    error: float = attrs.field(validator=between(0, 1e6, FitError, whole=False))
    local_error: tuple[tuple[int, float], ...] = attrs.field()

    @span.validator
    def _ordered(self, attribute: "attrs.Attribute[IntArray]", value: IntArray) -> None:
        shaped("span", value, (len(self.geometry.block_m), 2), 0, LARGEST)
        if (value[:, 0] > value[:, 1]).any():
            raise FitError("span has a least number of slots above the largest; fit the model anew.")

    @local_error.validator
    def _by_slots(self, attribute: "attrs.Attribute[Any]", value: tuple[tuple[int, float], ...]) -> None:
        slots = [at for at, _ in value]
        if slots != sorted(set(slots)) or not all(at >= 1 and 0 <= error <= 1e6 for at, error in value):
            raise FitError(
                "local_error is not ascending in slots with finite errors of at least 0; fit the model anew."
            )

    @cached_property
    def _all_near(self) -> tuple[int, int]:
        """The highest of the least and the lowest of the most slots of the configs."""
        return int(self.span[:, 0].max()), int(self.span[:, 1].min())

    @property
    def num_configs(self) -> int:
        """Number of configs."""
        return len(self.span)

    def predict(self, counts: IntArray) -> FloatArray:
        """Predicted times.

        Args:
            counts: int [E] or [W, E], tokens per local expert.

        Returns:
            float64 [C] or [W, C] microseconds; inf for a config that could not be fitted.

        Raises:
            InputError: `counts` has another number of dimensions.
        """
        if counts.ndim == 1:
            return self._row(counts)
        if counts.ndim != 2:
            raise InputError(f"counts has shape {counts.shape}; give one histogram [E] or several [W, E].")
        return np.array([self._row(row) for row in counts]).reshape(len(counts), self.num_configs)

    def margin(self, counts: IntArray) -> float:
        """The predicted gain, as a share of the faster time, below which static stays.

        `MARGIN_SHARE` of the local error at the nearest fitted number of slots (the lower on a tie), so it depends
        on the token count alone and a bucket of token counts can carry it as a constant.
        """
        return self._margin(int(counts.sum()))

    def _margin(self, slots: int) -> float:
        local, error = self.local_error, self.error
        if local:
            right = bisect.bisect_left(local, (slots, 0.0))
            if right == len(local) or (right and slots - local[right - 1][0] <= local[right][0] - slots):
                right -= 1
            error = local[right][1]
        return max(MIN_MARGIN, MARGIN_SHARE * error)

    def trend(self, counts: IntArray) -> FloatArray:
        """Predicted times far from everything fitted, float64 [C]: what of the model goes on there."""
        return self._row(counts)

    def choose(self, counts: IntArray, fallback: int, choosing_us: float = 0.0, outside: int | None = None) -> int:
        """The config predicted fastest, or the fallback unless the gain exceeds `margin` and the cost of choosing.

        A config never serves beyond twice the range of slots it was profiled on, the fallback excepted, nor does any
        but the fallback with fewer active experts than were ever profiled. Ties go to the fallback, then to the lower
        index.

        Args:
            counts: int [E].
            fallback: index of the static config.
            choosing_us: microseconds that choosing costs.
            outside: returned instead of the fallback where fewer experts are active than were ever profiled.
        """
        slots = int(counts.sum())
        if not slots:
            return fallback
        if np.count_nonzero(counts) < self._least_active:
            return fallback if outside is None else outside
        us = self._row(counts)
        static_us = us[fallback]
        low, high = self._all_near
        if not low <= 2 * slots <= 4 * high:
            us[(self.span[:, 0] > 2 * slots) | (slots > 2 * self.span[:, 1])] = np.inf
        best = int(us.argmin())
        # A static config that could not be fitted has no predicted time, hence no gain over it can be shown.
        if not math.isfinite(static_us) or not static_us - us[best] > self._margin(slots) * us[best] + choosing_us:
            return fallback
        return best

    def choose_ids(
        self,
        topk_ids: npt.NDArray[Any],
        num_experts: int,
        fallback: int,
        choosing_us: float = 0.0,
        outside: int | None = None,
    ) -> int | None:
        """`choose` straight from expert ids, where `rampwrap.native` can; None: count them and `choose`."""
        return None

    @property
    def _least_active(self) -> int:
        """Active experts below which nothing is known; a model that keeps no workloads knows no bound."""
        return 0

    @abc.abstractmethod
    def _row(self, counts: IntArray) -> FloatArray: ...

    @abc.abstractmethod
    def take(self, configs: tuple[int, ...] | IntArray) -> Self:
        """The same model for some of the configs, in this order."""

    @classmethod
    @abc.abstractmethod
    def fit(cls, timings: Timings, rows: IntArray) -> Self:
        """Fits to the workloads `rows` of a table."""


@attrs.frozen(eq=False)
class Ramp4(CostModel):
    """The published four-parameter form, as the yardstick: no guard, CTAs per SM not considered.

    Attributes:
        coef: float64 [C, 4] microseconds: start, per wave, per block, per log(blocks + 1); NaN where not fitted.
    """

    name: ClassVar[str] = "ramp4"
    coef: FloatArray = attrs.field()

    @coef.validator
    def _finite(self, attribute: "attrs.Attribute[FloatArray]", value: FloatArray) -> None:
        shaped("coef", np.nan_to_num(value, nan=0.0), (self.num_configs, 4), -1e12, 1e12)
        if (np.isnan(value).any(axis=1) != np.isnan(value).all(axis=1)).any():
            raise FitError("coef lacks some of a config's numbers; give all, or none where it was not fitted.")

    @staticmethod
    def _design(geometry: Geometry, counts: IntArray) -> FloatArray:
        distinct, where = np.unique(geometry.block_m, return_inverse=True)
        blocks = pass_over(counts, distinct)[2][..., where]
        waves = np.ceil(blocks * geometry.ctas_per_block / geometry.num_sms)
        return np.stack([np.ones_like(blocks), waves, blocks, np.log(blocks + 1.0)], axis=-1)

    def _row(self, counts: IntArray) -> FloatArray:
        us = (self._design(self.geometry, counts) * self.coef).sum(axis=-1)
        out: FloatArray = np.where(np.isnan(us), np.inf, us)
        return out

    def _margin(self, slots: int) -> float:
        """Zero: the published form has no guard."""
        return 0.0

    def take(self, configs: tuple[int, ...] | IntArray) -> Self:
        """The same model for some of the configs, in this order."""
        index = _ints(configs)
        return attrs.evolve(self, geometry=self.geometry.take(index), span=self.span[index], coef=self.coef[index])

    @classmethod
    def fit(cls, timings: Timings, rows: IntArray) -> Self:
        """Ordinary least squares for each config, on the cells that ran."""
        import scipy.linalg  # here, as wherever a model is fitted: serving a plan never waits half a second for it

        geometry = Geometry.of(timings.grids, timings.device.num_sms)
        us, counts = timings.us[rows], timings.counts[rows]
        design = cls._design(geometry, counts)
        coef = np.full((us.shape[1], 4), np.nan)
        errors = np.full(us.shape, np.nan)
        for config in range(us.shape[1]):
            ran = np.flatnonzero(np.isfinite(us[:, config]))
            if len(ran):
                coef[config] = scipy.linalg.lstsq(design[ran, config], us[ran, config])[0]
                orthogonal = scipy.linalg.orth(design[ran, config])
                leverage = np.minimum((orthogonal**2).sum(axis=1), 1.0 - 1e-6)
                residual = design[ran, config] @ coef[config] - us[ran, config]
                errors[ran, config] = residual / (1.0 - leverage) / us[ran, config]
        if np.isnan(coef).all():
            raise FitError("no config ran on any of the workloads to fit; profile them again.")
        return cls(geometry, span_of(us, counts), *ratio_errors(us, errors, counts.sum(axis=1)), coef)


@attrs.frozen(eq=False)
class Local(CostModel):
    """The default: a non-negative trend in waves, CTAs, active experts and slots, with a local correction.

    Attributes:
        coef: int64 [C, 5] in `COEF_UNIT`: start, per wave, per CTA, per active expert, per slot; all zero where a
            config could not be fitted.
        weights: int64 [C, S] in `WEIGHT_UNIT`, one for each support point.
        support: int64 [S, 2 + B], slots, active experts and blocks at each distinct `block_m`, ascending.
        block_ms: int64 [B], those of `support`.
    """

    name: ClassVar[str] = "default"
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
        margins = tuple((slots, self._margin(slots)) for slots, _ in self.local_error) or ((0, self._margin(0)),)
        object.__setattr__(self, "_fast", tables)
        object.__setattr__(self, "_packed", native.pack(tables, self.span, margins))
        object.__setattr__(self, "_least", int(min(self.support[:, 1], default=0)))

    def choose(self, counts: IntArray, fallback: int, choosing_us: float = 0.0, outside: int | None = None) -> int:
        """As `CostModel.choose`, in C where `rampwrap.native` can."""
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
        """`choose` straight from expert ids, where `rampwrap.native` can; None: count them and `choose`."""
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

    @classmethod
    def fit(cls, timings: Timings, rows: IntArray) -> Self:
        """Fits the trend and its correction, and chooses CTAs per SM, by held-out error on `rows` alone."""
        us, counts, tokens = distinct(timings.us[rows], timings.counts[rows], timings.num_tokens[rows])
        geometry = Geometry.of(timings.grids, timings.device.num_sms)
        block_ms = np.unique(geometry.block_m)
        slots, active, heights = pass_over(counts, block_ms)
        support = np.concatenate([slots[:, None], active[:, None], heights], axis=1).astype(np.int64)
        fitted = fit_local(us, support, block_ms, geometry, [grid.ctas_per_sm for grid in timings.grids], tokens)
        return cls(
            attrs.evolve(geometry, resident=fitted.resident),
            span_of(us, counts),
            *ratio_errors(us, fitted.errors, support[:, 0]),
            np.rint(fitted.coef / COEF_UNIT).astype(np.int64),
            np.rint(fitted.weights / WEIGHT_UNIT).astype(np.int64),
            support[fitted.support],
            block_ms,
        )


MODELS: dict[str, type[CostModel]] = {"default": Local, "ramp4": Ramp4}
"Every model that `fit` knows, by name."


def fit(timings: Timings, model: str = "default", rows: IntArray | None = None) -> CostModel:
    """Fits a model to measured times.

    Args:
        timings: the table; NaN cells are left out.
        model: a key of `MODELS`.
        rows: workloads to fit on; None takes all, whatever their split.

    Raises:
        FitError: an unknown model, or too few workloads or cells for it.
    """
    if model not in MODELS:
        raise FitError(f"there is no model {model!r}; choose one of {', '.join(sorted(MODELS))}.")
    chosen = np.arange(len(timings.us)) if rows is None else np.asarray(rows, dtype=np.int64)
    if not len(chosen):
        raise FitError("rows is empty, so there is nothing to fit; give workloads or leave it out.")
    return MODELS[model].fit(timings, chosen)


def _ints(values: npt.ArrayLike) -> IntArray:
    return np.asarray(values, dtype=np.int64)
