"""`Arguments`: what the launches of a profile are called with."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timer import Timer
from rampwrap.routing.workloads import Workload

Inputs = Callable[..., dict[str, Any]]
"``inputs(shape, topk_ids, seed=0)``: keyword arguments for `Kernel.launch` on random data."

# More shifts than this would need more copies of the activations than is worth a cold L2.
MAX_ROTATIONS = 16


def turned(topk_ids: npt.NDArray[np.int32], shape: MoEShape, turn: int, turns: int) -> npt.NDArray[np.int32]:
    """Ids for one of several turns: shifted among the experts of this rank, the first; others stay, so no token changes ranks.

    Every turn has the same sorted histogram.
    """
    here = shape.num_local_experts
    moved = (topk_ids + turn * here // turns) % here
    return np.where((topk_ids >= 0) & (topk_ids < here), moved, topk_ids).astype(np.int32)


@attrs.frozen(eq=False)
class Arguments:
    """Makes keyword arguments of launches by the workload's number.

    Attributes:
        counts: int64 [workloads, num_local_experts].
        simulated: whether tensors stay on the CPU although there is a GPU.
    """

    inputs: Inputs
    shape: MoEShape
    workloads: Sequence[Workload]
    counts: IntArray
    timer: Timer
    simulated: bool
    seed: int

    def __call__(self, row: int) -> list[dict[str, Any]]:
        """Those of one launch, once for each shift of the expert ids that the timer asks for."""
        import torch

        shape = self.shape
        ids = self.workloads[row].topk_ids(shape.num_experts, shape.top_k)
        active = int(np.count_nonzero(self.counts[row]))
        turns = self.timer.rotations(shape.weight_bytes * active // shape.num_local_experts)
        turns = min(turns, MAX_ROTATIONS, shape.num_local_experts)
        where = "cpu" if self.simulated or not torch.cuda.is_available() else "cuda"
        variants = []
        for turn in range(turns):
            shifted = turned(ids, shape, turn, turns)
            variants.append(self.inputs(shape, torch.from_numpy(shifted).to(where), seed=self.seed))
        return variants
