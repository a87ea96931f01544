"""`RAMPWRAP_METRICS`: endpoints of processes, and the dashboard that reads them."""

import json
import logging
import os
import pathlib
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
import torch

from rampwrap import Dispatcher, Plan
from rampwrap.observe import server
from rampwrap.observe.metrics import GAUGES, LABELS, LAUNCHES
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.sim import SimKernel

DASHBOARD = pathlib.Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_started_in", None)
    monkeypatch.delenv(server.ADDRESS, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (torch.cuda.CUDAGraph,), {}))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_dispatcher_opens_the_next_free_port(
    sim_plan: Plan, taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(server.ADDRESS, f"127.0.0.1:{taken}")
    moe = Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    (said,) = [record.getMessage() for record in caplog.records if "serves metrics" in record.getMessage()]
    url = re.search(r"http://127\.0\.0\.1:(\d+)/metrics", said)
    assert url and taken < int(url[1]) < taken + server.MOST_PORTS and f"process {os.getpid()} " in said
    moe(Workload(64, Routing.parse("uniform")).topk_ids(64, 8))
    with urllib.request.urlopen(url[0], timeout=10) as answer:
        assert 'rampwrap_launches_total{config="' in answer.read().decode()
    Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    assert server.start() is None, "one endpoint a process"


def test_nothing_is_opened_unasked(sim_plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    assert server.start() is None and server._started_in is None and not caplog.records


def test_a_fork_opens_its_own(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys\n"
        "from rampwrap.observe import server\n"
        "first = server.start()\n"
        "if os.fork() == 0:\n"
        "    print(first, server.start(), server.start(), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    monkeypatch.setenv(server.ADDRESS, f"127.0.0.1:{taken}")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    first, second, again = done.stdout.split()
    assert taken < int(first) < int(second) and again == "None", done.stderr


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("on", "RAMPWRAP_METRICS=on names no port; give one, as in 9400 or 127.0.0.1:9400."),
        ("0", "names no port"),
        ("70000", "names no port"),
        ("203.0.113.1:9400", "which cannot be had"),
    ],
)
def test_what_cannot_be_opened_is_said_once_and_stops_nothing(
    sim_plan: Plan, given: str, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(server.ADDRESS, given)
    for _ in range(2):
        Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("rampwrap serves no metrics: ") and text in said


def test_all_ports_taken_is_said(taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server, "MOST_PORTS", 1)
    monkeypatch.setenv(server.ADDRESS, f"127.0.0.1:{taken}")
    assert server.start() is None
    assert f"ports {taken} to {taken} are all taken" in caplog.text


def test_an_absent_client_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(server.ADDRESS, "9400")
    monkeypatch.delitem(sys.modules, "rampwrap.observe.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert server.start() is None
    assert "install it with pip install 'rampwrap[metrics]'" in caplog.text


@pytest.mark.skipif(not DASHBOARD.exists(), reason="only the source tree has docs")
def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads(DASHBOARD.read_text())
    names = {LAUNCHES[0] + "_total", *(name for name, _ in GAUGES.values())}
    labels = {*LABELS, "config", "instance"}
    asked: set[str] = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            asked |= (found := set(re.findall(r"rampwrap_\w+", target["expr"])))
            assert found and found <= names, target
            used = re.findall(r"(\w+)=~", target["expr"])
            used += [name for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in by.split(", ")]
            used += re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert set(used) <= labels, target
        assert panel["description"].endswith(".")
    assert asked == names, "every metric is shown"
    variables = {its["name"]: its for its in board["templating"]["list"]}
    for name, its in variables.items():
        if its["type"] == "query":
            assert its["query"]["query"] == f"label_values({LAUNCHES[0]}_total, {name})" and name in labels
    text = DASHBOARD.read_text()
    assert {name for name in re.findall(r"\$\{?(\w+)", text) if not name.startswith("__")} <= set(variables)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24, "panels overlap"
