"""Which layers of transformers the kernel runs."""

import functools
import importlib.metadata
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.plan.folder import DISABLE, disabled

TESTED = ("5.17",)
"Releases of transformers that this module was tested with; layers of others fall back."
# The tiles of the kernel's configs are made for the shared memory of sm_90.
MIN_CAPABILITY = (9, 0)


def refusal(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> str | None:
    """Why a layer goes to transformers' own implementation, in a clause; None where the kernel runs it."""
    if not getattr(module, "has_gate", True):
        return "it has no gate"
    if getattr(module, "has_bias", False):
        return "it has biases"
    if getattr(module, "is_transposed", False):
        return "its weights are transposed"
    if not getattr(module, "is_concatenated", True):
        return "its gate and up rows are interleaved"
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm after each expert"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__module__ != "transformers.integrations.moe":
        return "it has a gate of its own"
    activation = getattr(module, "act_fn", None)
    if not _is_silu(activation):
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"its activation is {name}, not SiLU"
    w13, w2 = module.gate_up_proj, module.down_proj
    if isinstance(w13, DTensor) or isinstance(w2, DTensor):
        return "its weights are DTensors"
    for tensor in (w13, w2, hidden_states):
        if tensor.dtype != torch.bfloat16:
            return f"it computes in {tensor.dtype}, not bfloat16"
    experts, rows, hidden = w13.shape
    if w2.shape != (experts, hidden, rows // 2) or rows % 2 or not w13.is_contiguous() or not w2.is_contiguous():
        return "its weights are not contiguous [E, 2I, H] and [E, H, I]"
    if top_k_index.shape[1] > experts:
        return f"top_k={top_k_index.shape[1]} is more than the {experts} experts of this rank"
    if torch.is_grad_enabled() and (hidden_states.requires_grad or w13.requires_grad or w2.requires_grad):
        return "gradients are asked for, which the kernel has none of; use torch.no_grad() to infer"
    environment: str | None = _environment(hidden_states.device.type, hidden_states.device.index)
    return environment


def _is_silu(activation: Any) -> bool:
    """Whether an activation is SiLU: torch's module or function, or transformers' own module."""
    return (
        isinstance(activation, torch.nn.SiLU)
        or activation is torch.nn.functional.silu
        or type(activation).__name__ == "SiLUActivation"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _environment(device_type: str, index: int | None) -> str | None:
    """What of the process and the device speaks against the kernel; asked while tracing, not by the traced function."""
    return f"{DISABLE} is set" if disabled() else _installation(device_type, index)


@functools.cache
def _installation(device_type: str, index: int | None) -> str | None:
    """What of it cannot change; reading a package's version takes a millisecond, ten times a layer's launches."""
    found = importlib.metadata.version("transformers")
    if ".".join(found.split(".")[:2]) not in TESTED:
        return f"transformers {found} was not tested, only {', '.join(TESTED)}"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY or torch.version.hip:
            return f"the GPU is sm_{capability[0]}{capability[1]}, the kernel is made for sm_90 and later"
        return None
    return None if INTERPRETED.value and device_type == "cpu" else f"its tensors are on {device_type}, not on a GPU"
