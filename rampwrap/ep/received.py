"""`Received`: what a dispatch hands to the local layer, in place; and the sum that an owner sends back."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from rampwrap.ep.owners import Owners
from rampwrap.ep.path import Path
from rampwrap.kernels.common.reference import dequantise

if TYPE_CHECKING:  # it imports Triton, which the path over torch.distributed does not need
    from rampwrap.kernels.triton.align.host import TokenBlocks


@attrs.frozen(eq=False)
class Received:
    """The tokens of all ranks as this rank sees them, N = sum(tokens_per_rank): views of memory that the next dispatch overwrites.

    Row `sum(tokens_per_rank[:source]) + token` is a token of rank `source`. Ids and weights of all rows are there. Columns
    are there for rows with at least one expert on this rank; other rows hold anything and are not to be read: `expert_map`
    gives their ids no local expert, so no block of an alignment points at them.

    Attributes:
        rows: [N, H], bf16 or fp16, or e4m3 where rows travel in FP8.
        scales: float32 [N, H / 128] of e4m3 rows, else None.
        topk_ids: int32 [N, top_k], global.
        topk_weights: float32 [N, top_k].
        tokens_per_rank: tokens of each source.
        owners: of the experts.
        path: that the rows took.
        blocks: the alignment for the `block_m` that dispatch was asked for.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    tokens_per_rank: tuple[int, ...]
    owners: Owners
    path: Path
    blocks: "TokenBlocks | None" = None

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @functools.cached_property
    def expert_counts(self) -> torch.Tensor:
        """int32 [num_local_experts], slots of each local expert; made when it is first asked for, before the combine."""
        return self.owners.counts(self.topk_ids)

    @property
    def expert_map(self) -> torch.Tensor:
        """int32 [num_experts], for kernels: local id on this rank, -1 elsewhere."""
        return self.owners.expert_map

    @property
    def first(self) -> tuple[int, ...]:
        """The first row of each source, and the number of rows."""
        return prefix(self.tokens_per_rank)

    def hidden_states(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, H] in a type that every kernel takes: the rows themselves, or a copy of e4m3 rows with their scales."""
        if self.scales is None:
            return self.rows
        return dequantise(self.rows, self.scales).to(dtype)

    def aligned(self, block_m: int | None, memory: "TokenBlocks | None" = None) -> "Received":
        """With M blocks of so many rows made of the ids that are here, in some memory where it is given; None makes none."""
        if block_m is None:
            return self
        from rampwrap.kernels.triton.align.host import align_tokens

        local, expert_map = self.owners.num_local_experts, self.expert_map
        made = align_tokens(self.topk_ids, block_m, local, expert_map=expert_map, blocks=memory)
        return attrs.evolve(self, blocks=made)

    def of(self, source: int) -> "Received":
        """The rows of one source, whose number is then all of `tokens_per_rank`."""
        first, after = self.first[source : source + 2]
        return attrs.evolve(
            self,
            rows=self.rows[first:after],
            scales=None if self.scales is None else self.scales[first:after],
            topk_ids=self.topk_ids[first:after],
            topk_weights=self.topk_weights[first:after],
            tokens_per_rank=(after - first,),
            blocks=None,
        )

    def through(
        self,
        run: Callable[..., torch.Tensor],
        dtype: torch.dtype,
        weights: Mapping[str, Any],
        room: torch.Tensor | None = None,
        away: bool = False,
    ) -> torch.Tensor:
        """What a kernel gives for these rows.

        Args:
            run: a `Dispatcher`, or a kernel's `launch` with its config bound. Rows in e4m3 it gets as they are, with
                ``hidden_scale``, if it takes that; else in `dtype`, from a copy.
            dtype: of hidden states.
            weights: of the local experts, and what else the kernel takes.
            room: to write into, where the kernel takes ``out`` and gives its type.
            away: `room` is memory of another GPU: for a kernel that `stores_once`.
        """
        given = dict(weights)
        if self.scales is not None and takes(run, "hidden_scale"):
            given |= {"hidden_states": self.rows, "hidden_scale": self.scales}
        else:
            given["hidden_states"] = self.hidden_states(dtype)
        if room is not None and room.dtype == dtype and takes(run, "out") and (not away or stores_once(run)):
            given["out"] = room
        return run(topk_ids=self.topk_ids, topk_weights=self.topk_weights, expert_map=self.expert_map, **given)

    def refusal(self, expert_output: torch.Tensor) -> str | None:
        """What keeps an output from being combined, in a sentence; None where nothing does."""
        rows, top_k, hidden = *self.topk_ids.shape, self.rows.shape[1]
        if expert_output.shape in ((rows, hidden), (rows, top_k, hidden)) and expert_output.is_floating_point():
            return None
        return (
            f"expert_output is {str(expert_output.dtype).removeprefix('torch.')} {tuple(expert_output.shape)}; "
            f"give floating point [{rows}, {hidden}] or [{rows}, {top_k}, {hidden}]."
        )

    def partial(self, expert_output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What this rank adds to each row: [N, H].

        Args:
            expert_output: [N, H], weighted and summed by the kernel, taken as it is; or [N, top_k, H], what each slot's
                expert gave: weighted and summed here, slot after slot in float32, slots of other ranks left out.
            dtype: of the sums.
        """
        if expert_output.dim() == 2:
            return expert_output.to(dtype)
        total = torch.zeros(self.rows.shape, dtype=torch.float32, device=expert_output.device)
        here = self.owners.is_local(self.topk_ids)
        for slot in range(self.topk_ids.shape[1]):
            more = total + self.topk_weights[:, slot, None] * expert_output[:, slot].float()
            total = torch.where(here[:, slot, None], more, total)  # no product: what is left out may be NaN
        return total.to(dtype)


@functools.lru_cache(maxsize=256)
def takes(run: Callable[..., torch.Tensor], name: str) -> bool:
    """Whether a dispatcher's kernel, or whatever else is called, has a parameter of some name."""
    kernel = getattr(run, "kernel", None)
    return name in inspect.signature(run if kernel is None else kernel.launch).parameters


def stores_once(run: Callable[..., torch.Tensor]) -> bool:
    """Whether a dispatcher's kernel, or whatever else is called, says that it stores each place of ``out`` once and reads none."""
    return bool(getattr(getattr(run, "kernel", run), "stores_once", False))


def prefix(tokens_per_rank: tuple[int, ...]) -> tuple[int, ...]:
    """Sums of the counts before each rank, and of all."""
    sums = [0]
    for count in tokens_per_rank:
        sums.append(sums[-1] + count)
    return tuple(sums)


def sum_in_order(partials: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The output of a rank's tokens: the partial sums of the ranks that have one, by rank, in float32.

    Args:
        partials: [num_ranks, num_tokens, H].
        wanted: bool [num_tokens, num_ranks]; the others are not read.

    Returns:
        float32 [num_tokens, H].
    """
    total = torch.zeros(partials.shape[1:], dtype=torch.float32, device=partials.device)
    for rank, part in enumerate(partials):
        total = torch.where(wanted[:, rank, None], total + part.float(), total)
    return total
