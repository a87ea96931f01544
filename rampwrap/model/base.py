"""What every cost model has: a geometry, an error, and a guarded choice."""

import abc
import bisect
import math
from functools import cached_property
from typing import Any, ClassVar, Self

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import FitError, InputError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.model.features import Geometry, shaped
from rampwrap.schema import LARGEST, between

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
    def profiled(self) -> tuple[int, int, int]:
        """Least and most slots that any config was fitted on, and the active experts below which nothing is known."""
        return int(self.span[:, 0].min()), int(self.span[:, 1].max()), self._least_active

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
        """`choose` straight from expert ids, where `rampwrap.model.compiled` can; None: count them and `choose`."""
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


def _ints(values: npt.ArrayLike) -> IntArray:
    return np.asarray(values, dtype=np.int64)
