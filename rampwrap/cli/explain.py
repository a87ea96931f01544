"""The command ``rampwrap explain``: which config a plan chooses for a routing, and why."""

import sys
import warnings
from typing import Any

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.types import counts
from rampwrap.cli.workloads import recorded_said, routings_of, routings_option, seed_option, tokens_option
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import InputError, RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute import costs
from rampwrap.measure.full import roofline_us
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import Policy
from rampwrap.routing.counts import check_counts, first_counts
from rampwrap.routing.workloads import Routing, workload_grid


@attrs.frozen
class ExplainRequest:
    """A plan, and the routings whose configs are asked for."""

    plan: str
    kernel: str | None = None
    expert_counts: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = ()
    routing: tuple[Routing, ...] = attrs.field(default=(Routing("uniform"),), converter=routings_of)
    seed: int = 0
    ragged: bool = False

    def __attrs_post_init__(self) -> None:
        if self.expert_counts and len(self.batch_size) > 1:
            raise InputError("explain was given one histogram and several batch sizes; give its own with --batch-size.")
        if not self.expert_counts and not self.batch_size:
            raise InputError("explain was given no routing; pass --expert-counts or --batch-size with --routing.")

    def asked(self, shape: MoEShape) -> list[tuple[str, IntArray, int]]:
        """(label, counts, tokens) of every routing."""
        if self.expert_counts:
            counts = check_counts(self.expert_counts, shape.num_local_experts)
            tokens = self.batch_size[0] if self.batch_size else -(-int(counts.sum()) // shape.top_k)
            return [("histogram", counts, tokens)]
        found = []
        for workload in workload_grid(self.batch_size, self.routing, seed=self.seed):
            try:
                ids = workload.topk_ids(shape.num_experts, shape.top_k)
            except MemoryError:
                text = f"a routing of {workload.num_tokens} tokens does not fit in memory; give a smaller --batch-size."
                raise InputError(text) from None
            counts = first_counts(ids, shape)
            found.append((workload.label, counts, len(ids)))
        return found


@command("explain", ExplainRequest)
@click.argument("plan", metavar="PLAN.json")
@click.option("--kernel", help="whose own default serves beyond the plan, when it is not one of the built-in names")
@click.option("--expert-counts", type=counts, metavar="3,0,5,...", help="the histogram itself")
@tokens_option()
@routings_option()
@seed_option
@click.option(
    "--ragged",
    is_flag=True,
    help="also what the CuTe kernels' ragged form should do, by a model of tiles that no timing went into; a prediction",
)
def explain(its: ExplainRequest) -> Answer:
    """Which config a `Dispatcher` would launch for each routing, and why."""
    plan = Plan.load(its.plan)
    own, asked, unknown = plan.policy(), its.asked(plan.shape), ""
    policy: Policy = own
    # The kernel is imported, which takes seconds, only where the plan alone does not say what serves.
    if its.kernel or not all(own.speaks(histogram, tokens) for _, histogram, tokens in asked):
        policy, unknown = _serving(plan, its.kernel)
    found, lines = [], []
    for label, histogram, tokens in asked:
        choice = policy.select(histogram, tokens)
        values, text = attrs.asdict(choice), str(choice)
        if unknown and not own.speaks(histogram, tokens):
            text = f"{choice.why}, and which that is cannot be asked here: {unknown}"
            values |= {"index": None, "config": None, "why": text}
        if its.ragged:
            more, said = _ragged(plan, histogram)
            values, text = values | {"ragged": more}, f"{text}\n  {said}"
        found.append({**values, "num_tokens": tokens, "routing": label})
        lines.append(text if len(asked) == 1 else f"{label}: {text}")
    values = found[0] if len(asked) == 1 else {"choices": found}
    return Answer("\n".join(lines), {**values, **recorded_said(plan.shape, its.routing)})


def _ragged(plan: Plan, histogram: IntArray) -> tuple[dict[str, Any], str]:
    """What the ragged form would do with a histogram on the plan's GPU, as values and in words."""
    device = costs.known(plan.device)
    found = costs.best(plan.shape, histogram.tolist(), device)
    share = float(roofline_us(device, plan.shape, histogram)[0]) / found.us
    values = attrs.asdict(found) | {"tiles": found.tiles, "roofline_share": share, "predicted": True}
    return values, f"ragged form, as predicted: {found}, {share:.0%} of the roofline"


def _serving(plan: Plan, kernel: str | None) -> tuple[Policy, str]:
    """What a `Dispatcher` on the plan's GPU chooses by, and why the kernel's own default is not known; "" where it is."""
    try:
        made = make_kernel(kernel or plan.kernel, plan.shape)
    except RampwrapError as error:
        if kernel:
            raise
        policy = plan.policy()
        return attrs.evolve(policy, reach=policy.reach and attrs.evolve(policy.reach, own=True)), str(error)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        served = Dispatcher(made, plan, device=plan.device).policy
    for warning in said:
        print(f"rampwrap: {warning.message}", file=sys.stderr)
    return served, ""
