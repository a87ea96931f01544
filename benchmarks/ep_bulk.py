"""Steps of many tokens over the GPUs of one host: bulk copies, whole layers one after the other and source by source, against NCCL.

    python benchmarks/ep_bulk.py --ranks 4 --out FILE.json
    python benchmarks/ep_bulk.py --ranks 4 --tokens 4096 --layers qwen3-30b --dtype bf16

One process a GPU, eager launches as in prefill. Each GPU sleeps while its steps are put in its queue, so that what is timed is the
GPU; the host's time for a step stands beside it. Of five steps in a row the first is dropped: it holds the distance of the ranks. All
ways take turns in one run; a time is the median on the slowest rank, a spread the distance of the quartiles as a share of it. The
link is the most that stores of 16 bytes or copy engines put out of each GPU here, all at once, each to the next one after the other.

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

import attrs
import torch
import torch.distributed as dist
from common import stamp
from ep_layer import MOST_ERROR
from ep_ranks import Gathered, in_time, joined, slowest, start

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.layout import MOST_TOKENS
from rampwrap.ep.path import row_bytes
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.common.reference import quantise, random_weights

Row = dict[str, Any]
SHAPES = {"qwen3-30b": (32, 8, 2048, 768), "deepseek-v3 shard": (32, 8, 7168, 2048)}
"Experts of a rank (of four; on two of them twice as many), top-k, H, I. DeepSeek-V3 has 256 experts: 64 on each of four."
STEPS = 5
FEW_CTAS = 24
SLEEP = 12_000_000
"Cycles, about 6 ms: longer than the host takes to launch so many steps."


@attrs.frozen
class Way:
    """How our rows go: bulk or one launch, whole or source by source, by copy engines or CTAs."""

    bulk: bool
    by_source: bool = False
    max_ctas: int = 0

    def take(self, ep: ExpertParallel) -> None:
        ep.bulk_tokens, ep.by_source = (0 if self.bulk else MOST_TOKENS + 1), self.by_source
        assert ep._movers is not None
        if hasattr(ep._movers[1], "_max_ctas"):
            ep._movers[1]._max_ctas = self.max_ctas


WAYS = {
    "engines": Way(True),
    "ctas": Way(True, max_ctas=FEW_CTAS),
    "launch": Way(False),
}
LAYER_WAYS = {
    "launch": Way(False),
    "whole": Way(True),
    "whole_ctas": Way(True, max_ctas=FEW_CTAS),
    "source": Way(True, True),
    "source_ctas": Way(True, True, FEW_CTAS),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep_bulk.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 2048, 8192, 1024, 16384], help="a rank")
    parser.add_argument("--hidden-size", type=int, nargs="*", default=[2048, 7168], help="of the phases alone")
    parser.add_argument("--layers", nargs="*", choices=[*SHAPES], default=["qwen3-30b", "deepseek-v3 shard"])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is begun")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="after which ranks say where they are, and end")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


Stages = Sequence[Callable[[], Any]]


def timed(group: dist.ProcessGroup, ways: dict[str, Stages], rounds: int, on_gpu: bool) -> dict[str, Row]:
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
                torch.cuda._sleep(SLEEP)
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


def link(group: dist.ProcessGroup, device: torch.device, rounds: int) -> Row:
    """Bytes in a microsecond out of each GPU, all at once, by stores of few and of all CTAs and by copy engines; the slowest rank's."""
    from rampwrap.kernels.ep import copies

    size, ranks = 64 << 20, dist.get_world_size(group)
    with ExpertParallel(group, MoEShape(128, 8, 4096, 128), size // 8192, backend="symmetric", device=device) as ep:
        mapped, peers = ep._movers[0]._mapped, ep._movers[1]._peers  # type: ignore[index, attr-defined]
        data = torch.zeros(size, dtype=torch.uint8, device=device)
        at = mapped.offsets["rows"] + ep.rank * size  # of each source its own place

        def stores(ctas: int, at_once: bool) -> None:
            grids = [(1, (ctas // (ranks - 1), ranks - 1))] if at_once else [(s, (ctas, 1)) for s in range(1, ranks)]
            for step, grid in grids:
                copies._copy(mapped, [(data, at)], step, grid, None, BLOCK=8192, num_warps=16)

        def engines() -> None:
            for step in range(1, ranks):
                peers[(ep.rank + step) % ranks][at : at + size].copy_(data)

        ways: dict[str, Stages] = {
            "stores_8": [lambda: stores(8, False)],
            "stores_24": [lambda: stores(FEW_CTAS, False)],
            "stores_132": [lambda: stores(132, False)],
            "stores_24_at_once": [lambda: stores(FEW_CTAS, True)],
            "stores_132_at_once": [lambda: stores(132, True)],
            "engines": [engines],
        }
        found = timed(group, ways, rounds, True)
    return {name: size * (ranks - 1) / its["us"] for name, its in found.items()}


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

    def stages(way: Way) -> Stages:
        def dispatch() -> None:
            way.take(ep)
            ep.dispatch(hidden, ids, weights, scales=scales, tokens_per_rank=counts)

        return [dispatch, lambda: ep.combine(y, out=out)]

    ways: dict[str, Stages] = {name: stages(way) for name, way in WAYS.items()}
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
            with ExpertParallel(group, shape, max(its.tokens), backend=backend, device=device) as ep:
                kernel = TritonFusedMoE(ep.shape)
                weights: Row = random_weights(ep.shape, device, seed=ep.rank)
                weights["workspace"] = kernel.workspace(ranks * max(its.tokens), device)
                for tokens in its.tokens:
                    if not in_time(group, until):
                        return
                    row = {"ranks": ranks, "layer": name, "dtype": dtype, "tokens": tokens}
                    yield row | layer(group, ep, kernel, weights, tokens, its.rounds)


def layer(group: dist.ProcessGroup, ep: ExpertParallel, kernel: Any, weights: Row, tokens: int, rounds: int) -> Row:
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
    outs = {name: torch.empty_like(hidden) for name in (*LAYER_WAYS, "nccl")}

    class Run:
        """Called as a dispatcher is: with the default config for the tokens that come."""

        def __init__(self) -> None:
            self.kernel = kernel

        def __call__(self, **operands: Any) -> torch.Tensor:
            return kernel.launch(kernel.default_config(len(operands["topk_ids"])), **operands)

    run = Run()

    def ours(name: str, way: Way) -> Stages:
        def call() -> None:
            way.take(ep)
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

    ways = {name: ours(name, way) for name, way in LAYER_WAYS.items()}
    ways |= {"nccl": [theirs], "alone": [alone], "alone_pieces": [pieces]}
    for stages in ways.values():  # compiles; the last two read what the rival gathered
        stages[0]()
    ep.check()
    found: Row = timed(group, ways, rounds, on_gpu)
    ep.check()
    wanted = outs["nccl"].float()
    errors = {name: float((its.float() - wanted).abs().max() / wanted.abs().max()) for name, its in outs.items()}
    worst = max(errors, key=errors.__getitem__)
    return found | slowest(group, {"error": errors[worst]}) | {"worst": worst}


PHASE_HEADER = (
    "dispatch, combine: us (GB/s of the wire, % of the link); then both together, and NCCL over the best\n"
    "H    rows   tokens |      copy engines              |      24 CTAs                   | one launch    | NCCL          | faster"
)


def phase_line(row: Row, best: float) -> str:
    """A row of `phases` under `PHASE_HEADER`."""
    parts = [f"{row['hidden_size']:<5d}{row['payload']:5s}{row['tokens']:8d} |"]
    for name in (*WAYS, "nccl"):
        its = row[name]
        for at, phase in enumerate(("dispatch", "combine")):
            us = its[f"stage_{at}_us"]
            speed = row[f"{phase}_bytes"] / us
            parts.append(
                f"{us:7.0f}" + (f" ({speed / 1e3:3.0f},{speed / best:4.0%})" if name in ("engines", "ctas") else "")
            )
        parts.append(" |")
    fastest = min(row[name]["us"] for name in WAYS)
    return "".join(parts) + f"{row['nccl']['us'] / fastest:6.2f}x"


LAYER_HEADER = (
    "whole layers, us; 'CTAs': 24 of them copy; host: us to launch a step whole, by source; alone: the layer without rows that travel\n"
    "layer             dtype tokens |one launch   whole  CTAs | by source    CTAs spread |    NCCL faster| alone pieces | host      | error"
)


def layer_line(row: Row) -> str:
    """A row of `layers` under `LAYER_HEADER`; faster is NCCL over the better of by source and whole."""
    us = {name: its["us"] for name, its in row.items() if isinstance(its, dict)}
    best = min(us[name] for name in LAYER_WAYS)
    return (
        f"{row['layer']:18s}{row['dtype']:5s}{row['tokens']:7d} |{us['launch']:10.0f}{us['whole']:8.0f}{us['whole_ctas']:6.0f} |"
        f"{us['source']:10.0f}{us['source_ctas']:8.0f}{row['source']['spread']:7.0%} |{us['nccl']:8.0f}"
        f"{us['nccl'] / best:6.2f}x|{us['alone']:6.0f}{us['alone_pieces']:7.0f} |"
        f"{row['whole']['host_us']:5.0f}{row['source']['host_us']:5.0f} |{row['error']:6.3f}"
    )


def serve(rank: int, its: argparse.Namespace) -> None:
    begun = time.monotonic()
    group, device = joined(rank, its)
    found: Row = stamp() | {"link_bytes_per_us": {}, "phases": [], "layers": []}
    until = begun + its.seconds

    def say(text: str) -> None:
        if not rank:
            print(text, flush=True)
            if its.out:  # after each row: what was measured stays, whatever comes
                its.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    best = math.inf
    if device.type == "cuda":
        speeds = found["link_bytes_per_us"] = link(group, device, its.rounds)
        best = max(speeds.values())
        say("link, GB/s: " + ", ".join(f"{name} {value / 1e3:.0f}" for name, value in speeds.items()))
    say(PHASE_HEADER if its.hidden_size else "")
    for row in phases(group, its, device, until):
        found["phases"].append(row)
        say(phase_line(row, best))
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
