"""Routing-aware dispatch on other people's kernels, unmodified: headroom, regret and speedup on held-out workloads.

    python benchmarks/third_party.py --kernels vllm --shapes olmoe qwen3-30b --out OUT
    python benchmarks/third_party.py --kernels alpha --shapes olmoe --out OUT
    python benchmarks/third_party.py --kernels cute triton vllm grouped --shapes olmoe --portfolio --most-configs 48 --out OUT

Each kernel and shape is profiled in one run (train rows and held-out rows interleaved, CUDA graphs, cold L2), the
models are fitted to the train rows, and all policies are judged on the held-out ones by their measured times. The
baseline is the table tuned under uniform routing on the train rows. With --portfolio the tables of all kernels of a
shape are joined, so that the choice crosses kernels, and compared with each kernel's own static table. With
--most-configs a short sweep over other workloads comes first, and only the configs that are near the best there stay.

vLLM comes from its package; Alpha-MoE is built outside this repository; what is absent is left out with the reason.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from rampwrap.compare.evaluate import ORACLE, STATIC_AVERAGED, STATIC_UNIFORM, Comparison, replay
from rampwrap.errors import ConfigError, InputError, RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.protocol import MEMBER, Kernel
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.measure.full import profile
from rampwrap.measure.join import join
from rampwrap.measure.sweep import sweep
from rampwrap.measure.timings import Timings
from rampwrap.policy.static import engine_table, tuned_uniform
from rampwrap.routing.workloads import Routing, Workload, workload_grid

TRAIN_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRAIN_ROUTINGS = ("uniform", "zipf:1.2", "dirichlet:0.3", "dirichlet:0.1")
EVAL_TOKENS = (1, 3, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072, 4096)
# The last stands in for recorded routing: the spread of expert loads (deviation over mean, 1.3) of the median layer of
# three prefills of Qwen3-30B is that of a lognormal of this sigma.
EVAL_ROUTINGS = ("uniform", "zipf:0.8", "zipf:1.2", "dirichlet:0.1", "dirichlet:0.3", "lognormal:1.05")
MODELS = ("ramp4", "wave")
NAMES = {
    "vllm": "vllm_fused_moe",
    "alpha": "alpha_moe",
    "triton": "triton_fused_moe",
    "grouped": "torch_grouped_mm",
    "cute": "cute_moe",
}
# With and without alignment, slots and padded rows divisible by 16 or not: what Triton compiles apart.
WARM_TOKENS = (1, 2, 5, 9, 99, 100)


def make(name: str, shape: MoEShape) -> Kernel:
    """A kernel by its short name."""
    return make_kernel(NAMES[name], shape)


def compile_vllm(shape: MoEShape, part: int, parts: int) -> list[str]:
    """Compiles every `parts`-th config into Triton's disk cache by running it on one expert seen as many."""
    kernel: Any = make("vllm", shape)
    fp8 = shape.dtype == "fp8"

    def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, rows, columns, device="cuda").to(dtype).expand(shape.num_experts, -1, -1)

    h, i = shape.hidden_size, shape.intermediate_size
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    fixed: dict[str, Any] = {"w13": weights(2 * i, h, dtype), "w2": weights(h, i, dtype)}
    if fp8:
        fixed["w13_scale"] = weights(2 * i // 128, h // 128, torch.float32)
        fixed["w2_scale"] = weights(h // 128, i // 128, torch.float32)
    failures = []
    for config in kernel.configs[part::parts]:
        try:
            for tokens in WARM_TOKENS:
                ids = torch.arange(tokens * shape.top_k, device="cuda", dtype=torch.int32) % shape.num_experts
                kernel.launch(
                    config,
                    hidden_states=torch.zeros(tokens, h, device="cuda", dtype=torch.bfloat16),
                    topk_weights=torch.zeros(tokens, shape.top_k, device="cuda"),
                    topk_ids=ids.view(tokens, shape.top_k),
                    **fixed,
                )
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(f"{config}: {type(error).__name__}: {error}".splitlines()[0][:200])
    return failures


def warm(name: str, kernel: Kernel, shape: MoEShape, processes: int) -> None:
    """Compiles in parallel what would otherwise be compiled one config after the other."""
    if name == "vllm":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vllm.model_executor.layers.fused_moe", "rampwrap.adapters.vllm_fused_moe"])
        with context.Pool(processes) as pool:
            found = pool.starmap(compile_vllm, [(shape, part, processes) for part in range(processes)])
        for failure in (line for part in found for line in part):
            print(f"  not compiled: {failure}", file=sys.stderr)
    elif name == "triton":
        from rampwrap.kernels.triton.moe.warm import warm as warm_ours

        warm_ours(shape, kernel.configs, processes=processes)


def workloads(traces: Sequence[str], shape: MoEShape, seed: int) -> list[Workload]:
    """Train and held-out rows; recorded routing only where its number of experts fits, and only held out."""
    train = workload_grid(list(TRAIN_TOKENS), [Routing.parse(text) for text in TRAIN_ROUTINGS], "train", seed)
    held_out = [Routing.parse(text) for text in EVAL_ROUTINGS]
    for path in traces:
        routing = Routing("trace", path)
        try:
            routing.popularity(shape.num_experts, np.random.default_rng(0))
            held_out.append(routing)
        except InputError as error:
            print(f"  without {path}: {error}", file=sys.stderr)
    return train + workload_grid(list(EVAL_TOKENS), held_out, "eval", seed + 1)


def geometric_mean(values: Any) -> float:
    return float(np.exp(np.log(np.asarray(values)).mean()))


def figures(compared: Comparison) -> dict[str, Any]:
    """Headroom of the baseline, and each policy: speedup, on the third with most headroom too, regret, losses."""
    static, oracle = compared.us(compared.baseline), compared.us(ORACLE)
    headroom = static / oracle
    third = headroom >= np.quantile(headroom, 2 / 3)
    found: dict[str, Any] = {
        "workloads": len(static),
        "headroom": {
            "mean": geometric_mean(headroom),
            "p95": float(np.quantile(headroom, 0.95)),
            "max": float(headroom.max()),
            "third": geometric_mean(headroom[third]),
        },
    }
    for name in compared.picks:
        us, summary = compared.us(name), compared.summary(name)
        found[name] = attrs.asdict(summary) | {
            "speedup_third": geometric_mean(static[third] / us[third]),
            "worst": float((static / us).min()),
            "spread_median": float(np.nanmedian(compared.spread(name)))
            if compared.timings.spread is not None
            else None,
        }
    return found


def report(title: str, found: dict[str, Any]) -> None:
    head = found["headroom"]
    print(
        f"\n{title}: {found['workloads']} held-out workloads, headroom over {STATIC_UNIFORM} "
        f"{head['mean']:.3f}x mean, {head['p95']:.3f}x p95, {head['max']:.3f}x max, {head['third']:.3f}x on its best third"
    )
    print(f"  {'policy':16s} speedup   third   worst  captured  regret mean/p95/max     >1 % slower")
    for name in (*MODELS, STATIC_AVERAGED, *(key for key in found if key.startswith("engine")), ORACLE):
        row = found[name]
        print(
            f"  {name:16s} {row['speedup']:6.3f}x {row['speedup_third']:6.3f}x {row['worst']:6.3f}x {row['captured_headroom']:8.1%} "
            f"  {row['regret_mean']:6.2%} {row['regret_p95']:6.2%} {row['regret_max']:6.2%} {row['slower_than_static_share']:10.1%}"
        )


def measure(name: str, shape_name: str, arguments: argparse.Namespace) -> tuple[Timings, dict[str, Any]] | None:
    """Profiles one kernel on one shape and judges the policies; None where the kernel is absent or cannot run it."""
    start = time.monotonic()
    dtype = arguments.dtype or ("fp8" if name == "alpha" or "deepseek" in shape_name else "bf16")
    shape = attrs.evolve(SHAPES[shape_name], dtype=dtype)
    title = f"{name} {shape_name} {dtype}"
    try:
        kernel: Any = make(name, shape)
    except (RampwrapError, ImportError) as error:
        print(f"{title}: left out, {error}", file=sys.stderr)
        return None
    warm(name, kernel, shape, arguments.processes)
    print(
        f"{title}: {len(kernel.configs)} configs of {kernel.version}, ready in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    # GROUP_M moves the CuTe kernels by less than repeats do below the largest batches.
    configs = [config for config in kernel.configs if name != "cute" or config["group_m"] == 1]
    kept = sweep(kernel, shape, arguments.most_configs, configs=configs, quiet=True, seed=arguments.seed)
    compiled = time.monotonic() - start
    print(f"  {len(kept)} of {len(configs)} configs stay, {compiled:.0f} s", flush=True)
    timings = profile(
        kernel,
        shape,
        workloads(arguments.trace, shape, arguments.seed),
        configs=kept,
        out=arguments.out / f"{name}-{shape_name}-{dtype}.npz",
        rounds=arguments.rounds,
        budget_s=max(30.0, arguments.budget_seconds - compiled),
        quiet=not sys.stderr.isatty(),
        seed=arguments.seed,
    )
    extra = {}
    try:
        if len(kept) < len(kernel.configs):
            raise ConfigError("it names configs that were not timed.")
        extra["engine"] = engine_table(kernel)
        print(f"  its own table: {extra['engine'].source}")
    except (AttributeError, RampwrapError) as error:
        print(f"  without its own table: {error}", file=sys.stderr)
    found = figures(replay(timings, models=MODELS, extra=extra))
    found |= {"title": title, "configs": len(timings.configs), "version": kernel.version, "seconds": time.monotonic() - start}  # fmt: skip
    report(title, found)
    print(f"  {found['seconds']:.0f} s", flush=True)
    return timings, found


def judge_portfolio(tables: Sequence[Timings]) -> dict[str, Any]:
    """The choice across kernels against every kernel's own table tuned under uniform routing."""
    joined = join(tables)
    found = figures(compared := replay(joined, models=MODELS))
    report(joined.kernel, found)
    train, judged = joined.rows("train"), compared.timings
    mine = compared.us("wave")
    owners = np.array([config[MEMBER] for config in joined.configs])
    singles = {}
    for table in tables:
        where = np.flatnonzero(owners == table.kernel)
        own = tuned_uniform(attrs.evolve(joined.take(train), us=masked(joined.us[train], where)), np.arange(len(train)))
        picks = [own.index(int(tokens)) for tokens in judged.num_tokens]
        singles[table.kernel] = judged.us[np.arange(len(judged.us)), picks]
    best = min(singles, key=lambda name: geometric_mean(singles[name]))
    print(
        f"  {geometric_mean(singles[best] / mine):.3f}x the best single kernel's static table ({best}); by token count:"
    )
    found["best_single"], found["over_best_single"] = best, geometric_mean(singles[best] / mine)
    found["by_tokens"] = {}
    for tokens in np.unique(judged.num_tokens):
        rows = judged.num_tokens == tokens
        leader = min(singles, key=lambda name: geometric_mean(singles[name][rows]))
        ratio = geometric_mean(singles[leader][rows] / mine[rows])
        found["by_tokens"][int(tokens)] = {"best": leader, "speedup": ratio}
        used = sorted(set(owners[compared.picks["wave"][rows]].tolist()))
        print(f"    {tokens:5d} tokens: {ratio:.3f}x static {leader}; chose {', '.join(used)}")
    return found


def masked(us: Any, keep: Any) -> Any:
    out = np.full_like(us, np.nan)
    out[:, keep] = us[:, keep]
    return out


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=["vllm", "alpha"], choices=sorted(NAMES))
    parser.add_argument("--shapes", nargs="+", default=["olmoe"], choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=["bf16", "fp8"], help="by default fp8 for alpha and DeepSeek, else bf16")
    parser.add_argument("--portfolio", action="store_true", help="also judge the choice across the kernels of a shape")
    parser.add_argument(
        "--most-configs", type=int, default=1000, help="that are timed on all workloads, of each kernel"
    )
    parser.add_argument("--trace", nargs="*", default=[], help="files of recorded expert loads (.npz, .npy, .json)")
    parser.add_argument("--budget-seconds", type=float, default=220.0, help="for each kernel and shape")
    parser.add_argument("--rounds", type=int, default=2, help="samples of a cell")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the tables and summary.json")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    summary: list[dict[str, Any]] = []
    run: Callable[..., Any] = functools.partial(measure, arguments=arguments)
    for shape_name in arguments.shapes:
        tables: dict[str, list[Timings]] = {}
        for name in arguments.kernels:
            done = run(name, shape_name)
            torch.cuda.empty_cache()
            if done is not None:
                tables.setdefault(done[0].shape.dtype, []).append(done[0])
                summary.append(done[1])
        for same in tables.values():
            if arguments.portfolio and len(same) > 1:
                summary.append(judge_portfolio(same) | {"title": f"portfolio {shape_name}"})
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if summary else 1


if __name__ == "__main__":
    raise SystemExit(main())
