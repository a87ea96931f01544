"""`GraphDispatcher` with the Triton kernel, on the GPU or in the interpreter; captures are in tests/gpu/kernels/test_select_gpu.py."""

import gc
import inspect
import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import attrs
import numpy as np

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.dispatch import lane
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.dispatch.lagged import Lagged
from rampwrap.dispatch.torch_op import compiled
from rampwrap.errors import CaptureError, FitError, InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe.configs import splits
from rampwrap.kernels.triton.select.host import Candidates, align_and_select
from rampwrap.model.features import Geometry, pass_over
from rampwrap.model.in_graph import pack
from rampwrap.model.wave import Wave
from rampwrap.observe import registry
from rampwrap.observe.registry import stats
from rampwrap.observe.tally import Telemetry
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import COSTS, Shortlist, all_in_graph, in_graph, serving, token_spans
from rampwrap.policy.policies import Bucket
from rampwrap.policy.static import StaticTable

if not INTERPRETED.value and not torch.cuda.is_available():
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 and there is no GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED.value else "cuda"
SHAPE = MoEShape(8, 2, 64, 32)
KEYS = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages", "swap_ab")
ROWS = ((16, 64, 64, 1, 4, 3, False), (32, 64, 64, 1, 4, 3, False), (16, 64, 64, 1, 4, 3, True))


class Small(TritonFusedMoE):
    """With configs that suit a tiny layer."""

    def __init__(self, shape: MoEShape = SHAPE) -> None:
        super().__init__(shape)
        self.configs = tuple(dict(zip(KEYS, row, strict=True)) for row in ROWS)


COEF = ((10.0, 1.0), (6.0, 1.9), (4.0, 2.5))


def small_plan(kernel, shape=SHAPE, device=None, num_buckets=1, coef=COEF):
    """A plan by which many active experts favour the first config and few favour the second or third.

    `coef` are microseconds of each config and, on top, of each active expert.
    """
    grids = tuple(kernel.grid(config, shape) for config in kernel.configs)
    geometry = Geometry.of(grids, 132)
    rng = np.random.default_rng(0)
    rows = np.array([rng.multinomial(n, rng.dirichlet(np.full(shape.num_experts, 0.3))) for n in (8, 16, 40, 90, 200)])
    rows = np.vstack([rows, np.eye(shape.num_experts, dtype=np.int64)[:2].sum(axis=0) * 8])  # static serves below two
    slots, active, heights = pass_over(rows, np.unique(geometry.block_m))
    support = np.concatenate([slots[:, None], active[:, None], heights], axis=1).astype(np.int64)
    # start, per wave, per CTA, per active expert, per slot, microseconds
    coef = np.array([[start, 0, 0, each, 0] for start, each in coef]) / 2.0**-30
    model = Wave(
        geometry,
        np.array([[1, 4096]] * 3),
        0.004,
        (),
        coef.astype(np.int64),
        np.zeros((3, len(support)), dtype=np.int64),
        support,
        np.unique(geometry.block_m),
    )
    return Plan(
        kernel=kernel.name,
        kernel_version=kernel.version,
        device=device or Device.current(),
        shape=shape,
        configs=kernel.configs,
        grids=grids,
        static=StaticTable("uniform", (1,), (0,)),
        model=model,
        buckets=tuple(Bucket(8 * 2**i, (0, 1, 2)) for i in range(num_buckets)),
    )


def every(plan):
    """The same plan, storing all three configs as candidates wherever there is something to choose."""
    lists = []
    for span in token_spans(plan.shape, plan.static, plan.buckets):
        its = in_graph(plan.model, plan.shape, span, {})
        more = {"candidates": (0, 1, 2), "static": 0, "why": "3 candidates for the test"} if span.pool else {}
        lists.append(attrs.evolve(its, **more))
    return attrs.evolve(plan, in_graph=tuple(lists))


@pytest.fixture(scope="module")
def kernel():
    return Small()


@pytest.fixture(scope="module")
def plan(kernel):
    return small_plan(kernel)


def ids_with(active, num_tokens, seed=0):
    """int32 [num_tokens, 2] over the first `active` experts."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(active)[:2] if active > 1 else [0, 0] for _ in range(num_tokens)]
    return torch.tensor(np.array(rows), dtype=torch.int32, device=DEVICE)


def test_same_bits_as_the_chosen_config(kernel, plan):
    """Each routing runs the config that the host policy names, and gives its bits; all candidates get their turn."""
    graph_dispatcher = GraphDispatcher(kernel, every(plan), max_tokens=16)
    policy, seen = plan.policy(), set()
    for active in (1, 2, 4, 6, 8):
        inputs = kernel.inputs(SHAPE, ids_with(active, 12))
        counts = np.bincount(inputs["topk_ids"].cpu().numpy().ravel(), minlength=8)
        index = policy.index(counts, 12)
        want = kernel.launch(plan.configs[index], **inputs)
        assert torch.equal(graph_dispatcher(**inputs), want)
        assert torch.equal(
            graph_dispatcher(*[inputs[n] for n in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")]), want
        )
        seen.add(index)
    assert seen == {0, 1, 2}
    counted = graph_dispatcher.counts()[8]  # of the plan's only bucket
    assert sum(counted.values()) == 10 and all(counted.values())
    text = graph_dispatcher.explain()
    assert "graph: 3 candidates" in text and "(static)" in text


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_split_candidates(chosen):
    """Candidates that split K differently share one sum, and each gives the bits of its own launch."""
    shape = MoEShape(8, 2, 64, 128)
    kernel = TritonFusedMoE(shape)
    row = dict(zip(KEYS, (16, 64, 32, 1, 4, 3, False), strict=True))
    configs = [row, {**row, "split_k": 4}, {**row, "num_warps": 8, "block_n": 128, "split_k": 2}]
    inputs = kernel.inputs(shape, ids_with(6, 9))
    geometry = Geometry.of(tuple(kernel.grid(config, shape) for config in configs), 132)
    nothing = np.zeros((3, 5), dtype=np.int64)
    support = np.array([[18, 6, 8]])
    model = Wave(geometry, np.array([[1, 99]] * 3), 0.01, (), nothing, nothing[:, :1], support, np.array([16]))
    blocks = align_and_select(inputs["topk_ids"], Candidates.on(pack(model), DEVICE), chosen, 8)
    scratch = kernel.workspace(9, DEVICE)
    scratch.y.fill_(float("nan"))
    out = kernel.launch_candidates(configs, blocks.blocks, blocks.choice, **inputs, workspace=scratch)
    want = kernel.launch(configs[chosen], **inputs)
    assert int(blocks.choice) == chosen and torch.equal(out, want)
    assert (splits(configs[1], 513), splits(configs[1], 512)) == (1, 4)
    assert kernel.grid(configs[1], shape).split_k == 4 and kernel.grid(configs[1], shape).launches == (4, 4)


def test_small_batches_add_nothing(kernel, plan):
    """One token has no routing to choose by: the static config is launched alone."""
    graph_dispatcher = GraphDispatcher(kernel, every(plan), max_tokens=16)
    inputs = kernel.inputs(SHAPE, ids_with(8, 1))
    assert torch.equal(graph_dispatcher(**inputs), kernel.launch(plan.configs[0], **inputs))
    assert graph_dispatcher.prepared(1).candidates is None and graph_dispatcher.counts() == {}
    empty = kernel.inputs(SHAPE, ids_with(8, 1)[:0])
    assert graph_dispatcher(**empty).shape == (0, SHAPE.hidden_size)


def test_dear_choosing_switches_itself_off(kernel, plan):
    """Where choosing costs more than it gains, nothing is added."""
    dear = {1: 0.0, 2: 50.0, 3: 50.0}
    graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=16, costs=dear)
    assert len(graph_dispatcher.prepared(12).configs) == 1
    assert "choosing costs more than" in graph_dispatcher.prepared(12).shortlist.why


def test_lagged(kernel, plan):
    """Lagged follows the host policy one step later, static before; all launches are known."""
    lagged = GraphDispatcher(kernel, plan, max_tokens=16, mode="lagged")
    skewed, even = kernel.inputs(SHAPE, ids_with(2, 12)), kernel.inputs(SHAPE, ids_with(8, 12))
    for inputs in (skewed, skewed, even, even):
        lagged(**inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    assert lagged._dispatcher.launch_counts == [2, 0, 2]
    layer = lagged.layer("")
    assert layer._lagged[(12).bit_length()].latest().sum() == 24
    (row,) = lagged.telemetry()
    assert (row.mode, row.counts, row.steps, row.on_device) == ("lagged", {0: 2, 2: 2}, 4, False)
    assert lagged.explain().count(" 50.0%        2") == 2


def test_a_capture_makes_nothing_new(kernel, plan, monkeypatch):
    """Layers and memory that a capture would need for the first time are asked for before it."""
    graph_dispatcher = GraphDispatcher(kernel, every(plan), max_tokens=16)
    monkeypatch.setattr(lane, "capturing", lambda: True)
    inputs = kernel.inputs(SHAPE, ids_with(2, 12))
    with pytest.raises(CaptureError, match="no layer 'another' yet"):
        graph_dispatcher.layer("another")
    with pytest.raises(CaptureError, match="no"):
        graph_dispatcher.lane()(**inputs)


def test_lanes_have_memory_of_their_own(kernel, plan):
    """Two lanes share counters, not memory; what is held is stated."""
    graph_dispatcher = GraphDispatcher(kernel, every(plan), max_tokens=16)
    tallies = graph_dispatcher.memory_bytes
    inputs = kernel.inputs(SHAPE, ids_with(4, 12))
    first, second = graph_dispatcher.lane(), graph_dispatcher.lane()
    assert torch.equal(first(**inputs), second(**inputs))
    assert first.memory_bytes == second.memory_bytes > 0
    assert graph_dispatcher.memory_bytes == 2 * first.memory_bytes + tallies
    assert sum(graph_dispatcher.counts()[8].values()) == 2


def test_layers_share_memory_and_keep_their_own_record(kernel, plan):
    """Each layer reports what it chose, what was predicted, and how its tokens were spread."""
    graph_dispatcher = GraphDispatcher(kernel, every(plan), max_tokens=16)
    first, second = graph_dispatcher.layer("model.0"), graph_dispatcher.layer("model.1")
    assert graph_dispatcher.layer("model.0") is first and first._lane is second._lane
    skewed, even = kernel.inputs(SHAPE, ids_with(2, 12)), kernel.inputs(SHAPE, ids_with(8, 12))
    first(**skewed)
    held = graph_dispatcher.memory_bytes
    for inputs in (skewed, even):
        assert torch.equal(second(**inputs), graph_dispatcher(**inputs))
    assert graph_dispatcher.memory_bytes == held
    rows = {row.layer: row for row in graph_dispatcher.telemetry()}
    assert set(rows) == {"model.0", "model.1", ""}
    counts = np.array([12, 12, 0, 0, 0, 0, 0, 0])
    us, chosen = plan.model.predict(counts), plan.policy().index(counts, 12)
    assert rows["model.0"] == Telemetry(
        layer="model.0",
        num_tokens=8,
        mode="graph",
        counts={index: int(index == chosen) for index in (0, 1, 2)},
        steps=1,
        static_us=us[0],
        chosen_us=us[chosen],
        active_experts=2,
        concentration=0.5,
        outside=0,
        on_device=True,
    )
    assert rows["model.1"] == attrs.evolve(rows[""], layer="model.1") and rows[""].steps == 2
    assert rows[""].chosen_us < rows[""].static_us


@pytest.mark.parametrize("planned", [True, False])
def test_the_memory_of_a_layer_that_never_ran_is_not_read(kernel, plan, planned):
    """vLLM loads weights into memory that it unmaps to sleep; what is made then lies in it, and a scrape of the metrics would
    be an illegal access."""

    class Unmapped:
        def tolist(self):
            raise RuntimeError("an illegal memory access was encountered")

        def numel(self):
            return 0

    graph_dispatcher = GraphDispatcher(kernel, every(plan) if planned else None, max_tokens=16)
    graph_dispatcher.layer("")._tallies = Unmapped()
    graph_dispatcher.layer("model.0")(**kernel.inputs(SHAPE, ids_with(2, 12)))
    assert {row.layer for row in graph_dispatcher.telemetry()} == {"model.0"}
    assert graph_dispatcher.explain() and bool(graph_dispatcher.counts()) == planned


def test_nowhere_profiled_is_counted_and_static(kernel, plan):
    """More slots than were profiled: the static config, counted as outside."""
    narrow = attrs.evolve(plan, model=attrs.evolve(plan.model, span=np.array([[1, 4], [1, 4], [1, 4]])))
    its = Shortlist(0, 8, (0, 1, 2), 0, None, None, "for the test")
    graph_dispatcher = GraphDispatcher(kernel, attrs.evolve(narrow, in_graph=(its,)), max_tokens=16)
    inputs = kernel.inputs(SHAPE, ids_with(2, 12))
    assert torch.equal(graph_dispatcher(**inputs), kernel.launch(plan.configs[0], **inputs))
    (row,) = [row for row in graph_dispatcher.telemetry() if row.on_device]
    assert (row.outside, row.steps, row.counts[0]) == (1, 1, 1)


class Deaf:
    """The same kernel, of which the GPU cannot let one of several configs run."""

    chooses_in_graph = False

    def __init__(self, kernel):
        self._kernel = kernel

    def __getattr__(self, name):
        return getattr(self._kernel, name)


class Renamed(Small):
    """Another kernel of the same layer; of its launches, the scratch memory is kept."""

    def __init__(self, name, shape):
        super().__init__(shape)
        self.name, self.scratch = name, []

    def launch(self, config, /, *args, workspace=None, **kwargs):
        self.scratch.append(workspace)
        return super().launch(config, *args, workspace=workspace, **kwargs)


Renamed.launch.__signature__ = inspect.signature(Small.launch)


class Bare:
    """Takes neither scratch memory nor blocks nor a place for the result."""

    name, version = "bare", "0"

    def __init__(self, kernel):
        self._kernel, self.shape, self.configs, self.grid = kernel, kernel.shape, kernel.configs[:1], kernel.grid

    def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids):
        return self._kernel.launch(config, hidden_states, w13, w2, topk_weights, topk_ids)


def portfolio_plan(kernel, **more):
    """A portfolio of three kernels with a config each, and a plan that chooses between them."""
    first, second = Renamed("first", kernel.shape), Renamed("second", kernel.shape)
    first.configs, second.configs = first.configs[1:2], second.configs[2:]
    portfolio = Portfolio([first, second, Bare(kernel)])
    order = ("bare", "first", "second")  # of `COEF`
    portfolio.configs = tuple(sorted(portfolio.configs, key=lambda config: order.index(config["kernel"])))
    return portfolio, small_plan(portfolio, kernel.shape, **more)


def test_a_portfolio_shares_the_lanes_memory(kernel):
    """All members that take scratch memory get the lane's; others are called without."""
    portfolio, plan = portfolio_plan(kernel)
    graph_dispatcher = GraphDispatcher(portfolio, plan, max_tokens=16)
    for place, config in enumerate(plan.configs):
        bucket = graph_dispatcher.prepared(12)
        object.__setattr__(bucket, "configs", (config,))
        inputs = kernel.inputs(SHAPE, ids_with(4, 12))
        want = portfolio.launch(config, **inputs)
        for member in list(portfolio.members.values())[:2]:
            member.scratch.clear()
        assert torch.equal(graph_dispatcher(**inputs), want)
        used = [its for member in list(portfolio.members.values())[:2] for its in member.scratch]
        assert all(its is graph_dispatcher._main._workspace.by_member["first"] for its in used)
        assert bool(used) == (config["kernel"] != "bare"), place
    assert graph_dispatcher.memory_bytes > kernel.workspace(16, DEVICE).num_bytes


def test_any_token_count_is_looked_up(kernel):
    """Hundreds of batch sizes share the plan's few buckets; the first and the last size beyond reach are static."""
    many = small_plan(kernel, num_buckets=4)
    graph_dispatcher = GraphDispatcher(kernel, every(many), max_tokens=4096)
    buckets = [graph_dispatcher.prepared(tokens) for tokens in range(4097)]
    assert len(set(map(id, buckets))) <= len(graph_dispatcher._spans) < 20
    assert [b.candidates is None for b in (buckets[0], buckets[1], buckets[3], buckets[128], buckets[129])] == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert [buckets[tokens].shortlist.num_tokens for tokens in (8, 12, 13, 64, 100)] == [8, 8, 16, 64, 64]
    assert "within reach" in buckets[4096].shortlist.why and "within reach" in buckets[1].shortlist.why


def test_the_plan_brings_its_shortlists(kernel, plan):
    """A stored shortlist serves as it is; with other costs it is made anew; an old plan has none."""
    lists = all_in_graph(plan.model, plan.shape, plan.static, plan.buckets, COSTS)
    where = serving(lists, 12)
    odd = attrs.evolve(lists[where], candidates=(0, 2), why="because the file says so")
    stored = attrs.evolve(plan, in_graph=(*lists[:where], odd, *lists[where + 1 :]))
    graph_dispatcher = GraphDispatcher(kernel, stored, max_tokens=16)
    assert graph_dispatcher.prepared(12).shortlist == odd and "because the file says so" in graph_dispatcher.explain()
    dear = {2: 1e3}
    assert len(GraphDispatcher(kernel, stored, max_tokens=16, costs=dear).prepared(12).configs) == 1
    # Of a kernel that cannot let the GPU choose.
    assert len(GraphDispatcher(Deaf(kernel), stored, max_tokens=16).prepared(12).configs) == 1
    assert GraphDispatcher(kernel, plan, max_tokens=16).prepared(12).shortlist == lists[where]


def test_another_device(kernel):
    """A plan for another GPU: one warning, the static config alone."""
    other = small_plan(kernel, device=attrs.evolve(Device.current(), name="another"))
    with pytest.warns(RuntimeWarning, match="serves static configs"):
        graph_dispatcher = GraphDispatcher(kernel, other, max_tokens=16)
    inputs = kernel.inputs(SHAPE, ids_with(2, 12))
    assert torch.equal(graph_dispatcher(**inputs), kernel.launch(other.configs[0], **inputs))
    assert graph_dispatcher.counts() == {}


def test_refusals(kernel, plan):
    """Poisoned plans, unknown modes, batches beyond the memory."""
    with pytest.raises(FitError, match=r"error is nan"):
        attrs.evolve(plan, model=attrs.evolve(plan.model, error=float("nan")))
    with pytest.raises(InputError, match="mode 'fast' is unknown"):
        GraphDispatcher(kernel, plan, max_tokens=16, mode="fast")
    graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=16)
    with pytest.raises(InputError, match="max_tokens=16"):
        graph_dispatcher(**kernel.inputs(SHAPE, ids_with(4, 17)))


def test_operator(kernel, plan):
    """The custom op passes torch's own checks, traces into one graph and gives the graph dispatcher's bits."""
    graph_dispatcher = GraphDispatcher(kernel, every(plan), max_tokens=16)
    layer = compiled(graph_dispatcher)
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
    inputs = kernel.inputs(SHAPE, ids_with(4, 12))
    args = [inputs[name] for name in names]
    want = graph_dispatcher(**inputs)
    assert torch.equal(layer(*args), want)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile(lambda *args: layer(*args) + 1, fullgraph=True, backend=backend)
    assert torch.equal(whole(*args), want + 1) and len(graphs) == 1


class Defaults(Small):
    """Whose default changes between 12 and 16 tokens."""

    def default_config(self, num_tokens):
        return self.configs[0 if num_tokens >= 16 else 2]


def test_without_a_plan_the_defaults_serve(monkeypatch):
    """In graphs too: one config for each token count, memory made before the capture, a record of each layer."""
    kernel = Defaults()
    graph_dispatcher = GraphDispatcher(kernel, max_tokens=40)
    ran = []
    monkeypatch.setattr(
        kernel, "launch", lambda config, **its: ran.append(config) or Small.launch(kernel, config, **its)
    )
    layer = graph_dispatcher.layer("layer")
    for tokens in (1, 12, 13, 14, 15, 16, 40):
        inputs = kernel.inputs(SHAPE, ids_with(8, tokens))
        assert torch.equal(layer(**inputs), Small.launch(kernel, kernel.default_config(tokens), **inputs))
        assert graph_dispatcher.prepared(tokens).candidates is None
    # The nearest of 12 and 16, on a tie the lower one.
    assert ran == [kernel.configs[0 if tokens > 14 else 2] for tokens in (1, 12, 13, 14, 15, 16, 40)]
    assert sum(row.steps for row in graph_dispatcher.telemetry()) == len(ran)
    assert "there is no plan, its default serves" in graph_dispatcher.explain()
    monkeypatch.setattr(lane, "capturing", lambda: True)
    layer(**kernel.inputs(SHAPE, ids_with(3, 16, seed=1)))
    with pytest.raises(CaptureError, match="17 tokens were not compiled"):
        layer(**kernel.inputs(SHAPE, ids_with(8, 17)))
    (found,) = [its for its in stats()["sources"] if its["number"] == dict(registry._sources)[graph_dispatcher]]
    assert found["plan"] is None and {entry["layer"] for entry in found["layers"]} == {"layer"}


@pytest.mark.parametrize("mode", ["graph", "lagged"])
def test_the_operator_runs_without_a_plan(mode):
    kernel = Defaults()
    graph_dispatcher = GraphDispatcher(kernel, max_tokens=16, mode=mode)
    inputs = kernel.inputs(SHAPE, ids_with(4, 12))
    assert torch.equal(compiled(graph_dispatcher)(**inputs), kernel.launch(kernel.configs[2], **inputs))


def test_operator_needs_its_graph_dispatcher(kernel, plan):
    """A graph dispatcher that is gone is named in the error."""
    layer = compiled(GraphDispatcher(kernel, every(plan), max_tokens=16))
    gc.collect()
    inputs = kernel.inputs(SHAPE, ids_with(4, 12))
    with pytest.raises(InputError, match="keep the GraphDispatcher alive"):
        layer(**inputs)


def test_each_span_explains_itself(kernel, plan):
    """Two spans of one bucket, cut by the static table, differ in their candidates and in what ran."""
    table = StaticTable("uniform", (8, 14), (0, 1))
    cut = attrs.evolve(plan, static=table)
    lists = [attrs.evolve(its, static=table.index(its.first)) for its in every(cut).in_graph]
    pairs = {its.first: (0, 2) if table.index(its.first) == 0 else (1, 2) for its in lists if len(its.candidates) > 1}
    lists = [attrs.evolve(its, candidates=pairs.get(its.first, its.candidates)) for its in lists]
    graph_dispatcher = GraphDispatcher(kernel, attrs.evolve(cut, in_graph=tuple(lists)), max_tokens=16)
    for tokens in (8, 16, 16, 16):
        graph_dispatcher(**kernel.inputs(SHAPE, ids_with(2, tokens)))
    low, high = (graph_dispatcher.prepared(tokens).shortlist for tokens in (8, 16))
    assert low.num_tokens == high.num_tokens and (low.candidates, high.candidates) == ((0, 2), (1, 2))
    text = graph_dispatcher.explain()

    def share(first):
        after = text.split(f"from {first} tokens")[1].splitlines()[1:3]
        return [int(line.split()[1]) for line in after]

    assert (sum(share(low.first)), sum(share(high.first))) == (1, 3)


def test_no_tokens_are_no_batch(kernel, plan):
    with pytest.raises(InputError, match="max_tokens is 0"):
        GraphDispatcher(kernel, plan, max_tokens=0)


def test_a_capture_with_other_alignment_is_refused(kernel, plan, monkeypatch):
    """Triton compiles another kernel for a tensor that does not start at a multiple of 16 bytes."""
    graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=16)
    inputs = kernel.inputs(SHAPE, ids_with(8, 12))
    assert not any(tensor.data_ptr() % 16 for tensor in inputs.values())
    graph_dispatcher(**inputs)
    odd = inputs | {"topk_ids": torch.empty(13, 2, dtype=torch.int32, device=DEVICE)[1:].copy_(inputs["topk_ids"])}
    assert odd["topk_ids"].data_ptr() % 16 == 8 and odd["topk_ids"].is_contiguous()
    with monkeypatch.context() as captured:
        captured.setattr("rampwrap.dispatch.lane.capturing", lambda: True)
        graph_dispatcher(**inputs)
        with pytest.raises(CaptureError, match=r"same alignment \(topk_ids not at a multiple of 16"):
            graph_dispatcher(**odd)
    graph_dispatcher(**odd)
    monkeypatch.setattr("rampwrap.dispatch.lane.capturing", lambda: True)
    graph_dispatcher(**odd)


def test_warmth_does_not_depend_on_the_order_of_arguments(kernel, plan, monkeypatch):
    """Warmed by name in one order, captured by position: no refusal; and what failed is not warm."""
    graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=16)
    inputs = kernel.inputs(
        SHAPE, torch.zeros(12, 2, dtype=torch.int32, device=DEVICE) + torch.arange(2, device=DEVICE).int()
    )
    graph_dispatcher.warm([12], lambda tokens: dict(reversed(list(inputs.items()))))
    monkeypatch.setattr("rampwrap.dispatch.lane.capturing", lambda: True)
    graph_dispatcher(*(inputs[name] for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")))
    monkeypatch.setattr("rampwrap.dispatch.lane.capturing", lambda: False)
    few = {name: value[:11] if len(value) == 12 else value for name, value in inputs.items()}
    with monkeypatch.context() as broken:
        broken.setattr(Small, "launch", lambda *a, **k: 1 / 0)
        broken.setattr(Small, "launch_candidates", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            graph_dispatcher(**few)
    monkeypatch.setattr("rampwrap.dispatch.lane.capturing", lambda: True)
    with pytest.raises(CaptureError, match="not compiled"):
        graph_dispatcher(**few)


def test_lagged_counts_what_the_kernel_counts():
    """Ids that mean nothing, or an expert of another rank, count for nobody."""
    state = Lagged(4)
    expert_map = torch.tensor([0, 1, 2, 3, -1, -1], dtype=torch.int32)
    state.read(torch.tensor([[0, 1], [-1, -1], [-1, 9], [4, 5]]), expert_map)
    assert state.latest().tolist() == [1, 1, 0, 0]
