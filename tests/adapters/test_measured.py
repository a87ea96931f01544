"""What GPUs were measured with: the best configs of the shipped tables are listed, all of them can run, grids are the same.

A table's columns are known by their configs, so a config that can no longer run makes a table's column unusable, and a grid
that changes makes its fit another.
"""

import importlib
import pathlib

import numpy as np
import pytest

from rampwrap.kernel.protocol import config_key
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


def listed(kernel, dtype):
    """In the order of the kernel's own list; the CuTe kernels' by tile, of their two older forms."""
    if kernel == "triton_fused_moe":
        return list(triton.CONFIGS[dtype])
    return [c.keys(1) for form in ("two", "one") for c in cute.all_configs(form, dtype)]


def test_the_lists_are_in_the_order_that_was_swept():
    """Ties break by index. What was swept and is no longer listed is in no table within 1 % of the best."""
    for name in ("triton_fused_moe-olmoe-bf16-run2", "triton_fused_moe-qwen3-30b-bf16", "sweep-triton-qwen3-30b-fp8"):
        table = measured(name)
        ours = [config for config in listed(table.kernel, table.shape.dtype) if config in table.configs]
        assert [config for config in table.configs if config in ours] == ours
        # The splits came after the two sweeps in bf16.
        assert [c for c in triton.CONFIGS[table.shape.dtype] if c not in ours] == (
            [c for c in triton.CONFIGS["bf16"] if "split_k" in c] if table.shape.dtype == "bf16" else []
        )
    assert triton.CONFIGS["fp16"] == triton.CONFIGS["bf16"]
    table = measured("sweep-cute-qwen3-30b-fp8")
    ours = [c for c in listed("cute_moe", "fp8") if cute.why_illegal(cute.from_keys(c, "fp8"), table.shape) is None]
    ours = [config for config in ours if config["block_m"] in cute.BLOCK_MS]  # larger ones were listed last
    assert [config for config in table.configs if config in ours] == ours
    for name in ("olmoe", "qwen3-30b", "deepseek-v3-tp8"):
        assert list(measured(f"alpha_moe-{name}-fp8").configs) == list(alpha_moe.CONFIGS)
    assert list(measured("vllm_fused_moe-olmoe-bf16").configs) == list(vllm_fused_moe.CONFIGS["bf16"])
    swept = list(measured("sweep-vllm-qwen3-30b-fp8").configs)  # vLLM ships three more for this shape
    assert len(swept) == 71 and [c for c in swept if c in vllm_fused_moe.CONFIGS["fp8"]] == list(
        vllm_fused_moe.CONFIGS["fp8"]
    )


def test_no_list_lacks_what_a_table_needs(monkeypatch, capsys):
    """`benchmarks/config_lists.py` over every table, the ten layers of the regions among them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    lists = importlib.import_module("config_lists")
    monkeypatch.setattr("sys.argv", ["config_lists.py"])
    assert lists.main() == 0
    monkeypatch.setattr(lists, "listed", lambda kernel, dtype: set(sorted(listed_keys(kernel, dtype))[::2]))
    assert lists.main() == 1
    assert "best of all, not listed" in capsys.readouterr().out


def listed_keys(kernel, dtype):
    return {config_key(config) for config in listed(kernel, dtype)}


def test_default_configs_are_listed():
    for dtype in ("bf16", "fp16", "fp8"):
        for experts, top_k in ((8, 2), (64, 8), (128, 8), (256, 8)):
            for power in range(17):
                assert triton.default_config(2**power, experts, top_k, dtype) in triton.CONFIGS[dtype]


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
