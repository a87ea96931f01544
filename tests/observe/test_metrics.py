"""What Prometheus scrapes, read back by its own parser."""

import importlib
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import rampwrap
from rampwrap import Dispatcher, Plan
from rampwrap.errors import InputError
from rampwrap.observe import registry
from rampwrap.observe.metrics import GAUGES, Collector, families, prometheus
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.sim import SimKernel


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of graphs of this test only: a collector changes how captures begin."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (torch.cuda.CUDAGraph,), {}))


def served(plan: Plan, steps: int) -> Dispatcher:
    moe = Dispatcher(SimKernel(plan.shape), plan)
    for _ in range(steps):
        moe(Workload(64, Routing.parse("uniform"), seed=5).topk_ids(64, 8))
    return moe


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values by name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for its in family.samples:
            found.setdefault(its.name, {})[tuple(sorted(its.labels.items()))] = its.value
    return found


def entry(**known: Any) -> dict[str, Any]:
    bare = {"layer": 'odd "name"\\', "num_tokens": 64, "mode": "graph", "steps": 10}
    ran = [{"config": "a=1", "launches": 7}, {"config": "a=2", "launches": 3}]
    return {**bare, "configs": ran, **dict.fromkeys(GAUGES), **known}


def source(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"sources": [{"number": 4, "kernel": "sim", "shape": "E=64", "layers": list(layers)}]}


def test_every_number_arrives_with_its_labels() -> None:
    known = {key: 0.1 * place for place, key in enumerate(GAUGES)}
    found = samples(prometheus(source(entry(**known))))
    labels = {"source": "4", "kernel": "sim", "shape": "E=64", "layer": 'odd "name"\\', "tokens": "64", "mode": "graph"}
    for key, (name, _) in GAUGES.items():
        assert found.pop(name) == {tuple(sorted(labels.items())): known[key]}
    launches = {dict(its)["config"]: value for its, value in found.pop("rampwrap_launches_total").items()}
    assert launches == {"a=1": 7, "a=2": 3} and not found


def test_what_is_not_known_has_no_sample() -> None:
    found = samples(prometheus(source(entry(num_tokens=None, drift=0.0))))
    assert set(found) == {"rampwrap_launches_total", "rampwrap_drift_ratio"}
    assert all(dict(its)["tokens"] == "" for its in found["rampwrap_launches_total"])
    assert {its.name for its in families({"sources": []})} == {
        "rampwrap_launches",
        *(name for name, _ in GAUGES.values()),
    }


def test_a_scrape_is_what_stats_says(sim_plan: Plan) -> None:
    moe = served(sim_plan, 3)
    ours = CollectorRegistry()
    ours.register(Collector())
    scraped = samples(generate_latest(ours).decode())
    assert scraped == samples(prometheus()) == samples(rampwrap.observe.prometheus(rampwrap.stats()))
    assert sum(scraped["rampwrap_launches_total"].values()) == sum(moe.launch_counts) == 3


def test_a_scrape_under_capture_says_the_last_and_does_not_wait(sim_plan: Plan) -> None:
    collector = Collector()

    def launches() -> float:
        return sum(its.value for family in collector.collect() for its in family.samples)

    moe = served(sim_plan, 2)
    assert launches() == 2
    with registry._reading:  # as between capture_begin and capture_end
        moe(Workload(64, Routing.parse("uniform"), seed=5).topk_ids(64, 8))
        assert launches() == 2
    assert launches() == 3
    assert hasattr(torch.cuda.CUDAGraph.capture_begin, "rampwrap")


def test_a_scrape_that_cannot_read_answers_all_the_same(sim_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other metrics of the process are in the same answer."""
    moe, collector = served(sim_plan, 1), Collector()
    before = [its.samples for its in collector.collect()]
    monkeypatch.setattr(moe, "launch_counts", None)
    assert [its.samples for its in collector.collect()] == before


def test_registering_reads_nothing_and_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> None:
        raise AssertionError("read")

    monkeypatch.setattr(registry, "glance", read)
    ours = CollectorRegistry(auto_describe=True)
    ours.register(Collector())
    with pytest.raises(ValueError, match="rampwrap_launches"):
        ours.register(Collector())


def test_scrapes_beside_launches(sim_plan: Plan) -> None:
    """From threads of their own; counters never go back."""
    collector, over, seen = Collector(), threading.Event(), list[float]()

    def scrape() -> None:
        ended = False
        while not ended:
            ended = over.is_set()
            launches = next(iter(collector.collect()))
            seen.append(sum(its.value for its in launches.samples))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        moe = served(sim_plan, 100)
    finally:
        over.set()
        thread.join(10)
    assert seen == sorted(seen) and seen[-1] == sum(moe.launch_counts) == 100


def test_without_the_client_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "rampwrap.observe.metrics")
    with pytest.raises(InputError, match=r"pip install 'rampwrap\[metrics\]'") as raised:
        rampwrap.observe.Collector  # noqa: B018
    assert str(raised.value).count("\n") == 0
    assert rampwrap.stats()["sources"] == []
    with pytest.raises(AttributeError, match="nothing"):
        rampwrap.observe.nothing  # noqa: B018
    monkeypatch.undo()
    assert importlib.import_module("rampwrap.observe.metrics").Collector


def test_serving_does_not_load_the_client() -> None:
    code = "import sys, rampwrap; rampwrap.Dispatcher, rampwrap.stats(); print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
