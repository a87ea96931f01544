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

import numpy as np

from rampwrap.errors import FitError
from rampwrap.kernel.grid import IntArray
from rampwrap.measure.timings import Timings
from rampwrap.model.base import CostModel
from rampwrap.model.ramp4 import Ramp4
from rampwrap.model.wave import Local

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
