"""Layers without a plan: where our kernels' defaults serve them, and why not elsewhere.

    RAMPWRAP_PLANS_ONLY 1 serves plans alone: without one vLLM keeps its layers, and transformers gets our Triton kernel

The CuTe kernels' defaults serve where they are built, our Triton kernel's where not; in transformers those serve everywhere else. On
the tables of an H200 both are ahead of vLLM's Triton kernel at its best for each workload: the CuTe kernels 1.09-1.50x in the
mean at every token count in FP8, 1.02-1.25x in bf16, the Triton kernel 1.03-1.45x (`benchmarks/defaults.py`). In GPU time
of vLLM 0.33 on an H100, OLMoE and Qwen3-30B: 1.03-1.12x in decode and 1.04-1.30x in prefill (bf16), 1.03-1.16x and 1.12-1.62x (FP8) by those of the
CuTe kernels, 1.02-1.06x and 1.03-1.19x by those of the Triton kernel (Qwen3-30B bf16; `benchmarks/README.md`).

FP8 layers with scales by channel or tensor (`SCALES`) get the Triton kernel's too. By channel they are 1.14-1.28x over
vLLM's CUTLASS there (Qwen3-30B), as a plan is; by tensor with static activations 1.03-1.05x over vLLM's Triton in decode, with dynamic ones not timed.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rampwrap.errors import ConfigError, RampwrapError
from rampwrap.kernel.activation import SILU
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import Config, Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build.library import ABSENT
from rampwrap.kernels.cute.defaults import lacking
from rampwrap.plan.folder import OneWarning, enabled
from rampwrap.policy.static import default_table

PLANS_ONLY = "RAMPWRAP_PLANS_ONLY"
CUTE, TRITON = "cute_moe", "triton_fused_moe"
KERNELS: Mapping[str, tuple[str, ...]] = {"vllm": (CUTE, TRITON), "transformers": (CUTE,)}
"""Whose defaults an engine's hook serves, the first that can. transformers' runs our Triton kernel's where this gives none, on
whatever GPU and with whatever layer."""
MEASURED = ("bf16", "fp8")
"Dtypes in the tables."
SCALES = ("block-128", "channel", "tensor", "static")
"Forms of FP8 scales whose layers they serve."
_HOPPER = {"H100", "H200"}
"In the names of devices that say nothing of their capability, as those in plans made elsewhere."
_warn = OneWarning(logging.getLogger("rampwrap"))


def kernel_without_plan(shape: MoEShape, device: Device, kernels: Sequence[str] = KERNELS["vllm"]) -> Kernel | str:
    """The kernel whose defaults serve a layer on a GPU, loaded: the first that can; or why none does, in clauses."""
    if enabled(PLANS_ONLY):
        return f"{PLANS_ONLY} is set"
    if not _is_hopper(device):
        return f"defaults serve on sm_90 alone, and this is {device.label}"
    other = shape.form[-1:] if shape.activation != SILU else shape.form if shape.scales not in SCALES else ()
    if other or shape.dtype not in MEASURED:
        return f"no defaults serve layers with {' and '.join(other or (shape.dtype,))}"
    reasons = []
    for name in kernels:
        try:
            kernel = make_kernel(name, shape)
            reason = _unfit(kernel, shape) if name == CUTE else None
        except ConfigError as error:
            reason = str(error)
        except Exception as error:
            # Nobody asked for it: a library, a package or a cache that is broken stops no model. It is worth a line.
            ours = isinstance(error, RampwrapError)
            reason = str(error) if ours else f"it cannot be loaded ({type(error).__name__}: {error})"
            if reason != ABSENT:
                _warn(reason, "rampwrap passes over the defaults of %s: %s", name, reason)
        if reason is None:
            return kernel
        reasons.append(reason.removesuffix("."))
    return "; ".join(reasons)


def _unfit(kernel: Any, shape: MoEShape) -> str | None:
    """Why the CuTe kernels' defaults do not serve a layer, None where they are built and may."""
    if torch.are_deterministic_algorithms_enabled():
        return "torch is told to be deterministic, and the CuTe kernels' one-launch form adds in no fixed order"
    if (far := lacking(kernel.configs, shape)) is not None:
        return far
    configs = default_configs(kernel)
    if kernel.must_compile(configs):
        # A start that takes minutes longer is for those who ask for it.
        return "the CuTe kernels are not built; run 'rampwrap build-kernels'"
    return next((str(reason) for reason in kernel.precompile(configs) if reason), None)


def default_configs(kernel: Kernel) -> list[Config]:
    """What a kernel runs without a plan, each config once."""
    return [kernel.configs[index] for index in sorted(set(default_table(kernel).indices))]


def _is_hopper(device: Device) -> bool:
    if device.capability is not None:
        return device.capability == "9.0"
    return bool(_HOPPER & set(device.name.split()))
