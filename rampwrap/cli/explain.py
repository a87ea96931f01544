"""The command ``rampwrap explain``: which config a plan chooses for a routing, and why."""

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.types import counts
from rampwrap.cli.workloads import recorded_said, routings_of, routings_option, seed_option, tokens_option
from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import Plan
from rampwrap.routing.counts import check_counts, expert_counts
from rampwrap.routing.workloads import Routing, workload_grid


@attrs.frozen
class ExplainRequest:
    """A plan, and the routings whose configs are asked for."""

    plan: str
    expert_counts: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = ()
    routing: tuple[Routing, ...] = attrs.field(default=(Routing("uniform"),), converter=routings_of)
    seed: int = 0

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
            counts = expert_counts(ids, shape.num_experts)[: shape.num_local_experts]
            found.append((workload.label, counts, len(ids)))
        return found


@command("explain", ExplainRequest)
@click.argument("plan", metavar="PLAN.json")
@click.option("--expert-counts", type=counts, metavar="3,0,5,...", help="the histogram itself")
@tokens_option()
@routings_option()
@seed_option
def explain(its: ExplainRequest) -> Answer:
    """Which config each routing would get, and why."""
    plan = Plan.load(its.plan)
    policy = plan.policy()
    choices = [(label, tokens, policy.select(counts, tokens)) for label, counts, tokens in its.asked(plan.shape)]
    found = [{**attrs.asdict(choice), "num_tokens": tokens, "routing": label} for label, tokens, choice in choices]
    recorded = recorded_said(plan.shape, its.routing)
    if len(choices) == 1:
        return Answer(str(choices[0][2]), {**found[0], **recorded})
    return Answer("\n".join(f"{label}: {choice}" for label, _, choice in choices), {"choices": found, **recorded})
