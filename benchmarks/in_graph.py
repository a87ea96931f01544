"""What selection inside a CUDA graph costs, and what it wins, on this GPU.

    python benchmarks/in_graph.py --plan PLAN.json --out OUT.json [--trace routing-traces.npz] [--only align,control,replay]

align    alignment alone, alignment + selection of four candidates, and vLLM's `moe_align_block_size` where it is installed
control  a routed layer in a graph against the same graph with its best config alone, by mode, candidates and tokens
replay   layers replayed with routing drawn step by step, against every graph with one config; outputs are compared bit
         for bit with eager launches of the config that was chosen

Times are medians of interleaved replays of graphs of several layers, in microseconds a layer. The experts of each
layer of a graph are shifted, so that weights come from HBM as in serving while every layer has the same histogram.
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

import numpy as np
import torch

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.ingraph import pack, shortlist
from rampwrap.kernel import format_config
from rampwrap.kernels.triton.align import align_tokens, allocate_blocks
from rampwrap.kernels.triton.select import Candidates, align_and_select, allocate_selected
from rampwrap.kernels.triton.warm import warm, warm_merged
from rampwrap.plan import Plan
from rampwrap.routing import Routing
from rampwrap.selector import COSTS, IN_GRAPH, Selector

LAYERS = 8
# What matters most comes first, as time may run out.
CONTROL_TOKENS = (64, 512, 8, 256, 128, 2, 32)
REPLAY_TOKENS = (64, 128, 32, 256, 512, 16, 8, 4, 2, 1)
ROUTINGS = ("lognormal:1.0", "dirichlet:0.1", "dirichlet:0.3", "zipf:1.2")
Graph = torch.cuda.CUDAGraph


def capture(run: Callable[[], Any]) -> Graph:
    """A graph of what `run` launches; it runs eagerly first, which compiles."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`, which empties the allocator's cache each time.
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        run()
        graph.capture_end()
    return graph


def replay_us(graph: Graph) -> float:
    """Microseconds of one replay, behind one that is not counted so that the GPU is not waiting for the host."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3


def interleaved(graphs: dict[str, Graph], rounds: int) -> dict[str, float]:
    """Median microseconds of each graph, sampled in turn."""
    for graph in graphs.values():
        replay_us(graph)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(replay_us(graph))
    return {name: statistics.median(found) for name, found in samples.items()}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table."""
    text = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *text]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [list(header), *text]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


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
    return Candidates.on(pack(plan.model.take(some)), "cuda")


def bench_align(plan: Plan, rounds: int) -> list[dict[str, Any]]:
    """Alignment with and without selection; top-8, lognormal routing."""
    rng, found = np.random.default_rng(0), []
    candidates = four_candidates(plan)
    theirs = vllm_align()
    for experts in (64, 128, 256):
        for tokens in (1, 8, 64, 256, 512, 1024, 4096):
            sample = Routing.parse("lognormal:1.0").sample(tokens, experts, 8, rng)
            ids = torch.from_numpy(sample).cuda()
            selected = allocate_selected(tokens, 8, experts, candidates.packed.block_ms, "cuda")
            align_and_select(ids, candidates, 0, experts, selected=selected)
            block_m = candidates.packed.block_ms[int(selected.choice)]
            blocks = allocate_blocks(tokens, 8, experts, block_m, "cuda")
            repeats = 64

            def many(call: Callable[[], Any], repeats: int = repeats) -> Graph:
                return capture(lambda: [call() for _ in range(repeats)])

            graphs = {
                "align": many(functools.partial(align_tokens, ids, block_m, experts, blocks=blocks)),
                "select": many(functools.partial(align_and_select, ids, candidates, 0, experts, selected=selected)),
            }
            if theirs is not None:
                graphs["vllm"] = many(functools.partial(theirs, ids, block_m, experts))
            us = {name: value / repeats for name, value in interleaved(graphs, rounds).items()}
            found.append({"experts": experts, "tokens": tokens, **us})
    header = ["experts", "tokens", "align", "align+select", "added", "vLLM align"]
    table(
        "align: microseconds a launch in a graph of 64",
        header,
        [
            [r["experts"], r["tokens"], r["align"], r["select"], r["select"] - r["align"], r.get("vllm", "-")]
            for r in found
        ],
    )
    return found


class Layers:
    """`LAYERS` calls of one layer with shifted experts, and buffers for their routing."""

    def __init__(self, kernel: TritonFusedMoE, tokens: int) -> None:
        self.kernel, self.tokens, self.shape = kernel, tokens, kernel.shape
        zeros = torch.zeros(tokens, self.shape.top_k, dtype=torch.int32, device="cuda")
        self.inputs = kernel.inputs(self.shape, zeros)
        self.ids = torch.zeros(LAYERS, tokens, self.shape.top_k, dtype=torch.int32, device="cuda")
        self.shift = (torch.arange(LAYERS, device="cuda") * (self.shape.num_experts // LAYERS)).int()[:, None, None]
        self.workspace = kernel.workspace(tokens)
        self.kept: list[Any] = []
        self.out = [torch.empty_like(self.inputs["hidden_states"]) for _ in range(LAYERS)]

    def route(self, ids: np.ndarray[Any, Any]) -> None:
        """Writes the routing of a step into the buffers that the graphs read."""
        sample = torch.from_numpy(ids).cuda()
        self.ids.copy_((sample[None] + self.shift) % self.shape.num_experts)

    def arguments(self, layer: int) -> dict[str, Any]:
        return {**self.inputs, "topk_ids": self.ids[layer], "out": self.out[layer]}

    def graph(self, launch: Callable[..., Any]) -> Graph:
        return capture(lambda: [launch(**self.arguments(layer)) for layer in range(LAYERS)])

    def single(self, config: Any, **options: Any) -> Graph:
        return self.graph(lambda **given: self.kernel.launch(config, **given, workspace=self.workspace, **options))

    def candidates(self, configs: Sequence[Any], model: Any, mode: str, waves: int) -> Graph:
        """The first config is chosen always."""
        shape, memory = self.shape, self.workspace
        tables = Candidates.on(pack(model, 1e9), "cuda")
        blocks = allocate_selected(self.tokens, shape.top_k, shape.num_experts, tables.packed.block_ms, "cuda")
        streams = [torch.cuda.Stream() for _ in configs[1:]] if mode == "parallel" else []  # type: ignore[no-untyped-call]

        def launch(**given: Any) -> Any:
            align_and_select(given["topk_ids"], tables, 0, shape.num_experts, selected=blocks)
            more: dict[str, Any] = {"workspace": memory, "waves": waves, "streams": streams, "merged": mode == "merged"}
            return self.kernel.launch_candidates(configs, blocks.blocks, blocks.choice, **given, **more)

        graph = self.graph(launch)
        self.kept.append((tables, blocks, streams))  # what the graph points into
        return graph


def control_order(plan: Plan, tokens: int) -> list[int]:
    """The static config and three more, those of the plan's bucket first."""
    best = plan.static.index(tokens)
    bucket = min(plan.buckets, key=lambda b: abs(b.num_tokens - tokens))
    others = [i for i in (*bucket.shortlist, *range(len(plan.configs))) if i != best]
    return [best, *dict.fromkeys(others)][:4]


def precompile(plan: Plan) -> list[str]:
    """Compiles in parallel what the parts below launch, as far as it is known before; reasons of failures."""
    free = dict.fromkeys(range(1, 5), 0.0)
    lists = {tuple(control_order(plan, tokens)[:count]) for tokens in CONTROL_TOKENS for count in (2, 3, 4)}
    lists |= {shortlist(plan, tokens, free).candidates for tokens in REPLAY_TOKENS}
    groups = [[plan.configs[i] for i in some] for some in sorted(lists) if len(some) > 1]
    failed = [*warm(plan.shape, plan.configs, persistent=True), *warm_merged(plan.shape, groups)]
    return [reason for reason in failed if reason]


def bench_control(kernel: TritonFusedMoE, plan: Plan, rounds: int, deadline: float) -> list[dict[str, Any]]:
    """What candidates cost where the choice is always the same config."""
    found: list[dict[str, Any]] = []
    modes = [(mode, waves) for mode in ("early-exit", "merged", "parallel") for waves in (1, 4)]
    rng = np.random.default_rng(1)
    for tokens in CONTROL_TOKENS:
        if found and time.monotonic() > deadline:
            break
        order = control_order(plan, tokens)
        best = order[0]
        layers = Layers(kernel, tokens)
        layers.route(Routing.parse("lognormal:1.0").sample(tokens, kernel.shape.num_experts, kernel.shape.top_k, rng))
        graphs = {"single": layers.single(plan.configs[best])}
        for waves in (1, 4):
            graphs[f"1 tight{waves}"] = layers.single(plan.configs[best], waves=waves)
        for mode, waves in modes:
            for count in range(2, len(order) + 1):
                configs = [plan.configs[i] for i in order[:count]]
                name = f"{count} {mode}" + (f" tight{waves}" if waves else "")
                try:
                    graphs[name] = layers.candidates(configs, plan.model.take(tuple(order[:count])), mode, waves)
                except Exception as error:
                    print(f"{tokens} tokens, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        us = {name: value / LAYERS for name, value in interleaved(graphs, rounds).items()}
        found.append({"tokens": tokens, "us": us})
    found.sort(key=lambda row: int(row["tokens"]))
    names = [name for name in found[0]["us"] if name != "single"]
    table(
        "control: microseconds a layer above the same graph with one config",
        ["tokens", "layer us", *(name.replace("early-exit", "exit") for name in names)],
        [[r["tokens"], r["us"]["single"], *(r["us"].get(n, np.nan) - r["us"]["single"] for n in names)] for r in found],
    )
    return found


def measured_costs(control: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """`rampwrap.selector.COSTS` as measured: the median over token counts of what candidates cost."""
    costs: dict[str, dict[int, float]] = {}
    for mode in IN_GRAPH:
        for count in (2, 3, 4):
            name = f"{count} {mode} tight1"
            added = [row["us"][name] - row["us"]["single"] for row in control if name in row["us"]]
            if added:
                costs.setdefault(mode, {1: 0.0})[count] = round(max(0.0, statistics.median(added)), 2)
    return costs


def bench_replay(
    kernel: TritonFusedMoE,
    plan: Plan,
    routings: Sequence[str],
    costs: dict[str, dict[int, float]],
    steps: int,
    deadline: float,
) -> list[dict[str, Any]]:
    """Routing that changes at every replay, against each single config."""
    found: list[dict[str, Any]] = []
    shape, rng = kernel.shape, np.random.default_rng(2)
    for tokens in REPLAY_TOKENS:
        if found and time.monotonic() > deadline:
            print(f"out of time before {tokens} tokens")
            continue
        layers = Layers(kernel, tokens)
        bucket = min(plan.buckets, key=lambda b: abs(b.num_tokens - tokens))
        singles = sorted({*bucket.shortlist, plan.static.index(tokens)})
        graphs = {f"config {i}": layers.single(plan.configs[i]) for i in singles}
        selectors = {"auto": Selector(kernel, plan, max_tokens=tokens, costs=costs, strict=True)}
        for mode in costs:
            free = {mode: dict.fromkeys(range(1, 5), 0.0)}
            selectors[f"all, {mode}"] = Selector(kernel, plan, max_tokens=tokens, mode=mode, costs=free, strict=True)
        for name, selector in selectors.items():
            graphs[name] = layers.graph(selector)
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        differing = 0
        for step in range(steps * len(routings)):
            routing = Routing.parse(routings[step % len(routings)])
            layers.route(routing.sample(tokens, shape.num_experts, shape.top_k, rng))
            for name in rng.permutation(list(graphs)).tolist():
                samples[name].append(min(replay_us(graphs[name]) for _ in range(2)) / LAYERS)
            if step < 2 * len(routings):
                differing += check_bits(layers, plan, selectors, graphs)
        total = {name: statistics.fmean(us) for name, us in samples.items()}
        one = {name: total[name] for name in total if name.startswith("config")}
        oracle = statistics.fmean(min(us) for us in zip(*(samples[name] for name in one), strict=True))
        static = total[f"config {plan.static.index(tokens)}"]
        best = min(one, key=lambda name: one[name])
        found.append(
            {
                "tokens": tokens,
                "us": total,
                "oracle_us": oracle,
                "static_us": static,
                "best_single": best,
                "best_single_us": one[best],
                "candidates": {name: s.bucket(tokens).shortlist.candidates for name, s in selectors.items()},
                "modes": {name: s.bucket(tokens).mode for name, s in selectors.items()},
                "ran": {name: s.counts() for name, s in selectors.items()},
                "outputs_differing": differing,
                "steps": steps * len(routings),
            }
        )
    found.sort(key=lambda row: int(row["tokens"]))
    names = [name for name in found[0]["us"] if not name.startswith("config")]
    table(
        "replay: microseconds a layer, mean over steps; percent against the best graph with one config",
        [
            "tokens",
            "plan's static",
            "best single",
            "oracle",
            "headroom %",
            *(n + " %" for n in names),
            "auto takes",
            "bits",
        ],
        [
            [
                r["tokens"],
                r["static_us"],
                r["best_single_us"],
                r["oracle_us"],
                (r["best_single_us"] / r["oracle_us"] - 1) * 100,
                *((r["us"][n] / r["best_single_us"] - 1) * 100 for n in names),
                f"{len(r['candidates']['auto'])} {r['modes']['auto']}",
                "equal" if not r["outputs_differing"] else f"{r['outputs_differing']} differ",
            ]
            for r in found
        ],
    )
    return found


def check_bits(layers: Layers, plan: Plan, selectors: dict[str, Selector], graphs: dict[str, Graph]) -> int:
    """Replays each selector's graph and compares its last layer with an eager launch of the host's choice."""
    differing = 0
    counts = np.bincount(layers.ids[-1].cpu().numpy().ravel(), minlength=layers.shape.num_experts).astype(np.int64)
    for name, selector in selectors.items():
        its = selector.bucket(layers.tokens).shortlist
        index = its.candidates[plan.model.take(its.candidates).choose(counts, its.fallback)]
        for out in layers.out:
            out.fill_(float("nan"))
        graphs[name].replay()
        got = layers.out[-1].clone()
        want = layers.kernel.launch(plan.configs[index], **{**layers.arguments(LAYERS - 1), "out": None})
        differing += not torch.equal(got, want)
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", required=True, help="a plan of triton_fused_moe for this GPU")
    parser.add_argument("--out", required=True, help="JSON with everything that is printed")
    parser.add_argument("--trace", help="routing-traces.npz, drawn from besides the synthetic routings")
    parser.add_argument("--only", default="align,control,replay")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=16, help="of each routing and token count")
    parser.add_argument("--seconds", type=float, default=210.0, help="starts nothing new after this")
    args = parser.parse_args()
    start = time.monotonic()
    parts = args.only.split(",")
    plan = Plan.load(args.plan)
    kernel = TritonFusedMoE(plan.shape)
    failed = precompile(plan)
    print(f"{len(plan.configs)} configs compiled in {time.monotonic() - start:.0f} s", *failed, sep="\n", flush=True)
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "host": platform.node(),
        "plan": plan.provenance,
        "configs": [format_config(config) for config in plan.configs],
    }
    if "align" in parts:
        found["align"] = bench_align(plan, args.rounds)
        print(f"[{time.monotonic() - start:.0f} s]", flush=True)
    costs = {mode: dict(by_count) for mode, by_count in COSTS.items()}
    if "control" in parts:
        share = 0.55 if "replay" in parts else 1.0
        found["control"] = bench_control(kernel, plan, args.rounds, start + share * args.seconds)
        costs = measured_costs(found["control"]) or costs
        print("measured costs:", json.dumps(costs), f"[{time.monotonic() - start:.0f} s]", flush=True)
        found["costs"] = costs
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1))
    if "replay" in parts:
        routings = [*ROUTINGS, *([f"trace:{args.trace}"] if args.trace else [])]
        found["replay"] = bench_replay(kernel, plan, routings, costs, args.steps, start + args.seconds)
        pathlib.Path(args.out).write_text(json.dumps(found, indent=1))
    print(f"done in {time.monotonic() - start:.0f} s, written to {args.out}")


if __name__ == "__main__":
    main()
