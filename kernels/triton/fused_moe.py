"""The fused MoE layer: gate+up GEMM with SwiGLU in the epilogue, down GEMM with routing weights, sum over top-k.

Both GEMMs give each CTA one M block of one expert (see `align`) and `block_n` weight rows. In the first, these
are block_n/2 gate rows and the block_n/2 up rows that belong to them, interleaved so that a thread's
accumulator holds both halves of each product: SwiGLU then needs no second tile, no exchange between threads
and half the memory traffic of writing 2I columns. There is one `tl.dot` per step, as in a plain GEMM.

Launches of a layer: alignment, [quantise x], up, [quantise h], down, sum; up to `DIRECT_FACTOR` the alignment
is left out. Every grid is sized from capacity and CTAs past the last block leave at once, so nothing ever
waits for the host, and the whole layer can be captured in a CUDA graph.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803, N806

from collections.abc import Mapping
from typing import Any

import torch

import triton
import triton.language as tl
from rampwrap.grid import max_blocks
from rampwrap.kernels.triton.align import TokenBlocks, align_tokens, local_expert_ids
from rampwrap.kernels.triton.configs import quantises_h
from rampwrap.kernels.triton.interpreter import downcast, operand
from rampwrap.kernels.triton.quantise import quantise_groups, quantise_rows
from rampwrap.kernels.triton.workspace import Workspace, allocate

# With this many experts per slot two slots rarely share one: each slot is a block of its own, its expert
# read from topk_ids. An expert hit twice is read twice, the second time from L2: less than a launch costs.
DIRECT_FACTOR = 4


@triton.jit
def tile_of(pid, num_blocks, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(M block, N tile) of a CTA: N tiles first, or GROUP_M blocks side by side to share weights in L2."""
    if GROUP_M == 1:
        # Triton 3.6 compiles what follows a constexpr `if` that returns: hence the else, here and below.
        return pid // TILES_N, pid % TILES_N
    else:
        first = pid // (GROUP_M * TILES_N) * GROUP_M
        size = tl.minimum(num_blocks - first, GROUP_M)
        within = pid % (GROUP_M * TILES_N)
        return first + within % size, within // size


@triton.jit
def block_expert(block, expert_ids_ptr, topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts):
    """Expert of an M block; at least `num_local_experts` where it has none."""
    if expert_ids_ptr is None:
        return local_expert_ids(topk_ids_ptr, expert_map_ptr, block, num_slots, num_experts, num_local_experts)
    else:
        return tl.load(expert_ids_ptr + block)


@triton.jit
def block_slots(block, sorted_token_ids_ptr, num_slots, BLOCK_M: tl.constexpr):
    """Slots of an M block, `num_slots` for padding rows."""
    lane = tl.arange(0, BLOCK_M)
    if sorted_token_ids_ptr is None:
        return tl.where(lane == 0, block, num_slots)
    else:
        return tl.load(sorted_token_ids_ptr + block * BLOCK_M + lane)


@triton.jit
def multiply_tile(
    x_ptr,
    x_scale_ptr,
    rows,
    row_mask,
    w_ptr,
    w_rows,
    w_scale_low_ptr,
    w_scale_high_ptr,
    is_high,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """x[rows] @ w[w_rows]^T in float32: [BLOCK_M, BLOCK_N], transposed if SWAP_AB.

    Block-scaled where `x_scale_ptr` is given: BLOCK_K is then 128, and each half of the tile's weight rows
    lies in one 128-row scale block (`is_high` tells the halves apart), so a step costs two scalar loads.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    offs_k = tl.arange(0, BLOCK_K)
    # A slot times K passes 2^31 at 2M slots; rows of one expert's weights do not.
    x_rows = rows.to(tl.int64) * K
    if SWAP_AB:
        x_ptrs = x_ptr + x_rows[None, :] + offs_k[:, None]
        w_ptrs = w_ptr + (w_rows * K)[:, None] + offs_k[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        x_ptrs = x_ptr + x_rows[:, None] + offs_k[None, :]
        w_ptrs = w_ptr + (w_rows * K)[None, :] + offs_k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    # Weights carry no mask where K is a multiple of BLOCK_K: plain 16-byte cp.async. Padding rows of x are
    # masked, which costs no traffic.
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x_mask = row_mask[None, :] if SWAP_AB else row_mask[:, None]
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs)
        else:
            inside = offs_k < K - step * BLOCK_K
            if SWAP_AB:
                x = tl.load(x_ptrs, mask=row_mask[None, :] & inside[:, None], other=0.0)
                w = tl.load(w_ptrs, mask=inside[None, :], other=0.0)
            else:
                x = tl.load(x_ptrs, mask=row_mask[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        x, w = operand(x), operand(w)
        if x_scale_ptr is None:
            acc = tl.dot(w, x, acc) if SWAP_AB else tl.dot(x, w, acc)
        else:
            x_scale = tl.load(x_scale_ptr + rows.to(tl.int64) * (K // 128) + step, mask=row_mask, other=0.0)
            low = tl.load(w_scale_low_ptr + step)
            high = tl.load(w_scale_high_ptr + step)
            w_scale = tl.where(is_high, high, low)
            if SWAP_AB:
                acc += tl.dot(w, x) * (w_scale[:, None] * x_scale[None, :])
            else:
                acc += tl.dot(x, w) * (x_scale[:, None] * w_scale[None, :])
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


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
):
    """h[slot] = silu(x W_gate^T) * (x W_up^T) for the slots of one M block and BLOCK_N / 2 columns of h."""
    HALF_N: tl.constexpr = BLOCK_N // 2
    TILES_N: tl.constexpr = (INTERMEDIATE + HALF_N - 1) // HALF_N
    num_blocks = num_slots
    if num_tokens_post_padded_ptr is not None:
        num_blocks = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    if tl.program_id(0) >= num_blocks * TILES_N:
        return
    block, tile = tile_of(tl.program_id(0), num_blocks, TILES_N, GROUP_M)
    expert = block_expert(
        block, expert_ids_ptr, topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts
    )
    if expert >= num_local_experts:
        return
    slots = block_slots(block, sorted_token_ids_ptr, num_slots, BLOCK_M)
    row_mask = slots < num_slots

    # Weight row of each tile row. Gate and up alternate by one where columns are the accumulator's fast axis
    # (a thread holds pairs of columns), by eight where rows are (a thread holds rows r and r + 8).
    j = tl.arange(0, BLOCK_N)
    if SWAP_AB:
        is_up = (j // 8) % 2
        column = j // 16 * 8 + j % 8
    else:
        is_up = j % 2
        column = j // 2
    column = tile * HALF_N + column
    if INTERMEDIATE % HALF_N != 0:
        column = tl.minimum(column, INTERMEDIATE - 1)
    w_rows = is_up * INTERMEDIATE + column

    expert_offset = expert.to(tl.int64)
    gate_scale_ptr = None
    up_scale_ptr = None
    if w_scale_ptr is not None:
        scale_row = expert_offset * (2 * INTERMEDIATE // 128) + tile * HALF_N // 128
        gate_scale_ptr = w_scale_ptr + scale_row * (HIDDEN // 128)
        up_scale_ptr = w_scale_ptr + (scale_row + INTERMEDIATE // 128) * (HIDDEN // 128)
    acc = multiply_tile(
        x_ptr,
        x_scale_ptr,
        slots // TOP_K,
        row_mask,
        w_ptr + expert_offset * (2 * INTERMEDIATE * HIDDEN),
        w_rows,
        gate_scale_ptr,
        up_scale_ptr,
        is_up == 1,
        HIDDEN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP_AB,
    )
    if SWAP_AB:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        h = tl.trans(tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (HALF_N, BLOCK_M)))
    else:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, HALF_N, 2)))
        h = gate / (1.0 + tl.exp(-gate)) * up

    columns = tile * HALF_N + tl.arange(0, HALF_N)
    h_rows = slots.to(tl.int64) * INTERMEDIATE
    mask = row_mask[:, None]
    if INTERMEDIATE % HALF_N != 0:
        mask = mask & (columns < INTERMEDIATE)[None, :]
    if h_scale_ptr is None:
        tl.store(h_ptr + h_rows[:, None] + columns[None, :], downcast(h, h_ptr.dtype.element_ty), mask=mask)
    else:
        # HALF_N is one group. Rounded to bf16 first, as the configs do whose h passes through memory.
        q, scale = quantise_groups(downcast(h, tl.bfloat16).to(tl.float32), h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_rows[:, None] + columns[None, :], q, mask=mask)
        tl.store(h_scale_ptr + slots.to(tl.int64) * (INTERMEDIATE // 128) + tile, scale, mask=row_mask)


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
    SWAP_AB: tl.constexpr,
):
    """y[slot] = topk_weight[slot] * (h[slot] W_down^T) for the slots of one M block and BLOCK_N columns of y."""
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    num_blocks = num_slots
    if num_tokens_post_padded_ptr is not None:
        num_blocks = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    if tl.program_id(0) >= num_blocks * TILES_N:
        return
    block, tile = tile_of(tl.program_id(0), num_blocks, TILES_N, GROUP_M)
    expert = block_expert(
        block, expert_ids_ptr, topk_ids_ptr, expert_map_ptr, num_slots, num_experts, num_local_experts
    )
    if expert >= num_local_experts:
        return
    slots = block_slots(block, sorted_token_ids_ptr, num_slots, BLOCK_M)
    row_mask = slots < num_slots

    j = tl.arange(0, BLOCK_N)
    w_rows = tile * BLOCK_N + j
    if HIDDEN % BLOCK_N != 0:
        w_rows = tl.minimum(w_rows, HIDDEN - 1)
    expert_offset = expert.to(tl.int64)
    low_scale_ptr = None
    high_scale_ptr = None
    if w_scale_ptr is not None:
        low_row = tile * BLOCK_N // 128
        high_row = low_row
        if BLOCK_N > 128:
            high_row = tl.minimum(low_row + 1, HIDDEN // 128 - 1)
        scale_base = w_scale_ptr + expert_offset * ((HIDDEN // 128) * (INTERMEDIATE // 128))
        low_scale_ptr = scale_base + low_row * (INTERMEDIATE // 128)
        high_scale_ptr = scale_base + high_row * (INTERMEDIATE // 128)
    acc = multiply_tile(
        h_ptr,
        h_scale_ptr,
        slots,
        row_mask,
        w_ptr + expert_offset * (HIDDEN * INTERMEDIATE),
        w_rows,
        low_scale_ptr,
        high_scale_ptr,
        j >= 128,
        INTERMEDIATE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP_AB,
    )
    if SWAP_AB:
        acc = tl.trans(acc)
    weight = tl.load(topk_weights_ptr + slots, mask=row_mask, other=0.0).to(tl.float32)
    y = downcast(acc * weight[:, None], y_ptr.dtype.element_ty)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None]
    if HIDDEN % BLOCK_N != 0:
        mask = mask & (columns < HIDDEN)[None, :]
    tl.store(y_ptr + slots.to(tl.int64)[:, None] * HIDDEN + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["num_experts", "num_local_experts"])
def sum_kernel(
    out_ptr,
    y_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_experts,
    num_local_experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[token] = sum over its slots in order, float32; rows that no block wrote are not read."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = local_expert_ids(topk_ids_ptr, expert_map_ptr, slot, slot + 1, num_experts, num_local_experts)
        width = tl.where(expert < num_local_experts, HIDDEN, 0)
        y = tl.load(y_ptr + slot * HIDDEN + columns, mask=columns < width, other=0.0)
        total += y.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + columns, downcast(total, out_ptr.dtype.element_ty), mask=columns < HIDDEN)


def fused_moe(
    config: Mapping[str, Any],
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    blocks: TokenBlocks | None = None,
) -> torch.Tensor:
    """One MoE layer; arguments are taken as they are (the adapter checks them).

    Args:
        config: block_m, block_n, block_k, group_m, num_warps, num_stages, swap_ab.
        hidden_states: bf16 or fp16 [T, H]; quantised here where the weights are FP8.
        w13: [E, 2I, H], gate rows first.
        w2: [E, H, I].
        topk_weights: [T, top_k], any float type.
        topk_ids: int32 or int64 [T, top_k]; ids out of range contribute zero.
        w13_scale: float32 [E, 2I/128, H/128] with FP8 weights.
        w2_scale: float32 [E, H/128, I/128] with FP8 weights.
        expert_map: int32, local expert of each global one, -1 for experts of other ranks.
        out: [T, H], written and returned.
        workspace: from `workspace.allocate`, for a call that allocates nothing but an absent `out`.
        blocks: an alignment of these topk_ids with the config's block_m; made here where absent.
    """
    num_tokens, hidden = hidden_states.shape
    num_local_experts, _, intermediate = w2.shape
    top_k = topk_ids.shape[1]
    num_slots = num_tokens * top_k
    if out is None:
        out = torch.empty_like(hidden_states)
    if num_tokens == 0:
        return out
    num_experts = num_local_experts if expert_map is None else expert_map.numel()
    block_m, block_n = config["block_m"], config["block_n"]
    fp8 = w13_scale is not None
    if workspace is None:
        workspace = allocate(
            num_tokens, top_k, hidden, intermediate, hidden_states.dtype, fp8=fp8, device=hidden_states.device
        )

    direct = blocks is None and num_slots * DIRECT_FACTOR <= num_experts
    sorted_token_ids = expert_ids = post_padded = None
    if not direct:
        if blocks is None:
            blocks = align_tokens(
                topk_ids,
                block_m,
                num_local_experts,
                expert_map=expert_map,
                blocks=workspace.token_blocks(num_tokens, top_k, num_local_experts, block_m),
            )
        sorted_token_ids, expert_ids = blocks.sorted_token_ids, blocks.expert_ids
        post_padded = blocks.num_tokens_post_padded
    # With blocks of its own a slot needs topk_ids to find its expert; otherwise the blocks say it.
    grid_blocks = num_slots if direct else max_blocks(num_slots, num_local_experts, block_m)
    routing = (
        sorted_token_ids,
        expert_ids,
        post_padded,
        topk_ids if direct else None,
        expert_map if direct else None,
        num_slots,
        num_experts,
        num_local_experts,
    )
    tuning = tuning_arguments(config)

    x, x_scale, h, h_scale = hidden_states, None, workspace.h[:num_slots], None
    if fp8:
        assert workspace.x_fp8 is not None and workspace.x_scale is not None
        assert workspace.h_fp8 is not None and workspace.h_scale is not None
        x, x_scale = workspace.x_fp8[:num_tokens], workspace.x_scale[:num_tokens]
        quantise_rows(hidden_states, x, x_scale)
        h_scale = workspace.h_scale[:num_slots]
        if quantises_h(config):
            h = workspace.h_fp8[:num_slots]
    up_kernel[(grid_blocks * triton.cdiv(intermediate, block_n // 2),)](
        h,
        h_scale if fp8 and quantises_h(config) else None,
        x,
        x_scale,
        w13,
        w13_scale,
        *routing,
        TOP_K=top_k,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **tuning,
    )
    if fp8 and not quantises_h(config):
        assert workspace.h_fp8 is not None and h_scale is not None
        # Rows of slots without a local expert hold whatever was there; nothing reads what becomes of them.
        quantise_rows(h, workspace.h_fp8[:num_slots], h_scale)
        h = workspace.h_fp8[:num_slots]
    y = workspace.y[:num_slots]
    down_kernel[(grid_blocks * triton.cdiv(hidden, block_n),)](
        y,
        h,
        h_scale,
        w2,
        w2_scale,
        topk_weights,
        *routing,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **tuning,
    )
    block_h = min(1024, triton.next_power_of_2(hidden))
    sum_kernel[(num_tokens, triton.cdiv(hidden, block_h))](
        out,
        y,
        topk_ids,
        expert_map,
        num_experts,
        num_local_experts,
        TOP_K=top_k,
        HIDDEN=hidden,
        BLOCK_H=block_h,
    )
    return out


def tuning_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as keyword arguments of `up_kernel` and `down_kernel`."""
    return {
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "BLOCK_K": config["block_k"],
        "GROUP_M": config["group_m"],
        "SWAP_AB": config["swap_ab"],
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
