"""Rows for grouped GEMMs that take each expert's tokens in one piece: into rows, through the activation, and back.

A grouped GEMM that knows nothing of routing wants a matrix whose rows lie by expert. `place` says where the row of each
slot lies, after an alignment (`align`) with the same block_m; `scatter` quantises each token once and writes it to its rows;
`activate` is SwiGLU and requantisation between the two GEMMs; `combine` adds up a token's rows with its routing weights.
Rows that no slot has are neither written nor read. No atomics, no host sync: the order inside an expert is the slot order.

The layouts are DeepGEMM's three:

    contiguous  experts one after the other, each padded to block_m; the layout names the expert of each row, -1 for padding
    psum        the same rows; the layout holds the end of each expert's rows
    masked      expert e's rows begin at e * block_m, so that block_m is the most that an expert gets; the layout counts them
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

from typing import Any

import attrs
import torch

import triton
import triton.language as tl
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align.by_expert import local_expert_ids
from rampwrap.kernels.triton.align.host import TokenBlocks, histogram_bins
from rampwrap.kernels.triton.interpreter import downcast
from rampwrap.kernels.triton.pdl import wait_for_launch_before
from rampwrap.kernels.triton.quantise import quantise_groups

LAYOUTS = CONTIGUOUS, PSUM, MASKED = ("contiguous", "psum", "masked")
UNITS = 16
"Groups of 128 columns of a CTA that scatters or activates: 16 values a thread."


@attrs.frozen
class Rows:
    """Where the rows of a batch lie, on the device."""

    num_rows: int
    "Of the matrix: what any routing of the batch fits in."
    stride: int
    "Rows whose scales of 128 columns lie side by side: all of them, or those of one expert."
    of_slot: torch.Tensor
    "int32 [num_slots], undefined for slots without an expert here."
    layout: torch.Tensor
    "int32 [num_rows] or [num_local_experts]: see the module."


def rows_needed(num_slots: int, num_local_experts: int, block_m: int, layout: str) -> int:
    """Rows of the matrix for any routing of a batch."""
    blocks = num_local_experts if layout == MASKED else max_blocks(num_slots, num_local_experts, block_m)
    return blocks * block_m


@triton.jit(do_not_specialize=["num_slots", "num_rows", "num_local_experts", "block_m"])
def place_kernel(
    of_slot_ptr,
    experts_ptr,
    ends_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    expert_counts_ptr,
    num_slots,
    num_rows,
    num_local_experts,
    block_m,
    STRIDED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK aligned rows a CTA: the row of each slot, and the expert of each row or the end of each expert."""
    wait_for_launch_before(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < tl.load(num_tokens_post_padded_ptr)
    slot = tl.load(sorted_token_ids_ptr + row, mask=used, other=num_slots)
    real = slot < num_slots
    expert = tl.load(expert_ids_ptr + row // block_m, mask=used, other=0)
    if STRIDED:
        tl.store(of_slot_ptr + slot, expert * block_m + row % block_m, mask=real)
    else:
        tl.store(of_slot_ptr + slot, row, mask=real)
    if experts_ptr is not None:
        tl.store(experts_ptr + row, tl.where(real, expert, -1), mask=row < num_rows)
    if ends_ptr is not None:  # noqa: SIM102  (known when compiled)
        if tl.program_id(0) == 0:
            bins = tl.arange(0, BINS)
            counts = tl.load(expert_counts_ptr + bins, mask=bins < num_local_experts, other=0)
            blocks = (counts + block_m - 1) // block_m
            ends = (tl.cumsum(blocks, 0) - blocks) * block_m + counts
            tl.store(ends_ptr + bins, ends, mask=bins < num_local_experts)


def place(blocks: TokenBlocks, layout: str, of_slot: torch.Tensor, memory: torch.Tensor) -> Rows:
    """Rows of an aligned batch.

    Args:
        blocks: aligned with the layout's block_m: the experts' padding, or the most rows of one (`MASKED`).
        layout: one of `LAYOUTS`.
        of_slot: int32 [num_slots], written.
        memory: int32 of at least max(rows, experts), which backs the layout but for `MASKED`, whose counts `blocks` has.
    """
    num_slots, experts = blocks.num_slots, blocks.expert_counts.numel()
    num_rows = rows_needed(num_slots, experts, blocks.block_m, layout)
    aligned = max_blocks(num_slots, experts, blocks.block_m) * blocks.block_m
    where = {CONTIGUOUS: memory[:num_rows], PSUM: memory[:experts], MASKED: blocks.expert_counts}[layout]
    place_kernel[(triton.cdiv(aligned, 1024),)](
        of_slot,
        where if layout == CONTIGUOUS else None,
        where if layout == PSUM else None,
        blocks.sorted_token_ids,
        blocks.expert_ids,
        blocks.num_tokens_post_padded,
        blocks.expert_counts,
        num_slots,
        num_rows,
        experts,
        blocks.block_m,
        STRIDED=layout == MASKED,
        BINS=histogram_bins(experts),
        BLOCK=1024,
        num_warps=4,
        **pdl.arguments(),
    )
    return Rows(num_rows, blocks.block_m if layout == MASKED else num_rows, of_slot, where)


@triton.jit
def _store_groups(rows_ptr, scale_ptr, row, group, here, x, stride, COLUMNS: tl.constexpr):
    """x [units, 128] to its rows: as it is, or quantised with scales by columns; rows that are not `here` are left out."""
    row = row.to(tl.int64)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = here[:, None] & (column < COLUMNS)
    at = row[:, None] * COLUMNS + column
    if scale_ptr is None:
        tl.store(rows_ptr + at, downcast(x, rows_ptr.dtype.element_ty), mask=mask)
    else:
        q, scale = quantise_groups(x, rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + at, q, mask=mask)
        scales: tl.constexpr = COLUMNS // 128
        tl.store(scale_ptr + (row // stride * scales + group) * stride + row % stride, scale, mask=here)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "stride"])
def scatter_kernel(
    rows_ptr,
    scale_ptr,
    x_ptr,
    of_slot_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    stride,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """UNITS groups of 128 columns a CTA, numbered through all tokens: each is read once and written top_k times."""
    wait_for_launch_before(PDL)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    token, group = unit // GROUPS, unit % GROUPS
    inside = token < num_slots // TOP_K
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = token.to(tl.int64)[:, None] * COLUMNS + column
    x = tl.load(x_ptr + at, mask=inside[:, None] & (column < COLUMNS), other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = local_expert_ids(topk_ids_ptr, expert_map_ptr, slot, num_slots, num_experts, num_local_experts)
        here = inside & (expert < num_local_experts)
        row = tl.load(of_slot_ptr + slot, mask=here, other=0)
        _store_groups(rows_ptr, scale_ptr, row, group, here, x, stride, COLUMNS)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts", "stride"])
def activate_kernel(
    h_ptr,
    scale_ptr,
    gate_up_ptr,
    of_slot_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    stride,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """h = silu(gate) * up, UNITS groups of 128 columns a CTA, numbered through all slots."""
    wait_for_launch_before(PDL)
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    slot, group = unit // GROUPS, unit % GROUPS
    expert = local_expert_ids(topk_ids_ptr, expert_map_ptr, slot, num_slots, num_experts, num_local_experts)
    here = expert < num_local_experts
    row = tl.load(of_slot_ptr + slot, mask=here, other=0)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = here[:, None] & (column < COLUMNS)
    at = row.to(tl.int64)[:, None] * (2 * COLUMNS) + column
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + COLUMNS, mask=mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if scale_ptr is not None:
        # Rounded to bf16 first, as the kernels do whose h passes through memory.
        h = downcast(h, tl.bfloat16).to(tl.float32)
    _store_groups(h_ptr, scale_ptr, row, group, here, h, stride, COLUMNS)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_local_experts"])
def combine_kernel(
    out_ptr,
    y_ptr,
    weights_ptr,
    of_slot_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_experts,
    num_local_experts,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[token] = sum of weight * row over its slots in order, float32; slots without an expert here add nothing."""
    wait_for_launch_before(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = local_expert_ids(topk_ids_ptr, expert_map_ptr, slot, slot + 1, num_experts, num_local_experts)
        here = expert < num_local_experts
        row = tl.load(of_slot_ptr + slot, mask=here, other=0).to(tl.int64)
        y = tl.load(y_ptr + row * COLUMNS + column, mask=column < tl.where(here, COLUMNS, 0), other=0.0)
        weight = tl.load(weights_ptr + slot, mask=here, other=0.0).to(tl.float32)
        total += weight * y.to(tl.float32)
    tl.store(out_ptr + token * COLUMNS + column, downcast(total, out_ptr.dtype.element_ty), mask=column < COLUMNS)


@attrs.frozen
class Routed:
    """Whose rows they are: the same arguments of all three steps.

    Args:
        topk_ids: int32 or int64 [T, top_k].
        expert_map: int32 [num_experts], local expert of each global one, or None.
        num_local_experts: experts whose weights are here.
        rows: from `place`.
    """

    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    num_local_experts: int
    rows: Rows

    def _arguments(self) -> tuple[Any, ...]:
        experts = self.num_local_experts if self.expert_map is None else self.expert_map.numel()
        return (
            self.rows.of_slot,
            self.topk_ids,
            self.expert_map,
            self.topk_ids.numel(),
            experts,
            self.num_local_experts,
        )

    def scatter(self, x: torch.Tensor, into: torch.Tensor, scale: torch.Tensor | None) -> None:
        """x [T, H] to its rows of `into` [rows, H]; e4m3 where there is `scale`, float32 [rows / stride, H / 128, stride]."""
        columns = x.shape[1]
        groups = triton.cdiv(columns, GROUP)
        scatter_kernel[(triton.cdiv(x.shape[0] * groups, UNITS),)](
            into,
            scale,
            x,
            *self._arguments(),
            self.rows.stride,
            TOP_K=self.topk_ids.shape[1],
            COLUMNS=columns,
            GROUPS=groups,
            UNITS=UNITS,
            num_warps=4,
            **pdl.arguments(),
        )

    def activate(self, gate_up: torch.Tensor, h: torch.Tensor, scale: torch.Tensor | None) -> None:
        """silu(gate) * up of gate_up [rows, 2I], gate columns first, into h [rows, I]; e4m3 and `scale` as in `scatter`."""
        columns = h.shape[1]
        groups = triton.cdiv(columns, GROUP)
        activate_kernel[(triton.cdiv(self.topk_ids.numel() * groups, UNITS),)](
            h,
            scale,
            gate_up,
            *self._arguments(),
            self.rows.stride,
            COLUMNS=columns,
            GROUPS=groups,
            UNITS=UNITS,
            num_warps=4,
            **pdl.arguments(),
        )

    def combine(self, y: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, H] = the rows of y [rows, H] of each token, times weights [T, top_k], added up in slot order."""
        tokens, columns = out.shape
        block = min(1024, triton.next_power_of_2(columns))
        combine_kernel[(tokens, triton.cdiv(columns, block))](
            out,
            y,
            weights,
            *self._arguments(),
            TOP_K=self.topk_ids.shape[1],
            COLUMNS=columns,
            BLOCK=block,
            num_warps=4,
            **pdl.arguments(),
        )
