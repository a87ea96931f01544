"""Random inputs of a layer, and the layer in float64 in plain torch with a kernel's quantisation steps."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rampwrap.kernel.activation import SILU, Activation
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.fp8 import FP8_MAX, GROUP, MIN_ABS
from rampwrap.kernels.common.operands import FP8, TORCH_DTYPES, local_ids, scale_shapes


class RandomInputs:
    """Random keyword arguments of a launch, of order one; weights are made once for a shape, device and seed.

    Args:
        convert: of the weights, to what a kernel reads in place of some of them.
    """

    def __init__(self, convert: Callable[..., dict[str, torch.Tensor]] | None = None) -> None:
        self._convert = convert
        self._weights: tuple[Any, dict[str, torch.Tensor]] | None = None

    def make(self, shape: MoEShape, topk_ids: torch.Tensor, seed: int = 0) -> dict[str, Any]:
        """For these ids, on their device.

        Weights are drawn expert by expert, so that memory peaks at the weights plus one expert.
        """
        device = topk_ids.device
        key = (shape, device, seed)
        if self._weights is None or self._weights[0] != key:
            self._weights = None
            made = random_weights(shape, device, seed)
            self._weights = (key, made if self._convert is None else made | self._convert(**made))
        generator = torch.Generator(device).manual_seed(seed + 1)
        hidden_states = torch.randn(topk_ids.shape[0], shape.hidden_size, generator=generator, device=device)
        logits = torch.randn(topk_ids.shape, generator=generator, device=device)
        made = {
            "hidden_states": hidden_states.to(TORCH_DTYPES[shape.dtype]),
            "topk_weights": logits.softmax(-1),
            "topk_ids": topk_ids,
            **self._weights[1],
        }
        if shape.num_local_experts < shape.num_experts:
            made["expert_map"] = torch.from_numpy(Placement.first(shape).expert_map).to(device)
        return made


def random_weights(shape: MoEShape, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """w13 and w2 of a layer, in FP8 with their scales."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    weights: dict[str, torch.Tensor] = {}
    for name, rows, columns, gain in (("w13", 2 * inter, hidden, 1.0), ("w2", hidden, inter, 3.0)):
        std = gain * columns**-0.5
        if shape.dtype != "fp8":
            w = torch.empty(experts, rows, columns, dtype=TORCH_DTYPES[shape.dtype], device=device)
            for expert in w:
                expert.normal_(0.0, std, generator=generator)
            weights[name] = w
            continue
        w = torch.empty(experts, rows, columns, dtype=FP8, device=device)
        for expert in w:
            # A standard deviation of 64 uses e4m3's range to 448 = 7 sigma.
            drawn = torch.randn(rows, columns, generator=generator, device=device)
            expert.copy_(drawn.mul_(64).clamp_(-FP8_MAX, FP8_MAX))
        scale = torch.rand(scale_shapes(shape)[f"{name}_scale"], generator=generator, device=device)
        weights[name] = w
        weights[f"{name}_scale"] = (scale + 0.5) * (std / 64)
        if shape.scales == "static":  # some values in a thousand are beyond it
            weights[f"{name}_input_scale"] = torch.tensor(3.0 / FP8_MAX, device=device)
    return weights


def quantise(x: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """float [..., n] -> (e4m3 [..., n], float32 scales [..., n / group]): the largest of each group becomes 448."""
    groups = x.float().view(*x.shape[:-1], x.shape[-1] // group, group)
    scale = groups.abs().amax(-1).clamp_min(MIN_ABS) / FP8_MAX
    return (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8).flatten(-2), scale


def quantise_by(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [..., n] -> (e4m3 [..., n], the scale for each [..., 1]): what is beyond 448 of it is cut off."""
    q = (x.float() * (1.0 / scale.float())).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return q, scale.float().expand(*x.shape[:-1], 1)


def dequantise(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undoes `quantise`, in float64; a scale serves as many columns as there are for it."""
    groups = q.double().view(*scale.shape, q.shape[-1] // scale.shape[-1])
    return (groups * scale.double()[..., None]).flatten(-2)


def weights_of(w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """One expert's [n, k] in float64, from e4m3 with scales as in `scale_shapes` or from bf16."""
    if scale is None:
        return w.double()
    if scale.dim() == 2:
        rows, columns = (its // scales for its, scales in zip(w.shape, scale.shape, strict=True))
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return w.double() * scale.double()


def activate(
    x: torch.Tensor, w13: torch.Tensor, gate_up_dtype: torch.dtype = torch.float64, activation: Activation = SILU
) -> torch.Tensor:
    """The activation of x W_gate^T and x W_up^T of one expert, float64 [n, H] x [2I, H] -> [n, I]; both are rounded first."""
    gate, up = (x @ w13.T).to(gate_up_dtype).double().chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.name == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)


def layer(
    shape: MoEShape,
    inputs: Mapping[str, Any],
    *,
    h_dtype: torch.dtype | None = None,
    gate_up_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The layer, expert by expert, in float64.

    Args:
        shape: what the inputs are of.
        inputs: what `RandomInputs` makes.
        h_dtype: what h is rounded to, in FP8 before it is quantised; where absent bf16 in FP8, and float64 in other types.
        gate_up_dtype: what gate and up are rounded to, by kernels that pass them through memory.

    Returns:
        float64 [T, H].
    """
    x, ids = inputs["hidden_states"], local_ids(inputs["topk_ids"], inputs.get("expert_map"))
    routing = inputs["topk_weights"].double()
    fp8, h_dtype = shape.dtype == "fp8", h_dtype or (torch.bfloat16 if shape.dtype == "fp8" else torch.float64)

    def rounded(its: torch.Tensor, scale: str) -> torch.Tensor:
        if shape.scales == "static":
            return dequantise(*quantise_by(its, inputs[scale]))
        return dequantise(*quantise(its, shape.scale_group or its.shape[-1]))

    x = rounded(x, "w13_input_scale") if fp8 else x.double()
    out = torch.zeros(x.shape[0], shape.hidden_size, dtype=torch.float64, device=x.device)
    w13_scale, w2_scale = inputs.get("w13_scale"), inputs.get("w2_scale")
    for expert in range(shape.num_local_experts):
        token, k = torch.nonzero(ids == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        w13 = weights_of(inputs["w13"][expert], None if w13_scale is None else w13_scale[expert])
        w2 = weights_of(inputs["w2"][expert], None if w2_scale is None else w2_scale[expert])
        h = activate(x[token], w13, gate_up_dtype, shape.activation).to(h_dtype)
        h = rounded(h, "w2_input_scale") if fp8 else h.double()
        out.index_add_(0, token, (h @ w2.T) * routing[token, k, None])
    return out
