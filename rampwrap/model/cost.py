"""Cost models: microseconds of every config for any histogram, from coefficients fitted to `Timings`.

``wave``, for each config c with M blocks g = sum_e ceil(c_e / block_m) and CTAs n = g * ctas_per_block:

    trend = a + b * waves + p * n + q * active + r * slots            all coefficients >= 0
    waves = sum over launches of ceil(g * ctas / (num_sms * resident))   resident in 1..8, by held-out error
    us    = trend * (1 + sum_s weight[c, s] / (1 + |log2 slots - s| / 4 + |log2 active - s| / 2
                     + |log2 g - s| / 2 + |log2 waves - s| / 2 + |unused waves - s| / 8))

where s runs over the profiled workloads and log2 is `features.float_log2`. Every coefficient is an integer times a
power of two and every feature an integer or a multiple of 2**-20, so all sums are exact in float64: their order,
and whether a compiler fuses multiply and add, cannot change a bit. What rounds is two divisions and one product.

``ramp4`` is the published form (arXiv 2604.26039), untouched: ``a + b*waves + c*g + d*log(g+1)``, least squares.
"""

from typing import Any

from rampwrap.errors import FitError
from rampwrap.model.base import CostModel
from rampwrap.model.ramp4 import Ramp4
from rampwrap.model.wave import Wave

MODELS: dict[str, type[CostModel]] = {"wave": Wave, "ramp4": Ramp4}
"Every model that `fit` knows, by name."
OLD_NAMES = {"default": "wave"}
"What files and commands of earlier versions call a model."


def model_class(name: Any, remedy: str) -> type[CostModel]:
    """The model of a name, also of one that earlier versions gave it.

    Args:
        name: what stands in a file or was asked for.
        remedy: what the error says to do with a name of `MODELS`.

    Raises:
        FitError: it is no model's.
    """
    current = OLD_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(current, str) or current not in MODELS:
        raise FitError(f"there is no model {current!r:.60}; {remedy} one of {', '.join(sorted(MODELS))}.")
    return MODELS[current]
