"""`Bulk`: steps of many tokens source by source, so that rows travel while the layer runs.

A rank's rows lie together at every receiver, so copy engines, which take no SM, send them to one peer after the other, the next
rank's first: at any time each rank sends to another one. A flag follows each peer's rows. The layer runs on this rank's own
tokens meanwhile, then on those of each source once its flag is there; the sums of a source go home while the layer runs on the next.
They are told to all ranks at once, when no row is read any more: a rank that heard sooner could go on to a step whose rows lie
where those of a third are still being read. The flags are those of `Symmetric`, so steps of both kinds may follow each other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rampwrap.ep.layout import Layout
from rampwrap.ep.mover import Piece, in_order_of_arrival
from rampwrap.ep.owners import Owners
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received, prefix
from rampwrap.ep.sent import Sent, narrow
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.ep import host
from rampwrap.kernels.ep.flags import COMBINE, DISPATCH
from rampwrap.kernels.ep.host import Mapped
from rampwrap.kernels.triton.quantise import quantise_rows

FIELDS = ("topk_ids", "topk_weights", "scales", "rows")
"Of a token, as they travel; scales only in FP8."


class Side:
    """A stream beside the current one, before others in the queue for SMs; on a CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        made: Any = torch.cuda.Stream
        self._stream = made(device, priority=-1) if device.type == "cuda" else None

    def after_current(self) -> "contextlib.AbstractContextManager[Any]":
        """What is launched within goes there, after all that was launched here so far."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What is launched next comes after all that was launched there."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class Bulk:
    """Moves rows of one layout among the GPUs of one host.

    Args:
        mapped: the memory of all ranks, as kernels see it.
        owners: of the experts.
        layout: of the shared memory.
        peers: uint8, the memory of each rank, as this one maps it.
    """

    def __init__(self, mapped: Mapped, owners: Owners, layout: Layout, peers: Sequence[torch.Tensor]) -> None:
        self._mapped, self._owners, self._layout, self._peers = mapped, owners, layout, list(peers)
        self._side = Side(mapped.bases.device)
        self._kept: list[Any] = []  # what the side stream still reads

    def pieces(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path) -> Iterator[Piece]:
        """The tokens of each source as they arrive, this rank's own first, while the others travel."""
        rank, ranks = self._owners.rank, self._owners.num_ranks
        self._counts, self._ids = tokens_per_rank, sent.topk_ids.contiguous()
        rows = self._own(sent, tokens_per_rank)
        self._kept = [rows]
        with self._side.after_current():
            self._send(rows, tokens_per_rank)
        for source in in_order_of_arrival(rank, ranks):
            count = tokens_per_rank[source]
            if source == rank:
                room = self._mapped.views["partials"][rank, :count]
            else:
                host.wait(self._mapped, source, DISPATCH, count)
                size, dtype = (count, self._layout.shape.hidden_size), self._layout.partial_dtype
                room = torch.empty(size, dtype=dtype, device=rows.device)
                self._kept.append(room)
            here = self._views(source, tokens_per_rank)
            its = rows if source == rank else here["rows"]
            received = Received(
                its, here.get("scales"), here["topk_ids"], here["topk_weights"], (count,), self._owners, path
            )
            yield Piece(source, received, room)

    def send_home(self, piece: Piece, expert_output: torch.Tensor) -> None:
        """The sums of a source, on their way as soon as they are there."""
        partial = piece.settle(expert_output)
        if piece.source != self._owners.rank:
            with self._side.after_current():
                self._copy(partial, piece.source, self._at("partials", self._owners.rank))

    def summed(self, out: torch.Tensor | None) -> torch.Tensor:
        """The end of a step: all ranks hear of their sums, and this one adds its own."""
        self._side.join()
        self._kept.clear()
        host.tell(self._mapped, COMBINE, self._counts[self._owners.rank])
        if out is None:
            size = (len(self._ids), self._layout.shape.hidden_size)
            out = torch.empty(size, dtype=self._layout.hidden_dtype, device=self._ids.device)
        host.add(self._mapped, out, self._ids, self._counts, by_source=True)
        return out

    def _views(self, source: int, tokens_per_rank: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """What lies here of the tokens of a source, by name."""
        first, after = prefix(tokens_per_rank)[source : source + 2]
        views = self._mapped.views
        return {name: views[name][first:after] for name in FIELDS if name in views}

    def _own(self, sent: Sent, tokens_per_rank: tuple[int, ...]) -> torch.Tensor:
        """Ids, weights and scales of this rank in its own memory, from where they go to the others; its rows, as they travel."""
        here = self._views(self._owners.rank, tokens_per_rank)
        here["topk_ids"].copy_(narrow(self._ids))
        here["topk_weights"].copy_(sent.topk_weights)
        hidden = sent.hidden_states.contiguous()
        if sent.scales is not None:
            here["scales"].copy_(sent.scales)
        elif self._layout.payload_dtype == FP8:
            if len(hidden):
                quantise_rows(hidden, here["rows"], here["scales"])
            return here["rows"]
        return hidden

    def _send(self, rows: torch.Tensor, tokens_per_rank: tuple[int, ...]) -> None:
        """What `_own` prepared, to one peer after the other, each with its flag."""
        rank, ranks = self._owners.rank, self._owners.num_ranks
        first, fields = prefix(tokens_per_rank)[rank], self._views(rank, tokens_per_rank) | {"rows": rows}
        for step in range(1, ranks):
            peer = (rank + step) % ranks
            for name, its in fields.items():
                self._copy(its, peer, self._at(name, first))
            host.tell(self._mapped, DISPATCH, tokens_per_rank[rank], peer)

    def _copy(self, data: torch.Tensor, peer: int, at: int) -> None:
        """Contiguous data to a byte of a rank's memory, by a copy engine."""
        if data.numel():
            run = data.view(-1).view(torch.uint8)
            self._peers[peer][at : at + len(run)].copy_(run)

    def _at(self, name: str, place: int) -> int:
        """The byte at which a row of a region begins, or the sums of a rank."""
        its = self._mapped.views[name]
        return self._mapped.offsets[name] + place * its.stride(0) * its.element_size()

    def close(self) -> None:
        """Lets go of the memory; what was launched has ended."""
        self._peers.clear()
        self._kept.clear()
