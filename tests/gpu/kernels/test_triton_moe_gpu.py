"""The Triton kernels on a GPU: every config, real sizes, CUDA graphs. Run with `pytest -m gpu tests/gpu`."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe.warm import warm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]


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


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_every_config(dtype):
    """Each config of the list compiles and gives the float64 layer on poisoned memory, at 1 and 200 tokens."""
    shape = MoEShape(32, 4, 512, 384, dtype)
    kernel = TritonFusedMoE(shape)
    assert warm(shape, kernel.configs) == [None] * len(kernel.configs)
    wrong = []
    for num_tokens in (1, 200):
        inputs = kernel.inputs(shape, routing(shape, num_tokens))
        reference = kernel.reference(shape, inputs)
        workspace = kernel.workspace(num_tokens)
        for config in kernel.configs:
            out = kernel.launch(config, **inputs, workspace=poison(workspace))
            if not error(out, reference) < (2e-2 if dtype == "fp8" else 8e-3):
                wrong.append((num_tokens, config, error(out, reference)))
    assert not wrong


@pytest.mark.parametrize("num_tokens", [1, 100, 3000, 9000])
@pytest.mark.parametrize("num_experts", [8, 64, 512])
def test_alignment(num_tokens, num_experts):
    """Both paths give the stable order, whatever the size."""
    shape = MoEShape(num_experts, 8, 64, 64)
    ids = routing(shape, num_tokens)
    slots = ids.numel()
    for block_m in (16, 128):
        blocks = align.align_tokens(ids, block_m, num_experts)
        counts = torch.bincount(ids.flatten(), minlength=num_experts)
        assert torch.equal(blocks.expert_counts.long(), counts)
        per_expert = (counts + block_m - 1) // block_m
        rows = int(per_expert.sum()) * block_m
        assert int(blocks.num_tokens_post_padded) == rows
        assert torch.equal(
            blocks.expert_ids[: rows // block_m].long(),
            torch.repeat_interleave(torch.arange(num_experts, device="cuda"), per_expert),
        )
        got = blocks.sorted_token_ids
        assert torch.equal(got[got < slots].long(), torch.sort(ids.flatten(), stable=True).indices)
        assert bool((got[rows:] == slots).all())
        assert int((got[:rows] < slots).sum()) == slots


def test_graph_replay_is_eager_bit_for_bit():
    """A captured layer with workspace and output given follows its inputs, and allocates nothing."""
    shape = MoEShape(64, 8, 1024, 512)
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
    for seed in range(5):
        inputs["topk_ids"].copy_(routing(shape, 64, seed))
        graph.replay()
        assert torch.equal(out, kernel.launch(config, **inputs))


def test_same_input_same_bits():
    """No atomics: repeated launches agree bit for bit."""
    shape = MoEShape(64, 8, 1024, 512)
    kernel = TritonFusedMoE(shape)
    inputs = kernel.inputs(shape, routing(shape, 500))
    config = kernel.default_config(500)
    first = kernel.launch(config, **inputs)
    assert all(torch.equal(first, kernel.launch(config, **inputs)) for _ in range(5))
