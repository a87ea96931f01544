"""The plan file: what people check in, read and diff."""

import json
import pathlib

import attrs
import numpy as np
import pytest

from rampwrap.errors import PlanError
from rampwrap.fitting import make_plan
from rampwrap.plan import Plan
from rampwrap.static import StaticTable
from rampwrap.timings import Timings


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


def test_the_text_is_diffable(sim_plan: Plan) -> None:
    text = sim_plan.to_json()
    raw = json.loads(text)
    assert raw["provenance"]["held_out"]["captured_headroom"] > 0.5
    # A line for each config, grid and bucket, not one for each number.
    assert text.count("\n") < 4 * len(raw["configs"]) + 4 * len(raw["buckets"]) + 200
    assert max(map(len, text.splitlines())) < 2000


@pytest.mark.parametrize("damage", ["missing", "torn", "list", "schema", "nan", "index", "grids", "coefficients"])
def test_a_damaged_plan_is_refused_by_name(sim_plan: Plan, tmp_path: pathlib.Path, damage: str) -> None:
    path = tmp_path / "plan.json"
    raw = json.loads(sim_plan.to_json())
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
