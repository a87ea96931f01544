"""Choosing a config by the histogram of a rank's own experts, against one config for each batch size.

    python benchmarks/ep_choice.py --out FILE.json
    python benchmarks/ep_choice.py --kernel triton_fused_moe --layers qwen3-30b --out FILE.json

One GPU plays one rank of several: 32 of the 128 experts of Qwen3-30B (4 ranks), 8 of the 256 of DeepSeek-V3 (32 ranks), with the
rows of all ranks as our dispatch leaves them. A table of the rank's part is profiled here over a dozen configs, and a plan made of
it. Then steps of other routing, drawn anew for each, are timed with every config, layer by layer in CUDA graphs, weights not in L2:

static      the config that was fastest under uniform routing at that many tokens: what engines tune and ship
no plan     the kernel's default
in graph    what `GraphDispatcher` runs with the plan: the GPU chooses, and all that choosing costs is in its time; kernels that
            cannot choose there, the CuTe kernels among them, have one config, the best on average over drawn routings
plan        what the plan chooses where the host sees the histogram, without the cost of choosing
oracle      the fastest of all configs in each step

Times are sums over the steps; a gain is that of static over it. Every config is compared with float64 beforehand. The CuTe kernels
serve where a library of them is found; with --kernel sim nothing but arithmetic runs. Each layer has its share of --seconds.
"""

import argparse
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch
from common import stamp
from ep_shard import MOST, Shard, served, shard

from rampwrap.dispatch.graph import GraphDispatcher, chooses_in_graph
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.routing.counts import first_counts
from rampwrap.routing.workloads import Routing, Workload

CASES = (("qwen3-30b", 32, "fp8"), ("deepseek-v3", 8, "fp8"), ("qwen3-30b", 32, "bf16"), ("deepseek-v3", 8, "bf16"))
"Layers, how many of their experts are on a rank, and their type."
TOKENS = (128, 512, 32, 2048)
"Of all ranks: on 4 ranks 32, 128, 8 and 512 each; in an order of which any beginning is of use."
ROUTINGS = ("uniform", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2", "lognormal:1.0")
STATIC, DEFAULT, GRAPH, PLAN, ORACLE = WAYS = ("static", "no plan", "in graph", "plan", "oracle")
HEADER = "layer        dtype local tokens steps | static us | gain: no plan in graph    plan  oracle | of it: in graph   plan | configs"


def rank_of(name: str, dtype: str, num_local: int) -> MoEShape:
    return attrs.evolve(SHAPES[name], num_local_experts=num_local, dtype=dtype)


def steps(tokens: int, count: int, seed: int) -> list[Workload]:
    """One after the other of the routings, each drawn anew; none that the plan saw."""
    drawn = [Routing.parse(its) for its in ROUTINGS]
    return [Workload(tokens, drawn[step % len(drawn)], "eval", seed + step) for step in range(count)]


def one(its: Shard, tokens: int, count: int, rounds: int, seed: int, until: float = math.inf) -> dict[str, Any]:
    """Microseconds of every step with what each way launches, and which configs those are; at least one step, whatever the time."""
    kernel, plan, shape = its.kernel, its.plan, its.shape
    policy, static = plan.policy(), plan.static_policy()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dispatcher = GraphDispatcher(kernel, plan, max_tokens=tokens, strict=True, where=where)
    held = dispatcher.prepared(tokens).configs
    default = kernel.default_config(tokens) if hasattr(kernel, "default_config") else None
    configs = [*its.configs, *([default] if default is not None and default not in its.configs else [])]
    ways = tuple(way for way in WAYS if way != DEFAULT or default is not None)
    found: dict[str, Any] = {"us": {name: [] for name in ways}, "chosen": [], "fastest": []}
    for workload in steps(tokens, count, seed):
        if found["chosen"] and time.monotonic() > until:
            break
        ids = workload.topk_ids(shape.num_experts, shape.top_k)
        counts, given = first_counts(ids, shape), its.inputs(ids)
        calls: dict[str, Callable[[], Any]] = {}
        for config in configs:
            calls[format_config(config)] = functools.partial(kernel.launch, config, **given)
        names = {
            STATIC: format_config(plan.configs[static.index(counts, tokens)]),
            PLAN: format_config(plan.configs[policy.index(counts, tokens)]),
            GRAPH: GRAPH if len(held) > 1 else format_config(held[0]),
        }
        if default is not None:
            names[DEFAULT] = format_config(default)
        if len(held) > 1:
            calls[GRAPH] = functools.partial(dispatcher, **given)
            expected = calls[names[STATIC]]()
            off = (calls[GRAPH]().double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
            assert float(off) < 0.02, f"the graph's choice is {float(off):.3g} off {workload.label}"
        us = its.us(calls, rounds)
        names[ORACLE] = min((name for name in us if name != GRAPH), key=lambda name: us[name])
        for way in ways:
            found["us"][way].append(us[names[way]])
        found["chosen"].append(names[PLAN])
        found["fastest"].append(names[ORACLE])
    chooses = chooses_in_graph(kernel)
    return found | summary(found["us"]) | {"candidates": len(held), "chooses_in_graph": chooses}


def summary(us: dict[str, list[float]]) -> dict[str, Any]:
    """Gains over static, and which share of the oracle's each has, where that is more than a thousandth."""
    total = {name: float(np.sum(its)) for name, its in us.items()}
    possible = total[STATIC] - total[ORACLE]
    worth = possible > 1e-3 * total[STATIC]
    return {
        "total_us": total,
        "gain": {name: total[STATIC] / its for name, its in total.items()},
        "captured": {name: (total[STATIC] - its) / possible if worth else 0.0 for name, its in total.items()},
        "slower": {name: float(np.mean(np.array(its) > 1.01 * np.array(us[STATIC]))) for name, its in us.items()},
    }


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`."""
    gain, captured, steps = row["gain"], row["captured"], len(row["chosen"])
    default = f"{gain[DEFAULT]:13.3f}x" if DEFAULT in gain else " " * 13 + "-"
    return (
        f"{row['layer']:13s}{row['dtype']:5s}{row['local']:6d}{row['tokens']:7d}{steps:6d} |{row['total_us'][STATIC] / steps:10.1f} |"
        f"{default}{gain[GRAPH]:8.3f}x{gain[PLAN]:7.3f}x{gain[ORACLE]:7.3f}x |{captured[GRAPH]:16.0%}{captured[PLAN]:7.0%} |"
        f"{row['candidates']:3d} of {row['profiled_configs']}, {len(set(row['fastest']))} win"
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep_choice.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default=served())
    parser.add_argument("--configs", type=int, default=MOST, help="that are profiled, of kernels with a default")
    parser.add_argument("--layers", nargs="+", default=sorted({name for name, _, _ in CASES}))
    parser.add_argument("--dtype", nargs="+", choices=["fp8", "bf16"], default=["fp8", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="of all ranks")
    parser.add_argument("--steps", type=int, default=2 * len(ROUTINGS), help="of each number of tokens")
    parser.add_argument("--rounds", type=int, default=2, help="of samples")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


def main() -> None:
    a = arguments().parse_args()
    until = time.monotonic() + a.seconds
    rows: list[dict[str, Any]] = []
    print(f"{a.kernel}\n{HEADER}", flush=True)
    cases = [case for case in CASES if case[0] in a.layers and case[2] in a.dtype]
    for left, (layer, local, dtype) in zip(range(len(cases), 0, -1), cases, strict=True):
        share = (until - time.monotonic()) / left
        if share <= 0:
            break
        ends, profiled = time.monotonic() + share, sorted({8, *a.tokens})
        its = shard(a.kernel, rank_of(layer, dtype, local), profiled, rounds=a.rounds, most=a.configs)
        for place, tokens in enumerate(a.tokens):
            if place and time.monotonic() > ends:
                break
            named = {"layer": layer, "dtype": dtype, "local": local, "tokens": tokens}
            named["profiled_configs"] = len(its.configs)
            rows.append(named | one(its, tokens, a.steps, a.rounds, a.seed, ends))
            print(line(rows[-1]), flush=True)
            if a.out:
                a.out.write_text(
                    json.dumps(stamp() | {"kernel": a.kernel, "rows": rows}, indent=1) + "\n", encoding="utf-8"
                )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
