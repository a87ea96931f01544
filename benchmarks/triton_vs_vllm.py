"""The best config of our Triton fused MoE against the best config of vLLM's own, whole layers, in one run.

    python benchmarks/triton_vs_vllm.py --dtype bf16 --out OUT.json

Both run as in serving: alignment, GEMMs, activation, sum, captured in CUDA graphs with weights that are not in
L2. vLLM runs from its package where `import vllm` works; without it only our times are printed. Every config is
checked against float64 on poisoned memory first. Per workload, all plausible configs are timed once, the best
ones again in interleaved rounds; what is reported is the median of those rounds.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import triton

from rampwrap import schema
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.triton.moe.warm import warm
from rampwrap.measure.graph_timer import GraphTimer
from rampwrap.measure.timer import Measurement, Timed
from rampwrap.routing.workloads import Routing, Workload

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp8": 2e-2}
# Tokens an expert gets on average for which a block of so many rows is worth timing.
PLAUSIBLE = {16: (0, 48), 32: (0.5, 96), 64: (2, math.inf), 128: (12, math.inf), 256: (48, math.inf)}
FINALISTS = 8
ROUNDS = 5

Config = dict[str, Any]
Launch = Callable[[Config, dict[str, Any]], torch.Tensor]


@attrs.frozen
class Contender:
    """One implementation: how to launch it, its configs, and the name of its rows-per-block parameter."""

    name: str
    launch: Launch
    configs: Sequence[Config]
    block_m: str


@attrs.frozen
class Result:
    """One workload: the best config of each contender."""

    label: str
    num_tokens: int
    active_experts: int
    best: dict[str, tuple[Config, Measurement]]
    ranking: dict[str, list[tuple[Config, float]]]


def ours(shape: MoEShape) -> Contender:
    kernel = TritonFusedMoE(shape)
    return Contender(
        "rampwrap",
        lambda config, inputs: kernel.launch(config, **inputs),
        [dict(config) for config in kernel.configs],
        "block_m",
    )


def vllm_launch(config: Config, inputs: dict[str, Any]) -> torch.Tensor:
    """vLLM's Triton layer with a config of ours to choose."""
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config

    quant = None
    if "w13_scale" in inputs:
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        quant = fp8_w8a8_moe_quant_config(
            w1_scale=inputs["w13_scale"], w2_scale=inputs["w2_scale"], block_shape=[128, 128]
        )
    with override_config(config):
        out: torch.Tensor = fused_experts(
            inputs["hidden_states"],
            inputs["w13"],
            inputs["w2"],
            inputs["topk_weights"],
            inputs["topk_ids"],
            quant_config=quant,
        )
    return out


# Configs that were best for some workload of OLMoE on an H200 with this kernel, and their neighbours.
VLLM_KNOWN = [
    (16, 64, 64, 1, 4, 3), (16, 64, 64, 1, 4, 4), (16, 64, 64, 1, 4, 5), (16, 64, 128, 1, 4, 2), (16, 64, 128, 1, 4, 3),
    (16, 64, 128, 1, 4, 4), (16, 64, 256, 1, 4, 2), (16, 128, 64, 1, 4, 3), (16, 128, 64, 1, 4, 4), (16, 128, 64, 1, 8, 3),
    (16, 128, 128, 1, 4, 2), (16, 128, 128, 1, 4, 3), (16, 128, 128, 1, 8, 3), (16, 256, 64, 1, 8, 3), (16, 256, 128, 1, 8, 2),
    (32, 64, 64, 1, 4, 3), (32, 64, 128, 1, 4, 3), (32, 128, 64, 1, 4, 3), (32, 128, 64, 1, 4, 4), (32, 128, 64, 8, 4, 3),
    (32, 128, 128, 1, 4, 2), (32, 128, 128, 1, 4, 3), (32, 256, 64, 1, 8, 3), (32, 256, 128, 1, 8, 2), (64, 64, 64, 1, 4, 3),
    (64, 64, 128, 1, 4, 3), (64, 128, 64, 1, 4, 3), (64, 128, 64, 1, 4, 4), (64, 128, 64, 1, 8, 3), (64, 128, 64, 1, 8, 4),
    (64, 128, 64, 8, 4, 3), (64, 128, 128, 1, 4, 3), (64, 128, 128, 1, 8, 3), (64, 256, 64, 1, 4, 3), (64, 256, 64, 1, 8, 3),
    (64, 256, 64, 1, 8, 4), (64, 256, 64, 8, 8, 4), (128, 64, 64, 1, 4, 3), (128, 128, 64, 1, 4, 3), (128, 128, 64, 1, 8, 3),
    (128, 128, 64, 8, 8, 3), (128, 128, 64, 1, 8, 4), (128, 128, 128, 1, 8, 3), (128, 256, 64, 1, 8, 3), (128, 256, 64, 1, 8, 4),
    (128, 256, 64, 8, 8, 4), (128, 256, 64, 16, 8, 4), (128, 256, 64, 16, 8, 3),
]  # fmt: skip
VLLM_KNOWN_FP8 = [
    (block_m, block_n, 128, group_m, warps, stages)
    for block_m, block_n, warps in [
        (16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 256, 8), (32, 64, 4), (32, 128, 4), (32, 256, 8), (64, 64, 4),
        (64, 128, 4), (64, 128, 8), (64, 256, 8), (128, 64, 4), (128, 128, 4), (128, 128, 8),
    ]
    for stages in (3, 4, 5)
    for group_m in ((1,) if block_m < 64 else (1, 16))
]  # fmt: skip


def vllm_configs(shape: MoEShape) -> list[Config]:
    """The list above and every config that vLLM ships for this dtype on an H200 and a like number of experts."""
    import vllm.model_executor.layers.fused_moe as package

    keys = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    rows = set(VLLM_KNOWN_FP8 if shape.dtype == "fp8" else VLLM_KNOWN)
    suffix = ",dtype=fp8_w8a8,block_shape=[128,128]" if shape.dtype == "fp8" else ""
    assert package.__file__ is not None
    for path in (pathlib.Path(package.__file__).parent / "configs").iterdir():
        stem = path.name.removesuffix(".json")
        if stem in {
            f"E={e},N={n},device_name=NVIDIA_H200{suffix}" for e in (64, 128) for n in (384, 640, 768, 1024, 1280)
        }:
            for config in json.loads(path.read_text()).values():
                if isinstance(config, dict):
                    rows.add(tuple(config[key] for key in keys))
    return [dict(zip(keys, row, strict=True)) for row in sorted(rows)]


def vllm_contender(shape: MoEShape) -> Contender | None:
    """None where vLLM cannot be imported; the reason goes to stderr."""
    try:
        configs = vllm_configs(shape)
    except Exception as error:
        print(f"without vLLM: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return Contender("vllm", vllm_launch, configs, "BLOCK_SIZE_M")


def run_vllm_once(shape: MoEShape, configs: Sequence[Config]) -> None:
    """Compiles by running on few experts; only tensor layouts, not their sizes, decide what is compiled."""
    small = attrs.evolve(shape, num_experts=32, num_local_experts=32)
    kernel = TritonFusedMoE(small)
    for num_tokens in (1, 2, 64):
        inputs = kernel.inputs(small, draw(small, Workload(num_tokens, Routing("uniform"))))
        for config in configs:
            try:
                vllm_launch(config, inputs)
            except Exception as error:
                print(f"vllm {config}: {error}".splitlines()[0], file=sys.stderr)
    torch.cuda.synchronize()


def warm_vllm(shape: MoEShape, configs: Sequence[Config], processes: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.model_executor.layers.fused_moe", "rampwrap.adapters.triton_fused_moe"])
    with context.Pool(processes) as pool:
        pool.starmap(run_vllm_once, [(shape, configs[i::processes]) for i in range(processes)])


def draw(shape: MoEShape, workload: Workload) -> torch.Tensor:
    return torch.from_numpy(workload.topk_ids(shape.num_experts, shape.top_k)).cuda()


def error_of(out: torch.Tensor, reference: torch.Tensor) -> float:
    error = float((out.double() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else math.inf


def gate(contender: Contender, shape: MoEShape, kernel: TritonFusedMoE, token_counts: Sequence[int]) -> Contender:
    """The contender with those configs whose output is right for every token count."""
    good = list(contender.configs)
    for num_tokens in token_counts:
        inputs = kernel.inputs(shape, draw(shape, Workload(num_tokens, Routing("zipf", "1.2"), seed=7)))
        reference = kernel.reference(shape, inputs)
        poison = 3 * num_tokens * shape.top_k * max(shape.hidden_size, 2 * shape.intermediate_size)
        kept = []
        for config in good:
            # What the layer allocates next lands in memory that holds NaN.
            torch.full((poison,), float("nan"), dtype=torch.bfloat16, device="cuda")
            try:
                error = error_of(contender.launch(config, inputs), reference)
            except Exception as failure:
                print(f"{contender.name} {config}: {failure}".splitlines()[0], file=sys.stderr)
                continue
            if error < TOLERANCE[shape.dtype]:
                kept.append(config)
            else:
                print(f"WRONG {contender.name} {format_config(config)} T={num_tokens}: {error:.3g}", file=sys.stderr)
        good = kept
    return attrs.evolve(contender, configs=good)


def turns(contender: Contender, config: Config, batches: Sequence[dict[str, Any]]) -> list[Callable[[], torch.Tensor]]:
    return [lambda inputs=inputs: contender.launch(config, inputs) for inputs in batches]  # type: ignore[misc]


def race(
    shape: MoEShape,
    kernel: TritonFusedMoE,
    contenders: Sequence[Contender],
    workload: Workload,
    quick: GraphTimer,
    final: GraphTimer,
) -> Result:
    """Times one workload: everything plausible once, the finalists in interleaved rounds."""
    ids = draw(shape, workload)
    counts = torch.bincount(ids.flatten(), minlength=shape.num_experts)
    active = int((counts > 0).sum())
    shifts = quick.rotations(shape.weight_bytes // shape.num_experts * active)
    inputs = kernel.inputs(shape, ids)
    batches = [
        inputs | {"topk_ids": ((ids + i * shape.num_experts // shifts) % shape.num_experts).int().contiguous()}
        for i in range(shifts)
    ]
    per_expert = ids.numel() / shape.num_experts
    ranking: dict[str, list[tuple[Config, float]]] = {}
    timed: list[tuple[str, Config, Timed]] = []
    for contender in contenders:
        times = []
        for config in contender.configs:
            low, high = PLAUSIBLE[config[contender.block_m]]
            if low <= per_expert <= high:
                times.append((config, min(quick.prepare(turns(contender, config, batches)).sample())))
        quick.release()
        ranking[contender.name] = sorted(times, key=lambda item: item[1])
    for contender in contenders:
        for config, _ in ranking[contender.name][:FINALISTS]:
            timed.append((contender.name, config, final.prepare(turns(contender, config, batches))))
    samples: list[list[float]] = [[] for _ in timed]
    for _ in range(ROUNDS):
        for found, (_, _, call) in zip(samples, timed, strict=True):
            found.extend(call.sample())
    final.release()
    best: dict[str, tuple[Config, Measurement]] = {}
    for (name, config, _), found in zip(timed, samples, strict=True):
        measured = Measurement.of(found)
        if name not in best or measured.us < best[name][1].us:
            best[name] = (config, measured)
    return Result(workload.label, workload.num_tokens, active, best, {k: v[:24] for k, v in ranking.items()})


def report(shape: MoEShape, result: Result, start: float) -> None:
    floor = shape.weight_bytes / shape.num_experts * result.active_experts / 4.3e6
    line = f"[{time.monotonic() - start:4.0f}s] {result.label:18s} active {result.active_experts:3d} floor {floor:6.1f}"
    for name, (config, measured) in result.best.items():
        row = "x".join(str(int(value)) for value in config.values())
        line += f"  {name} {measured.us:7.1f} us +-{measured.spread * 50:.1f}% {row:22s}"
    if len(result.best) == 2:
        line += f"  {speedup(result):.3f}x"
    print(line, flush=True)


def speedup(result: Result) -> float:
    return result.best["vllm"][1].us / result.best["rampwrap"][1].us


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "qwen3-30b"], choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp8"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[2**i for i in range(13)])
    parser.add_argument("--routing", nargs="+", default=["uniform", "zipf:1.2", "dirichlet:0.1"])
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--out", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    start = time.monotonic()
    device = Device.current()
    results: dict[str, list[Result]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name in arguments.shapes:
        shape = attrs.evolve(SHAPES[name], dtype=arguments.dtype)
        contenders = [ours(shape)]
        for config, reason in zip(
            contenders[0].configs, warm(shape, contenders[0].configs, processes=arguments.processes), strict=True
        ):
            if reason:
                print(f"rampwrap {format_config(config)}: {reason}", file=sys.stderr)
        vllm = vllm_contender(shape)
        if vllm is not None:
            warm_vllm(shape, vllm.configs, arguments.processes)
            contenders.append(vllm)
        print(f"[{time.monotonic() - start:4.0f}s] {name}: {shape}: compiled", flush=True)
        kernel = TritonFusedMoE(shape)
        contenders = [gate(contender, shape, kernel, (1, 48, 700)) for contender in contenders]
        sizes[name] = {contender.name: len(contender.configs) for contender in contenders}
        print(f"[{time.monotonic() - start:4.0f}s] {name}: right configs {sizes[name]}", flush=True)
        quick = GraphTimer(device.l2_bytes, shape.weight_bytes, target_us=150, replays=2)
        final = GraphTimer(device.l2_bytes, shape.weight_bytes, target_us=600, replays=4, warm_s=0.0)
        results[name] = []
        for num_tokens in arguments.batch_size:
            for routing in arguments.routing:
                workload = Workload(num_tokens, Routing.parse(routing))
                results[name].append(race(shape, kernel, contenders, workload, quick, final))
                report(shape, results[name][-1], start)
        del kernel, contenders
        torch.cuda.empty_cache()
    both = {name: [speedup(r) for r in rows] for name, rows in results.items() if len(rows[0].best) == 2}
    for name, values in both.items():
        slower = sum(value < 1 for value in values)
        print(
            f"{name}: geometric mean {geometric_mean(values):.3f}x, worst {min(values):.3f}x, slower on {slower}/{len(values)}"
        )
    if both:
        print(
            f"all: geometric mean {geometric_mean([v for values in both.values() for v in values]):.3f}x over vLLM's best config"
        )
    if arguments.out is not None:
        raw = {
            "command": " ".join(sys.argv),
            "device": schema.dump(device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
            "dtype": arguments.dtype,
            "configs": sizes,
            "speedup": both,
            "results": {name: [attrs.asdict(result) for result in rows] for name, rows in results.items()},
        }
        arguments.out.write_text(json.dumps(raw, indent=1))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
