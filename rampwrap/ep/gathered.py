"""`Gathered`: all-gather and reduce-scatter of rows through memory that the GPUs of one host share, for steps of low latency.

For callers who know no owners of experts, as engines' communicators: every row goes to every rank, and every rank sends a sum for
every row back. A gather is one launch and returns views in place; a scatter is two. They alternate. Nothing waits for the host or
allocates but the output, so both can be captured in CUDA graphs, as `Symmetric` can.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from rampwrap.ep import terms
from rampwrap.ep.board import Board
from rampwrap.ep.layout import ALIGNED, CELLS, HEADER, Wanted, marked, placed
from rampwrap.ep.shared import Shared, between_steps, settle
from rampwrap.kernels.ep import host
from rampwrap.kernels.ep.gather import MOST_FIELDS
from rampwrap.kernels.ep.host import Mapped


class Gathered:
    """Rows of one group of ranks.

    Args:
        mapped: the memory of all ranks, as kernels see it.
        board: of the ranks.
        kept: what must live as long as the mapping does.
    """

    def __init__(self, mapped: Mapped, board: Board, kept: Any = None) -> None:
        self._mapped, self._board, self._kept = mapped, board, kept
        self._places: dict[tuple[int, ...], tuple[int, ...]] = {}

    @classmethod
    def open(
        cls,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        token_bytes: int,
        hidden_size: int,
        dtype: torch.dtype,
        timeout_s: float,
        open_s: float = 60.0,
        max_tokens_per_rank: int = 512,
    ) -> "Gathered":
        """Allocates and maps; all ranks call it together, with the same arguments, outside of capture.

        Args:
            group: of the ranks, each with a GPU of its own on the same host; any backend.
            device: this rank's GPU.
            token_bytes: most bytes of a token that is gathered, all tensors together.
            hidden_size, dtype: of the rows that are scattered.
            timeout_s: seconds that a rank is waited for on the GPU.
            open_s: seconds that a rank is waited for here.
            max_tokens_per_rank: most tokens that a rank brings.

        Raises:
            GroupError: ranks disagree, one found no memory or no way to its peers, or did not arrive; every rank raises it.
        """
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        board = Board.of(group, "gathered", open_s)
        sizes = {"token_bytes": token_bytes, "hidden_size": hidden_size, "max_tokens_per_rank": max_tokens_per_rank}
        wish = terms.Terms.here(sizes | {"dtype": str(dtype).removeprefix("torch.")}, device)
        terms.reach(board, terms.met(board, wish), rank)
        regions = placed(wanted(ranks, max_tokens_per_rank, token_bytes, hidden_size, dtype))
        shared = Shared.mapped(group, regions[-1].end, device, board)
        mapped = shared.seen(regions, rank, timeout_s)
        board.exchange("open to all", None)
        return cls(mapped, board, shared)

    @property
    def hidden_size(self) -> int:
        """Columns of the rows that are scattered."""
        return self._mapped.hidden_size

    def refusal(self, fields: Sequence[torch.Tensor], tokens_per_rank: Sequence[int]) -> str | None:
        """Why a step cannot go this way, in a sentence: the same on every rank, where all bring tensors of the same kinds."""
        its = self._mapped
        if max(tokens_per_rank) > its.max_tokens:
            return f"{max(tokens_per_rank)} tokens are more than max_tokens_per_rank={its.max_tokens}."
        if len(fields) > MOST_FIELDS:
            return f"{len(fields)} tensors are more than {MOST_FIELDS}."
        rows = tuple(map(row_bytes, fields))
        odd = [size for size in rows if size % 4]
        if odd:
            return f"rows of {odd[0]} bytes are no multiple of 4."
        if self._placed(rows) is None:
            return f"rows of {sum(rows)} bytes are longer than token_bytes."
        return None

    def _placed(self, rows: tuple[int, ...]) -> tuple[int, ...] | None:
        """Bytes from the start of the memory to each field; None where they do not fit."""
        its = self._mapped
        found, at = [], its.offsets["fields"]
        if rows not in self._places:
            for size in rows:
                found.append(at)
                at += -(-size * its.num_ranks * its.max_tokens // ALIGNED) * ALIGNED
            fits = at - its.offsets["fields"] <= its.views["fields"].numel()
            self._places[rows] = tuple(found) if fits else ()
        return self._places[rows] or None

    def gather(self, fields: Sequence[torch.Tensor], tokens_per_rank: Sequence[int]) -> list[torch.Tensor]:
        """The rows of all ranks, by rank and token, of each tensor: views of memory that the next gather overwrites.

        Args:
            fields: [T, ...], at least one and such as `refusal` has nothing against, of the same kinds on every rank.
            tokens_per_rank: of every rank.
        """
        its, total = self._mapped, sum(tokens_per_rank)
        rows = tuple(map(row_bytes, fields))
        places = self._placed(rows)
        assert places is not None
        words = [
            field.contiguous().view(len(field), -1 if len(field) else size // field.element_size()).view(torch.int32)
            for field, size in zip(fields, rows, strict=True)
        ]
        host.gather(its, words, places, tokens_per_rank)
        start, memory = its.offsets["fields"], its.views["fields"]
        return [
            memory[at - start : at - start + total * size].view(field.dtype).view(total, *field.shape[1:])
            for field, size, at in zip(fields, rows, places, strict=True)
        ]

    def takes(self, y: torch.Tensor, tokens_per_rank: Sequence[int]) -> bool:
        """Whether rows can be scattered."""
        partials = self._mapped.views["partials"]
        return y.shape == (sum(tokens_per_rank), partials.shape[2]) and y.dtype == partials.dtype

    def scatter(self, y: torch.Tensor, tokens_per_rank: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """The sums over all ranks of this rank's tokens [T, H], added by rank in float32.

        Args:
            y: [N, H], rows of all ranks, as `takes` has it; over gathered rows too, as experts that work in place leave it: a copy is
                sent then, for a rank that has all its sums may put rows of another step there.
            tokens_per_rank: as of the gather before.
            out: [T, H], contiguous, written and returned.
        """
        its = self._mapped
        if out is None:
            out = y.new_empty(tokens_per_rank[its.rank], y.shape[1])
        host.push(its, host.apart(y, out, its.views["fields"]), tokens_per_rank)
        host.add(its, out, None, tokens_per_rank)
        return out

    def fault(self) -> str | None:
        """What the GPU gave up waiting for, in a sentence: read without waiting for it."""
        return host.said_by(int(self._mapped.fault), self._mapped.timeout_s)

    def reset(self) -> None:
        """Starts anew after a fault, with a gather; all ranks call it together. Graphs go on.

        Raises:
            GroupError: a rank did not arrive within `open_s`.
        """
        self._board.reset()
        between_steps(self._board, self._mapped.bases.device, self._mapped.begin)

    def close(self) -> None:
        """Lets go of the memory; what was launched has ended."""
        settle(self._mapped.bases.device)
        self._kept = None


def row_bytes(field: torch.Tensor) -> int:
    """Of one token."""
    return int(torch.Size(field.shape[1:]).numel()) * field.element_size()


def wanted(num_ranks: int, max_tokens: int, token_bytes: int, hidden_size: int, dtype: torch.dtype) -> list[Wanted]:
    """Regions of a rank's memory."""
    return [
        ("header", torch.int64, (HEADER,)),
        ("cells", torch.int64, (2, CELLS, num_ranks)),
        marked(num_ranks, max_tokens, hidden_size, dtype),
        ("fields", torch.uint8, (num_ranks * max_tokens * token_bytes + MOST_FIELDS * ALIGNED,)),
        ("partials", dtype, (num_ranks, max_tokens, hidden_size)),
    ]
