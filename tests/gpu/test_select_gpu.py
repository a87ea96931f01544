"""Selection inside CUDA graphs on a GPU. Run with `pytest -m gpu tests/gpu/test_select_gpu.py`."""

import importlib.util
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import CaptureError
from rampwrap.ingraph import pack
from rampwrap.kernel import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.select import Candidates, choose
from rampwrap.moe_op import compiled
from rampwrap.selector import Selector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]


def load(name):
    """A module of the tests beside this folder."""
    path = pathlib.Path(__file__).parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"beside_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select, small = load("test_select"), load("test_selector")
SHAPE = MoEShape(64, 8, 512, 256)
TOKENS = 48
MODES = ["early-exit", "merged", "parallel"]


@pytest.fixture(scope="module")
def kernel():
    return small.Small(SHAPE)


@pytest.fixture(scope="module")
def plan(kernel):
    return small.small_plan(kernel, SHAPE)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def routing(active, tokens=TOKENS, seed=0):
    """int32 [tokens, 8] over `active` experts, anywhere."""
    rng = np.random.default_rng([seed, active])
    pool = rng.permutation(64)[: max(8, active)]
    rows = np.array([rng.permutation(pool)[:8] for _ in range(tokens)])
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def captured(run):
    """A graph of `run`, captured on a stream of its own."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def chosen(plan, selector, ids):
    """Index of the config that the host takes from the selector's candidates."""
    its = selector.bucket(len(ids)).shortlist
    counts = np.bincount(ids.cpu().numpy().ravel(), minlength=64)
    return its.candidates[plan.model.take(its.candidates).choose(counts, its.fallback)]


def test_twenty_thousand_choices_equal_the_hosts():
    """Compiled for this GPU, over random models and histograms: not one differs."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        model = select.random_model(rng, int(rng.integers(1, 5)), 64)
        kinds = rng.choice(["even", "skewed", "few", "one"], 400)
        rows = np.array([select.histogram(rng, kind, 64, int(2 ** rng.uniform(0, 17))) for kind in kinds])
        rows = np.concatenate([rows, rows + (rng.random(rows.shape) < 0.02)]).astype(np.int64)
        candidates = Candidates.on(pack(model, 0.1), "cuda")
        got = choose(torch.tensor(rows, dtype=torch.int32, device="cuda"), candidates, 0).tolist()
        assert got == [model.choose(row, 0, 0.1) for row in rows]


def test_replays_follow_the_routing(kernel, plan, mode):
    """Routing changes between replays: each has the bits of an eager launch of the config that the host names."""
    selector = Selector(kernel, plan, max_tokens=64, mode=mode, costs=small.FREE)
    inputs = kernel.inputs(SHAPE, routing(64).clone())
    out = torch.empty_like(inputs["hidden_states"])
    selector(**inputs, out=out)
    graph = captured(lambda: selector(**inputs, out=out))
    seen = []
    for step, active in enumerate([64, 8, 32, 12, 64, 9, 20, 50]):
        inputs["topk_ids"].copy_(routing(active, seed=step))
        out.fill_(float("nan"))
        graph.replay()
        index = chosen(plan, selector, inputs["topk_ids"])
        assert torch.equal(out, kernel.launch(plan.configs[index], **inputs)), (step, index)
        seen.append(index)
    assert len(set(seen)) >= 2
    torch.cuda.synchronize()
    counted = selector.counts()[TOKENS]
    assert sum(counted.values()) == 1 + len(seen)  # the eager launch, and every replay


def test_64_layers_in_one_graph(kernel, plan, mode):
    """Each layer chooses for itself, all share one lane's memory."""
    selector = Selector(kernel, plan, max_tokens=64, mode=mode, costs=small.FREE)
    inputs = kernel.inputs(SHAPE, routing(64))
    ids = [routing(8 + layer % 57, seed=layer) for layer in range(64)]
    outs = [torch.empty_like(inputs["hidden_states"]) for _ in ids]

    def run():
        for its, out in zip(ids, outs, strict=True):
            selector(**{**inputs, "topk_ids": its, "out": out})

    run()
    held = selector.memory_bytes
    graph = captured(run)
    assert selector.memory_bytes == held
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    for its, out in zip(ids, outs, strict=True):
        want = kernel.launch(plan.configs[chosen(plan, selector, its)], **{**inputs, "topk_ids": its})
        assert torch.equal(out, want)


def test_graphs_share_a_plan_and_end_in_any_order(kernel, plan, mode):
    """Two sizes, captured twice; the first graph is destroyed before the second is replayed."""
    selector = Selector(kernel, plan, max_tokens=64, mode=mode, costs=small.FREE)
    for _ in range(2):
        graphs = {}
        for tokens in (16, 48):
            inputs = kernel.inputs(SHAPE, routing(30, tokens))
            out = torch.empty_like(inputs["hidden_states"])
            selector(**inputs, out=out)
            graphs[tokens] = captured(lambda inputs=inputs, out=out: selector(**inputs, out=out)), inputs, out
        graphs[16][0].reset()
        graph, inputs, out = graphs[48]
        out.zero_()
        graph.replay()
        want = kernel.launch(plan.configs[chosen(plan, selector, inputs["topk_ids"])], **inputs)
        assert torch.equal(out, want)


def test_two_streams(kernel, plan):
    """Two lanes replay at the same time and disturb each other in nothing."""
    selector = Selector(kernel, plan, max_tokens=64, mode="early-exit", costs=small.FREE)
    runs = []
    for seed in range(2):
        lane = selector.lane()
        inputs = kernel.inputs(SHAPE, routing(10 + 40 * seed, seed=seed))
        out = torch.empty_like(inputs["hidden_states"])
        lane(**inputs, out=out)
        graph = captured(lambda lane=lane, inputs=inputs, out=out: lane(**inputs, out=out))
        runs.append((graph, torch.cuda.Stream(), inputs, out, lane))
    for _ in range(50):
        for graph, stream, *_ in runs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, _, inputs, out, _ in runs:
        want = kernel.launch(plan.configs[chosen(plan, selector, inputs["topk_ids"])], **inputs)
        assert torch.equal(out, want)
    assert sum(selector.counts()[TOKENS].values()) == 2 + 100


def test_capture_of_what_is_not_ready(kernel, plan):
    """An unprepared size, and unwarmed types, are refused with the fix; the stream is left usable."""
    selector = Selector(kernel, plan, max_tokens=64, mode="early-exit", costs=small.FREE)
    inputs = kernel.inputs(SHAPE, routing(20))
    with pytest.raises(CaptureError, match="run one eager step"):
        captured(lambda: selector(**inputs))
    selector(**inputs)
    wide = {**inputs, "topk_ids": inputs["topk_ids"].long()}
    with pytest.raises(CaptureError, match="not compiled before this capture"):
        captured(lambda: selector(**wide))
    with pytest.raises(CaptureError, match="no workspace yet"):
        lane = selector.lane()
        captured(lambda: lane(**inputs))
    with pytest.raises(CaptureError, match="freeze the choice"):
        lagged = Selector(kernel, plan, max_tokens=64, mode="lagged")
        captured(lambda: lagged(**inputs))
    selector.warm([TOKENS], lambda tokens: wide)
    captured(lambda: selector(**wide)).replay()


def test_lagged_never_waits(kernel, plan):
    """While the GPU is busy a step is launched at once, with the last histogram that has arrived."""
    selector = Selector(kernel, plan, max_tokens=64, mode="lagged")
    inputs = kernel.inputs(SHAPE, routing(8))
    for _ in range(3):
        selector(**inputs)
        torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    before = torch.cuda.Event()
    before.record()
    selector(**inputs)
    assert not before.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("compile_mode", ["default", "reduce-overhead"])
def test_torch_compile(kernel, plan, compile_mode):
    """The operator compiles into one graph, and under CUDA graph trees the routing still decides."""
    selector = Selector(kernel, plan, max_tokens=64, mode="early-exit", costs=small.FREE)
    layer = compiled(selector)
    inputs = kernel.inputs(SHAPE, routing(64))
    w13, w2 = inputs["w13"], inputs["w2"]
    selector(**inputs)  # memory made inside the first compiled call would belong to its graph

    def run(x, weights, ids):
        return layer(x * 2, w13, w2, weights, ids) + 1

    whole = torch.compile(run, fullgraph=True, mode=compile_mode)
    for step, active in enumerate([64, 8, 30, 64, 10]):
        ids = routing(active, seed=step)
        torch.compiler.cudagraph_mark_step_begin()
        got = whole(inputs["hidden_states"], inputs["topk_weights"], ids).clone()
        config = plan.configs[chosen(plan, selector, ids)]
        given = {**inputs, "hidden_states": inputs["hidden_states"] * 2, "topk_ids": ids}
        assert torch.equal(got, kernel.launch(config, **given) + 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_tight_grids_give_the_same_bits(dtype):
    """Every config with grids of one wave, and of split depth, against capacity grids and float64."""
    shape = MoEShape(32, 4, 512, 512, dtype)
    its = TritonFusedMoE(shape)
    ids = torch.rand(40, 32, device="cuda").topk(4, dim=1).indices.int()
    inputs = its.inputs(shape, ids)
    reference = its.reference(shape, inputs)
    for config in its.configs[:: 9 if dtype == "bf16" else 11] + tuple(c for c in its.configs if "split_k" in c):
        want = its.launch(config, **inputs)
        assert torch.equal(its.launch(config, **inputs, waves=1), want), config
        assert float((want.double() - reference).norm() / reference.norm()) < 2e-2, config
