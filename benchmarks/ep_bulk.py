"""Steps of many tokens over the GPUs of one host: one launch, and whole layers source by source, against NCCL.

    python benchmarks/ep_bulk.py --ranks 4 --out FILE.json
    python benchmarks/ep_bulk.py --ranks 4 --graphs --hidden-size --layers qwen3-30b --dtype bf16 --tokens 8192 16384

One process a GPU, eager launches as in prefill. Each GPU sleeps while its steps are put in its queue, so that what is timed is the
GPU; the host's time for a step stands beside it. With --graphs a step is a CUDA graph, which the host launches at once. Of five
steps in a row the first is dropped: it holds the distance of the ranks. All ways take turns in one run; a time is the median on
the slowest rank, a spread the distance of the quartiles as a share of it.

Layers are our Triton kernel with its default config for each number of tokens, the same on both sides. Shapes: `SHAPES`, with 32
local experts on 4 ranks. With --device cpu it runs over gloo, to show that it runs at all.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from common import stamp
from ep_layer import MOST_ERROR
from ep_ranks import Gathered, in_time, joined, slowest, start

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.path import row_bytes
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.common.reference import quantise, random_weights

Row = dict[str, Any]
SHAPES = {"qwen3-30b": (32, 8, 2048, 768), "deepseek-v3 shard": (32, 8, 7168, 2048)}
"Experts of a rank (of four; on two of them twice as many), top-k, H, I. DeepSeek-V3 has 256 experts: 64 on each of four."
STEPS = 5
SLEEP = 70_000_000
"Cycles, about 40 ms: longer than the host takes to launch so many steps by source; a twentieth of it for graphs."


WAYS = {"launch": False, "source": True}
"Of a layer, and whether it goes by source."


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep_bulk.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 2048, 8192, 1024, 16384], help="a rank")
    parser.add_argument("--hidden-size", type=int, nargs="*", default=[2048, 7168], help="of the phases alone")
    parser.add_argument("--layers", nargs="*", choices=[*SHAPES], default=["qwen3-30b", "deepseek-v3 shard"])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--graphs", action="store_true", help="layers in CUDA graphs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is begun")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="after which ranks say where they are, and end")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


Stages = Sequence[Callable[[], Any]]


def timed(
    group: dist.ProcessGroup, ways: dict[str, Stages], rounds: int, on_gpu: bool, sleep: int = SLEEP
) -> dict[str, Row]:
    """Of each way the microseconds of its stages, of a whole step, its spread, and the host's."""
    samples: dict[str, list[list[float]]] = {name: [] for name in ways}
    host: dict[str, list[float]] = {name: [] for name in ways}
    warm = int(on_gpu)  # a round that is not counted
    steps = STEPS if on_gpu else 3
    for number in range(rounds + warm):
        for name, stages in ways.items():
            dist.barrier(group)
            marks: list[Any] = []

            def mark(marks: list[Any] = marks) -> None:
                if on_gpu:
                    marks.append(torch.cuda.Event(enable_timing=True))
                    marks[-1].record()
                else:
                    marks.append(time.perf_counter())

            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda._sleep(sleep)
            begun = time.perf_counter()
            mark()
            for _ in range(steps):
                for stage in stages:
                    stage()
                    mark()
            host[name].append((time.perf_counter() - begun) * 1e6 / steps)
            if on_gpu:
                torch.cuda.synchronize()
            pairs = itertools.pairwise(marks)
            us = [a.elapsed_time(b) * 1e3 if on_gpu else (b - a) * 1e6 for a, b in pairs]
            every = [us[at : at + len(stages)] for at in range(0, len(us), len(stages))]
            samples[name] += every[1:] if number >= warm else []
    found: dict[str, Row] = {}
    for name, its in samples.items():
        totals = [sum(one) for one in its]
        low, median, high = statistics.quantiles(totals, n=4)
        row = {"us": median, "spread": (high - low) / median, "host_us": statistics.median(host[name])}
        row |= {f"stage_{at}_us": statistics.median(column) for at, column in enumerate(zip(*its, strict=True))}
        found[name] = slowest(group, row)
    return found


def phases(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """A row for each hidden size, payload and number of tokens; the same on every rank."""
    on_gpu, ranks = its.device == "cuda", dist.get_world_size(group)
    for hidden_size in its.hidden_size:
        for payload in its.dtype:
            shape = MoEShape(32 * ranks, 8, hidden_size, 128)
            options: dict[str, Any] = {"payload": payload, "backend": "symmetric" if on_gpu else "collectives"}
            with ExpertParallel(group, shape, max(its.tokens), device=device, **options) as ep:
                for tokens in its.tokens:
                    if not in_time(group, until):
                        return
                    row = {"ranks": ranks, "hidden_size": hidden_size, "payload": payload, "tokens": tokens}
                    others = (ranks - 1) * tokens
                    row["dispatch_bytes"] = others * (row_bytes(ep.layout) + 64)
                    row["combine_bytes"] = others * 2 * hidden_size
                    yield row | one(group, ep, tokens, its.rounds, on_gpu)


def batch(ep: ExpertParallel, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights of this rank, uniform routing."""
    shape, device = ep.shape, ep.device
    generator = torch.Generator(device).manual_seed(ep.rank)
    scores = torch.rand(tokens, shape.num_experts, generator=generator, device=device)
    ids = scores.topk(shape.top_k, 1).indices.int()
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator, device=device).bfloat16()
    weights = torch.rand(tokens, shape.top_k, generator=generator, device=device).softmax(1)
    return hidden, ids, weights


def one(group: dist.ProcessGroup, ep: ExpertParallel, tokens: int, rounds: int, on_gpu: bool) -> Row:
    """Dispatch and combine alone, of rows that are quantised already where they travel so."""
    hidden, ids, weights = batch(ep, tokens)
    scales = None
    out = torch.empty_like(hidden)
    if ep.layout.payload == "fp8":
        hidden, scales = quantise(hidden)
    counts = [tokens] * ep.num_ranks
    y = torch.zeros(sum(counts), ep.shape.hidden_size, dtype=torch.bfloat16, device=ep.device)
    rival = Gathered(group, [hidden, *([] if scales is None else [scales]), ids, weights])

    def dispatch() -> None:
        ep.dispatch(hidden, ids, weights, scales=scales, tokens_per_rank=counts)

    ways: dict[str, Stages] = {"launch": [dispatch, lambda: ep.combine(y, out=out)]}
    ways["nccl"] = [rival.gather, lambda: rival.scatter(y, out)]
    found = timed(group, ways, rounds, on_gpu)
    ep.check()
    return found


def layers(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """A row for each layer, dtype and number of tokens; the same on every rank."""
    ranks = dist.get_world_size(group)
    backend = "symmetric" if its.device == "cuda" else "collectives"
    for name in its.layers:
        local, top_k, hidden_size, inter = SHAPES[name]
        for dtype in its.dtype:
            if not in_time(group, until):
                return
            experts = local * max(4, ranks)
            shape = MoEShape(experts, top_k, hidden_size, inter, dtype=dtype)
            options: Row = {"backend": backend, "device": device, "by_source": True, "by_source_tokens": 0}
            with ExpertParallel(group, shape, max(its.tokens), **options) as ep:
                kernel = TritonFusedMoE(ep.shape)
                weights: Row = random_weights(ep.shape, device, seed=ep.rank)
                weights["workspace"] = kernel.workspace(ranks * max(its.tokens), device)
                for tokens in its.tokens:
                    if not in_time(group, until):
                        return
                    row = {"ranks": ranks, "layer": name, "dtype": dtype, "tokens": tokens}
                    yield row | layer(group, ep, kernel, weights, tokens, its.rounds, its.graphs)


def layer(
    group: dist.ProcessGroup,
    ep: ExpertParallel,
    kernel: Any,
    weights: Row,
    tokens: int,
    rounds: int,
    graphs: bool = False,
) -> Row:
    """Times of all ways, of the layer alone, whole and in pieces, and how far outputs are from NCCL's.

    Args:
        kernel: with ``launch`` and ``default_config``, as `TritonFusedMoE` has them.
    """
    hidden, ids, scores = batch(ep, tokens)
    on_gpu, ranks = hidden.is_cuda, ep.num_ranks
    counts = [tokens] * ranks
    quantises = ep.layout.payload == "fp8"
    rows = [hidden]
    if quantises:
        rows = [
            torch.empty_like(hidden, dtype=FP8),
            torch.empty(tokens, hidden.shape[1] // 128, device=ep.device),
        ]
    rival = Gathered(group, [*rows, ids, scores])
    names = ["hidden_states", *(["hidden_scale"] if quantises else []), "topk_ids", "topk_weights"]
    gathered = dict(zip(names, rival.all, strict=True))
    outs = {name: torch.empty_like(hidden) for name in (*WAYS, "nccl")}

    class Run:
        """Called as a dispatcher is: with the default config for the tokens that come."""

        def __init__(self) -> None:
            self.kernel = kernel

        def __call__(self, **operands: Any) -> torch.Tensor:
            return kernel.launch(kernel.default_config(len(operands["topk_ids"])), **operands)

    run = Run()

    def ours(name: str, by_source: bool) -> Stages:
        def call() -> None:
            ep.by_source = by_source
            ep.layer(run, hidden, ids, scores, tokens_per_rank=counts, out=outs[name], **weights)

        return [call]

    def theirs() -> None:
        if quantises:
            from rampwrap.kernels.triton.quantise import quantise_rows

            quantise_rows(hidden, *rows)
        rival.gather()
        rival.scatter(run(**gathered, expert_map=ep.owners.expert_map, **weights), outs["nccl"])

    def alone() -> None:
        run(**gathered, expert_map=ep.owners.expert_map, **weights)

    def pieces() -> None:
        for at in range(0, ranks * tokens, tokens):
            its = {name: tensor[at : at + tokens] for name, tensor in gathered.items()}
            run(**its, expert_map=ep.owners.expert_map, **weights)

    ways = {name: ours(name, way) for name, way in WAYS.items()}
    ways |= {"nccl": [theirs], "alone": [alone], "alone_pieces": [pieces]}
    for stages in ways.values():  # compiles; the last two read what the rival gathered
        stages[0]()
    ep.check()
    if graphs:
        dist.barrier(group)
        ways = {name: [captured(stages[0])] for name, stages in ways.items()}
        ep.check()
    found: Row = timed(group, ways, rounds, on_gpu, SLEEP // 20 if graphs else SLEEP)
    ep.check()
    wanted = outs["nccl"].float()
    errors = {name: float((its.float() - wanted).abs().max() / wanted.abs().max()) for name, its in outs.items()}
    worst = max(errors, key=errors.__getitem__)
    return found | slowest(group, {"error": errors[worst]}) | {"worst": worst}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that ran before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


PHASE_HEADER = (
    "dispatch, combine: us (GB/s, as if all rows were sent to all); then NCCL, and how much longer it takes for both\n"
    "H    rows   tokens | one launch                 | NCCL                       | faster"
)


def phase_line(row: Row) -> str:
    """A row of `phases` under `PHASE_HEADER`."""
    parts = [f"{row['hidden_size']:<5d}{row['payload']:5s}{row['tokens']:8d} |"]
    for name in ("launch", "nccl"):
        its = row[name]
        for at, phase in enumerate(("dispatch", "combine")):
            us = its[f"stage_{at}_us"]
            parts.append(f"{us:7.0f} ({row[f'{phase}_bytes'] / us / 1e3:3.0f})")
        parts.append("  |")
    return "".join(parts) + f"{row['nccl']['us'] / row['launch']['us']:6.2f}x"


LAYER_HEADER = (
    "whole layers, us; host: us to launch a step, by source and by one launch; alone: the layer without rows that travel, whole and in pieces\n"
    "layer             dtype tokens | one launch  spread | by source spread |    NCCL spread | faster | alone pieces | host      | error"
)


def layer_line(row: Row) -> str:
    """A row of `layers` under `LAYER_HEADER`; faster is NCCL over the better of ours."""
    us = {name: its["us"] for name, its in row.items() if isinstance(its, dict)}
    best = min(us[name] for name in WAYS)
    return (
        f"{row['layer']:18s}{row['dtype']:5s}{row['tokens']:7d} |{us['launch']:11.0f}{row['launch']['spread']:8.0%} |"
        f"{us['source']:10.0f}{row['source']['spread']:7.0%} |{us['nccl']:8.0f}{row['nccl']['spread']:7.0%} |"
        f"{us['nccl'] / best:6.2f}x |{us['alone']:6.0f}{us['alone_pieces']:7.0f} |"
        f"{row['source']['host_us']:5.0f}{row['launch']['host_us']:5.0f} |{row['error']:6.3f}"
    )


def serve(rank: int, its: argparse.Namespace) -> None:
    begun = time.monotonic()
    group, device = joined(rank, its)
    found: Row = stamp() | {"phases": [], "layers": []}
    until = begun + its.seconds

    def say(text: str) -> None:
        if not rank:
            print(text, flush=True)
            if its.out:  # after each row: what was measured stays, whatever comes
                its.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    say(PHASE_HEADER if its.hidden_size else "")
    for row in phases(group, its, device, until):
        found["phases"].append(row)
        say(phase_line(row))
    say(f"{time.monotonic() - begun:.0f} s\n{LAYER_HEADER}")
    for row in layers(group, its, device, until):
        found["layers"].append(row)
        say(layer_line(row))
    wrong = [row for row in found["layers"] if not row["error"] < MOST_ERROR]
    say(f"{time.monotonic() - begun:.0f} s" + "".join(f"\nWRONG: {layer_line(row)} {row['worst']}" for row in wrong))
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    start(serve, arguments().parse_args())
