"""The launches of one layer: what prepares, then up, down and the sum, or the one kernel that does all three.

Alignment, quantisation and the sum over top-k are those of the Triton layer (`rampwrap.kernels.triton`), and so is the
workspace, so that both kernels of a portfolio share one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampwrap.errors import InputError
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernels.common.operands import Operands
from rampwrap.kernels.cute.configs import CuteConfig
from rampwrap.kernels.cute.host.prepare import narrow_rows, prepare, sum_rows
from rampwrap.kernels.triton.align.host import TokenBlocks, allocate_blocks
from rampwrap.kernels.triton.moe.workspace import Workspace, allocate

MAX_CTAS = 2**31 - 1
"As a limit of CTAs: none, a CTA for every tile."


def run_layer(
    config: CuteConfig,
    functions: Sequence[Callable[..., Any]],
    group_m: int,
    max_ctas: int,
    operands: Operands,
    *,
    workspace: Workspace | None = None,
    blocks: TokenBlocks | None = None,
) -> torch.Tensor:
    """Launches a layer and returns [T, H].

    Args:
        config: legal for the layer.
        functions: the compiled kernels of ``config.variants``.
        group_m: M blocks whose tiles run side by side.
        max_ctas: CTAs of a launch; each goes on to further tiles. `MAX_CTAS` for one a tile.
        operands: of at least one token, taken as they are (the adapter checks them); topk_weights of another type than float32 are
            converted first.
        workspace: from `rampwrap.kernels.triton.moe.workspace`, for a call that allocates nothing but an absent `out`.
        blocks: an alignment of the topk_ids with the config's block_m; made here where absent.

    Raises:
        InputError: the batch has more tiles than a launch has CTAs.
    """
    hidden_states, topk_ids, expert_map = operands.hidden_states, operands.topk_ids, operands.expert_map
    (num_tokens, top_k), num_slots = topk_ids.shape, topk_ids.numel()
    experts, hidden, intermediate = operands.w2.shape
    out = operands.output()
    num_blocks = max_blocks(num_slots, experts, config.block_m)
    if num_blocks * max(2 * intermediate, hidden) // config.rows > MAX_CTAS:
        raise InputError(f"{num_tokens} tokens make more tiles than a launch has CTAs ({MAX_CTAS}); split the batch.")
    fp8, one = config.dtype == "fp8", config.form == "one"
    if workspace is None:
        device = hidden_states.device
        workspace = allocate(
            num_tokens,
            top_k,
            hidden,
            intermediate,
            out.dtype,
            fp8=fp8,
            device=device,
            num_local_experts=experts,
        )
    quantised = None
    if fp8 and operands.hidden_scale is None:
        assert workspace.x_fp8 is not None and workspace.x_scale is not None
        quantised = workspace.x_fp8[:num_tokens], workspace.x_scale[:num_tokens]
    # The one-launch form adds in float32: in bf16 the 64 additions of top-8 with 1024 columns would be off by 1 %.
    sums = _float_rows(workspace.y, num_tokens) if one else None
    memory = blocks or workspace.token_blocks(num_tokens, top_k, experts, config.block_m)
    memory = memory or allocate_blocks(num_tokens, top_k, experts, config.block_m, topk_ids.device)
    prepare(
        hidden_states,
        quantised,
        sums,
        topk_ids,
        config.block_m,
        experts,
        expert_map=expert_map,
        memory=memory,
        aligned=blocks is not None,
        widest_first=config.form == "ragged",  # whose tiles cost what their blocks hold
    )
    tokens: tuple[Any, ...] = quantised or (hidden_states,)
    if operands.hidden_scale is not None:
        tokens = hidden_states, operands.hidden_scale
    routing = (memory.sorted_token_ids, memory.expert_ids, memory.num_tokens_post_padded)
    weights = operands.topk_weights.float().view(-1)
    all_experts = experts if expert_map is None else expert_map.numel()
    numbers = (top_k, group_m, num_blocks, max_ctas, l2_fetch(num_slots, all_experts, config.block_m))
    first = (operands.w13, operands.w13_scale) if fp8 else (operands.w13,)
    second = (operands.w2, operands.w2_scale) if fp8 else (operands.w2,)
    if sums is not None:
        functions[0](*tokens, *first, *second, *routing, weights, sums, *numbers)
        narrow_rows(out, sums)
        return out
    h: tuple[Any, ...] = (workspace.h[:num_slots],)
    if config.form == "prefill":
        h = workspace.ordered_h(num_blocks * config.block_m, fp8)
    elif fp8:
        assert workspace.h_fp8 is not None and workspace.h_scale is not None
        h = workspace.h_fp8[:num_slots], workspace.h_scale[:num_slots]
    up, down = functions
    up(*tokens, *first, *routing, *h, *numbers)
    down(*h, *second, *routing, weights, workspace.y[:num_slots], *numbers)
    sum_rows(out, workspace.y, topk_ids, experts, expert_map=expert_map)
    return out


def l2_fetch(num_slots: int, num_experts: int, block_m: int) -> int:
    """Bytes of a weight row that L2 fetches at once.

    256 while an expert has one block in the mean: each weight is read once, and memory reads 5 % faster so. With more, CTAs that share
    weights are bound by L2: 128 is 2-7 % faster there.
    """
    return 256 if num_slots <= num_experts * block_m else 128


def _float_rows(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """float32 [T, H] in the memory of bf16 [n, H], which has room for it but for top-1 of many tokens."""
    hidden = rows.shape[1]
    if rows.shape[0] < 2 * num_tokens:
        return torch.empty(num_tokens, hidden, dtype=torch.float32, device=rows.device)
    return rows.view(-1).view(torch.float32)[: num_tokens * hidden].view(num_tokens, hidden)
