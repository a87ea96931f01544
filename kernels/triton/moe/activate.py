"""What the first GEMM's epilogue makes of a tile of gate and up columns."""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

from typing import Any

import triton
import triton.language as tl
from rampwrap.kernel.activation import Activation


def activation_arguments(activation: Activation) -> dict[str, Any]:
    """An activation as keyword arguments of `up_kernel`."""
    return {
        "GELU_TANH": activation.name == "gelu_tanh",
        "LIMIT": None if activation.limit is None else float(activation.limit),
        "ALPHA": float(activation.alpha),
        "BETA": float(activation.beta),
    }


@triton.jit
def activate(gate, up, GELU_TANH: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """f(gate) * (up + BETA) in float32, elementwise, as `Activation` says; of SiLU as it is nothing more is compiled."""
    if LIMIT is not None:
        # A NaN stays one: by default the smaller number would hide it.
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if BETA != 0.0:
        up += BETA
    if GELU_TANH:
        # (1 + tanh(z)) / 2 = sigmoid(2 z), which neither cancels nor overflows; z = sqrt(2 / pi) (gate + ...).
        twice_z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-twice_z)) * up
    elif ALPHA != 1.0:
        return gate / (1.0 + tl.exp(-ALPHA * gate)) * up
    else:
        return gate / (1.0 + tl.exp(-gate)) * up
