"""Both sides of vLLM's gather in one engine: whose graphs are in place, what is told of turns, and the script around a vLLM that stands in."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
FAKE = """
import os, types
__version__ = "of this test"
SamplingParams = lambda **its: types.SimpleNamespace(**its)
class LLM:
    def __init__(self, **its):
        assert its["worker_extension_cls"] == "ep_vllm_worker.Sides" and its["enable_expert_parallel"]
        self.side = "ours"
    def collective_rpc(self, method, args):
        if method == "rows_side":
            self.side = args[0] or self.side
        if method != "rows_end":
            return [None]
        ms = {"nccl": 2.0, "ours": 1.0}[self.side] + int(os.environ["VLLM_DP_RANK"])
        return [{"replays": 3, "graph_ms": [ms] * 3, "step_ms": [ms * 2] * 2}]
    def generate(self, prompts, params, use_tqdm):
        made = [types.SimpleNamespace(token_ids=its["prompt_token_ids"][:1] * params.max_tokens) for its in prompts]
        return [types.SimpleNamespace(outputs=[its]) for its in made]
"""


def test_graphs_of_each_side(script):
    holders = [types.SimpleNamespace(graphs={"first": number}) for number in range(2)]
    graphs = script("ep_vllm_worker").Graphs([(its, "graphs") for its in holders])
    graphs.keep("ours")
    assert not graphs.use("nccl") and graphs.count() == 0
    for its in holders:  # as a capture fills them
        its.graphs |= {"first": "nccl", "second": "nccl"}
    graphs.keep("nccl")
    assert graphs.use("ours") and [its.graphs for its in holders] == [{"first": 0}, {"first": 1}]
    assert graphs.use("nccl") and graphs.count() == 4


def test_replays(script, monkeypatch):
    """Each is timed, the graph that was replayed most counts, and a few of them are profiled."""
    worker = script("ep_vllm_worker")
    clock = iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return other.at - self.at

    class Profile:
        def start(self):
            profiled.append(len(replays.seen))

        def stop(self):
            profiled.append(len(replays.seen))

        def events(self):
            span = types.SimpleNamespace(start=0.0, end=8.0)
            return [
                types.SimpleNamespace(name="gather_kernel", device_type=torch.autograd.DeviceType.CUDA, time_range=span)
            ]

    profiled = []
    graph = type("CUDAGraph", (), {"replay": lambda its: next(clock)})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    replays, decode, mixed = worker.Replays(), graph(), graph()
    for profiles in (True, False):
        replays.begin(profiles)
        for its in (mixed, *[decode] * 20, mixed, decode):
            its.replay()
        found = replays.end()
        assert found["replays"] == 23 and found["graph_ms"] == [2] * 21 and found["step_ms"] == [3] * 19
        assert ("kernels" in found) == profiles
    assert profiled == [worker.FIRST, worker.FIRST + worker.PROFILED]
    assert worker.steps_of([], None)["graph_ms"] == []


def test_kernels_that_overlap_count_once(script):
    events = [("sum_kernel", 4.0, 10.0), ("push_kernel", 0.0, 6.0), ("ncclDevKernel_AllGather", 10.0, 14.0)]
    found = script("ep_vllm_worker").shares([*events, ("vectorized_gather_kernel", 20.0, 21.0)], 2)
    assert found["us"] == {"nccl": 2.0, "ours": 5.0, "other": 0.5}
    assert found["launches"] == {"nccl": 0.5, "ours": 1.0, "other": 0.5}


def test_judged(script):
    its = script("ep_vllm")
    assert its.order(3) == ["nccl", "ours", "ours", "nccl", "nccl", "ours"]
    rows = []
    for turn, (side, ms) in enumerate([("nccl", 4.0), ("ours", 2.0), ("ours", 4.0), ("nccl", 4.0)]):
        for rank in (1, 0):
            tokens = [[rank, 1], [rank, turn if side == "ours" else 7]]
            row = {"what": "turn", "batch": 2, "turn": turn, "side": side, "rank": rank, "tokens": tokens}
            rows.append(row | {"graph_ms": [ms + rank] * 3, "step_ms": [9.0, ms + rank, 0.0]})
    whole = its.judged(rows, 2, 2)
    assert whole["graph_ms"] == {"nccl": [4.0] * 3, "ours": [2.5, 3.0, 3.5]}
    assert whole["graph_ratio"] == [1.25, 1.5, 1.75]
    assert whole["step_ms"]["nccl"] == [5.0] * 3  # the slowest rank's
    assert whole["same"] == [4, 8] and whole["nccl_same"] == [4, 4]
    assert "graph 4.000 -> 3.000 ms, 1.500x [1.250, 1.750]" in its.line(whole)
    # A turn that one rank has not ended tells nothing, and a side alone neither.
    assert its.judged(rows[:-1], 2, 2)["turns"] == [1, 2]
    assert its.judged(rows[:3], 2, 2) is None and its.judged(rows, 4, 2) is None


def test_a_line_that_is_not_whole_waits(script, tmp_path):
    path = tmp_path / "rank0.jsonl"
    assert script("ep_vllm").read([path]) == []
    path.write_text('{"what": "started"}\n{"what": "tu')
    assert script("ep_vllm").read([path]) == [{"what": "started"}]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """Processes, their meetings, the time limit and the file; 6 s of imports."""
    (tmp_path / "vllm.py").write_text(FAKE)
    paths = [str(tmp_path), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, FOLDER / "ep_vllm.py", "--batch-size", "2", "4", "--seconds", "60", "--turns", "2"]
    done = subprocess.run(
        [*command, "--logs", tmp_path / "logs", "--out", tmp_path / "out.json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exit codes [0, 0]" in done.stdout, (done.stdout, *((tmp_path / "logs").glob("*.log")))
    found = json.loads((tmp_path / "out.json").read_text())
    assert [its["batch"] for its in found["batches"]] == [2, 4]
    assert found["batches"][0]["graph_ratio"][1] == 2.0 and found["batches"][0]["step_ratio"][1] == 1.5
    assert found["batches"][1]["same"] == [16, 16]
