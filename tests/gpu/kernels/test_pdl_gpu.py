"""Programmatic dependent launch on a GPU: same bits with and without. Run with `pytest -m gpu tests/gpu/kernels/test_pdl_gpu.py`."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.interpreter import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
    pytest.mark.skipif(torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90"),
]
LAYERS = 4


@pytest.fixture(autouse=True)
def as_found():
    yield
    pdl.use(None)


def captured(run):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 48, 700])
def test_a_chain_of_layers_has_the_same_bits(dtype, num_tokens):
    """Each layer reads the one before, in the same scratch memory: a launch that did not wait would show.

    One token runs without alignment, 700 with it in two launches.
    """
    shape = MoEShape(32, 8, 512, 384, dtype)
    kernel = TritonFusedMoE(shape)
    ids = torch.rand(num_tokens, 32, device="cuda").topk(8, dim=1).indices.int()
    given = kernel.inputs(shape, ids)
    workspace = kernel.workspace(num_tokens)
    x = [given.pop("hidden_states"), *(torch.empty(num_tokens, 512, device="cuda").bfloat16() for _ in range(LAYERS))]
    config = kernel.default_config(num_tokens)

    def run():
        for layer in range(LAYERS):
            kernel.launch(config, hidden_states=x[layer], **given, workspace=workspace, out=x[layer + 1])

    graphs = {}
    for setting in (pdl.NOWHERE, pdl.EVERYWHERE):
        pdl.use(setting)
        graphs[setting] = captured(run)
    for step in range(20):
        torch.manual_seed(step)
        scores = torch.rand(num_tokens, 32, device="cuda")
        scores[:, :8] += 0.3 * (step % 4)
        ids.copy_(scores.topk(8, dim=1).indices)
        found = {}
        for setting, graph in graphs.items():
            for out in (*x[1:], workspace.h, workspace.y):
                out.fill_(float("nan"))
            for _ in range(3):
                graph.replay()
            found[setting] = [out.clone() for out in x[1:]]
        for layer in range(LAYERS):
            assert torch.equal(found[pdl.NOWHERE][layer], found[pdl.EVERYWHERE][layer]), (step, layer)
            assert found[pdl.EVERYWHERE][layer].isfinite().all()
