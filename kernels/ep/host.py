"""Launches of dispatch and combine: what of a step is known on the host becomes arguments, all else stays on the GPU.

Nothing here allocates, synchronises or reads the GPU, so both can be captured in a CUDA graph; graph and eager steps may
follow each other in any order, the same on all ranks. Counts of tokens are baked into a graph, the routing is not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
import triton
import triton.language as tl

from rampwrap.errors import InputError
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.common.overlap import overlap
from rampwrap.kernels.ep import MOST_RANKS
from rampwrap.kernels.ep.bulk import end_kernel
from rampwrap.kernels.ep.combine import push_kernel, sum_kernel
from rampwrap.kernels.ep.dispatch import dispatch_kernel
from rampwrap.kernels.ep.flags import COMBINE, COUNTS, DISPATCH, LATE
from rampwrap.kernels.ep.gather import MOST_FIELDS, gather_kernel
from rampwrap.kernels.ep.marked import take_kernel
from rampwrap.kernels.triton import pdl

MOST_CTAS = 528
"Of a launch that waits and does little else: four on an SM of Hopper."
EAGER_CTAS = 132
"Of a launch that looks for sums while they travel: more of them would take what L2 can give from those that arrive."
_TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@attrs.frozen(eq=False)
class Mapped:
    """The memory that a rank and its peers share, as kernels see it.

    Attributes:
        rank, num_ranks: this one, and all, at most 8.
        bases: int64 [num_ranks] on the GPU, where each rank's memory begins in this rank's addresses.
        views: regions of this rank's own memory, by name.
        offsets: bytes from the start of the memory to each region.
        fault: int64 [1] that both the GPU and the host reach, zero.
        rank_of_expert, expert_map: int32 [num_experts] on the GPU; None where rows go to every rank (`gather`).
        timeout_s: seconds that a rank is waited for on the GPU.
    """

    rank: int
    num_ranks: int = attrs.field()
    bases: torch.Tensor
    views: Mapping[str, torch.Tensor]
    offsets: Mapping[str, int]
    fault: torch.Tensor
    rank_of_expert: torch.Tensor | None
    expert_map: torch.Tensor | None
    timeout_s: float

    @num_ranks.validator
    def _few(self, _: Any, value: int) -> None:
        if not 1 <= value <= MOST_RANKS:
            raise InputError(f"{value} ranks share memory; up to {MOST_RANKS} of one host do, use collectives.")

    def begin(self) -> None:
        """This rank's memory as it must be before the first step, and again after a fault: no step is told, and no sum of few tokens is there."""
        for its in (self.views["header"], self.views["cells"], self.fault):
            its.zero_()
        self.views["marked"].fill_(-0.0)

    def marks(self, tokens_per_rank: Sequence[int]) -> bool:
        """Whether the sums of a step are their own flags: so few that they have room there. All ranks say the same."""
        return max(1, *tokens_per_rank) <= self.views["marked"].shape[1]

    @property
    def top_k(self) -> int:
        return self.views["topk_ids"].shape[1] if self.expert_map is not None else 1

    @property
    def hidden_size(self) -> int:
        return self.views["partials"].shape[2]

    @property
    def max_tokens(self) -> int:
        return self.views["partials"].shape[1]

    @property
    def most_ctas(self) -> int:
        """That share the tokens of a rank: as many as tell."""
        return int(self.views["cells"].shape[1])

    def ctas(self, num_tokens: int) -> int:
        """That share so many tokens of a rank."""
        return min(self.most_ctas, max(1, num_tokens))

    def counts(self, tokens_per_rank: Sequence[int]) -> dict[str, int]:
        """Tokens of every rank, as arguments of kernels."""
        counts = [*tokens_per_rank, *[0] * (MOST_RANKS - self.num_ranks)]
        return {f"count_{rank}": count for rank, count in enumerate(counts)}

    def _between(self, tokens_per_rank: Sequence[int]) -> dict[str, Any]:
        """Arguments of every kernel."""
        return {
            "rank": self.rank,
            **self.counts(tokens_per_rank),
            "RANKS": self.num_ranks,
            **pdl.arguments(),
        }

    @property
    def waiting(self) -> dict[str, Any]:
        """Arguments of every kernel that waits for all ranks."""
        return {
            "header_ptr": self.views["header"],
            "fault_ptr": self.fault,
            "limit_ns": int(self.timeout_s * 1e9),
            "LANES": int(triton.next_power_of_2(self.num_ranks)),
        }

    def _shared(self, tokens_per_rank: Sequence[int]) -> dict[str, Any]:
        """Arguments of every kernel that knows experts."""
        return {
            **self._between(tokens_per_rank),
            "TOP_K": self.top_k,
            "SLOTS": triton.next_power_of_2(self.top_k),
            "COLUMNS": self.hidden_size,
            # Sums in the order of the path over torch.distributed, product and sum rounded each: the same bits.
            "enable_fp_fusion": False,
        }

    @property
    def num_experts(self) -> int:
        return 0 if self.expert_map is None else self.expert_map.numel()

    def cells(self, phase: int) -> tuple[torch.Tensor, int]:
        """Those of a phase in this rank's memory, and where they begin in everybody's."""
        return self.views["cells"][phase - 1], self.offsets["cells"] + (phase - 1) * 8 * self.num_ranks * self.most_ctas


def dispatch(
    mapped: Mapped,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    tokens_per_rank: Sequence[int],
    *,
    masked: bool,
    scales: torch.Tensor | None = None,
    waits: bool = True,
    sends: bool = True,
) -> None:
    """One launch: rows, ids and weights to the ranks.

    Args:
        mapped: the memory.
        x: [T, H], contiguous: of the payload's type, or bf16 or fp16 that is quantised on the way to e4m3.
        topk_ids: int32 or int64 [T, top_k], contiguous.
        topk_weights: floating point [T, top_k], contiguous.
        tokens_per_rank: of every rank.
        masked: rows only to ranks that own one of their experts.
        scales: float32 [T, H / 128] of e4m3 rows.
        waits, sends: one of them off, where ranks are emulated one after the other.
    """
    its, views, offsets = mapped, mapped.views, mapped.offsets
    cells, cells_at = its.cells(DISPATCH)
    payload, hidden = views["rows"].dtype, its.hidden_size
    quantises = payload == FP8 and x.dtype != FP8
    row_bytes = hidden * payload.itemsize
    words = row_bytes // 4
    dispatch_kernel[(its.ctas(max(tokens_per_rank)), 1)](
        its.bases,
        x if quantises else x.view(torch.int32),
        scales,
        topk_ids,
        topk_weights,
        its.rank_of_expert,
        cells,
        num_experts=its.num_experts,
        ROW_BYTES=row_bytes,
        QUANTISES=quantises,
        MASKED=masked,
        SENDS=sends,
        WAITS=waits,
        CELLS_AT=cells_at,
        MOST=its.most_ctas,
        IDS_AT=offsets["topk_ids"],
        WEIGHTS_AT=offsets["topk_weights"],
        PUSH_AT=offsets["routing"],
        MAX_TOKENS=its.max_tokens,
        ROWS_AT=offsets["rows"],
        SCALES_AT=offsets.get("scales", 0),
        BLOCK=min(4096, triton.next_power_of_2(words)),
        GROUPS=min(64, triton.next_power_of_2(-(-hidden // GROUP))),
        num_warps=8,
        **its.waiting,
        **its._shared(tokens_per_rank),
    )


def gather(
    mapped: Mapped,
    fields: Sequence[torch.Tensor],
    places: Sequence[int],
    tokens_per_rank: Sequence[int],
    *,
    waits: bool = True,
    sends: bool = True,
) -> None:
    """One launch: the rows of several tensors to every rank, by rank and token.

    Args:
        mapped: the memory.
        fields: int32 [T, words], contiguous, up to `MOST_FIELDS`.
        places: bytes from the start of the memory to where each of them goes.
        tokens_per_rank: of every rank.
        waits, sends: one of them off, where ranks are emulated one after the other.
    """
    its = mapped
    cells, cells_at = its.cells(DISPATCH)
    given: dict[str, Any] = {}
    for number in range(MOST_FIELDS):
        here = number < len(fields)
        given[f"field_{number}_ptr"] = fields[number] if here else None
        given[f"WORDS_{number}"] = fields[number].shape[1] if here else 0
        given[f"AT_{number}"] = places[number] if here else 0
    gather_kernel[(its.ctas(max(tokens_per_rank)), 1)](
        bases_ptr=its.bases,
        cells_ptr=cells,
        **given,
        CELLS_AT=cells_at,
        MOST=its.most_ctas,
        SENDS=sends,
        WAITS=waits,
        num_warps=8,
        maxnreg=64,  # without it ptxas saves registers, and spills some; four CTAs fit on an SM so
        **its.waiting,
        **its._between(tokens_per_rank),
    )


def apart(expert_output: torch.Tensor, *written: torch.Tensor) -> torch.Tensor:
    """`expert_output`, contiguous; a copy where it shares memory with tensors that are written while `push` may still read.

    These are the output of `add`, and received rows: a rank that has its sums sends the next, which may lie where those of another lay.
    """
    shared = any(overlap(expert_output, its) for its in written)
    return expert_output.clone(memory_format=torch.contiguous_format) if shared else expert_output.contiguous()


def push(mapped: Mapped, expert_output: torch.Tensor, tokens_per_rank: Sequence[int]) -> None:
    """The first launch of a combine: sums of all received rows, to their sources.

    Args:
        mapped: the memory, with the routing of the last dispatch.
        expert_output: floating point [N, H], summed, or [N, top_k, H], one row a slot; contiguous, and `apart` from what `add` writes.
        tokens_per_rank: of every rank.
    """
    its, marks = mapped, mapped.marks(tokens_per_rank)
    name = "marked" if marks else "partials"
    sums, (_, cells_at) = its.views[name], its.cells(COMBINE)
    push_kernel[(its.ctas(max(tokens_per_rank)), its.num_ranks)](
        its.bases,
        expert_output,
        its.views.get("routing"),
        its.views["header"],
        BY_SLOT=expert_output.dim() == 3,
        PARTIAL=_TL[sums.dtype],
        PARTIAL_BYTES=sums.dtype.itemsize,
        MAX_TOKENS=its.max_tokens,
        CELLS_AT=cells_at,
        MOST=its.most_ctas,
        SUMS_AT=its.offsets[name],
        ROOM=sums.shape[1],
        MARKED=marks,
        **_row_at_once(its.hidden_size),
        EVERY=its.expert_map is None,
        **its._shared(tokens_per_rank),
    )


def add(
    mapped: Mapped,
    out: torch.Tensor,
    topk_ids: torch.Tensor | None,
    tokens_per_rank: Sequence[int],
    *,
    by_source: bool = False,
) -> None:
    """The second launch of a combine: `out` [T, H] becomes the sums of the ranks, by rank. A step by source is ended by one more.

    Args:
        mapped: the memory.
        out: [T, H], contiguous, written.
        topk_ids: those that this rank sent; None where every rank has a sum for every token.
        tokens_per_rank: of every rank.
        by_source: the sums were told by `routing.tell`; otherwise by `push`, just before.
    """
    its = mapped
    if not by_source and its.marks(tokens_per_rank):
        take(its, out, tokens_per_rank)
        return
    cells, _ = its.cells(COMBINE)
    ctas, block = its.ctas(tokens_per_rank[its.rank]), min(2048, triton.next_power_of_2(its.hidden_size))
    # Few columns each, so that a thread has those of all ranks under way at once.
    shares = min(-(-its.hidden_size // block), max(1, MOST_CTAS // ctas))
    sum_kernel[(ctas, shares)](
        out,
        its.views["partials"],
        topk_ids,
        its.rank_of_expert,
        cells,
        num_experts=its.num_experts,
        MAX_TOKENS=its.max_tokens,
        BLOCK=block,
        num_warps=max(1, block // 256),
        # Without it ptxas saves registers, and loads the last ranks' after the sum of the first.
        maxnreg=64 if its.num_ranks * its.views["partials"].dtype.itemsize <= 16 else 128,
        EVERY=its.expert_map is None,
        BY_SOURCE=by_source,
        **its.waiting,
        **its._shared(tokens_per_rank),
    )
    if by_source:
        end_kernel[(1,)](its.views["header"], num_warps=1)


def take(mapped: Mapped, out: torch.Tensor, tokens_per_rank: Sequence[int]) -> None:
    """`add` where sums are their own flags."""
    its, sums = mapped, mapped.views["marked"]
    words, (cells, _) = sums.view(torch.int32), its.cells(COMBINE)
    block = min(1024, triton.next_power_of_2(words.shape[2]))
    grid = its.ctas(tokens_per_rank[its.rank]), -(-words.shape[2] // block)
    take_kernel[grid](
        out,
        words,
        its.views.get("routing"),
        cells,
        MAX_TOKENS=its.max_tokens,
        ROOM=sums.shape[1],
        PARTIAL=_TL[sums.dtype],
        BLOCK=block,
        num_warps=max(1, block // 128),
        EVERY=its.expert_map is None,
        EAGER=math.prod(grid) <= EAGER_CTAS,
        **its.waiting,
        **its._shared(tokens_per_rank),
    )


def _row_at_once(columns: int) -> dict[str, int]:
    """A CTA has a whole row under way: loads of a next piece would wait for the stores of the one before, which may alias. From 64 columns
    on a thread stores whole words: a half of one would be taken for a sum (`marked`)."""
    block = min(8192, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": 8 if block > 2048 else max(1, min(4, block // 256))}


def said_by(fault: int, timeout_s: float) -> str | None:
    """What a value of `Mapped.fault` means, in a sentence; None for zero. Steps count from `open` or `reset`, the first is 1."""
    if not fault:
        return None
    epoch, kind, phase, bits = fault >> 32, fault >> 16 & 0xFF, fault >> 8 & 0xFF, fault & 0xFF
    ranks = ", ".join(str(rank) for rank in range(MOST_RANKS) if bits >> rank & 1)
    many = bits & (bits - 1)
    at = f"{'dispatch' if phase == DISPATCH else 'combine'} of step {epoch}"
    if kind == LATE:
        return (
            f"rank{'s' if many else ''} {ranks} did not arrive at {at} within {timeout_s:g} s; see what became of "
            f"{'them' if many else 'it'}, then call reset() on every rank."
        )
    assert kind == COUNTS
    return (
        f"rank{'s' if many else ''} {ranks} came to {at} with other tokens_per_rank than this rank has; give all ranks "
        "the same, then call reset() on every rank."
    )
