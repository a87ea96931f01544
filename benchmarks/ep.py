"""Low-latency dispatch and combine against NCCL's all-gather + reduce-scatter, on the GPUs of one host; and whole layers.

    python benchmarks/ep.py --ranks 2 --out FILE.json
    python benchmarks/ep.py --ranks 4 --hidden-size 2048 7168 --payload fp8 bf16 --tokens 1 8 32 64 128 256
    python benchmarks/ep.py --ranks 4 --hidden-size --seconds 60 --limit-s 72 --out FILE.json     whole layers alone

One process a GPU. Both sides are captured in CUDA graphs of several steps and replayed in turn in the same run; a time is
the median over replays, on the slowest rank. Times of a phase are those of torch's profiler, from the start of its first
kernel to the end of its last, waiting for peers included; a small kernel between the phases keeps them apart. The floor of a
phase is what it takes without tokens, plus the bytes that cross the link at the bandwidth of a large copy to a peer, measured
here. Layers: `ep_layer.py`. With --device cpu it runs over gloo, to show that it runs at all.
"""

import argparse
import json
import math
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import ep_layer
import torch
import torch.distributed as dist
from common import stamp
from ep_ranks import Gathered, Timed, in_time, in_turn, joined, slowest, start

from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.path import row_bytes
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import quantise

Row = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--hidden-size", type=int, nargs="*", default=[2048, 7168], help="of dispatch and combine alone"
    )
    parser.add_argument("--payload", nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    ep_layer.add_arguments(parser)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is begun")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="after which ranks say where they are, and end")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


def phases(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """A row for each hidden size, payload and number of tokens, first none at all; the same on every rank."""
    on_gpu, ranks = its.device == "cuda", dist.get_world_size(group)
    backend = "symmetric" if on_gpu else "collectives"
    bandwidth = peer_bandwidth(group, device) if on_gpu else math.nan
    for hidden_size in its.hidden_size:
        for payload in its.payload:
            shape = MoEShape(its.num_experts, its.top_k, hidden_size, 128)
            options: dict[str, Any] = {"payload": payload, "backend": backend, "device": device}
            with ExpertParallel(group, shape, max(its.tokens), **options) as ep:
                empty: Row = {}
                for tokens in (0, *its.tokens):
                    if not in_time(group, until):
                        return
                    row = {"ranks": ranks, "hidden_size": hidden_size, "payload": payload, "tokens": tokens}
                    row |= one(group, ep, tokens, its.replays) | ({"link_bytes_per_us": bandwidth} if on_gpu else {})
                    empty = empty or row
                    wire = (ranks - 1) * tokens / bandwidth
                    for phase, size in (("dispatch", row_bytes(ep.layout)), ("combine", 2 * hidden_size)):
                        if f"{phase}_us" in row and f"{phase}_us" in empty:
                            row[f"{phase}_floor_us"] = empty[f"{phase}_us"] + wire * size
                    yield row


def one(group: dist.ProcessGroup, ep: ExpertParallel, tokens: int, replays: int) -> Row:
    """Times of both sides, and of the phases."""
    shape, device, ranks = ep.shape, ep.device, ep.num_ranks
    generator = torch.Generator().manual_seed(tokens * ranks + ep.rank)
    ids = torch.rand(tokens, shape.num_experts, generator=generator).argsort(1)[:, : shape.top_k].int().to(device)
    weights = torch.rand(tokens, shape.top_k, generator=generator).to(device)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16().to(device)
    y = torch.zeros(ranks * tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    out, between = torch.empty_like(hidden), torch.zeros(1, device=device)
    on_gpu = device.type == "cuda"

    def ours() -> None:
        ep.dispatch(hidden, ids, weights, tokens_per_rank=[tokens] * ranks)
        ep.combine(y, out=out)

    def spaced() -> None:
        ep.dispatch(hidden, ids, weights, tokens_per_rank=[tokens] * ranks)
        between.zero_()
        ep.combine(y, out=out)
        between.zero_()

    calls = {"ours": Timed(group, ours, on_gpu)}
    if tokens:
        rival = Gathered(group, [*(quantise(hidden) if ep.layout.payload == "fp8" else [hidden]), ids, weights])

        def theirs() -> None:
            rival.gather()
            rival.scatter(y, out)

        calls["rival"] = Timed(group, theirs, on_gpu)
    found = in_turn(group, calls, replays)
    ep.check()
    return found | (slowest(group, phases_us(Timed(group, spaced, on_gpu))) if on_gpu else {})


def phases_us(timed: Timed) -> dict[str, float]:
    """Medians of one replay; nothing where the profiler sees no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed.replay()
        torch.cuda.synchronize()
    seen: dict[str, list[Any]] = {"dispatch_kernel": [], "push_kernel": [], "sum_kernel": []}
    for event in profile.events():
        if event.name in seen:
            seen[event.name].append(event.time_range)
    dispatches, pushes, sums = (sorted(its, key=lambda span: span.start) for its in seen.values())
    if not dispatches or len(pushes) != len(sums):
        return {}
    return {
        "dispatch_us": statistics.median(span.end - span.start for span in dispatches),
        "combine_us": statistics.median(last.end - first.start for first, last in zip(pushes, sums, strict=True)),
    }


def peer_bandwidth(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bytes in a microsecond of large copies into the memory of a peer, all ranks at once, the slowest of them."""
    with ExpertParallel(group, MoEShape(128, 8, 7168, 128), 512, backend="symmetric", device=device) as ep:
        assert ep._movers is not None
        handle = ep._movers[0]._kept.handle  # type: ignore[attr-defined]
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
        return float(size / slowest(group, {"us": statistics.median(times)})["us"])


HEADER = "H    payload tokens | ours us spread  NCCL us  faster | dispatch us /floor | combine us /floor"


def line(row: Row) -> str:
    """A row of `phases` under `HEADER`."""
    parts = [
        f"{row['hidden_size']:<5d}{row['payload']:7s}{row['tokens']:7d} |{row['ours_us']:8.1f}{row['ours_spread']:7.0%}"
    ]
    rival = row.get("rival_us")
    parts.append(f"{rival:9.1f}{rival / row['ours_us']:7.2f}x" if rival else " " * 17)
    for phase in ("dispatch", "combine"):
        us, floor = row.get(f"{phase}_us", math.nan), row.get(f"{phase}_floor_us", math.nan)
        parts.append(f" |{us:11.2f}{us / floor:7.2f}")
    return "".join(parts)


def serve(rank: int, its: argparse.Namespace) -> None:
    begun = time.monotonic()
    group, device = joined(rank, its)
    found: dict[str, Any] = stamp() | {"phases": [], "layers": []}

    def keep(name: str, row: Row, text: str) -> None:
        found[name].append(row)
        if not rank:
            print(text, flush=True)
            if its.out:  # after each row: what was measured stays, whatever comes
                its.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if its.hidden_size:
        if not rank:
            print(HEADER)
        for row in phases(group, its, device, begun + its.seconds):
            keep("phases", row, line(row))
    if its.layer_tokens:
        if not rank:
            print(ep_layer.HEADER)
        for row in ep_layer.layers(group, its, device, begun + its.seconds):
            keep("layers", row, ep_layer.line(row))
    dist.destroy_process_group()


if __name__ == "__main__":
    start(serve, arguments().parse_args())
