"""The command ``rampwrap compare``: the A/B of policies on the live kernel."""

import sys

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.measuring import MeasuringRequest, losses, measuring_options, terminable
from rampwrap.cli.reporting import ReportRequest, report_options
from rampwrap.cli.workloads import (
    EVAL_ROUTINGS,
    EVAL_TOKENS,
    RECORDED_LIMIT,
    limit_option,
    recorded_of,
    recorded_option,
    recorded_said,
    routings_of,
    routings_option,
    seed_option,
    tokens_option,
)
from rampwrap.compare.evaluate import ORACLE, evaluate
from rampwrap.compare.oracle import Oracle, Renumbered
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import InputError
from rampwrap.files import check_target
from rampwrap.kernel import catalog
from rampwrap.kernel.device import device_of
from rampwrap.kernel.protocol import Kernel, config_key, index_by_key
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import Policy, Static
from rampwrap.policy.static import StaticTable, default_table, read_static
from rampwrap.routing.workloads import Routing, Workload, workload_grid


@attrs.frozen
class CompareRequest:
    """A plan, and what it is judged on."""

    plan: str
    kernel: str | None = None
    batch_size: tuple[int, ...] = ()
    routing: tuple[Routing, ...] = attrs.field(default=EVAL_ROUTINGS, converter=routings_of)
    seed: int = 0
    recorded: tuple[str, ...] = ()
    recorded_limit: int = RECORDED_LIMIT
    measuring: MeasuringRequest = attrs.field(factory=MeasuringRequest)
    oracle: bool = False
    out: str | None = None
    kernel_default: bool = False
    report: ReportRequest = attrs.field(factory=ReportRequest)

    def workloads(self, shape: MoEShape) -> list[Workload]:
        """Histograms that no fit saw: drawn with another seed than a profile's."""
        tokens = self.batch_size or (() if self.recorded else EVAL_TOKENS)
        drawn = workload_grid(tokens, self.routing, "eval", self.seed + 1)
        return drawn + recorded_of(self.recorded, shape, self.recorded_limit, "eval", self.seed)

    def tables(self, kernel: Kernel, plan: Plan, where: dict[int, int], judged: list[int]) -> dict[str, StaticTable]:
        """Static tables by name, the plan's own first; in the numbering of the kernel's configs."""
        # Named after what it is: `fit --static` takes others than the uniform one.
        own = plan.static.source in ("uniform", "averaged")
        name = f"static-{plan.static.source}" if own else f"static {plan.static.source}"
        found = {name: plan.static.renumber(where)}
        if self.kernel_default:
            found["static kernel-default"] = default_table(kernel)
        device, configs = device_of(kernel).name, tuple(kernel.configs)
        for name, path in self.report.files(found).items():
            found[name] = read_static(
                path, configs, kernel=kernel.name, device=device, shape=plan.shape, num_tokens=judged
            )
        return found


@command("compare", CompareRequest)
@click.argument("plan", metavar="PLAN.json")
@click.option("--kernel", help="when it is not one of the built-in names")
@tokens_option()
@routings_option()
@seed_option
@recorded_option()
@limit_option
@measuring_options
@click.option("--oracle", is_flag=True, help="time all configs, for regret against exhaustive search")
@click.option("--out", metavar="TABLE.npz", help="keep the measured times")
@click.option("--kernel-default", is_flag=True, help="also against the kernel's own default configs")
@report_options
def compare(its: CompareRequest) -> Answer:
    """Times what the policies launch, in interleaved rounds, and judges them by it."""
    from rampwrap.measure.full import profile

    for path in filter(None, (its.out, its.report.csv, its.report.plot)):
        check_target(path)
    plan = Plan.load(its.plan)
    name = its.kernel or plan.kernel
    if missing := catalog.missing_gpu(name):
        raise InputError(
            f"there is no GPU here ({missing}), and kernel {name!r} runs on one only; compare where the GPU is, or "
            "'rampwrap replay' the plan's table."
        )
    kernel = catalog.make_kernel(name, plan.shape)
    routed = Dispatcher(kernel, plan, strict=True).policy
    # Every config that any policy may launch is timed on every workload, in interleaved rounds: the best of them
    # is the oracle, and policies that agree are judged by the same measurement.
    listed = index_by_key(kernel.configs)
    every = (*kernel.configs, *(config for config in routed.configs if config_key(config) not in listed))
    number = index_by_key(every)
    # Those of the plan, and where a batch is beyond it also the kernel's own defaults.
    where = {index: number[config_key(config)] for index, config in enumerate(routed.configs)}
    workloads = its.workloads(plan.shape)
    recorded = recorded_said(plan.shape, its.routing, its.recorded, its.recorded_limit)
    tables = its.tables(kernel, plan, where, [workload.num_tokens for workload in workloads])
    used = sorted({*where.values(), *(i for table in tables.values() for i in table.indices)})
    used = list(range(len(every))) if its.oracle else used
    place = {index: position for position, index in enumerate(used)}
    configs = tuple(every[index] for index in used)
    with terminable():
        timings = profile(kernel, plan.shape, workloads, configs=configs, **its.measuring.arguments(its.out, its.seed))
    for line in losses(timings.notes):
        print(f"rampwrap: {line}", file=sys.stderr)
    policies: dict[str, Policy] = {name: Static(configs, table.renumber(place)) for name, table in tables.items()}
    policies[plan.model.name] = Renumbered(
        configs, routed, tuple(place[where[index]] for index in range(len(routed.configs)))
    )
    policies[ORACLE] = Oracle(timings)
    answer = its.report.answer(evaluate(timings, policies, next(iter(tables))))
    return attrs.evolve(answer, values={**answer.values, **recorded})
