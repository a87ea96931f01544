"""Best config against best config, whole layers, any adapters, one run.

    python benchmarks/race.py --kernels triton_fused_moe cute_moe vllm_fused_moe --shapes qwen3-30b --dtype fp8 --out OUT.json

Adapters go by the names that `rampwrap profile --kernel` knows, `package.module:factory` among them. Those of a layer form
a `Portfolio`, so that they read the same weights and routings (a kernel with another layout gets its own copy), and all
their configs are timed in turn: alignment, quantisation, GEMMs, activation and sum, in CUDA graphs, weights not in L2.

1. Every config runs on poisoned memory against float64; one that is wrong is named and left out.
2. A short sweep keeps the --most-configs of each kernel that are near its best somewhere; 0 keeps all.
3. The race: --rounds samples of each in turn. Per workload the best median of a kernel counts, with its spread
   ((p80 - p20) / median), its share of the roofline, max(bytes / copy bandwidth, FLOPs / peak), and how many times longer
   each rival takes than the first kernel.

What is absent or cannot run the layer is left out with the reason. A race cut short by --budget-seconds holds the
workloads that were finished. Exits 1 if nothing was raced.
"""

import argparse
import inspect
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from common import geometric_mean, stamp

from rampwrap.errors import RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device, device_of
from rampwrap.kernel.portfolio import Memory, Portfolio
from rampwrap.kernel.protocol import Config, Kernel, format_config, kernel_version, refusal
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.measure.full import profile, roofline_us
from rampwrap.measure.sweep import sweep
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Routing, Workload, workload_grid
from rampwrap.testing.conformance import TOLERANCE

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
ROUTINGS = ("uniform", "zipf:1.2", "dirichlet:0.1")
CHECK_TOKENS = (1, 64)


def measured(device: Device) -> Device:
    """With the copy bandwidth of this GPU as it is now: read plus written by a copy of 2 GB, the best of five."""
    if device.name == "simulated" or not torch.cuda.is_available():
        return device
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return attrs.evolve(device, copy_gbps=2 * source.numel() / best / 1e6)


def poisoned(kernel: Kernel, tokens: int, like: torch.Tensor) -> dict[str, Any]:
    """The workspace and the output that a launch takes, full of NaN."""
    given: dict[str, Any] = {}
    takes = inspect.signature(kernel.launch).parameters
    if "workspace" in takes and hasattr(kernel, "workspace"):
        given["workspace"] = memory = kernel.workspace(tokens, like.device)
        for its in memory.by_member.values() if isinstance(memory, Memory) else [memory]:
            for name, tensor in attrs.asdict(its, recurse=False).items() if attrs.has(type(its)) else ():
                if isinstance(tensor, torch.Tensor) and name != "marks":  # zero between launches
                    tensor.view(torch.uint8).fill_(0xFF)
    if "out" in takes:
        given["out"] = torch.full_like(like, torch.nan)
    return given


def wrong(kernel: Portfolio, shape: MoEShape, seed: int) -> dict[str, str]:
    """Configs that must not race, each with the reason: refused, raising, or off float64 by more than the tolerance."""
    found = {format_config(c): why for c in kernel.configs if (why := refusal(kernel, c, shape)) is not None}
    if not hasattr(kernel.first, "reference"):
        print(f"  {kernel.first.name} has no reference: results are not checked", file=sys.stderr)
        return found
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for tokens in CHECK_TOKENS:
        ids = Workload(tokens, Routing.parse("zipf:1.2"), seed=seed).topk_ids(shape.num_experts, shape.top_k)
        inputs = kernel.inputs(shape, torch.from_numpy(ids).to(where), seed=seed)
        expected = kernel.reference(shape, inputs)
        left = [config for config in kernel.configs if format_config(config) not in found]
        kernel.precompile(left, **inputs)
        for config in left:
            try:
                out = kernel.launch(config, **inputs, **poisoned(kernel, tokens, inputs["hidden_states"]))
                off = float((out.double() - expected).norm() / expected.norm())
            except Exception as error:
                found[format_config(config)] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            member = kernel.untagged(config)[0]
            if not off < getattr(member, "tolerance", TOLERANCE[shape.dtype]):
                found[format_config(config)] = f"relative error {off:.3g} at {tokens} tokens"
    return found


def contenders(names: Sequence[str], shape: MoEShape) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels that are here and can run the layer, and why the others are not."""
    made: list[Kernel] = []
    left_out: dict[str, str] = {}
    for name in names:
        try:
            kernel = make_kernel(name, shape)
            Portfolio([*made, kernel], extra_memory=True)
            made.append(kernel)
        except (RampwrapError, ImportError) as error:
            left_out[name] = str(error)
            print(f"  without {name}: {error}", file=sys.stderr)
    return made, left_out


@attrs.frozen(eq=False)
class Raced:
    """What a race of one layer timed."""

    kernels: list[Kernel]
    left_out: dict[str, str]
    wrong: dict[str, str]
    table: Timings
    device: Device


def timed(shape: MoEShape, a: argparse.Namespace) -> Raced | None:
    """Times the configs that are right and near the best somewhere; None where no kernel can run the layer."""
    kernels, left_out = contenders(a.kernels, shape)
    if not kernels:
        return None
    both = Portfolio(kernels, extra_memory=True)
    rows = workload_grid(a.tokens, [Routing.parse(text) for text in a.routings], seed=a.seed)
    bad = wrong(both, shape, a.seed)
    kept: list[Config] = []
    for kernel in kernels:
        right = [c for c in kernel.configs if format_config(Portfolio.tagged(kernel, c)) not in bad]
        if right and a.most_configs:
            right = sweep(kernel, shape, a.most_configs, workloads=rows, configs=right, quiet=True, seed=a.seed)
        kept += [Portfolio.tagged(kernel, config) for config in right]
        print(f"  {kernel.name}: {len(right)} of {len(kernel.configs)} configs race", flush=True)
    if not kept:
        return None
    quiet = not sys.stderr.isatty()
    table = profile(
        both, shape, rows, configs=kept, rounds=a.rounds, budget_s=a.budget_seconds, quiet=quiet, seed=a.seed
    )
    return Raced(kernels, left_out, bad, table, measured(device_of(both)))


def race(shape: MoEShape, a: argparse.Namespace) -> dict[str, Any] | None:
    """The race of one layer; None where no kernel can run it."""
    found = timed(shape, a)
    if found is None:
        return None
    return {
        "shape": str(shape),
        "copy_gbps": found.device.copy_gbps,
        "versions": {kernel.name: kernel_version(kernel) for kernel in found.kernels},
        "left_out": found.left_out,
        "wrong": found.wrong,
        "rows": [line(found.table, row, found.device) for row in range(len(found.table.us))],
    }


def line(table: Timings, row: int, device: Device) -> dict[str, Any]:
    """One workload: the best config of each kernel."""
    floor = float(roofline_us(device, table.shape, table.counts[row])[0])
    best: dict[str, Any] = {}
    for column in np.argsort(table.us[row]).tolist():  # NaN last
        config = dict(table.configs[column])
        name, us = config.pop("kernel"), float(table.us[row, column])
        if name not in best and np.isfinite(us):
            spread = None if table.spread is None else float(table.spread[row, column])
            best[name] = {"us": us, "spread": spread, "roofline_share": floor / us, "config": config}
    active = int(np.count_nonzero(table.counts[row]))
    tokens = int(table.num_tokens[row])
    return {"label": table.label[row], "tokens": tokens, "active_experts": active, "roofline_us": floor, "best": best}


def report(title: str, found: dict[str, Any]) -> dict[str, Any]:
    """Prints the table; for each rival, how many times longer it takes than the first kernel."""
    names = list(found["versions"])
    first, *rivals = names
    print(f"{title}: {found['copy_gbps'] or 0:.0f} GB/s in a copy; us (spread, share of the roofline)")
    print(f"  {'workload':26s} {'active':>6s}  " + "  ".join(f"{name:>22s}" for name in names))
    for row in found["rows"]:
        cells = []
        for name in names:
            its = row["best"].get(name)
            spread = "" if its is None or its["spread"] is None else f"{its['spread']:.1%}, "
            cells.append("-" if its is None else f"{its['us']:.1f} ({spread}{its['roofline_share']:.0%})")
        print(f"  {row['label']:26s} {row['active_experts']:6d}  " + "  ".join(f"{cell:>22s}" for cell in cells))
    over = {}
    for rival in rivals:
        both = [row["best"] for row in found["rows"] if first in row["best"] and rival in row["best"]]
        if both:
            ratios = [its[rival]["us"] / its[first]["us"] for its in both]
            over[rival] = {"mean": geometric_mean(ratios), "worst": min(ratios), "workloads": len(ratios)}
            print(
                f"  {first} over {rival}: {over[rival]['mean']:.3f}x, worst {min(ratios):.3f}x ({len(ratios)} workloads)"
            )
    return found | {"over": over}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", required=True, metavar="NAME", help="the first is what others are over")
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b"], choices=sorted(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--most-configs", type=int, default=40, help="of each kernel")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each config")
    parser.add_argument("--budget-seconds", type=float, help="of a layer's race, sweeps not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    races: dict[str, Any] = {}
    for name in a.shapes:
        for dtype in a.dtype:
            found = race(attrs.evolve(SHAPES[name], dtype=dtype), a)
            if found is not None:
                races[f"{name} {dtype}"] = report(f"{name} {dtype}", found)
            if a.out:
                a.out.write_text(json.dumps(stamp() | {"races": races}, indent=1) + "\n", encoding="utf-8")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return 0 if races else 1


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
