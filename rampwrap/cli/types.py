"""What the command line reads: durations, counts, shapes, workloads and tables, each refused with how to write it."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from rampwrap.errors import InputError
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.measure.join import join
from rampwrap.measure.timings import Timings
from rampwrap.routing.recorded import account
from rampwrap.routing.workloads import Routing, Workload, recorded_workloads


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


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Reads ``3,0,5``."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write 3,0,5,...") from None


def shape_of(a: argparse.Namespace) -> MoEShape:
    """The layer that ``--model`` or the four sizes name, as one rank has it."""
    sizes = {name: getattr(a, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
    given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
    for name in ("ep", "num_redundant_experts"):
        if getattr(a, name, None):
            raise InputError(
                f"--{name.replace('_', '-')} is for the models of an engine, --engine with --model DIR; give the experts of a "
                "rank by --num-local-experts here."
            )
    if a.model:
        if given:
            raise InputError(f"--model {a.model} and {', '.join(given)} were both given; leave one out.")
        if a.model not in SHAPES:
            more = " For a folder with a config.json add --engine." if pathlib.Path(a.model).exists() else ""
            raise InputError(
                f"model {a.model!r} is unknown; use one of {', '.join(SHAPES)} or give the four sizes.{more}"
            )
        base = attrs.evolve(SHAPES[a.model], dtype=a.dtype or "bf16")
    else:
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


def shape_name(shape: MoEShape) -> str:
    """``E64-k8-H2048-I1024-bf16``, for names of files."""
    local = "" if shape.num_local_experts == shape.num_experts else f"({shape.num_local_experts})"
    return f"E{shape.num_experts}{local}-k{shape.top_k}-H{shape.hidden_size}-I{shape.intermediate_size}-{shape.dtype}"


def routings_of(texts: Sequence[str]) -> list[Routing]:
    """Reads ``uniform``, ``zipf:1.2`` and their like."""
    return [Routing.parse(text) for text in texts]


def recorded_of(paths: Sequence[str], shape: MoEShape, a: argparse.Namespace, split: str) -> list[Workload]:
    """Workloads of files that an engine recorded, each file once."""
    sizes = {"num_experts": shape.num_experts, "top_k": shape.top_k}
    found = [
        recorded_workloads(path, **sizes, limit=a.recorded_limit, split=split, seed=a.seed)
        for path in dict.fromkeys(paths)
    ]
    return [workload for part in found for workload in part]


def recorded_said(a: argparse.Namespace, shape: MoEShape) -> dict[str, Any]:
    """What became of the recordings and traces that a command was given: ``{"recorded": [...]}``, {} without any.

    On stderr a line for each of which anything is left out, or may be other than it looks.
    """
    files = dict.fromkeys([*getattr(a, "recorded", []), *getattr(a, "eval_recorded", [])])
    routings = routings_of([*a.routing, *getattr(a, "eval_routing", [])])
    traces = dict.fromkeys(its.value for its in routings if its.kind == "trace")
    found = [account(path, shape.num_experts, shape.top_k, a.recorded_limit) for path in files]
    found += [account(path, shape.num_experts) for path in traces if path not in files]
    for its in found:
        if its.worth_saying:
            print(f"rampwrap: {its}", file=sys.stderr)
    return {"recorded": [its.to_dict() for its in found]} if found else {}


def joined_tables(paths: Sequence[str]) -> Timings:
    """One table, or those of several kernels as one; says on stderr how many workloads not all of them have."""
    tables = [Timings.load(path) for path in paths]
    joined = join(tables)
    most = max(len(table.us) for table in tables)
    if len(joined.us) < most:
        text = f"{len(joined.us)} of {most} workloads are in all tables; the others are left out."
        print(f"rampwrap: {text}", file=sys.stderr)
    return joined
