"""Whole layers of prefill batches against layers around DeepGEMM, and against its GEMMs alone; one GPU, one run.

    python benchmarks/prefill.py --shapes qwen3-30b olmoe qwen3-235b-tp4 --out OUT.json

For each batch, in CUDA graphs that are replayed in turn, in another order each round, on the same weights:

    cute_moe    ours: the fastest configs of a survey of all that are built, but for the one-launch form
    deep_gemm   every config of the adapter `deep_gemm`: DeepGEMM's GEMMs with our glue
    vllm        the same GEMMs with vLLM's glue, FP8 only, where vLLM is installed; tokens are quantised by our launch
    gemms       the two GEMMs alone on exactly the rows that the routing fills, which no layer in a graph can know

1. DeepGEMM compiles in --processes at a time.
2. Every contender runs on poisoned memory against float64, padding among the ids; one that is wrong is named and left out.
3. The race: --rounds replays of each. Median, 20th and 80th percentile; share of the roofline
   max(weights / copy bandwidth, FLOPs / peak) without padding.

Exits 1 if nothing was raced. Batches come in the order given; --budget-seconds ends the race after the one it falls in.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from common import geometric_mean, stamp
from race_check import poisoned
from race_field import measured

from rampwrap.adapters.deep_gemm import MASKED_MAX_SLOTS, find
from rampwrap.errors import RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.quantise import quantise_rows
from rampwrap.kernels.triton.rows import CONTIGUOUS, MASKED, Routed, place
from rampwrap.measure.full import roofline_us
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.conformance import TOLERANCE

LAYERS = {
    **SHAPES,
    "qwen3-235b-tp4": MoEShape(128, 8, 4096, 384),
    "deepseek-v3-ep8": MoEShape(
        32, 1, 7168, 2048
    ),  # of one rank, tokens as they arrive: one for each expert they visit
}
ROUTINGS = ("uniform", "zipf:1.2", "dirichlet:0.1")
CHECK_TOKENS = (30, 700)
COMPILE_SECONDS = 120
"Between two results."
GRAPH_US = 1500.0
"Of launches in one graph."
OURS, SURVIVORS = "cute_moe", 3
"Ours, and how many of its configs race."
Call = Callable[[], Any]


@attrs.frozen
class Batch:
    """A layer's arguments, and its name."""

    shape: MoEShape
    label: str
    inputs: dict[str, Any]
    counts: Any

    @classmethod
    def make(cls, shape: MoEShape, tokens: int, routing: str, weights: dict[str, Any], seed: int) -> "Batch":
        work = Workload(tokens, Routing.parse(routing), seed=seed)
        ids = work.topk_ids(shape.num_experts, shape.top_k).astype(np.int32)
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(tokens, shape.hidden_size, generator=generator, device="cuda").bfloat16()
        inputs = {
            "hidden_states": x,
            "topk_weights": torch.rand(tokens, shape.top_k, generator=generator, device="cuda") / shape.top_k,
            "topk_ids": torch.from_numpy(ids).cuda(),
        }
        counts = np.bincount(ids.ravel(), minlength=shape.num_experts)
        return cls(shape, f"{tokens} {routing}", inputs | weights, counts)


def vllm_layer(batch: Batch) -> Call:
    """DeepGEMM's contiguous GEMMs with vLLM's glue.

    Raises:
        ImportError: vLLM is not here.
    """
    from vllm.model_executor.layers.fused_moe.deep_gemm_utils import (
        deepgemm_moe_permute,
        deepgemm_unpermute_and_reduce,
    )
    from vllm.model_executor.layers.quantization.utils.fp8_utils import silu_mul_per_token_group_quant_fp8_colmajor

    gemm, its = find().m_grouped_fp8_gemm_nt_contiguous, batch.inputs
    x, ids = its["hidden_states"], its["topk_ids"]
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(len(x), x.shape[1] // GROUP, dtype=torch.float32)
    out = torch.full_like(x, torch.nan)

    def run() -> torch.Tensor:
        quantise_rows(x, q, scale)
        rows, rows_scale, experts, back, _ = deepgemm_moe_permute(
            q, scale, ids, batch.shape.num_experts, None, None, aq_out=None
        )
        gate_up = x.new_empty(len(rows), 2 * batch.shape.intermediate_size)
        gemm((rows, rows_scale), (its["w13"], its["w13_scale"]), gate_up, experts, disable_ue8m0_cast=True)
        h, h_scale = silu_mul_per_token_group_quant_fp8_colmajor(gate_up, None, use_ue8m0=False)
        y = x.new_empty(len(rows), x.shape[1])
        gemm((h, h_scale), (its["w2"], its["w2_scale"]), y, experts, disable_ue8m0_cast=True)
        deepgemm_unpermute_and_reduce(y, ids, its["topk_weights"], back, None, out)
        return out

    return run


def gemms_alone(batch: Batch, kernel: Any) -> Call:
    """Both GEMMs of a batch whose rows are as many as its routing fills, padded to 128 by expert."""
    its, shape = batch.inputs, batch.shape
    ids, memory = its["topk_ids"], kernel.workspace(len(its["hidden_states"]))
    blocks = align_tokens(ids, 128, shape.num_experts)
    at = place(blocks, CONTIGUOUS, memory.of_slot, memory.layout)
    rows, routed = int(blocks.num_tokens_post_padded), Routed(ids, None, shape.num_experts, at)
    fp8 = memory.scale is not None

    def operand(columns: int, fill: Callable[[torch.Tensor, torch.Tensor | None], None]) -> Any:
        a = torch.zeros(at.num_rows, columns, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device="cuda")
        scale = torch.ones(1, columns // GROUP, at.num_rows, device="cuda") if fp8 else None
        fill(a, scale)
        return a[:rows].clone(), None if scale is None else scale[:, :, :rows].contiguous()

    gate_up = torch.empty(rows, 2 * shape.intermediate_size, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(rows, shape.hidden_size, dtype=torch.bfloat16, device="cuda")
    experts = at.layout[:rows].clone()
    a = operand(shape.hidden_size, lambda into, scale: routed.scatter(its["hidden_states"], into, scale))
    up = (its["w13"], its["w13_scale"]) if fp8 else its["w13"]
    down = (its["w2"], its["w2_scale"]) if fp8 else its["w2"]
    multiply = functools.partial(kernel._multiply, CONTIGUOUS, of_rows=experts, expected=1)
    multiply(*a, up, gate_up)
    h = operand(shape.intermediate_size, lambda into, scale: routed.activate(gate_up, into, scale))

    def run() -> None:
        multiply(*a, up, gate_up)
        multiply(*h, down, y)

    return run


def layers(kind: str, batch: Batch, kernel: Any, memory: Any) -> dict[str, Call]:
    """A launch of every config but the one-launch forms, and masked ones that by the size of the batch run as others."""
    given = {**batch.inputs, "workspace": memory, "out": torch.empty_like(batch.inputs["hidden_states"])}
    masked = batch.inputs["topk_ids"].numel() <= MASKED_MAX_SLOTS
    configs = [c for c in kernel.configs if c.get("form") != "one" and (masked or c.get("layout") != MASKED)]
    return {f"{kind} {format_config(config)}": functools.partial(kernel.launch, config, **given) for config in configs}


def random_weights(kernel: Any, shape: MoEShape, seed: int) -> dict[str, Any]:
    """w13, w2 and their scales."""
    made = kernel.inputs(shape, torch.zeros(1, shape.top_k, dtype=torch.int32, device="cuda"), seed=seed)
    return {name: made[name] for name in ("w13", "w2", "w13_scale", "w2_scale") if name in made}


def compile_part(job: tuple[MoEShape, str, list[int], list[str], int]) -> str:
    """Launches one contender on every batch, which is when DeepGEMM compiles; weights that nobody wrote are enough."""
    shape, what, all_tokens, routings, seed = job
    fp8, experts = shape.dtype == "fp8", shape.num_experts
    h, i, kind = shape.hidden_size, shape.intermediate_size, torch.float8_e4m3fn if fp8 else torch.bfloat16
    try:
        kernel: Any = make_kernel("deep_gemm", shape)
        weights: dict[str, Any] = {}
        for name, rows, columns in (("w13", 2 * i, h), ("w2", h, i)):
            weights[name] = torch.empty(experts, rows, columns, dtype=kind, device="cuda")
            if fp8:
                weights[f"{name}_scale"] = torch.ones(experts, rows // GROUP, columns // GROUP, device="cuda")
        for tokens in all_tokens:
            for routing in routings if what == "gemms" else routings[:1]:
                batch = Batch.make(shape, tokens, routing, weights, seed)
                if what == "gemms":
                    gemms_alone(batch, kernel)()
                elif what == "vllm":
                    vllm_layer(batch)()
                else:
                    layers("deep_gemm", batch, kernel, None).get(what, lambda: None)()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    except Exception as error:
        return f"{shape} {what}: {type(error).__name__}: {error}"[:300]
    return ""


def compile_all(shapes: list[MoEShape], a: argparse.Namespace) -> None:
    """`compile_part` of everything, in processes; what takes too long is compiled when it is first launched."""
    tokens, first, then = [*a.tokens, *a.few_tokens, *CHECK_TOKENS], [], []
    for shape in shapes:
        parts = [f"deep_gemm {format_config(config)}" for config in make_kernel("deep_gemm", shape).configs]
        first += [(shape, part, tokens, a.routings, a.seed) for part in parts]
        # These run kernels of the contiguous layout, and find most of them compiled.
        others = ("gemms", "vllm") if shape.dtype == "fp8" else ("gemms",)
        then += [(shape, part, tokens, a.routings, a.seed) for part in others]
    with multiprocessing.get_context("spawn").Pool(a.processes) as pool:
        told = pool.imap_unordered(compile_part, first + then)
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in first + then:
                if reason := told.next(timeout=COMPILE_SECONDS):
                    print(f"  not compiled: {reason}", file=sys.stderr, flush=True)


def wrong(shape: MoEShape, kernels: dict[str, Any], weights: dict[str, Any], seed: int) -> dict[str, str]:
    """Contenders off float64 by more than the tolerance, or raising; every error is printed."""
    found: dict[str, str] = {}

    def judge(name: str, call: Call, expected: torch.Tensor) -> None:
        try:
            off = float((call().double() - expected).norm() / expected.norm())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"    {name}: {found[name]}", flush=True)
            return
        print(f"    {name}: {off:.5f}", flush=True)
        if not off < TOLERANCE[shape.dtype]:
            found[name] = f"relative error {off:.3g}"

    for tokens, routing in itertools.product(CHECK_TOKENS, ("uniform", "dirichlet:0.1")):
        print(f"  {shape.dtype} {tokens} {routing}", flush=True)
        batch = Batch.make(shape, tokens, routing, weights, seed)
        plain, ids = batch.inputs, batch.inputs["topk_ids"].clone()
        ids[1::4], ids[2::4] = -1, shape.num_experts
        ids[3, 0], ids[7, -1] = -1, shape.num_experts
        real = (ids >= 0) & (ids < shape.num_experts)
        padded = attrs.evolve(batch, inputs=plain | {"topk_ids": ids})
        same = plain | {"topk_weights": plain["topk_weights"].masked_fill(~real, 0.0)}
        for kind, kernel in kernels.items():
            for its, expected in ((batch, plain), (padded, same)):
                expected_out = kernel.reference(shape, expected)
                for name in layers(kind, its, kernel, None):
                    # One at a time: a workspace full of NaN for each.
                    given = poisoned(kernel, tokens, plain["hidden_states"])
                    config = {format_config(c): c for c in kernel.configs}[name.removeprefix(f"{kind} ")]
                    judge(name, functools.partial(kernel.launch, config, **its.inputs, **given), expected_out)
        if shape.dtype == "fp8":
            judge("vllm", lambda its=batch: vllm_layer(its)(), kernels["deep_gemm"].reference(shape, plain))
    return found


def captured(call: Call) -> tuple[Any, int]:
    """A graph of some launches, and how many."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    count = max(2, min(30, int(GRAPH_US / (start.elapsed_time(end) * 1000))))
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        for _ in range(count):
            call()
    torch.cuda.current_stream().wait_stream(side)
    return graph, count


def timed(graphs: dict[str, tuple[Any, int]], rounds: int, warm_s: float, seed: int) -> dict[str, dict[str, float]]:
    """Microseconds of a launch: median and percentiles of replays in turn."""
    rng, names = np.random.default_rng(seed), list(graphs)
    until = time.monotonic() + warm_s
    while time.monotonic() < until:
        for graph, _ in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in rng.permutation(names).tolist():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[name][0].replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    found = {}
    for name, pairs in events.items():
        samples = np.array([start.elapsed_time(end) for start, end in pairs]) * 1000 / graphs[name][1]
        low, us, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
        found[name] = {"us": us, "p20": low, "p80": high, "min": float(samples.min()), "max": float(samples.max())}
    return found


def race_batch(batch: Batch, kernels: dict[str, Any], memories: dict[str, Any], bad: dict[str, str], rounds: int,
               device: Device, seed: int) -> dict[str, Any]:  # fmt: skip
    """One row."""
    calls: dict[str, Call] = {}
    for kind, kernel in kernels.items():
        right = {n: call for n, call in layers(kind, batch, kernel, memories[kind]).items() if n not in bad}
        if kind == OURS:
            survey = timed({name: captured(call) for name, call in right.items()}, 3, 0.02, seed)
            right = {name: right[name] for name in sorted(survey, key=lambda name: survey[name]["us"])[:SURVIVORS]}
        calls |= right
    if batch.shape.dtype == "fp8" and "vllm" not in bad:
        calls["vllm"] = vllm_layer(batch)
    calls["gemms"] = gemms_alone(batch, kernels["deep_gemm"])
    graphs = {name: captured(call) for name, call in calls.items()}
    times = timed(graphs, rounds, 0.1, seed)
    floor = float(roofline_us(device, batch.shape, batch.counts)[0])
    padded = int((-(-batch.counts // 128) * 128).sum())
    best = {kind: min((name for name in times if name.split()[0] == kind), key=lambda name: times[name]["us"])
            for kind in dict.fromkeys(name.split()[0] for name in times)}  # fmt: skip
    return {"batch": batch.label, "tokens": len(batch.inputs["hidden_states"]), "slots": int(batch.counts.sum()),
            "active_experts": int(np.count_nonzero(batch.counts)), "rows_padded_to_128": padded,
            "roofline_us": floor, "best": best, "times": times, "survey": {n: t["us"] for n, t in survey.items()}}  # fmt: skip


def line(name: str, row: dict[str, Any]) -> str:
    """One row for people."""
    base = row["times"][row["best"][OURS]]
    cells = []
    for kind, which in row["best"].items():
        its = row["times"][which]
        spread = (its["p80"] - its["p20"]) / its["us"]
        ratio = "" if kind == OURS else f", {its['us'] / base['us']:.3f}x"
        cells.append(f"{kind} {its['us']:.1f} ({spread:.1%}, {row['roofline_us'] / its['us']:.0%}{ratio})")
    return (
        f"{name} {row['batch']:22s} " + "  ".join(cells) + f"   [{row['best'][OURS]} | {row['best'].get('deep_gemm')}]"
    )


def plan(a: argparse.Namespace) -> Iterator[tuple[str, MoEShape, list[tuple[int, str]]]]:
    """(name, shape, batches) in the order in which they race."""
    for name, dtype in itertools.chain(((n, "fp8") for n in a.shapes), ((n, "bf16") for n in a.bf16_shapes)):
        rows = list(itertools.product(a.tokens, a.routings))
        rows += [(tokens, "uniform") for tokens in a.few_tokens if dtype == "fp8"]
        yield f"{name} {dtype}", attrs.evolve(LAYERS[name], dtype=dtype), rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["qwen3-30b", "olmoe"], choices=sorted(LAYERS), help="in FP8")
    parser.add_argument("--bf16-shapes", nargs="*", default=[], choices=sorted(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--few-tokens", nargs="*", type=int, default=[], help="further batches in FP8, uniform")
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--processes", type=int, default=8, help="that compile at a time")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="of the whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    began, layers = time.monotonic(), list(plan(a))
    try:
        compile_all([shape for _, shape, _ in layers], a)
    except RampwrapError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    device = measured(Device.current())
    found: dict[str, Any] = stamp() | {"copy_gbps": device.copy_gbps, "layers": {}}
    for name, shape, batches in layers:
        kernels = {member: make_kernel(member, shape) for member in ("cute_moe", "deep_gemm")}
        weights = random_weights(kernels["cute_moe"], shape, a.seed)
        bad = wrong(shape, kernels, weights, a.seed)
        its = found["layers"][name] = {"shape": str(shape), "wrong": bad, "rows": []}
        its["versions"] = {member: str(getattr(kernel, "version", "")) for member, kernel in kernels.items()}
        most = max(tokens for tokens, _ in batches)
        memories = {member: kernel.workspace(most) for member, kernel in kernels.items()}  # type: ignore[attr-defined]
        for tokens, routing in batches:
            if time.monotonic() - began > a.budget_seconds:
                print(f"{name}: out of time before {tokens} {routing}", flush=True)
                break
            batch = Batch.make(shape, tokens, routing, weights, a.seed)
            row = race_batch(batch, kernels, memories, bad, a.rounds, device, a.seed)
            its["rows"].append(row)
            print(line(name, row), flush=True)
            if a.out:
                a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for kind in ("deep_gemm", "vllm", "gemms"):
            both = [row for row in its["rows"] if kind in row["best"]]
            ratios = [row["times"][row["best"][kind]]["us"] / row["times"][row["best"][OURS]]["us"] for row in both]
            if ratios:
                print(f"{name}: {kind} over ours {geometric_mean(ratios):.3f}x, {min(ratios):.3f} to {max(ratios):.3f}x ({len(ratios)})", flush=True)  # fmt: skip
        print(f"{name} done after {time.monotonic() - began:.0f} s", flush=True)
        del kernels, weights, memories
        torch.cuda.empty_cache()
    return 0 if any(its["rows"] for its in found["layers"].values()) else 1


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
