"""`Collectives`: rows moved by torch.distributed (gloo, NCCL), on any device and over any number of hosts.

With counts that the host knows and every row sent to every rank nothing waits for the host, so that NCCL's launches can be
captured. Masked, the lengths of messages follow from the routing, and the host reads it.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rampwrap.ep.board import Board
from rampwrap.ep.layout import Layout, placed, views_of
from rampwrap.ep.mover import Piece, in_order_of_arrival
from rampwrap.ep.owners import Owners
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received, sum_in_order
from rampwrap.ep.sent import Sent
from rampwrap.errors import GroupError

# Torch 2.13 calls it by another name, and warns of this one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Collectives:
    """Moves rows of one layout among the ranks of a group.

    Args:
        group: of torch.distributed.
        layout: what is moved.
        owners: of the experts.
        device: of the memory, allocated here.
        timeout_s: after which gloo gives up; NCCL has a watchdog of its own.
    """

    def __init__(
        self, group: dist.ProcessGroup, layout: Layout, owners: Owners, device: torch.device, timeout_s: float
    ) -> None:
        self._group, self._owners, self._layout = group, owners, layout
        regions = placed(layout.tensors)
        self._regions = views_of(regions, torch.zeros(regions[-1].end, dtype=torch.uint8, device=device))
        self._timeout = None if dist.get_backend(group) == "nccl" else timedelta(seconds=timeout_s)
        self._wanted: torch.Tensor | None = None
        self._whole: tuple[Received, torch.Tensor] | None = None  # of a step by source: the rows, and this rank's sums

    def dispatch(self, brought: Sent, tokens_per_rank: tuple[int, ...], path: Path, block_m: int | None) -> Received:
        """Sends this rank's rows and returns those of all, with the blocks that are asked for."""
        sent = brought.regions(self._layout)
        here = {name: self._regions[name][: sum(tokens_per_rank)] for name in sent}
        self._wanted = self._owners.ranks_of(sent["topk_ids"])
        for name in ("topk_ids", "topk_weights", "rows", "scales"):  # in this order on every rank
            if name not in sent:
                continue
            if path.masked and name in ("rows", "scales"):
                self._scatter(here[name], sent[name], here["topk_ids"], tokens_per_rank)
            else:
                self._gather(here[name], sent[name], tokens_per_rank, "dispatch")
        return Received(
            here["rows"],
            here.get("scales"),
            here["topk_ids"],
            here["topk_weights"],
            tokens_per_rank,
            self._owners,
            path,
        ).aligned(block_m)

    def combine(self, expert_output: torch.Tensor, received: Received, out: torch.Tensor | None) -> torch.Tensor:
        """Sends every source its sums and adds those of this rank's own tokens."""
        partial = received.partial(expert_output, self._layout.partial_dtype)
        wanted, counts = self._wanted, received.tokens_per_rank
        assert wanted is not None
        mine = counts[self._owners.rank]
        parts = self._regions["partials"][:, :mine]
        if received.path.masked:
            arriving = wanted.sum(0).tolist()
            rows = received.owners.ranks_of(received.topk_ids)[:, self._owners.rank]
            leaving = [int(its.sum()) for its in torch.split(rows, list(counts))]
            packed = partial.new_empty(sum(arriving), partial.shape[1])
            self._all_to_all(packed, partial[rows], arriving, leaving, "combine")
            for rank, its in enumerate(torch.split(packed, arriving)):
                parts[rank][wanted[:, rank]] = its
        else:
            ranks = self._owners.num_ranks
            packed = partial.new_empty(ranks * mine, partial.shape[1])
            self._all_to_all(packed, partial, [mine] * ranks, list(counts), "combine")
            parts.copy_(packed.view(parts.shape))
        total = sum_in_order(parts, wanted)
        return total.to(self._layout.hidden_dtype) if out is None else out.copy_(total)

    def pieces(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path) -> Iterator[Piece]:
        """As `Bulk` has it, and for its order only: all rows are here before the first piece, and none leaves before the last."""
        received = self.dispatch(sent, tokens_per_rank, path, None)
        sums = received.rows.new_empty(received.rows.shape, dtype=self._layout.partial_dtype)
        self._whole = received, sums
        for source in in_order_of_arrival(self._owners.rank, self._owners.num_ranks):
            yield Piece((source,), received.of(source), sums[slice(*received.first[source : source + 2])])

    def send_home(self, piece: Piece, expert_output: torch.Tensor) -> None:
        """Keeps the sums of a source."""
        piece.settle(expert_output)

    def summed(self, out: torch.Tensor | None) -> torch.Tensor:
        """The end of a step by source."""
        assert self._whole is not None
        received, sums = self._whole
        self._whole = None
        return self.combine(sums, received, out)

    def _gather(self, out: torch.Tensor, own: torch.Tensor, counts: Sequence[int], phase: str) -> None:
        """Every row to every rank."""
        ranks = self._owners.num_ranks
        if len(set(counts)) == 1:
            if counts[0]:
                work = _all_gather(_bytes(out), _bytes(own), group=self._group, async_op=True)
                self._wait(work, phase)
        else:
            copies = own.expand(ranks, *own.shape).reshape(-1, own.shape[1])
            self._all_to_all(out, copies, list(counts), [len(own)] * ranks, phase)

    def _scatter(self, out: torch.Tensor, own: torch.Tensor, all_ids: torch.Tensor, counts: Sequence[int]) -> None:
        """Rows to the ranks that want them, which know by the ids which these are."""
        assert self._wanted is not None
        leaving = self._wanted.sum(0).tolist()
        packed = torch.cat([_bytes(own)[its] for its in self._wanted.T])  # not every device indexes e4m3
        rows = self._owners.ranks_of(all_ids)[:, self._owners.rank]
        arriving = [int(its.sum()) for its in torch.split(rows, list(counts))]
        arrived = packed.new_empty(sum(arriving), packed.shape[1])
        self._all_to_all(arrived, packed, arriving, leaving, "dispatch")
        _bytes(out)[rows] = arrived

    def _all_to_all(
        self, out: torch.Tensor, own: torch.Tensor, arriving: list[int], leaving: list[int], phase: str
    ) -> None:
        work = dist.all_to_all_single(
            _bytes(out), _bytes(own.contiguous()), arriving, leaving, group=self._group, async_op=True
        )
        self._wait(work, phase)

    def _wait(self, work: dist.Work, phase: str) -> None:
        try:
            if self._timeout is None:
                work.wait()
            else:
                work.wait(self._timeout)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise GroupError(
                f"rank {self._owners.rank} lost a peer in {phase} ({first[:120]}); see which rank ended, and make the group anew."
            ) from None

    def fault(self) -> None:
        """None: what goes wrong is raised at once."""

    def reset(self, board: Board) -> None:
        """Nothing: no state outlives a step."""

    def close(self) -> None:
        """Lets go of the memory."""
        self._regions = {}


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 [rows, bytes]: not every transport knows e4m3, and none needs to."""
    return x.view(torch.uint8)
