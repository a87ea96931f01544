"""FP8 (e4m3) activations with one scale for each 128 consecutive values of a row, for fewer, for the whole row, or for all rows.

scale = max(|x|) / 448, q = round(x / scale): the numbers that DeepSeek-style W8A8 checkpoints expect. One for all rows comes with the
weights, q = round(x * (1 / scale)), as vLLM's operator has it.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

from typing import Any

import torch

import triton
import triton.language as tl
from rampwrap.kernels.common.fp8 import FP8_MAX, GROUP, MIN_ABS
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.interpreter import downcast
from rampwrap.kernels.triton.pdl import wait_for_launch_before

_FP8_MAX = tl.constexpr(FP8_MAX)
_MIN_ABS = tl.constexpr(MIN_ABS)


@triton.jit
def quantise_groups(x, FP8_TYPE: tl.constexpr):
    """float32 [rows, columns] -> (e4m3 [rows, columns], float32 scales [rows])."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), _MIN_ABS) / _FP8_MAX
    q = x / scale[:, None]
    q = tl.minimum(tl.maximum(q, -_FP8_MAX), _FP8_MAX)
    return downcast(q, FP8_TYPE), scale


@triton.jit
def quantise_by(x, scale, FP8_TYPE: tl.constexpr):
    """float32 -> e4m3 by one scale that is given; what is beyond its 448 is cut off."""
    q = x * tl.div_rn(1.0, scale)
    q = tl.minimum(tl.maximum(q, -_FP8_MAX), _FP8_MAX)
    return downcast(q, FP8_TYPE)


@triton.jit
def quantise_at(q_ptr, scale_ptr, x_ptr, at, mask, scales_at, scales_mask):
    """Quantises x[at], [groups, columns of one], into q[at] and scale[scales_at], [groups]."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    q, scale = quantise_groups(x, q_ptr.dtype.element_ty)
    tl.store(q_ptr + at, q, mask=mask)
    tl.store(scale_ptr + scales_at, scale, mask=scales_mask)


@triton.jit
def quantise_rows_kernel(
    q_ptr,
    scale_ptr,
    x_ptr,
    unless_zero_ptr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a CTA along axis 0, GROUPS groups of it along axis 1; GROUP is a power of two. With GIVEN the scale is read."""
    wait_for_launch_before(PDL)
    if unless_zero_ptr is not None:  # noqa: SIM102  (only the outer one is known when it compiles)
        if tl.load(unless_zero_ptr) == 0:
            return
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if GIVEN:
        x = tl.load(x_ptr + row * COLUMNS + at, mask=at < COLUMNS, other=0.0).to(tl.float32)
        q = quantise_by(x, tl.load(scale_ptr), q_ptr.dtype.element_ty)
        tl.store(q_ptr + row * COLUMNS + at, q, mask=at < COLUMNS)
    else:
        scales = tl.cdiv(COLUMNS, GROUP)
        quantise_at(q_ptr, scale_ptr, x_ptr, row * COLUMNS + at, at < COLUMNS, row * scales + group, group < scales)


def quantise_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    *,
    unless_zero: torch.Tensor | None = None,
    launch: dict[str, Any] | None = None,
    group: int = GROUP,
    given: bool = False,
) -> None:
    """Quantises x [rows, columns] into q (e4m3, same shape) and scale (float32 [rows, columns / group], [rows, 1] for group 0).

    Writes nothing where the integer in `unless_zero` (one element, on the device) is zero. `launch` are other
    `pdl.arguments` than those for one config. A group is a power of two, or 0 for whole rows. With `given` the scale is one number for
    all of x, and read.
    """
    rows, columns = x.shape
    width = GROUP if given else group or triton.next_power_of_2(columns)
    count = triton.cdiv(columns, width)
    groups = min(1024 // width, triton.next_power_of_2(count)) or 1
    # A warp for 128 values, or 1024 where one row is longer than what a CTA of 4 has in flight.
    warps = min(4, max(1, groups * width // 128)) if width <= 1024 else min(16, width // 1024)
    more = {"num_warps": warps, **(launch or pdl.arguments())}
    grid = (rows, triton.cdiv(count, groups))
    sizes = {"COLUMNS": columns, "GROUPS": groups, "GROUP": width, "GIVEN": given}
    quantise_rows_kernel[grid](q, scale, x, unless_zero, **sizes, **more)
