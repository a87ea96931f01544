"""What Triton's CPU interpreter lacks, so that the kernels give the GPU's numbers there too.

In the interpreter `tl.dot` multiplies the bit patterns of bf16 operands, and downcasts to bf16 and FP8
truncate. `operand` and `downcast` put that right; compiled kernels get the plain operations.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def operand(x):
    """An operand of `tl.dot`."""
    if INTERPRETED:
        return x.to(tl.float32)
    return x


@triton.jit
def downcast(x, TYPE: tl.constexpr):
    """float32 to a narrower type, rounded to nearest even."""
    if INTERPRETED:
        if tl.bfloat16 == TYPE:
            x = _round_mantissa(x, 16)
        elif tl.float8e4nv == TYPE:
            x = _round_mantissa(x, 20)
    return x.to(TYPE)


@triton.jit
def _round_mantissa(x, DROP: tl.constexpr):
    """x with the lowest DROP bits rounded away, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits += (1 << (DROP - 1)) - 1 + ((bits >> DROP) & 1)
    return ((bits >> DROP) << DROP).to(tl.float32, bitcast=True)
