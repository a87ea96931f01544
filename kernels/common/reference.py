"""The layer in float64, in plain torch, with the quantisation steps of the CuTe kernels."""

from typing import Any

import torch

from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.quantise import FP8_MAX, GROUP, MIN_ABS

FP8 = torch.float8_e4m3fn


def quantise(x: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """float [..., n] -> (e4m3 [..., n], float32 scales [..., n / group]): the largest of each group becomes 448."""
    groups = x.float().view(*x.shape[:-1], -1, group)
    scale = groups.abs().amax(-1).clamp_min(MIN_ABS) / FP8_MAX
    return (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8).flatten(-2), scale


def dequantise(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undoes `quantise`, in float64; a scale serves as many columns as there are for it."""
    return (q.double().view(*scale.shape, -1) * scale.double()[..., None]).flatten(-2)


def weights_of(w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """One expert's [n, k] in float64, from e4m3 with scales of 128x128 blocks or from bf16."""
    if scale is None:
        return w.double()
    return w.double() * scale.double().repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)


def activate(x: torch.Tensor, w13: torch.Tensor, through: torch.dtype = torch.float64) -> torch.Tensor:
    """silu(x W_gate^T) * (x W_up^T) of one expert, float64 [n, H] x [2I, H] -> [n, I].

    Gate, up and their product are rounded to `through`, as by kernels that pass them through memory.
    """
    gate, up = (x @ w13.T).to(through).double().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(through).double()


def layer(
    shape: MoEShape, inputs: dict[str, Any], h_group: int = GROUP, *, through: torch.dtype = torch.float64
) -> torch.Tensor:
    """The layer, expert by expert, in float64.

    Args:
        shape: what the inputs are of.
        inputs: keyword arguments of `CuteFusedMoE.launch`.
        h_group: columns of h that share a scale, in FP8.
        through: of `activate`.

    Returns:
        float64 [T, H].
    """
    x, ids = inputs["hidden_states"], inputs["topk_ids"].long()
    routing, expert_map = inputs["topk_weights"].double(), inputs.get("expert_map")
    fp8 = shape.dtype == "fp8"
    x = dequantise(*quantise(x)) if fp8 else x.double()
    if expert_map is not None:
        inside = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(inside, expert_map.long()[ids.clamp(0, expert_map.numel() - 1)], -1)
    out = torch.zeros(x.shape[0], shape.hidden_size, dtype=torch.float64, device=x.device)
    w13_scale, w2_scale = inputs.get("w13_scale"), inputs.get("w2_scale")
    for expert in range(shape.num_local_experts):
        token, k = torch.nonzero(ids == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        w13 = weights_of(inputs["w13"][expert], None if w13_scale is None else w13_scale[expert])
        h = activate(x[token], w13, through)
        h = dequantise(*quantise(h, h_group)) if fp8 else h.to(torch.bfloat16).double()
        w2 = weights_of(inputs["w2"][expert], None if w2_scale is None else w2_scale[expert])
        out.index_add_(0, token, (h @ w2.T) * routing[token, k, None])
    return out
