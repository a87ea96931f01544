"""What operators see: counts by layer, bucket and config, gain, drift; the log; and that reading never meets a capture."""

import gc
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rampwrap
from rampwrap import Dispatcher, Plan, schema
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.errors import CaptureError, InputError, PlanError
from rampwrap.measure.timings import Timings
from rampwrap.observe import registry as observe
from rampwrap.observe.tally import Telemetry
from rampwrap.policy.static import StaticTable
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.drift import Profiled, Sums, drift, profiled_ranges, routing_numbers
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.sim import SimKernel


def ids(name: str = "zipf:1.2", tokens: int = 64) -> Any:
    return Workload(tokens, Routing.parse(name), seed=5).topk_ids(64, 8)


ON_EIGHT = np.repeat([64, 0], [8, 56])
"64 tokens that all visit the same eight experts."


class Counted:
    """A graph dispatcher whose GPU counted; `rows` is its telemetry."""

    def __init__(self, plan: Plan, rows: list[Telemetry]) -> None:
        self.kernel, self.shape, self.plan, self.rows = SimKernel(plan.shape), plan.shape, plan, rows
        self.policy = plan.policy()
        observe.watch(self)

    def telemetry(self) -> list[Telemetry]:
        return self.rows


def row(plan: Plan, name: str = "uniform", layer: str = "layers.3", steps: int = 100, outside: int = 0) -> Telemetry:
    active, concentration = routing_numbers(ON_EIGHT if name == "eight" else expert_counts(ids(name), 64))
    static = plan.static.index(64)
    counts = {static: steps - 30, (static + 1) % len(plan.configs): 30}
    sums = (110.0 * steps, 100.0 * steps, float(active) * steps, float(concentration) * steps)
    return Telemetry(layer, 64, "graph", counts, steps, *sums, outside=outside, on_device=True)


def test_nothing_launched_is_nothing(sim_plan: Plan) -> None:
    dispatcher = Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    assert rampwrap.stats() == {"rampwrap": rampwrap.__version__, "sources": []} and dispatcher.launch_counts


def test_a_dispatchers_launches_count(sim_plan: Plan) -> None:
    moe = Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    for name in ("uniform", "hot:2", "hot:2"):
        moe(ids(name, 256))
    (source,) = rampwrap.stats()["sources"]
    (entry,) = source["layers"]
    assert (source["kernel"], source["kind"], entry["steps"]) == ("sim", "dispatcher", 3)
    assert sum(ran["launches"] for ran in entry["configs"]) == 3 and entry["drift"] is None
    del moe
    gc.collect()
    assert not rampwrap.stats()["sources"]


def test_a_graph_dispatchers_launches_count_once_and_by_layer(sim_plan: Plan) -> None:
    graph_dispatcher = GraphDispatcher(SimKernel(sim_plan.shape), sim_plan, max_tokens=64, mode="lagged")
    for layer in ("a", "b", "b"):
        graph_dispatcher.layer(layer)(topk_ids=torch.from_numpy(ids()))
    (source,) = rampwrap.stats()["sources"]
    assert source["kind"] == "graph dispatcher" and source["plan"]["train_workloads"] == 40
    assert {entry["layer"]: entry["steps"] for entry in source["layers"]} == {"a": 1, "b": 2}
    assert {entry["mode"] for entry in source["layers"]} == {"lagged"}


def test_what_the_gpu_counted(sim_plan: Plan) -> None:
    kept = Counted(sim_plan, [row(sim_plan)])
    found = json.loads(json.dumps(rampwrap.stats()))
    entry = found["sources"][0]["layers"][0]
    assert (entry["layer"], entry["num_tokens"], entry["steps"]) == ("layers.3", 64, 100)
    assert entry["predicted_gain"] == pytest.approx(0.1) and entry["static_us"] == pytest.approx(110)
    assert [(ran["share"], ran["static"]) for ran in entry["configs"]] == [(0.7, True), (0.3, False)]
    assert entry["drift"] == 0 and entry["outside"] == 0 and kept.rows


def test_the_profiled_range_travels_with_the_plan(sim_plan: Plan, sim_timings: Timings, tmp_path: pathlib.Path) -> None:
    train = sim_timings.take(sim_timings.rows("train"))
    assert [its.num_tokens for its in sim_plan.profiled] == sorted(set(train.num_tokens.tolist()))
    sim_plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").profiled == sim_plan.profiled
    raw = schema.unseal(json.loads(sim_plan.to_json()))
    for damage in ([0, 1], [3, 2], [1], ["a", "b"]):
        raw["profiled"][0]["concentration"] = damage
        (tmp_path / "plan.json").write_text(json.dumps(raw))
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "plan.json")
    del raw["profiled"]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert Plan.load(tmp_path / "plan.json").profiled == ()
    assert drift((), 64, 10.0, 0.1) is None


def test_what_was_profiled_has_no_drift_and_more_skew_has_more(sim_plan: Plan, sim_timings: Timings) -> None:
    train = sim_timings.take(sim_timings.rows("train"))
    for tokens, counts in zip(train.num_tokens, train.counts, strict=True):
        assert drift(sim_plan.profiled, int(tokens), *map(float, routing_numbers(counts))) == pytest.approx(0, abs=1e-6)
    far = drift(sim_plan.profiled, 64, *map(float, routing_numbers(ON_EIGHT)))
    assert far is not None and far > observe.DRIFTED
    assert drift(sim_plan.profiled, 64, 50.0, 0.03, outside=0.75) == 0.75


@given(st.floats(1, 64), st.floats(0.016, 1), st.floats(0, 40))
def test_drift_is_zero_inside_and_grows_outside(active: float, concentration: float, further: float) -> None:
    ranges = (Profiled(64, (20.0, 60.0), (0.02, 0.08)),)
    here = drift(ranges, 64, active, concentration)
    assert here is not None and here >= 0
    assert (here == 0) == (20 <= active <= 60 and 0.02 <= concentration <= 0.08)
    beyond = drift(ranges, 64, min(active, 20.0) - further, concentration)
    assert beyond is not None and beyond >= further / 40 - 1e-9


@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from([1, 3, 8, 20, 64]), min_size=1, max_size=12))
def test_ranges_hold_their_own_workloads(seed: int, tokens: list[int]) -> None:
    rng = np.random.default_rng(seed)
    counts = np.array([rng.multinomial(8 * count, rng.dirichlet(np.full(16, 0.5))) for count in tokens])
    ranges = profiled_ranges(np.array(tokens), counts)
    for its in ranges:
        assert schema.read(json.loads(json.dumps(schema.dump(its))), Profiled, InputError) == its
    for count, histogram in zip(tokens, counts, strict=True):
        assert drift(ranges, count, *map(float, routing_numbers(histogram))) == pytest.approx(0, abs=1e-4)


def test_drift_is_said_once_with_the_command(sim_plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rampwrap")
    few = Counted(sim_plan, [row(sim_plan, "eight", steps=observe.ENOUGH_STEPS - 1)])
    log = observe.Log(60)
    log.turn()
    assert len(caplog.records) == 1 and "drift" in caplog.text  # the line itself, and no warning yet
    few.rows = [row(sim_plan), row(sim_plan, "eight", "layers.9")]
    for _ in range(3):
        few.rows = [Telemetry.__add__(its, its) for its in few.rows]
        log.turn()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "layers.9 at 64 tokens" in said and "rampwrap profile --kernel sim --num-experts 64" in said
    assert "--recorded FILE" in said
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 4 and "predicted gain 10.0%" in lines[-1] and "not the static config" in lines[-1]


def test_drift_is_said_of_the_graph_dispatcher_that_has_it(sim_plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    """Of several for one shape: those that are silent, or stay inside, are not blamed, before and after."""
    others = [Counted(sim_plan, []), Counted(sim_plan, [row(sim_plan)])]
    far = Counted(attrs.evolve(sim_plan), [row(sim_plan, "eight", "layers.9")])
    others.append(Counted(sim_plan, [row(sim_plan)]))
    rampwrap.stats()
    rampwrap.stats()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "layers.9" in said and far in observe._said and not any(its in observe._said for its in others)


def test_few_observed_launches_are_not_judged(sim_plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    """Of many launches on the host few routings may have been seen."""
    far = row(sim_plan, "eight")
    share = observe.ENOUGH_STEPS / 2 / far.steps
    few = attrs.evolve(
        far,
        on_device=False,
        seen=observe.ENOUGH_STEPS // 2,
        active_experts=far.active_experts * share,
        concentration=far.concentration * share,
    )
    source = Counted(sim_plan, [few])
    (entry,) = rampwrap.stats()["sources"][0]["layers"]
    assert entry["drift"] > observe.DRIFTED and entry["observed"] == 16 and entry["chosen_us"] is None
    assert not caplog.records
    source.rows = [few + few]
    rampwrap.stats()
    assert "8.0 active experts" in caplog.text


def test_lagged_launches_have_drift(sim_plan: Plan) -> None:
    """The host has seen the routing, so it says how far it lies outside."""
    kernel = SimKernel(sim_plan.shape)
    kernel.launch = lambda config, /, topk_ids: 0.0  # type: ignore[method-assign,assignment]
    graph_dispatcher = GraphDispatcher(kernel, sim_plan, max_tokens=64, mode="lagged")
    inside, outside = torch.from_numpy(ids("uniform")), torch.arange(8).repeat(64, 1)
    layers = {
        "even": (inside, 3),
        "eight": (outside, 3),
        "once": (outside, 1),
        "none": (torch.full_like(outside, -1), 2),
    }
    for name, (topk_ids, steps) in layers.items():
        for _ in range(steps):
            graph_dispatcher.layer(name)(topk_ids=topk_ids)
    entries = {entry["layer"]: entry for entry in rampwrap.stats()["sources"][0]["layers"]}
    assert {name: its["observed"] for name, its in entries.items()} == {"even": 2, "eight": 2, "once": 0, "none": 0}
    assert entries["even"]["drift"] == 0 and entries["eight"]["drift"] > observe.DRIFTED
    assert entries["eight"]["active_experts"] == 8 and entries["eight"]["concentration"] == 1 / 8
    assert entries["once"]["drift"] is entries["none"]["drift"] is entries["none"]["outside"] is None


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_sums_are_those_of_the_numbers(seed: int, rows: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 3, (rows, 4))
    counts[:, 0] += 1
    sums = Sums(4, 8, 2)
    for histogram in counts:
        for _ in range(2):
            sums.add(histogram)
    active, concentration = routing_numbers(counts)
    slots = counts.sum(axis=1)
    assert sums.seen == rows and sums.active_experts == active.sum()
    assert sums.concentration == pytest.approx(concentration.sum())
    assert sums.outside == ((active < 2) | (slots < 2) | (slots > 16)).sum()


def test_static_is_what_serves_where_the_plan_is_refused(sim_plan: Plan) -> None:
    """The plan's own table numbers other configs."""
    kernel = SimKernel(sim_plan.shape)
    foreign = attrs.evolve(sim_plan, kernel="another", static=StaticTable("uniform", (1,), (3,)))
    with pytest.warns(RuntimeWarning, match="serves static configs"):
        graph_dispatcher = GraphDispatcher(kernel, foreign, max_tokens=64)
    assert graph_dispatcher.policy.table.index(64) == 0  # type: ignore[attr-defined]
    graph_dispatcher(topk_ids=ids())
    (entry,) = rampwrap.stats()["sources"][0]["layers"]
    assert [ran["static"] for ran in entry["configs"]] == [True]


def test_a_source_keeps_its_number(sim_plan: Plan) -> None:
    """A counter of Prometheus does not pass to another source when one comes or goes, and no launches are taken back."""
    first, second = Counted(sim_plan, [row(sim_plan, layer="a")]), Counted(sim_plan, [row(sim_plan, layer="b")])
    before = rampwrap.stats()

    def label(layer: str) -> int:
        (number,) = {s["number"] for s in rampwrap.stats()["sources"] for its in s["layers"] if its["layer"] == layer}
        return number

    was = label("b")
    second.rows = [second.rows[0] + second.rows[0]]
    del first
    gc.collect()
    assert label("b") == was
    assert observe.line(rampwrap.stats(), before).startswith("rampwrap: 100 launches, 200 in all")


def test_sources_may_come_while_they_are_read(sim_plan: Plan) -> None:
    """Threads of an engine make graph_dispatchers while the log's thread lists them."""
    over, kept = threading.Event(), [Counted(sim_plan, []) for _ in range(300)]
    rest = sys.getswitchinterval()

    def come() -> None:
        for _ in range(300):
            kept.append(Counted(sim_plan, []))
        over.set()

    thread = threading.Thread(target=come)
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        while not over.is_set():
            observe._read()
    finally:
        sys.setswitchinterval(rest)
        thread.join(5)
    assert len(observe._sources) == len(kept)


def test_captures_may_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs under capture on one thread: the second does not wait for the first for ever."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("capture_begin", "capture_end"):
        monkeypatch.setattr(Graph, name, Graph.__dict__[name])
    observe.keep_apart_from_capture()
    first, second, free = Graph(), Graph(), []

    def both() -> None:
        first.capture_begin()
        second.capture_begin()
        free.append(observe._reading.locked())
        first.capture_end()
        free.append(observe._reading.locked())
        second.capture_end()
        free.append(observe._reading.locked())

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    thread.join(5)
    assert free == [True, True, False]


def test_a_quiet_minute_says_nothing(sim_plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rampwrap")
    counted = Counted(sim_plan, [row(sim_plan)])
    log = observe.Log(60)
    for _ in range(3):
        log.turn()
    assert len(caplog.records) == 1 and counted.rows


def test_the_log_is_asked_for_and_runs_once(
    sim_plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rampwrap")
    assert observe.start_log() is None
    monkeypatch.setenv("RAMPWRAP_STATS", "often")
    assert observe.start_log() is None and "often" in caplog.text
    monkeypatch.setenv("RAMPWRAP_STATS", "0.02")
    moe = Dispatcher(SimKernel(sim_plan.shape), sim_plan)  # the first that is watched starts it
    first = observe._running
    moe(ids())
    assert first is not None and first is observe.start_log() and first.daemon
    deadline = time.monotonic() + 10
    while "1 launches, 1 in all" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "1 launches, 1 in all" in caplog.text


def test_a_reading_that_fails_ends_nothing(sim_plan: Plan) -> None:
    counted = Counted(sim_plan, [])
    counted.telemetry = None  # type: ignore[assignment,method-assign]
    log = observe.Log(60)
    log.turn()
    assert observe._reading.acquire(blocking=False)


class Graph:
    """As `torch.cuda.CUDAGraph`: a capture fails where counters are read meanwhile."""

    fails = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self.fails:
            raise RuntimeError("capture failed")

    def capture_end(self) -> None:
        pass


def test_counters_are_not_read_under_capture(sim_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    early = Graph()
    early.capture_begin()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("capture_begin", "capture_end"):
        monkeypatch.setattr(Graph, name, Graph.__dict__[name])  # put back afterwards
    monkeypatch.setattr(observe, "PATIENCE_S", 0.01)
    observe.keep_apart_from_capture()
    observe.keep_apart_from_capture()
    read: list[int] = []

    class Reads(Counted):
        def telemetry(self) -> list[Telemetry]:
            read.append(1)
            return []

    source, log, graph = Reads(sim_plan, []), observe.Log(60), Graph()
    early.capture_end()  # began before the log did
    log.turn()
    assert len(read) == 1
    graph.capture_begin(pool=(0, 1))
    log.turn()
    with pytest.raises(CaptureError, match="captured"):
        rampwrap.stats()
    assert len(read) == 1
    graph.capture_end()
    Graph.fails = True
    try:
        with pytest.raises(RuntimeError, match="capture failed"):
            graph.capture_begin()
    finally:
        Graph.fails = False
    log.turn()
    rampwrap.stats()
    assert len(read) == 3 and source.rows == []


def test_a_capture_waits_for_a_reading(sim_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("capture_begin", "capture_end"):
        monkeypatch.setattr(Graph, name, Graph.__dict__[name])
    observe.keep_apart_from_capture()
    begun, order = threading.Event(), []

    class Slow(Counted):
        def telemetry(self) -> list[Telemetry]:
            begun.set()
            time.sleep(0.1)
            order.append("read")
            return []

    slow = Slow(sim_plan, [])
    reader = threading.Thread(target=observe.Log(60).turn)
    reader.start()
    assert begun.wait(5)
    graph = Graph()
    graph.capture_begin()
    order.append("capture")
    graph.capture_end()
    reader.join(5)
    assert order == ["read", "capture"] and not slow.rows


@pytest.mark.parametrize("lock", ["_reading", "_changing"])
def test_a_forked_process_does_not_inherit_a_held_lock(lock: str, sim_plan: Plan) -> None:
    """Held by another thread at the fork: one that waits for the GPU is made anew, one that is held shortly waited for."""
    moe, held, wait = Dispatcher(SimKernel(sim_plan.shape)), threading.Event(), threading.Event()
    moe(ids())

    def hold() -> None:
        with getattr(observe, lock):
            held.set()
            wait.wait(0.2 if lock == "_changing" else 10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        found = rampwrap.stats()["sources"]
        made = Dispatcher(SimKernel(sim_plan.shape))
        os._exit(0 if len(found) == 1 and made is not None and observe._running is None else 1)
    wait.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.join(5)
    assert not getattr(observe, lock).locked() and len(rampwrap.stats()["sources"]) == 1
