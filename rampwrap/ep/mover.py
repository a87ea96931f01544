"""`Mover` and `BySource`: what moves the rows of a step, all at once or source by source."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import attrs
import torch

from rampwrap.ep.board import Board
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received
from rampwrap.ep.sent import Sent
from rampwrap.kernels.common.overlap import overlap


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
    """The tokens of one source, or of several that came one after the other.

    Attributes:
        sources: the ranks that they are of, as they lie.
        received: they alone; its `tokens_per_rank` are their numbers.
        room: [T, H] of the type of sums, where what this rank adds to them is wanted.
        away: it is memory of another GPU.
        leaves: the rows are read meanwhile, to be sent to other ranks.
    """

    sources: tuple[int, ...]
    received: Received
    room: torch.Tensor
    away: bool = False
    leaves: bool = False

    def refusal(self, expert_output: torch.Tensor) -> str | None:
        """What keeps an output from being sent home, in a sentence; None where nothing does."""
        if self.leaves and overlap(expert_output, self.received.rows):
            return (
                "the kernel wrote its output over hidden_states, whose rows are sent while it runs by source; let it write "
                "elsewhere, or open with by_source=False."
            )
        return self.received.refusal(expert_output)

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


def groups(rank: int, num_ranks: int) -> list[tuple[int, ...]]:
    """The sources of each launch of the layer: this rank, then half of those that are left, rounded up, and so on.

    Few launches read the weights seldom and fill their tiles. The first needs no row of others, while it runs those of the second come;
    the last is of one source, since nothing hides the way home of its sums.
    """
    left, found = in_order_of_arrival(rank, num_ranks), []
    count = 1
    while left:
        found.append(tuple(left[:count]))
        left = left[count:]
        count = (len(left) + 1) // 2
    return found


def first_row(source: int, receiver: int, tokens_per_rank: Sequence[int]) -> int:
    """Where the rows of a source begin at a receiver in a step by source: behind those that arrive there before them."""
    order = in_order_of_arrival(receiver, len(tokens_per_rank))
    return sum(tokens_per_rank[other] for other in order[: order.index(source)])
