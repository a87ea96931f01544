"""Memory of all ranks for kernels that take a pointer for each: torch's symmetric memory, part by part. Part of `ep_rivals.py`."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

ALIGNED = 256
"Bytes at whose multiples parts begin."


class Mapped:
    """Zero at first; the same parts on every rank.

    Args:
        group: of the ranks; all make it together.
        sizes: bytes by name.
        device: of this rank.
    """

    def __init__(self, group: dist.ProcessGroup, sizes: Mapping[str, int], device: torch.device) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._at: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._at[name] = end
            end += -(-size // ALIGNED) * ALIGNED
        self._memory = symmetric_memory.empty(end, dtype=torch.uint8, device=device)
        self._kept: Any = symmetric_memory.rendezvous(self._memory, group.group_name)
        # Pointers are of allocations, and a pool may put a tensor anywhere in one.
        offsets: list[Any] = [None] * self.ranks
        dist.all_gather_object(offsets, self._memory.data_ptr() - self._kept.buffer_ptrs[self.rank], group=group)
        self._bases = [pointer + its for pointer, its in zip(self._kept.buffer_ptrs, offsets, strict=True)]
        self._memory.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)

    def view(self, name: str, dtype: torch.dtype, *shape: int, offset: int = 0) -> torch.Tensor:
        """Of a part of this rank's memory."""
        start = self._at[name] + offset
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        return self._memory[start : start + size].view(dtype).view(shape)

    def everywhere(self, name: str) -> list[int]:
        """Addresses of a part on each rank."""
        return [base + self._at[name] for base in self._bases]

    def here(self, name: str) -> int:
        """Address of a part on this rank."""
        return self.everywhere(name)[self.rank]
