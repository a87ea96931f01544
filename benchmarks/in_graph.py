"""What selection inside a CUDA graph costs, and what it wins, on this GPU.

    python benchmarks/in_graph.py --plan PLAN.json --out OUT.json [--kernel triton|vllm|alpha]
        [--only align,control,replay] [--trace routing-traces.npz] [--seconds 170]

align    alignment alone by each of its paths, with the selection of four candidates, and vLLM's `moe_align_block_size`
         (followed by a histogram, `torch.bincount`'s work by scatter_add_, as "vllm+count") where it is installed
control  a routed layer in a graph against the same graph with its best config alone, by mode, candidates and tokens
replay   layers replayed with routing drawn step by step, against every graph with one config; outputs are compared bit
         for bit with eager launches of the config that was chosen (Alpha-MoE: within 1 %)

Times are medians of interleaved replays of graphs of several layers, in microseconds a layer. The experts of each
layer of a graph are shifted, so that weights come from HBM as in serving while every layer has the same histogram.
It ends in time: nothing is started that would not fit, each part prints and writes what it has, compilation is stopped
when its share is over, and what was not compiled is left out by name.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import graph_tools
import numpy as np
import third_party
import torch
from graph_layers import CONTROL_TOKENS, LAYERS, REPLAY_TOKENS, Layers, Ready, Routes, control_order, singles
from graph_tools import Clock, Graph, capture, interleaved, replay_us, table

from rampwrap.dispatch.graph import GraphDispatcher, graph_modes
from rampwrap.errors import RampwrapError
from rampwrap.kernel.protocol import format_config
from rampwrap.kernels.triton.align.host import BY_EXPERT_MAX_SLOTS, PATHS, align_tokens, allocate_blocks
from rampwrap.kernels.triton.select.host import Candidates, align_and_select, allocate_selected
from rampwrap.model.packed import pack
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import Shortlist
from rampwrap.routing.workloads import Routing

# What matters most comes first, as time may run out.
ALIGN_EXPERTS = (256, 64, 128)
ALIGN_TOKENS = (4096, 512, 64, 1, 256, 1024, 2048, 8)
REPEATS = 64


def vllm_align() -> Callable[[torch.Tensor, int, int], Any] | None:
    """vLLM's alignment, if it is installed."""
    try:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    except Exception:
        return None
    found: Callable[[torch.Tensor, int, int], Any] = moe_align_block_size
    return found


def four_candidates(plan: Plan) -> Candidates:
    """Four configs of the plan, of different block heights where it has them, on the GPU."""
    order = sorted(range(len(plan.configs)), key=lambda i: (plan.grids[i].block_m, i))
    some = tuple(order[len(order) * k // 4] for k in range(4))
    return Candidates.on(pack(plan.model.take(some)), graph_tools.DEVICE)


def bench_align(plan: Plan, rounds: int, clock: Clock, share: float) -> list[dict[str, Any]]:
    """Every path of alignment with and without selection; top-8, lognormal routing; ``auto`` is what is chosen."""
    rng, found = np.random.default_rng(0), []
    candidates, theirs, slowest = four_candidates(plan), vllm_align(), 0.0
    for experts in ALIGN_EXPERTS:
        for tokens in ALIGN_TOKENS:
            if clock.left(share) < 1.3 * slowest:
                continue
            begin = time.monotonic()
            sample = Routing.parse("lognormal:1.0").sample(tokens, experts, 8, rng)
            ids = torch.from_numpy(sample).to(graph_tools.DEVICE)
            selected = allocate_selected(tokens, 8, experts, candidates.packed.block_ms, graph_tools.DEVICE)
            align_and_select(ids, candidates, 0, experts, selected=selected)
            block_m = candidates.packed.block_ms[int(selected.choice)]
            blocks = allocate_blocks(tokens, 8, experts, block_m, graph_tools.DEVICE)
            repeats = REPEATS

            def many(call: Callable[[], Any], repeats: int = repeats) -> Graph:
                return capture(lambda: [call() for _ in range(repeats)])

            graphs = {}
            paths = [None, *(path for path in PATHS if path != "expert" or tokens * 8 <= BY_EXPERT_MAX_SLOTS)]
            for path in paths:
                name = path or "auto"
                graphs[f"align {name}"] = many(
                    functools.partial(align_tokens, ids, block_m, experts, blocks=blocks, path=path)
                )
                graphs[f"select {name}"] = many(
                    functools.partial(align_and_select, ids, candidates, 0, experts, selected=selected, path=path)
                )
            if theirs is not None:
                graphs["vllm"] = many(functools.partial(theirs, ids, block_m, experts))
                ones, flat = torch.ones_like(ids.view(-1)), ids.view(-1).long()
                counts = torch.zeros(experts, dtype=ones.dtype, device=ids.device)

                def both(
                    ids: Any = ids, block_m: int = block_m, experts: int = experts, flat: Any = flat, ones: Any = ones, counts: Any = counts
                ) -> None:  # fmt: skip
                    theirs(ids, block_m, experts)
                    counts.zero_().scatter_add_(0, flat, ones)

                graphs["vllm+count"] = many(both)
            us = {name: value / repeats for name, value in interleaved(graphs, rounds).items()}
            found.append({"experts": experts, "tokens": tokens, **us})
            slowest = max(slowest, time.monotonic() - begin)
    found.sort(key=lambda row: (row["experts"], row["tokens"]))
    names = sorted({name for row in found for name in row} - {"experts", "tokens"})
    table(
        "align: microseconds a launch in a graph of 64",
        ["experts", "tokens", *names, "added (auto)"],
        [
            [r["experts"], r["tokens"], *(r.get(n, "-") for n in names), r["select auto"] - r["align auto"]]
            for r in found
        ],
    )
    return found


def bench_control(
    kernel: Any, plan: Plan, ready: Ready, rounds: int, clock: Clock, share: float
) -> list[dict[str, Any]]:
    """What candidates cost where the choice is always the same config."""
    found: list[dict[str, Any]] = []
    rng, slowest = np.random.default_rng(1), 0.0
    modes = [mode for mode in graph_modes(kernel) if mode != "switch"]
    for tokens in CONTROL_TOKENS:
        order = [i for i in control_order(plan, tokens) if ready.has([plan.configs[i]])]
        if not order or order[0] != plan.static.index(tokens) or clock.left(share) < 1.5 * slowest:
            continue
        begin = time.monotonic()
        layers = Layers(kernel, tokens)
        layers.route(Routing.parse("lognormal:1.0").sample(tokens, kernel.shape.num_experts, kernel.shape.top_k, rng))
        graphs = {"single": layers.single("single", plan.configs[order[0]])}
        for count in range(2, len(order) + 1):
            some = [plan.configs[i] for i in order[:count]]
            for mode in modes:
                if ready.has(some, mode):
                    name = f"{count} {mode}"
                    graphs[name] = layers.candidates(name, some, plan.model.take(tuple(order[:count])), mode)
        us = {name: value / LAYERS for name, value in interleaved(graphs, rounds).items()}
        found.append({"tokens": tokens, "us": us})
        slowest = max(slowest, time.monotonic() - begin)
    found.sort(key=lambda row: int(row["tokens"]))
    names = sorted({name for row in found for name in row["us"]} - {"single"})
    table(
        "control: microseconds a layer above the same graph with one config",
        ["tokens", "layer us", *(name.replace("early-exit", "exit") for name in names)],
        [[r["tokens"], r["us"]["single"], *(r["us"].get(n, np.nan) - r["us"]["single"] for n in names)] for r in found],
    )
    return found


def measured_costs(control: Sequence[dict[str, Any]], modes: Sequence[str]) -> dict[str, dict[int, float]]:
    """`rampwrap.policy.graph_lists.COSTS` as measured: the median over token counts of what candidates cost."""
    costs: dict[str, dict[int, float]] = {}
    for mode in modes:
        for count in (2, 3, 4):
            name = f"{count} {mode}"
            added = [row["us"][name] - row["us"]["single"] for row in control if name in row["us"]]
            if added:
                costs.setdefault(mode, {1: 0.0})[count] = round(max(0.0, statistics.median(added)), 2)
    return costs


def bench_replay(
    kernel: Any,
    plan: Plan,
    ready: Ready,
    routes: Routes,
    costs: dict[str, dict[int, float]] | None,
    steps: int,
    clock: Clock,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Routing that changes at every replay, against each single config."""
    found: list[dict[str, Any]] = []
    slowest = 0.0
    for tokens in REPLAY_TOKENS:
        if clock.left() < 1.3 * slowest:
            clock.mark(f"no time for {tokens} tokens")
            continue
        begin = time.monotonic()
        layers = Layers(kernel, tokens)
        static = plan.static.index(tokens)
        alone = [i for i in singles(plan, tokens) if ready.has([plan.configs[i]])]
        if static not in alone:
            continue
        graphs = {f"config {i}": layers.single(f"config {i}", plan.configs[i]) for i in alone}
        graph_dispatchers: dict[str, GraphDispatcher] = {}
        few = tuple(sorted([static, *(i for i in alone if i != static)][:4]))
        asked: dict[str, tuple[Plan, dict[str, Any]]] = {"auto": (plan, {"costs": costs})}
        for mode in graph_modes(kernel):
            every = Shortlist(0, tokens, few, static, mode, None, None, "all that have a graph")
            asked[f"all, {mode}"] = (attrs.evolve(plan, in_graph=(every,)), {"mode": mode})
        for name, (its, options) in asked.items():
            graph_dispatcher = GraphDispatcher(kernel, its, max_tokens=tokens, strict=True, **options)
            bucket = graph_dispatcher.prepared(tokens)
            # A merged list of its own would be compiled here, for minutes at worst.
            if bucket.mode == "merged" and not ready.has(bucket.configs, "merged"):
                if name != "auto":
                    continue
                others = {mode: by_count for mode, by_count in (costs or {}).items() if mode != "merged"}
                modes: dict[str, Any] = {"costs": others} if others else {"mode": "early-exit"}
                graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=tokens, strict=True, **modes)
                bucket = graph_dispatcher.prepared(tokens)
            if not ready.has(bucket.configs):
                continue
            try:
                graphs[name] = layers.graph(name, graph_dispatcher)
                graph_dispatchers[name] = graph_dispatcher
            except RampwrapError as error:
                clock.mark(f"{tokens} tokens, {name}: {error}")
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        differing = 0
        for step in range(steps * len(routes)):
            layers.route(routes.draw(step, tokens))
            for name in routes.rng.permutation(list(graphs)).tolist():
                samples[name].append(min(replay_us(graphs[name]) for _ in range(2)) / LAYERS)
            if step < 2 * len(routes):
                differing += check_bits(layers, plan, graph_dispatchers, graphs)
        found.append(summary(tokens, plan, samples, graph_dispatchers, differing))
        slowest = max(slowest, time.monotonic() - begin)
        save(found)
    return report(found)


def summary(
    tokens: int,
    plan: Plan,
    samples: dict[str, list[float]],
    graph_dispatchers: dict[str, GraphDispatcher],
    differing: int,
) -> dict[str, Any]:
    """Means over steps, and what they say of each graph dispatcher."""
    total = {name: statistics.fmean(us) for name, us in samples.items()}
    one = {name: total[name] for name in total if name.startswith("config")}
    oracle = statistics.fmean(min(us) for us in zip(*(samples[name] for name in one), strict=True))
    best = min(one, key=lambda name: one[name])
    room = one[best] - oracle
    return {
        "tokens": tokens,
        "us": total,
        "oracle_us": oracle,
        "static_us": total[f"config {plan.static.index(tokens)}"],
        "best_single": best,
        "best_single_us": one[best],
        "above_best_single": {name: total[name] / one[best] - 1 for name in graph_dispatchers},
        "headroom": one[best] / oracle - 1,
        "captured": {name: (one[best] - total[name]) / room if room > 0 else 0.0 for name in graph_dispatchers},
        "candidates": {name: s.prepared(tokens).shortlist.candidates for name, s in graph_dispatchers.items()},
        "modes": {name: s.prepared(tokens).mode for name, s in graph_dispatchers.items()},
        "ran": {name: s.counts() for name, s in graph_dispatchers.items()},
        "outputs_differing": differing,
        "steps": len(next(iter(samples.values()))),
    }


def report(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints the table and the two figures that count."""
    found = sorted(found, key=lambda row: int(row["tokens"]))
    names = sorted({name for row in found for name in row["captured"]})
    table(
        "replay: microseconds a layer, mean over steps; percent above the best graph with one config, share captured",
        [
            "tokens",
            "plan's static",
            "best single",
            "oracle",
            "headroom %",
            *(n + " %" for n in names),
            "auto captured",
            "auto takes",
            "bits",
        ],
        [
            [
                r["tokens"],
                r["static_us"],
                r["best_single_us"],
                r["oracle_us"],
                r["headroom"] * 100,
                *(r["above_best_single"].get(n, np.nan) * 100 for n in names),
                f"{r['captured'].get('auto', 0.0):.0%}",
                f"{len(r['candidates'].get('auto', ()))} {r['modes'].get('auto', '-')}",
                "equal" if not r["outputs_differing"] else f"{r['outputs_differing']} differ",
            ]
            for r in found
        ],
    )
    judged = [r for r in found if "auto" in r["captured"]]
    if judged:
        worst = max(judged, key=lambda r: r["above_best_single"]["auto"])
        wide = [r for r in judged if r["headroom"] > 0.05]
        print(
            f"auto is at worst {worst['above_best_single']['auto']:+.2%} of the best static graph, at {worst['tokens']} tokens "
            f"(bound +0.50 %); of {len(wide)} buckets with headroom above 5 %, "
            f"{sum(r['captured']['auto'] >= 0.5 for r in wide)} capture at least half of it."
        )
    return found


def check_bits(
    layers: Layers, plan: Plan, graph_dispatchers: dict[str, GraphDispatcher], graphs: dict[str, Graph]
) -> int:
    """Replays each graph dispatcher's graph and compares its last layer with an eager launch of the host's choice."""
    differing = 0
    counts = np.bincount(layers.ids[-1].cpu().numpy().ravel(), minlength=layers.shape.num_experts).astype(np.int64)
    for name, graph_dispatcher in graph_dispatchers.items():
        its = graph_dispatcher.prepared(layers.tokens).shortlist
        index = its.candidates[0]
        if len(its.candidates) > 1:
            index = its.candidates[plan.model.take(its.candidates).choose(counts, its.fallback)]
        layers.last[name].fill_(float("nan"))
        graphs[name].replay()
        got = layers.last[name].clone()
        given = {key: value for key, value in layers.arguments(LAYERS - 1).items() if key != "out"}
        want = layers.kernel.launch(plan.configs[index], **given)
        if hasattr(layers.kernel, "nondeterministic"):
            differing += not float((got - want).double().norm()) < 0.01 * float(want.double().norm())
        else:
            differing += not torch.equal(got, want)
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", required=True, help="a plan of the kernel for this GPU")
    parser.add_argument("--kernel", choices=["triton", "vllm", "alpha"], default="triton")
    parser.add_argument("--out", required=True, help="JSON with everything that is printed")
    parser.add_argument("--trace", help="routing-traces.npz, drawn from besides the synthetic routings")
    parser.add_argument("--only", default="align,control,replay")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=12, help="of each routing and token count")
    parser.add_argument("--seconds", type=float, default=170.0, help="nothing is started that would not end before")
    args = parser.parse_args()
    clock, parts = Clock(args.seconds), args.only.split(",")
    plan = Plan.load(args.plan)
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "host": platform.node(),
        "kernel": args.kernel,
        "plan": plan.provenance,
        "configs": [format_config(config) for config in plan.configs],
    }

    def save(part: str, value: Any) -> None:
        found[part] = value
        pathlib.Path(args.out).write_text(json.dumps(found, indent=1))

    if "align" in parts:
        save("align", bench_align(plan, args.rounds, clock, 1.0 if parts == ["align"] else 0.25))
        clock.mark("align done")
    if "control" in parts or "replay" in parts:
        kernel = third_party.make(args.kernel, plan.shape)
        ready = Ready(plan, args.kernel, kernel, parts, clock, max(20.0, 0.4 * clock.left()))
        costs = None
        if "control" in parts:
            share = clock.used / clock.seconds + (0.3 if "replay" in parts else 1.0) * clock.left() / clock.seconds
            save("control", bench_control(kernel, plan, ready, args.rounds, clock, share))
            costs = measured_costs(found["control"], graph_modes(kernel)) or None
            save("costs", costs)
            clock.mark(f"measured costs: {json.dumps(costs)}")
        if "replay" in parts:
            routes = Routes(plan.shape, args.trace)
            save("routing", routes.source)
            keep = functools.partial(save, "replay")
            save("replay", bench_replay(kernel, plan, ready, routes, costs, args.steps, clock, keep))
    clock.mark(f"done, written to {args.out}")


if __name__ == "__main__":
    main()
