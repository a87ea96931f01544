"""GPU token alignment: expert ids of a batch -> M blocks of one expert each, with no host sync.

The contract is the one every fused-MoE kernel here reads. With n = num_tokens * top_k slots:
`sorted_token_ids` holds the slots of each expert, experts ascending, each expert padded to a multiple of
`block_m` with the sentinel n, and n again up to the capacity; `expert_ids[b]` names the expert of block b;
`num_tokens_post_padded` is the number of rows in blocks. Slots whose id is out of range, or on another
rank by `expert_map`, take no row. Order inside an expert is the slot order: same ids, same result.

Two paths with the same result, no atomics in any:

* ``expert``, one launch: CTA e reads all ids, makes the whole histogram in registers, and places the slots
  of expert e. The CTAs exchange nothing, so there is no second launch to wait for (about 2 us each inside
  a CUDA graph); the price is that the ids are read once per expert, from L2.
* ``chunks``, two launches: at most 128 CTAs count a chunk of slots each and fill the result with sentinels; then each
  adds up the histograms before its own and places its chunk (`chunk_kernels`).
"""

from typing import Any

import attrs
import torch

import triton
from rampwrap.errors import InputError
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align.by_expert import align_by_expert_kernel
from rampwrap.kernels.triton.align.chunks import count_and_fill_kernel, place_kernel

PATHS = ("expert", "chunks")
# The one-launch path does num_slots * num_experts work, and each CTA holds the ids of all slots in registers: 16 a thread
# for 4096. One after the other, eight times as many were measured to cost 34 us, where a second launch costs 2.
BY_EXPERT_MAX_SLOTS = 4096
BY_EXPERT_MAX_WORK = 1 << 19
# Slots that are ranked by comparing all with all, in registers: 256 compares a thread, about 1 us.
PIECE = 256
# CTAs of the two-launch path at the most: each reads as many histograms, 128 KB of 128 for 256 experts.
MAX_CHUNKS = 128
# CTAs up to which the two launches overlap. CTAs that start early fill the SMs that are free, several on one, and then run
# so: with 128 two launches took 15-29 us instead of 11, with 64 they took 8.6 instead of 9.5.
MOST_OVERLAPPING = 64
# Experts up to which the two-launch path sorts them: all pairs, 64 comparisons a thread of 256.
MOST_SORTED = 128
# Every part of the memory starts at a multiple of 16 bytes: Triton compiles another kernel for one that does not,
# and would do so under capture.
ALIGNED = 4


@attrs.frozen
class TokenBlocks:
    """The tokens of a batch cut into M blocks, on the device, and the scratch memory of cutting them.

    All tensors are int32. `num_slots` and `block_m` say for which batch size and block size they are laid out.
    """

    num_slots: int
    block_m: int
    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor
    expert_counts: torch.Tensor
    scratch: torch.Tensor
    "Histograms of chunks and local ids."


def alignment_capacity(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """Length of `sorted_token_ids` that any routing fits in; `num_experts` are those of this rank."""
    num_slots = num_tokens * top_k
    return min(num_slots + num_experts * (block_m - 1), num_slots * block_m)


def alignment_ints(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """int32 values that back the `TokenBlocks` of a batch, for this block_m and every smaller one."""
    num_slots = num_tokens * top_k
    # Smaller blocks need fewer rows but more block ids: at most one a row, and at most one more an expert
    # than the slots fill at block_m = 1.
    rows = alignment_capacity(num_tokens, top_k, num_experts, block_m)
    return rows + num_slots + num_experts + 5 * ALIGNED + _scratch_ints(num_slots, num_experts)


def blocks_in(memory: torch.Tensor, num_tokens: int, top_k: int, num_experts: int, block_m: int) -> TokenBlocks:
    """`TokenBlocks` laid out in int32 memory of at least `alignment_ints(...)` values."""
    num_slots = num_tokens * top_k
    rows = alignment_capacity(num_tokens, top_k, num_experts, block_m)
    lengths = (rows, triton.cdiv(rows, block_m), 1, num_experts, _scratch_ints(num_slots, num_experts))
    sizes = [triton.cdiv(length, ALIGNED) * ALIGNED for length in lengths]
    if sum(sizes) > memory.numel():
        raise InputError(
            f"The alignment of {num_tokens} tokens x top-{top_k} at block_m={block_m} needs {sum(sizes)} int32 values, "
            f"the workspace has {memory.numel()}; allocate it for a larger batch."
        )
    parts = memory[: sum(sizes)].split(sizes)  # type: ignore[no-untyped-call]
    return TokenBlocks(num_slots, block_m, *(part[:length] for part, length in zip(parts, lengths, strict=True)))


def allocate_blocks(
    num_tokens: int, top_k: int, num_experts: int, block_m: int, device: torch.device | str
) -> TokenBlocks:
    """Empty `TokenBlocks` for `align_tokens`; `num_experts` are those of this rank."""
    ints = alignment_ints(num_tokens, top_k, num_experts, block_m)
    memory = torch.empty(ints, dtype=torch.int32, device=device)
    return blocks_in(memory, num_tokens, top_k, num_experts, block_m)


def align_tokens(
    topk_ids: torch.Tensor,
    block_m: int,
    num_local_experts: int,
    *,
    expert_map: torch.Tensor | None = None,
    blocks: TokenBlocks | None = None,
    path: str | None = None,
) -> TokenBlocks:
    """Cuts the slots of `topk_ids` into M blocks of `block_m` rows of one expert each.

    Args:
        topk_ids: int32 or int64 [num_tokens, top_k], contiguous.
        block_m: rows of a block, any number of at least 1.
        num_local_experts: experts whose weights are here. Without a map, ids at or above it take no row.
        expert_map: int32 [num_experts], local expert of each global one, -1 for experts elsewhere.
        blocks: memory from `allocate_blocks`, for a call that allocates nothing.
        path: one of `PATHS`; the one that is expected to be fastest where absent.

    Returns:
        `blocks`, filled; its order inside an expert is the slot order.
    """
    if topk_ids.dim() != 2 or topk_ids.dtype not in (torch.int32, torch.int64) or not topk_ids.is_contiguous():
        raise InputError(
            f"topk_ids is {topk_ids.dtype} of shape {tuple(topk_ids.shape)}; give contiguous int32 or int64 [num_tokens, top_k]."
        )
    if block_m < 1 or num_local_experts < 1:
        raise InputError(f"block_m={block_m} and num_local_experts={num_local_experts}; give numbers of at least 1.")
    num_tokens, top_k = topk_ids.shape
    num_slots = num_tokens * top_k
    if blocks is None:
        blocks = allocate_blocks(num_tokens, top_k, num_local_experts, block_m, topk_ids.device)
    elif (blocks.num_slots, blocks.block_m, blocks.expert_counts.numel()) != (num_slots, block_m, num_local_experts):
        raise InputError(
            f"The blocks are laid out for {blocks.num_slots} slots of block_m={blocks.block_m} and "
            f"{blocks.expert_counts.numel()} experts, not {num_slots}, {block_m} and {num_local_experts}; "
            "call allocate_blocks for this batch."
        )
    if num_slots == 0:
        blocks.num_tokens_post_padded.zero_()
        blocks.expert_counts.zero_()
        return blocks
    num_experts = num_local_experts if expert_map is None else expert_map.numel()
    capacity = blocks.sorted_token_ids.numel()
    bins = histogram_bins(num_local_experts)
    path = _path(num_slots, num_local_experts, path)
    if path == "expert":
        align_by_expert_kernel[(num_local_experts,)](
            topk_ids,
            expert_map,
            blocks.sorted_token_ids,
            blocks.expert_ids,
            blocks.num_tokens_post_padded,
            blocks.expert_counts,
            num_slots,
            num_experts,
            num_local_experts,
            block_m,
            capacity,
            BINS=bins,
            **one_launch(num_slots),
            **pdl.arguments(),
        )
        return blocks
    num_chunks, pieces = chunks_of(num_slots)
    count_and_fill_kernel[(num_chunks,)](
        topk_ids,
        expert_map,
        blocks.scratch,
        blocks.sorted_token_ids,
        pieces,
        num_slots,
        num_experts,
        num_local_experts,
        capacity,
        PIECE=PIECE,
        BINS=bins,
        **overlap(num_chunks),
    )
    place_chunks(blocks, num_local_experts)
    return blocks


def place_chunks(blocks: TokenBlocks, num_local_experts: int, *, widest_first: bool = False) -> None:
    """The second launch of path ``chunks``, behind one that has counted and filled as `chunks.count_and_fill` does.

    With `widest_first` experts stand by their counts, the largest first, where a CTA's registers hold all pairs of them.
    """
    num_chunks, pieces = chunks_of(blocks.num_slots)
    bins = histogram_bins(num_local_experts)
    place_kernel[(num_chunks,)](
        blocks.scratch,
        blocks.sorted_token_ids,
        blocks.expert_ids,
        blocks.num_tokens_post_padded,
        blocks.expert_counts,
        num_chunks,
        pieces,
        blocks.num_slots,
        num_local_experts,
        blocks.block_m,
        BINS=bins,
        WIDEST_FIRST=widest_first and bins <= MOST_SORTED,
        **_placing(bins),
        **overlap(num_chunks),
    )


def _path(num_slots: int, num_local_experts: int, asked: str | None) -> str:
    if asked is not None:
        if asked not in PATHS:
            raise InputError(f"path {asked!r} is unknown; use one of {', '.join(PATHS)}.")
        if asked == "expert" and num_slots > BY_EXPERT_MAX_SLOTS:
            raise InputError(
                f"path 'expert' aligns {BY_EXPERT_MAX_SLOTS} slots, this batch has {num_slots}; use chunks."
            )
        return asked
    return "expert" if fits_one_launch(num_slots, num_local_experts) else "chunks"


def fits_one_launch(num_slots: int, num_local_experts: int) -> bool:
    """Whether path ``expert`` is the fastest."""
    return num_slots <= BY_EXPERT_MAX_SLOTS and num_slots * num_local_experts <= BY_EXPERT_MAX_WORK


def one_launch(num_slots: int) -> dict[str, int]:
    """Constants of the kernels of path ``expert``, and of others that align so."""
    chunk = min(4096, max(256, triton.next_power_of_2(num_slots)))
    return {"CHUNK": chunk, "num_warps": 8 if chunk > 1024 else 4}


def chunks_of(num_slots: int) -> tuple[int, int]:
    """CTAs of path ``chunks``, and pieces of `PIECE` slots that each places."""
    pieces = triton.cdiv(num_slots, PIECE * MAX_CHUNKS)
    return int(triton.cdiv(num_slots, PIECE * pieces)), int(pieces)


def overlap(num_chunks: int, several: bool = False) -> dict[str, Any]:
    """`pdl.arguments` for the launches of path ``chunks``."""
    return pdl.arguments(several) if num_chunks <= MOST_OVERLAPPING else pdl.WITHOUT


def _placing(bins: int) -> dict[str, int]:
    """Constants of the second launch of path ``chunks``: 16 sums a thread, 32 blocks at a time."""
    return {"PIECE": PIECE, "ROWS": max(4, 4096 // bins), "IDS": 32, "TILE": min(64, PIECE), "num_warps": 8}


def histogram_bins(num_local_experts: int) -> int:
    # Triton's histogram wants a power of two.
    return max(32, int(triton.next_power_of_2(num_local_experts)))


def _scratch_ints(num_slots: int, num_local_experts: int) -> int:
    if not num_slots:
        return 0
    bins, pieces = histogram_bins(num_local_experts), int(triton.cdiv(num_slots, PIECE))
    # The most chunks, not those of `chunks_of`, which fall where a chunk gets one more piece: memory for a batch must
    # hold every smaller one.
    num_chunks, padded = min(MAX_CHUNKS, pieces), pieces * PIECE
    return num_chunks * bins + padded
