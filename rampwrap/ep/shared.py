"""`Shared`: memory of one rank that all ranks of a host map and write into."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist

from rampwrap.ep.board import Board
from rampwrap.ep.layout import Region, views_of
from rampwrap.ep.owners import Owners
from rampwrap.errors import GroupError
from rampwrap.kernels.ep.host import Mapped


@attrs.frozen(eq=False)
class Shared:
    """It is mapped for as long as this lives.

    Attributes:
        memory: uint8, this rank's own, zero.
        bases: where each rank's memory begins, in this rank's addresses.
        handle: of torch's symmetric memory.
    """

    memory: torch.Tensor
    bases: Sequence[int]
    handle: Any

    @classmethod
    def mapped(cls, group: dist.ProcessGroup, num_bytes: int, device: torch.device, board: Board) -> "Shared":
        """Allocates on every rank and maps; all ranks call it together, and none returns before all memory is zero.

        Raises:
            GroupError: a rank found no memory or no way to its peers; every rank raises it.
        """
        import torch.distributed._symmetric_memory as symmetric_memory

        rank = dist.get_rank(group)
        memory: torch.Tensor | None = None
        reason = None
        try:
            memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            reason = f"{num_bytes} bytes of shared memory were refused ({str(error).splitlines()[0][:100]})"
        _all_or_none(board, "allocated", reason)
        assert memory is not None
        try:
            handle = symmetric_memory.rendezvous(memory, group.group_name)
            # Pointers are of allocations, and a pool may put a tensor anywhere in one.
            inside = memory.data_ptr() - handle.buffer_ptrs[rank]
        except RuntimeError as error:
            reason, inside = f"its memory was not mapped ({str(error).splitlines()[0][:100]})", -1
        where = [its for its, _ in _all_or_none(board, "mapped", reason, inside)]
        bases = [pointer + its for pointer, its in zip(handle.buffer_ptrs, where, strict=True)]
        # Stale rows are never read, but some kernels multiply what they mask.
        memory.zero_()
        torch.cuda.synchronize(device)
        board.exchange("zeroed", None)
        return cls(memory, bases, handle)

    def seen(self, regions: Iterable[Region], rank: int, timeout_s: float, owners: Owners | None = None) -> Mapped:
        """As kernels see it, ready for the first step; without owners rows go to every rank."""
        device, regions = self.memory.device, tuple(regions)
        found = Mapped(
            rank=rank,
            num_ranks=len(self.bases),
            bases=torch.tensor(self.bases, dtype=torch.int64, device=device),
            views=views_of(regions, self.memory),
            offsets={its.name: its.offset for its in regions},
            fault=torch.zeros(1, dtype=torch.int64, pin_memory=True),
            rank_of_expert=None if owners is None else owners.rank_of_expert,
            expert_map=None if owners is None else owners.expert_map,
            timeout_s=timeout_s,
        )
        found.begin()
        settle(device)
        return found

    def of(self, rank: int) -> torch.Tensor:
        """uint8, the whole memory of a rank, as a tensor of this one's GPU."""
        start = self.handle.get_buffer(rank, (1,), torch.uint8).data_ptr()
        whole: torch.Tensor = self.handle.get_buffer(
            rank, (self.memory.numel(),), torch.uint8, self.bases[rank] - start
        )
        return whole


def settle(device: torch.device) -> None:
    """Waits until nothing runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def between_steps(board: Board, device: torch.device, call: Callable[[], None]) -> None:
    """Does something on every rank when nothing runs on any; nothing begins before all have done it. All ranks call it together."""
    settle(device)
    board.exchange("settled", None)
    call()
    settle(device)
    board.exchange("begun anew", None)


def _all_or_none(board: Board, phase: str, reason: str | None, more: int = 0) -> list[tuple[int, str | None]]:
    said = [tuple(its) for its in board.exchange(phase, [more, reason])]
    for rank, (_, why) in enumerate(said):
        if why is not None:
            raise GroupError(
                f"rank {rank} cannot share memory: {why}; free some memory or use the backend 'collectives'."
            )
    return said
