"""What ``rampwrap profile`` does: one layer's shape, or all of a model's for an engine, by one kernel or several."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.cli.command import Answer
from rampwrap.cli.layer import shape_name
from rampwrap.cli.measuring import losses, terminable
from rampwrap.cli.profile_request import ENGINE_CONFIGS, ProfileRequest
from rampwrap.cli.tables import joined_tables
from rampwrap.errors import InputError
from rampwrap.files import check_target
from rampwrap.kernel import catalog
from rampwrap.kernel.device import Device, device_of, no_gpu
from rampwrap.kernel.names import members_of
from rampwrap.kernel.protocol import Kernel, kernel_version
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.outlook import PLANNING, Keep, Outlook, Phase, about
from rampwrap.measure.records import Header, row_keys
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Workload

PLANNING_S = 10.0
UNKNOWN_S = 1e-3
"Seconds that fitting and compiling a plan count for before one is made, and a cell of which nothing is known."


def run(its: ProfileRequest) -> Answer:
    """Profiles into a table, or a model's layers into plans."""
    with terminable():
        if its.engine:
            return Answer.of(_profile_model(its, its.engine))
        from rampwrap.engines.profile import file_name

        shape = its.shape()
        out = its.out or f"{file_name(its.make_kernel(shape).name)}-{shape_name(shape)}.npz"
        said = its.recorded_said(shape)
        done = {**_profile_shape(its, shape, out), **said}
        return Answer.of(done if its.dry_run else {**done, "text": f"{done['text']}\nnext: rampwrap fit {out}"})


def _profile_model(its: ProfileRequest, engine: str) -> dict[str, Any]:
    from rampwrap.engines.installed import installed
    from rampwrap.engines.prepare import compile_for
    from rampwrap.engines.profile import check_kernel, default_kernel, detours, profile_model

    layers, here = its.layers(), installed(engine)
    said_first = detours(engine, layers, its.ranks, here.version)
    for shape in layers.shapes:
        check_kernel(engine, its.kernel_name(shape), shape)
    if its.dry_run:
        found = [
            {"shape": attrs.asdict(shape), **its.recorded_said(shape), **_profile_shape(its, shape, "")}
            for shape in layers.shapes
        ]
        lines = [f"{shape}: {one['text']}" for shape, one in zip(layers.shapes, found, strict=True)]
        said_first += [f"rampwrap leaves {here} as it is: {fault}." for fault in here.faults]
        text = "\n".join([*layers.left, *said_first, *lines])
        return {"shapes": found, "left": list(layers.left), "engine": attrs.asdict(here), "text": text}
    if not its.ignore_engine:
        here.check()
    for line in said_first:
        print(f"rampwrap: {line}", file=sys.stderr)

    said: list[dict[str, Any]] = []

    outlook = Outlook([phase for shape in layers.shapes for phase in phases(its, shape)])

    def say(text: str) -> None:
        if not its.measuring.quiet:
            print(f"rampwrap: {text}", file=sys.stderr)

    def measure(shape: MoEShape, out: str, keep: Keep) -> tuple[Kernel, Timings]:
        said.extend(its.recorded_said(shape).get("recorded", []))
        _profile_shape(its, shape, out, outlook, keep)
        return its.make_kernel(shape), Timings.load(out)

    shapes = "1 shape" if len(layers.shapes) == 1 else f"{len(layers.shapes)} shapes"
    say(f"{shapes}, {len(outlook.phases)} phases: {about(outlook.left)} where nothing was measured yet.")
    done = profile_model(
        layers, its.make_kernel, measure, folder=its.out, prepare=compile_for, during=outlook.during, say=say
    )
    hints = {default_kernel(engine, shape)[1] for shape in layers.shapes if not its.kernel}
    recorded = {"recorded": said} if said else {}
    took = {"seconds": outlook.seconds, "foretold": outlook.told}
    return {**done, **recorded, **took, "text": "\n".join([done["text"], *sorted(hints - {""})])}


def _profile_shape(
    its: ProfileRequest, shape: MoEShape, out: str, outlook: Outlook | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """One shape by one kernel, or by several.

    Args:
        outlook: for all shapes; of this one by default.
        keep: called with what is measured, of each phase that is done.
    """
    from rampwrap.measure.active import profile_active
    from rampwrap.measure.full import finished, profile
    from rampwrap.measure.sweep import sweep
    from rampwrap.model.fit import fitted_us

    name = its.kernel_name(shape)
    missing = catalog.missing_gpu(name)
    if missing and not its.dry_run:
        raise InputError(
            f"there is no GPU here ({missing}), and kernel {name!r} runs on one only; profile where the GPU is, or try "
            "the command with --kernel sim."
        )
    kernel, workloads = catalog.make_kernel(name, shape), its.workloads(shape)
    if members_of(name):
        return _profile_members(its, shape, workloads, out, kernel, outlook, keep)
    most = _kept_configs(its, kernel)
    sweeps = most is not None
    outlook = outlook or Outlook(phases(its, shape))
    if its.dry_run:
        projected = _projected(its, kernel, shape, workloads, most)
        start = f"There is no GPU here ({missing}). " if missing else ""
        return {**projected, "text": start + projected["text"], "out": out}
    check_target(out)
    if (missing := no_gpu()) and not isinstance(getattr(kernel, "device", None), Device):
        said = f"there is no GPU here ({missing}); kernel {kernel.name!r} is timed on the CPU, by the clock"
        print(f"rampwrap: {said} unless it returns a number of microseconds.", file=sys.stderr)
    common = {**its.measuring.arguments(out, its.seed), "rounds": its.rounds}
    kept = pathlib.Path(f"{out.removesuffix('.npz')}.sweep.npz")
    before = None if its.measuring.replace or not sweeps else finished(out, kernel, shape, workloads)
    if before is not None:  # another sweep might keep other configs
        kept.unlink(missing_ok=True)
        timings = attrs.evolve(before, notes={**before.notes, "reused_cells": int(np.isfinite(before.us).sum())})
    elif its.budget:
        with outlook.during((name, "budget")):
            timings = profile_active(kernel, shape, workloads, fitted_us, budget_s=its.budget, **common)
    elif most is not None:
        with outlook.during((name, "sweep")):
            configs = sweep(
                kernel, shape, most, workloads=workloads, out=kept, quiet=its.measuring.quiet, seed=its.seed
            )
        if keep is not None:
            keep(kernel, Timings.load(kept), kept.name)
        with outlook.during((name, "table")):
            timings = profile(kernel, shape, workloads, configs=configs, **common)
        timings = attrs.evolve(timings, notes={**timings.notes, "swept_configs": len(kernel.configs)})
        timings.save(out)
        kept.unlink(missing_ok=True)  # it is there for a run that goes on; the next one begins anew
    else:
        with outlook.during((name, "table")):
            timings = profile(kernel, shape, workloads, **common)
    text = "\n".join([*losses(timings.notes), f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs"])
    if gave_up := timings.notes.get("gave_up"):
        text = f"{gave_up}\n{text}"
    return {"out": out, "workloads": len(timings.us), "configs": len(timings.configs), **timings.notes, "text": text}


def _kept_configs(its: ProfileRequest, kernel: Kernel) -> int | None:
    """Configs that stay after a sweep; None where there is none."""
    most = its.most_configs or (ENGINE_CONFIGS if its.engine else len(kernel.configs))
    return most if most < len(kernel.configs) and not its.budget else None


def phases(its: ProfileRequest, shape: MoEShape) -> list[Phase]:
    """What profiling a shape consists of, in its order."""
    name = its.kernel_name(shape)
    planned = [Phase(PLANNING, PLANNING_S)] if its.engine else []
    members = members_of(name) or [name]
    found = []
    for member in members:
        if its.budget:
            found.append(Phase((member, "budget"), its.budget / len(members)))
            continue
        kernel = catalog.make_kernel(member, shape)
        projected = _projected(its, kernel, shape, its.workloads(shape), _kept_configs(its, kernel))
        for step, one in (("sweep", projected.get("sweep")), ("table", projected)):
            if one is not None:
                seconds = one["seconds"] if one["seconds"] is not None else one["cells"] * UNKNOWN_S
                found.append(Phase((member, step), seconds, one["cells"]))
    return [*found, *planned]


def _projected(
    its: ProfileRequest, kernel: Kernel, shape: MoEShape, workloads: Sequence[Workload], most: int | None
) -> dict[str, Any]:
    """What a dry run says; `most` configs stay after a sweep, None times all of them."""
    from rampwrap.measure.full import plan_profile
    from rampwrap.measure.sweep import sweep_workloads

    if most is None:
        projected = plan_profile(kernel, shape, workloads, rounds=its.rounds)
        return {**attrs.asdict(projected), "text": f"{kernel.name}: {projected}"}
    first = plan_profile(kernel, shape, sweep_workloads(workloads, its.seed), rounds=1)
    kept = [config for index, config in enumerate(kernel.configs) if index not in first.refused][:most]
    projected = plan_profile(kernel, shape, workloads, configs=kept, rounds=its.rounds, compiled=True)
    text = f"{kernel.name}: a sweep of {first}; then {projected}"
    return {**attrs.asdict(projected), "sweep": attrs.asdict(first), "text": text}


def _profile_members(
    its: ProfileRequest,
    shape: MoEShape,
    workloads: Sequence[Workload],
    out: str,
    portfolio: Any,
    outlook: Outlook | None,
    keep: Keep | None,
) -> dict[str, Any]:
    """One kernel after the other, each into a table of its own, which stays if it is finished, and all of them joined."""
    from rampwrap.measure.standing import standing

    if not its.dry_run:
        check_target(out)
    if not (its.dry_run or its.measuring.replace):
        configs, device = tuple(portfolio.configs), device_of(portfolio)
        grids = tuple(portfolio.grid(config, shape) for config in configs)
        header = Header(portfolio.name, kernel_version(portfolio), device, shape, configs, grids, timer="")
        standing(out, header, row_keys(shape, workloads))
    budget = its.budget and its.budget / len(portfolio.members)
    parts = {name: f"{out.removesuffix('.npz')}.{name}.npz" for name in portfolio.members}
    done: list[dict[str, Any]] = []
    for name, part in parts.items():
        own = attrs.evolve(its, kernel=name, budget=budget)
        done.append(_profile_shape(own, shape, part, outlook, keep))
        if keep is not None:
            keep(catalog.make_kernel(name, shape), Timings.load(part), pathlib.Path(part).name)
    lines = [one["text"] for one in done]
    if its.dry_run:
        totals: dict[str, Any] = {key: sum(one[key] for one in done) for key in ("configs", "cells")}
        seconds = [one["seconds"] for one in done]
        totals["seconds"] = None if None in seconds else sum(seconds)
        return {**totals, "workloads": done[0]["workloads"], "members": done, "out": out, "text": "\n".join(lines)}
    timings = joined_tables(list(parts.values()))
    timings.save(out)
    lines.append(f"{out}: {len(timings.us)} workloads x {len(timings.configs)} configs")
    counts = {"workloads": len(timings.us), "configs": len(timings.configs)}
    return {"out": out, "members": done, **counts, **timings.notes, "text": "\n".join(lines)}
