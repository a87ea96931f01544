"""What the benchmarks of expert parallelism share: one process a GPU, calls in CUDA graphs, times of the slowest rank."""

import argparse
import faulthandler
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

STEPS = 40
"In one graph, so that its launch and the distance of the ranks at its start vanish."
WARM = 5
"Replays that are not counted: clocks and links are awake then."


class Gathered:
    """What engines do by default: every row to every rank, one reduce-scatter of all rows back.

    Args:
        group: of the ranks.
        fields: tensors of this rank, a row a token, as many on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, fields: Sequence[torch.Tensor]) -> None:
        ranks = dist.get_world_size(group)
        self._group, self._fields = group, [its.view(torch.uint8) for its in fields]
        self.all = [its.new_empty(ranks * len(its), *its.shape[1:]) for its in fields]
        self._all = [its.view(torch.uint8) for its in self.all]

    def gather(self) -> None:
        if self._fields[0].is_cuda:
            with dist._coalescing_manager(group=self._group):  # one launch for all fields
                self._each()
        else:
            self._each()

    def _each(self) -> None:
        for its, out in zip(self._fields, self._all, strict=True):
            dist.all_gather_into_tensor(out, its, group=self._group)

    def scatter(self, y: torch.Tensor, out: torch.Tensor) -> None:
        dist.reduce_scatter_tensor(out, y, group=self._group)


class Timed:
    """A call, several times in a CUDA graph; on a CPU as it is."""

    def __init__(self, group: dist.ProcessGroup, call: Callable[[], Any], on_gpu: bool) -> None:
        self._graph: Any = None
        self._call, self.steps = call, STEPS if on_gpu else 1
        call()
        if on_gpu:
            torch.cuda.synchronize()
            dist.barrier(group)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for _ in range(self.steps):
                    call()

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            for _ in range(self.steps):
                self._call()

    def us(self) -> float:
        """Of one call, in one replay."""
        if self._graph is None:
            start = time.perf_counter()
            self.replay()
            return (time.perf_counter() - start) * 1e6 / self.steps
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / self.steps


def in_turn(group: dist.ProcessGroup, calls: dict[str, Timed], replays: int) -> dict[str, float]:
    """Of each call the median microseconds and the quartiles' distance as a share of it, of the slowest rank."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    warm = WARM if torch.cuda.is_available() else 0
    for number in range(replays + warm):
        for name, call in calls.items():
            dist.barrier(group)
            us = call.us()
            if number >= warm:
                samples[name].append(us)
    found = {f"{name}_us": statistics.median(its) for name, its in samples.items()}
    for name, its in samples.items():
        low, _, high = statistics.quantiles(its, n=4)
        found[f"{name}_spread"] = (high - low) / found[f"{name}_us"]
    return slowest(group, found)


def slowest(group: dist.ProcessGroup, values: dict[str, Any]) -> dict[str, Any]:
    """Of each number the largest of all ranks; those that every rank has."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, values, group=group)
    return {name: max(its[name] for its in every) for name in values if all(name in its for its in every)}


def in_time(group: dist.ProcessGroup, until: float) -> bool:
    """Whether the clock of every rank is before a moment: all get the same answer."""
    return bool(slowest(group, {"late": time.monotonic() >= until})["late"] == 0)


def joined(rank: int, its: argparse.Namespace) -> tuple[dist.ProcessGroup, torch.device]:
    """The group of all ranks, in a process of `start`, and this one's device."""
    faulthandler.dump_traceback_later(its.limit_s, exit=True)
    on_gpu = its.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{its.port}",
        rank=rank,
        world_size=its.ranks,
        timeout=timedelta(seconds=its.limit_s),
        device_id=device if on_gpu else None,
    )
    group = dist.group.WORLD
    assert group is not None
    return group, device


def start(serve: Callable[[int, argparse.Namespace], None], its: argparse.Namespace) -> None:
    """Runs a function on every rank; the first that fails ends the others, and its traceback is shown."""
    # Multicast of NVLink is never used, by NCCL and torch neither.
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        its.port = probe.getsockname()[1]
    processes.spawn(serve, (its,), nprocs=its.ranks)
