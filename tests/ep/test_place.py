"""Experts are placed by predicted time: maps that are whole, exchanges that pay, a command that says what it is worth."""

import itertools
import json
import pathlib
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.cli.main import main
from rampwrap.ep.expert_maps import ExpertMaps
from rampwrap.ep.forecast import Forecast, Marginal
from rampwrap.ep.place import Steps, _Layer, balanced, by_time, by_tokens, replicated, slowest_us
from rampwrap.ep.study import CONTIGUOUS, TIME, TOKENS, study
from rampwrap.errors import InputError, PlanMismatchError
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.recorded import read_recording
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SimKernel

EXPERTS, TOP_K, RANKS, LAYERS, STEPS = 16, 2, 4, 3, 24


def rank_plan(slots: int) -> Plan:
    """For one rank of the layer, from a table of the simulated kernel."""
    shape = MoEShape(EXPERTS, TOP_K, 2048, 1024, num_local_experts=slots)
    kernel = SimKernel(shape)
    routings = [Routing.parse(name) for name in ("uniform", "dirichlet:1", "dirichlet:0.3", "zipf:1.2")]
    rows = workload_grid([1, 8, 64, 256, 1024, 4096], routings)
    counts = np.stack([expert_counts(row.topk_ids(EXPERTS, TOP_K), EXPERTS)[:slots] for row in rows])
    us = np.array([[kernel.time_us(config, row) for config in kernel.configs] for row in counts])
    sizes = {"split": tuple(row.split for row in rows), "label": tuple(row.label for row in rows)}
    grids = tuple(kernel.grid(config, shape) for config in kernel.configs)
    return make_plan(
        Timings(us, counts, **sizes, kernel=kernel.name, kernel_version=kernel.version, device=kernel.device,
                shape=shape, configs=kernel.configs, grids=grids)
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    return rank_plan(EXPERTS // RANKS)


@pytest.fixture(scope="module")
def forecast(plan: Plan) -> Forecast:
    return Forecast.by(plan)


def recorded(hot: tuple[int, ...] = ()) -> Any:
    """int64 [steps, layers, experts]: every layer has its own popularities; `hot` experts are eight times as popular."""
    rng = np.random.default_rng(5)
    out = np.zeros((STEPS, LAYERS, EXPERTS), dtype=np.int64)
    for layer, step in itertools.product(range(LAYERS), range(STEPS)):
        popularity = np.ones(EXPERTS)
        popularity[list(hot)] = 8.0
        score = rng.gumbel(size=(2048, EXPERTS)) + np.log(popularity)
        ids = np.argpartition(-score, TOP_K, axis=1)[:, :TOP_K]
        out[step, layer] = np.bincount(ids.ravel(), minlength=EXPERTS)
    return out


@pytest.fixture
def dump(tmp_path: pathlib.Path) -> str:
    np.save(tmp_path / "recorded.npy", recorded(hot=(0, 1, 2, 3)))
    return str(tmp_path / "recorded.npy")


@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.integers(0, 50), min_size=8, max_size=8))
def test_slots_share_all_tokens(ranks: int, each: int, counts: list[int]) -> None:
    redundant = ranks * each if 8 % ranks == 0 else (-8) % ranks
    maps = ExpertMaps.contiguous(2, 8, ranks, redundant)
    here = maps.counts(1, np.array(counts)).ravel()
    row = maps.physical[1]
    for expert, count in enumerate(counts):
        shares = here[row == expert]
        assert shares.sum() == count and shares.max() - shares.min() <= 1


def test_counts_keep_leading_axes() -> None:
    maps = ExpertMaps(3, 2, np.array([[0, 1, 2, 0]]))
    found = maps.counts(0, np.array([[5, 1, 2], [4, 0, 9]]))
    assert found.tolist() == [[[3, 1], [2, 2]], [[2, 0], [9, 2]]]


def test_maps_of_ranks_are_those_of_engines() -> None:
    maps = ExpertMaps(4, 2, np.array([[3, 0, 2, 1]]))
    assert maps.placement(0, 0).expert_map.tolist() == [1, -1, -1, 0]
    assert maps.placement(0, 1).expert_map.tolist() == [-1, 1, 0, -1]
    with pytest.raises(InputError, match="rank 0 holds an expert of layer 0 twice"):
        ExpertMaps(2, 2, np.array([[0, 0, 1, 0]])).placement(0, 0)


@pytest.mark.parametrize(
    ("physical", "text"),
    [
        ([[0, 1, 2]], "3 slots cannot be shared by ep_size=2"),
        ([[0, 1, 1, 1]], "layer 0 of an expert map has no slot for expert 2"),
        ([[0, 1, 2, 3]], "holds expert 3 of 3"),
        ([[0, 1, 2, -1]], "holds expert -1 of 3"),
        ([0, 1, 2, 0], "has shape"),
        ([[0.0, 1, 2, 0]], "of float64"),
        (np.zeros((0, 4), dtype=np.int64), "has shape"),
    ],
)
def test_maps_that_are_not_whole_are_refused(physical: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        ExpertMaps(3, 2, np.array(physical))


def test_files_are_what_sglang_takes(tmp_path: pathlib.Path) -> None:
    maps = ExpertMaps(3, 2, np.array([[0, 1, 2, 0], [2, 1, 0, 1]]))
    maps.save(tmp_path / "maps.json")
    raw = json.loads((tmp_path / "maps.json").read_text())
    assert raw == {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}  # any further key ends SGLang
    assert np.array_equal(ExpertMaps.load(tmp_path / "maps.json", 3, 2).physical, maps.physical)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"logical_count": []}', '{"physical_to_logical_map": [[0, 1], [0]]}', "[" * 9999]
)
def test_other_files_are_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "maps.json").write_text(text)
    with pytest.raises(InputError, match=r"maps.json.* holds no physical_to_logical_map"):
        ExpertMaps.load(tmp_path / "maps.json", 2, 1)
    with pytest.raises(InputError, match="cannot be read"):
        ExpertMaps.load(tmp_path / "absent.json", 2, 1)


def test_arrivals_are_experts_that_a_rank_did_not_hold() -> None:
    before = ExpertMaps(4, 2, np.array([[0, 1, 2, 3]]))
    assert ExpertMaps(4, 2, np.array([[1, 0, 3, 2]])).arrivals(before).tolist() == [[0, 0]]
    assert ExpertMaps(4, 2, np.array([[0, 2, 1, 3]])).arrivals(before).tolist() == [[1, 1]]
    with pytest.raises(InputError, match="4 ranks cannot become"):
        before.arrivals(ExpertMaps(4, 4, np.array([[0, 1, 2, 3]])))


@given(st.lists(st.integers(0, 99), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4]), st.integers(0, 3))
def test_balanced_ranks_are_full_and_hold_no_expert_twice(loads: list[int], ranks: int, each: int) -> None:
    experts = replicated(np.array(loads, dtype=float), ranks * each if ranks > 1 else 0)
    copies = np.bincount(experts, minlength=12)
    assert copies.min() >= 1 and copies.sum() == experts.size
    row = balanced(experts, (np.array(loads) / copies)[experts], ranks)
    assert sorted(row) == sorted(experts)
    if copies.max() == 1:
        assert all(len(set(rank)) == len(rank) for rank in row.reshape(ranks, -1).tolist())


def test_replicas_go_to_the_most_loaded() -> None:
    assert replicated(np.array([9.0, 1, 4]), 3).tolist() == [0, 0, 0, 1, 2, 2]


def marginal(forecast: Forecast, steps: Steps) -> Marginal:
    rows = steps.counts.reshape(-1, 4)
    tokens = np.repeat(steps.num_tokens, len(rows) // len(steps.num_tokens))
    return Marginal.fit(rows, np.array([forecast.us(row, int(its)) for row, its in zip(rows, tokens, strict=True)]))


def time_of(forecast: Forecast, steps: Steps, row: Any, ranks: int = RANKS) -> float:
    maps = ExpertMaps(steps.counts.shape[1], ranks, np.asarray(row)[None])
    return slowest_us(forecast.table(maps.counts(0, steps.counts), steps.num_tokens))


@pytest.mark.parametrize("redundant", [0, 4])
def test_time_is_never_predicted_worse_than_tokens_on_the_steps_it_saw(redundant: int) -> None:
    forecast = Forecast.by(rank_plan((EXPERTS + redundant) // RANKS))
    better = 0
    for layer, hot in itertools.product(range(LAYERS), [(), (0, 1, 2, 3), (5,)]):
        counts = recorded(hot)[:, layer]
        steps = Steps(counts, counts.sum(axis=1) // TOP_K)
        guess = marginal(forecast, steps)
        tokens = time_of(forecast, steps, by_tokens(steps, RANKS, redundant))
        placed = time_of(forecast, steps, by_time(steps, RANKS, redundant, forecast, guess))
        assert placed <= tokens
        better += placed < tokens * 0.999
    assert better >= 1


def test_few_experts_are_placed_as_well_as_can_be(forecast: Forecast) -> None:
    """Against all 35 ways to halve eight experts of which only some are busy."""
    rng = np.random.default_rng(2)
    for _ in range(4):
        counts = (rng.integers(0, 200, (4, 8)) * (rng.random((4, 8)) < 0.7)).astype(np.int64)
        counts[:, 0] += 1
        steps = Steps(counts, np.maximum(counts.max(axis=1), counts.sum(axis=1) // TOP_K))
        rows = [[0, *some, *sorted(set(range(1, 8)) - set(some))] for some in itertools.combinations(range(1, 8), 3)]
        best = min(time_of(forecast, steps, row, 2) for row in rows)
        found = by_time(steps, 2, 0, forecast, marginal(forecast, steps))
        assert time_of(forecast, steps, found, 2) <= best * 1.02


def test_exchanges_go_on_until_none_pays(forecast: Forecast) -> None:
    """All hot experts stand on one rank at first."""
    counts = recorded(hot=(0, 1, 2, 3))[:, 0]
    steps = Steps(counts, counts.sum(axis=1) // TOP_K)
    layer = _Layer(steps, ExpertMaps.contiguous(1, EXPERTS, RANKS), forecast, marginal(forecast, steps))
    times = [slowest_us(layer.times_us)]
    while layer.improved():
        times.append(slowest_us(layer.times_us))
        assert times[-1] == pytest.approx(time_of(forecast, steps, layer.row))
    assert len(times) > 3 and all(after < before for before, after in itertools.pairwise(times))
    assert times[-1] <= time_of(forecast, steps, by_tokens(steps, RANKS, 0)) * 1.01
    assert len({slot // 4 for slot, expert in enumerate(layer.row.tolist()) if expert < 4}) == RANKS


def test_replicas_carry_their_share_when_tokens_are_balanced() -> None:
    """Expert 0 has half of all tokens: four replicas of it, one a rank, each with as much as another expert."""
    counts = np.array([[96, *[8] * 12]])
    row = by_tokens(Steps(counts, counts.sum(axis=1) // TOP_K), RANKS, 3)
    assert (row.reshape(RANKS, -1) == 0).sum(axis=1).tolist() == [1] * RANKS
    assert ExpertMaps(13, RANKS, row[None]).counts(0, counts[0]).sum(axis=1).tolist() == [48] * RANKS


def test_a_marginal_knows_tokens_from_tiles() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 300, (400, 4)) * (rng.random((400, 4)) < 0.6)
    times = 5 + (3 * (counts > 0) + 0.5 * -(-counts // 64)).sum(axis=1)
    assert Marginal.fit(counts, times).us == pytest.approx([3, 0, 0, 0.5, 0], abs=1e-6)
    # A plan may predict nothing at all for a rank without tokens.
    without, free = np.vstack([np.zeros_like(counts[:1]), counts]), np.concatenate([[0.0], times])
    assert Marginal.fit(without, free).us == pytest.approx([3, 0, 0, 0.5, 0], abs=1e-6)
    assert not Marginal.fit(without[:1], free[:1]).us.any()


def test_a_study_judges_by_steps_that_no_placement_saw(plan: Plan, dump: str, tmp_path: pathlib.Path) -> None:
    recording = read_recording(dump, EXPERTS)
    found = study(plan, recording, RANKS, held_out=0.25)
    assert (found.layers, found.seen, found.held_out, found.beyond) == (3, 54, 18, 0)
    # What happens in the held-out steps changes the verdict and not the placement.
    later = recorded(hot=(0, 1, 2, 3))
    later[18:] = later[18:, :, ::-1]
    np.save(tmp_path / "later.npy", later)
    other = study(plan, read_recording(str(tmp_path / "later.npy"), EXPERTS), RANKS, held_out=0.25)
    for name in (CONTIGUOUS, TOKENS, TIME):
        assert np.array_equal(found.maps[name].physical, other.maps[name].physical)
    assert found.judged[TIME].slowest_us != other.judged[TIME].slowest_us
    # All four hot experts are on rank 0 at first.
    assert found.judged[TIME].slowest_us < 0.95 * found.judged[CONTIGUOUS].slowest_us
    assert found.judged[CONTIGUOUS].arrivals == 0 < found.judged[TIME].arrivals
    assert found.judged[TIME].balance > found.judged[CONTIGUOUS].balance


def test_layers_without_experts_stay_contiguous(plan: Plan, tmp_path: pathlib.Path) -> None:
    counts = recorded(hot=(0, 1))
    counts[:, 0] = 0
    np.save(tmp_path / "recorded.npy", counts)
    found = study(plan, read_recording(str(tmp_path / "recorded.npy"), EXPERTS), RANKS)
    assert found.layers == 2 and found.maps[TIME].physical.shape == (3, EXPERTS)
    assert found.maps[TIME].physical[0].tolist() == list(range(EXPERTS))


@pytest.fixture
def saved(plan: Plan, tmp_path: pathlib.Path) -> str:
    plan.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


def test_the_command_tells_and_writes(
    saved: str, dump: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps.json"
    command = ["place", "--recorded", dump, "--plan", saved, "--ep-size", str(RANKS), "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "token-balanced" in text and "which pays after" in text and f"--init-expert-location {out}" in text
    assert main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values["placements"]) == {CONTIGUOUS, TOKENS, TIME} and values["layers"] == LAYERS
    assert values["best"] == min(values["placements"], key=lambda name: values["placements"][name]["slowest_us"])
    assert ExpertMaps.load(out, EXPERTS, RANKS).physical.shape == (LAYERS, EXPERTS)
    assert values["moving_us"] == pytest.approx(values["placements"][values["best"]]["busiest_bytes"] / 326e3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ep-size", "1"], "two ranks or more"),
        (["--ep-size", "8"], "make one with 'rampwrap profile"),
        (["--ep-size", "4", "--redundant", "4"], "make one with 'rampwrap profile"),
        (["--ep-size", "4", "--redundant", "2"], "give --redundant 0 or that and a multiple of 4"),
        (["--ep-size", "4", "--redundant", "20"], "at most one replica of each"),
        (["--ep-size", "4", "--held-out", "1"], "--held-out is 1"),
        (["--ep-size", "4", "--link-gbps", "0"], "--link-gbps is 0"),
        (["--ep-size", "4", "--out", "/nowhere/maps.json"], "cannot be written"),
    ],
)
def test_what_does_not_fit_is_refused(
    saved: str, dump: str, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    assert main(["place", "--recorded", dump, "--plan", saved, *options]) == 1
    assert text in capsys.readouterr().err


def test_a_single_step_is_refused(plan: Plan, tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "one.npy", recorded()[:1])
    with pytest.raises(InputError, match="holds no layer with two steps"):
        study(plan, read_recording(str(tmp_path / "one.npy"), EXPERTS), RANKS)


def test_replicas_need_a_plan_for_fuller_ranks(plan: Plan, dump: str) -> None:
    recording = read_recording(dump, EXPERTS)
    with pytest.raises(PlanMismatchError, match="ranks with 4 of 16 experts, and 4 ranks with 4 replicas hold 5 each"):
        study(plan, recording, RANKS, 4)
    fuller = rank_plan(5)
    found = study(fuller, recording, RANKS, 4)
    assert found.maps[TIME].physical.shape == (LAYERS, EXPERTS + 4)
    physical = attrs.evolve(fuller.shape, num_experts=EXPERTS + 4)  # as engines count, replicas included
    assert study(attrs.evolve(fuller, shape=physical), recording, RANKS, 4).judged == found.judged
