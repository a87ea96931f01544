"""What the host launches of steps by source alone: routing to all ranks, flags, and waits for several sources."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
import triton

from rampwrap.kernels.ep import MOST_RANKS
from rampwrap.kernels.ep.bulk import routing_kernel, tell_kernel, wait_kernel
from rampwrap.kernels.ep.host import Mapped

BLOCK = 1024
"Values of a CTA and field."


@attrs.define(eq=False)
class Repeated:
    """A launch of one CTA and one warp whose arguments stay as they are: Triton looks at them once, which takes longer than the launch."""

    kernel: Any
    arguments: Mapping[str, Any]
    _compiled: Any = attrs.field(default=None, init=False)

    def __call__(self) -> None:
        if self._compiled is None:
            self._compiled = self.kernel[(1, 1, 1)](**self.arguments, num_warps=1)  # the interpreter gives None
        else:
            self._compiled[(1, 1, 1)](*(self.arguments[name] for name in self.kernel.arg_names))


def tell(mapped: Mapped, phase: int, num_tokens: int, peer: int | None = None) -> Repeated:
    """A launch: the first cell of this rank and a phase at one peer, or at all ranks, after all that the stream did before."""
    arguments = {
        "bases_ptr": mapped.bases,
        "header_ptr": mapped.views["header"],
        "rank": mapped.rank,
        "peer": peer or 0,
        "num_tokens": num_tokens,
        "CELLS_AT": mapped.cells(phase)[1],
        "RANKS": mapped.num_ranks if peer is None else 1,
    }
    return Repeated(tell_kernel, arguments)


def send(
    mapped: Mapped,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    scales: torch.Tensor | None,
    firsts: Sequence[int],
) -> None:
    """One launch: ids, weights and scales of this rank's tokens, to all ranks; none where it has no tokens.

    Args:
        mapped: the memory.
        topk_ids: int32 [T, top_k], contiguous.
        topk_weights: float32 [T, top_k], contiguous.
        scales: float32 [T, H / 128] of e4m3 rows, contiguous.
        firsts: the row of each rank's memory at which this rank's begin.
    """
    num_tokens, top_k = topk_ids.shape
    if not num_tokens:
        return
    width = 0 if scales is None else scales.shape[1]
    every = [*firsts, *[0] * (MOST_RANKS - len(firsts))]
    routing_kernel[(triton.cdiv(num_tokens * max(top_k, width), BLOCK),)](
        mapped.bases,
        topk_ids,
        topk_weights,
        scales,
        num_tokens,
        *every,
        RANKS=mapped.num_ranks,
        TOP_K=top_k,
        SCALES=width,
        IDS_AT=mapped.offsets["topk_ids"],
        WEIGHTS_AT=mapped.offsets["topk_weights"],
        SCALES_AT=mapped.offsets.get("scales", 0),
        BLOCK=BLOCK,
        num_warps=4,
    )


def wait(mapped: Mapped, sources: Sequence[int], phase: int, tokens_per_rank: Sequence[int]) -> Repeated:
    """A launch, which ends when the cells of these ranks are there: what comes after it sees what they announce."""
    arguments = {
        "cells_ptr": mapped.cells(phase)[0],
        "wanted": sum(1 << source for source in sources),
        **mapped.counts(tokens_per_rank),
        "PHASE": phase,
        "RANKS": mapped.num_ranks,
        **mapped.waiting,
    }
    return Repeated(wait_kernel, arguments)
