"""The commands that make plans and look into files: ``fit``, ``show`` and ``seal``."""

import json
import os
import pathlib

import attrs
import click
import numpy as np

from rampwrap import schema
from rampwrap.cli.command import Answer, command
from rampwrap.cli.tables import COST_MODEL, fit_options, joined_tables, tables_argument, train_option
from rampwrap.errors import InputError
from rampwrap.kernel.protocol import format_config
from rampwrap.measure.timings import Timings, is_table
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan


@attrs.frozen
class FitRequest:
    """Tables, and how a plan is made of them."""

    tables: tuple[str, ...]
    train: str = "train"
    cost_model: str = COST_MODEL
    static: str = "uniform"
    choosing_us: float = 0.0
    out: str | None = None

    def __attrs_post_init__(self) -> None:
        if len(self.tables) > 1 and not self.out:
            raise InputError("fit was given several tables and no name for their plan; pass --out PLAN.json.")


@command("fit", FitRequest)
@tables_argument
@train_option
@fit_options
@click.option("--static", help="the baseline: uniform, averaged, or a tuned JSON file")
@click.option("--choosing-us", type=float, help="cost of choosing, which a gain must exceed")
@click.option("--out", metavar="PLAN.json")
def fit(its: FitRequest) -> Answer:
    """Fits a model and writes the plan."""
    timings = joined_tables(its.tables)
    source = " + ".join(map(os.path.basename, its.tables))
    plan = make_plan(timings, its.train, its.cost_model, its.static, its.choosing_us, source)
    out = its.out or str(pathlib.Path(its.tables[0]).with_suffix(".plan.json"))
    plan.save(out)
    return Answer(f"{out}: {_plan_text(plan)}", {"out": out, **plan.provenance})


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


@attrs.frozen
class FileRequest:
    """A plan or a timing table."""

    file: str


@command("show", FileRequest)
@click.argument("file", metavar="PLAN.json|TABLE.npz")
def show(its: FileRequest) -> Answer:
    """What a plan or a timing table holds."""
    path = its.file
    if not is_table(path):
        plan = Plan.load(path)
        return Answer(_plan_text(plan), json.loads(plan.to_json()))
    t = Timings.load(path)
    ran = float((~np.isnan(t.us)).mean())
    text = (
        f"{t.kernel} {t.kernel_version}, {t.shape}, {t.device.name}\n{len(t.us)} workloads "
        f"({', '.join(f'{t.split.count(s)} {s}' for s in sorted(set(t.split)))}) x {len(t.configs)} configs, {ran:.0%} of the cells measured"
    )
    text += "".join(f"\n  refused: {format_config(t.configs[i])}: {why}" for i, why in t.reasons.items())
    sizes = {"workloads": len(t.us), "configs": len(t.configs), "measured": ran}
    return Answer(text, {"kernel": t.kernel, "shape": schema.dump(t.shape), **sizes})


@command("seal", FileRequest)
@click.argument("file", metavar="PLAN.json|TABLE.npz")
def seal(its: FileRequest) -> Answer:
    """Checks a file that was edited by hand, and renews its checksum."""
    path = its.file
    kind: type[Timings | Plan] = Timings if is_table(path) else Plan
    kind.load(path, sealed=False).save(path)
    return Answer(f"{path} is whole and sealed with the checksum of what it holds now.", {"out": path})
