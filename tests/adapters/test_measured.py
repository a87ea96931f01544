"""What GPUs were measured with: the configs and grids in the shipped tables are those that kernels list and state now.

A table's columns are known by their configs, so a config that goes missing makes a table's best column unusable, and a grid
that changes makes its fit another.
"""

import pathlib

import numpy as np
import pytest

from rampwrap.kernels.cute import configs as cute
from rampwrap.measure.timings import Timings

pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.adapters import alpha_moe, vllm_fused_moe
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernels.triton.moe import configs as triton

ROOT = pathlib.Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if not RESULTS.exists():
    pytest.skip("the tables are in the repository only", allow_module_level=True)


def measured(name):
    return Timings.load(RESULTS / f"h200-{name}.npz")


def test_the_lists_are_those_that_were_swept():
    """In the order of the tables: ties break by index."""
    plain = [config for config in triton.CONFIGS["bf16"] if "split_k" not in config]
    assert (
        list(measured("triton_fused_moe-olmoe-bf16-run2").configs)
        == plain
        == list(measured("triton_fused_moe-qwen3-30b-bf16").configs)
    )
    assert triton.CONFIGS["fp16"] == triton.CONFIGS["bf16"]
    assert list(measured("sweep-triton-qwen3-30b-fp8").configs) == list(triton.CONFIGS["fp8"])
    for name in ("olmoe", "qwen3-30b", "deepseek-v3-tp8"):
        assert list(measured(f"alpha_moe-{name}-fp8").configs) == list(alpha_moe.CONFIGS)
    assert list(measured("vllm_fused_moe-olmoe-bf16").configs) == list(vllm_fused_moe.CONFIGS["bf16"])
    swept = list(measured("sweep-vllm-qwen3-30b-fp8").configs)  # vLLM ships three more for this shape
    assert len(swept) == 71 and [c for c in swept if c in vllm_fused_moe.CONFIGS["fp8"]] == list(
        vllm_fused_moe.CONFIGS["fp8"]
    )
    table = measured("sweep-cute-qwen3-30b-fp8")
    listed = [c for form in ("two", "one") for c in cute.all_configs(form, "fp8")]
    assert list(table.configs) == [c.keys(1) for c in listed if cute.why_illegal(c, table.shape) is None]


SPLIT = [
    (16, 64, 128, 1, 4, 4, False, 2),
    (16, 64, 128, 1, 4, 4, False, 4),
    (16, 64, 256, 1, 4, 3, False, 2),
    (16, 128, 64, 1, 4, 5, False, 2),
    (16, 128, 128, 1, 4, 3, False, 2),
    (16, 128, 128, 1, 4, 3, False, 4),
]


def test_the_splits_are_those_that_were_raced():
    """They came after the two sweeps in bf16; benchmarks/README.md has their race."""
    assert [tuple(config.values()) for config in triton.CONFIGS["bf16"] if "split_k" in config] == SPLIT


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.npz")), ids=lambda path: path.stem)
def test_what_ran_is_legal_and_cuts_a_batch_alike(path):
    """Every config that an H200 ran may run, and its grid is the one in the table."""
    table = Timings.load(path)
    shape = table.shape
    ran = np.isfinite(table.us).any(axis=0)
    kernel = TritonFusedMoE(shape) if table.kernel == "triton_fused_moe" else None
    for config, grid, measured_once in zip(table.configs, table.grids, ran, strict=True):
        its, up, down = dict(config), 2 * shape.intermediate_size, shape.hidden_size
        if table.kernel.startswith("triton_fused_moe"):
            assert measured_once and triton.refusal(config, shape.dtype) is None
            now = kernel.grid(config, shape)
            assert (now.block_m, now.launches, now.split_k) == (grid.block_m, grid.launches, grid.split_k)
        elif table.kernel == "cute_moe":
            found = cute.from_keys(its, shape.dtype)
            assert measured_once and cute.why_illegal(found, shape) is None
            assert found.ctas_per_sm == grid.ctas_per_sm and found.block_m == grid.block_m
            launches = (up // found.rows,) if found.form == "one" else (up // found.rows, down // found.rows)
            assert launches == grid.launches
        elif table.kernel == "alpha_moe":
            assert measured_once and alpha_moe.refusal(config) is None
            assert alpha_moe.AlphaMoE.grid(None, config, shape) == grid
        elif table.kernel == "vllm_fused_moe":
            assert measured_once and vllm_fused_moe.refusal(config, shape.dtype) is None


def test_residency_as_compiled():
    """CTAs of an SM in the tables that were made since registers were read off compiled kernels."""
    for name in ("v2-triton-olmoe-bf16", "v2-triton-qwen3-30b-bf16"):
        table = measured(name)
        kernel = TritonFusedMoE(table.shape)
        assert tuple(kernel.grid(config, table.shape) for config in table.configs) == table.grids
