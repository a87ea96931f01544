"""Low-latency dispatch and combine against NCCL's all-gather + reduce-scatter, on the GPUs of one host.

    python benchmarks/ep.py --ranks 2 --out FILE.json
    python benchmarks/ep.py --ranks 4 --hidden-size 2048 7168 --payload fp8 bf16 --tokens 1 8 32 64 128 256

One process a GPU. Both sides are captured in CUDA graphs of several steps and replayed in turn in the same run; a time is
the median over replays, on the slowest rank. Times of the two phases are kernel times of torch's profiler, waiting for
peers included. The floor of a phase is what the phase takes without tokens, plus the bytes that cross the link at the
bandwidth of a large copy to a peer, measured here. With --device cpu it runs over gloo, to show that it runs at all.
"""

import argparse
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.path import row_bytes
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import quantise

STEPS = 20
"In one graph, so that its launch vanishes."


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[2048, 7168])
    parser.add_argument("--payload", nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser


class Rival:
    """What engines do by default: every row to every rank, one reduce-scatter of all rows back."""

    def __init__(self, group: dist.ProcessGroup, fields: list[torch.Tensor], hidden_size: int) -> None:
        ranks = dist.get_world_size(group)
        self._group, self._fields = group, [its.view(torch.uint8) for its in fields]
        self._all = [its.new_empty(ranks * len(its), its.shape[1]) for its in self._fields]
        tokens = len(fields[0])
        self._y = torch.zeros(ranks * tokens, hidden_size, dtype=torch.bfloat16, device=fields[0].device)
        self._out = self._y.new_empty(tokens, hidden_size)

    def __call__(self) -> None:
        if self._y.is_cuda:
            with dist._coalescing_manager(group=self._group):  # one launch for all fields
                for its, out in zip(self._fields, self._all, strict=True):
                    dist.all_gather_into_tensor(out, its, group=self._group)
        else:
            for its, out in zip(self._fields, self._all, strict=True):
                dist.all_gather_into_tensor(out, its, group=self._group)
        dist.reduce_scatter_tensor(self._out, self._y, group=self._group)


class Timed:
    """A call, several times in a CUDA graph; on a CPU as it is."""

    def __init__(self, group: dist.ProcessGroup, call: Callable[[], Any], on_gpu: bool) -> None:
        self._graph: Any = None
        self._call, self.steps = call, STEPS if on_gpu else 2
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

    def kernels_us(self) -> dict[str, float]:
        """Of one call, by phase: median kernel times of one replay."""
        if self._graph is None:
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.replay()
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            found.setdefault(event.name, []).append(event.device_time)
        median = {name: statistics.median(its) for name, its in found.items()}
        return {
            "dispatch": median.get("dispatch_kernel", 0.0),
            "combine": median.get("push_kernel", 0.0) + median.get("sum_kernel", 0.0),
        }


def peer_bandwidth(group: dist.ProcessGroup, device: str) -> float:
    """Bytes in a microsecond of large copies into the memory of a peer, all ranks at once, the slowest of them."""
    with ExpertParallel(group, MoEShape(128, 8, 7168, 128), 512, backend="symmetric", device=device) as ep:
        assert ep._movers is not None
        handle = ep._movers[0]._kept[1]  # type: ignore[attr-defined]
        size = ep.layout.bytes  # 29 MB on two GPUs
        to = handle.get_buffer((ep.rank + 1) % ep.num_ranks, (size,), torch.uint8)
        data = torch.zeros(size, dtype=torch.uint8, device=device)
        times = []
        for _ in range(20):
            dist.barrier(group)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            to.copy_(data)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return size / slowest(group, {"us": statistics.median(times)})["us"]


def slowest(group: dist.ProcessGroup, values: dict[str, Any]) -> dict[str, Any]:
    """Of each number the largest of all ranks."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, values, group=group)
    return {name: max(its[name] for its in every) for name in values}


def measure(group: dist.ProcessGroup, its: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each hidden size, payload and number of tokens; the same on every rank."""
    on_gpu, rank, ranks = its.device == "cuda", dist.get_rank(group), dist.get_world_size(group)
    backend, device = ("symmetric", f"cuda:{rank}") if on_gpu else ("collectives", "cpu")
    bandwidth = peer_bandwidth(group, device) if on_gpu else float("nan")
    found = []
    for hidden_size in its.hidden_size:
        for payload in its.payload:
            shape = MoEShape(its.num_experts, its.top_k, hidden_size, 128)
            options: dict[str, Any] = {"payload": payload, "backend": backend, "device": device}
            with ExpertParallel(group, shape, max(its.tokens), **options) as ep:
                empty = kernels = {}
                for tokens in (0, *its.tokens):
                    row, kernels = one(group, ep, tokens, its.replays, on_gpu)
                    if not tokens:
                        empty = kernels
                        continue
                    wire = (ranks - 1) * tokens
                    for phase, size in (("dispatch", row_bytes(ep.layout)), ("combine", 2 * hidden_size)):
                        if phase in kernels:
                            row[f"{phase}_us"] = kernels[phase]
                            row[f"{phase}_floor_us"] = empty[phase] + wire * size / bandwidth
                    found.append(
                        {"ranks": ranks, "hidden_size": hidden_size, "payload": payload, "tokens": tokens} | row
                    )
    return found


def one(
    group: dist.ProcessGroup, ep: ExpertParallel, tokens: int, replays: int, on_gpu: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """(times of both sides, kernel times of the phases)."""
    shape, device, ranks = ep.shape, ep.device, ep.num_ranks
    generator = torch.Generator().manual_seed(tokens * ranks + ep.rank)
    ids = torch.rand(tokens, shape.num_experts, generator=generator).argsort(1)[:, : shape.top_k].int().to(device)
    weights = torch.rand(tokens, shape.top_k, generator=generator).to(device)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16().to(device)
    y = torch.zeros(ranks * tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(hidden)

    def ours() -> None:
        ep.dispatch(hidden, ids, weights, tokens_per_rank=[tokens] * ranks)
        ep.combine(y, out=out)

    calls = {"ours": Timed(group, ours, on_gpu)}
    if tokens:
        rows = list(quantise(hidden)) if ep.layout.payload == "fp8" else [hidden]
        calls["rival"] = Timed(group, Rival(group, [*rows, ids, weights], shape.hidden_size), on_gpu)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(replays + 5):
        for name, call in calls.items():
            dist.barrier(group)
            us = call.us()
            if number >= 5:  # clocks and links are awake then
                samples[name].append(us)
    ep.check()
    kernels = slowest(group, calls["ours"].kernels_us())
    times: dict[str, Any] = {f"{name}_us": statistics.median(some) for name, some in samples.items()}
    for name, some in samples.items():
        low, _, high = statistics.quantiles(some, n=4)
        times[f"{name}_spread"] = (high - low) / times[f"{name}_us"]
    return slowest(group, times), kernels


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["ranks  H     payload tokens  ours us  NCCL us  speedup  dispatch/floor  combine/floor"]
    for row in rows:
        phases = [
            f"{row[f'{phase}_us'] / row[f'{phase}_floor_us']:.2f}" if f"{phase}_us" in row else "-"
            for phase in ("dispatch", "combine")
        ]
        lines.append(
            f"{row['ranks']:5d}  {row['hidden_size']:5d} {row['payload']:7s} {row['tokens']:6d}  {row['ours_us']:7.1f}  "
            f"{row['rival_us']:7.1f}  {row['rival_us'] / row['ours_us']:6.2f}x  {phases[0]:>14s}  {phases[1]:>13s}"
        )
    return "\n".join(lines)


def run_rank(its: argparse.Namespace) -> None:
    from common import stamp

    on_gpu = its.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(its.rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{its.port}",
        rank=its.rank,
        world_size=its.ranks,
        timeout=timedelta(seconds=300),
    )
    group = dist.group.WORLD
    assert group is not None
    rows = measure(group, its)
    if not its.rank:
        print(table(rows))
        if its.out:
            text = json.dumps(stamp() | {"rows": rows}, indent=1)
            pathlib.Path(its.out).write_text(text + "\n", encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    its = arguments().parse_args()
    if its.rank is not None:
        run_rank(its)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *sys.argv, "--port", str(port)]
    started = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(its.ranks)]
    sys.exit(max(abs(process.wait()) for process in started))


if __name__ == "__main__":
    main()
