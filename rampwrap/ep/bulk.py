"""`Bulk`: steps of many tokens through shared memory, whole or source by source, so that rows travel while the layer runs.

A rank's rows lie together at every receiver, so all go to all ranks, by copy engines, which take no SM, or by few CTAs. They go to one
peer after the other, the next rank's first: at any time each rank sends to another one. A flag follows each peer's rows. Source by
source, the layer runs on this rank's own tokens meanwhile, then on those of each source once its flag is there; the sums of a
source go home while the layer runs on the next. The flags are those of `Symmetric`, so steps of both kinds may follow each other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rampwrap.ep.board import Board
from rampwrap.ep.layout import Layout
from rampwrap.ep.mover import Piece, in_order_of_arrival
from rampwrap.ep.owners import Owners
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received, prefix
from rampwrap.ep.sent import Sent, narrow
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.ep import copies, host
from rampwrap.kernels.ep.flags import COMBINE, DISPATCH
from rampwrap.kernels.ep.host import Mapped
from rampwrap.kernels.triton.quantise import quantise_rows


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
        max_ctas: of a copy; 0 leaves it to copy engines.
    """

    def __init__(
        self, mapped: Mapped, owners: Owners, layout: Layout, peers: Sequence[torch.Tensor], max_ctas: int
    ) -> None:
        self._mapped, self._owners, self._layout, self._peers = mapped, owners, layout, list(peers)
        self._max_ctas = max_ctas
        self._side = Side(mapped.bases.device)
        self._kept: list[Any] = []  # what the side stream still reads

    def dispatch(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path, block_m: int | None) -> Received:
        """On the current stream, but for the copy of this rank's own rows, beside it."""
        rows = self._own(sent, tokens_per_rank)
        first, after, ranks = *self._span(self._owners.rank, tokens_per_rank), self._owners.num_ranks
        here = self._mapped.views["rows"][first:after]
        apart = rows.data_ptr() != here.data_ptr()
        if apart:
            with self._side.after_current():
                here.copy_(rows)
        self._send(rows, tokens_per_rank)
        if apart:  # a graph that is captured may only wait for what is in it
            self._side.join()
        if ranks > 1:
            copies.wait(self._mapped, ranks - 1, (self._owners.rank + 1) % ranks, DISPATCH, tokens_per_rank)
        return self._view(0, sum(tokens_per_rank), tokens_per_rank, path).aligned(block_m)

    def combine(self, expert_output: torch.Tensor, received: Received, out: torch.Tensor | None) -> torch.Tensor:
        """On the current stream, but for this rank's own sums, beside it."""
        partial = received.partial(expert_output, self._layout.partial_dtype).contiguous()
        counts = received.tokens_per_rank
        own, *others = in_order_of_arrival(self._owners.rank, self._owners.num_ranks)
        with self._side.after_current():
            self._push(partial[slice(*self._span(own, counts))], own, counts)
        for source in reversed(others):
            self._push(partial[slice(*self._span(source, counts))], source, counts)
        self._side.join()
        return self._added(out, received.tokens_per_rank)

    def pieces(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path) -> Iterator[Piece]:
        """The tokens of each source as they arrive, this rank's own first, while the others travel."""
        rank = self._owners.rank
        rows = self._own(sent, tokens_per_rank)
        self._counts = tokens_per_rank
        self._kept.append(rows)
        with self._side.after_current():
            self._send(rows, tokens_per_rank)
        for source in in_order_of_arrival(rank, self._owners.num_ranks):
            count = tokens_per_rank[source]
            if source == rank:
                room = self._mapped.views["partials"][rank, :count]
            else:
                copies.wait(self._mapped, 1, source, DISPATCH, tokens_per_rank)
                size, dtype = (count, self._layout.shape.hidden_size), self._layout.partial_dtype
                room = torch.empty(size, dtype=dtype, device=rows.device)
                self._kept.append(room)
            first, after = self._span(source, tokens_per_rank)
            its = rows if source == rank else None
            yield Piece(source, self._view(first, after, (count,), path, its), room)

    def send_home(self, piece: Piece, expert_output: torch.Tensor) -> None:
        """The sums of a source, on their way as soon as they are there."""
        partial = piece.settle(expert_output)
        with self._side.after_current():
            self._push(partial, piece.source, self._counts)

    def summed(self, out: torch.Tensor | None) -> torch.Tensor:
        """The end of a step that went source by source."""
        self._side.join()
        self._kept.clear()
        return self._added(out, self._counts)

    def _span(self, source: int, tokens_per_rank: Sequence[int]) -> tuple[int, int]:
        """The first row of a source, and the one after its last."""
        sums = prefix(tuple(tokens_per_rank))
        return sums[source], sums[source + 1]

    def _view(
        self, first: int, after: int, counts: tuple[int, ...], path: Path, rows: torch.Tensor | None = None
    ) -> Received:
        here = {name: its[first:after] for name, its in self._mapped.views.items() if name not in ("header", "cells")}
        ids, weights = here["topk_ids"], here["topk_weights"]
        rows = here["rows"] if rows is None else rows
        return Received(rows, here.get("scales"), ids, weights, counts, self._owners, path)

    def _own(self, sent: Sent, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        """Ids, weights and scales of this rank in its own memory, from where they go to the others; its rows, as they travel."""
        first, after = self._span(self._owners.rank, tokens_per_rank)
        here = {name: its[first:after] for name, its in self._mapped.views.items() if name not in ("header", "cells")}
        ids = sent.topk_ids.contiguous()
        self._ids = ids
        here["topk_ids"].copy_(narrow(ids))
        here["topk_weights"].copy_(sent.topk_weights)
        hidden = sent.hidden_states.contiguous()
        if sent.scales is not None:
            here["scales"].copy_(sent.scales)
        elif self._layout.payload_dtype == FP8:
            if len(hidden):
                quantise_rows(hidden, here["rows"], here["scales"])
            return here["rows"]
        # Whole vectors are copied from there.
        return hidden if hidden.data_ptr() % 16 == 0 else hidden.clone()

    def _send(self, rows: torch.Tensor, tokens_per_rank: Sequence[int]) -> None:
        """What `_own` prepared, to one peer after the other, each with its flag."""
        rank, ranks = self._owners.rank, self._owners.num_ranks
        first, after = self._span(rank, tokens_per_rank)
        if first < after:
            names = [name for name in ("topk_ids", "topk_weights", "scales") if name in self._mapped.views]
            fields = [(self._mapped.views[name][first:after], self._at(name, first)) for name in names]
            copies.copy_to_all(self._mapped, fields)
        for step in range(1, ranks):
            self._to((rank + step) % ranks, rows, self._at("rows", first), DISPATCH, tokens_per_rank[rank])

    def _push(self, partial: torch.Tensor, source: int, tokens_per_rank: Sequence[int]) -> None:
        """The sums of one source to it, with their flag."""
        at = self._at("partials", self._owners.rank)
        self._to(source, partial, at, COMBINE, tokens_per_rank[self._owners.rank])

    def _to(self, peer: int, data: torch.Tensor, at: int, phase: int, num_tokens: int) -> None:
        """Contiguous data to a byte of a rank's memory, and the flag of a phase after it."""
        size = data.numel() * data.element_size()
        there = self._peers[peer][at : at + size]
        if size and self._max_ctas and peer != self._owners.rank:
            copies.copy_to(self._mapped, [(data, at)], peer, self._max_ctas, phase, num_tokens)
            return
        if size and there.data_ptr() != data.data_ptr():
            there.copy_(data.view(-1).view(torch.uint8))
        copies.tell(self._mapped, peer, phase, num_tokens)

    def _at(self, name: str, place: int) -> int:
        """The byte at which a row of a region begins, or the sums of a rank."""
        its = self._mapped.views[name]
        return self._mapped.offsets[name] + place * its.stride(0) * its.element_size()

    def _added(self, out: torch.Tensor | None, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        if out is None:
            size = (len(self._ids), self._layout.shape.hidden_size)
            out = torch.empty(size, dtype=self._layout.hidden_dtype, device=self._ids.device)
        host.add(self._mapped, out, self._ids, tokens_per_rank)
        return out

    def fault(self) -> str | None:
        """What the GPU gave up waiting for, in a sentence: read without waiting for it."""
        return host.said_by(int(self._mapped.fault), self._mapped.timeout_s)

    def reset(self, board: Board) -> None:
        """Nothing of its own: `Symmetric`, with which it shares all memory, waits until nothing runs, and zeroes."""
        self._kept.clear()

    def close(self) -> None:
        """Lets go of the memory, once what was launched has ended."""
        self._peers.clear()
        self._kept.clear()
