"""GPU token alignment: expert ids of a batch -> M blocks of one expert each, with no host sync.

The contract is the one every fused-MoE kernel here reads. With n = num_tokens * top_k slots:
`sorted_token_ids` holds the slots of each expert, experts ascending, each expert padded to a multiple of
`block_m` with the sentinel n, and n again up to the capacity; `expert_ids[b]` names the expert of block b;
`num_tokens_post_padded` is the number of rows in blocks. Slots whose id is out of range, or on another
rank by `expert_map`, take no row. Order inside an expert is the slot order: same ids, same result.

Two paths, no atomics in either:

* by expert, one launch: CTA e reads all ids, makes the whole histogram in registers, and places the slots
  of expert e. The CTAs exchange nothing, so there is no second launch to wait for (about 2 us each inside
  a CUDA graph); the price is that the ids are read once per expert, from L2.
* by chunk, three launches: count each chunk, scan over chunks, place each chunk. Reads the ids twice.

`block_m` is a runtime argument throughout, so that a kernel that chooses it on the device can reuse the
`@triton.jit` helpers as they are: `expert_histogram`, then `place_expert` with the chosen block_m.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import attrs
import torch

import triton
import triton.language as tl
from rampwrap.errors import InputError

# The one-launch path does num_slots * num_experts work and each CTA walks all slots one chunk after the other.
# Both limits are estimates: 8 chunks of 4096 slots are about 7 us, as much as three launches cost.
BY_EXPERT_MAX_SLOTS = 32_768
BY_EXPERT_MAX_WORK = 1 << 22
# Slots of one CTA in the three-launch path. Placing costs chunk^2 compares, 1024 a thread at 256 threads: about 2 us.
CHUNK_SLOTS = 512
# Experts whose columns one CTA of the scan handles.
SCAN_EXPERTS = 32


@triton.jit
def local_expert_ids(
    topk_ids_ptr,
    expert_map_ptr,
    offsets,
    num_slots,
    num_experts,
    num_local_experts,
):
    """Local expert of each slot as int32; `num_local_experts` for slots that take no row."""
    ids = tl.load(topk_ids_ptr + offsets, mask=offsets < num_slots, other=-1)
    # Compared in the ids' own width: an int64 id of 2^32 is out of range, not expert 0.
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map_ptr is not None:
        ids = tl.load(expert_map_ptr + ids, mask=valid, other=-1)
        valid = (ids >= 0) & (ids < num_local_experts)
    return tl.where(valid, ids, num_local_experts).to(tl.int32)


@triton.jit
def expert_histogram(
    topk_ids_ptr,
    expert_map_ptr,
    first_slot,
    end_slot,
    num_slots,
    num_experts,
    num_local_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Slots of each local expert among slots [first_slot, end_slot), int32 [BINS]; BINS > num_local_experts."""
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(first_slot, end_slot, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, offsets, num_slots, num_experts, num_local_experts)
        counts += tl.histogram(ids, BINS)
    # The bin after the last expert collected the slots that take no row.
    return tl.where(tl.arange(0, BINS) < num_local_experts, counts, 0)


@triton.jit
def fill(ptr, first, end, value, step, TILE: tl.constexpr):
    """ptr[i] = value for the TILE-wide pieces of [first, end) that start at first, first + step, ..."""
    lane = tl.arange(0, TILE)
    for start in range(first, end, step):
        offsets = start + lane
        tl.store(ptr + offsets, tl.full((TILE,), 0, tl.int32) + value, mask=offsets < end)


@triton.jit
def place_expert(
    expert,
    counts,
    block_m,
    capacity,
    num_programs,
    topk_ids_ptr,
    expert_map_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Writes the blocks of one expert, and this CTA's share of the sentinels after the last block."""
    bins = tl.arange(0, BINS)
    blocks = (counts + block_m - 1) // block_m
    post_padded = tl.sum(blocks, 0) * block_m
    first_block = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    own_blocks = tl.sum(tl.where(bins == expert, blocks, 0), 0)
    base = first_block * block_m

    placed = 0
    for start in range(0, num_slots, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, offsets, num_slots, num_experts, num_local_experts)
        mine = (ids == expert).to(tl.int32)
        before = tl.cumsum(mine, 0) - mine
        tl.store(sorted_token_ids_ptr + base + placed + before, offsets, mask=mine != 0)
        placed += tl.sum(mine, 0)

    fill(sorted_token_ids_ptr, base + placed, base + own_blocks * block_m, num_slots, 128, 128)
    fill(expert_ids_ptr, first_block, first_block + own_blocks, expert, 128, 128)
    fill(sorted_token_ids_ptr, post_padded + expert * 256, capacity, num_slots, num_programs * 256, 256)
    if expert == 0:
        tl.store(num_tokens_post_padded_ptr, post_padded)
        tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "block_m", "capacity"])
def align_by_expert_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    block_m,
    capacity,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """The whole alignment in one launch of num_local_experts CTAs."""
    counts = expert_histogram(
        topk_ids_ptr, expert_map_ptr, 0, num_slots, num_slots, num_experts, num_local_experts, CHUNK, BINS
    )
    place_expert(
        tl.program_id(0),
        counts,
        block_m,
        capacity,
        tl.num_programs(0),
        topk_ids_ptr,
        expert_map_ptr,
        sorted_token_ids_ptr,
        expert_ids_ptr,
        num_tokens_post_padded_ptr,
        expert_counts_ptr,
        num_slots,
        num_experts,
        num_local_experts,
        CHUNK,
        BINS,
    )


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def count_chunks_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    chunk_counts_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """chunk_counts[chunk, BINS]: the histogram of each chunk of slots."""
    first = tl.program_id(0) * CHUNK
    counts = expert_histogram(
        topk_ids_ptr, expert_map_ptr, first, first + 1, num_slots, num_experts, num_local_experts, CHUNK, BINS
    )
    row = tl.program_id(0).to(tl.int64) * BINS
    tl.store(chunk_counts_ptr + row + tl.arange(0, BINS), counts)


@triton.jit
def sum_chunks(chunk_counts_ptr, num_chunks, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The histogram of all slots from those of the chunks."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, num_chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = tl.load(
            chunk_counts_ptr + rows[:, None].to(tl.int64) * BINS + bins[None, :],
            mask=(rows < num_chunks)[:, None],
            other=0,
        )
        counts += tl.sum(tile, 0)
    return counts


@triton.jit(do_not_specialize=["num_chunks", "num_slots", "num_local_experts", "block_m"])
def scan_chunks_kernel(
    chunk_counts_ptr,
    chunk_offsets_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_chunks,
    num_slots,
    num_local_experts,
    block_m,
    BINS: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """chunk_offsets[chunk, BINS]: row of each chunk's first slot of each expert; and the pads of OWN experts."""
    bins = tl.arange(0, BINS)
    counts = sum_chunks(chunk_counts_ptr, num_chunks, BINS, ROWS)
    blocks = (counts + block_m - 1) // block_m
    ends = tl.cumsum(blocks, 0)

    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    is_own = own[:, None] == bins[None, :]
    own_counts = tl.sum(tl.where(is_own, counts[None, :], 0), 1)
    own_blocks = tl.sum(tl.where(is_own, blocks[None, :], 0), 1)
    own_first = tl.sum(tl.where(is_own, (ends - blocks)[None, :], 0), 1)
    base = own_first * block_m

    placed = tl.zeros((OWN,), dtype=tl.int32)
    for start in range(0, num_chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * BINS + own[None, :]
        inside = (rows < num_chunks)[:, None] & (own < BINS)[None, :]
        tile = tl.load(chunk_counts_ptr + at, mask=inside, other=0)
        before = tl.cumsum(tile, 0) - tile
        tl.store(chunk_offsets_ptr + at, (base + placed)[None, :] + before, mask=inside)
        placed += tl.sum(tile, 0)

    lane = tl.arange(0, 32)
    pads = own_blocks * block_m - own_counts
    for start in range(0, tl.max(pads, 0), 32):
        at = start + lane
        tl.store(
            sorted_token_ids_ptr + (base + own_counts)[:, None] + at[None, :],
            tl.zeros((OWN, 32), tl.int32) + num_slots,
            mask=at[None, :] < pads[:, None],
        )
    for start in range(0, tl.max(own_blocks, 0), 32):
        at = start + lane
        tl.store(
            expert_ids_ptr + own_first[:, None] + at[None, :],
            tl.zeros((OWN, 32), tl.int32) + own[:, None],
            mask=at[None, :] < own_blocks[:, None],
        )
    if tl.program_id(0) == 0:
        tl.store(num_tokens_post_padded_ptr, tl.sum(blocks, 0) * block_m)
        tl.store(expert_counts_ptr + bins, counts, mask=bins < num_local_experts)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "capacity"])
def place_chunks_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    chunk_offsets_ptr,
    sorted_token_ids_ptr,
    num_tokens_post_padded_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    capacity,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Places the slots of one chunk; the rank inside the chunk is a count of equal ids before the slot."""
    chunk = tl.program_id(0)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, offsets, num_slots, num_experts, num_local_experts)
    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, COLUMNS):
        others = start + tl.arange(0, COLUMNS)
        other_ids = local_expert_ids(topk_ids_ptr, expert_map_ptr, others, num_slots, num_experts, num_local_experts)
        same = (ids[:, None] == other_ids[None, :]) & (others[None, :] < offsets[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    valid = ids < num_local_experts
    first = tl.load(chunk_offsets_ptr + chunk.to(tl.int64) * BINS + ids, mask=valid, other=0)
    tl.store(sorted_token_ids_ptr + first + rank, offsets, mask=valid)
    fill(
        sorted_token_ids_ptr,
        tl.load(num_tokens_post_padded_ptr) + chunk * 256,
        capacity,
        num_slots,
        tl.num_programs(0) * 256,
        256,
    )


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
    "Empty where one launch does it all."


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
    return rows + num_slots + num_experts + 4 + _scratch_ints(num_slots, num_experts)


def blocks_in(memory: torch.Tensor, num_tokens: int, top_k: int, num_experts: int, block_m: int) -> TokenBlocks:
    """`TokenBlocks` laid out in int32 memory of at least `alignment_ints(...)` values."""
    num_slots = num_tokens * top_k
    rows = alignment_capacity(num_tokens, top_k, num_experts, block_m)
    sizes = (rows, triton.cdiv(rows, block_m), 1, num_experts, _scratch_ints(num_slots, num_experts))
    if sum(sizes) > memory.numel():
        raise InputError(
            f"The alignment of {num_tokens} tokens x top-{top_k} at block_m={block_m} needs {sum(sizes)} int32 values, "
            f"the workspace has {memory.numel()}; allocate it for a larger batch."
        )
    # The rows come first: they are read in 16-byte pieces, and only offset 0 is sure to be aligned.
    sorted_token_ids, expert_ids, post_padded, counts, scratch = memory[: sum(sizes)].split(sizes)
    return TokenBlocks(num_slots, block_m, sorted_token_ids, expert_ids, post_padded, counts, scratch)


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
) -> TokenBlocks:
    """Cuts the slots of `topk_ids` into M blocks of `block_m` rows of one expert each.

    Args:
        topk_ids: int32 or int64 [num_tokens, top_k], contiguous.
        block_m: rows of a block, any number of at least 1.
        num_local_experts: experts whose weights are here. Without a map, ids at or above it take no row.
        expert_map: int32 [num_experts], local expert of each global one, -1 for experts elsewhere.
        blocks: memory from `allocate_blocks`, for a call that allocates nothing.

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
    bins = _bins(num_local_experts)
    if _by_expert(num_slots, num_local_experts):
        chunk = 256 if num_slots <= 256 else 1024 if num_slots <= 1024 else 4096
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
            CHUNK=chunk,
            BINS=bins,
            num_warps=8 if chunk == 4096 else 4,
        )
        return blocks
    num_chunks = triton.cdiv(num_slots, CHUNK_SLOTS)
    chunk_counts, chunk_offsets = blocks.scratch[: num_chunks * bins], blocks.scratch[num_chunks * bins :]
    count_chunks_kernel[(num_chunks,)](
        topk_ids, expert_map, chunk_counts, num_slots, num_experts, num_local_experts, CHUNK=CHUNK_SLOTS, BINS=bins
    )
    scan_chunks_kernel[(triton.cdiv(num_local_experts, SCAN_EXPERTS),)](
        chunk_counts,
        chunk_offsets,
        blocks.sorted_token_ids,
        blocks.expert_ids,
        blocks.num_tokens_post_padded,
        blocks.expert_counts,
        num_chunks,
        num_slots,
        num_local_experts,
        block_m,
        BINS=bins,
        OWN=SCAN_EXPERTS,
        ROWS=8,
    )
    place_chunks_kernel[(num_chunks,)](
        topk_ids,
        expert_map,
        chunk_offsets,
        blocks.sorted_token_ids,
        blocks.num_tokens_post_padded,
        num_slots,
        num_experts,
        num_local_experts,
        capacity,
        CHUNK=CHUNK_SLOTS,
        BINS=bins,
        COLUMNS=8,  # 32 spills
        num_warps=8,
    )
    return blocks


def _by_expert(num_slots: int, num_local_experts: int) -> bool:
    return num_slots <= BY_EXPERT_MAX_SLOTS and num_slots * num_local_experts <= BY_EXPERT_MAX_WORK


def _bins(num_local_experts: int) -> int:
    # One more than the experts, for the slots that take no row; Triton's histogram wants a power of two.
    return max(32, triton.next_power_of_2(num_local_experts + 1))


def _scratch_ints(num_slots: int, num_local_experts: int) -> int:
    if _by_expert(num_slots, num_local_experts):
        return 0
    return 2 * triton.cdiv(num_slots, CHUNK_SLOTS) * _bins(num_local_experts)
