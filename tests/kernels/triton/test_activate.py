"""Activations in the epilogue of our Triton kernel: against float64, and against an engine's own way of computing them."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import attrs

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import ConfigError
from rampwrap.kernel.activation import SILU, SWIGLU_OAI, Activation
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe.configs import KEYS

needs_kernels = pytest.mark.skipif(
    not INTERPRETED.value and not torch.cuda.is_available(),
    reason="Triton was imported before TRITON_INTERPRET=1 and there is no GPU",
)
DEVICE = "cpu" if INTERPRETED.value else "cuda"
BF16, FP8 = MoEShape(4, 2, 64, 48), MoEShape(2, 1, 128, 128, "fp8")
TOLERANCE = {"bf16": 6e-3, "fp8": 1.2e-2}
ACTIVATIONS = {"clamped": Activation(limit=0.75), "oai": SWIGLU_OAI, "gelu": Activation("gelu_tanh")}
TILES = [(16, 64, 64, 1, 4, 3, False), (16, 64, 64, 1, 4, 3, True)]
TILES_FP8 = [(16, 64, 128, 1, 4, 3, True), (16, 256, 128, 8, 8, 3, False)]


def inputs_of(kernel, num_tokens=5):
    """Inputs so large that limits of 0.75 and 7 cut off a good part of gate and up."""
    shape = kernel.shape
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(num_tokens)]
    made = kernel.inputs(shape, torch.stack(rows).to(DEVICE))
    return made | {"hidden_states": made["hidden_states"] * (8 if shape.activation == SWIGLU_OAI else 1)}


def error(out, wanted):
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def engine(activation, inputs):
    """The layer in the steps of vLLM's Triton experts: both GEMMs round to bf16, and so does the activation between them.

    Written from what its `SiluAndMulWithClamp` documents and torch's GELU, without a line shared with our reference.
    """
    x, ids, w = (inputs[name] for name in ("hidden_states", "topk_ids", "topk_weights"))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token, slot in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])).tolist():
        expert = int(ids[token, slot])
        both = (inputs["w13"][expert].float() @ x[token].float()).bfloat16().float()
        d = len(both) // 2
        if activation.name == "gelu_tanh":
            mid = torch.nn.GELU(approximate="tanh")(both[:d]) * both[d:]
        else:
            bound = float("inf") if activation.limit is None else activation.limit
            gate, up = torch.minimum(both[:d], torch.tensor(bound)), both[d:].clip(-bound, bound)
            mid = gate / (1 + torch.exp(-activation.alpha * gate)) * (up + activation.beta)
        row = inputs["w2"][expert].float() @ mid.bfloat16().float()
        out[token] += (row * w[token, slot]).bfloat16().float()
    return out.bfloat16()


@needs_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tile", TILES)
def test_bf16(name, tile):
    """Each activation in both orders of the GEMM, on memory that held NaN; SiLU itself is far away."""
    kernel = TritonFusedMoE(attrs.evolve(BF16, activation=ACTIVATIONS[name]))
    inputs = inputs_of(kernel)
    scratch = kernel.workspace(16, DEVICE)
    for tensor in (scratch.h, scratch.y):
        tensor.fill_(float("nan"))
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    kernel.launch(dict(zip(KEYS, tile, strict=True)), **inputs, out=out, workspace=scratch)
    wanted = kernel.reference(kernel.shape, inputs)
    assert error(out, wanted) < TOLERANCE["bf16"]
    assert error(out, engine(kernel.shape.activation, inputs)) < 1e-2
    assert error(kernel.reference(BF16, inputs), wanted) > 0.02


@needs_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tile", TILES_FP8)
def test_fp8(name, tile):
    """Where h is quantised in the epilogue too."""
    kernel = TritonFusedMoE(attrs.evolve(FP8, activation=ACTIVATIONS[name]))
    inputs = inputs_of(kernel)
    out = kernel.launch(dict(zip(KEYS, tile, strict=True)), **inputs)
    assert error(out, kernel.reference(kernel.shape, inputs)) < TOLERANCE["fp8"]


@needs_kernels
def test_every_form_of_a_launch():
    """Grids of one wave, a given alignment and the candidates of a graph give the bits of the plain launch."""
    kernel = TritonFusedMoE(attrs.evolve(BF16, activation=SWIGLU_OAI))
    inputs, config = inputs_of(kernel), dict(zip(KEYS, TILES[0], strict=True))
    plain = kernel.launch(config, **inputs)
    blocks = align_tokens(inputs["topk_ids"], 16, 4)
    assert torch.equal(kernel.launch(config, **inputs, blocks=blocks, waves=1), plain)
    choice = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(kernel.launch_candidates([config], [blocks], choice, **inputs), plain)


@needs_kernels
def test_nan_stays_nan():
    """A limit must not turn what went wrong before into a number."""
    kernel = TritonFusedMoE(attrs.evolve(BF16, activation=Activation(limit=1.0)))
    inputs = inputs_of(kernel)
    inputs["hidden_states"][2, 5] = float("nan")
    out = kernel.launch(dict(zip(KEYS, TILES[0], strict=True)), **inputs)
    assert out[2].isnan().all() and not out[3].isnan().any()


def test_others_refuse():
    """Kernels without them say so at once and name the one that has them."""
    shape = attrs.evolve(BF16, activation=SWIGLU_OAI)
    with pytest.raises(ConfigError, match=r"torch_grouped_mm has no silu:limit=7.*; use triton_fused_moe"):
        make_kernel("torch_grouped_mm", shape)
    assert make_kernel("triton_fused_moe", attrs.evolve(shape, activation=SILU)).shape == BF16
