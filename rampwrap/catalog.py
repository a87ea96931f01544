"""Kernels by name: how the command line finds an adapter, or a kernel of the user's own."""

import importlib
from collections.abc import Callable

from rampwrap.errors import InputError
from rampwrap.kernel import Kernel, MoEShape
from rampwrap.portfolio import Portfolio, members_of

# name -> where its factory lives; a factory takes the layer's shape. A new backend is one file and one line here.
KERNELS = {
    "triton_fused_moe": "rampwrap.adapters.triton_fused_moe:TritonFusedMoE",
    "cute_moe": "rampwrap.adapters.cute_moe:CuteFusedMoE",
    "vllm_fused_moe": "rampwrap.adapters.vllm_fused_moe:VllmFusedMoE",
    "alpha_moe": "rampwrap.adapters.alpha_moe:AlphaMoE",
    "torch_grouped_mm": "rampwrap.adapters.torch_grouped_mm:TorchGroupedMM",
    "sim": "rampwrap.sim:SimKernel",
}
CHOOSES_IN_GRAPH = ("triton_fused_moe", "vllm_fused_moe", "alpha_moe")
"Those that can run candidates of which the GPU lets one run; plans for others hold one config for each graph."


def make_kernel(name: str, shape: MoEShape) -> Kernel:
    """A kernel for `shape`.

    Args:
        name: one of `KERNELS`, ``portfolio:a+b`` for several of them seen as one, or ``package.module:factory`` of the
            user's own.
        shape: handed to the factory.

    Raises:
        InputError: an unknown name, a package that is not installed, or a factory that is not there.
    """
    if members := members_of(name):
        return Portfolio([make_kernel(member, shape) for member in members])
    where = KERNELS.get(name, name)
    module_name, colon, attribute = where.partition(":")
    if not colon:
        raise InputError(
            f"kernel {name!r} is unknown; use one of {', '.join(KERNELS)}, portfolio:a+b of them, "
            "or package.module:factory."
        )
    try:
        factory: Callable[[MoEShape], Kernel] = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InputError(f"kernel {name!r} needs a package that is not here ({error}); install it first.") from error
    except AttributeError:
        raise InputError(f"kernel {name!r}: module {module_name} has no {attribute}; check the spelling.") from None
    return factory(shape)
