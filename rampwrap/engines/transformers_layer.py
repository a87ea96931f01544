"""Which releases and which layers of transformers the kernel runs: by what they promise, not by their number.

A release is checked once: its experts functions take the arguments that ours takes, and on a tiny layer they compute what the
kernel computes. A layer is checked by its flags and its parts: any that is not known here may change the result, so the
layer is left to transformers. (From 5.20 on Muse Spark has a norm after each expert, which a check of the flags of 5.17 let
through.)
"""

import ctypes
import functools
import importlib.metadata
import inspect
import logging
import types
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.plan.folder import DISABLE, disabled

CHECKED = ("5.17", "5.24")
"""Oldest and newest release that the tests ran with. Older ones are not served; later ones are where they pass the checks, with
a line in the log."""
FLAGS: dict[str, tuple[bool, str]] = {
    "has_gate": (True, "it has no gate"),
    "has_bias": (False, "it has biases"),
    "has_post_expert_norm": (False, "it has a norm after each expert"),
    "is_transposed": (False, "its weights are transposed"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
}
"Flags that transformers' decorator sets: the value that the kernel is made for, and what another one means."
PARTS = frozenset({"gate_up_proj", "down_proj", "act_fn"})
"Parameters, buffers and submodules of a layer that the kernel computes."
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"What transformers hands to an experts function, after the module."
# The tiles of the kernel's configs are made for the shared memory of sm_90.
MIN_CAPABILITY = (9, 0)


def refusal(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> str | None:
    """Why a layer goes to transformers' own implementation, in a clause; None where the kernel runs it."""
    for flag, (made_for, reason) in FLAGS.items():
        if getattr(module, flag, made_for) is not made_for:
            return reason
    unknown: str | None = _unknown_at(id(module)) if torch.compiler.is_compiling() else _unknown(module)
    if unknown is not None:
        return unknown
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _unknown_at(address: int) -> str | None:
    """`_unknown` of the module that lies at an address, asked while tracing, when the traced function holds it.

    Torch 2.11 takes no module as an argument of such a function, and cannot trace a loop over a module's ``__dict__``. It does trace
    ``id``, whose result holds for this module alone: each layer is asked about once.
    """
    return _unknown(ctypes.cast(address, ctypes.py_object).value)


def _unknown(module: Any) -> str | None:
    """The first flag, parameter, buffer or submodule that is not known here, in a clause; None without one."""
    for holder in (module.__dict__, *(vars(cls) for cls in type(module).__mro__ if cls is not torch.nn.Module)):
        for name, value in holder.items():
            if name.startswith(("has_", "is_")) and name not in FLAGS and not callable(value):
                return f"its flag {name}={value} is not known to rampwrap"
    for parts in (module._parameters, module._buffers, module._modules):
        for name in parts:
            if name not in PARTS:
                return f"its part {name} is not known to rampwrap"
    return None


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
    if (reason := mismatch(importlib.metadata.version("transformers"))) is not None:
        return reason
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY or torch.version.hip:
            return f"the GPU is sm_{capability[0]}{capability[1]}, the kernel is made for sm_90 and later"
        return None
    return None if INTERPRETED.value and device_type == "cpu" else f"its tensors are on {device_type}, not on a GPU"


@functools.cache
def mismatch(version: str) -> str | None:
    """What speaks against the installed transformers, of this version, in a clause; None where it keeps the contract."""
    from packaging.version import Version  # which transformers asks for

    found = Version(version)
    if found < Version(CHECKED[0]):
        return f"transformers {found} is older than {CHECKED[0]}"
    broken = _broken()
    if broken is not None:
        return f"transformers {found} is not what rampwrap was made for: {broken}"
    if found.release[:2] > Version(CHECKED[-1]).release:
        logging.getLogger("rampwrap").info(
            "transformers %s is newer than %s, the last that rampwrap's tests ran with; it passes the checks and is served.",
            found,
            CHECKED[-1],
        )
    return None


def _broken() -> str | None:
    """What of transformers' experts functions differs from what ours promises to replace, in a clause; a few milliseconds."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

        function = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        given = tuple(inspect.signature(function).parameters)
        if given[1:] != ARGUMENTS:
            return f"its experts functions take ({', '.join(given)})"
        return _computes_otherwise(function, use_experts_implementation(_Tiny))
    except Exception as error:  # whatever it is: a release that fails here is not served
        return f"it fails on a layer of plain SiLU experts with {type(error).__name__}: {error}"


def _computes_otherwise(function: Any, experts_class: Any) -> str | None:
    """What an experts function makes of a layer of plain SiLU experts, where the kernel makes something else; in a clause."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        layer = experts_class(types.SimpleNamespace())
        unknown: str | None = _unknown(layer)
        if unknown is not None:
            return unknown
        # No generator: whoever seeded theirs gets the numbers they would have got.
        x = torch.linspace(-1, 1, 40).view(5, 8)
        ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
        weights = torch.linspace(0.1, 0.9, 10).view(5, 2)
        theirs = function(layer, x, ids, weights)
        expected = torch.zeros_like(x)
        for token, slot in ((t, k) for t in range(5) for k in range(2)):
            expert = int(ids[token, slot])
            gate, up = (layer.gate_up_proj[expert] @ x[token]).chunk(2)
            h = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, slot] * (layer.down_proj[expert] @ h)
    if theirs.shape != x.shape or not torch.allclose(theirs.float(), expected, rtol=1e-3, atol=1e-3):
        return "its grouped_mm computes something else on a layer of plain SiLU experts"
    return None


class _Tiny(torch.nn.Module):
    """Three experts of transformers' plain layout."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 3, torch.nn.SiLU()
        self.gate_up_proj = torch.nn.Parameter(torch.linspace(-0.5, 0.6, 3 * 16 * 8).sin().view(3, 16, 8))
        self.down_proj = torch.nn.Parameter(torch.linspace(0.7, -0.4, 3 * 8 * 8).cos().view(3, 8, 8))

    def forward(self) -> None:
        """Never called: transformers' decorator asks for one."""
