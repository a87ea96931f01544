"""Makes the plans that the wheel brings (`rampwrap/plans`) of measured tables of this repository; no GPU.

    python benchmarks/shipped_plans.py [--out DIR]

A table counts where its kernel is today's: one of another version, or with a config that the kernel no longer takes, is named
and left out, and so is a plan that was made of it before. Every plan says which tables it is of, their SHA-256, when, where
and with which torch and Triton they were measured, and the commit that ran.
"""

import argparse
import hashlib
import pathlib
import re
from typing import Any

import attrs

from rampwrap.engines.profile import plan_name
from rampwrap.errors import RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.measure.join import join
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import SHIPPED, SUFFIX
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan

RESULTS = pathlib.Path(__file__).parent / "results"
TABLES = (
    ("h200-v2-triton-olmoe-bf16",),
    ("h200-v2-triton-olmoe-bf16", "h200-v2-cute-olmoe-bf16"),
    ("h200-v2-triton-qwen3-30b-bf16",),
    ("h200-v2-triton-qwen3-30b-bf16", "h200-v2-cute-qwen3-30b-bf16"),
    ("h200-v2-cute-qwen3-30b-fp8",),
    ("h200-v2-triton-qwen3-30b-fp8",),
    ("h100-portfolio-deepgemm-qwen3-30b-fp8-cute_moe",),
)
"What each plan is made of: one table, or those of several kernels."


def commit_of(table: str) -> str:
    """The commit whose code measured a table, by the index of results; with a star it is the one that added the file."""
    lines = (RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    return next(line.split("|")[-2].strip() for line in lines if f"`{table}.npz`" in line)


def measured(table: str, timings: Timings) -> dict[str, Any]:
    """Where a table comes from."""
    told = {name: timings.notes[name] for name in ("date", "torch", "triton") if name in timings.notes}
    digest = hashlib.sha256((RESULTS / f"{table}.npz").read_bytes()).hexdigest()
    return {"table": f"{table}.npz", **told, "commit": commit_of(table), "sha256": digest}


def shipped(tables: tuple[str, ...]) -> Plan:
    """The plan of some tables.

    Raises:
        RampwrapError: the kernel is another today.
    """
    read = [Timings.load(RESULTS / f"{table}.npz") for table in tables]
    timings = join(read) if len(read) > 1 else read[0]
    plan = make_plan(timings, source=" + ".join(f"{table}.npz" for table in tables))
    sources = [measured(table, its) for table, its in zip(tables, read, strict=True)]
    # The day of the measurement: the same tables make the same file.
    made = min(re.sub("T.*", "", its["date"]) for its in sources)
    plan = attrs.evolve(plan, provenance={**plan.provenance, "made": made, "measured": sources})
    plan.check(make_kernel(plan.kernel, plan.shape))
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=SHIPPED)
    out: pathlib.Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"*{SUFFIX}"):
        old.unlink()
    for tables in TABLES:
        try:
            plan = shipped(tables)
        except RampwrapError as error:
            print(f"left out: {' + '.join(tables)}: {error}")
            continue
        path = out / f"{plan_name(plan.kernel, plan.device.name, plan.shape)}{SUFFIX}"
        plan.save(path)
        print(f"{path.name}: {path.stat().st_size} bytes, held out {plan.provenance.get('held_out')}")


if __name__ == "__main__":
    main()
