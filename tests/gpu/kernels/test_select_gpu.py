"""Selection inside CUDA graphs on a GPU. Run with `pytest -m gpu tests/gpu/kernels/test_select_gpu.py`."""

import gc
import importlib.util
import pathlib

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from rampwrap.adapters.alpha_moe import AlphaMoE
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.adapters.vllm_fused_moe import VllmFusedMoE
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.dispatch.torch_op import compiled
from rampwrap.errors import CaptureError, InputError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.select.host import Candidates, align_and_select, choose, selected_in, selection_ints
from rampwrap.model.in_graph import pack
from rampwrap.policy.graph_lists import Shortlist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]


def load(name):
    """A module of the CPU's tests."""
    path = pathlib.Path(__file__).parents[2] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"beside_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select, small = load("kernels/triton/test_select"), load("dispatch/test_graph")
SHAPE = MoEShape(64, 8, 512, 256)
TOKENS = 48
# Up to 16 active experts the third config is fastest, from 27 on the first, between them the second.
COEF = ((40.0, 1.0), (24.0, 1.6), (10.0, 2.4))
ACTIVE = (64, 8, 32, 12, 22, 64, 9, 20, 50)


@pytest.fixture(scope="module")
def kernel():
    return small.Small(SHAPE)


@pytest.fixture(scope="module")
def plan(kernel):
    made = small.small_plan(kernel, SHAPE, num_buckets=5, coef=COEF)
    # Not one of the tests below would show anything if the choice stayed the same.
    policy = made.policy()
    taken = {policy.index(histogram_of(routing(active, seed=step)), TOKENS) for step, active in enumerate(ACTIVE)}
    assert taken == {0, 1, 2}
    return made


def choosing(kernel, plan, **more):
    """A graph dispatcher that chooses from all three configs at every token count."""
    every = Shortlist(0, 64, (0, 1, 2), 0, None, None, "for the test")
    return GraphDispatcher(kernel, attrs.evolve(plan, in_graph=(every,)), max_tokens=64, **more)


def histogram_of(ids):
    """int64 [64], on the host."""
    return np.bincount(ids.cpu().numpy().ravel(), minlength=64)


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


def chosen(plan, graph_dispatcher, ids):
    """Index of the config that the host takes from the graph dispatcher's candidates."""
    its = graph_dispatcher.prepared(len(ids)).shortlist
    return its.candidates[plan.model.take(its.candidates).choose(histogram_of(ids), its.fallback)]


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


def test_replays_follow_the_routing(kernel, plan):
    """Routing changes between replays: each has the bits of an eager launch of the config that the host names."""
    graph_dispatcher = choosing(kernel, plan)
    inputs = kernel.inputs(SHAPE, routing(ACTIVE[0]).clone())
    out = torch.empty_like(inputs["hidden_states"])
    graph_dispatcher(**inputs, out=out)
    graph = captured(lambda: graph_dispatcher(**inputs, out=out))
    assert len(graph_dispatcher.prepared(TOKENS).configs) == 3
    seen = []
    for step, active in enumerate(ACTIVE):
        inputs["topk_ids"].copy_(routing(active, seed=step))
        out.fill_(float("nan"))
        graph.replay()
        index = chosen(plan, graph_dispatcher, inputs["topk_ids"])
        assert torch.equal(out, kernel.launch(plan.configs[index], **inputs)), (step, index)
        seen.append(index)
    assert set(seen) == {0, 1, 2}
    (row,) = graph_dispatcher.telemetry()
    # The eager launch, of ACTIVE[0], and every replay.
    assert row.on_device and row.steps == 1 + len(seen) and row.outside == 0
    assert row.counts == {index: seen.count(index) + (index == seen[0]) for index in (0, 1, 2)}
    assert 0 < row.chosen_us < row.static_us
    actives = [np.count_nonzero(histogram_of(routing(a, seed=s))) for s, a in enumerate(ACTIVE)]
    assert row.active_experts == sum(actives) + actives[0]


def test_64_layers_in_one_graph(kernel, plan):
    """Each layer chooses for itself and keeps its own record; all share one lane's memory."""
    graph_dispatcher = choosing(kernel, plan)
    inputs = kernel.inputs(SHAPE, routing(64))
    ids = [routing(8 + layer % 57, seed=layer) for layer in range(64)]
    outs = [torch.empty_like(inputs["hidden_states"]) for _ in ids]
    layers = [graph_dispatcher.layer(f"layer {place}") for place in range(64)]

    def run():
        for layer, its, out in zip(layers, ids, outs, strict=True):
            layer(**{**inputs, "topk_ids": its, "out": out})

    run()
    held = graph_dispatcher.memory_bytes
    graph = captured(run)
    assert graph_dispatcher.memory_bytes == held
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    taken = [chosen(plan, graph_dispatcher, its) for its in ids]
    for its, out, index in zip(ids, outs, taken, strict=True):
        assert torch.equal(out, kernel.launch(plan.configs[index], **{**inputs, "topk_ids": its}))
    assert set(taken) == {0, 1, 2}
    rows = {row.layer: row for row in graph_dispatcher.telemetry()}
    for place, index in enumerate(taken):
        row = rows[f"layer {place}"]
        assert row.steps == 2 and row.counts[index] == 2


def test_graphs_share_a_plan_and_end_in_any_order(kernel, plan):
    """Two sizes, captured three times over; the first graph is destroyed before the second is replayed."""
    graph_dispatcher = choosing(kernel, plan)
    for turn in range(3):
        graphs = {}
        for tokens in (16, 48):
            inputs = kernel.inputs(SHAPE, routing(30, tokens, seed=turn))
            out = torch.empty_like(inputs["hidden_states"])
            graph_dispatcher(**inputs, out=out)
            graphs[tokens] = captured(lambda inputs=inputs, out=out: graph_dispatcher(**inputs, out=out)), inputs, out
        gone, kept = (16, 48) if turn % 2 else (48, 16)
        graphs[gone][0].reset()
        graph, inputs, out = graphs[kept]
        for active in (8, 64):
            inputs["topk_ids"].copy_(routing(active, kept, seed=turn))
            out.zero_()
            graph.replay()
            want = kernel.launch(plan.configs[chosen(plan, graph_dispatcher, inputs["topk_ids"])], **inputs)
            assert torch.equal(out, want)


def test_the_graph_dispatcher_may_go_before_its_graph_is_destroyed(kernel, plan):
    """Destroying a graph after its graph dispatcher is gone touches nothing that was freed; a new graph dispatcher starts clean."""
    for _ in range(2):
        graph_dispatcher = choosing(kernel, plan)
        inputs = kernel.inputs(SHAPE, routing(30))
        out = torch.empty_like(inputs["hidden_states"])
        graph_dispatcher(**inputs, out=out)
        graph = captured(lambda s=graph_dispatcher, i=inputs, o=out: s(**i, out=o))
        graph.replay()
        want = kernel.launch(plan.configs[chosen(plan, graph_dispatcher, inputs["topk_ids"])], **inputs)
        assert torch.equal(out, want) and graph_dispatcher.telemetry()[0].steps == 2
        del graph_dispatcher
        gc.collect()
        graph.reset()
        torch.cuda.synchronize()


def test_two_streams(kernel, plan):
    """Two lanes replay at the same time and disturb each other in nothing."""
    graph_dispatcher = choosing(kernel, plan)
    runs = []
    for seed in range(2):
        lane = graph_dispatcher.lane()
        inputs = kernel.inputs(SHAPE, routing(10 + 40 * seed, seed=seed))
        out = torch.empty_like(inputs["hidden_states"])
        lane(**inputs, out=out)
        graph = captured(lambda lane=lane, inputs=inputs, out=out: lane(**inputs, out=out))
        runs.append((graph, torch.cuda.Stream(), inputs, out, lane))
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream, *_ in runs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, _, inputs, out, _ in runs:
        want = kernel.launch(plan.configs[chosen(plan, graph_dispatcher, inputs["topk_ids"])], **inputs)
        assert torch.equal(out, want)
    assert sum(row.steps for row in graph_dispatcher.telemetry()) == 2 + 100


def test_a_capture_with_other_alignment_is_refused(kernel, plan):
    """Triton has another kernel for ids that do not start at a multiple of 16 bytes; after an eager step it is there."""
    graph_dispatcher = choosing(kernel, plan)
    inputs = kernel.inputs(SHAPE, routing(20))
    graph_dispatcher(**inputs)
    memory = torch.empty(TOKENS * 8 + 1, dtype=torch.int32, device="cuda")
    odd = inputs | {"topk_ids": memory[1:].view(TOKENS, 8).copy_(inputs["topk_ids"])}
    with pytest.raises(CaptureError, match="topk_ids not at a multiple of 16 bytes"):
        captured(lambda: graph_dispatcher(**odd))
    want, held = graph_dispatcher(**odd), {}
    captured(lambda: held.update(out=graph_dispatcher(**odd))).replay()
    assert torch.equal(held["out"], want)


def test_capture_of_what_is_not_ready(kernel, plan):
    """An unprepared size, and unwarmed types, are refused with the fix; the stream is left usable."""
    graph_dispatcher = choosing(kernel, plan)
    inputs = kernel.inputs(SHAPE, routing(20))
    with pytest.raises(CaptureError, match="run one eager step"):
        captured(lambda: graph_dispatcher(**inputs))
    graph_dispatcher(**inputs)
    wide = {**inputs, "topk_ids": inputs["topk_ids"].long()}
    with pytest.raises(CaptureError, match="not compiled before this capture"):
        captured(lambda: graph_dispatcher(**wide))
    with pytest.raises(CaptureError, match="no workspace yet"):
        lane = graph_dispatcher.lane()
        captured(lambda: lane(**inputs))
    lagged = GraphDispatcher(kernel, plan, max_tokens=64, mode="lagged")
    lagged(**inputs)
    with pytest.raises(CaptureError, match="freeze the choice"):
        captured(lambda: lagged(**inputs))
    graph_dispatcher.warm([TOKENS], lambda tokens: wide)
    captured(lambda: graph_dispatcher(**wide)).replay()


def test_lagged_never_waits(kernel, plan):
    """While the GPU is busy a step is launched at once, with the last histogram that has arrived."""
    graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=64, mode="lagged")
    inputs = kernel.inputs(SHAPE, routing(8))
    for _ in range(3):
        graph_dispatcher(**inputs)
        torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    before = torch.cuda.Event()
    before.record()
    graph_dispatcher(**inputs)
    assert not before.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("compile_mode", ["default", "reduce-overhead"])
def test_torch_compile(kernel, plan, compile_mode):
    """The operator compiles into one graph, and under CUDA graph trees the routing still decides."""
    graph_dispatcher = choosing(kernel, plan)
    layer = compiled(graph_dispatcher)
    inputs = kernel.inputs(SHAPE, routing(64))
    w13, w2 = inputs["w13"], inputs["w2"]
    graph_dispatcher(**inputs)  # memory made inside the first compiled call would belong to its graph

    def run(x, weights, ids):
        return layer(x * 2, w13, w2, weights, ids) + 1

    whole = torch.compile(run, fullgraph=True, mode=compile_mode)
    taken = set()
    for step, active in enumerate(ACTIVE):
        ids = routing(active, seed=step)
        taken.add(chosen(plan, graph_dispatcher, ids))
        torch.compiler.cudagraph_mark_step_begin()
        got = whole(inputs["hidden_states"], inputs["topk_weights"], ids).clone()
        config = plan.configs[chosen(plan, graph_dispatcher, ids)]
        given = {**inputs, "hidden_states": inputs["hidden_states"] * 2, "topk_ids": ids}
        assert torch.equal(got, kernel.launch(config, **given) + 1)
    assert taken == {0, 1, 2} and graph_dispatcher.telemetry()[0].steps >= 1 + len(ACTIVE)


@pytest.mark.parametrize("experts", [64, 128, 256, 512])
def test_all_paths_of_alignment_agree(experts):
    """Compiled: one, two and three launches give the same arrays, with and without selection, and so do repeats."""
    rng = np.random.default_rng(experts)
    model = select.random_model(rng, 4, experts)
    candidates = Candidates.on(pack(model), "cuda")
    for tokens in (1, 7, 64, 500, 1024, 4096, 9000):
        scores = torch.rand(tokens, experts, device="cuda") ** rng.choice([1.0, 0.1, 8.0])
        ids = (scores * torch.rand(experts, device="cuda")).topk(8, dim=1).indices.int()
        found = {}
        for path in align.PATHS if 8 * tokens <= align.BY_EXPERT_MAX_SLOTS else ("chunks",):
            for turn in range(2):
                memory = torch.full((selection_ints(tokens, 8, experts, candidates.packed.block_ms),), -7).int().cuda()
                selected = selected_in(memory, tokens, 8, experts, candidates.packed.block_ms)
                align_and_select(ids, candidates, 0, experts, selected=selected, path=path)
                place = int(selected.choice)
                its = selected.blocks[place]
                rows = int(its.num_tokens_post_padded)
                plain = align.align_tokens(ids, its.block_m, experts, path=path)
                for blocks in (its, plain):
                    arrays = (blocks.sorted_token_ids, blocks.expert_ids[: rows // its.block_m], blocks.expert_counts)
                    found[path, turn, blocks is its] = [place, rows, *(array.tolist() for array in arrays)]
        first = next(iter(found.values()))
        assert all(each == first for each in found.values()), tokens
        counts = np.bincount(ids.cpu().numpy().ravel(), minlength=experts)
        assert first[0] == model.choose(counts, 0) and first[4] == counts.tolist()


@pytest.mark.parametrize("kind", ["vllm", "vllm fp8", "alpha"])
def test_other_peoples_kernels(kind):
    """Early exit over unmodified kernels: replays give the bits of the chosen config (Alpha-MoE: its accuracy)."""
    shape = MoEShape(64, 8, 512, 256, "bf16" if kind == "vllm" else "fp8")
    try:
        its = AlphaMoE(shape) if kind == "alpha" else VllmFusedMoE(shape)
    except InputError as error:
        if "cannot be imported" in str(error) or "not installed" in str(error):
            pytest.skip(str(error))
        raise
    heights = sorted({its.grid(config, shape).block_m for config in its.configs})[:3]
    its.configs = tuple(next(c for c in its.configs if its.grid(c, shape).block_m == m) for m in heights)
    plan = small.small_plan(its, shape, num_buckets=5, coef=COEF)
    graph_dispatcher = choosing(its, plan)
    inputs = its.inputs(shape, routing(ACTIVE[0]).clone())
    graph_dispatcher(**inputs)
    held = []
    graph = captured(lambda: held.append(graph_dispatcher(**inputs)))
    seen = set()
    for step, active in enumerate(ACTIVE):
        inputs["topk_ids"].copy_(routing(active, seed=step))
        held[0].fill_(float("nan"))
        graph.replay()
        index = chosen(plan, graph_dispatcher, inputs["topk_ids"])
        want = its.launch(plan.configs[index], **inputs)
        if kind == "alpha":
            assert float((held[0] - want).double().norm() / want.double().norm()) < 0.01
        else:
            assert torch.equal(held[0], want), (step, index)
        seen.add(index)
    assert seen == {0, 1, 2}


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
