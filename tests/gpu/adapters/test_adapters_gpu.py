"""Other people's kernels, the real ones, on a GPU. Run with `pytest -m gpu tests/gpu/adapters/test_adapters_gpu.py`.

vLLM comes from its package; Alpha-MoE is built outside this repository. Tests of what is absent are skipped.
"""

import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import attrs

from rampwrap.adapters.alpha_moe import AlphaMoE
from rampwrap.adapters.deep_gemm import DeepGemmMoE
from rampwrap.adapters.flashinfer_cute import FlashInferCuteMoE
from rampwrap.adapters.torch_grouped_mm import TorchGroupedMM
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.adapters.vllm_fused_moe import VllmFusedMoE, config_file_name
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import CaptureError, ConfigError, InputError
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.quantise import quantise_rows
from rampwrap.testing.conformance import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]

SHAPE = MoEShape(32, 4, 512, 384)
FP8 = MoEShape(32, 4, 512, 384, "fp8")
BATCHES = (1, 36, 300)


def make(factory, *args, **options):
    """An adapter, or the skip that says what is absent."""
    try:
        return factory(*args, **options)
    except InputError as error:
        if "cannot be imported" in str(error) or "not installed" in str(error):
            pytest.skip(str(error))
        raise


def routing(shape, num_tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator, device="cuda")
    return scores.topk(shape.top_k, dim=1).indices.int()


def vllm_directly(config, inputs, **quant):
    """vLLM as its own benchmark calls it."""
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    args = [inputs[name] for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")]
    if "w13_scale" in inputs:
        quant = {"quant_config": fp8_w8a8_moe_quant_config(inputs["w13_scale"], inputs["w2_scale"], **quant)}
    with override_config(config):
        return fused_experts(*args, **quant)


def some(kernel, count=4):
    """Every n-th config: compiling all of them takes minutes."""
    return kernel.configs[:: max(1, len(kernel.configs) // count)]


HALF = attrs.evolve(FP8, intermediate_size=192, scales="block-64")
CHANNEL = attrs.evolve(FP8, scales="channel")
VLLM = {
    "bf16": (SHAPE, {}),
    "fp8": (FP8, {"block_shape": [128, 128]}),
    "blocks of 64": (HALF, {"block_shape": [64, 64]}),
    "channels": (CHANNEL, {"per_act_token_quant": True, "per_out_ch_quant": True}),
    "per_tensor": (FP8, {}),
}


@pytest.mark.parametrize("kind", VLLM)
def test_vllm(kind):
    """The suite, against calling vLLM directly with its own override."""
    shape, quant = VLLM[kind]
    kernel = make(VllmFusedMoE, shape, per_tensor=kind == "per_tensor")
    direct = lambda config, inputs: vllm_directly(config, inputs, **quant)  # noqa: E731
    report = check(kernel, configs=some(kernel), num_tokens=BATCHES, direct=direct)
    print(report)
    assert not report.skipped


def test_vllm_names_its_files_as_we_do():
    """vLLM's own rule, for every kind."""
    make(VllmFusedMoE, SHAPE)
    from vllm.model_executor.layers.fused_moe import get_config_file_name

    device = torch.cuda.get_device_name()
    for shape, quant in VLLM.values():
        kind, sizes = ("fp8_w8a8" if shape.dtype == "fp8" else None), (32, shape.intermediate_size)
        blocks = quant.get("block_shape")
        if blocks or shape is not FP8:
            assert config_file_name(shape, device) == get_config_file_name(*sizes, kind, blocks)
    assert config_file_name(FP8, device, per_tensor=True) == get_config_file_name(32, 384, "fp8_w8a8", None)


def test_vllm_threads():
    """Two threads with two configs at once, a third that uses vLLM without us: each gets its own result."""
    kernel = make(VllmFusedMoE, SHAPE)
    from vllm.model_executor.layers.fused_moe import fused_experts, get_config

    inputs = kernel.inputs(SHAPE, routing(SHAPE, 200))
    configs = (kernel.configs[0], kernel.configs[-1], None)

    def run(config):
        if config is not None:
            return kernel.launch(config, **inputs)
        assert get_config() is None
        return fused_experts(*(inputs[n] for n in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")))

    expected = [run(config) for config in configs]
    results: dict[int, list] = {0: [], 1: [], 2: []}
    threads = [
        threading.Thread(target=lambda i=i, c=c: results[i].extend(run(c) for _ in range(50)))
        for i, c in enumerate(configs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        assert len(results[i]) == 50 and all(torch.equal(want, got) for got in results[i])


def test_vllm_baseline(tmp_path, monkeypatch):
    """vLLM itself picks up a table that we exported."""
    kernel = make(VllmFusedMoE, MoEShape(24, 4, 512, 384))
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    from rampwrap.policy.static import StaticTable, engine_table, write_static

    name = config_file_name(kernel.shape, torch.cuda.get_device_name())
    (tmp_path / name).write_text(write_static(StaticTable("uniform", (1, 64), (0, 5)), kernel.configs))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    get_moe_configs.cache_clear()
    assert get_moe_configs(24, 384, None) == {1: dict(kernel.configs[0]), 64: dict(kernel.configs[5])}
    assert engine_table(kernel).indices == (0, 5)
    assert kernel.default_config(60) == kernel.configs[5]
    get_moe_configs.cache_clear()


def test_vllm_batch_invariant(monkeypatch):
    """One config, vLLM's own; the same bits whatever else is in the batch."""
    free = make(VllmFusedMoE, SHAPE)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    kernel = VllmFusedMoE(SHAPE)
    assert len(kernel.configs) == 1
    with pytest.raises(ConfigError, match="VLLM_BATCH_INVARIANT pins"):
        free.launch(free.configs[0], **free.inputs(SHAPE, routing(SHAPE, 5)))
    inputs = kernel.inputs(SHAPE, routing(SHAPE, 200))
    whole = kernel.launch(kernel.configs[0], **inputs)
    few = {n: inputs[n][:50].contiguous() for n in ("hidden_states", "topk_weights", "topk_ids")}
    assert torch.equal(whole[:50], kernel.launch(kernel.configs[0], **(inputs | few)))


def alpha_directly(config, inputs, shape):
    """The operator as Alpha-MoE's README calls it."""
    x, ids = inputs["hidden_states"], inputs["topk_ids"]
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(len(x), x.shape[1] // 128, dtype=torch.float32)
    quantise_rows(x, q, scale)
    blocks = align_tokens(ids, config["block_m"], shape.num_experts)
    out = torch.zeros_like(x)
    torch.ops.alpha_moe.fused_moe_w8a8_up_down(
        q, scale, inputs["w13"], inputs["w13_scale"], inputs["w2"], inputs["w2_scale"],
        blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded, inputs["topk_weights"], out,
        shape.top_k, config["block_m"], config["block_n"], config["warp_n"], config["stages"], 1.0,
    )  # fmt: skip
    return out


def test_alpha():
    """The suite."""
    kernel = make(AlphaMoE, FP8)
    report = check(kernel, configs=some(kernel, 12), num_tokens=(1, 130), direct=lambda c, i: alpha_directly(c, i, FP8))
    print(report)
    assert not report.skipped


def test_every_config_of_alpha():
    """All 152 run; where each output is one sum (top-1, one tile of h), they give the bits of a direct call."""
    shape = MoEShape(16, 1, 512, 128, "fp8")
    kernel = make(AlphaMoE, shape)
    inputs = kernel.inputs(shape, routing(shape, 100))
    reference = kernel.reference(shape, inputs)
    for config in kernel.configs:
        out = kernel.launch(config, **inputs)
        assert torch.equal(out, alpha_directly(config, inputs, shape)), format_config(config)
        assert (out.double() - reference).norm() < kernel.tolerance * reference.norm(), format_config(config)


@pytest.mark.parametrize("shape", [SHAPE, FP8], ids=str)
def test_deep_gemm(shape):
    """The suite with every config; in CUDA graphs too."""
    kernel = make(DeepGemmMoE, shape)
    report = check(kernel, num_tokens=BATCHES)
    print(report)
    assert set(report.skipped) == {"grid"} and report.worst_error < 1e-2


@pytest.mark.parametrize("shape", [SHAPE, FP8], ids=str)
def test_deep_gemm_in_a_graph(shape):
    """Every config follows its inputs; a batch size that was never launched is refused."""
    kernel = make(DeepGemmMoE, shape)
    for config in kernel.configs:
        inputs = kernel.inputs(shape, routing(shape, 70))
        memory, out = kernel.workspace(70), torch.empty_like(inputs["hidden_states"])
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(CaptureError, match="never launched with 70 tokens"), torch.cuda.graph(graph):
            kernel.launch(config, **inputs, out=out, workspace=memory)
        kernel.launch(config, **inputs, out=out, workspace=memory)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel.launch(config, **inputs, out=out, workspace=memory)
        for seed in range(3):
            inputs["topk_ids"].copy_(routing(shape, 70, seed))
            graph.replay()
            assert torch.equal(out.clone(), kernel.launch(config, **inputs)), format_config(config)


def test_flashinfer_cute():
    """The suite with the first, the last and FlashInfer's own config; in CUDA graphs too."""
    kernel = make(FlashInferCuteMoE, SHAPE)
    configs = [kernel.configs[0], kernel.default_config(1), kernel.configs[-1]]
    report = check(kernel, configs=configs, num_tokens=BATCHES)
    print(report)
    assert set(report.skipped) == {"grid"} and report.worst_error < kernel.tolerance


def test_grouped_mm():
    """The suite; in CUDA graphs too."""
    report = check(make(TorchGroupedMM, SHAPE), num_tokens=(1, 33, 1000))
    print(report)
    assert set(report.skipped) == {"grid"}


def test_portfolio_of_shared_weights():
    """Our kernel, vLLM's and torch's on one copy of the weights: each the same bits as alone, in a graph too."""
    members = [make(TritonFusedMoE, SHAPE), make(VllmFusedMoE, SHAPE), make(TorchGroupedMM, SHAPE)]
    portfolio = Portfolio(members)
    inputs = portfolio.inputs(SHAPE, routing(SHAPE, 64))
    dispatcher = Dispatcher(portfolio)
    for member in members:
        tagged = Portfolio.tagged(member, member.configs[0])
        out = dispatcher.pin(tagged)(**inputs)
        assert torch.equal(out, member.launch(member.configs[0], **inputs))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = dispatcher(**inputs)
        graph.replay()
        assert torch.equal(captured, out)


def test_portfolio_with_another_layout():
    """Alpha-MoE beside vLLM's layout: refused with the size, allowed, converted once, never under capture."""
    first, alpha = make(TritonFusedMoE, FP8), make(AlphaMoE, FP8)
    with pytest.raises(InputError, match=r"takes \d+ bytes \(0\.01 GB\) a layer more"):
        Portfolio([first, alpha])
    portfolio = Portfolio([first, alpha], extra_memory=True)
    inputs = portfolio.inputs(FP8, routing(FP8, 64))
    tagged = Portfolio.tagged(alpha, alpha.configs[0])
    with pytest.raises(CaptureError, match="call prepare"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        portfolio.launch(tagged, **inputs)
    torch.cuda.synchronize()
    portfolio.prepare(**{name: inputs[name] for name in ("w13", "w2", "w13_scale", "w2_scale")})
    reference = first.reference(FP8, inputs)
    before = torch.cuda.memory_allocated()
    out = portfolio.launch(tagged, **inputs)
    assert (out.double() - reference).norm() < alpha.tolerance * reference.norm()
    del out
    assert torch.cuda.memory_allocated() <= before + 1024
    assert attrs.evolve(FP8) == portfolio.shape
