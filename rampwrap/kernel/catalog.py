"""Kernels by name: how the command line finds an adapter, or a kernel of the user's own."""

import importlib
import inspect
import pathlib
import sys
import traceback

from rampwrap.errors import InputError, RampwrapError
from rampwrap.kernel.device import no_gpu
from rampwrap.kernel.names import members_of
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape

# name -> where its factory lives; a factory takes the layer's shape. A new backend is one file and one line here.
KERNELS = {
    "triton_fused_moe": "rampwrap.adapters.triton_fused_moe:TritonFusedMoE",
    "cute_moe": "rampwrap.adapters.cute_moe:CuteFusedMoE",
    "vllm_fused_moe": "rampwrap.adapters.vllm_fused_moe:VllmFusedMoE",
    "alpha_moe": "rampwrap.adapters.alpha_moe:AlphaMoE",
    "deep_gemm": "rampwrap.adapters.deep_gemm:DeepGemmMoE",
    "flashinfer_cute": "rampwrap.adapters.flashinfer_cute:FlashInferCuteMoE",
    "torch_grouped_mm": "rampwrap.adapters.torch_grouped_mm:TorchGroupedMM",
    "sim": "rampwrap.testing.sim:SimKernel",
}
GPU_ONLY = {"triton_fused_moe", "cute_moe", "vllm_fused_moe", "alpha_moe", "deep_gemm", "flashinfer_cute"}
CHOOSES_IN_GRAPH = ("triton_fused_moe", "vllm_fused_moe", "alpha_moe")
"Those that can run candidates of which the GPU lets one run; plans for others hold one config for each graph."


def make_kernel(name: str, shape: MoEShape) -> Kernel:
    """A kernel for `shape`.

    Args:
        name: one of `KERNELS`, ``portfolio:a+b`` for several of them seen as one, or ``package.module:factory`` of the
            user's own.
        shape: handed to the factory.

    Raises:
        InputError: an unknown name, a package that is not installed, a factory that is not there, or one that raises.
    """
    if members := members_of(name):
        return Portfolio([make_kernel(member, shape) for member in members])
    where = KERNELS.get(name, name)
    module_name, colon, attribute = where.partition(":")
    if not colon or not attribute:
        raise InputError(
            f"kernel {name!r} is unknown; use one of {', '.join(KERNELS)}, portfolio:a+b of them, "
            "or package.module:factory."
        )
    if name in KERNELS:
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except ImportError as error:
            raise InputError(
                f"kernel {name!r} needs a package that is not here ({error}); install it first."
            ) from error
        made: Kernel = factory(shape)
        return made
    return _own_kernel(name, module_name, attribute, shape)


def missing_gpu(name: str) -> str | None:
    """Why a kernel of ours cannot run here for want of a GPU; None if it can, or nobody knows."""
    return no_gpu() if GPU_ONLY.intersection(members_of(name) or [name]) else None


def _own_kernel(name: str, module_name: str, attribute: str, shape: MoEShape) -> Kernel:
    """A kernel of the user's own: what goes wrong in it is said as what it is."""
    top, here = module_name.partition(".")[0], str(pathlib.Path.cwd())
    # As for `python -m`, the current folder comes first, where it holds the module.
    if here not in sys.path and any(pathlib.Path(here, place).exists() for place in (f"{top}.py", top)):
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            hint = (
                f"write {module_name.removesuffix('.py')}:{attribute}"
                if module_name.endswith(".py")
                else "check the name"
            )
            raise InputError(
                f"kernel {name!r}: no module {missing} is installed or in {here}; {hint}, or run where it is."
            ) from error
        raise InputError(f"kernel {name!r}: importing {module_name} raises {_told(error)}.") from error
    if not hasattr(module, attribute):
        raise InputError(f"kernel {name!r}: module {module_name} has no {attribute}; check the spelling.")
    factory = getattr(module, attribute)
    called = f"{attribute}()" if _takes_nothing(factory) else f"{attribute}(shape)"
    try:
        made = factory() if called.endswith("()") else factory(shape)
    except RampwrapError:
        raise
    except Exception as error:
        raise InputError(f"kernel {name!r}: {called} raises {_told(error)}.") from error
    lacking = [member for member in ("name", "configs", "grid", "launch") if not hasattr(made, member)]
    if lacking:
        raise InputError(f"kernel {name!r}: {called} gives no kernel, it lacks {', '.join(lacking)}.")
    kernel: Kernel = made
    return kernel


def _takes_nothing(factory: object) -> bool:
    """Whether it can be called, but not with a shape: a class without `__init__`, say."""
    try:
        return callable(factory) and not inspect.signature(factory).parameters
    except ValueError:  # written in C, without a signature
        return False


def _told(error: Exception) -> str:
    """An error of a user's module, with the line it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{type(error).__name__}: {text.removesuffix('.') or 'no message'}{where}"
