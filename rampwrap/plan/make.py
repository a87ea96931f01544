"""From a timing table to a plan."""

import datetime
import pathlib
from typing import Any

import attrs

from rampwrap._version import __version__
from rampwrap.compare import evaluate as compare
from rampwrap.errors import InputError
from rampwrap.kernel.catalog import CHOOSES_IN_GRAPH
from rampwrap.measure.timings import Timings
from rampwrap.model.fit import fit
from rampwrap.model.wave import Wave
from rampwrap.plan.plan import Plan
from rampwrap.policy.buckets import make_buckets
from rampwrap.policy.graph_lists import COSTS, all_in_graph
from rampwrap.policy.policies import Policy, Static
from rampwrap.policy.static import static_table
from rampwrap.routing.drift import profiled_ranges
from rampwrap.schema import dump


def make_plan(
    timings: Timings,
    train: str = "train",
    model: str = "wave",
    static: str = "uniform",
    choosing_us: float = 0.0,
    source: str = "",
) -> Plan:
    """Fits a table and keeps what a deployment needs.

    Args:
        timings: a profiled table.
        train: the split to fit; held-out figures come from ``eval`` where the table has it.
        model: a name of `rampwrap.model.cost.MODELS`.
        static: ``uniform``, ``averaged`` or the path of an engine's tuned file: what serves without a clear gain.
        choosing_us: cost of choosing, which a gain must exceed.
        source: where the table came from, for the provenance.
    """
    if not isinstance(timings, Timings):
        raise InputError(f"make_plan was given {timings!r:.80}; give a table, Timings.load(path).")
    rows = timings.rows(train)
    fitted = timings.take(rows)
    table = static_table(fitted, static)
    cost_model = fit(fitted, model)
    buckets = make_buckets(cost_model, timings.shape, table, fitted.num_tokens)
    provenance: dict[str, Any] = {
        "made": datetime.date.today().isoformat(),
        "rampwrap": __version__,
        "table": pathlib.Path(source).name,
        "train_workloads": len(rows),
        "profiled_configs": len(timings.configs),
    }
    if table.file is not None:
        provenance["static_file"] = dump(table.file)
    if static != table.source and table.file is None:
        provenance["static"] = f"no {train!r} row is {static}: tuned on all routings"
    if "eval" in timings.split and train != "eval":
        # Judged is what is shipped: the shortlists, against the table that serves without them.
        policies: dict[str, Policy] = {
            compare.STATIC_UNIFORM: Static(timings.configs, table),
            model: compare.routing_aware(fitted, cost_model, table, buckets, choosing_us),
        }
        judged = compare.evaluate(timings.take(timings.rows("eval")), policies).summary(model)
        provenance["held_out"] = {
            key: round(value, 5) for key, value in attrs.asdict(judged).items() if isinstance(value, float)
        }
    chooses = timings.kernel in CHOOSES_IN_GRAPH
    # Only configs that something may launch travel with the plan.
    used = sorted({*table.indices, *(i for bucket in buckets for i in bucket.shortlist)})
    where = {old: new for new, old in enumerate(used)}
    shipped = cost_model.take(tuple(used))
    serves = table.renumber(where)
    few = tuple(attrs.evolve(b, shortlist=tuple(where[i] for i in b.shortlist)) for b in buckets)
    return Plan(
        kernel=timings.kernel,
        kernel_version=timings.kernel_version,
        device=timings.device,
        shape=timings.shape,
        configs=tuple(timings.configs[i] for i in used),
        grids=tuple(timings.grids[i] for i in used),
        static=serves,
        model=shipped,
        buckets=few,
        choosing_us=choosing_us,
        profiled=profiled_ranges(fitted.num_tokens, fitted.counts),
        in_graph=all_in_graph(shipped, timings.shape, serves, few, COSTS if chooses else {})
        if isinstance(shipped, Wave)
        else (),
        provenance=provenance,
    )
