"""vLLM's MoE classes out of a wheel's Python sources, without vLLM's requirements: which modules are its own; see `alone`."""

import importlib
import pathlib

import alone
import torch

LAYER = "vllm.model_executor.layers.fused_moe"
REAL = {
    *(f"{LAYER}.{name}" for name in ("activation", "config", "modular_kernel", "moe_output", "moe_permute_unpermute")),
    *(
        f"{LAYER}.{name}"
        for name in ("topk_weight_and_reduce", "utils", "experts.lora_experts_mixin", "experts.triton_moe")
    ),
    *(f"{LAYER}.experts.{name}" for name in ("cutlass_moe", "fallback", "triton_cutlass_moe")),
    f"{LAYER}.prepare_finalize.no_dp_ep",
    "vllm.model_executor.layers.quantization.utils.quant_utils",
    "vllm.utils.math_utils",
    "vllm.v1.worker.workspace",
}
"Modules that are vLLM's own."


class Platform(alone.Anything):
    """Of `vllm.platforms.current_platform`."""

    def fp8_dtype(self):
        return torch.float8_e4m3fn


class NoAiter:
    """Of `vllm._aiter_ops.rocm_aiter_ops` where there is no ROCm: whatever it is asked, it answers None."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def install(root: pathlib.Path, version: str) -> None:
    """Makes ``import vllm`` find the sources of `REAL` in `root`, and stand-ins for all else of it."""
    alone.install(root, REAL)
    importlib.import_module("vllm").__version__ = version
    importlib.import_module("vllm.platforms").current_platform = Platform()
    importlib.import_module("vllm._aiter_ops").rocm_aiter_ops = NoAiter()
    importlib.import_module("vllm.config").get_current_vllm_config_or_none = lambda: None
