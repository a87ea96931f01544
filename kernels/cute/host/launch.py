"""The launches of one layer: what prepares, then up, down and the sum, or the one kernel that does all three.

Alignment, quantisation and the sum over top-k are those of the Triton layer (`rampwrap.kernels.triton`), and so is the
workspace, so that both kernels of a portfolio share one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampwrap.errors import InputError
from rampwrap.kernel.grid import max_blocks
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
    """Launches a layer; arguments are taken as they are (the adapter checks them).

    Args:
        config: legal for the layer.
        functions: the compiled kernels of ``config.variants``.
        group_m: M blocks whose tiles run side by side.
        max_ctas: CTAs of a launch; each goes on to further tiles. `MAX_CTAS` for one a tile.
        hidden_states: bf16 [T, H]; quantised here where the config is FP8.
        w13: [E, 2I, H], gate rows first.
        w2: [E, H, I].
        topk_weights: [T, top_k]; float32 is read as it is, other types are converted first.
        topk_ids: int32 or int64 [T, top_k].
        w13_scale, w2_scale: float32, for FP8.
        expert_map: int32 [num_experts], local expert of each global one, -1 for those elsewhere.
        out: bf16 [T, H], written and returned.
        workspace: from `rampwrap.kernels.triton.moe.workspace`, for a call that allocates nothing but an absent `out`.
        blocks: an alignment of these topk_ids with the config's block_m; made here where absent.

    Raises:
        InputError: the batch has more tiles than a launch has CTAs.
    """
    (num_tokens, top_k), num_slots = topk_ids.shape, topk_ids.numel()
    experts, hidden, intermediate = w2.shape
    if out is None:
        out = torch.empty_like(hidden_states)
    if num_tokens == 0:
        return out
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
            hidden_states.dtype,
            fp8=fp8,
            device=device,
            num_local_experts=experts,
        )
    quantised = None
    if fp8:
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
    )
    tokens: tuple[Any, ...] = quantised or (hidden_states,)
    routing = (memory.sorted_token_ids, memory.expert_ids, memory.num_tokens_post_padded)
    weights = topk_weights.view(-1) if topk_weights.dtype == torch.float32 else topk_weights.float().view(-1)
    numbers = (top_k, group_m, num_blocks, max_ctas)
    first = (w13, w13_scale) if fp8 else (w13,)
    second = (w2, w2_scale) if fp8 else (w2,)
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


def _float_rows(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """float32 [T, H] in the memory of bf16 [n, H], which has room for it but for top-1 of many tokens."""
    hidden = rows.shape[1]
    if rows.shape[0] < 2 * num_tokens:
        return torch.empty(num_tokens, hidden, dtype=torch.float32, device=rows.device)
    return rows.view(-1).view(torch.float32)[: num_tokens * hidden].view(num_tokens, hidden)
