"""A layer of vLLM as we see it: its shape or why it stays with vLLM, whose plans may serve it, and the command that makes one."""

import logging
import shlex
from typing import Any

import attrs
import torch

from rampwrap.checkpoint.model import Ranks, read_layers
from rampwrap.engines.vllm_contract import strange
from rampwrap.errors import InputError
from rampwrap.kernel.activation import Activation
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import shape_arguments

BOTH = "portfolio:triton_fused_moe+cute_moe"
KERNELS = (BOTH, "triton_fused_moe", "cute_moe", "vllm_fused_moe")
"""In order of preference where plans for several fit: our Triton kernel is 1.12x faster than vLLM's on an H200 in
geometric mean, the CuTe kernels are level with it: 5 % ahead at 3 to 8 tokens, 6 % behind from 1536 on (OLMoE). A plan for
both names a kernel and one config for each batch size; on rows it never saw it is 1.01x ahead of one for Triton alone."""
FP8_KERNELS = ("cute_moe", BOTH, "triton_fused_moe", "vllm_fused_moe")
"""The same for FP8, where the CuTe kernels are 1.09x faster than our Triton kernel and 1.29x faster than vLLM's, and behind at
no token count by more than 1 %."""
OF_EVERY_FORM = ("triton_fused_moe",)
"Kernels that have activations besides SiLU and scales besides blocks of 128."
_FP8 = torch.float8_e4m3fn
# Fields of the quantisation, of the layer, and of what vLLM's experts make of both from 0.28 on.
_SCALED = {
    "limit": ("gemm1_clamp_limit", "swiglu_limit", "clamp_limit"),
    "alpha": ("gemm1_alpha", "swiglu_alpha", "alpha"),
    "beta": ("gemm1_beta", "swiglu_beta", "beta"),
}
_UNINTERLEAVED = "swigluoai_uninterleave"
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def preference(shape: MoEShape) -> tuple[str, ...]:
    """Kernels whose plans may serve a layer, the fastest first."""
    if shape.form:
        return OF_EVERY_FORM
    return FP8_KERNELS if shape.dtype == "fp8" else KERNELS


@attrs.frozen
class Refusal:
    """Why a layer stays with vLLM; `level` says who needs to know: a warning is for what a flag or a plan could change."""

    reason: str
    level: int = logging.INFO


def by_another(name: str) -> Refusal:
    """That of a layer which vLLM runs with another kernel than `TritonExperts`."""
    return Refusal(f"vLLM runs it with {name}; start it with --moe-backend triton", logging.WARNING)


def layer_shape(config: Any, quant: Any) -> MoEShape | Refusal:
    """The shape of a layer on this rank by vLLM's `FusedMoEConfig` and `FusedMoEQuantConfig`, or why we cannot run it."""
    activation = _activation(config, quant)
    if isinstance(activation, Refusal):
        return activation
    if config.has_bias or quant.w1_bias is not None or quant.w2_bias is not None:
        return Refusal("its experts have biases")
    if config.is_lora_enabled:
        return Refusal("LoRA is enabled")
    if config.in_dtype not in _DTYPES:
        return Refusal(f"its activations are {config.in_dtype}")
    scales = ""
    if quant.quant_dtype is None and quant.weight_quant_dtype is None:
        dtype = _DTYPES[config.in_dtype]
    elif quant.quant_dtype == _FP8 and quant.weight_quant_dtype == _FP8 and (scales := _scales(quant)):
        if config.in_dtype != torch.bfloat16:
            return Refusal(f"its FP8 layers take {config.in_dtype}, not bfloat16")
        dtype = "fp8"
    elif quant.quant_dtype == _FP8 and (quant.a1_scale is not None or quant.a2_scale is not None):
        return Refusal("its activations have static scales that are not two float32 numbers, beside one an expert")
    else:
        return Refusal(f"it is quantised as {quant.weight_quant_dtype} with {quant.quant_dtype} activations")
    if (reason := _strange(config, quant)) is not None:
        return Refusal(reason)
    return MoEShape(
        config.num_experts,
        config.experts_per_token,
        config.hidden_dim,
        config.intermediate_size_per_partition,
        dtype,
        config.num_local_experts,
        activation,
        scales or "block-128",
    )


def _activation(config: Any, quant: Any) -> Activation | Refusal:
    """What vLLM's `TritonExperts` make of gate and up."""
    name = str(getattr(config.activation, "value", config.activation))
    if name not in ("silu", "gelu_tanh", _UNINTERLEAVED):
        return Refusal(f"its activation is {name}, not silu, gelu_tanh or {_UNINTERLEAVED}")
    given: dict[str, float] = {}
    for field, (of_quant, of_layer, _) in _SCALED.items():
        first, second = getattr(quant, of_quant, None), getattr(config, of_layer, None)
        # Which one counts where they differ has changed between releases.
        if second is not None and first != second:
            return Refusal(f"its {of_quant} is {first} and its {of_layer} {second}")
        if first is not None:
            given[field] = first
    # SiLU knows a limit alone, the others do not ask for it.
    ignored = given if name == "gelu_tanh" else [field for field in given if name == "silu" and field != "limit"]
    if ignored:
        return Refusal(f"its activation is {name} with {', '.join(ignored)}, which vLLM passes over")
    try:
        return Activation("gelu_tanh") if name == "gelu_tanh" else Activation("silu", **given)
    except InputError as error:
        return Refusal(str(error).rstrip("."))


def _scales(quant: Any) -> str:
    """The form of an FP8 layer's scales as `MoEShape` names it, "" for another one."""
    given = [its for its in (quant.a1_scale, quant.a2_scale) if its is not None]
    if given:
        numbers = [its.numel() == 1 and its.dtype == torch.float32 for its in given] == [True, True]
        plain = quant.block_shape is None and not quant.per_act_token_quant and not quant.per_out_ch_quant
        by_tensor = all(its is not None and its.dim() == 1 for its in (quant.w1_scale, quant.w2_scale))
        return "static" if numbers and plain and by_tensor else ""
    if quant.block_shape is not None:
        return {(side, side): f"block-{side}" for side in (128, 64, 32)}.get(tuple(quant.block_shape), "")
    # A scale an expert may come with a scale a token or one for all of them: ours is by token, which is never coarser.
    ranks = tuple(0 if its is None else its.dim() for its in (quant.w1_scale, quant.w2_scale))
    if quant.per_out_ch_quant:
        return "channel" if quant.per_act_token_quant and ranks == (3, 3) else ""
    return "tensor" if ranks == (1, 1) else ""


def _strange(config: Any, quant: Any) -> str | None:
    """A setting of the layer that we do not know and that says something: releases to come will have some."""
    descriptions = [("FusedMoEQuantDesc", getattr(quant, name)) for name in ("_a1", "_a2", "_w1", "_w2")]
    configs = [("FusedMoEConfig", config), ("FusedMoEParallelConfig", config.moe_parallel_config)]
    each = [*configs, ("FusedMoEQuantConfig", quant), *descriptions]
    return next((reason for one in each if (reason := strange(*one)) is not None), None)


def unlike(experts: Any, shape: MoEShape) -> Refusal | None:
    """What vLLM's own experts of a layer were told to do otherwise than ours, as far as their construction says."""
    told = getattr(experts, "activation_config", None)  # from 0.28 on
    if told is not None:
        for field, (_, _, name) in _SCALED.items():
            its, ours = getattr(told, name, None), getattr(shape.activation, field)
            if its != ours:
                return Refusal(f"its activation has {name}={its}, not {ours}")
        names = [name for _, _, name in _SCALED.values()]
        if (reason := strange("ApplyMoEActivationConfig", told, names)) is not None:
            return Refusal(reason)
    if getattr(experts, "quantization_emulation", False):
        return Refusal("its quantisation is emulated")
    wide = getattr(experts, "output_hidden_dim", lambda size: size)(shape.hidden_size)  # from 0.33 on
    return None if wide == shape.hidden_size else Refusal(f"its output is {wide} wide, not {shape.hidden_size}")


def command(model: str, config: Any, shape: MoEShape | None = None) -> str:
    """The command that makes the plans of a model for this parallelism.

    Args:
        shape: what the plans must serve; a layer that the model's config does not give, or whose config is not here, is
            named by its own sizes. None trusts the config.
    """
    redundant = config.num_experts - (getattr(config, "num_logical_experts", None) or config.num_experts)
    size = config.ep_size if config.use_ep else config.tp_size
    ranks = Ranks(size, bool(config.use_ep and config.ep_size > 1), redundant)
    profile = "rampwrap profile --engine vllm"
    options = f"{profile} --model {shlex.quote(model)}{ranks.arguments}"
    if shape is None:
        return options
    for dtype in (None, shape.dtype):
        try:
            found = read_layers(model, ranks, dtype=dtype, engine="vllm")
        except InputError:
            continue
        if shape in found.shapes:
            return options + (f" --dtype {dtype}" if dtype else "")
    return f"{profile} {shape_arguments(shape)}"
