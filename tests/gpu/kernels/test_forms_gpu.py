"""Activations besides SiLU and scales besides blocks of 128 on a GPU. Run with `pytest -m gpu tests/gpu/kernels/test_forms_gpu.py`.

All that is launched is compiled first, of all forms at once in as many processes as there are cores.
"""

import itertools
import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import attrs

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.activation import SWIGLU_OAI, Activation
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe.warm import run_once, workers
from rampwrap.kernels.triton.quantise import quantise_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
PLAIN, FP8 = MoEShape(32, 4, 512, 384), MoEShape(32, 4, 512, 384, "fp8")
FORMS = {
    "clamped": attrs.evolve(PLAIN, activation=Activation(limit=1.0)),
    "oai": attrs.evolve(PLAIN, activation=SWIGLU_OAI),
    "gelu": attrs.evolve(PLAIN, activation=Activation("gelu_tanh")),
    "fp8 oai": attrs.evolve(FP8, activation=SWIGLU_OAI),
    "blocks of 64": attrs.evolve(FP8, intermediate_size=192, scales="block-64"),
    "blocks of 32": attrs.evolve(FP8, intermediate_size=96, scales="block-32"),
    "channels": attrs.evolve(FP8, intermediate_size=176, scales="channel"),
    "tensors": attrs.evolve(FP8, scales="tensor"),
    "static": attrs.evolve(FP8, scales="static"),
}
# Slices of published models in which a form occurs: Qwen3-30B TP4, MiniMax-M2 TP8, GLM-4.5 TP8, GLM-4.5-Air TP8, MiniMax-M3 TP4.
PUBLISHED = {
    "Qwen3-30B TP4": MoEShape(128, 8, 2048, 192, "fp8", scales="block-64"),
    "Qwen3-30B TP8": MoEShape(128, 8, 2048, 96, "fp8", scales="block-32"),
    "MiniMax-M2 TP8": MoEShape(256, 8, 3072, 192, "fp8", scales="block-64"),
    "GLM-4.5 TP8": MoEShape(160, 8, 5120, 192, "fp8", scales="channel"),
    "GLM-4.5-Air TP8": MoEShape(128, 8, 4096, 176, "fp8", scales="channel"),
    "MiniMax-M3 TP8": MoEShape(128, 4, 6144, 384, activation=SWIGLU_OAI),
    "Gemma-4": MoEShape(128, 8, 2816, 704, activation=Activation("gelu_tanh")),
}


def covering(configs):
    """Some 20 of a list, among which any two values of two keys meet that meet in the list: a form is compiled per value."""

    def pairs(config):
        return set(itertools.combinations(sorted(config.items()), 2))

    left, chosen = set().union(*map(pairs, configs)), []
    while left:
        chosen.append(max(configs, key=lambda config: len(left & pairs(config))))
        left -= pairs(chosen[-1])
    return chosen


@pytest.fixture(scope="module")
def unfit():
    """Why what is launched here cannot be compiled, by shape: a sentence for each config that cannot."""
    parts = []
    for shape in FORMS.values():
        kernel = TritonFusedMoE(shape)
        parts += [(shape, [config], torch.int32) for config in covering(kernel.configs)]
        parts.append((shape, [kernel.default_config(64)], torch.int32, "cuda", True))
    for shape in PUBLISHED.values():
        kernel = TritonFusedMoE(shape)
        parts += [(shape, [kernel.default_config(num_tokens)], torch.int32) for num_tokens in (1, 64, 2048)]
    with workers(min(16, os.cpu_count())) as pool:
        found = pool.starmap(run_once, parts, chunksize=1)
    reasons = {}
    for (shape, configs, *_), (reason,) in zip(parts, found, strict=True):
        reasons.setdefault(shape, []).extend([f"{configs[0]}: {reason}"] if reason else [])
    return reasons


def routing(shape, num_tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator, device="cuda")
    return scores.topk(shape.top_k, dim=1).indices.int()


def poison(workspace):
    for tensor in (workspace.h, workspace.y, workspace.x_fp8, workspace.x_scale, workspace.h_fp8, workspace.h_scale):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xFF)
    return workspace


def error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("form", FORMS)
def test_configs(unfit, form):
    """Configs with all values of the form's list compile and give the float64 layer on poisoned memory, at 1 and 200 tokens."""
    shape = FORMS[form]
    kernel = TritonFusedMoE(shape)
    assert unfit[shape] == []
    wrong = []
    for num_tokens in (1, 200):
        inputs = kernel.inputs(shape, routing(shape, num_tokens))
        if shape.activation == SWIGLU_OAI:
            inputs["hidden_states"] *= 4  # so that 7 cuts something off
        reference = kernel.reference(shape, inputs)
        workspace = kernel.workspace(num_tokens)
        for config in covering(kernel.configs):
            out = kernel.launch(config, **inputs, workspace=poison(workspace))
            if not error(out, reference) < (2e-2 if shape.dtype == "fp8" else 8e-3):
                wrong.append((num_tokens, config, error(out, reference)))
    assert not wrong


@pytest.mark.parametrize("model", PUBLISHED)
def test_real_sizes(unfit, model):
    """At 1, 64 and 2048 tokens; by channel the tensor cores add 5120 FP8 products in their own narrow sum, as vLLM lets them."""
    shape = PUBLISHED[model]
    assert unfit[shape] == []
    kernel = TritonFusedMoE(shape)
    for num_tokens in (1, 64, 2048):
        inputs = kernel.inputs(shape, routing(shape, num_tokens))
        out = kernel.launch(kernel.default_config(num_tokens), **inputs)
        assert error(out, kernel.reference(shape, inputs)) < (2e-2 if shape.dtype == "fp8" else 8e-3)


@pytest.mark.parametrize("form", FORMS)
def test_graphs_and_waves_have_the_same_bits(unfit, form):
    """A captured layer follows its inputs without allocating; grids of one wave and a given alignment change nothing."""
    shape = FORMS[form]
    kernel = TritonFusedMoE(shape)
    config = kernel.default_config(64)
    inputs = kernel.inputs(shape, routing(shape, 64))
    out, workspace = torch.empty_like(inputs["hidden_states"]), kernel.workspace(64)
    kernel.launch(config, **inputs, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        kernel.launch(config, **inputs, out=out, workspace=workspace)
        assert torch.cuda.memory_allocated() == before
    for seed in range(3):
        inputs["topk_ids"].copy_(routing(shape, 64, seed))
        graph.replay()
        plain = kernel.launch(config, **inputs)
        assert torch.equal(out, plain)
        blocks = align_tokens(inputs["topk_ids"], config["block_m"], shape.num_experts)
        assert torch.equal(kernel.launch(config, **inputs, blocks=blocks, waves=1), plain)


@pytest.mark.parametrize(
    ("columns", "group"), [(7168, 0), (14336, 0), (1408, 0), (176, 0), (192, 64), (96, 32), (2048, 128)]
)
def test_quantised_rows(columns, group):
    """The largest of a group becomes 448, others lose at most half a step of e4m3."""
    x = torch.randn(300, columns, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    x[7] = 0
    q = torch.empty(300, columns, dtype=torch.float8_e4m3fn, device="cuda")
    scale = torch.empty(300, columns // group if group else 1, device="cuda")
    quantise_rows(x, q, scale, group=group)
    groups = x.float().view(300, scale.shape[1], -1)
    assert torch.allclose(scale, groups.abs().amax(-1).clamp_min(1e-10) / 448, rtol=1e-6)
    found = q.float().view(groups.shape) * scale[..., None]
    assert ((found - groups).abs() <= groups.abs() / 16 + scale[..., None] * 2**-9).all()
