"""`ExpertParallel`: dispatch, local layer, combine, among the ranks of a process group."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist

from rampwrap.ep import BACKENDS, terms
from rampwrap.ep.board import Board
from rampwrap.ep.collectives import Collectives
from rampwrap.ep.layout import Layout
from rampwrap.ep.mover import BySource, Mover
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.path import BY_SOURCE_TOKENS, Path, path_of
from rampwrap.ep.received import Received
from rampwrap.ep.sent import Sent
from rampwrap.errors import GroupError, InputError, RampwrapError
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape

Movers = tuple[Mover, BySource | None]
"Of whole steps, and of those by source, where they are asked for."
_open: list["ExpertParallel"] = []


class ExpertParallel:
    """Experts of a layer spread over the ranks of a group.

    >>> with ExpertParallel(group, shape, max_tokens_per_rank=128) as ep:
    ...     received = ep.dispatch(hidden_states, topk_ids, topk_weights)
    ...     out = ep.combine(my_layer(received))

    Every rank makes the same calls in the same order; a rank may bring no tokens. The memory is allocated by `open` and
    serves all layers of the shape, one after the other. Results are the same bits from run to run: rows have fixed places,
    and sums a fixed order.

    Args:
        group: a process group of torch.distributed; one rank a GPU, or on CPUs.
        shape: of the layer; `num_local_experts` is taken from the placement.
        max_tokens_per_rank: most tokens that a rank brings to a dispatch.
        placement: the experts of this rank; None gives each rank an equal run of them.
        payload, partials: types that rows and sums travel in (`Layout`).
        backend: "collectives", torch.distributed on any device and over several hosts; or "symmetric", our kernels through
            memory that the GPUs of one host share.
        masked: whether rows go only to ranks that own one of their experts; None decides by what it saves (`path_of`).
            By source every row goes to every rank.
        by_source: whether `layer` runs on a few sources at a time where there are many tokens, and copy engines move rows meanwhile.
            It takes less of the GPU's time there, and more of the host's.
        by_source_tokens: tokens of a rank from which on it does so.
        timeout_s: seconds that a rank is waited for.
        device: of the tensors; None takes the current GPU for NCCL, else the CPU.

    Raises:
        InputError: arguments that make no sense.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        shape: MoEShape,
        max_tokens_per_rank: int,
        *,
        placement: Placement | None = None,
        payload: str | None = None,
        partials: str | None = None,
        backend: str = "collectives",
        masked: bool | None = None,
        by_source: bool = False,
        by_source_tokens: int = BY_SOURCE_TOKENS,
        timeout_s: float = 30.0,
        device: torch.device | str | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}.")
        if not isinstance(placement, Placement | None):
            raise InputError(f"placement is a {type(placement).__name__}; give a Placement(num_experts, experts).")
        if not timeout_s > 0:
            raise InputError(f"timeout_s is {timeout_s:g}; give seconds above 0.")
        self.group, self.backend, self.masked, self.timeout_s = group, backend, masked, timeout_s
        self.by_source, self.by_source_tokens = by_source, by_source_tokens
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        chosen = {name: its for name, its in (("payload", payload), ("partials", partials)) if its is not None}
        self.placement = placement or contiguous(shape.num_experts, self.num_ranks, self.rank)
        if self.placement.num_experts != shape.num_experts:
            raise InputError(
                f"the placement is of {self.placement.num_experts} experts, the layer has {shape.num_experts}; give its own."
            )
        self.shape = attrs.evolve(shape, num_local_experts=len(self.placement.experts))
        self.layout = Layout(self.shape, self.num_ranks, max_tokens_per_rank, **chosen)
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend(group) == "nccl" else "cpu"
        self.device = torch.device(device)
        self._state = "closed"
        self._received: Received | None = None
        self._meets = True  # whether ranks tell each other before they move data
        self._owners: Owners | None = None
        self._movers: Movers | None = None
        self._board: Board | None = None

    @property
    def owners(self) -> Owners:
        """Which rank owns each expert; known once the group is open."""
        if self._owners is None:
            raise InputError("this ExpertParallel is closed; call open() on every rank.")
        return self._owners

    def open(self) -> "ExpertParallel":
        """Meets the other ranks, checks that all want the same, and allocates. Outside of capture, before the first step.

        Raises:
            GroupError: ranks disagree, one is busy with another group, or one did not arrive. Every rank raises it.
            InputError: it is open already, or experts are placed twice or not at all (on every rank).
        """
        if self._state != "closed":
            raise InputError("this ExpertParallel is open already; close() it first.")
        self._board = board = Board.of(self.group, "ep", self.timeout_s)
        try:
            every = self._meet(board)
            self._owners = Owners.of([its.placement for its in every], self.rank, self.device)
            self._movers = self._made(board, every, self._owners)
            board.exchange("open to all", None)
        except RampwrapError:
            self._let_go()
            raise
        _open.append(self)
        self._state = "idle"
        return self

    def _meet(self, board: Board) -> list[terms.Terms]:
        names = ("masked", "by_source", "by_source_tokens")
        backend = ", ".join([self.backend, *(f"{name}={getattr(self, name)}" for name in names)])
        wish = terms.Terms.of(self.layout, self.placement, self.device, backend, self._busy())
        return terms.met(board, wish)

    def _made(self, board: Board, every: Sequence[terms.Terms], owners: Owners) -> Movers:
        if self.backend == "collectives":
            one = Collectives(self.group, self.layout, owners, self.device, self.timeout_s)
            return one, one
        from rampwrap.ep.symmetric import Symmetric

        terms.reach(board, every, self.rank)
        near = Symmetric.open(self.group, self.layout, owners, self.device, board)
        return near, near.bulk() if self.by_source else None

    def _busy(self) -> str | None:
        others = [its for its in _open if its.group is not self.group]
        return "it has another one open; close() that first." if others else None

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        tokens_per_rank: Sequence[int] | None = None,
        block_m: int | None = None,
    ) -> Received:
        """Sends this rank's tokens to the ranks that own their experts, and returns what all ranks sent here.

        Args:
            hidden_states: [T, H] in the layer's type, quantised on the way where rows travel in FP8; or e4m3 with `scales`.
            topk_ids: int32 or int64 [T, top_k], global; ids out of range, -1 among them, go nowhere.
            topk_weights: floating point [T, top_k].
            scales: float32 [T, H / 128] of e4m3 rows.
            tokens_per_rank: T of every rank, where the host knows them, as engines do. Nothing is then exchanged
                beforehand, and what one rank refuses the others find missing. None lets the ranks tell each other first.
            block_m: align for M blocks of so many rows, with Triton.

        Raises:
            InputError: tensors of another kind, more tokens than there is room for, or a dispatch without its combine.
            GroupError: another rank refused its part, or did not arrive.
        """
        sent = Sent(hidden_states, topk_ids, topk_weights, scales)
        counts, path, movers = self._begun(sent, tokens_per_rank, by_source=False)
        self._received = received = movers[0].dispatch(sent, counts, path, block_m)
        self._state = "dispatched"
        return received

    def _begun(
        self, sent: Sent, tokens_per_rank: Sequence[int] | None, by_source: bool
    ) -> tuple[tuple[int, ...], Path, Movers]:
        """Tokens of all ranks, and the path of a step that all may dispatch."""
        self._meets = tokens_per_rank is None
        movers, board = self._movers_in("dispatch", "idle")
        refusal = sent.refusal(self.layout, self.device)
        if tokens_per_rank is None:
            counts = self._agree(board, "dispatch", sent.num_tokens, refusal)
        else:
            if isinstance(tokens_per_rank, int):
                raise InputError(f"tokens_per_rank is {tokens_per_rank}; give the count of every rank, as a list.")
            counts = tuple(int(its) for its in tokens_per_rank)
            refusal = refusal or self._wrong_counts(counts, sent.num_tokens)
        if refusal is not None:
            raise InputError(refusal)
        # Which rows a message has the host must read, unless all are in it; our kernels need not know.
        known = tokens_per_rank is not None and self.backend == "collectives"
        masked = False if known else self.masked
        return counts, path_of(self.layout, counts, masked, by_source, self.by_source_tokens), movers

    def combine(self, expert_output: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sends every row's sum home and returns [T, H]: for each own token the sums of its ranks, added by rank in float32.

        Args:
            expert_output: [N, H], the rows of the last dispatch after a kernel that weighted and summed what its local
                experts gave; or [N, top_k, H], what each slot's expert gave, weighted and summed here.
            out: [T, H] in the layer's type, written and returned.

        Raises:
            InputError: another shape, or a combine without its dispatch.
            GroupError: another rank refused its part, or did not arrive.
        """
        movers, board = self._movers_in("combine", "dispatched")
        received = self._received
        assert received is not None
        refusal = received.refusal(expert_output) or self._wrong_out(out, received.tokens_per_rank[self.rank])
        if self._meets:
            self._agree(board, "combine", 0, refusal)
        if refusal is not None:
            raise InputError(refusal)
        total = movers[0].combine(expert_output, received, out)
        self._received, self._state = None, "idle"
        return total

    def check(self) -> None:
        """Waits for the GPU and says what went wrong there, if anything did. Calls do so too, without waiting.

        Raises:
            GroupError: a rank did not arrive at a step, or came with other counts.
        """
        if self._movers is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._raise_fault(self._movers)

    def _raise_fault(self, movers: Movers) -> None:
        reason = movers[0].fault()
        if reason is not None:
            self._state = "broken"
            raise GroupError(reason)

    def layer(
        self,
        run: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        tokens_per_rank: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
        **weights: Any,
    ) -> torch.Tensor:
        """The whole layer: dispatch, a kernel on the received rows in place, combine. Returns [T, H].

        With `by_source`, steps of many tokens go so (`path_of`): `run` is called for the tokens of this rank, then for those of the
        other ones, some ranks at a time, while rows and sums of others travel. It must not write over ``hidden_states`` then: those of this
        rank are the caller's, and are being sent. A kernel that says `stores_once` may get memory of another
        GPU as `out`.

        Args:
            run: called with the rows of all ranks, or of some, as `hidden_states`, `topk_ids`, `topk_weights` and `expert_map`, and
                with `weights`: a `Dispatcher`, a `GraphDispatcher`, or a kernel's `launch` with its config bound. It sees
                the local histogram, and chooses by it. Rows in e4m3 it gets as they are, with ``hidden_scale``, if it takes
                that; else in the layer's type, from a copy.
            weights: of the experts of this rank, `w13` and `w2` and what else the kernel takes.

        The other arguments, and what is raised, are those of `dispatch` and `combine`.
        """
        sent = Sent(hidden_states, topk_ids, topk_weights, scales)
        counts, path, movers = self._begun(sent, tokens_per_rank, self.by_source)
        dtype = self.layout.hidden_dtype
        if not path.by_source:
            self._received = received = movers[0].dispatch(sent, counts, path, None)
            self._state = "dispatched"
            return self.combine(received.through(run, dtype, weights), out=out)
        mover = movers[1]
        assert mover is not None
        self._state = "broken"  # until it has ended
        refusal = self._wrong_out(out, counts[self.rank])
        for piece in mover.pieces(sent, counts, path):
            received, rows = piece.received, piece.room
            if received.num_tokens:
                rows = received.through(run, dtype, weights, piece.room, piece.away)
            refusal = refusal or piece.refusal(rows)
            if self._meets and piece.sources == (self.rank,):  # the first: what is wrong with it is so with all
                assert self._board is not None
                self._agree(self._board, "combine", 0, refusal)
            if refusal is not None:
                raise InputError(refusal)
            mover.send_home(piece, rows)
        total = mover.summed(out)
        self._state = "idle"
        return total

    def _movers_in(self, call: str, state: str) -> tuple[Movers, Board]:
        if self._movers is None or self._board is None:
            raise InputError(f"{call} was called on a closed ExpertParallel; call open() on every rank.")
        if self._state != "broken":
            self._raise_fault(self._movers)
        if self._state == state:
            return self._movers, self._board
        refusal = {
            "idle": "combine was called without a dispatch; call dispatch first.",
            "dispatched": "dispatch was called twice without a combine; call combine, or reset() on every rank.",
            "broken": f"{call} was called after a failure; call reset() on every rank.",
        }[self._state]
        if self._meets and self._state != "broken":
            self._agree(self._board, call, 0, refusal)
        raise InputError(refusal)

    def _agree(self, board: Board, phase: str, num_tokens: int, refusal: str | None) -> tuple[int, ...]:
        """The token counts of all ranks, where none refuses its part; every rank hears why one does."""
        try:
            said = board.exchange(phase, [num_tokens, refusal])
        except GroupError:
            self._state = "broken"
            raise
        for rank, (_, reason) in enumerate(said):
            if reason is not None and rank != self.rank and refusal is None:
                raise GroupError(f"rank {rank} refused {phase}: {reason}")
        return tuple(count for count, _ in said)

    def _wrong_counts(self, counts: tuple[int, ...], num_tokens: int) -> str | None:
        most = self.layout.max_tokens_per_rank
        if len(counts) != self.num_ranks or counts[self.rank] != num_tokens:
            return (
                f"tokens_per_rank is {list(counts)} on rank {self.rank} of {self.num_ranks} with {num_tokens} tokens; "
                "give the count of every rank."
            )
        if max(counts) > most or min(counts) < 0:
            return f"tokens_per_rank is {list(counts)}; give counts from 0 to max_tokens_per_rank={most}, or open with more."
        return None

    def _wrong_out(self, out: torch.Tensor | None, num_tokens: int) -> str | None:
        size, dtype = (num_tokens, self.shape.hidden_size), self.layout.hidden_dtype
        if out is None or (out.shape == size and out.dtype == dtype and out.is_contiguous()):
            return None
        return f"out is {out.dtype} of shape {tuple(out.shape)}; give contiguous {dtype} {size}."

    def reset(self) -> None:
        """Starts anew after a failure, on every rank.

        Raises:
            GroupError: a rank did not arrive.
            InputError: it is closed.
        """
        if self._board is None:
            raise InputError("reset was called on a closed ExpertParallel; call open() on every rank.")
        self._state = "broken"
        self._board.reset()
        if self._movers is not None:
            self._movers[0].reset(self._board)
        self._received, self._state = None, "idle"

    def close(self) -> None:
        """Waits until every rank is here, so that none writes any more, and frees the memory. Closed ones stay so.

        Raises:
            GroupError: a rank did not arrive; the memory is freed all the same.
        """
        board, healthy = self._board, self._state in ("idle", "dispatched")
        try:
            if board is not None and healthy:
                board.exchange("close", None)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for mover in self._movers or ():
            if mover is not None:
                mover.close()
        if self in _open:
            _open.remove(self)
        self._movers = self._board = self._received = self._owners = None
        self._state = "closed"

    def __enter__(self) -> "ExpertParallel":
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the other ranks may be anywhere
            self._let_go()
