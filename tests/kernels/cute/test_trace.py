"""The CuTe kernels' programs are those that the GPU tests passed on.

The CPU cannot run them, but traces them in 0.15 s each: every barrier, TMA box, register count and launch attribute stands in the
traced program. `data/cute_traces.json` holds their digests, of kernels of every role, form and dtype. Where a digest
differs on purpose, run tests/gpu/kernels/test_cute_gpu.py on a GPU, then

    REFRESH_TRACES=1 python -m pytest tests/kernels/cute/test_trace.py
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re

import pytest

from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.configs import TOKENS_AS_M, CuteConfig, Variant

RECORD = pathlib.Path(__file__).parents[2] / "data" / "cute_traces.json"
if building.dsl_version() is None:
    pytest.skip("needs the CuTe DSL (pip install rampwrap[cute])", allow_module_level=True)
# The two widths of a warpgroup's tile, clusters of 1, 2 and 4 CTAs, one and two consumer warpgroups, few and most tokens.
TWO = [(8, 16, 4, 6), (64, 16, 8, 6), (40, 32, 4, 4), (24, 32, 8, 5), (112, 32, 8, 4), (72, 64, 4, 3)]
ONE = [(8, 16, 4, 10), (56, 16, 8, 4), (40, 32, 4, 6), (24, 32, 8, 5), (104, 32, 8, 3), (64, 64, 4, 3)]
PREFILL = [TOKENS_AS_M]
SAMPLE = [
    variant
    for form, tiles in (("two", TWO), ("one", ONE), ("prefill", PREFILL))
    for dtype in ("fp8", "bf16")
    for tile in tiles
    for variant in CuteConfig(form, dtype, *tile).variants
]


class SeenError(Exception):
    """Ends a compilation once the program is traced."""


def digest(variant: Variant, folder: pathlib.Path) -> str:
    """Of the canonical traced program, host and device; the same on every machine and wherever the sources lie."""
    from rampwrap.kernels.cute.build.emit import compile_variant  # isort: skip; tells the DSL the architecture

    from cutlass._mlir.passmanager import PassManager
    from cutlass.base_dsl.common import DSLBaseError
    from cutlass.cutlass_dsl import CuTeDSL

    programs: list[str] = []

    def see(owner: object, module: object, name: str) -> None:
        with module.context:
            PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        # Names hold the path of the module, cut off where they get long.
        programs.append(re.sub(r"(kernel_cutlass|cutlass___call__)\w*|rampwrap[a-z]*", r"\1", str(module)))
        raise SeenError

    with CuTeDSL._get_dsl().trace_finalize_hooks(see), contextlib.suppress(DSLBaseError, SeenError):
        compile_variant(variant, folder)
    (program,) = programs
    return hashlib.sha256(program.encode()).hexdigest()[:16]


def test_the_programs_are_those_that_a_gpu_checked(tmp_path: pathlib.Path) -> None:
    record = json.loads(RECORD.read_text())
    if os.environ.get("REFRESH_TRACES"):
        record = {"dsl": building.dsl_version(), "digests": {v.symbol: digest(v, tmp_path) for v in SAMPLE}}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if record["dsl"] != building.dsl_version():
        pytest.skip(f"the record is of DSL {record['dsl']}")
    found = {variant.symbol: digest(variant, tmp_path) for variant in SAMPLE}
    changed = [symbol for symbol, value in found.items() if record["digests"].get(symbol) != value]
    assert not changed, f"other programs than a GPU checked: {changed}"
    assert set(record["digests"]) == set(found)


def test_words_hold_values_in_order_and_zeros_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first value lies lowest; of a number of values that fills no word the rest is zero."""
    from rampwrap.kernels.cute.device import ptx

    monkeypatch.setattr(ptx, "Float32", int)
    monkeypatch.setattr(ptx, "pack_e4m3", lambda low, high: low | high << 8)
    monkeypatch.setattr(ptx, "pack_bf16", lambda low, high: low | high << 16)
    assert ptx.pack_words([1, 2, 3, 4, 5, 6, 7, 8], fp8=True) == [0x04030201, 0x08070605]
    assert ptx.pack_words([1, 2, 3], fp8=True) == [0x00030201]
    assert ptx.pack_words([1, 2], fp8=True) == [0x0201] and ptx.pack_words([1], fp8=True) == [0x01]
    assert ptx.pack_words([1, 2, 3, 4], fp8=False) == [0x00020001, 0x00040003]
    assert ptx.pack_words([1, 2, 3], fp8=False) == [0x00020001, 0x00000003]
