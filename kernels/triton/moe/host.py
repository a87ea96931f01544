"""The fused MoE layer: gate+up GEMM with the activation in the epilogue, down GEMM with routing weights, sum over top-k.

Launches of a layer: alignment, [quantise x], up, [quantise h], down, sum; up to `DIRECT_FACTOR` the alignment
is left out. Every grid is sized from capacity and CTAs past the last block leave at once, so nothing ever
waits for the host, and the whole layer can be captured in a CUDA graph. Each launch starts while the one before it
ends (`pdl`).

`fused_moe_candidates` launches several configs behind one alignment that was made for one of them: the GEMMs of
the others find no rows and leave, and the sum runs once.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

import triton
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.branches import run_beside
from rampwrap.kernels.common.operands import Operands
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align.host import TokenBlocks, align_tokens
from rampwrap.kernels.triton.moe.activate import activation_arguments
from rampwrap.kernels.triton.moe.configs import quantises_h, splits
from rampwrap.kernels.triton.moe.gemm import down_kernel, sum_kernel, up_kernel
from rampwrap.kernels.triton.moe.workspace import Workspace, allocate
from rampwrap.kernels.triton.quantise import quantise_rows

# With this many experts per slot two slots rarely share one: each slot is a block of its own, its expert
# read from topk_ids. An expert hit twice is read twice, the second time from L2: less than a launch costs.
DIRECT_FACTOR = 4


def is_direct(num_slots: int, num_experts: int) -> bool:
    """Whether a batch is so small that the layer runs without an alignment."""
    return num_slots * DIRECT_FACTOR <= num_experts


@attrs.define(eq=False)
class _Layer:
    """The operands of one call with what is made of them, from which each config's launches follow."""

    operands: Operands
    shape: MoEShape
    x: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor
    workspace: Workspace
    launch: dict[str, Any]
    "`pdl.arguments` of all launches."

    @classmethod
    def make(cls, operands: Operands, shape: MoEShape, workspace: Workspace | None, several: bool) -> "_Layer":
        """Allocates what is absent and, for FP8 weights, quantises hidden states that are not e4m3 yet."""
        launch = pdl.arguments(several)
        x, x_scale, fp8 = operands.hidden_states, None, operands.w13_scale is not None
        (num_tokens, top_k), (_, hidden, intermediate) = operands.topk_ids.shape, operands.w2.shape
        if workspace is None:
            sizes = (num_tokens, top_k, hidden, intermediate)
            dtype = x.dtype if operands.hidden_scale is None else torch.bfloat16
            workspace = allocate(*sizes, dtype, fp8=fp8, device=x.device, group=shape.scale_group)
        if operands.hidden_scale is not None:
            x_scale = operands.hidden_scale
        elif fp8:
            assert workspace.x_fp8 is not None and workspace.x_scale is not None
            given = operands.w13_input_scale
            x, x_scale = workspace.x_fp8[:num_tokens], workspace.x_scale[:num_tokens] if given is None else given
            group = shape.scale_group
            quantise_rows(operands.hidden_states, x, x_scale, launch=launch, group=group, given=given is not None)
        return cls(operands, shape, x, x_scale, operands.output(), workspace, launch)

    def gemms(self, config: Mapping[str, Any], blocks: TokenBlocks | None, most_ctas: int | None) -> None:
        """Up and down; without `blocks` every slot is a block of its own. `most_ctas` as in `fused_moe`."""
        its, workspace = self.operands, self.workspace
        num_slots, (local, hidden, intermediate) = its.num_slots, its.w2.shape
        block_n, split_k = config["block_n"], splits(config, num_slots)
        post_padded = None if blocks is None else blocks.num_tokens_post_padded
        routing = (
            None if blocks is None else blocks.sorted_token_ids,
            None if blocks is None else blocks.expert_ids,
            post_padded,
            # With blocks of its own a slot needs topk_ids to find its expert; otherwise the blocks say it.
            its.topk_ids if blocks is None else None,
            its.expert_map if blocks is None else None,
            num_slots,
            its.num_experts,
            local,
        )
        capacity = num_slots if blocks is None else max_blocks(num_slots, local, config["block_m"])
        persistent = most_ctas is not None and blocks is not None
        tuning = {**tuning_arguments(config), "PERSISTENT": persistent, **self.launch}

        def grid(tiles: int) -> tuple[int]:
            return (min(capacity * tiles, most_ctas) if persistent and most_ctas else capacity * tiles,)

        h, h_scale = workspace.h[:num_slots], None
        in_epilogue = False
        if self.x_scale is not None:
            assert workspace.h_fp8 is not None and workspace.h_scale is not None
            h_scale, in_epilogue = workspace.h_scale[:num_slots], quantises_h(config, self.shape.scale_group)
            if its.w2_input_scale is not None:  # which no tile has to find
                h_scale, in_epilogue = its.w2_input_scale, True
            if in_epilogue:
                h = workspace.h_fp8[:num_slots]
        up_kernel[grid(triton.cdiv(intermediate, block_n // 2))](
            h,
            h_scale if in_epilogue else None,
            self.x,
            self.x_scale,
            its.w13,
            its.w13_scale,
            *routing,
            TOP_K=its.top_k,
            HIDDEN=hidden,
            INTERMEDIATE=intermediate,
            **form_arguments(self.shape),
            **tuning,
        )
        if h_scale is not None and not in_epilogue:
            assert workspace.h_fp8 is not None
            # Rows of slots without a local expert hold whatever was there; nothing reads what becomes of them.
            into, group = workspace.h_fp8[:num_slots], self.shape.scale_group
            quantise_rows(h, into, h_scale, unless_zero=post_padded, launch=self.launch, group=group)
            h = into
        down_kernel[grid(triton.cdiv(hidden, block_n) * split_k)](
            workspace.y,
            h,
            h_scale,
            its.w2,
            its.w2_scale,
            its.topk_weights,
            *routing,
            HIDDEN=hidden,
            INTERMEDIATE=intermediate,
            SPLIT_K=split_k,
            **scale_arguments(self.shape),
            **tuning,
        )

    def sum(self, all_splits: Sequence[int], choice: torch.Tensor | None = None) -> torch.Tensor:
        """Sums the rows of the config that ran: the only one, or candidate `choice` (int32 [1]) of several."""
        its = self.operands
        (num_tokens, top_k), (local, hidden, _) = its.topk_ids.shape, its.w2.shape
        same = len(set(all_splits)) == 1
        block_h = min(1024, triton.next_power_of_2(hidden))
        sum_kernel[(num_tokens, triton.cdiv(hidden, block_h))](
            self.out,
            self.workspace.y,
            its.topk_ids,
            its.expert_map,
            None if same else choice,
            its.num_slots,
            its.num_experts,
            local,
            TOP_K=top_k,
            HIDDEN=hidden,
            SPLIT_K=max(all_splits),
            SPLIT_OF=0 if same else sum(count << 4 * place for place, count in enumerate(all_splits)),
            BLOCK_H=block_h,
            **self.launch,
        )
        return self.out


def fused_moe(
    config: Mapping[str, Any],
    operands: Operands,
    shape: MoEShape,
    *,
    workspace: Workspace | None = None,
    blocks: TokenBlocks | None = None,
    most_ctas: int | None = None,
) -> torch.Tensor:
    """One MoE layer; returns [T, H].

    Args:
        config: block_m, block_n, block_k, group_m, num_warps, num_stages, swap_ab; split_k where it is not 1.
        operands: of at least one token, taken as they are (the adapter checks them).
        shape: the layer, for its activation and scales; sizes are those of the operands.
        workspace: from `workspace.allocate`, for a call that allocates nothing but an absent `out`.
        blocks: an alignment of the topk_ids with the config's block_m; made here where absent.
        most_ctas: grids of at most so many CTAs, each of which goes on to further tiles; same bits. Not used where
            the batch is so small that it runs without an alignment.
    """
    layer = _Layer.make(operands, shape, workspace, several=blocks is not None)
    num_slots = operands.num_slots
    if blocks is None and not is_direct(num_slots, operands.num_experts):
        local, block_m = operands.num_local_experts, config["block_m"]
        memory = layer.workspace.token_blocks(operands.num_tokens, operands.top_k, local, block_m)
        blocks = align_tokens(operands.topk_ids, block_m, local, expert_map=operands.expert_map, blocks=memory)
    layer.gemms(config, blocks, most_ctas)
    return layer.sum([splits(config, num_slots)])


def fused_moe_candidates(
    configs: Sequence[Mapping[str, Any]],
    blocks: Sequence[TokenBlocks],
    choice: torch.Tensor,
    operands: Operands,
    shape: MoEShape,
    *,
    workspace: Workspace | None = None,
    most_ctas: Sequence[int | None] = (),
    streams: Sequence[Any] = (),
) -> torch.Tensor:
    """One MoE layer by the one of several configs that was chosen on the GPU; arguments not named are `fused_moe`'s.

    Args:
        blocks: one for each config, made by `select.align_and_select`: without rows for all but the chosen one.
        choice: int32 [1], place of the chosen config.
        most_ctas: for each config; absent means grids sized from capacity.
        streams: CUDA streams for the configs after the first, as in `branches.run_beside`.
    """
    layer = _Layer.make(operands, shape, workspace, several=True)
    limits = most_ctas or [None] * len(configs)
    each = zip(configs, blocks, limits, strict=True)
    run_beside(streams, [functools.partial(layer.gemms, *its) for its in each])
    return layer.sum([splits(config, operands.num_slots) for config in configs], choice)


def scale_arguments(shape: MoEShape) -> dict[str, Any]:
    """A layer's form of scales as keyword arguments of both GEMMs."""
    static = shape.scales == "static"
    return {"GROUP": shape.scale_group, "CHANNELS": shape.scales == "channel", "STATIC": static}


def form_arguments(shape: MoEShape) -> dict[str, Any]:
    """A layer's scales and activation as keyword arguments of `up_kernel`."""
    return {**scale_arguments(shape), **activation_arguments(shape.activation)}


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
