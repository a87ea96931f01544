"""The command ``rampwrap replay``: the A/B of policies on a timing table, without a GPU."""

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.reporting import ReportRequest, is_picture, report_options
from rampwrap.cli.tables import COST_MODEL, fit_options, joined_tables, tables_argument, train_option
from rampwrap.compare import evaluate
from rampwrap.compare.report import model_picture
from rampwrap.policy.static import read_measured


@attrs.frozen
class ReplayRequest:
    """Tables, the rows to fit and those to judge."""

    tables: tuple[str, ...]
    train: str = "train"
    eval: str = "eval"
    plot_fit: str | None = attrs.field(default=None, validator=is_picture)
    cost_model: str = COST_MODEL
    report: ReportRequest = attrs.field(factory=ReportRequest)


@command("replay", ReplayRequest)
@tables_argument
@train_option
@click.option("--eval", help="the split to judge")
@click.option("--plot-fit", metavar="FILE", help="draw predicted against measured time (needs matplotlib)")
@fit_options
@report_options
def replay(its: ReplayRequest) -> Answer:
    """Judges policies by what was measured before."""
    timings = joined_tables(its.tables)
    extra = {name: read_measured(path, timings, timings.rows(its.eval)) for name, path in its.report.files(()).items()}
    models = tuple(dict.fromkeys(("ramp4", its.cost_model)))
    comparison = evaluate.replay(timings, its.train, its.eval, models, extra)
    if its.plot_fit:
        model_picture(comparison.models[its.cost_model], comparison.timings, its.plot_fit)
    return its.report.answer(comparison)
