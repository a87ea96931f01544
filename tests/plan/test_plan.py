"""The plan file: what people check in, read and diff."""

import json
import pathlib

import attrs
import numpy as np
import pytest

from rampwrap import schema
from rampwrap.errors import PlanError
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import profile
from rampwrap.measure.timings import Timings
from rampwrap.plan import file as plan_file
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan, profile_command
from rampwrap.policy.buckets import draw
from rampwrap.policy.graph_lists import Shortlist, in_graph, serving, token_spans
from rampwrap.policy.static import StaticTable
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SimKernel


def test_a_loaded_plan_chooses_alike_for_every_workload(
    sim_plan: Plan, sim_timings: Timings, tmp_path: pathlib.Path
) -> None:
    sim_plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    before, after = sim_plan.policy(), loaded.policy()
    for counts, tokens in zip(sim_timings.counts, sim_timings.num_tokens, strict=True):
        assert before.index(counts, int(tokens)) == after.index(counts, int(tokens))
        np.testing.assert_array_equal(sim_plan.model.predict(counts), loaded.model.predict(counts))
    assert loaded.to_json() == sim_plan.to_json()


def test_the_cost_of_choosing_travels_with_the_plan(sim_timings: Timings, tmp_path: pathlib.Path) -> None:
    make_plan(sim_timings, choosing_us=1e6).save(tmp_path / "plan.json")
    dear = Plan.load(tmp_path / "plan.json").policy()
    for counts, tokens in zip(sim_timings.counts, sim_timings.num_tokens, strict=True):
        assert dear.index(counts, int(tokens)) == dear.static.index(int(tokens))


def test_a_plan_holds_only_configs_that_may_run(sim_plan: Plan, sim_timings: Timings) -> None:
    used = {*sim_plan.static.indices, *(i for bucket in sim_plan.buckets for i in bucket.shortlist)}
    assert used == set(range(len(sim_plan.configs)))
    assert len(sim_plan.configs) < len(sim_timings.configs)


def test_shortlists_for_graphs_travel_with_the_plan(sim_plan: Plan, tmp_path: pathlib.Path) -> None:
    sim_plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").in_graph == sim_plan.in_graph
    assert len(sim_plan.in_graph) >= len(sim_plan.buckets) and all(its.why for its in sim_plan.in_graph)
    # Each serves the token counts from its first on, with the static config of all of them.
    for tokens in range(1, 9000, 7):
        its = sim_plan.in_graph[serving(sim_plan.in_graph, tokens)]
        assert its.static in its.candidates
        if its.expected_us is None:  # beyond what was profiled, or nothing to choose from
            assert its.candidates == (sim_plan.static.index(tokens),)
        assert its.num_tokens == min((b.num_tokens for b in sim_plan.buckets), key=lambda n: (abs(n - tokens), n))


def test_a_plan_of_an_older_version_loads(sim_plan: Plan, tmp_path: pathlib.Path) -> None:
    raw = json.loads(sim_plan.to_json())
    del raw["in_graph"], raw["checksum"]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert Plan.load(tmp_path / "plan.json").in_graph == ()


def test_the_text_is_diffable(sim_plan: Plan) -> None:
    text = sim_plan.to_json()
    raw = json.loads(text)
    assert raw["provenance"]["held_out"]["captured_headroom"] > 0.5
    # A line for each config, grid and bucket, not one for each number.
    assert text.count("\n") < 4 * len(raw["configs"]) + 4 * len(raw["buckets"]) + 200
    assert max(map(len, text.splitlines())) < 2000


@pytest.mark.parametrize(
    "damage", ["missing", "torn", "list", "schema", "nan", "index", "grids", "coefficients", "graph"]
)
def test_a_damaged_plan_is_refused_by_name(sim_plan: Plan, tmp_path: pathlib.Path, damage: str) -> None:
    path = tmp_path / "plan.json"
    raw = schema.unseal(json.loads(sim_plan.to_json()))
    match damage:
        case "torn":
            path.write_text(sim_plan.to_json()[:700])
        case "list":
            path.write_text("[1, 2]")
        case "schema":
            path.write_text(json.dumps(raw | {"schema": 7}))
        case "nan":
            raw["model"]["error"] = float("nan")
            path.write_text(json.dumps(raw))
        case "index":
            raw["buckets"][0]["shortlist"] = [999]
            path.write_text(json.dumps(raw))
        case "grids":
            path.write_text(json.dumps(raw | {"grids": raw["grids"][:1]}))
        case "graph":
            raw["in_graph"][0]["static"] = 999
            path.write_text(json.dumps(raw))
        case "coefficients":
            raw["model"]["coef"] = raw["model"]["coef"][:-1]
            path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


def test_a_plan_that_names_a_config_it_lacks_cannot_be_made(sim_plan: Plan) -> None:
    with pytest.raises(PlanError, match="999"):
        attrs.evolve(sim_plan, static=StaticTable("test", (1,), (999,)))


@pytest.mark.parametrize("static", ["uniform", "averaged"])
def test_the_static_baseline_is_the_one_asked_for(sim_timings: Timings, static: str) -> None:
    assert make_plan(sim_timings, static=static).static.source == static


def test_an_engines_file_may_be_the_baseline(sim_timings: Timings, tmp_path: pathlib.Path) -> None:
    (tmp_path / "tuned.json").write_text(json.dumps({"64": dict(sim_timings.configs[5])}))
    plan = make_plan(sim_timings, static=str(tmp_path / "tuned.json"))
    assert plan.configs[plan.static.index(64)] == sim_timings.configs[5]


def test_a_shortlist_counts_the_cost_of_choosing(sim_plan: Plan) -> None:
    """Free choosing takes candidates, dear choosing none; without slots to skew there is nothing to choose."""
    model, shape = sim_plan.model, sim_plan.shape
    spans = token_spans(shape, sim_plan.static, sim_plan.buckets)
    every = [in_graph(model, shape, its, dict.fromkeys(range(1, 5), 0.0)) for its in spans]
    free = max(every, key=lambda its: len(its.candidates))
    span = spans[every.index(free)]
    assert 1 < len(free.candidates) <= 4 and free.mode == "graph" and "faster than one" in free.why
    assert free.expected_us is not None and free.static_us is not None and free.expected_us < free.static_us
    dear = in_graph(model, shape, span, {1: 0.0, 2: 1e4, 3: 1e4, 4: 1e4})
    assert dear.candidates == (dear.static,) and "choosing costs more than" in dear.why
    assert len(in_graph(model, shape, span, {2: -20.0}).candidates) == 2
    assert in_graph(model, shape, span, {}).candidates == (dear.static,)
    first = next(span for span in spans if span.first == 1)
    assert in_graph(model, shape, first, {2: 0.0}).candidates == (first.static,)


def test_the_config_that_serves_alone_is_the_best_over_skews(sim_plan: Plan) -> None:
    """Where the static table's config is slow on skewed routing, another serves, at no cost; the reason says so."""
    model, shape = sim_plan.model, sim_plan.shape
    found = 0
    for span in token_spans(shape, sim_plan.static, sim_plan.buckets):
        its = in_graph(model, shape, span, {2: 1e4})
        assert len(its.candidates) == 1
        if its.static != span.static:
            found += 1
            assert its.why.endswith(f"faster than the static table's {span.static}")
            mean = model.predict(draw(shape, [span.num_tokens])).mean(axis=0)
            assert mean[its.static] < mean[span.static]
    assert found


def test_few_slots_get_one_config_and_the_best_over_skews(sim_plan: Plan) -> None:
    """Where kernels skip alignment nothing is chosen at a step, at whatever cost; but not the uniform-tuned config either."""
    model, shape = sim_plan.model, sim_plan.shape
    spans = token_spans(shape, sim_plan.static, sim_plan.buckets)
    few = [span for span in spans if "few slots" in span.reason and span.pool]
    assert few
    for span in few:
        every = sorted({span.static, *span.pool})
        predicted = model.predict(draw(shape, sorted({span.first, min(span.last, span.num_tokens * 3 // 2)})))
        typical = np.log(predicted).mean(axis=0)
        worst = max(every, key=lambda index: typical[index])
        poor = attrs.evolve(span, static=worst, pool=tuple(index for index in every if index != worst))
        its = in_graph(model, shape, poor, {2: 0.0, 3: 0.0, 4: 0.0})
        assert its.candidates == (its.static,) and its.why.startswith(span.reason)
        if typical[worst] > np.log(1.003) + min(typical[every]):
            assert its.static == min(every, key=lambda index: typical[index])
    unprofiled = [span for span in spans if "within reach" in span.reason]
    assert unprofiled and not any(span.pool for span in unprofiled)


@pytest.mark.parametrize("sizes", [(512, 8, 4, 512), (256, 1, 8, 512), (128, 1, 8, 256)], ids=str)
@pytest.mark.filterwarnings("error")
def test_a_predicted_time_of_nothing_wins_nothing(sizes: tuple[int, int, int, int]) -> None:
    """Ranks of few experts, whose small batches are often empty: no config is infinitely better than another."""
    num_experts, top_k, local, inter = sizes
    shape = MoEShape(num_experts, top_k, 2048, inter, num_local_experts=local)
    routings = [Routing.parse(text) for text in ("uniform", "zipf:1.2", "dirichlet:0.3", "dirichlet:0.1")]
    rows = workload_grid([2**power for power in range(12)], routings)
    plan = make_plan(profile(SimKernel(shape), shape, rows, quiet=True))
    assert any("few slots" in its.why and its.expected_us is not None for its in plan.in_graph)
    for its in plan.in_graph:
        assert "inf" not in its.why and "nan" not in its.why
        counts = draw(shape, [its.first])
        counts = counts[counts.any(axis=1)]
        if its.expected_us is not None and len(counts):
            assert (plan.model.predict(counts)[:, its.static] > 0).all()


@pytest.mark.parametrize("key", ["choosing_us", "error", "coef"])
def test_infinities_spelled_as_numbers_are_refused(sim_plan, tmp_path, key):
    """1e999 is JSON; wherever it stands the whole plan is refused, and by the one error that callers catch."""
    raw = schema.unseal(json.loads(sim_plan.to_json()))
    where = raw if key == "choosing_us" else raw["model"]
    where[key] = 12345.5 if key != "coef" else [[12345.5] * 5] * len(raw["configs"])
    path = tmp_path / "x.plan.json"
    path.write_text(json.dumps(raw).replace("12345.5", "1e999"))
    with pytest.raises(PlanError):
        Plan.load(path)


def test_the_remedy_names_local_experts():
    shape = MoEShape(64, 8, 2048, 1024, num_local_experts=16)
    assert profile_command(SimKernel(shape), shape).endswith("--num-local-experts 16")


def test_a_kernel_that_cannot_choose_in_a_graph_gets_one_config_each(sim_timings: Timings) -> None:
    """A plan holds no list that its kernel cannot run; a plan of an older version that names a mode still loads."""
    plan = make_plan(attrs.evolve(sim_timings, kernel="cute_moe"))
    assert plan.in_graph and {len(its.candidates) for its in plan.in_graph} == {1}
    raw = schema.dump(plan.in_graph[0])
    again = schema.read({**raw, "mode": "parallel"}, Shortlist, PlanError, plan_file.converter())
    assert "mode" not in raw and again == plan.in_graph[0]


@pytest.mark.parametrize("mode", ["early-exit", "merged", "parallel", "switch", "single", "another", None])
def test_the_launch_modes_of_old_plans_are_passed_over(
    sim_plan: Plan, tmp_path: pathlib.Path, mode: str | None
) -> None:
    """Those that there were; any other key is a mistake."""
    path = tmp_path / "a.plan.json"
    sim_plan.save(path)
    raw = schema.unseal(json.loads(path.read_text()))
    for its in raw["in_graph"]:
        its |= {} if mode is None else {"mode": mode}
    path.write_text(json.dumps(schema.seal(raw)))
    if mode == "another":
        with pytest.raises(PlanError, match="mode"):
            Plan.load(path)
    else:
        assert Plan.load(path).in_graph == sim_plan.in_graph
