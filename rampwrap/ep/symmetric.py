"""`Symmetric`: rows moved by our kernels through memory that the GPUs of one host share; a step of any size is three launches.

All memory is made by `open`. Afterwards nothing waits for the host, so that steps can be captured in CUDA graphs; a graph
holds the counts of tokens that it was captured with, and every rank must replay its own of the same step.
"""

import torch
import torch.distributed as dist

from rampwrap.ep.board import Board
from rampwrap.ep.bulk import Bulk
from rampwrap.ep.layout import Layout
from rampwrap.ep.owners import Owners
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received
from rampwrap.ep.sent import Sent
from rampwrap.ep.shared import Shared, between_steps, settle
from rampwrap.kernels.ep import host
from rampwrap.kernels.ep.host import Mapped
from rampwrap.kernels.triton.align.host import alignment_ints, blocks_in

MOST_BLOCK_M = 128
"Of the M blocks that memory is kept for."
RECEIVED = ("rows", "scales", "topk_ids", "topk_weights")
"Regions that hold a row for each token of all ranks."


def own_ints(layout: Layout, num_local_experts: int) -> int:
    """int32 values that a rank keeps for itself: M blocks."""
    rows = layout.num_ranks * layout.max_tokens_per_rank
    return alignment_ints(rows, layout.shape.top_k, num_local_experts, MOST_BLOCK_M)


class Symmetric:
    """Moves rows of one layout among the GPUs of one host.

    Args:
        mapped: the memory of all ranks, as kernels see it.
        owners: of the experts.
        layout: of the shared memory.
        memory: int32 [`own_ints`], this rank's own.
        kept: what must live as long as the mapping does.
    """

    def __init__(
        self, mapped: Mapped, owners: Owners, layout: Layout, memory: torch.Tensor, kept: Shared | None = None
    ) -> None:
        self._mapped, self._owners, self._layout, self._kept = mapped, owners, layout, kept
        self._memory = memory
        self._ids: torch.Tensor | None = None

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, layout: Layout, owners: Owners, device: torch.device, board: Board
    ) -> "Symmetric":
        """Allocates, maps the memory of all ranks and zeroes what must be zero; all ranks call it together.

        Raises:
            GroupError: a rank found no memory or no way to its peers; every rank raises it.
        """
        shared = Shared.mapped(group, layout.bytes, device, board)
        own = torch.zeros(own_ints(layout, owners.num_local_experts), dtype=torch.int32, device=device)
        mapped = shared.seen(layout.regions, owners.rank, board.timeout_s, owners)
        return cls(mapped, owners, layout, own, shared)

    def bulk(self) -> Bulk:
        """What moves the rows of steps source by source, through the same memory."""
        assert self._kept is not None
        peers = [self._kept.of(rank) for rank in range(self._owners.num_ranks)]
        return Bulk(self._mapped, self._owners, self._layout, peers)

    def dispatch(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path, block_m: int | None) -> Received:
        """One launch, and those of the blocks where they are asked for."""
        rows = sum(tokens_per_rank)
        views = {name: its[:rows] for name, its in self._mapped.views.items() if name in RECEIVED}
        self._ids = sent.topk_ids.contiguous()
        host.dispatch(
            self._mapped,
            sent.hidden_states.contiguous(),
            self._ids,
            sent.topk_weights.contiguous(),
            tokens_per_rank,
            masked=path.masked,
            scales=None if sent.scales is None else sent.scales.contiguous(),
        )
        memory = None
        if block_m is not None:
            local, top_k = self._owners.num_local_experts, self._layout.shape.top_k
            memory = blocks_in(self._memory, rows, top_k, local, block_m)
        ids, weights = views["topk_ids"], views["topk_weights"]
        received = Received(views["rows"], views.get("scales"), ids, weights, tokens_per_rank, self._owners, path)
        return received.aligned(block_m, memory)

    def combine(self, expert_output: torch.Tensor, received: Received, out: torch.Tensor | None) -> torch.Tensor:
        """Two launches."""
        assert self._ids is not None
        if out is None:
            size = (self._ids.shape[0], self._layout.shape.hidden_size)
            out = torch.empty(size, dtype=self._layout.hidden_dtype, device=self._ids.device)
        pushed = host.apart(expert_output, out, received.rows)
        host.push(self._mapped, pushed, received.tokens_per_rank)
        host.add(self._mapped, out, self._ids, received.tokens_per_rank)
        self._ids = None
        return out

    def fault(self) -> str | None:
        """What the GPU gave up waiting for, in a sentence: read without waiting for it."""
        return host.said_by(int(self._mapped.fault), self._mapped.timeout_s)

    def reset(self, board: Board) -> None:
        """Back to the first epoch on every rank."""
        between_steps(board, self._mapped.bases.device, self._mapped.begin)

    def close(self) -> None:
        """Lets go of the memory; what was launched has ended."""
        settle(self._mapped.bases.device)
        self._kept = None
