"""Steps of many tokens over the GPUs of one host: one launch, and whole layers source by source, against NCCL.

    python benchmarks/ep_bulk.py --ranks 4 --out FILE.json
    python benchmarks/ep_bulk.py --ranks 4 --hidden-size --layers qwen3-30b --dtype fp8 --tokens 4096 --modes graph

One process a GPU. Layers first, the first number of tokens of every layer and dtype before the next, then dispatch and combine alone. A layer
is timed in CUDA graphs, which the host launches at once, and eager: each GPU sleeps there while its steps are put in its queue, so
that what is timed is the GPU; the host's time for a step stands beside it. Of five steps in a row the first is dropped: it holds the
distance of the ranks. All ways take turns in one run; a time is the median on the slowest rank, a spread the distance of the quartiles
as a share of it.

The kernel is the same on all sides, with its default config for the rows of each launch, or with --race the fastest of a few: the CuTe
kernels where they are compiled, else our Triton kernel. In FP8 rows are quantised before they travel, on all sides, and kernels read them as they are. With the layer stand
its parts: the kernel alone on all rows and piece by piece, and what moves without a kernel between. Before anything is timed each way is
compared with float64 on some tokens, and afterwards with NCCL's on all; one that is too far off is named and not timed. Shapes: `SHAPES`,
with 32 local experts on 4 ranks. With --device cpu it runs over gloo, to show that it runs at all.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from common import stamp
from ep_bulk_layers import LAYER_HEADER, MODES, SHAPES, Row, Stages, batch, layer_line, layers, timed
from ep_ranks import Gathered, in_time, joined, start

from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.path import row_bytes
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import quantise


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep_bulk.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 2048], help="a rank")
    parser.add_argument("--hidden-size", type=int, nargs="*", default=[2048, 7168], help="of the phases alone")
    parser.add_argument("--layers", nargs="*", choices=[*SHAPES], default=["qwen3-30b", "deepseek-v3 shard"])
    parser.add_argument("--dtype", nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--kernel", help="of layers; default: what serves")
    parser.add_argument(
        "--race", action="store_true", help="of each number of rows the fastest of a few configs, on all sides"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is begun")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="after which ranks say where they are, and end")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


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

    say(LAYER_HEADER if its.layers else "")
    for row in layers(group, its, device, until):
        found["layers"].append(row)
        say(layer_line(row))
    say(f"{time.monotonic() - begun:.0f} s\n{PHASE_HEADER if its.hidden_size else ''}")
    for row in phases(group, its, device, until):
        found["phases"].append(row)
        say(phase_line(row))
    wrong = [row for row in found["layers"] if row["wrong"]]
    named = "".join(f"\nWRONG: {row['wrong']}, {row['errors']}: {layer_line(row)}" for row in wrong)
    say(f"{time.monotonic() - begun:.0f} s{named}")
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    start(serve, arguments().parse_args())
