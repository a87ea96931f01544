"""The layer around FlashInfer's CuTe DSL GEMMs on a stand-in of both; the real ones are in tests/gpu.

The stand-in follows their contract, written apart from the adapter: tiles of rows with one expert and one end each, 32 up
rows and 32 gate rows in turn, rows behind the end undefined, the output added to.
"""

import os
import sys
import types

import attrs
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from rampwrap.adapters import flashinfer_cute as adapter
from rampwrap.adapters.flashinfer_cute import DEFAULT, KEYS, VALUES, FlashInferCuteMoE, deinterleave, interleave
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.testing.conformance import check

SHAPE = MoEShape(8, 2, 128, 64)
needs_kernels = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")
if torch.cuda.is_available():
    pytest.skip("the real package belongs to the GPU tests", allow_module_level=True)


def config(**changes):
    return {**DEFAULT, **changes}


class StandIn:
    """Both functions; `calls` has their tiles and tactics."""

    def __init__(self):
        self.calls = []

    def tiles(self, experts, ends, slots, num_tiles, rows, tile_rows):
        """(expert, rows, slots) of each tile, as both GEMMs go through them."""
        for tensor in (experts, ends, slots, num_tiles):
            assert tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.data_ptr() % 4 == 0
        assert rows == len(slots) == len(experts) * tile_rows == len(ends) * tile_rows and len(num_tiles) == 1
        for tile in range(int(num_tiles)):
            first, end = tile * tile_rows, int(ends[tile])
            assert first < end <= first + tile_rows
            yield int(experts[tile]), slice(first, end), slots[first:end].long()

    def up(
        self, x, w1, experts, ends, slots, num_tiles, out=None, *, topk, permuted_m,
        tile_shape_mn, cluster_shape_mn=(1, 1), swizzle_size=1, raster_along_m=False, enable_pdl=True,
    ):  # fmt: skip
        assert out.shape == (permuted_m, w1.shape[1] // 2) and x.dtype == w1.dtype == out.dtype and not enable_pdl
        out.fill_(float("nan"))
        self.calls.append(("up", tile_shape_mn, swizzle_size))
        for expert, rows, its in self.tiles(experts, ends, slots, num_tiles, permuted_m, tile_shape_mn[0]):
            both = x[its // topk].float() @ w1[expert].float().T
            kinds = both.view(len(its), -1, 2, 32)
            out[rows] = (torch.nn.functional.silu(kinds[:, :, 1]) * kinds[:, :, 0]).reshape(len(its), -1).to(out.dtype)
        return out

    def down(
        self, a, w2, experts, ends, slots, num_tiles, scales, out, *, topk,
        use_fused_finalize=True, tile_shape_mn, cluster_shape_mn, raster_along_m, enable_pdl=True,
    ):  # fmt: skip
        assert scales.shape == (len(out), topk) and scales.dtype == torch.float32 and scales.is_contiguous()
        assert use_fused_finalize and not enable_pdl
        self.calls.append(("down", tile_shape_mn, cluster_shape_mn, raster_along_m))
        for expert, rows, its in self.tiles(experts, ends, slots, num_tiles, len(a), tile_shape_mn[0]):
            assert int(its.max()) < scales.numel()
            y = a[rows].float() @ w2[expert].float().T * scales.flatten()[its, None]
            for token, row in zip((its // topk).tolist(), y, strict=True):
                out[token] += row.to(out.dtype)
        return out


@pytest.fixture
def package(monkeypatch):
    made = StandIn()
    parts = adapter.WHERE.rstrip(".").split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, name := ".".join(parts[:length]), types.ModuleType(name))
    sys.modules["flashinfer"].__version__ = "0.7.2"
    for name, function in ((adapter.UP, made.up), (adapter.DOWN, made.down)):
        module = types.ModuleType(name)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, adapter.WHERE + name, module)
    return made


def routing(num_tokens, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(num_tokens)]
    return torch.stack(rows).int()


def error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


@needs_kernels
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_conforms(package, dtype):
    """The suite; padding, duplicates and NaN in all memory among it."""
    some = [config(), config(block_m=64, up_n=256, swizzle=8, down_n=128)]
    report = check(FlashInferCuteMoE(attrs.evolve(SHAPE, dtype=dtype)), configs=some, num_tokens=(1, 9))
    assert report.worst_error < 6e-3, report
    assert {"numerics", "padding", "same bits", "refusals"} <= set(report.passed), report


@needs_kernels
@pytest.mark.parametrize("block_m", VALUES["block_m"])
def test_batches_of_several_tiles(package, block_m):
    """A hot expert of three tiles, one that ends with its tile, one without tokens; the tactic reaches both GEMMs."""
    kernel, ids = FlashInferCuteMoE(SHAPE), routing(2 * block_m + 9)
    ids[:, 0] = 3
    ids[:, 1] = torch.where(torch.arange(len(ids)) < block_m, 5, 6).int()
    inputs = kernel.inputs(SHAPE, ids)
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    tactic = dict(zip(KEYS, (block_m, 192, 16, 64, 2, True), strict=True))
    assert kernel.launch(tactic, **inputs, out=out) is out
    assert error(out, kernel.reference(SHAPE, inputs)) < 6e-3
    assert package.calls == [("up", (block_m, 192), 16), ("down", (block_m, 64), (1, 2), True)]


@needs_kernels
def test_experts_elsewhere(package):
    """Two ranks of half the experts add up to the layer; weights of another type are converted."""
    whole, ids = FlashInferCuteMoE(SHAPE), routing(11)
    inputs = whole.inputs(SHAPE, ids)
    inputs["topk_weights"] = inputs["topk_weights"].bfloat16()
    part = FlashInferCuteMoE(attrs.evolve(SHAPE, num_local_experts=4))
    total = torch.zeros(11, 128, dtype=torch.float64)
    for first in (0, 4):
        mine = {name: inputs[name][first : first + 4] for name in ("w13", "w2")}
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[first : first + 4] = torch.arange(4, dtype=torch.int32)
        total += part.launch(DEFAULT, **(inputs | mine), expert_map=expert_map).double()
    assert error(total, whole.reference(SHAPE, inputs)) < 8e-3


@needs_kernels
def test_workspace(package):
    """One workspace for both tiles and smaller batches, full of NaN: the same bits as without."""
    kernel = FlashInferCuteMoE(SHAPE)
    memory = kernel.workspace(140, "cpu")
    assert kernel.workspace(140, "meta").num_bytes == memory.num_bytes
    for num_tokens in (140, 1, 0):
        inputs = kernel.inputs(SHAPE, routing(140)[:num_tokens])
        for block_m in VALUES["block_m"]:
            memory.h.fill_(float("nan"))
            memory.ends.fill_(-1)
            out = kernel.launch(config(block_m=block_m), **inputs, workspace=memory)
            assert torch.equal(out, kernel.launch(config(block_m=block_m), **inputs))
    with pytest.raises(InputError, match="holds 280 slots, this batch has 282"):
        kernel.launch(DEFAULT, **kernel.inputs(SHAPE, routing(141)), workspace=memory)
    with pytest.raises(InputError, match="num_tokens is 0"):
        kernel.workspace(0, "cpu")


@needs_kernels
def test_in_a_portfolio(package):
    """Beside our Triton kernel it needs a copy of w13, whose size is stated, and gets it."""
    members = [TritonFusedMoE(SHAPE), make_kernel("flashinfer_cute", SHAPE)]
    with pytest.raises(InputError, match=r"262144 bytes .* extra_memory=True"):
        Portfolio(members)
    portfolio = Portfolio(members, extra_memory=True)
    inputs = portfolio.inputs(SHAPE, routing(5))
    out = portfolio.launch({"kernel": "flashinfer_cute", **DEFAULT}, **inputs, workspace=portfolio.workspace(5, "cpu"))
    assert error(out, members[0].reference(SHAPE, inputs)) < 6e-3


def test_interleaving():
    """Up rows come first, 32 at a time."""
    w13 = torch.arange(2 * 128 * 8, dtype=torch.float32).view(2, 128, 8)
    made = interleave(w13)
    assert made.is_contiguous() and torch.equal(deinterleave(made), w13)
    assert torch.equal(made[:, :64], torch.cat((w13[:, 64:96], w13[:, :32]), 1))
    assert torch.equal(made[:, 96:], w13[:, 32:64])


def test_kernel(package):
    """A Kernel whose configs are what the autotuner would try, FlashInfer's own default among them."""
    kernel = FlashInferCuteMoE(MoEShape(128, 8, 2048, 768))
    assert isinstance(kernel, Kernel) and kernel.version == "0.7.2-1" and kernel.default_config(9) in kernel.configs
    # 128 rows: 4 x 3 up tactics, 3 x 2 down; 64 rows: 4 x 3 and 2 x 2.
    assert len(kernel.configs) == 12 * 6 + 12 * 4 and not any(c["along_m"] for c in kernel.configs)
    grid = kernel.grid(config(up_n=192, down_n=256), kernel.shape)
    assert (grid.block_m, grid.launches, grid.persistent) == (128, (8, 8), True)
    narrow = FlashInferCuteMoE(MoEShape(8, 2, 2048, 128)).configs
    assert {c["cluster"] for c in narrow} == {1} and {c["block_m"] for c in narrow if c["along_m"]} == {128}
    heavy = FlashInferCuteMoE(MoEShape(64, 8, 7168, 2048)).configs
    assert {c["swizzle"] for c in heavy} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_n": 96}, "up_n=96 is none of its tactics; use one of 256, 192, 128, 64"),
        ({"block_m": 64, "down_n": 256}, "takes 128 rows, not 64"),
        ({"cluster": 2, "down_n": 128}, "makes 1 tiles of down_n=128, which do not pair"),
        ({"stages": 3}, "give block_m, up_n"),
    ],
)
def test_refused_configs(package, changes, message):
    """With the reason, before anything is launched."""
    kernel = FlashInferCuteMoE(SHAPE)
    with pytest.raises(ConfigError, match=message):
        kernel.launch(config(**changes), **kernel.inputs(SHAPE, routing(2)))
    assert not package.calls


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MoEShape(8, 2, 128, 128, "fp8"), "dtype fp8"),
        (MoEShape(8, 2, 100, 64), "hidden_size=100 is no multiple of 8"),
        (MoEShape(8, 2, 128, 48), "intermediate_size=48 is no multiple of 32"),
    ],
)
def test_refused_shapes(package, shape, message):
    """With the reason, when it is made."""
    with pytest.raises(ConfigError, match=message):
        FlashInferCuteMoE(shape)


def test_a_kernel_that_does_not_compile(package, monkeypatch):
    """Its reason, the others' None."""
    kernel = FlashInferCuteMoE(SHAPE)

    def fails(*_, tile_shape_mn, **__):
        raise RuntimeError(f"no tile {tile_shape_mn}")

    inputs = kernel.inputs(SHAPE, routing(2)[:0])
    assert kernel.precompile([DEFAULT], **inputs) == [None]
    kernel._up = fails
    if INTERPRETED.value:
        assert kernel.precompile([DEFAULT], **kernel.inputs(SHAPE, routing(2))) == ["RuntimeError: no tile (128, 64)"]


def test_absent(monkeypatch):
    """One sentence, also where the package is one without these kernels."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(InputError, match=r"^FlashInfer's CuTe DSL GEMMs .* are not installed \(.*pip install") as told:
        FlashInferCuteMoE(SHAPE)
    assert str(told.value).count(". ") == 0
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    with pytest.raises(InputError, match="'flashinfer' is not a package"):
        FlashInferCuteMoE(SHAPE)


def test_another_gpu(package, monkeypatch):
    """It says which."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(InputError, match="sm_90 only, this is a card"):
        FlashInferCuteMoE(SHAPE)
