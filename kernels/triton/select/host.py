"""Alignment and selection together: expert ids -> the config that suits them, and the M blocks of its block_m.

Alignment makes the whole histogram anyway, in every CTA; here each CTA also scores the candidates with it (`scoring`)
and aligns for the one that `CostModel.choose` takes on the host, bit for bit. No launch is added, and nothing waits
for the host.

Each candidate gets a `num_tokens_post_padded` of its own: the rows of the chosen one, zero for the others. A kernel
sized from capacity that reads it leaves at once for the others, so candidates can simply all be launched.
"""

from collections.abc import Sequence
from typing import Any

import attrs
import torch

import triton
from rampwrap.errors import InputError
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.align.chunks import count_and_fill_kernel
from rampwrap.kernels.triton.align.host import ALIGNED, TokenBlocks
from rampwrap.kernels.triton.select.kernels import (
    choose_kernel,
    select_and_place_kernel,
    select_by_expert_kernel,
)
from rampwrap.model.in_graph import TALLY
from rampwrap.model.packed import Packed


@attrs.frozen(eq=False)
class Candidates:
    """A `Packed` bucket on a device, with a tally of what was chosen there.

    Attributes:
        packed: what the tensors hold.
        ints: int32, `Packed.ints`.
        reals: float64, `Packed.reals`.
        tally: float64 [TALLY], `rampwrap.model.in_graph.TALLY`, of launches that are given no other.
    """

    packed: Packed
    ints: torch.Tensor
    reals: torch.Tensor
    tally: torch.Tensor

    @classmethod
    def on(cls, packed: Packed, device: torch.device | str) -> "Candidates":
        """Copies a bucket to a device, tally at zero."""
        ints = torch.from_numpy(packed.ints).to(device)
        reals = torch.from_numpy(packed.reals).to(device)
        return cls(packed, ints, reals, torch.zeros(TALLY, dtype=torch.float64, device=device))


@attrs.frozen(eq=False)
class SelectedBlocks:
    """The tokens of a batch cut into M blocks of the chosen candidate; all int32 on the device.

    Attributes:
        blocks: `TokenBlocks` of each candidate in one memory: those of the chosen one are right, the others have
            `num_tokens_post_padded` of zero.
        choice: [1], place of the chosen candidate.
        record: choice, rows and capacity, each at a multiple of `ALIGNED`.
        expert_counts: [num_local_experts].
    """

    blocks: tuple[TokenBlocks, ...]
    choice: torch.Tensor
    record: torch.Tensor
    post_padded: torch.Tensor
    expert_counts: torch.Tensor


def selection_ints(num_tokens: int, top_k: int, num_experts: int, block_ms: Sequence[int]) -> int:
    """int32 values of memory that `selected_in` needs; `num_experts` are those of this rank."""
    sizes = _sizes(num_tokens, top_k, num_experts, block_ms)
    return sum(triton.cdiv(size, ALIGNED) * ALIGNED for size in sizes)


def _sizes(num_tokens: int, top_k: int, num_experts: int, block_ms: Sequence[int]) -> tuple[int, ...]:
    rows = [align.alignment_capacity(num_tokens, top_k, num_experts, block_m) for block_m in block_ms]
    blocks = [triton.cdiv(row, block_m) for row, block_m in zip(rows, block_ms, strict=True)]
    scratch = align._scratch_ints(num_tokens * top_k, num_experts)
    return max(rows), max(blocks), len(block_ms) * ALIGNED, 3 * ALIGNED, num_experts, scratch


def selected_in(
    memory: torch.Tensor, num_tokens: int, top_k: int, num_experts: int, block_ms: Sequence[int]
) -> SelectedBlocks:
    """`SelectedBlocks` laid out in int32 memory of at least `selection_ints(...)` values.

    Raises:
        InputError: the memory is smaller.
    """
    lengths = _sizes(num_tokens, top_k, num_experts, block_ms)
    sizes = [triton.cdiv(length, ALIGNED) * ALIGNED for length in lengths]
    if sum(sizes) > memory.numel():
        raise InputError(
            f"Selecting for {num_tokens} tokens x top-{top_k} needs {sum(sizes)} int32 values, the memory has "
            f"{memory.numel()}; allocate selection_ints(...) of them."
        )
    whole = memory[: sum(sizes)].split(sizes)  # type: ignore[no-untyped-call]
    parts = [part[:length] for part, length in zip(whole, lengths, strict=True)]
    sorted_token_ids, expert_ids, post_padded, record, counts, scratch = parts
    blocks = []
    for place, block_m in enumerate(block_ms):
        rows = align.alignment_capacity(num_tokens, top_k, num_experts, block_m)
        blocks.append(
            TokenBlocks(
                num_tokens * top_k,
                block_m,
                sorted_token_ids[:rows],
                expert_ids[: triton.cdiv(rows, block_m)],
                post_padded[place * ALIGNED : place * ALIGNED + 1],
                counts,
                scratch,
            )
        )
    return SelectedBlocks(tuple(blocks), record[:1], record, post_padded, counts)


def allocate_selected(
    num_tokens: int, top_k: int, num_experts: int, block_ms: Sequence[int], device: torch.device | str
) -> SelectedBlocks:
    """Empty `SelectedBlocks`; `num_experts` are those of this rank."""
    ints = selection_ints(num_tokens, top_k, num_experts, block_ms)
    memory = torch.empty(ints, dtype=torch.int32, device=device)
    return selected_in(memory, num_tokens, top_k, num_experts, block_ms)


def choose(expert_counts: torch.Tensor, candidates: Candidates, fallback: int) -> torch.Tensor:
    """The choice for histograms that are there already; counts nothing and aligns nothing.

    Args:
        expert_counts: int32 [W, num_local_experts], contiguous.
        candidates, fallback: as for `align_and_select`.

    Returns:
        int32 [W], places of the chosen candidates.
    """
    choice = torch.empty(len(expert_counts), dtype=torch.int32, device=expert_counts.device)
    choose_kernel[(len(expert_counts),)](
        expert_counts,
        choice,
        candidates.ints,
        candidates.reals,
        expert_counts.shape[1],
        fallback,
        BINS=align.histogram_bins(expert_counts.shape[1]),
        **_constants(candidates.packed),
    )
    return choice


def _constants(packed: Packed) -> dict[str, Any]:
    return {
        "C": len(packed.block_ms),
        "S": packed.points,
        "LAUNCHES": packed.launches,
        "MARGINS": packed.margins,
        "enable_fp_fusion": False,
    }


def align_and_select(
    topk_ids: torch.Tensor,
    candidates: Candidates,
    fallback: int,
    num_local_experts: int,
    *,
    expert_map: torch.Tensor | None = None,
    selected: SelectedBlocks | None = None,
    tally: torch.Tensor | None = None,
    path: str | None = None,
) -> SelectedBlocks:
    """Chooses a candidate for the routing of `topk_ids` and aligns for it, without the host.

    Args:
        topk_ids: int32 or int64 [num_tokens, top_k], contiguous; at most 65,536 x 32 slots.
        candidates: the bucket of this token count.
        fallback: place of the static config among them.
        num_local_experts: experts whose weights are here. Without a map, ids at or above it take no row.
        expert_map: int32 [num_experts], local expert of each global one, -1 for experts elsewhere.
        selected: memory from `allocate_selected`, for a call that allocates nothing.
        tally: float64 [TALLY], to which the launch is added; `candidates.tally` where absent.
        path: one of `align.PATHS`; the one that is expected to be fastest where absent.

    Raises:
        InputError: tensors of another kind, or more slots than the arithmetic is exact for.
    """
    if topk_ids.dim() != 2 or topk_ids.dtype not in (torch.int32, torch.int64) or not topk_ids.is_contiguous():
        raise InputError(
            f"topk_ids is {topk_ids.dtype} of shape {tuple(topk_ids.shape)}; give contiguous int32 or int64 [num_tokens, top_k]."
        )
    packed = candidates.packed
    num_tokens, top_k = topk_ids.shape
    num_slots = num_tokens * top_k
    if not 0 <= fallback < len(packed.block_ms):
        raise InputError(f"fallback is {fallback} with {len(packed.block_ms)} candidates; give the place of one.")
    packed.check_slots(num_slots, num_local_experts)
    if selected is None:
        selected = allocate_selected(num_tokens, top_k, num_local_experts, packed.block_ms, topk_ids.device)
    first = selected.blocks[0]
    if num_slots == 0:
        selected.post_padded.zero_()
        selected.expert_counts.zero_()
        selected.choice.fill_(fallback)
        return selected
    num_experts = num_local_experts if expert_map is None else expert_map.numel()
    bins = align.histogram_bins(num_local_experts)
    constants = {**_constants(packed), "STRIDE": ALIGNED}
    # The longest of the candidates' layouts is the whole memory.
    sorted_token_ids = max((blocks.sorted_token_ids for blocks in selected.blocks), key=torch.Tensor.numel)
    outputs = (
        sorted_token_ids,
        first.expert_ids,
        selected.post_padded,
        selected.record,
        selected.expert_counts,
        candidates.tally if tally is None else tally,
    )
    path = align._path(num_slots, num_local_experts, path)
    if path == "expert":
        select_by_expert_kernel[(num_local_experts + 1,)](
            topk_ids,
            expert_map,
            candidates.ints,
            candidates.reals,
            *outputs,
            num_slots,
            num_experts,
            num_local_experts,
            fallback,
            BINS=bins,
            **align.one_launch(num_slots),
            **constants,
            **pdl.arguments(several=True),
        )
        return selected
    num_chunks, pieces = align.chunks_of(num_slots)
    count_and_fill_kernel[(num_chunks,)](
        topk_ids,
        expert_map,
        first.scratch,
        sorted_token_ids,
        pieces,
        num_slots,
        num_experts,
        num_local_experts,
        sorted_token_ids.numel(),
        PIECE=align.PIECE,
        BINS=bins,
        **align.overlap(num_chunks, several=True),
    )
    select_and_place_kernel[(num_chunks + 1,)](
        first.scratch,
        candidates.ints,
        candidates.reals,
        *outputs,
        num_chunks,
        pieces,
        num_slots,
        num_local_experts,
        fallback,
        BINS=bins,
        **align._placing(bins),
        **constants,
        **align.overlap(num_chunks, several=True),
    )
    return selected
