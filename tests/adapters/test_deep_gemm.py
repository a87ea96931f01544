"""The layer around DeepGEMM on a stand-in of its grouped GEMMs; the real ones are in tests/gpu.

The stand-in follows their contract, written apart from the adapter: it multiplies in float32 what its layout names, checks
what DeepGEMM asserts, and leaves NaN in every row that a caller has no right to read.
"""

import os
import sys
import types

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from rampwrap.adapters import deep_gemm as adapter
from rampwrap.adapters.deep_gemm import CONFIGS, DeepGemmMoE
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.testing.conformance import check

SHAPE = MoEShape(8, 2, 256, 128, "fp8")
BF16 = MoEShape(8, 2, 192, 64)
CONTIGUOUS, CONTIGUOUS_64, PSUM, PSUM_64, MASKED = CONFIGS
needs_kernels = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")
if torch.cuda.is_available():
    pytest.skip("the real package belongs to the GPU tests", allow_module_level=True)


class StandIn(types.ModuleType):
    """`deep_gemm` as far as the adapter calls it; `calls` has (function, alignment, rows)."""

    __version__ = "2.5.0"

    def __init__(self, psum=True, switch=True):
        super().__init__("deep_gemm")
        self.alignment, self.calls = 128, []
        for kind in ("fp8", "bf16"):

            def contiguous(*args, **kwargs):
                return self.contiguous(*args, **kwargs)

            contiguous.__doc__ = f"m_grouped(a, b, d, grouped_layout{', use_psum_layout' if psum else ''})"
            setattr(self, f"m_grouped_{kind}_gemm_nt_contiguous", contiguous)
            setattr(self, f"m_grouped_{kind}_gemm_nt_masked", self.masked)
        if switch:
            self.get_mk_alignment_for_contiguous_layout = lambda: self.alignment
            self.set_mk_alignment_for_contiguous_layout = lambda value: setattr(self, "alignment", value)

    def contiguous(
        self, a, b, d, layout, *, disable_ue8m0_cast=False, use_psum_layout=False, expected_m_for_psum_layout=0
    ):
        a, b = self.floats(a), self.weights(b)
        assert layout.dtype == torch.int32 and layout.is_contiguous() and d.is_contiguous()
        self.calls.append(("psum" if use_psum_layout else "contiguous", self.alignment, len(a)))
        d.fill_(float("nan"))
        if use_psum_layout:
            assert expected_m_for_psum_layout > 0
            start = 0
            for expert, end in enumerate(layout.tolist()):
                assert start <= end <= len(a)
                d[start:end] = a[start:end] @ b[expert].T
                start = -(-end // self.alignment) * self.alignment
            return
        assert len(layout) == len(a)
        for first in range(0, len(a), self.alignment):
            block = layout[first : first + self.alignment].tolist()
            assert len(block) == self.alignment and block == sorted(block, reverse=True) and len({*block, -1}) <= 2
            rows = sum(expert >= 0 for expert in block)
            d[first : first + rows] = a[first : first + rows] @ b[max(0, block[0])].T

    def masked(self, a, b, d, masked_m, expected_m, *, disable_ue8m0_cast=False):
        a, b = self.floats(a), self.weights(b)
        assert a.shape[1] % 128 == 0 and 0 < expected_m <= a.shape[1] and masked_m.dtype == torch.int32
        self.calls.append(("masked", None, a.shape[1]))
        d.fill_(float("nan"))
        for expert, rows in enumerate(masked_m.tolist()):
            assert rows <= a.shape[1]
            d[expert, :rows] = a[expert, :rows] @ b[expert].T

    @staticmethod
    def floats(a):
        if not isinstance(a, tuple):
            assert a.dtype == torch.bfloat16 and a.is_contiguous()
            return a.float()
        a, scale = a
        assert a.dtype == torch.float8_e4m3fn and a.is_contiguous() and scale.dtype == torch.float32
        rows, columns = a.shape[-2:]
        # By columns, with a stride that TMA can use: DeepGEMM copies any other, which is no failure, but slow.
        assert scale.shape == (*a.shape[:-1], columns // 128) and scale.stride()[-2:] == (1, rows) and rows % 4 == 0
        return a.float() * scale.repeat_interleave(128, -1)

    @staticmethod
    def weights(b):
        if not isinstance(b, tuple):
            return b.float()
        return b[0].float() * b[1].repeat_interleave(128, 1).repeat_interleave(128, 2)


@pytest.fixture
def package(monkeypatch):
    made = StandIn()
    monkeypatch.setitem(sys.modules, "deep_gemm", made)
    return made


def routing(shape, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(num_tokens)]
    return torch.stack(rows).int()


def error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPE, BF16], ids=str)
def test_conforms(package, shape):
    """The suite with every config; padding, duplicates and NaN in all memory among it."""
    report = check(DeepGemmMoE(shape), configs=CONFIGS, num_tokens=(1, 9))
    assert report.worst_error < 5e-3, report
    assert {"numerics", "padding", "same bits", "refusals"} <= set(report.passed), report
    assert {call[0] for call in package.calls} == {"contiguous", "psum", "masked"}


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['layout']}-{config['block_m']}")
@pytest.mark.parametrize("num_tokens", [150, 128])
def test_batches_of_several_blocks(package, config, num_tokens):
    """More than one block an expert, and one hot expert; more slots than masked takes run contiguous, at 128."""
    kernel, ids = DeepGemmMoE(SHAPE), routing(SHAPE, num_tokens)
    ids[:, 0] = 3
    ids[:, 1] = torch.where(ids[:, 1] == 3, 5, ids[:, 1])
    inputs = kernel.inputs(SHAPE, ids)
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    assert kernel.launch(config, **inputs, out=out) is out
    assert error(out, kernel.reference(SHAPE, inputs)) < 5e-3
    few = num_tokens * SHAPE.top_k <= adapter.MASKED_MAX_SLOTS
    layout = config["layout"] if config != MASKED or few else "contiguous"
    expected = {"masked": (layout, None, 256)}.get(layout, (layout, config["block_m"] if config != MASKED else 128))
    assert all(call[: len(expected)] == expected for call in package.calls) and len(package.calls) == 2


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['layout']}-{config['block_m']}")
def test_experts_elsewhere(package, config):
    """Two ranks of half the experts add up to the layer."""
    whole, ids = DeepGemmMoE(SHAPE), routing(SHAPE, 11)
    inputs = whole.inputs(SHAPE, ids)
    part = DeepGemmMoE(MoEShape(8, 2, 256, 128, "fp8", num_local_experts=4))
    total = torch.zeros(11, 256, dtype=torch.float64)
    for first in (0, 4):
        mine = {name: inputs[name][first : first + 4] for name in ("w13", "w2", "w13_scale", "w2_scale")}
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[first : first + 4] = torch.arange(4, dtype=torch.int32)
        total += part.launch(config, **(inputs | mine), expert_map=expert_map).double()
    assert error(total, whole.reference(SHAPE, inputs)) < 5e-3


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPE, BF16], ids=str)
def test_workspace(package, shape):
    """One workspace for every config and smaller batches, full of NaN: the same bits as without."""
    kernel = DeepGemmMoE(shape)
    memory = kernel.workspace(140, "cpu")
    assert kernel.workspace(140, "meta").num_bytes == memory.num_bytes
    for num_tokens in (140, 1):
        inputs = kernel.inputs(shape, routing(shape, num_tokens))
        for config in (CONTIGUOUS_64, PSUM, MASKED):
            for tensor in (memory.into, memory.out_of, memory.scale):
                if tensor is not None:
                    tensor.view(torch.uint8).fill_(0xFF)
            memory.of_slot.fill_(-1)
            out = kernel.launch(config, **inputs, workspace=memory)
            assert torch.equal(out, kernel.launch(config, **inputs))
    with pytest.raises(InputError, match="holds 280 slots, this batch has 282"):
        kernel.launch(CONTIGUOUS, **kernel.inputs(shape, routing(shape, 141)), workspace=memory)
    with pytest.raises(InputError, match="num_tokens is 0"):
        kernel.workspace(0, "cpu")


@needs_kernels
def test_alignment_is_put_back(package):
    """Also after a launch that fails: others in the process rely on it."""
    kernel = DeepGemmMoE(SHAPE)
    inputs = kernel.inputs(SHAPE, routing(SHAPE, 3))
    kernel.launch(CONTIGUOUS_64, **inputs)
    assert package.calls[-1][1] == 64 and package.alignment == 128

    def fails(*_, **__):
        raise RuntimeError("NVCC compilation failed")

    kernel._contiguous = fails
    with pytest.raises(RuntimeError, match="NVCC"):
        kernel.launch(PSUM_64, **inputs)
    assert package.alignment == 128
    assert kernel.precompile([MASKED, PSUM], **inputs) == [None, "RuntimeError: NVCC compilation failed"]


@needs_kernels
def test_in_a_portfolio(package):
    """Beside our Triton kernel it reads the same weights."""
    portfolio = Portfolio([TritonFusedMoE(SHAPE), make_kernel("deep_gemm", SHAPE)])
    assert portfolio.extra_bytes(portfolio.members["deep_gemm"]) == 0
    inputs = portfolio.inputs(SHAPE, routing(SHAPE, 5))
    memory = portfolio.workspace(5, "cpu")
    out = portfolio.launch({"kernel": "deep_gemm", **PSUM}, **inputs, workspace=memory)
    assert error(out, portfolio.members["deep_gemm"].reference(SHAPE, inputs)) < 5e-3
    assert (
        portfolio.launch({"kernel": "deep_gemm", **PSUM}, **portfolio.inputs(SHAPE, routing(SHAPE, 1)[:0])).numel() == 0
    )


def test_kernel(package):
    """A Kernel with few configs; masked for few tokens by default."""
    kernel = DeepGemmMoE(SHAPE)
    assert isinstance(kernel, Kernel) and kernel.configs == CONFIGS and kernel.version == "2.5.0-1"
    assert (kernel.default_config(128), kernel.default_config(129)) == (MASKED, CONTIGUOUS)
    grid = kernel.grid(PSUM_64, MoEShape(64, 8, 2048, 1024, "fp8"))
    assert (grid.block_m, grid.launches, grid.persistent) == (64, (16, 16), True)


def test_older_packages(monkeypatch):
    """What they lack is left out, with the reason."""
    monkeypatch.setitem(sys.modules, "deep_gemm", StandIn(psum=False, switch=False))
    kernel = DeepGemmMoE(SHAPE)
    assert kernel.configs == (CONTIGUOUS, MASKED)
    assert "has no layout psum" in kernel.supports(PSUM, SHAPE)
    assert "pads to 128 rows only" in kernel.supports(CONTIGUOUS_64, SHAPE)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MoEShape(8, 2, 128, 128, "fp16"), "dtype fp16"),
        (MoEShape(8, 2, 192, 128, "fp8"), "hidden_size=192 is no multiple of 128"),
        (MoEShape(8, 2, 192, 96), "intermediate_size=96 is no multiple of 64"),
    ],
)
def test_refused_shapes(package, shape, message):
    """With the reason, when it is made."""
    with pytest.raises(ConfigError, match=message):
        DeepGemmMoE(shape)


def test_absent(monkeypatch):
    """One sentence; an empty package of that name counts as absent, and vLLM's copy is found behind it."""
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        InputError, match=r"^DeepGEMM is not installed \(deep_gemm: .*; vllm\.third_party.*install vLLM"
    ) as told:
        DeepGemmMoE(SHAPE)
    assert str(told.value).count(". ") == 0
    monkeypatch.setitem(sys.modules, "deep_gemm", types.ModuleType("deep_gemm"))
    with pytest.raises(InputError, match="deep_gemm has no grouped GEMMs"):
        DeepGemmMoE(SHAPE)
    for name in ("vllm", "vllm.third_party"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.third_party.deep_gemm", found := StandIn())
    assert adapter.find() is found


def test_compiler(package, monkeypatch, tmp_path):
    """The nvcc that DeepGEMM calls, by its own variables; on a GPU its absence is said before anything is launched."""
    for name in ("DG_JIT_NVCC_COMPILER", "CUDA_HOME", "CUDA_PATH", "DG_JIT_USE_NVRTC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(adapter.compiler()) == "/usr/local/cuda/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert adapter.compiler() == tmp_path / "bin" / "nvcc"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(InputError, match=r"^DeepGEMM compiles with .*/bin/nvcc, which is not here"):
        DeepGemmMoE(SHAPE)
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", sys.executable)
    DeepGemmMoE(SHAPE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(InputError, match="sm_90 only, this is a card"):
        DeepGemmMoE(SHAPE)
