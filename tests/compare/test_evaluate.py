"""Judging policies by measured times, and the reports of it."""

import csv
import io
import json
import math
import pathlib

import attrs
import numpy as np
import pytest

from rampwrap.compare import evaluate as compare
from rampwrap.compare import report
from rampwrap.compare.oracle import Oracle
from rampwrap.errors import InputError, TableError
from rampwrap.measure.timings import Timings
from rampwrap.model.fit import fit
from rampwrap.policy.policies import Pinned, Static
from rampwrap.policy.static import StaticTable


def test_replay_reports_every_policy_as_fractions(sim_timings: Timings) -> None:
    result = json.loads(json.dumps(compare.replay(sim_timings).to_dict()))
    assert list(result["policies"]) == ["static-uniform", "static-averaged", "ramp4", "wave", "oracle"]
    for figures in result["policies"].values():
        assert {"regret_mean", "regret_p95", "regret_max", "captured_headroom", "slower_than_static_share"} <= set(
            figures
        )
        assert all(math.isfinite(value) for value in figures.values())
    oracle, static, ours = (result["policies"][name] for name in ("oracle", "static-uniform", "wave"))
    assert oracle["regret_max"] == 0 and oracle["captured_headroom"] == 1
    assert static["captured_headroom"] == 0 and static["slower_than_static_share"] == 0 and static["speedup"] == 1
    assert ours["regret_mean"] < static["regret_mean"] and ours["captured_headroom"] > 0.5
    assert result["fit_seconds"] > 0


def test_figures_are_what_their_names_say(sim_timings: Timings) -> None:
    timings = attrs.evolve(
        sim_timings.take([0, 1, 2]),
        us=np.array([[10.0, 8.0], [10.0, 20.0], [10.0, np.nan]]),
        configs=sim_timings.configs[:2],
        grids=sim_timings.grids[:2],
    )
    configs = timings.configs
    first, second = Pinned(configs, 0), Pinned(configs, 1)
    result = compare.evaluate(timings, {"a": first, "b": second, "oracle": Oracle(timings)}, "a")
    a, b = result.summary("a"), result.summary("b")
    assert a.mean_us == 10 and a.regret_max == pytest.approx(0.25)
    # Where a pick did not run, the baseline serves.
    assert result.unmeasured("b") == 1 and result.to_dict()["policies"]["b"]["unmeasured_picks"] == 1
    assert result.us("b").tolist() == [8, 20, 10]
    assert b.captured_headroom == pytest.approx((30 - 38) / 2) and b.slower_than_static_share == pytest.approx(1 / 3)
    assert b.speedup == pytest.approx((10 / 8 * 10 / 20) ** (1 / 3))


def test_no_headroom_is_no_division_by_zero(sim_timings: Timings) -> None:
    one = attrs.evolve(
        sim_timings, us=sim_timings.us[:, :1], configs=sim_timings.configs[:1], grids=sim_timings.grids[:1]
    )
    result = compare.replay(one)
    assert {s.captured_headroom for s in result.summaries()} == {0.0}
    assert {s.speedup for s in result.summaries()} == {1.0}


def test_a_table_without_uniform_rows_still_has_a_baseline(sim_timings: Timings) -> None:
    result = compare.replay(sim_timings.take(np.flatnonzero(~sim_timings.is_uniform)))
    assert result.summary("static-uniform").speedup == result.summary("static-averaged").speedup == 1


def test_what_cannot_be_judged_is_said(sim_timings: Timings) -> None:
    policy = Static(sim_timings.configs, StaticTable("test", (1,), (0,)))
    with pytest.raises(InputError, match="not among the policies"):
        compare.evaluate(sim_timings, {"a": policy})
    with pytest.raises(InputError, match="2 configs but the table 24"):
        compare.evaluate(sim_timings, {"static-uniform": Pinned(sim_timings.configs[:2], 0)})
    with pytest.raises(TableError, match="no workload"):
        compare.evaluate(attrs.evolve(sim_timings, us=np.full_like(sim_timings.us, np.nan)), {"static-uniform": policy})
    with pytest.raises(TableError, match="no 'later' workloads"):
        compare.replay(sim_timings, eval_split="later")
    with pytest.raises(InputError, match="not measured"):
        Oracle(sim_timings).index(np.ones(64, dtype=np.int64), 8)


def test_reports_hold_the_same_figures(sim_timings: Timings, tmp_path: pathlib.Path) -> None:
    result = compare.replay(attrs.evolve(sim_timings, spread=np.full_like(sim_timings.us, 0.004)))
    shown = report.text(result)
    assert "A/B by tokens: static-uniform -> wave" in shown and "+-0.2%" in shown
    rows = list(csv.DictReader(io.StringIO(report.csv_text(result))))
    assert len(rows) == 5 * 21
    ours = [float(row["us"]) for row in rows if row["policy"] == "wave"]
    assert np.mean(ours) == pytest.approx(result.summary("wave").mean_us, abs=0.01)
    report.picture(result, tmp_path / "ab.png")
    held_out = sim_timings.take(sim_timings.rows("eval"))
    report.model_picture(fit(sim_timings, rows=sim_timings.rows("train")), held_out, tmp_path / "fit.svg")
    assert b"<svg" in (tmp_path / "fit.svg").read_bytes()
    assert (tmp_path / "ab.png").read_bytes().startswith(b"\x89PNG")
