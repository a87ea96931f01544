"""One tile of the two GEMMs of the fused MoE layer: what a CTA of `gemm` does with an M block and an N tile.

In the first GEMM the `block_n` weight rows of a tile are block_n/2 gate rows and the block_n/2 up rows that belong
to them, interleaved so that a thread's accumulator holds both halves of each product: the activation then needs no second
tile, no exchange between threads and half the memory traffic of writing 2I columns. There is one `tl.dot` per step,
as in a plain GEMM.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803, N806

import triton
import triton.language as tl
from rampwrap.kernels.triton.align.by_expert import local_expert_ids
from rampwrap.kernels.triton.interpreter import downcast, operand
from rampwrap.kernels.triton.moe.activate import activate
from rampwrap.kernels.triton.quantise import quantise_by, quantise_groups


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
    scale_rows,
    split,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """x[rows] @ w[w_rows]^T in float32: [BLOCK_M, BLOCK_N], transposed if SWAP_AB; of SPLIT_K parts of K the one `split`.

    Block-scaled where `x_scale_ptr` is given and GROUP is not 0: BLOCK_K is then GROUP. Of 128, each half of the tile's
    weight rows lies in one scale block (`scale_rows` tells the halves apart), so a step costs two scalar loads; of fewer,
    each weight row has its row of scales there.
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

    first = 0
    end = tl.cdiv(K, BLOCK_K)
    if SPLIT_K > 1:
        first = split * tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
        end = tl.minimum(first + tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K), tl.cdiv(K, BLOCK_K))
        x_ptrs += first * BLOCK_K
        w_ptrs += first * BLOCK_K
    # Weights carry no mask where K is a multiple of BLOCK_K: plain 16-byte cp.async. Padding rows of x are
    # masked, which costs no traffic.
    for step in range(first, end):
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
        if x_scale_ptr is None or GROUP == 0:
            acc = tl.dot(w, x, acc) if SWAP_AB else tl.dot(x, w, acc)
        else:
            x_scale = tl.load(x_scale_ptr + rows.to(tl.int64) * (K // GROUP) + step, mask=row_mask, other=0.0)
            if GROUP == 128:
                low = tl.load(w_scale_low_ptr + step)
                high = tl.load(w_scale_high_ptr + step)
                w_scale = tl.where(scale_rows, high, low)
            else:
                w_scale = tl.load(w_scale_low_ptr + scale_rows * (K // GROUP) + step)
            if SWAP_AB:
                acc += tl.dot(w, x) * (w_scale[:, None] * x_scale[None, :])
            else:
                acc += tl.dot(x, w) * (x_scale[:, None] * w_scale[None, :])
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def scaled(
    acc,
    x_scale_ptr,
    rows,
    row_mask,
    w_scale_ptr,
    w_rows,
    CHANNELS: tl.constexpr,
    STATIC: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """A product of FP8 numbers, times the scale of each row of x and of each row of the weights, or one for all of either."""
    if STATIC:
        return acc * (tl.load(x_scale_ptr) * tl.load(w_scale_ptr))
    else:
        x_scale = tl.load(x_scale_ptr + rows, mask=row_mask, other=0.0)
        if CHANNELS:
            w_scale = tl.load(w_scale_ptr + w_rows)
            if SWAP_AB:
                return acc * (w_scale[:, None] * x_scale[None, :])
            else:
                return acc * (x_scale[:, None] * w_scale[None, :])
        else:
            scale = x_scale * tl.load(w_scale_ptr)
            if SWAP_AB:
                return acc * scale[None, :]
            else:
                return acc * scale[:, None]


@triton.jit
def up_tile(
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
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATIC: tl.constexpr,
    GELU_TANH: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
):
    """h[slot] = activate(x W_gate^T, x W_up^T) for the slots of one M block and BLOCK_N / 2 columns of h."""
    HALF_N: tl.constexpr = BLOCK_N // 2
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
    scale_rows = is_up == 1
    if w_scale_ptr is not None:
        if GROUP == 128:
            scale_row = expert_offset * (2 * INTERMEDIATE // 128) + tile * HALF_N // 128
            gate_scale_ptr = w_scale_ptr + scale_row * (HIDDEN // 128)
            up_scale_ptr = w_scale_ptr + (scale_row + INTERMEDIATE // 128) * (HIDDEN // 128)
        elif GROUP > 0:
            gate_scale_ptr = w_scale_ptr + expert_offset * ((2 * INTERMEDIATE // GROUP) * (HIDDEN // GROUP))
            scale_rows = w_rows // GROUP
    acc = multiply_tile(
        x_ptr,
        x_scale_ptr,
        slots // TOP_K,
        row_mask,
        w_ptr + expert_offset * (2 * INTERMEDIATE * HIDDEN),
        w_rows,
        gate_scale_ptr,
        up_scale_ptr,
        scale_rows,
        0,
        HIDDEN,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        1,
        SWAP_AB,
    )
    if w_scale_ptr is not None:  # noqa: SIM102
        if GROUP == 0:
            w_scale_ptr += expert_offset * (2 * INTERMEDIATE if CHANNELS else 1)
            acc = scaled(acc, x_scale_ptr, slots // TOP_K, row_mask, w_scale_ptr, w_rows, CHANNELS, STATIC, SWAP_AB)
    if SWAP_AB:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        h = tl.trans(tl.reshape(activate(gate, up, GELU_TANH, LIMIT, ALPHA, BETA), (HALF_N, BLOCK_M)))
    else:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, HALF_N, 2)))
        h = activate(gate, up, GELU_TANH, LIMIT, ALPHA, BETA)

    columns = tile * HALF_N + tl.arange(0, HALF_N)
    h_rows = slots.to(tl.int64) * INTERMEDIATE
    mask = row_mask[:, None]
    if INTERMEDIATE % HALF_N != 0:
        mask = mask & (columns < INTERMEDIATE)[None, :]
    if h_scale_ptr is None:
        tl.store(h_ptr + h_rows[:, None] + columns[None, :], downcast(h, h_ptr.dtype.element_ty), mask=mask)
    elif STATIC:
        q = quantise_by(downcast(h, tl.bfloat16).to(tl.float32), tl.load(h_scale_ptr), h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_rows[:, None] + columns[None, :], q, mask=mask)
    else:
        # HALF_N is one group. Rounded to bf16 first, as the configs do whose h passes through memory.
        q, scale = quantise_groups(downcast(h, tl.bfloat16).to(tl.float32), h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_rows[:, None] + columns[None, :], q, mask=mask)
        tl.store(h_scale_ptr + slots.to(tl.int64) * (INTERMEDIATE // GROUP) + tile, scale, mask=row_mask)


@triton.jit
def down_tile(
    block,
    tile,
    split,
    expert,
    y_ptr,
    h_ptr,
    h_scale_ptr,
    w_ptr,
    w_scale_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    num_slots,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATIC: tl.constexpr,
):
    """y[split, slot] = topk_weight[slot] * (h[slot] W_down^T) for one M block, BLOCK_N columns of y, a part of K."""
    slots = block_slots(block, sorted_token_ids_ptr, num_slots, BLOCK_M)
    row_mask = slots < num_slots

    j = tl.arange(0, BLOCK_N)
    w_rows = tile * BLOCK_N + j
    if HIDDEN % BLOCK_N != 0:
        w_rows = tl.minimum(w_rows, HIDDEN - 1)
    expert_offset = expert.to(tl.int64)
    low_scale_ptr = None
    high_scale_ptr = None
    scale_rows = j >= 128
    if w_scale_ptr is not None:
        if GROUP == 128:
            low_row = tile * BLOCK_N // 128
            high_row = low_row
            if BLOCK_N > 128:
                high_row = tl.minimum(low_row + 1, HIDDEN // 128 - 1)
            scale_base = w_scale_ptr + expert_offset * ((HIDDEN // 128) * (INTERMEDIATE // 128))
            low_scale_ptr = scale_base + low_row * (INTERMEDIATE // 128)
            high_scale_ptr = scale_base + high_row * (INTERMEDIATE // 128)
        elif GROUP > 0:
            low_scale_ptr = w_scale_ptr + expert_offset * ((HIDDEN // GROUP) * (INTERMEDIATE // GROUP))
            scale_rows = w_rows // GROUP
    acc = multiply_tile(
        h_ptr,
        h_scale_ptr,
        slots,
        row_mask,
        w_ptr + expert_offset * (HIDDEN * INTERMEDIATE),
        w_rows,
        low_scale_ptr,
        high_scale_ptr,
        scale_rows,
        split,
        INTERMEDIATE,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPLIT_K,
        SWAP_AB,
    )
    if w_scale_ptr is not None:  # noqa: SIM102
        if GROUP == 0:
            w_scale_ptr += expert_offset * (HIDDEN if CHANNELS else 1)
            acc = scaled(acc, h_scale_ptr, slots, row_mask, w_scale_ptr, w_rows, CHANNELS, STATIC, SWAP_AB)
    if SWAP_AB:
        acc = tl.trans(acc)
    weight = tl.load(topk_weights_ptr + slots, mask=row_mask, other=0.0).to(tl.float32)
    y = downcast(acc * weight[:, None], y_ptr.dtype.element_ty)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None]
    if HIDDEN % BLOCK_N != 0:
        mask = mask & (columns < HIDDEN)[None, :]
    y_rows = split * num_slots + slots.to(tl.int64)
    tl.store(y_ptr + y_rows[:, None] * HIDDEN + columns[None, :], y, mask=mask)
