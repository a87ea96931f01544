"""`Lagged`: histograms of earlier steps for mode ``lagged`` of a `GraphDispatcher`."""

from typing import Any

import torch

from rampwrap.kernel.grid import IntArray
from rampwrap.kernels.common.operands import local_ids


class Lagged:
    """The last histogram of a batch size that has reached the host, without the host ever waiting for it."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._counts: IntArray | None = None
        self._host: torch.Tensor | None = None
        self._done: Any = None

    def read(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> None:
        """Starts the copy of a histogram; left out while one is still under way."""
        if self._done is not None:
            return
        ids = local_ids(topk_ids.reshape(-1), expert_map)
        inside = (ids >= 0) & (ids < self._num_experts)
        bins = torch.zeros(self._num_experts + 1, dtype=torch.int64, device=topk_ids.device)
        bins.scatter_add_(0, torch.where(inside, ids, self._num_experts), torch.ones_like(ids))
        if not topk_ids.is_cuda:
            self._counts = bins[: self._num_experts].numpy()
            return
        if self._host is None:
            self._host = torch.empty(self._num_experts + 1, dtype=torch.int64, pin_memory=True)
        self._host.copy_(bins, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def latest(self) -> IntArray | None:
        """int64 [num_local_experts]; None before the first has arrived."""
        if self._done is not None and self._done.query():
            assert self._host is not None
            self._counts, self._done = self._host[: self._num_experts].numpy().copy(), None
        return self._counts
