"""The candidates of a bucket as a GPU reads them, to choose like `CostModel.choose`; no array is larger than 8 KB."""

from rampwrap.errors import PlanError
from rampwrap.model.base import CostModel
from rampwrap.model.packed import Packed
from rampwrap.model.wave import Wave

MAX_IN_GRAPH = 4
"Candidates of a bucket."
TALLY = 16
"""float64 sums over the launches of a layer, as the selecting kernel adds them up: how often each place was chosen [4],
predicted microseconds of the static config and of the choice, experts with tokens, sum_e (c_e / slots)^2, and launches
that were outside everything profiled; the rest is padding."""


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
    if not 1 <= model.num_configs <= MAX_IN_GRAPH:
        raise PlanError(f"{model.num_configs} candidates cannot be packed; give a bucket of 1 to {MAX_IN_GRAPH}.")
    if model.geometry.block_m.min() < 2:
        raise PlanError("a candidate has block_m=1; 2 or more can be packed.")
    # Powers of two, so that they are few kernels that are compiled; a point for each margin at least.
    margins = 1 << max(5, (max(len(model.local_error), margin_steps or 1) - 1).bit_length())
    points = max(margins, 1 << (len(model.support) - 1).bit_length())
    return model.packed(choosing_us=choosing_us, alone=True, least_points=points, least_margins=margins)
