"""The command line: ``rampwrap profile | fit | show | explain | compare | replay | regions | build-kernels``.

Exit codes: 0 done, 1 a one-sentence error, 2 wrong usage, 130 interrupted.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap import catalog, compare, kernel_build, regions, report
from rampwrap._version import __version__
from rampwrap.cost import MODELS
from rampwrap.device import find_device
from rampwrap.dispatch import Dispatcher
from rampwrap.errors import InputError, RampwrapError
from rampwrap.fitting import make_plan
from rampwrap.kernel import SHAPES, Kernel, MoEShape, config_key, format_config, index_by_key
from rampwrap.plan import Plan
from rampwrap.policy import Oracle, Policy, Renumbered, Static
from rampwrap.routing import Routing, Workload, check_counts, expert_counts, recorded_workloads, workload_grid
from rampwrap.static import default_table, read_static
from rampwrap.timings import Timings

# What a new table is profiled on, and what it is judged on: token counts and skews that the fit never sees.
TRAIN_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
TRAIN_ROUTINGS = ["uniform", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2"]
EVAL_TOKENS = [3, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072]
EVAL_ROUTINGS = ["dirichlet:0.2", "zipf:0.8", "zipf:1.6", "hot:2", "lognormal:1.0"]
ENGINES = ("vllm", "sglang", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        result: dict[str, Any] = arguments.run(arguments)
        text = result.pop("text")
        print(json.dumps(result, default=float) if arguments.json else text, flush=True)
        return 0
    except RampwrapError as error:
        print(f"rampwrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rampwrap: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`rampwrap show ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _profile(a: argparse.Namespace) -> dict[str, Any]:
    if a.engine:
        return _profile_model(a)
    shape = _shape(a)
    return _profile_shape(a, shape, a.out or f"{_kernel(a, shape).name}-{_shape_name(shape)}.npz")


def _kernel(a: argparse.Namespace, shape: MoEShape) -> Kernel:
    """The kernel to profile: the one asked for, else what serves the shape best."""
    from rampwrap.engines.profiling import default_kernel

    return catalog.make_kernel(a.kernel or default_kernel(a.engine, shape)[0], shape)


def _profile_model(a: argparse.Namespace) -> dict[str, Any]:
    from rampwrap.engines.profiling import default_kernel, profile_model
    from rampwrap.engines.warming import compile_for
    from rampwrap.models import read_model

    if not a.model:
        raise InputError("--engine was given without --model; give the folder of a model with its config.json.")
    sizes: dict[str, Any] = {"tp_size": a.tp_size, "expert_parallel": a.ep, "dtype": a.dtype}
    if a.dry_run:
        found = [_profile_shape(a, shape, "") for shape in read_model(a.model, **sizes)]
        return {"shapes": found, "text": "\n".join(its["text"] for its in found)}

    def measure(shape: MoEShape, out: str) -> tuple[Kernel, Timings]:
        _profile_shape(a, shape, out)
        return _kernel(a, shape), Timings.load(out)

    done = profile_model(a.model, functools.partial(_kernel, a), measure, folder=a.out, prepare=compile_for, **sizes)
    hints = {default_kernel(a.engine, shape)[1] for shape in read_model(a.model, **sizes) if not a.kernel}
    return {**done, "text": "\n".join([done["text"], *sorted(hints - {""})])}


def _profile_shape(a: argparse.Namespace, shape: MoEShape, out: str) -> dict[str, Any]:
    from rampwrap.active import profile_active
    from rampwrap.profiler import plan_profile, profile

    kernel = _kernel(a, shape)
    workloads = workload_grid(a.batch_size, _routings(a.routing), "train", a.seed)
    workloads += workload_grid(a.eval_batch_size, _routings(a.eval_routing), "eval", a.seed)
    workloads += _recorded(a.recorded, shape, a, "train") + _recorded(a.eval_recorded, shape, a, "eval")
    if a.dry_run:
        projected = plan_profile(kernel, shape, workloads, rounds=a.rounds)
        return {**attrs.asdict(projected), "out": out, "text": str(projected)}
    if a.budget:
        # Held-out rows need every config, or there is no oracle to judge by: a budget pays for the train rows alone.
        seen = [workload for workload in workloads if workload.split == "train"]
        timings = profile_active(
            kernel, shape, seen, out=out, rounds=a.rounds, budget_s=a.budget, quiet=a.quiet, seed=a.seed
        )
    else:
        timings = profile(kernel, shape, workloads, out=out, rounds=a.rounds, quiet=a.quiet, seed=a.seed)
    text = f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs\nnext: rampwrap fit {out}"
    if gave_up := timings.notes.get("gave_up"):
        text = f"{gave_up}\n{text}"
    return {"out": out, "workloads": len(timings.us), "configs": len(timings.configs), **timings.notes, "text": text}


def _fit(a: argparse.Namespace) -> dict[str, Any]:
    timings = Timings.load(a.table)
    plan = make_plan(timings, a.train, a.model, a.static, a.choosing_us, a.table)
    out = a.out or str(pathlib.Path(a.table).with_suffix(".plan.json"))
    plan.save(out)
    return {"out": out, **plan.provenance, "text": f"{out}: {_plan_text(plan)}"}


def _plan_text(plan: Plan) -> str:
    lines = [
        f"{plan.kernel} {plan.kernel_version}, {plan.shape}, {plan.device.name}; {len(plan.configs)} configs, model {plan.model.name}"
    ]
    for tokens, index in zip(plan.static.token_counts, plan.static.indices, strict=True):
        lines.append(f"  static ({plan.static.source}) {tokens:>6} tokens: {format_config(plan.configs[index])}")
    for bucket in plan.buckets:
        lines.append(f"  bucket {bucket.num_tokens:>6}: {len(bucket.shortlist)} candidates; {bucket.why}")
    lines.append(f"  {json.dumps(plan.provenance)}")
    return "\n".join(lines)


def _show(a: argparse.Namespace) -> dict[str, Any]:
    if a.file.endswith(".npz"):
        t = Timings.load(a.file)
        ran = float((~np.isnan(t.us)).mean())
        text = (
            f"{t.kernel} {t.kernel_version}, {t.shape}, {t.device.name}\n{len(t.us)} workloads "
            f"({', '.join(f'{t.split.count(s)} {s}' for s in sorted(set(t.split)))}) x {len(t.configs)} configs, {ran:.0%} of the cells measured"
        )
        text += "".join(f"\n  refused: {format_config(t.configs[i])}: {why}" for i, why in t.reasons.items())
        return {
            "kernel": t.kernel,
            "shape": t.shape.to_dict(),
            "workloads": len(t.us),
            "configs": len(t.configs),
            "measured": ran,
            "text": text,
        }
    plan = Plan.load(a.file)
    return {**json.loads(plan.to_json()), "text": _plan_text(plan)}


def _explain(a: argparse.Namespace) -> dict[str, Any]:
    plan = Plan.load(a.plan)
    shape = plan.shape
    if a.expert_counts:
        counts = check_counts(a.expert_counts, shape.num_local_experts)
        tokens = a.batch_size[0] if a.batch_size else -(-int(counts.sum()) // shape.top_k)
    else:
        if not a.batch_size:
            raise InputError("explain was given no routing; pass --expert-counts or --batch-size with --routing.")
        workload = Workload(a.batch_size[0], Routing.parse(a.routing[0]), seed=a.seed)
        counts, tokens = (
            expert_counts(workload.topk_ids(shape.num_experts, shape.top_k), shape.num_experts),
            a.batch_size[0],
        )
        counts = counts[: shape.num_local_experts]
    choice = plan.policy().select(counts, tokens)
    return {**attrs.asdict(choice), "num_tokens": tokens, "text": str(choice)}


def _compare(a: argparse.Namespace) -> dict[str, Any]:
    from rampwrap.profiler import profile

    plan = Plan.load(a.plan)
    kernel = catalog.make_kernel(a.kernel or plan.kernel, plan.shape)
    routed = Dispatcher(kernel, plan, strict=True).policy
    # Every config that any policy may launch is timed on every workload, in interleaved rounds: the best of them
    # is the oracle, and policies that agree are judged by the same measurement.
    every = tuple(kernel.configs)
    number = index_by_key(every)
    where = {index: number[config_key(config)] for index, config in enumerate(plan.configs)}
    tables = {compare.STATIC_UNIFORM: plan.static.renumber(where)}
    tables |= {f"static {pathlib.Path(path).stem}": read_static(path, every) for path in a.static_file}
    if a.kernel_default:
        tables["static kernel-default"] = default_table(kernel)
    used = sorted({*where.values(), *(i for table in tables.values() for i in table.indices)})
    used = list(range(len(every))) if a.oracle else used
    place = {index: position for position, index in enumerate(used)}
    configs = tuple(every[index] for index in used)
    tokens = a.batch_size or ([] if a.recorded else EVAL_TOKENS)
    workloads = workload_grid(tokens, _routings(a.routing), "eval", a.seed + 1)
    workloads += _recorded(a.recorded, plan.shape, a, "eval")
    timings = profile(
        kernel, plan.shape, workloads, configs=configs, out=a.out, rounds=a.rounds, quiet=a.quiet, seed=a.seed
    )
    policies: dict[str, Policy] = {name: Static(configs, table.renumber(place)) for name, table in tables.items()}
    policies["default"] = Renumbered(configs, routed, tuple(place[where[index]] for index in range(len(plan.configs))))
    policies[compare.ORACLE] = Oracle(timings)
    return _reported(compare.evaluate(timings, policies), a)


def _replay(a: argparse.Namespace) -> dict[str, Any]:
    timings = Timings.load(a.table)
    extra = {f"static {pathlib.Path(path).stem}": read_static(path, timings.configs) for path in a.static_file}
    models = tuple(dict.fromkeys(("ramp4", a.model)))
    comparison = compare.replay(timings, a.train, a.eval, models, extra)
    if a.plot_fit:
        report.model_picture(comparison.models[a.model], comparison.timings, a.plot_fit)
    return _reported(comparison, a)


def _regions(a: argparse.Namespace) -> dict[str, Any]:
    one = a.model or any((a.num_experts, a.top_k, a.hidden_size, a.intermediate_size))
    shapes = {a.model or _shape_name(_shape(a)): _shape(a)} if one else SHAPES
    return regions.run(shapes, find_device(a.device), a.batch_size, a.plot)


def _reported(comparison: compare.Comparison, a: argparse.Namespace) -> dict[str, Any]:
    if a.csv:
        report.save_text(report.csv_text(comparison), a.csv)
    if a.plot:
        report.picture(comparison, a.plot)
    return {**comparison.to_dict(), "text": report.text(comparison)}


def _shape(a: argparse.Namespace) -> MoEShape:
    if a.model:
        if a.model not in SHAPES:
            raise InputError(f"model {a.model!r} is unknown; use one of {', '.join(SHAPES)} or give the four sizes.")
        base = attrs.evolve(SHAPES[a.model], dtype=a.dtype or "bf16")
    else:
        sizes = {name: getattr(a, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
        missing = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is None]
        if missing:
            raise InputError(f"the layer's shape lacks {', '.join(missing)}; give it, or --model.")
        base = MoEShape(**sizes, dtype=a.dtype or "bf16")
    if base.intermediate_size % a.tp_size:
        raise InputError(
            f"--tp-size {a.tp_size} does not divide intermediate_size={base.intermediate_size}; use a divisor."
        )
    local = a.num_local_experts or base.num_experts
    return attrs.evolve(base, intermediate_size=base.intermediate_size // a.tp_size, num_local_experts=local)


def _shape_name(shape: MoEShape) -> str:
    local = "" if shape.num_local_experts == shape.num_experts else f"({shape.num_local_experts})"
    return f"E{shape.num_experts}{local}-k{shape.top_k}-H{shape.hidden_size}-I{shape.intermediate_size}-{shape.dtype}"


def _routings(texts: Sequence[str]) -> list[Routing]:
    return [Routing.parse(text) for text in texts]


def _recorded(paths: Sequence[str], shape: MoEShape, a: argparse.Namespace, split: str) -> list[Workload]:
    sizes = {"num_experts": shape.num_experts, "top_k": shape.top_k}
    found = [
        recorded_workloads(path, **sizes, limit=a.recorded_limit, split=split, seed=a.seed)
        for path in dict.fromkeys(paths)
    ]
    return [workload for part in found for workload in part]


def seconds(text: str) -> float:
    """Reads ``90``, ``90s``, ``3m`` or ``1h``."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        value = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 3m or 1h")
    return value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write 3,0,5,...") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rampwrap", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    def workloads(sub: argparse.ArgumentParser, tokens: list[int] | None, routings: list[str]) -> None:
        sub.add_argument("--batch-size", type=_positive, nargs="+", default=tokens, metavar="M", help="token counts")
        sub.add_argument(
            "--routing",
            nargs="+",
            default=routings,
            metavar="R",
            help="uniform zipf:1.2 dirichlet:0.3 hot:1 lognormal:1 trace:FILE[:LAYER]",
        )
        sub.add_argument("--seed", type=int, default=0)

    def recorded(sub: argparse.ArgumentParser, name: str = "--recorded", where: str = "") -> None:
        text = f"histograms that an engine recorded{where}: SGLang's dumps, vLLM's routed experts, .npy, .npz, .json"
        sub.add_argument(name, nargs="+", default=[], metavar="FILE[:LAYER]", help=text)

    def layer(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", help=", ".join(SHAPES))
        sub.add_argument("--num-experts", "-E", type=_positive)
        sub.add_argument("--top-k", type=_positive)
        sub.add_argument("--hidden-size", "-K", type=_positive)
        sub.add_argument("--intermediate-size", "-N", type=_positive)
        sub.add_argument(
            "--dtype", help="bf16, fp16 or fp8; bf16 by default, with --engine what the model's config says"
        )
        sub.add_argument("--tp-size", type=_positive, default=1)
        sub.add_argument("--num-local-experts", type=_positive, help="on this rank; all by default")

    def measuring(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--rounds", type=_positive, default=4, help="interleaved rounds of measurement; the first only sorts out"
        )
        sub.add_argument("--quiet", action="store_true", help="no progress bar")

    def reporting(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--static-file",
            nargs="+",
            default=[],
            metavar="JSON",
            help="tuned files of vLLM, SGLang or Alpha-MoE to compare with",
        )
        sub.add_argument("--csv", metavar="FILE", help="write one line a workload and policy")
        sub.add_argument("--plot", metavar="FILE", help="draw the speedups (needs matplotlib)")

    p = command("profile", _profile, "time every config on every workload; resumes where a killed run stopped")
    p.add_argument(
        "--kernel",
        help=f"{', '.join(catalog.KERNELS)} or package.module:factory; by default triton_fused_moe, "
        "with --engine vllm the fastest one that runs here",
    )
    p.add_argument(
        "--engine",
        choices=ENGINES,
        help="profile all MoE shapes of the model in the folder --model and write its plans",
    )
    layer(p)
    p.add_argument("--ep", action="store_true", help="with --engine: the --tp-size ranks share out whole experts")
    workloads(p, TRAIN_TOKENS, TRAIN_ROUTINGS)
    p.add_argument(
        "--eval-batch-size", type=_positive, nargs="*", default=EVAL_TOKENS, metavar="M", help="held-out token counts"
    )
    p.add_argument("--eval-routing", nargs="*", default=EVAL_ROUTINGS, metavar="R", help="held-out routings")
    recorded(p)
    recorded(p, "--eval-recorded", ", held out")
    p.add_argument("--recorded-limit", type=_positive, default=24, metavar="N", help="histograms taken of a file")
    measuring(p)
    p.add_argument("--budget", type=seconds, metavar="3m", help="measure only the cells that matter, within this time")
    p.add_argument("--dry-run", action="store_true", help="say what would be measured, and for how long")
    p.add_argument("--out", metavar="TABLE.npz")

    p = command("fit", _fit, "fit a timing table and write the plan a deployment loads")
    p.add_argument("table", metavar="TABLE.npz")
    p.add_argument("--train", default="train", help="the split to fit")
    p.add_argument("--model", default="default", choices=sorted(MODELS))
    p.add_argument("--static", default="uniform", help="the baseline: uniform, averaged, or a tuned JSON file")
    p.add_argument("--choosing-us", type=float, default=0.0, help="cost of choosing, which a gain must exceed")
    p.add_argument("--out", metavar="PLAN.json")

    p = command("show", _show, "what a plan or a timing table holds")
    p.add_argument("file", metavar="PLAN.json|TABLE.npz")

    p = command("explain", _explain, "which config a routing would get, and why")
    p.add_argument("plan", metavar="PLAN.json")
    p.add_argument("--expert-counts", type=_counts, metavar="3,0,5,...", help="the histogram itself")
    workloads(p, None, ["uniform"])

    p = command("compare", _compare, "A/B on the live kernel: routing-aware against static")
    p.add_argument("plan", metavar="PLAN.json")
    p.add_argument("--kernel", help="when it is not one of the built-in names")
    workloads(p, None, EVAL_ROUTINGS)
    recorded(p)
    p.add_argument("--recorded-limit", type=_positive, default=24, metavar="N", help="histograms taken of a file")
    measuring(p)
    p.add_argument("--oracle", action="store_true", help="time all configs, for regret against exhaustive search")
    p.add_argument("--out", metavar="TABLE.npz", help="keep the measured times")
    p.add_argument("--kernel-default", action="store_true", help="also against the kernel's own default configs")
    reporting(p)

    p = command("replay", _replay, "the same A/B on a timing table, without a GPU")
    p.add_argument("table", metavar="TABLE.npz")
    p.add_argument("--train", default="train", help="the split to fit")
    p.add_argument("--eval", default="eval", help="the split to judge")
    p.add_argument("--plot-fit", metavar="FILE", help="draw predicted against measured time (needs matplotlib)")
    p.add_argument("--model", default="default", choices=sorted(MODELS))
    reporting(p)

    kernel_build.add_arguments(command("build-kernels", kernel_build.run, kernel_build.TEXT))

    p = command("regions", _regions, "where swizzle, split-K and wide tiles help, from hardware constants alone")
    layer(p)
    p.add_argument("--device", default="h200", help="a known GPU")
    p.add_argument("--batch-size", type=_positive, nargs="+", default=[8, 256, 4096], metavar="M", help="token counts")
    p.add_argument("--plot", metavar="FILE", help="draw the regions (needs matplotlib)")
    return parser
