"""The launches of the fused MoE layer besides alignment: gate+up GEMM, down GEMM, sum over top-k.

Both GEMMs cut the work into tiles of one M block of one expert (see `align`) and `block_n` weight rows. A CTA
computes one tile of a grid sized from capacity, and leaves at once past the last block; or, PERSISTENT, the tiles
that start at its index and go on in steps of the grid, so that a launch without work is as short as its grid.
Both run the same code on a tile, so both give the same bits.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803, N806

import triton
import triton.language as tl
from rampwrap.kernels.triton.align.by_expert import local_expert_ids
from rampwrap.kernels.triton.interpreter import downcast
from rampwrap.kernels.triton.moe.tiles import block_expert, down_tile, tile_of, up_tile
from rampwrap.kernels.triton.pdl import wait_for_launch_before


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def up_kernel(
    h_ptr,
    h_scale_ptr,
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATIC: tl.constexpr,
    GELU_TANH: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The gate+up GEMM and the activation, one `up_tile` a CTA, or in turn."""
    wait_for_launch_before(PDL)
    TILES_N: tl.constexpr = (INTERMEDIATE + BLOCK_N // 2 - 1) // (BLOCK_N // 2)
    num_blocks = num_slots
    if num_tokens_post_padded_ptr is not None:
        num_blocks = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    if PERSISTENT:
        # Only behind an alignment: every block has an expert.
        for index in range(tl.program_id(0), num_blocks * TILES_N, tl.num_programs(0)):
            block, tile = tile_of(index, num_blocks, TILES_N, GROUP_M)
            up_tile(
                block,
                tile,
                tl.load(expert_ids_ptr + block),
                h_ptr,
                h_scale_ptr,
                x_ptr,
                x_scale_ptr,
                w_ptr,
                w_scale_ptr,
                sorted_token_ids_ptr,
                num_slots,
                TOP_K,
                HIDDEN,
                INTERMEDIATE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SWAP_AB,
                GROUP,
                CHANNELS,
                STATIC,
                GELU_TANH,
                LIMIT,
                ALPHA,
                BETA,
            )
    else:
        if tl.program_id(0) >= num_blocks * TILES_N:
            return
        block, tile = tile_of(tl.program_id(0), num_blocks, TILES_N, GROUP_M)
        expert = block_expert(
            block, expert_ids_ptr, topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts
        )
        if expert >= num_local_experts:
            return
        up_tile(
            block,
            tile,
            expert,
            h_ptr,
            h_scale_ptr,
            x_ptr,
            x_scale_ptr,
            w_ptr,
            w_scale_ptr,
            sorted_token_ids_ptr,
            num_slots,
            TOP_K,
            HIDDEN,
            INTERMEDIATE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SWAP_AB,
            GROUP,
            CHANNELS,
            STATIC,
            GELU_TANH,
            LIMIT,
            ALPHA,
            BETA,
        )


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def down_kernel(
    y_ptr,
    h_ptr,
    h_scale_ptr,
    w_ptr,
    w_scale_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATIC: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The down GEMM, one `down_tile` a CTA, or in turn; the SPLIT_K parts of a tile stand side by side."""
    wait_for_launch_before(PDL)
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    num_blocks = num_slots
    if num_tokens_post_padded_ptr is not None:
        num_blocks = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    if PERSISTENT:
        for index in range(tl.program_id(0), num_blocks * TILES_N * SPLIT_K, tl.num_programs(0)):
            block, tile = tile_of(index // SPLIT_K, num_blocks, TILES_N, GROUP_M)
            down_tile(
                block,
                tile,
                index % SPLIT_K,
                tl.load(expert_ids_ptr + block),
                y_ptr,
                h_ptr,
                h_scale_ptr,
                w_ptr,
                w_scale_ptr,
                topk_weights_ptr,
                sorted_token_ids_ptr,
                num_slots,
                HIDDEN,
                INTERMEDIATE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SPLIT_K,
                SWAP_AB,
                GROUP,
                CHANNELS,
                STATIC,
            )
    else:
        if tl.program_id(0) >= num_blocks * TILES_N * SPLIT_K:
            return
        block, tile = tile_of(tl.program_id(0) // SPLIT_K, num_blocks, TILES_N, GROUP_M)
        expert = block_expert(
            block, expert_ids_ptr, topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts
        )
        if expert >= num_local_experts:
            return
        down_tile(
            block,
            tile,
            tl.program_id(0) % SPLIT_K,
            expert,
            y_ptr,
            h_ptr,
            h_scale_ptr,
            w_ptr,
            w_scale_ptr,
            topk_weights_ptr,
            sorted_token_ids_ptr,
            num_slots,
            HIDDEN,
            INTERMEDIATE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLIT_K,
            SWAP_AB,
            GROUP,
            CHANNELS,
            STATIC,
        )


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def sum_kernel(
    out_ptr,
    y_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    choice_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPLIT_OF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[token] = sum over its slots in order and the splits of each, float32; rows that no block wrote are not read.

    With `choice_ptr` the splits are those of candidate choice[0], four bits each in SPLIT_OF, at most SPLIT_K.
    """
    wait_for_launch_before(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    splits = SPLIT_K
    if choice_ptr is not None:
        splits = (tl.full((), SPLIT_OF, tl.int32) >> (tl.load(choice_ptr) * 4)) & 15
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = local_expert_ids(topk_ids_ptr, expert_map_ptr, slot, slot + 1, num_experts, num_local_experts)
        for split in tl.static_range(SPLIT_K):
            width = tl.where((expert < num_local_experts) & (split < splits), HIDDEN, 0)
            y = tl.load(y_ptr + (split * num_slots + slot) * HIDDEN + columns, mask=columns < width, other=0.0)
            total += y.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + columns, downcast(total, out_ptr.dtype.element_ty), mask=columns < HIDDEN)
