"""The operands of one MoE layer: `Operands` holds them, a `Contract` says what they must be."""

from collections.abc import Sequence

import attrs
import torch

from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape

FP8 = torch.float8_e4m3fn
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"Type of hidden states and output for each `MoEShape.dtype`; FP8 layers take and return bf16."
WEIGHT_DTYPES = {**TORCH_DTYPES, "fp8": FP8}
IDS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@attrs.define(eq=False)  # frozen it would take 1.9 us to make, a launch in all 40; so it takes 0.15
class Operands:
    """The tensors of one call, taken as they are: `Contract.check` is who checks them.

    Attributes:
        hidden_states: [T, H], bf16 or fp16 (bf16 for an FP8 layer, which quantises them itself).
        w13: [E, 2I, H], gate rows first.
        w2: [E, H, I].
        topk_weights: [T, top_k], floating point.
        topk_ids: int32 or int64 [T, top_k]; slots with an id out of range contribute zero.
        w13_scale: float32 [E, 2I/128, H/128], FP8 only; other forms of scales as `scale_shapes` says.
        w2_scale: float32 [E, H/128, I/128], FP8 only.
        expert_map: int32 [num_experts], local expert of each global one, -1 where it is elsewhere.
        out: [T, H], written and returned; None lets the layer allocate it.
        hidden_scale: float32 [T, H/128] of hidden states that are e4m3 already, of kernels that take such.
        w13_input_scale: float32, one number: the scale of all hidden states, where `MoEShape.scales` is ``static``.
        w2_input_scale: float32, one number: that of h.
    """

    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    out: torch.Tensor | None = None
    hidden_scale: torch.Tensor | None = None
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_slots(self) -> int:
        return self.topk_ids.numel()

    @property
    def num_local_experts(self) -> int:
        """Experts whose weights are here."""
        return self.w2.shape[0]

    @property
    def num_experts(self) -> int:
        """Ids that mean an expert, here or on another rank."""
        return self.w2.shape[0] if self.expert_map is None else self.expert_map.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w2.shape[2]

    def output(self) -> torch.Tensor:
        """`out`, allocated where it is absent."""
        if self.out is not None:
            return self.out
        dtype = self.hidden_states.dtype if self.hidden_scale is None else torch.bfloat16
        return torch.empty_like(self.hidden_states, dtype=dtype)


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """int64 local expert of each id; through a map -1 for padding and for experts of other ranks, without one the id."""
    ids = topk_ids.long()
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < len(expert_map))
    return torch.where(known, expert_map.long()[ids.clamp(0, len(expert_map) - 1)], -1)


def scale_shapes(shape: MoEShape) -> dict[str, tuple[int, ...]]:
    """Shapes of the scales of an FP8 layer's weights, by name, as engines keep them.

    [E, n/g, k/g] for weights [E, n, k] in blocks of g, [E, n, 1] for a scale a channel, [E] for one a tensor.
    """
    experts, hidden, inter, group = (
        shape.num_local_experts,
        shape.hidden_size,
        shape.intermediate_size,
        shape.scale_group,
    )
    if shape.scales in ("tensor", "static"):
        return {"w13_scale": (experts,), "w2_scale": (experts,)}
    if shape.scales == "channel":
        return {"w13_scale": (experts, 2 * inter, 1), "w2_scale": (experts, hidden, 1)}
    return {
        "w13_scale": (experts, 2 * inter // group, hidden // group),
        "w2_scale": (experts, hidden // group, inter // group),
    }


INPUT_SCALES = ("w13_input_scale", "w2_input_scale")
"Operands of a layer whose activations have a scale that comes with the weights."


class Contract:
    """What the operands of a layer must be for a kernel: made once for a layer, checked at each call.

    Args:
        shape: the layer.
        topk_weights: types of the routing weights that the kernel reads.
        contiguous: whether all operands must be.
        aligned: operands that must start at a multiple of 16 bytes.
        quantised: whether hidden states may be e4m3 with `hidden_scale`, as an FP8 layer quantises them.
    """

    def __init__(
        self,
        shape: MoEShape,
        *,
        topk_weights: Sequence[torch.dtype] = FLOATS,
        contiguous: bool = True,
        aligned: Sequence[str] = (),
        quantised: bool = False,
    ) -> None:
        self.shape, self.contiguous, self.aligned = shape, contiguous, tuple(aligned)
        self._quantised = quantised and shape.dtype == "fp8" and shape.scales == "block-128"
        self._activations, self._routing = (TORCH_DTYPES[shape.dtype],), tuple(topk_weights)
        weights = (WEIGHT_DTYPES[shape.dtype],)
        experts, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
        fixed: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "w13": ((experts, 2 * inter, hidden), weights),
            "w2": ((experts, hidden, inter), weights),
            "expert_map": ((shape.num_experts,), (torch.int32,)),
        }
        if shape.dtype == "fp8":
            fixed |= {name: (its, (torch.float32,)) for name, its in scale_shapes(shape).items()}
        self._fixed = tuple((name, *its) for name, its in fixed.items())

    def check(self, operands: Operands) -> None:
        """Nothing, where all is as the kernel needs it.

        Raises:
            InputError: an operand is missing, or has the wrong shape, dtype, layout or alignment.
        """
        shape, x = self.shape, operands.hidden_states
        if x.dim() != 2:
            raise InputError(f"hidden_states has shape {tuple(x.shape)}; give [num_tokens, {shape.hidden_size}].")
        if shape.dtype == "fp8":
            if operands.w13_scale is None or operands.w2_scale is None:
                raise InputError("FP8 weights come with scales; give w13_scale and w2_scale.")
        elif operands.w13_scale is not None or operands.w2_scale is not None:
            raise InputError(
                f"Scales were given for a {shape.dtype} layer; leave them out or use a shape with dtype='fp8'."
            )
        if operands.expert_map is None and shape.num_local_experts != shape.num_experts:
            raise InputError(
                f"{shape.num_local_experts} of {shape.num_experts} experts are on this rank; give expert_map to say which."
            )
        if shape.scales == "static" or operands.w13_input_scale is not None or operands.w2_input_scale is not None:
            self._check_input_scales(operands)
        rows, slots = (x.shape[0], shape.hidden_size), (x.shape[0], shape.top_k)
        scales = (x.shape[0], shape.hidden_size // (shape.scale_group or 1))
        scaled = self._quantised and operands.hidden_scale is not None
        if operands.hidden_scale is not None and not self._quantised:
            raise InputError(f"hidden_scale was given for a layer of {shape}; give bf16 hidden_states without it.")
        of_batch = (
            ("hidden_states", rows, (FP8,) if scaled else self._activations),
            ("hidden_scale", scales, (torch.float32,)),
            ("topk_ids", slots, IDS),
            ("topk_weights", slots, self._routing),
            ("out", rows, self._activations),
        )
        for name, expected, dtypes in of_batch + self._fixed:
            tensor = getattr(operands, name)
            if tensor is None:
                continue
            strided = self.contiguous and not tensor.is_contiguous()
            if strided or tensor.shape != expected or tensor.dtype not in dtypes:
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise InputError(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
                    f"{' and not contiguous' if strided else ''}; "
                    f"give {'contiguous ' if self.contiguous else ''}{kinds} {expected}."
                )
        for name in self.aligned:
            if getattr(operands, name).data_ptr() % 16:
                raise InputError(f"{name} does not start at a multiple of 16 bytes, as its copies need; give a copy.")

    def _check_input_scales(self, operands: Operands) -> None:
        for name in INPUT_SCALES:
            its = getattr(operands, name)
            if self.shape.scales != "static" and its is not None:
                raise InputError(f"{name} was given for a layer of {self.shape}; leave it out or use scales='static'.")
            if self.shape.scales == "static" and (its is None or its.numel() != 1 or its.dtype != torch.float32):
                kind = "missing" if its is None else f"{its.dtype} of shape {tuple(its.shape)}"
                raise InputError(f"{name} is {kind}; give one float32 number for the layer.".replace("torch.", ""))
