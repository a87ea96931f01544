"""The command ``rampwrap profile``: one layer's shape, or all of a model's for an engine, by one kernel or several."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import attrs

from rampwrap import catalog
from rampwrap.arguments import joined_tables, recorded_of, routings_of, shape_name, shape_of
from rampwrap.errors import InputError
from rampwrap.kernel import Kernel, MoEShape
from rampwrap.portfolio import members_of
from rampwrap.routing import workload_grid
from rampwrap.timings import Timings

ENGINE_CONFIGS = 40
"Configs of each kernel that an engine's plans are profiled with, where nothing else is asked for."


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Runs the command: its result, with ``text`` for people."""
    if a.engine:
        return _profile_model(a)
    from rampwrap.engines.profiling import file_name

    shape = shape_of(a)
    return _profile_shape(a, shape, a.out or f"{file_name(_kernel(a, shape).name)}-{shape_name(shape)}.npz")


def _kernel(a: argparse.Namespace, shape: MoEShape) -> Kernel:
    """The kernel to profile: the one asked for, else what serves the shape best."""
    return catalog.make_kernel(_kernel_name(a, shape), shape)


def _kernel_name(a: argparse.Namespace, shape: MoEShape) -> str:
    from rampwrap.engines.profiling import default_kernel

    return str(a.kernel or default_kernel(a.engine, shape)[0])


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
    from rampwrap.sweep import sweep, sweep_workloads

    if members := members_of(_kernel_name(a, shape)):
        return _profile_members(a, shape, out, members)
    kernel = _kernel(a, shape)
    workloads = workload_grid(a.batch_size, routings_of(a.routing), "train", a.seed)
    workloads += workload_grid(a.eval_batch_size, routings_of(a.eval_routing), "eval", a.seed)
    workloads += recorded_of(a.recorded, shape, a, "train") + recorded_of(a.eval_recorded, shape, a, "eval")
    most = a.most_configs or (ENGINE_CONFIGS if a.engine else len(kernel.configs))
    sweeps = most < len(kernel.configs) and not a.budget
    if a.dry_run:
        projected = plan_profile(
            kernel, shape, workloads, configs=kernel.configs[:most] if sweeps else None, rounds=a.rounds
        )
        first = plan_profile(kernel, shape, sweep_workloads(workloads, a.seed), rounds=1) if sweeps else None
        text = str(projected) if first is None else f"a sweep of {first}; then {projected}"
        extra = {} if first is None else {"sweep": attrs.asdict(first)}
        return {**attrs.asdict(projected), **extra, "out": out, "text": text}
    if a.budget:
        # Held-out rows need every config, or there is no oracle to judge by: a budget pays for the train rows alone.
        seen = [workload for workload in workloads if workload.split == "train"]
        timings = profile_active(
            kernel, shape, seen, out=out, rounds=a.rounds, budget_s=a.budget, quiet=a.quiet, seed=a.seed
        )
    else:
        common: dict[str, Any] = {"quiet": a.quiet, "seed": a.seed}
        configs = None
        if sweeps:
            kept = f"{out.removesuffix('.npz')}.sweep.npz"
            configs = sweep(kernel, shape, most, workloads=workloads, out=kept, **common)
        timings = profile(kernel, shape, workloads, configs=configs, out=out, rounds=a.rounds, **common)
    text = f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs\nnext: rampwrap fit {out}"
    if gave_up := timings.notes.get("gave_up"):
        text = f"{gave_up}\n{text}"
    return {"out": out, "workloads": len(timings.us), "configs": len(timings.configs), **timings.notes, "text": text}


def _profile_members(a: argparse.Namespace, shape: MoEShape, out: str, members: Sequence[str]) -> dict[str, Any]:
    """One kernel after the other, each into a table of its own, and all of them joined."""
    budget = a.budget and a.budget / len(members)
    parts = [f"{out.removesuffix('.npz')}.{name}.npz" for name in members]
    done = [
        _profile_shape(argparse.Namespace(**{**vars(a), "kernel": name, "budget": budget}), shape, part)
        for name, part in zip(members, parts, strict=True)
    ]
    if a.dry_run:
        return {"members": done, "out": out, "text": "\n".join(its["text"] for its in done)}
    timings = joined_tables(parts)
    timings.save(out)
    text = f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs of {len(parts)} kernels"
    text += f"\nnext: rampwrap fit {out}"
    return {"out": out, "members": done, "workloads": len(timings.us), "configs": len(timings.configs), "text": text}
