"""`Placement`: which experts of a layer are on a rank, and under which ids it holds them."""

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.shape import MoEShape


@attrs.frozen(eq=False)
class Placement:
    """The experts of one rank.

    Attributes:
        num_experts: over all ranks.
        experts: int64 [num_local_experts], the expert whose weights stand at each local id.
    """

    num_experts: int
    experts: IntArray

    @classmethod
    def first(cls, shape: MoEShape) -> "Placement":
        """The first `num_local_experts` of a layer, as a rank is profiled with; all where it is alone."""
        return cls(shape.num_experts, np.arange(shape.num_local_experts))

    @classmethod
    def of_map(cls, expert_map: npt.ArrayLike, num_experts: int) -> "Placement":
        """What engines hand to their kernels.

        Args:
            expert_map: integers [num_experts], local id of each expert or -1 for an expert of another rank.
            num_experts: over all ranks.

        Raises:
            InputError: it has another length, or does not give each local expert once.
        """
        local = np.asarray(expert_map)
        if local.shape != (num_experts,):
            raise InputError(
                f"expert_map has shape {local.shape}; give one local id for each of {num_experts} experts."
            )
        (here,) = np.nonzero(local >= 0)
        ids = local[here]
        if local.dtype.kind not in "iu" or (np.bincount(ids, minlength=ids.size) != 1).any():
            raise InputError(
                f"expert_map gives its {ids.size} local experts the ids {sorted(ids.tolist())[:8]}...; give integers, each "
                f"from 0 to {ids.size - 1} once and -1 for experts of other ranks."
            )
        experts = np.empty_like(here)
        experts[ids] = here
        return cls(num_experts, experts)

    @property
    def expert_map(self) -> npt.NDArray[np.int32]:
        """int32 [num_experts], local id of each expert, -1 for an expert of another rank."""
        local = np.full(self.num_experts, -1, dtype=np.int32)
        local[self.experts] = np.arange(len(self.experts))
        return local

    def counts(self, expert_counts: IntArray) -> IntArray:
        """int64 [..., num_experts] of all ranks -> [..., num_local_experts] of this one."""
        here: IntArray = expert_counts[..., self.experts]
        return here
