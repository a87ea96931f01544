"""Layers without a plan: where the CuTe kernels' defaults serve them, and why not elsewhere.

    RAMPWRAP_PLANS_ONLY 1 serves plans alone: without one vLLM keeps its layers, and transformers gets our Triton kernel

transformers' layers are served by the Triton kernel's defaults otherwise. On the tables of an H200 the defaults are ahead of vLLM's Triton kernel at its best for each workload: 1.09-1.50x in the mean at
every token count in FP8, 1.02-1.25x in bf16 (`benchmarks/defaults.py`). vLLM 0.33 with them: OLMoE
bf16 on an H100, 1.03-1.10x in decode and 1.05-1.32x in prefill of GPU time; no other model was measured.
"""

from typing import Any

from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import Config, Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.folder import enabled
from rampwrap.policy.static import default_table

PLANS_ONLY = "RAMPWRAP_PLANS_ONLY"
ENGINES = ("vllm", "transformers")
"Whose hooks serve them."
KERNEL = "cute_moe"
_HOPPER = {"H100", "H200"}
"In the names of devices that say nothing of their capability, as those in plans made elsewhere."


def kernel_without_plan(shape: MoEShape, device: Device) -> Kernel | str:
    """The kernel whose defaults serve a layer on a GPU, loaded; or why none does, in a clause."""
    if enabled(PLANS_ONLY):
        return f"{PLANS_ONLY} is set"
    if not _is_hopper(device):
        return f"defaults serve on sm_90 alone, and this is {device.label}"
    if shape.form:
        return f"no defaults serve layers with {' and '.join(shape.form)}"
    kernel: Any
    try:
        kernel = make_kernel(KERNEL, shape)
    except (InputError, ConfigError) as error:
        return str(error).removesuffix(".")
    configs = default_configs(kernel)
    if kernel.must_compile(configs):
        # A start that takes minutes longer is for those who ask for it.
        return "the CuTe kernels are not built; run 'rampwrap build-kernels'"
    failed = next((reason for reason in kernel.precompile(configs) if reason), None)
    made: Kernel = kernel
    return made if failed is None else str(failed).removesuffix(".")


def default_configs(kernel: Kernel) -> list[Config]:
    """What a kernel runs without a plan, each config once."""
    return [kernel.configs[index] for index in sorted(set(default_table(kernel).indices))]


def _is_hopper(device: Device) -> bool:
    if device.capability is not None:
        return device.capability == "9.0"
    return bool(_HOPPER & set(device.name.split()))
