"""The published four-parameter model (arXiv 2604.26039), untouched."""

from typing import ClassVar, Self

import attrs
import numpy as np

from rampwrap.errors import FitError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.model.base import CostModel, _ints
from rampwrap.model.features import Geometry, pass_over, shaped


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
    def design(geometry: Geometry, counts: IntArray) -> FloatArray:
        """What `coef` is multiplied with: float64 [..., C, 4] for histograms int [..., E]."""
        distinct, where = np.unique(geometry.block_m, return_inverse=True)
        blocks = pass_over(counts, distinct)[2][..., where]
        waves = np.ceil(blocks * geometry.ctas_per_block / geometry.num_sms)
        return np.stack([np.ones_like(blocks), waves, blocks, np.log(blocks + 1.0)], axis=-1)

    def _row(self, counts: IntArray) -> FloatArray:
        us = (self.design(self.geometry, counts) * self.coef).sum(axis=-1)
        out: FloatArray = np.where(np.isnan(us), np.inf, us)
        return out

    def _margin(self, slots: int) -> float:
        """Zero: the published form has no guard."""
        return 0.0

    def take(self, configs: tuple[int, ...] | IntArray) -> Self:
        """The same model for some of the configs, in this order."""
        index = _ints(configs)
        return attrs.evolve(self, geometry=self.geometry.take(index), span=self.span[index], coef=self.coef[index])
