"""What `ep_vllm.py` adds to vLLM's workers: CUDA graphs of both sides in one engine, and what their replays take."""

import collections
import itertools
from typing import Any

import torch

OURS = frozenset({"gather_kernel", "push_kernel", "sum_kernel"})
"Kernels that move rows; NCCL's have its name in theirs."
FIRST, PROFILED = 10, 8
"Replays before those under torch's profiler, and those: the batch is complete by then."


class Graphs:
    """Where a worker keeps its CUDA graphs, and those of each side.

    Args:
        holders: objects and the names of their attributes that are dicts of graphs.
    """

    def __init__(self, holders: list[tuple[Any, str]]) -> None:
        self._holders = holders
        self._kept: dict[str, list[Any]] = {}

    def keep(self, side: str) -> None:
        """Those that are there now."""
        self._kept[side] = [getattr(owner, name) for owner, name in self._holders]

    def use(self, side: str) -> bool:
        """Puts those of a side in place, or nothing where it has none yet: whether it has."""
        for number, (owner, name) in enumerate(self._holders):
            setattr(owner, name, self._kept[side][number] if side in self._kept else {})
        return side in self._kept

    def count(self) -> int:
        return sum(len(getattr(owner, name)) for owner, name in self._holders)


class Replays:
    """Every replay of a CUDA graph: which, and events before and after it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any, Any]] = []
        self.profiles = False
        self.profile: Any = None
        real = torch.cuda.CUDAGraph.replay

        def replay(graph: Any) -> None:
            if self.profiles and len(self.seen) in (FIRST, FIRST + PROFILED):
                self._turn()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            real(graph)
            after.record()
            self.seen.append((id(graph), before, after))

        torch.cuda.CUDAGraph.replay = replay

    def _turn(self) -> None:
        torch.cuda.synchronize()
        if self.profile is None:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
        else:
            self.profile.stop()
            self.profiles = False

    def begin(self, profiles: bool) -> None:
        self.seen.clear()
        self.profiles, self.profile = profiles, None

    def end(self) -> dict[str, Any]:
        torch.cuda.synchronize()
        found = steps_of(
            [(which, (before, after)) for which, before, after in self.seen], torch.cuda.Event.elapsed_time
        )
        if self.profile is not None and not self.profiles:
            events = [its for its in self.profile.events() if its.device_type == torch.autograd.DeviceType.CUDA]
            rows = [(its.name, its.time_range.start, its.time_range.end) for its in events]
            found["kernels"] = shares(rows, PROFILED)
        return found


def steps_of(seen: list[tuple[int, tuple[Any, Any]]], between: Any) -> dict[str, Any]:
    """Milliseconds of the graph that was replayed most, and from its beginnings to those of the next step, where that is the same graph."""
    if not seen:
        return {"replays": 0, "graph_ms": [], "step_ms": []}
    most = collections.Counter(which for which, _ in seen).most_common(1)[0][0]
    pairs = itertools.pairwise(seen)
    return {
        "replays": len(seen),
        "graph_ms": [between(before, after) for which, (before, after) in seen if which == most],
        "step_ms": [between(its[1][0], after[1][0]) for its, after in pairs if its[0] == after[0] == most],
    }


def shares(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Microseconds a step of kernels that move rows, and of all others: of kernels that overlap the later counts from the end of the
    earlier. Waiting for other ranks is in the former."""
    found = {"nccl": 0.0, "ours": 0.0, "other": 0.0}
    names: dict[str, float] = collections.defaultdict(float)
    launches = dict.fromkeys(found, 0)
    until = float("-inf")
    for name, start, end in sorted(events, key=lambda its: its[1]):
        kind = "nccl" if "nccl" in name.lower() else "ours" if name in OURS else "other"
        us = max(0.0, end - max(start, until))
        until = max(until, end)
        found[kind] += us / steps
        launches[kind] += 1
        names[name[:60]] += us / steps
    longest = dict(sorted(names.items(), key=lambda its: -its[1])[:10])
    return {"us": found, "launches": {kind: many / steps for kind, many in launches.items()}, "longest": longest}


class Sides:
    """Methods of a worker: an engine calls them by name."""

    def rows_begin(self, profiles: bool) -> None:
        replays = _kept(self, "replays", Replays)
        replays.begin(profiles)

    def rows_end(self) -> dict[str, Any]:
        found: dict[str, Any] = _kept(self, "replays", Replays).end()
        return found

    def rows_side(self, side: str) -> dict[str, Any]:
        """Takes the graphs of a side, 'ours' or 'nccl', and captures them where it has none; all ranks together, between waves of
        requests. Without a side: whether our exchange is open, and the kinds of steps that it has compiled.
        """
        from vllm.compilation.cuda_graph import CUDAGraphWrapper
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import get_ep_group

        its: Any = self
        runner = its.model_runner
        exchange = get_ep_group().device_communicator.all2all_manager._exchange
        if side:
            torch.cuda.synchronize()
            holders = [(one, "concrete_cudagraph_entries") for one in CUDAGraphWrapper._all_instances]
            if (manager := getattr(runner, "cudagraph_manager", None)) is not None:
                holders.append((manager, "graphs"))
            graphs = _kept(self, "graphs", lambda: Graphs(holders))
            if side == "nccl" and not graphs._kept:
                graphs.keep("ours")
            exchange._off = side == "nccl"
            if not graphs.use(side):
                with torch.inference_mode(), set_current_vllm_config(its.vllm_config):
                    runner.capture_model()
                graphs.keep(side)
            torch.cuda.synchronize()
            return {"graphs": graphs.count()}
        return {"open": exchange._rows is not None, "compiled": sorted(kind[0] for kind in exchange._compiled)}


def _kept(worker: Any, name: str, make: Any) -> Any:
    """What a worker keeps under a name, made at first."""
    kept = worker.__dict__.setdefault("_rampwrap_rows", {})
    if name not in kept:
        kept[name] = make()
    return kept[name]
