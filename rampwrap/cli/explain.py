"""The command ``rampwrap explain``: which config serves a routing, by a plan or without one, and why."""

import sys
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.layer import LayerRequest, layer_options
from rampwrap.cli.types import counts
from rampwrap.cli.workloads import recorded_said, routings_of, routings_option, seed_option, tokens_option
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import InputError, RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device, find_device
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute import costs
from rampwrap.kernels.cute.configs import FORMS
from rampwrap.kernels.cute.defaults import default, lacking
from rampwrap.measure.full import roofline_us
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import Policy
from rampwrap.policy.static import default_table
from rampwrap.routing.counts import check_counts, first_counts
from rampwrap.routing.workloads import Routing, workload_grid

HOPPER = {"H100", "H200"}
"In the names of devices that the CuTe kernels run on."


@attrs.frozen
class ExplainRequest:
    """A plan, or a layer without one, and the routings whose configs are asked for."""

    plan: str | None = None
    layer: LayerRequest = attrs.field(factory=LayerRequest)
    device: str | None = None
    kernel: str | None = None
    expert_counts: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = ()
    routing: tuple[Routing, ...] = attrs.field(default=(Routing("uniform"),), converter=routings_of)
    seed: int = 0
    ragged: bool = False

    def __attrs_post_init__(self) -> None:
        if self.plan and (self.device or self.layer != LayerRequest()):
            raise InputError(f"{self.plan} is of a layer on a GPU; leave out --device and what names a layer.")
        if not self.plan and not self.layer.named:
            raise InputError("explain was given no layer; pass a plan, or --model or the layer's four sizes.")
        if not self.plan and self.kernel:
            raise InputError("--kernel says whose default serves beyond a plan; without a plan leave it out.")
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
@click.argument("plan", metavar="[PLAN.json]", required=False)
@layer_options
@click.option("--device", help="of a layer without a plan: a known GPU, h200 by default")
@click.option("--kernel", help="whose own default serves beyond the plan, when it is not one of the built-in names")
@click.option("--expert-counts", type=counts, metavar="3,0,5,...", help="the histogram itself")
@tokens_option()
@routings_option()
@seed_option
@click.option(
    "--ragged",
    is_flag=True,
    help="also what the CuTe kernels' ragged form should do, by a model of tiles; a prediction",
)
def explain(its: ExplainRequest) -> Answer:
    """Which config a `Dispatcher` would launch for each routing, and why."""
    if its.plan:
        plan = Plan.load(its.plan)
        shape, device = plan.shape, plan.device
        asked = its.asked(shape)
        chosen = _by_plan(plan, its, asked)
    else:
        shape, device = its.layer.shape(), find_device(its.device or "h200")
        if not HOPPER & set(device.name.split()):
            raise InputError(f"the CuTe kernels do not run on {device.name}; give --device h200 or h100, or a plan.")
        asked = its.asked(shape)
        chosen = _without_plan(shape, asked)
    found, lines = [], []
    for (label, histogram, tokens), (values, text) in zip(asked, chosen, strict=True):
        config = values["config"]
        if its.ragged or (not its.plan and config["form"] == "ragged"):
            more, said = _ragged(shape, histogram, tokens, device)
            values, text = values | {"ragged": more}, f"{text}\n  {said}"
        found.append({**values, "num_tokens": tokens, "routing": label})
        lines.append(text if len(asked) == 1 else f"{label}: {text}")
    values = found[0] if len(asked) == 1 else {"choices": found}
    return Answer("\n".join(lines), {**values, **recorded_said(shape, its.routing)})


def _by_plan(
    plan: Plan, its: ExplainRequest, asked: Sequence[tuple[str, IntArray, int]]
) -> list[tuple[dict[str, Any], str]]:
    """What a `Dispatcher` with the plan launches for each routing, as values and in words."""
    own, unknown, found = plan.policy(), "", []
    policy: Policy = own
    # The kernel is imported, which takes seconds, only where the plan alone does not say what serves.
    if its.kernel or not all(own.speaks(histogram, tokens) for _, histogram, tokens in asked):
        policy, unknown = _serving(plan, its.kernel)
    for _, histogram, tokens in asked:
        choice = policy.select(histogram, tokens)
        values, text = attrs.asdict(choice), str(choice)
        if unknown and not own.speaks(histogram, tokens):
            text = f"{choice.why}, and which that is cannot be asked here: {unknown}"
            values |= {"index": None, "config": None, "why": text}
        found.append((values, text))
    return found


def _without_plan(shape: MoEShape, asked: Sequence[tuple[str, IntArray, int]]) -> list[tuple[dict[str, Any], str]]:
    """The same of the CuTe kernels' defaults, which need neither their library nor a GPU to be asked for."""
    configs = [config.keys(1) for config in costs.listed(shape, FORMS)]
    kernel: Any = SimpleNamespace(
        configs=configs, default_config=lambda tokens: configs[default(configs, shape, tokens)]
    )
    table = default_table(kernel)
    why = "the CuTe kernels' default, which serves without a plan on Hopper where their library is installed"
    if far := lacking(configs, shape):
        why = f"the CuTe kernels' default, which engines pass over without a plan: {far}"
    found = [configs[table.index(tokens)] for _, _, tokens in asked]
    return [({"config": config, "why": why}, f"{format_config(config)}; {why}") for config in found]


def _ragged(shape: MoEShape, histogram: IntArray, num_tokens: int, device: Device) -> tuple[dict[str, Any], str]:
    """What the ragged form would do with a histogram on a GPU, as values and in words."""
    device = costs.known(device)
    found = costs.predict_default(shape, histogram.tolist(), num_tokens, device)
    share = float(roofline_us(device, shape, histogram)[0]) / found.us
    values = attrs.asdict(found) | {"tiles": found.tiles, "roofline_share": share, "predicted": True}
    return values, f"ragged form on {device.name}, as predicted: {found}, {share:.0%} of the roofline"


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
