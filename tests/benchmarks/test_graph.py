"""benchmarks/graph.py without a GPU: the calls that it would capture run in Triton's interpreter, timed by their number."""

import functools
import importlib.util
import json
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.timer import ReturnTimer

if not INTERPRETED.value:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

SPEC = importlib.util.spec_from_file_location(
    "small_kernel", pathlib.Path(__file__).parents[1] / "dispatch" / "test_graph.py"
)
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)


class Counting(ReturnTimer):
    """Runs every call once; the n-th to be prepared takes n microseconds."""

    def __init__(self):
        self.prepared = 0

    def prepare(self, calls):
        for call in calls:
            call()
        self.prepared += 1
        number = float(self.prepared)
        return super().prepare([lambda: number])


def test_added_is_what_choosing_costs_over_the_config_that_is_chosen(script, monkeypatch):
    graph = script("graph")
    monkeypatch.setattr(graph, "default_timer", lambda *_, **__: Counting())
    kernel = small.Small()
    plan = small.small_plan(kernel)
    launched = []
    for name in ("launch", "launch_candidates"):
        monkeypatch.setattr(kernel, name, spy(getattr(kernel, name), launched))
    found = graph.layer(kernel, plan, 8, rounds=2)
    assert found["candidates"] == [0, 1, 2]
    names = list(found["us"])
    assert names[0] == "2 candidates" and "3 candidates" in names
    alone = [int(name.split()[1]) for name in names if name.startswith("config")]
    assert launched.count(kernel.configs[:2]) == launched.count(kernel.configs) == 1
    assert [config for config in launched if isinstance(config, dict)] == [kernel.configs[index] for index in alone]
    chosen = f"config {alone[0]}"
    assert found["added"][2] == found["us"]["2 candidates"] - found["us"][chosen] == -1


def spy(launch, seen):
    @functools.wraps(launch)
    def noted(configs, *args, **kwargs):
        seen.append(configs if isinstance(configs, dict) else tuple(configs))
        return launch(configs, *args, **kwargs)

    return noted


def test_align_and_costs_are_written(script, monkeypatch, tmp_path, capsys):
    """The whole script, with layers measured elsewhere: they are what takes time here."""
    graph = script("graph")
    monkeypatch.setattr(graph, "HostTimer", Counting)
    rows = {4: {2: 3.0, 3: -1.0}, 8: {2: 5.0}}
    monkeypatch.setattr(graph, "layer", lambda kernel, plan, tokens, rounds: {"tokens": tokens, "added": rows[tokens]})
    small.small_plan(small.Small()).save(tmp_path / "plan.json")
    out = tmp_path / "out.json"
    told = ["--experts", "8", "--tokens", "4", "8", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["graph.py", "--plan", str(tmp_path / "plan.json"), *told])
    assert graph.main() == 0
    found = json.loads(out.read_text())
    assert [(row["tokens"], list(row["us"])) for row in found["align"]] == [
        (tokens, ["align", "align + choose"]) for tokens in (4, 8)
    ]
    assert found["costs"] == {"1": 0.0, "2": 4.0, "3": 0.0}
    assert "costs = {1: 0.0, 2: 4.0, 3: 0.0}" in capsys.readouterr().out
