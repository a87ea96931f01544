"""`Mover` and `BySource`: what moves the rows of a step, all at once or source by source."""

from collections.abc import Iterator
from typing import Protocol

import attrs
import torch

from rampwrap.ep.board import Board
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received
from rampwrap.ep.sent import Sent


class Mover(Protocol):
    """`Symmetric`, `Collectives`."""

    def dispatch(
        self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path, block_m: int | None, /
    ) -> Received: ...

    def combine(self, expert_output: torch.Tensor, received: Received, out: torch.Tensor | None, /) -> torch.Tensor: ...

    def fault(self) -> str | None: ...

    def reset(self, board: Board, /) -> None: ...

    def close(self) -> None: ...


@attrs.frozen(eq=False)
class Piece:
    """The tokens of one source.

    Attributes:
        source: the rank that they are of.
        received: they alone; its `tokens_per_rank` is their number.
        room: [T, H] of the type of sums, where what this rank adds to them is wanted.
    """

    source: int
    received: Received
    room: torch.Tensor

    def settle(self, expert_output: torch.Tensor) -> torch.Tensor:
        """`room`, with what this rank adds to the rows: a kernel may have written it there, or anywhere."""
        partial = self.received.partial(expert_output, self.room.dtype)
        if partial.data_ptr() != self.room.data_ptr():
            self.room.copy_(partial)
        return self.room


class BySource(Protocol):
    """`Bulk`, `Collectives`. Each piece is sent home before the next is asked for."""

    def pieces(self, sent: Sent, tokens_per_rank: tuple[int, ...], path: Path, /) -> Iterator[Piece]: ...

    def send_home(self, piece: Piece, expert_output: torch.Tensor, /) -> None: ...

    def summed(self, out: torch.Tensor | None, /) -> torch.Tensor: ...

    def close(self) -> None: ...


def in_order_of_arrival(rank: int, num_ranks: int) -> list[int]:
    """The sources as their rows come here: this rank's own first; each rank sends to the next one first, then to the one after it."""
    return [(rank - step) % num_ranks for step in range(num_ranks)]
