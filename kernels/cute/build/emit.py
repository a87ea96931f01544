"""Traces and compiles one variant for sm_90a and writes it as an object file; needs the CuTe DSL, but no GPU."""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import os
from pathlib import Path
from typing import Any

ARCH = "sm_90a"
# The DSL reads it when it is imported.
os.environ.setdefault("CUTE_DSL_ARCH", ARCH)

import cutlass.cute as cute  # noqa: E402
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint8  # noqa: E402
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream  # noqa: E402

from rampwrap.kernels.cute.configs import SCALE, STREAM_CHUNK, STREAMS, Variant  # noqa: E402
from rampwrap.kernels.cute.device.down import DownBf16, DownFp8  # noqa: E402
from rampwrap.kernels.cute.device.mega import MegaBf16, MegaFp8  # noqa: E402
from rampwrap.kernels.cute.device.prefill_down import PrefillDownBf16, PrefillDownFp8  # noqa: E402
from rampwrap.kernels.cute.device.prefill_up import PrefillUpBf16, PrefillUpFp8  # noqa: E402
from rampwrap.kernels.cute.device.ragged import (  # noqa: E402
    RaggedDownBf16,
    RaggedDownFp8,
    RaggedUpBf16,
    RaggedUpFp8,
)
from rampwrap.kernels.cute.device.stream import Stream, StreamOverlapping  # noqa: E402
from rampwrap.kernels.cute.device.up import UpBf16, UpFp8  # noqa: E402

KERNELS: dict[tuple[str, str], Any] = {
    ("up", "fp8"): UpFp8,
    ("up", "bf16"): UpBf16,
    ("down", "fp8"): DownFp8,
    ("down", "bf16"): DownBf16,
}
KERNELS |= {("mega", "fp8"): MegaFp8, ("mega", "bf16"): MegaBf16}
KERNELS |= {("prefill_up", "fp8"): PrefillUpFp8, ("prefill_up", "bf16"): PrefillUpBf16}
KERNELS |= {("prefill_down", "fp8"): PrefillDownFp8, ("prefill_down", "bf16"): PrefillDownBf16}
KERNELS |= {("ragged_up", "fp8"): RaggedUpFp8, ("ragged_up", "bf16"): RaggedUpBf16}
KERNELS |= {("ragged_down", "fp8"): RaggedDownFp8, ("ragged_down", "bf16"): RaggedDownBf16}
KERNELS |= {("stream", "fp8"): Stream, ("stream_overlapping", "fp8"): StreamOverlapping}
STREAM = make_fake_stream(use_tvm_ffi_env_stream=True)


def tensor(of: Any, *shape: Any, align: int = 16) -> Any:
    """A stand-in, rows one behind the other."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(of, shape, stride_order=order, assumed_align=align)


def arguments(variant: Variant) -> list[Any]:
    """Stand-ins of the tensors and numbers of a variant's function, in order; every extent is a run-time value.

    Extents that must be equal are one symbol: the compiled function refuses tensors where they are not.
    """
    size = cute.sym_int
    if variant in STREAMS:
        return [
            tensor(Uint8, size(), size(divisibility=STREAM_CHUNK)),
            tensor(Int32, size(), align=4),
            Int32(132),
            STREAM,
        ]
    fp8 = variant.config.dtype == "fp8"
    dtype = Float8E4M3FN if fp8 else BFloat16
    multiple = SCALE if fp8 else variant.config.step
    tokens, slots, experts = size(), size(), size()
    hidden, columns, both = size(divisibility=multiple), size(divisibility=multiple), size(divisibility=2 * multiple)

    def scales(*shape: Any) -> list[Any]:
        return [tensor(Float32, *shape, align=4)] if fp8 else []

    routing = [tensor(Int32, size(), align=4), tensor(Int32, size(), align=4), tensor(Int32, 1, align=4)]
    x = [tensor(dtype, tokens, hidden), *scales(tokens, size())]
    w13 = [tensor(dtype, experts, both, hidden), *scales(experts, size(), size())]
    w2 = [tensor(dtype, experts, hidden, columns), *scales(experts, size(), size())]
    h = [tensor(dtype, slots, columns), *scales(slots, size())]
    weights = tensor(Float32, slots, align=4)
    # The prefill form keeps h in the order of the blocks, and scales of 128 columns of all rows together.
    rows = size(divisibility=SCALE)
    ordered = [tensor(dtype, rows, columns), *([tensor(Float32, size(), rows)] if fp8 else [])]
    if variant.role == "prefill_up":
        tensors = [*x, *w13, *routing, *ordered]
    elif variant.role == "prefill_down":
        tensors = [*ordered, *w2, *routing, weights, tensor(BFloat16, slots, hidden)]
    elif variant.role in ("up", "ragged_up"):
        tensors = [*x, *w13, *routing, *h]
    elif variant.role in ("down", "ragged_down"):
        tensors = [*h, *w2, *routing, weights, tensor(BFloat16, slots, hidden)]
    else:
        tensors = [*x, *w13, *w2, *routing, weights, tensor(Float32, tokens, hidden)]
    numbers = [Int32(8), Int32(8), Int32(64), Int32(132), Int32(256)]  # as of `host.launch.run_layer`: types only
    return [*tensors, *numbers, STREAM]


def compile_variant(variant: Variant, folder: Path, options: str = "") -> Path:
    """Compiles a variant and writes `folder`/<symbol>.o, whose function is named by its symbol.

    Processes may compile side by side; threads may not.

    Args:
        variant: a legal one (`configs.why_illegal`); what does not fit the machine compiles all the same.
        folder: exists.
        options: more of the DSL's compile options, such as --keep-ptx.
    """
    kernel = KERNELS[variant.role, variant.config.dtype](variant.config)
    # Without an engine to run it here: the same object file, a third of the time less.
    compiled = cute.compile(
        kernel, *arguments(variant), options=f"--enable-tvm-ffi {options}".strip(), no_jit_engine=True
    )
    path = folder / f"{variant.symbol}.o"
    compiled.export_to_c(str(path), function_name=variant.symbol)
    return path
