"""`Owners`: which rank owns each expert, and which ranks a row must reach."""

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from rampwrap.errors import InputError
from rampwrap.kernel.placement import Placement
from rampwrap.kernels.common.operands import local_ids


def contiguous(num_experts: int, num_ranks: int, rank: int) -> Placement:
    """The experts of one rank where each has an equal run of them.

    Raises:
        InputError: they cannot be divided equally.
    """
    if num_experts % num_ranks:
        raise InputError(
            f"{num_experts} experts cannot be divided equally among {num_ranks} ranks; give each rank its placement."
        )
    local = num_experts // num_ranks
    return Placement(num_experts, np.arange(rank * local, (rank + 1) * local))


@attrs.frozen(eq=False)
class Owners:
    """Of every expert one rank. An expert with copies has an id for each copy, as engines number them.

    Attributes:
        num_ranks: of the group.
        rank: this one.
        rank_of_expert: int32 [num_experts].
        expert_map: int32 [num_experts], local id on this rank, -1 elsewhere.
        num_local_experts: of this rank.
    """

    num_ranks: int
    rank: int
    rank_of_expert: torch.Tensor
    expert_map: torch.Tensor
    num_local_experts: int

    @classmethod
    def of(cls, placements: Sequence[Placement], rank: int, device: torch.device | str) -> "Owners":
        """From the experts of each rank.

        Raises:
            InputError: an expert is on two ranks, or on none.
        """
        num_experts = placements[rank].num_experts
        owner = [-1] * num_experts
        for its, placement in enumerate(placements):
            for expert in placement.experts.tolist():
                if owner[expert] >= 0:
                    raise InputError(
                        f"expert {expert} is on ranks {owner[expert]} and {its}; give a copy an id of its own."
                    )
                owner[expert] = its
        if -1 in owner:
            raise InputError(f"expert {owner.index(-1)} is on no rank; place every expert.")
        mine = placements[rank]
        return cls(
            len(placements),
            rank,
            torch.tensor(owner, dtype=torch.int32, device=device),
            torch.from_numpy(mine.expert_map).to(device),
            len(mine.experts),
        )

    def ranks_of(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """bool [num_tokens, num_ranks]: whether a rank owns one of the row's experts; ids out of range want none."""
        owner = local_ids(topk_ids, self.rank_of_expert)
        every = torch.arange(self.num_ranks, device=topk_ids.device)
        return (owner[:, :, None] == every).any(1)

    def is_local(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """bool [num_tokens, top_k]: whether the slot's expert is on this rank."""
        return local_ids(topk_ids, self.expert_map) >= 0

    def counts(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """int32 [num_local_experts], slots of each local expert; nothing waits for the host."""
        local = local_ids(topk_ids, self.expert_map).flatten()
        counts = torch.zeros(self.num_local_experts + 1, dtype=torch.int32, device=topk_ids.device)
        counts.scatter_add_(0, torch.where(local >= 0, local, self.num_local_experts), torch.ones_like(local).int())
        return counts[:-1]
