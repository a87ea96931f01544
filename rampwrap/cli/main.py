"""The command line: ``rampwrap profile | fit | show | seal | explain | compare | replay | regions | build-kernels``.

Exit codes: 0 done, 1 a one-sentence error, 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap import schema
from rampwrap._version import __version__
from rampwrap.cli import build as kernel_build
from rampwrap.cli import profile as profiling_cli
from rampwrap.cli.types import (
    counts,
    joined_tables,
    positive,
    recorded_of,
    recorded_said,
    routings_of,
    seconds,
    shape_name,
    shape_of,
)
from rampwrap.compare import evaluate as compare
from rampwrap.compare import regions, report
from rampwrap.compare.oracle import Oracle, Renumbered
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import InputError, RampwrapError
from rampwrap.files import check_target
from rampwrap.kernel import catalog
from rampwrap.kernel.device import device_of, find_device
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.protocol import config_key, format_config, index_by_key
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.measure.timings import Timings, is_table
from rampwrap.model.cost import MODELS
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import Policy, Static
from rampwrap.policy.static import default_table, read_measured, read_static
from rampwrap.routing.counts import check_counts, expert_counts
from rampwrap.routing.workloads import Routing, workload_grid

# What a new table is profiled on, and what it is judged on: token counts and skews that the fit never sees.
TRAIN_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
TRAIN_ROUTINGS = ["uniform", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2"]
EVAL_TOKENS = [3, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072]
EVAL_ROUTINGS = ["dirichlet:0.2", "zipf:0.8", "zipf:1.6", "hot:2", "lognormal:1.0"]
ENGINES = ("vllm", "sglang", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as ended:
        # --help and --version have printed, but into a buffer.
        ended.code = _printed("", end="") or ended.code
        raise
    try:
        result: dict[str, Any] = arguments.run(arguments)
        text = result.pop("text")
        return _printed(json.dumps(result, default=float) if arguments.json else text)
    except RampwrapError as error:
        print(f"rampwrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rampwrap: interrupted.", file=sys.stderr)
        return 130


def _printed(text: str, end: str = "\n") -> int:
    """Prints a command's answer; returns the exit code."""
    try:
        try:
            print(text, end=end, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)
        return 0
    except OSError as error:
        # What is still in the buffer is written again at exit, where nobody catches that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of our output left (`rampwrap show ... | head`): not an error of ours.
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"rampwrap: the answer cannot be written ({error.strerror}); free some space there.", file=sys.stderr)
        return 1


def _fit(a: argparse.Namespace) -> dict[str, Any]:
    if len(a.tables) > 1 and not a.out:
        raise InputError("fit was given several tables and no name for their plan; pass --out PLAN.json.")
    timings = joined_tables(a.tables)
    plan = make_plan(timings, a.train, a.model, a.static, a.choosing_us, " + ".join(map(os.path.basename, a.tables)))
    out = a.out or str(pathlib.Path(a.tables[0]).with_suffix(".plan.json"))
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
    if is_table(a.file):
        t = Timings.load(a.file)
        ran = float((~np.isnan(t.us)).mean())
        text = (
            f"{t.kernel} {t.kernel_version}, {t.shape}, {t.device.name}\n{len(t.us)} workloads "
            f"({', '.join(f'{t.split.count(s)} {s}' for s in sorted(set(t.split)))}) x {len(t.configs)} configs, {ran:.0%} of the cells measured"
        )
        text += "".join(f"\n  refused: {format_config(t.configs[i])}: {why}" for i, why in t.reasons.items())
        return {
            "kernel": t.kernel,
            "shape": schema.dump(t.shape),
            "workloads": len(t.us),
            "configs": len(t.configs),
            "measured": ran,
            "text": text,
        }
    plan = Plan.load(a.file)
    return {**json.loads(plan.to_json()), "text": _plan_text(plan)}


def _seal(a: argparse.Namespace) -> dict[str, Any]:
    kind: type[Timings | Plan] = Timings if is_table(a.file) else Plan
    kind.load(a.file, sealed=False).save(a.file)
    return {"out": a.file, "text": f"{a.file} is whole and sealed with the checksum of what it holds now."}


def _explain(a: argparse.Namespace) -> dict[str, Any]:
    plan = Plan.load(a.plan)
    policy, asked = plan.policy(), _asked(a, plan.shape)
    choices = [(label, tokens, policy.select(counts, tokens)) for label, counts, tokens in asked]
    found = [{**attrs.asdict(choice), "num_tokens": tokens, "routing": label} for label, tokens, choice in choices]
    if len(choices) == 1:
        return {**found[0], **recorded_said(a, plan.shape), "text": str(choices[0][2])}
    return {
        "choices": found,
        **recorded_said(a, plan.shape),
        "text": "\n".join(f"{label}: {choice}" for label, _, choice in choices),
    }


def _asked(a: argparse.Namespace, shape: MoEShape) -> list[tuple[str, IntArray, int]]:
    """(label, counts, tokens) of every routing that explain was given."""
    if a.expert_counts:
        if len(a.batch_size or ()) > 1:
            raise InputError("explain was given one histogram and several batch sizes; give its own with --batch-size.")
        counts = check_counts(a.expert_counts, shape.num_local_experts)
        return [("histogram", counts, a.batch_size[0] if a.batch_size else -(-int(counts.sum()) // shape.top_k))]
    if not a.batch_size:
        raise InputError("explain was given no routing; pass --expert-counts or --batch-size with --routing.")
    found = []
    for workload in workload_grid(a.batch_size, [Routing.parse(name) for name in a.routing], seed=a.seed):
        try:
            ids = workload.topk_ids(shape.num_experts, shape.top_k)
        except MemoryError:
            text = f"a routing of {workload.num_tokens} tokens does not fit in memory; give a smaller --batch-size."
            raise InputError(text) from None
        found.append((workload.label, expert_counts(ids, shape.num_experts)[: shape.num_local_experts], len(ids)))
    return found


def _compare(a: argparse.Namespace) -> dict[str, Any]:
    from rampwrap.measure.full import profile

    _check_pictures(a.plot)
    for path in filter(None, (a.out, a.csv, a.plot)):
        check_target(path)
    plan = Plan.load(a.plan)
    kernel = catalog.make_kernel(a.kernel or plan.kernel, plan.shape)
    routed = Dispatcher(kernel, plan, strict=True).policy
    # Every config that any policy may launch is timed on every workload, in interleaved rounds: the best of them
    # is the oracle, and policies that agree are judged by the same measurement.
    every = tuple(kernel.configs)
    number = index_by_key(every)
    # Those of the plan, and where a batch is beyond it also the kernel's own defaults.
    where = {index: number[config_key(config)] for index, config in enumerate(routed.configs)}
    tokens = a.batch_size or ([] if a.recorded else EVAL_TOKENS)
    workloads = workload_grid(tokens, routings_of(a.routing), "eval", a.seed + 1)
    workloads += recorded_of(a.recorded, plan.shape, a, "eval")
    recorded = recorded_said(a, plan.shape)
    # Named after what it is: `fit --static` takes others than the uniform one.
    own = plan.static.source in ("uniform", "averaged")
    baseline = f"static-{plan.static.source}" if own else f"static {plan.static.source}"
    tables = {baseline: plan.static.renumber(where)}
    if a.kernel_default:
        tables["static kernel-default"] = default_table(kernel)
    for name, path in _static_files(a.static_file, tables).items():
        judged = [workload.num_tokens for workload in workloads]
        tables[name] = read_static(
            path, every, kernel=kernel.name, device=device_of(kernel).name, shape=plan.shape, num_tokens=judged
        )
    used = sorted({*where.values(), *(i for table in tables.values() for i in table.indices)})
    used = list(range(len(every))) if a.oracle else used
    place = {index: position for position, index in enumerate(used)}
    configs = tuple(every[index] for index in used)
    options = {"out": a.out, "rounds": a.rounds, "quiet": a.quiet, "seed": a.seed}
    options |= {"replace": a.replace, "patience_s": a.patience}
    with profiling_cli.terminable():
        timings = profile(kernel, plan.shape, workloads, configs=configs, **options)
    for line in profiling_cli.losses(timings.notes):
        print(f"rampwrap: {line}", file=sys.stderr)
    policies: dict[str, Policy] = {name: Static(configs, table.renumber(place)) for name, table in tables.items()}
    policies[plan.model.name] = Renumbered(
        configs, routed, tuple(place[where[index]] for index in range(len(routed.configs)))
    )
    policies[compare.ORACLE] = Oracle(timings)
    return {**_reported(compare.evaluate(timings, policies, baseline), a), **recorded}


def _replay(a: argparse.Namespace) -> dict[str, Any]:
    _check_pictures(a.plot, a.plot_fit)
    timings = joined_tables(a.tables)
    files = _static_files(a.static_file, ())
    extra = {name: read_measured(path, timings, timings.rows(a.eval)) for name, path in files.items()}
    models = tuple(dict.fromkeys(("ramp4", a.model)))
    comparison = compare.replay(timings, a.train, a.eval, models, extra)
    if a.plot_fit:
        report.model_picture(comparison.models[a.model], comparison.timings, a.plot_fit)
    return _reported(comparison, a)


def _regions(a: argparse.Namespace) -> dict[str, Any]:
    _check_pictures(a.plot)
    one = a.model or any((a.num_experts, a.top_k, a.hidden_size, a.intermediate_size))
    shapes = {a.model or shape_name(shape_of(a)): shape_of(a)} if one else SHAPES
    return regions.run(shapes, find_device(a.device), a.batch_size, a.plot)


def _check_pictures(*paths: str | None) -> None:
    for path in filter(None, paths):
        report.picture_type(path)


def _static_files(paths: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Names of tuned files as policies; the folder tells those of one name apart, as SGLang's by version of Triton."""
    named: dict[str, str] = {}
    for path in dict.fromkeys(map(os.path.normpath, paths)):
        parts, stem = list(pathlib.Path(path).absolute().parts[:-1]), pathlib.Path(path).name.removesuffix(".json")
        name = f"static {stem}"
        while (name in named or name in taken) and parts:
            stem = f"{parts.pop().strip('/')}/{stem}"
            name = f"static {stem}"
        named[name] = path
    return named


def _reported(comparison: compare.Comparison, a: argparse.Namespace) -> dict[str, Any]:
    if a.csv:
        report.save_text(report.csv_text(comparison), a.csv)
    if a.plot:
        report.picture(comparison, a.plot)
    return {**comparison.to_dict(), "text": report.text(comparison)}


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
        sub.add_argument("--batch-size", type=positive, nargs="+", default=tokens, metavar="M", help="token counts")
        sub.add_argument(
            "--routing",
            nargs="+",
            default=routings,
            metavar="R",
            help="uniform zipf:1.2 dirichlet:0.3 hot:1 lognormal:1 trace:FILE[:LAYER]",
        )
        sub.add_argument("--seed", type=int, default=0)

    def tables(sub: argparse.ArgumentParser) -> None:
        text = "of several kernels, one table each: the choice then crosses kernels"
        sub.add_argument("tables", nargs="+", metavar="TABLE.npz", help=text)

    def recorded(sub: argparse.ArgumentParser, name: str = "--recorded", where: str = "") -> None:
        text = f"histograms that an engine recorded{where}: SGLang's dumps, vLLM's routed experts, .npy, .npz, .json"
        sub.add_argument(name, nargs="+", default=[], metavar="FILE[:LAYER]", help=text)

    def layer(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", help=", ".join(SHAPES))
        sub.add_argument("--num-experts", "-E", type=positive)
        sub.add_argument("--top-k", type=positive)
        sub.add_argument("--hidden-size", "-K", type=positive)
        sub.add_argument("--intermediate-size", "-N", type=positive)
        sub.add_argument(
            "--dtype", help="bf16, fp16 or fp8; bf16 by default, with --engine what the model's config says"
        )
        sub.add_argument("--tp-size", type=positive, default=1)
        sub.add_argument("--num-local-experts", type=positive, help="on this rank; all by default")

    def measuring(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--rounds", type=positive, default=4, help="interleaved rounds of measurement; the first only sorts out"
        )
        sub.add_argument("--quiet", action="store_true", help="no progress bar")

        text = "measure anew and overwrite what stands at --out; by default its cells are kept, and another table is refused"
        sub.add_argument("--replace", action="store_true", help=text)
        text = "after which a launch counts as hung, 5m by default"
        sub.add_argument("--patience", type=seconds, default=300.0, metavar="5m", help=text)

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

    p = command("profile", profiling_cli.run, "time every config on every workload; resumes where a killed run stopped")
    p.add_argument(
        "--kernel",
        help=f"{', '.join(catalog.KERNELS)}, portfolio:a+b of them, or package.module:factory; by default triton_fused_moe, "
        "with --engine vllm the fastest one that runs here",
    )
    p.add_argument(
        "--engine",
        choices=ENGINES,
        help="profile all MoE shapes of the model in the folder --model and write its plans",
    )
    layer(p)
    p.add_argument("--ep", action="store_true", help="with --engine: the --tp-size ranks share out whole experts")
    text = "with --ep: copies of experts that the engine adds for balance, over all ranks"
    p.add_argument("--num-redundant-experts", type=int, default=0, metavar="N", help=text)
    workloads(p, TRAIN_TOKENS, TRAIN_ROUTINGS)
    p.add_argument(
        "--eval-batch-size", type=positive, nargs="*", default=EVAL_TOKENS, metavar="M", help="held-out token counts"
    )
    p.add_argument("--eval-routing", nargs="*", default=EVAL_ROUTINGS, metavar="R", help="held-out routings")
    recorded(p)
    recorded(p, "--eval-recorded", ", held out")
    p.add_argument("--recorded-limit", type=positive, default=24, metavar="N", help="histograms taken of a file")
    measuring(p)
    p.add_argument("--budget", type=seconds, metavar="3m", help="measure only the cells that matter, within this time")
    p.add_argument(
        "--most-configs",
        type=positive,
        metavar="N",
        help="keep N configs of each kernel after a short sweep; all by default, 40 with --engine and no --budget",
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be measured, and for how long")
    p.add_argument("--out", metavar="TABLE.npz")

    p = command("fit", _fit, "fit a timing table and write the plan a deployment loads")
    tables(p)
    p.add_argument("--train", default="train", help="the split to fit")
    p.add_argument("--model", default="wave", choices=sorted(MODELS))
    p.add_argument("--static", default="uniform", help="the baseline: uniform, averaged, or a tuned JSON file")
    p.add_argument("--choosing-us", type=float, default=0.0, help="cost of choosing, which a gain must exceed")
    p.add_argument("--out", metavar="PLAN.json")

    p = command("show", _show, "what a plan or a timing table holds")
    p.add_argument("file", metavar="PLAN.json|TABLE.npz")

    p = command(
        "seal", _seal, "accept a plan or timing table that you edited by hand: check it whole, renew its checksum"
    )
    p.add_argument("file", metavar="PLAN.json|TABLE.npz")

    p = command("explain", _explain, "which config a routing would get, and why")
    p.add_argument("plan", metavar="PLAN.json")
    p.add_argument("--expert-counts", type=counts, metavar="3,0,5,...", help="the histogram itself")
    workloads(p, None, ["uniform"])

    p = command("compare", _compare, "A/B on the live kernel: routing-aware against static")
    p.add_argument("plan", metavar="PLAN.json")
    p.add_argument("--kernel", help="when it is not one of the built-in names")
    workloads(p, None, EVAL_ROUTINGS)
    recorded(p)
    p.add_argument("--recorded-limit", type=positive, default=24, metavar="N", help="histograms taken of a file")
    measuring(p)
    p.add_argument("--oracle", action="store_true", help="time all configs, for regret against exhaustive search")
    p.add_argument("--out", metavar="TABLE.npz", help="keep the measured times")
    p.add_argument("--kernel-default", action="store_true", help="also against the kernel's own default configs")
    reporting(p)

    p = command("replay", _replay, "the same A/B on a timing table, without a GPU")
    tables(p)
    p.add_argument("--train", default="train", help="the split to fit")
    p.add_argument("--eval", default="eval", help="the split to judge")
    p.add_argument("--plot-fit", metavar="FILE", help="draw predicted against measured time (needs matplotlib)")
    p.add_argument("--model", default="wave", choices=sorted(MODELS))
    reporting(p)

    kernel_build.add_arguments(command("build-kernels", kernel_build.run, kernel_build.TEXT))

    p = command("regions", _regions, "where swizzle, split-K and wide tiles help, from hardware constants alone")
    layer(p)
    p.add_argument("--device", default="h200", help="a known GPU")
    p.add_argument("--batch-size", type=positive, nargs="+", default=[8, 256, 4096], metavar="M", help="token counts")
    p.add_argument("--plot", metavar="FILE", help="draw the regions (needs matplotlib)")
    return parser
