"""vLLM's MoE classes out of a wheel's Python sources, without vLLM's requirements: what they do not need is a stand-in.

Imported, vLLM brings 250 modules of its own and forty packages, and takes ten seconds. The classes that our hook meets need a
dozen of these. So `install` answers for every other module of vLLM: names in capitals are empty classes, a call without
arguments is False (no ROCm, no micro-batches, no forward context), a decorator leaves what it decorates.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types

import torch

LAYER = "vllm.model_executor.layers.fused_moe"
REAL = {
    *(f"{LAYER}.{name}" for name in ("activation", "config", "modular_kernel", "moe_output", "topk_weight_and_reduce")),
    *(f"{LAYER}.{name}" for name in ("utils", "experts.lora_experts_mixin", "experts.triton_moe")),
    f"{LAYER}.prepare_finalize.no_dp_ep",
    "vllm.model_executor.layers.quantization.utils.quant_utils",
    "vllm.utils.math_utils",
    "vllm.v1.worker.workspace",
}
"Modules that are vLLM's own."


class Anything:
    """Stands for a value that nothing depends on."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        if not args and not kwargs:
            return False
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, key):
        return Anything()

    def __or__(self, other):
        return Anything()

    __ror__ = __or__

    def __bool__(self):
        return False


class Platform(Anything):
    """Of `vllm.platforms.current_platform`."""

    def fp8_dtype(self):
        return torch.float8_e4m3fn


class NoAiter:
    """Of `vllm._aiter_ops.rocm_aiter_ops` where there is no ROCm: whatever it is asked, it answers None."""

    def __getattr__(self, name):
        return lambda *_, **__: None


class Class(type):
    """Of classes that stand in: they have every constant, and may be given parameters."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(cls, key):
        return cls


class Module(types.ModuleType):
    """Stands for a module: has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = Class(name, (), {}) if name[0].isupper() and not name.isupper() else Anything()
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for all of vLLM."""

    def __init__(self, root):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "vllm":
            return None
        if name in REAL and (file := self.root.joinpath(*name.split(".")[1:]).with_suffix(".py")).is_file():
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        module.__path__ = [str(self.root.joinpath(*module.__name__.split(".")[1:]))]


def install(root: pathlib.Path, version: str) -> None:
    """Makes ``import vllm`` find the sources in `root` and nothing else of it."""
    torch.compile = lambda model=None, **options: (
        model or (lambda its: its)
    )  # decorates a few helpers, and takes 3 s to import
    sys.meta_path.insert(0, Finder(root))
    importlib.import_module("vllm").__version__ = version
    importlib.import_module("vllm.platforms").current_platform = Platform()
    importlib.import_module("vllm._aiter_ops").rocm_aiter_ops = NoAiter()
    importlib.import_module("vllm.config").get_current_vllm_config_or_none = lambda: None
