"""The CuTe kernels, all configs, against vLLM's Triton kernel, ours, and Alpha-MoE's: whole layers, in one run.

    python benchmarks/cute.py --shapes qwen3-30b --dtype fp8 --out OUT
    python benchmarks/cute.py --shapes qwen3-30b --dtype fp8 --rivals --dispatch --out OUT

Every config is first checked against float64 on poisoned memory. All kernels are timed by the same profiler (CUDA
graphs, cold L2, interleaved rounds) on the same routings, with alignment, quantisation and sum; of each kernel the best
config of a workload counts. --dispatch takes the configs that are within --keep of the best anywhere, profiles them on
train and held-out workloads, and judges the dispatcher as `third_party.py` does. Tables and summary.json go to --out;
a run that was cut short goes on where it stopped.

Weights are random; vLLM comes from its package, Alpha-MoE is built outside this repository, and what is absent is left
out with the reason.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import third_party
import torch

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.compare.evaluate import replay
from rampwrap.errors import RampwrapError
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.measure.full import profile
from rampwrap.measure.sweep import worth_keeping
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Routing, Workload, workload_grid

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ROUTINGS = ("uniform", "zipf:1.2", "dirichlet:0.1")
# The published comparison ends at 4096 tokens; the larger batches show the compute-bound side.
JUDGED_TOKENS = 4096
CHECK_TOKENS = (1, 64)
WRONG = 0.05
"A relative error that no order of additions explains."


def copy_tb_s() -> float:
    """TB/s read plus written by a large copy on this GPU, the best of five."""
    a = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(6):
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return 2 * a.numel() / best / 1e9


def check(kernel: CuteFusedMoE) -> tuple[list[Config], dict[str, Any]]:
    """Launches every config on poisoned memory against float64: those that are right, and the errors."""
    shape = kernel.shape
    errors = np.zeros(len(kernel.configs))
    for tokens in CHECK_TOKENS:
        ids = torch.from_numpy(
            Workload(tokens, Routing.parse("zipf:1.2"), seed=7).topk_ids(shape.num_experts, shape.top_k)
        )
        inputs = kernel.inputs(shape, ids.cuda())
        expected, memory = kernel.reference(shape, inputs), kernel.workspace(tokens)
        for index, config in enumerate(kernel.configs):
            for tensor in attrs.asdict(memory, recurse=False).values():
                if isinstance(tensor, torch.Tensor):
                    tensor.view(torch.uint8).fill_(0xFF)
            out = kernel.launch(
                config, **inputs, workspace=memory, out=torch.full_like(inputs["hidden_states"], torch.nan)
            )
            off = float((out.double() - expected).norm() / expected.norm())
            errors[index] = max(errors[index], off if off == off else np.inf)
    found: dict[str, Any] = {"over": WRONG}
    for form in kernel.forms:
        mine = np.array([config["form"] == form for config in kernel.configs])
        found[form] = {
            "configs": int(mine.sum()),
            "worst": float(errors[mine].max()),
            "median": float(np.median(errors[mine])),
        }
        print(
            f"  {form}: {mine.sum()} configs, error {np.median(errors[mine]):.2g} median, {errors[mine].max():.2g} worst"
        )
    wrong = np.flatnonzero(errors > WRONG)
    found["wrong"] = {format_config(kernel.configs[index]): float(errors[index]) for index in wrong}
    for name, off in found["wrong"].items():
        print(f"  WRONG {name}: {off:.3g}", file=sys.stderr)
    return [config for config, off in zip(kernel.configs, errors, strict=True) if off <= WRONG], found


def table(name: str, shape: MoEShape, title: str, a: argparse.Namespace) -> tuple[Timings, dict[str, Any]] | None:
    """Times a kernel on every workload; None where it is absent or cannot run the shape."""
    start = time.monotonic()
    try:
        kernel: Any = CuteFusedMoE(shape, a.form) if name == "cute" else third_party.make(name, shape)
    except (RampwrapError, ImportError) as error:
        print(f"{name} {title}: left out, {error}", file=sys.stderr)
        return None
    print(f"{name} {title}: {len(kernel.configs)} configs of version {kernel.version}", flush=True)
    configs, checked = list(kernel.configs), {}
    if name == "cute":
        configs, checked = check(kernel)
        configs = [config for config in configs if config["group_m"] in a.group_m]
    else:
        third_party.warm(name, kernel, shape, a.processes)
    rows = workload_grid(a.tokens, [Routing.parse(text) for text in a.routings], "train", a.seed)
    timings = profile(
        kernel,
        shape,
        rows,
        configs=configs,
        out=a.out / f"sweep-{name}-{title}.npz",
        rounds=a.rounds,
        budget_s=max(30.0, a.budget_seconds - (time.monotonic() - start)),
        quiet=not sys.stderr.isatty(),
        seed=a.seed,
    )
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return timings, checked


def best(timings: Timings, row: int, keep: Sequence[int] | None = None) -> tuple[float, int]:
    """(us, config) of the fastest of all configs, or of some, at a workload."""
    us = (
        timings.us[row]
        if keep is None
        else np.where(np.isin(np.arange(timings.us.shape[1]), keep), timings.us[row], np.nan)
    )
    if np.isnan(us).all():
        return float("nan"), -1
    return float(np.nanmin(us)), int(np.nanargmin(us))


def compare(tables: dict[str, Timings], shape: MoEShape, bandwidth: float) -> dict[str, Any]:
    """Prints and returns, for each workload, the best of each kernel, the share of the copy bandwidth and TFLOP/s."""
    cute = tables["cute"]
    element = 1 if shape.dtype == "fp8" else 2
    of_form = {f: [i for i, c in enumerate(cute.configs) if c["form"] == f] for f in ("two", "one")}
    rivals = [name for name in tables if name != "cute"]
    print(
        f"  {'workload':26s} {'cute us':>8s} {'two':>8s} {'one':>8s} copy  TFLOP/s  "
        + "  ".join(f"{n:>7s}" for n in rivals)
        + "  best config"
    )
    rows: list[dict[str, Any]] = []
    for row in sorted(range(len(cute.us)), key=lambda r: (cute.num_tokens[r], cute.routing[r])):
        label, tokens = cute.label[row], int(cute.num_tokens[row])
        us, index = best(cute, row)
        active = int((cute.counts[row] > 0).sum())
        read = active * 3 * shape.hidden_size * shape.intermediate_size * element
        share = read / us / 1e6 / bandwidth
        flops = 6 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size / us / 1e6
        forms = {form: best(cute, row, mine)[0] for form, mine in of_form.items()}
        others = {
            name: best(tables[name], tables[name].label.index(label))[0]
            for name in rivals
            if label in tables[name].label
        }
        rows.append(
            {"label": label, "tokens": tokens, "active": active, "us": us, "config": dict(cute.configs[index]), "copy_share": share,
             "tflops": flops, "forms": forms, "rivals": others}
        )  # fmt: skip
        beside = "  ".join(f"{others[n] / us:6.2f}x" if n in others else "       " for n in rivals)
        print(
            f"  {label:26s} {us:8.1f} {forms['two']:8.1f} {forms['one']:8.1f} {share:4.0%} {flops:8.0f}  {beside}  {format_config(cute.configs[index])}"
        )
    judged = [r for r in rows if r["tokens"] <= JUDGED_TOKENS]
    found: dict[str, Any] = {"rows": rows, "copy_tb_s": bandwidth, "speedup": {}, "slower": []}
    for name in rivals:
        ratios = [r["rivals"][name] / r["us"] for r in judged if name in r["rivals"]]
        if ratios:
            found["speedup"][name] = third_party.geometric_mean(ratios)
            print(f"  {found['speedup'][name]:.3f}x {name} to {JUDGED_TOKENS} tokens, worst {min(ratios):.3f}x")
    for tokens in sorted({r["tokens"] for r in judged}):
        here = [r for r in judged if r["tokens"] == tokens and r["rivals"]]
        ratio = third_party.geometric_mean([min(r["rivals"].values()) / r["us"] for r in here]) if here else 1.0
        if ratio < 1 / 1.05:
            found["slower"].append({"tokens": tokens, "ratio": ratio})
            print(f"  slower than the best rival at {tokens} tokens: {ratio:.3f}x")
    return found


def judge_dispatch(timings: Timings, shape: MoEShape, title: str, a: argparse.Namespace) -> dict[str, Any]:
    """Headroom, regret and speedup of the dispatcher over these kernels' own static table, on held-out workloads."""
    kernel, configs = CuteFusedMoE(shape, a.form), worth_keeping(timings, a.most_configs, a.keep)
    print(
        f"dispatch {title}: {len(configs)} of {len(timings.configs)} configs are within {a.keep} of the best somewhere"
    )
    measured = profile(
        kernel,
        shape,
        third_party.workloads(a.trace, shape, a.seed),
        configs=configs,
        out=a.out / f"dispatch-cute-{title}.npz",
        rounds=a.rounds,
        budget_s=a.budget_seconds,
        quiet=not sys.stderr.isatty(),
        seed=a.seed,
    )
    found = third_party.figures(replay(measured, models=third_party.MODELS))
    third_party.report(f"cute {title}", found)
    return found | {"configs": len(configs)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b"], choices=sorted(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--form", default="both", choices=["two", "one", "prefill", "both"])
    parser.add_argument("--rivals", nargs="*", default=["triton", "vllm", "alpha"], choices=["triton", "vllm", "alpha"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--group-m", nargs="+", type=int, default=[1, 8], help="of the CuTe kernels")
    parser.add_argument("--dispatch", action="store_true", help="also judge the dispatcher over these configs")
    parser.add_argument(
        "--keep", type=float, default=1.05, help="configs this near to the best somewhere are dispatched"
    )
    parser.add_argument("--most-configs", type=int, default=96)
    parser.add_argument("--trace", nargs="*", default=[], help="files of recorded expert loads (.npz, .npy, .json)")
    parser.add_argument("--rounds", type=int, default=2, help="samples of a cell")
    parser.add_argument("--budget-seconds", type=float, default=400.0, help="for each kernel and shape")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="that compile the rivals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the tables and summary.json")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_tb_s()
    print(f"{torch.cuda.get_device_name()}: {bandwidth:.2f} TB/s in a copy")
    summary: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_tb_s": bandwidth}
    for shape_name in a.shapes:
        for dtype in a.dtype:
            shape, title = attrs.evolve(SHAPES[shape_name], dtype=dtype), f"{shape_name}-{dtype}"
            rivals = [name for name in a.rivals if name != "alpha" or dtype == "fp8"]
            done = {name: table(name, shape, title, a) for name in ["cute", *rivals]}
            tables = {name: made[0] for name, made in done.items() if made is not None}
            if done["cute"] is None:
                continue
            summary[title] = compare(tables, shape, bandwidth) | {"checked": done["cute"][1]}
            if a.dispatch:
                summary[title]["dispatch"] = judge_dispatch(tables["cute"], shape, title, a)
            torch.cuda.empty_cache()
            (a.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if len(summary) > 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
