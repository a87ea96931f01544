"""The command ``rampwrap profile``: one layer's shape, or all of a model's for an engine, by one kernel or several."""

import argparse
import contextlib
import functools
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.checkpoint.model import Layers, Ranks, read_layers
from rampwrap.cli.types import joined_tables, recorded_of, recorded_said, routings_of, shape_name, shape_of
from rampwrap.errors import InputError
from rampwrap.files import check_target
from rampwrap.kernel import catalog
from rampwrap.kernel.device import Device, device_of, no_gpu
from rampwrap.kernel.names import members_of
from rampwrap.kernel.protocol import Kernel, format_config, kernel_version
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.records import Header, row_keys
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Workload, workload_grid

ENGINE_CONFIGS = 40
"Configs of each kernel that an engine's plans are profiled with, where nothing else is asked for."


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Runs the command: its result, with ``text`` for people."""
    with terminable():
        return _run(a)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """What a scheduler's SIGTERM ends leaves as after Ctrl-C: the journal is in good order, and no locks stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def losses(notes: dict[str, Any]) -> list[str]:
    """Lines on what a table lacks, and on what was not measured anew."""
    lines = []
    if again := notes.get("reused_cells"):
        lines.append(f"{again} cells were there already and were kept; --replace measures all anew")
    if skipped := notes.get("skipped"):
        label, why = next(iter(skipped.items()))
        lines.append(f"{len(skipped)} workloads could not be measured and are left out, as {label}: {why}")
    if failed := notes.get("failed"):
        first = failed[0]
        lines.append(
            f"{len(failed)} cells failed, as {format_config(first['config'])} on {first['workload']}: {first['reason']}"
        )
    lines += [f"passed over: {config}: {why}" for config, why in notes.get("passed_over", {}).items()]
    if skipped or failed:
        lines.append("the same command tries again what is missing")
    return lines


def _run(a: argparse.Namespace) -> dict[str, Any]:
    if a.engine:
        return _profile_model(a)
    from rampwrap.engines.profile import file_name

    shape = shape_of(a)
    out = a.out or f"{file_name(_kernel(a, shape).name)}-{shape_name(shape)}.npz"
    said = recorded_said(a, shape)
    done = {**_profile_shape(a, shape, out), **said}
    return done if a.dry_run else {**done, "text": f"{done['text']}\nnext: rampwrap fit {out}"}


def _kernel(a: argparse.Namespace, shape: MoEShape) -> Kernel:
    """The kernel to profile: the one asked for, else what serves the shape best."""
    return catalog.make_kernel(_kernel_name(a, shape), shape)


def _kernel_name(a: argparse.Namespace, shape: MoEShape) -> str:
    from rampwrap.engines.profile import default_kernel

    return str(default_kernel(a.engine, shape)[0] if a.kernel is None else a.kernel)


def _workloads(a: argparse.Namespace, shape: MoEShape) -> list[Workload]:
    rows = workload_grid(a.batch_size, routings_of(a.routing), "train", a.seed)
    rows += workload_grid(a.eval_batch_size, routings_of(a.eval_routing), "eval", a.seed)
    rows += recorded_of(a.recorded, shape, a, "train") + recorded_of(a.eval_recorded, shape, a, "eval")
    # Held-out rows need every config, or there is no oracle to judge by: a budget pays for the train rows alone.
    return [row for row in rows if row.split == "train"] if a.budget else rows


def _layers(a: argparse.Namespace) -> Layers:
    """The layers of a model's folder, or the one that the sizes name."""
    if a.model and a.num_experts is None and a.num_local_experts is None:
        ranks = Ranks(a.tp_size, a.ep, a.num_redundant_experts)
        return read_layers(a.model, ranks, dtype=a.dtype, engine=a.engine)
    if not a.model and a.num_experts is None:
        raise InputError(
            "--engine was given without --model; give the folder of a model with its config.json, or the sizes of a layer."
        )
    return Layers((shape_of(a),))


def _profile_model(a: argparse.Namespace) -> dict[str, Any]:
    from rampwrap.engines.prepare import compile_for
    from rampwrap.engines.profile import check_kernel, default_kernel, profile_model

    layers = _layers(a)
    for shape in layers.shapes:
        check_kernel(a.engine, _kernel_name(a, shape), shape)
    if a.dry_run:
        found = [
            {"shape": attrs.asdict(shape), **recorded_said(a, shape), **_profile_shape(a, shape, "")}
            for shape in layers.shapes
        ]
        lines = [f"{shape}: {its['text']}" for shape, its in zip(layers.shapes, found, strict=True)]
        return {"shapes": found, "left": list(layers.left), "text": "\n".join([*layers.left, *lines])}

    said: list[dict[str, Any]] = []

    def measure(shape: MoEShape, out: str) -> tuple[Kernel, Timings]:
        said.extend(recorded_said(a, shape).get("recorded", []))
        _profile_shape(a, shape, out)
        return _kernel(a, shape), Timings.load(out)

    done = profile_model(layers, functools.partial(_kernel, a), measure, folder=a.out, prepare=compile_for)
    hints = {default_kernel(a.engine, shape)[1] for shape in layers.shapes if not a.kernel}
    recorded = {"recorded": said} if said else {}
    return {**done, **recorded, "text": "\n".join([done["text"], *sorted(hints - {""})])}


def _profile_shape(a: argparse.Namespace, shape: MoEShape, out: str) -> dict[str, Any]:
    from rampwrap.measure.active import profile_active
    from rampwrap.measure.full import finished, profile
    from rampwrap.measure.sweep import sweep
    from rampwrap.model.fit import fitted_us

    if a.most_configs and a.budget:
        raise InputError(
            f"--most-configs {a.most_configs} and --budget were both given; a budget picks configs itself, leave one out."
        )
    name = _kernel_name(a, shape)
    missing = catalog.missing_gpu(name)
    if missing and not a.dry_run:
        raise InputError(
            f"there is no GPU here ({missing}), and kernel {name!r} runs on one only; profile where the GPU is, or try "
            "the command with --kernel sim."
        )
    kernel, workloads = catalog.make_kernel(name, shape), _workloads(a, shape)
    if members_of(name):
        return _profile_members(a, shape, workloads, out, kernel)
    most = a.most_configs or (ENGINE_CONFIGS if a.engine else len(kernel.configs))
    sweeps = most < len(kernel.configs) and not a.budget
    if a.dry_run:
        projected = _projected(a, kernel, shape, workloads, most if sweeps else None)
        start = f"There is no GPU here ({missing}). " if missing else ""
        return {**projected, "text": start + projected["text"], "out": out}
    check_target(out)
    if (missing := no_gpu()) and not isinstance(getattr(kernel, "device", None), Device):
        said = f"there is no GPU here ({missing}); kernel {kernel.name!r} is timed on the CPU, by the clock"
        print(f"rampwrap: {said} unless it returns a number of microseconds.", file=sys.stderr)
    common: dict[str, Any] = {"out": out, "rounds": a.rounds, "quiet": a.quiet, "seed": a.seed}
    common |= {"replace": a.replace, "patience_s": a.patience}
    kept = pathlib.Path(f"{out.removesuffix('.npz')}.sweep.npz")
    before = None if a.replace or not sweeps else finished(out, kernel, shape, workloads)
    if before is not None:  # another sweep might keep other configs
        kept.unlink(missing_ok=True)
        timings = attrs.evolve(before, notes={**before.notes, "reused_cells": int(np.isfinite(before.us).sum())})
    elif a.budget:
        timings = profile_active(kernel, shape, workloads, fitted_us, budget_s=a.budget, **common)
    elif sweeps:
        configs = sweep(kernel, shape, most, workloads=workloads, out=kept, quiet=a.quiet, seed=a.seed)
        timings = profile(kernel, shape, workloads, configs=configs, **common)
        timings = attrs.evolve(timings, notes={**timings.notes, "swept_configs": len(kernel.configs)})
        timings.save(out)
        kept.unlink(missing_ok=True)  # it is there for a run that goes on; the next one begins anew
    else:
        timings = profile(kernel, shape, workloads, **common)
    text = "\n".join([*losses(timings.notes), f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs"])
    if gave_up := timings.notes.get("gave_up"):
        text = f"{gave_up}\n{text}"
    return {"out": out, "workloads": len(timings.us), "configs": len(timings.configs), **timings.notes, "text": text}


def _projected(
    a: argparse.Namespace, kernel: Kernel, shape: MoEShape, workloads: Sequence[Workload], most: int | None
) -> dict[str, Any]:
    """What a dry run says; `most` configs stay after a sweep, None times all of them."""
    from rampwrap.measure.full import plan_profile
    from rampwrap.measure.sweep import sweep_workloads

    if most is None:
        projected = plan_profile(kernel, shape, workloads, rounds=a.rounds)
        return {**attrs.asdict(projected), "text": f"{kernel.name}: {projected}"}
    first = plan_profile(kernel, shape, sweep_workloads(workloads, a.seed), rounds=1)
    kept = [config for index, config in enumerate(kernel.configs) if index not in first.refused][:most]
    projected = plan_profile(kernel, shape, workloads, configs=kept, rounds=a.rounds)
    text = f"{kernel.name}: a sweep of {first}; then {projected}"
    return {**attrs.asdict(projected), "sweep": attrs.asdict(first), "text": text}


def _profile_members(
    a: argparse.Namespace, shape: MoEShape, workloads: Sequence[Workload], out: str, portfolio: Any
) -> dict[str, Any]:
    """One kernel after the other, each into a table of its own, which stays if it is finished, and all of them joined."""
    from rampwrap.measure.standing import standing

    if not a.dry_run:
        check_target(out)
    if not (a.dry_run or a.replace):
        configs, device = tuple(portfolio.configs), device_of(portfolio)
        grids = tuple(portfolio.grid(config, shape) for config in configs)
        header = Header(portfolio.name, kernel_version(portfolio), device, shape, configs, grids, timer="")
        standing(out, header, row_keys(shape, workloads))
    budget = a.budget and a.budget / len(portfolio.members)
    parts = {name: f"{out.removesuffix('.npz')}.{name}.npz" for name in portfolio.members}
    done: list[dict[str, Any]] = []
    for name, part in parts.items():
        own = argparse.Namespace(**{**vars(a), "kernel": name, "budget": budget})
        done.append(_profile_shape(own, shape, part))
    lines = [its["text"] for its in done]
    if a.dry_run:
        totals: dict[str, Any] = {key: sum(its[key] for its in done) for key in ("configs", "cells")}
        seconds = [its["seconds"] for its in done]
        totals["seconds"] = None if None in seconds else sum(seconds)
        return {**totals, "workloads": done[0]["workloads"], "members": done, "out": out, "text": "\n".join(lines)}
    timings = joined_tables(list(parts.values()))
    timings.save(out)
    lines.append(f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs")
    counts = {"workloads": len(timings.us), "configs": len(timings.configs)}
    return {"out": out, "members": done, **counts, **timings.notes, "text": "\n".join(lines)}
