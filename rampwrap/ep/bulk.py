"""`Bulk`: steps of many tokens source by source, so that rows travel while the layer runs.

A launch stores ids, weights and scales of this rank's tokens at all ranks. Copy engines, which take no SM, then send its rows to one
peer after the other, the next rank first: at any time each rank sends to another one. A flag follows each peer's rows. Rows lie at a receiver in
the order in which they come, so that those of several sources are one batch. The layer runs on this rank's own tokens meanwhile, then on
those of the others, a few sources at a time (`mover.groups`), once their flags are there; the sums of a group go home while the layer
runs on the next, those of a single source as the layer writes them, into its memory, if the kernel `stores_once`.
Sums are told to all ranks at once, when no row is read any more: a rank that heard sooner could go on to a step whose rows lie
where those of a third are still being read. The flags are those of `Symmetric`, so steps of both kinds may follow each other.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from rampwrap.ep.layout import Layout
from rampwrap.ep.mover import Piece, first_row, groups
from rampwrap.ep.owners import Owners
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received
from rampwrap.ep.sent import Sent, narrow
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.ep import host, routing
from rampwrap.kernels.ep.flags import COMBINE, DISPATCH
from rampwrap.kernels.ep.host import Mapped
from rampwrap.kernels.ep.routing import Repeated
from rampwrap.kernels.triton.quantise import quantise_rows

FIELDS = ("topk_ids", "topk_weights", "scales", "rows")
"Of a token, as they travel; scales only in FP8."
MOST_PLANS = 64
"Of counts of tokens; each takes some microseconds to make, and a kilobyte of the host."


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


@attrs.frozen(eq=False)
class Group:
    """Sources whose tokens the layer takes in one launch.

    Attributes:
        sources: as they come.
        counts: their tokens.
        here: what lies here of them, by name.
        home: where the sums of each source are wanted, in its memory.
        wait: for them.
    """

    sources: tuple[int, ...]
    counts: tuple[int, ...]
    here: Mapping[str, torch.Tensor]
    home: tuple[torch.Tensor, ...]
    wait: Repeated


@attrs.frozen(eq=False)
class Plan:
    """What steps of the same counts share.

    Attributes:
        counts: tokens of each rank.
        groups: in the order of the layer's launches.
        firsts: the row of each rank's memory at which those of this rank begin.
        there: where its rows go, peer by peer as they are sent, and the launch that tells it.
        tell: all ranks that they have their sums.
    """

    counts: tuple[int, ...]
    groups: tuple[Group, ...]
    firsts: tuple[int, ...]
    there: tuple[tuple[torch.Tensor, Repeated], ...]
    tell: Repeated


class Bulk:
    """Moves rows of one layout among the GPUs of one host.

    Args:
        mapped: the memory of all ranks, as kernels see it.
        owners: of the experts.
        layout: of the shared memory.
        peers: uint8, the memory of each rank, as this one maps it.
    """

    def __init__(self, mapped: Mapped, owners: Owners, layout: Layout, peers: Sequence[torch.Tensor]) -> None:
        self._mapped, self._owners, self._layout = mapped, owners, layout
        self._regions = [layout.views(its) for its in peers]
        self._side = Side(mapped.bases.device)
        self._kept: list[Any] = []  # what the side stream still reads
        self._plans: dict[tuple[int, ...], Plan] = {}

    def pieces(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path) -> Iterator[Piece]:
        """The tokens of this rank, then those of each group of sources as they arrive."""
        self._plan = plan = self._planned(tokens_per_rank)
        own = self._own(sent, plan)
        self._ids, self._kept = own["topk_ids"], [*own.values()]
        with self._side.after_current():
            self._send(own, plan)
        for number, group in enumerate(plan.groups):
            here = group.here if number else own
            if number:
                group.wait()
            if len(group.sources) == 1:
                (room,) = group.home
            else:
                room = torch.empty_like(here["rows"], dtype=self._layout.partial_dtype)
                self._kept.append(room)
            its = here["rows"], here.get("scales"), here["topk_ids"], here["topk_weights"]
            found = Received(*its, group.counts, self._owners, path)
            away, leaves = number > 0 and len(group.sources) == 1, number == 0 and len(plan.counts) > 1
            yield Piece(group.sources, found, room, away, leaves)

    def send_home(self, piece: Piece, expert_output: torch.Tensor) -> None:
        """The sums of a group, on their way as soon as they are there; those of one source are written where they are wanted."""
        partial = piece.settle(expert_output)
        if len(piece.sources) > 1:
            (home,) = (its.home for its in self._plan.groups if its.sources == piece.sources)
            with self._side.after_current():
                for its, (first, after) in zip(home, itertools.pairwise(piece.received.first), strict=True):
                    its.copy_(partial[first:after])

    def summed(self, out: torch.Tensor | None) -> torch.Tensor:
        """The end of a step: all ranks hear of their sums, and this one adds its own."""
        self._side.join()
        self._kept.clear()
        counts = self._plan.counts
        self._plan.tell()
        if out is None:
            size = (len(self._ids), self._layout.shape.hidden_size)
            out = torch.empty(size, dtype=self._layout.hidden_dtype, device=self._ids.device)
        host.add(self._mapped, out, self._ids, counts, by_source=True)
        return out

    def _planned(self, counts: tuple[int, ...]) -> Plan:
        plan = self._plans.get(counts)
        if plan is None:
            if len(self._plans) == MOST_PLANS:
                self._plans.clear()
            plan = self._plans[counts] = self._made(counts)
        return plan

    def _made(self, counts: tuple[int, ...]) -> Plan:
        rank, ranks = self._owners.rank, self._owners.num_ranks
        firsts = tuple(first_row(rank, peer, counts) for peer in range(ranks))
        there = []
        for step in range(1, ranks):
            peer = (rank + step) % ranks
            rows = self._regions[peer]["rows"][firsts[peer] : firsts[peer] + counts[rank]]
            there.append((rows, routing.tell(self._mapped, DISPATCH, counts[rank], peer)))
        found = []
        for sources in groups(rank, ranks):
            its = tuple(counts[source] for source in sources)
            first = first_row(sources[0], rank, counts)
            here = {name: x[first : first + sum(its)] for name, x in self._regions[rank].items() if name in FIELDS}
            home = tuple(
                self._regions[source]["partials"][rank, :count] for source, count in zip(sources, its, strict=True)
            )
            found.append(Group(sources, its, here, home, routing.wait(self._mapped, sources, DISPATCH, counts)))
        return Plan(counts, tuple(found), firsts, tuple(there), routing.tell(self._mapped, COMBINE, counts[rank]))

    def _own(self, sent: Sent, plan: Plan) -> dict[str, torch.Tensor]:
        """What this rank sends, as it travels: quantised rows lie in its own memory, all else where the caller has it."""
        weights = sent.topk_weights.float().contiguous()
        own = {"topk_ids": narrow(sent.topk_ids), "topk_weights": weights, "rows": sent.hidden_states.contiguous()}
        if sent.scales is not None:
            own["scales"] = sent.scales.contiguous()
        elif self._layout.payload_dtype == FP8:
            rows, here = own["rows"], plan.groups[0].here
            own |= {name: here[name] for name in ("rows", "scales")}
            if len(rows):
                quantise_rows(rows, own["rows"], own["scales"])
        return own

    def _send(self, own: Mapping[str, torch.Tensor], plan: Plan) -> None:
        """Ids, weights and scales of this rank to all ranks, then its rows to one peer after the other, each with its flag."""
        routing.send(self._mapped, own["topk_ids"], own["topk_weights"], own.get("scales"), plan.firsts)
        for there, tell in plan.there:
            there.copy_(own["rows"])
            tell()

    def close(self) -> None:
        """Lets go of the memory; what was launched has ended."""
        self._plans.clear()
        self._regions.clear()
        self._kept.clear()
