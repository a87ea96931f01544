"""The timing tables of a command, and the cost model that is fitted to them."""

import sys
from collections.abc import Sequence
from typing import Any

import click

from rampwrap.cli.command import options
from rampwrap.measure.join import join
from rampwrap.measure.timings import Timings
from rampwrap.model.cost import MODELS, OLD_NAMES

COST_MODEL = next(iter(MODELS))
"What is fitted where nothing else is asked for."
tables_argument = click.argument("tables", nargs=-1, required=True, metavar="TABLE.npz...")
train_option = click.option("--train", help="the split to fit")


class _CostModel(click.Choice[str]):
    """The name of a cost model, or what earlier versions called it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(super().convert(OLD_NAMES.get(value, value), param, ctx))


def _no_model(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            f"--model {value} would name a layer or a checkpoint, which the tables do; choose the cost model by "
            f"--fit {'|'.join(MODELS)}.",
            ctx,
        )


fit_options = options(
    click.option("--fit", "cost_model", type=_CostModel(list(MODELS)), help=f"the cost model; {COST_MODEL} by default"),
    click.option("--model", hidden=True, expose_value=False, callback=_no_model),
)


def joined_tables(paths: Sequence[str]) -> Timings:
    """One table, or those of several kernels as one; says on stderr how many workloads not all of them have."""
    tables = [Timings.load(path) for path in paths]
    joined = join(tables)
    most = max(len(table.us) for table in tables)
    if len(joined.us) < most:
        text = f"{len(joined.us)} of {most} workloads are in all tables; the others are left out."
        print(f"rampwrap: {text}", file=sys.stderr)
    return joined
