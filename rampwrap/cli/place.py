"""The command ``rampwrap place``: which rank gets which expert, so that the slowest rank's predicted time is least."""

import attrs
import click
import numpy as np
from tqdm import tqdm

from rampwrap.cli.command import Answer, command
from rampwrap.cli.types import positive
from rampwrap.ep.study import CONTIGUOUS, Study, read_for, study
from rampwrap.errors import InputError
from rampwrap.files import check_target
from rampwrap.plan.plan import Plan
from rampwrap.routing.recorded import account

LINK_GBPS = 326.0
"Gigabytes a second out of one of four H100s by plain stores of all its CTAs over NVLink (measured)."


@attrs.frozen
class PlaceRequest:
    """A recording, a plan for one rank, and how many ranks there are."""

    recorded: str
    plan: str
    ep_size: int
    redundant: int = 0
    held_out: float = attrs.field(default=0.5)
    link_gbps: float = attrs.field(default=LINK_GBPS)
    out: str | None = None

    @held_out.validator
    def _share(self, attribute: "attrs.Attribute[float]", value: float) -> None:
        if not 0 < value < 1:
            raise InputError(f"--held-out is {value:g}; give the share of the steps to judge by, as in 0.5.")

    @link_gbps.validator
    def _fast(self, attribute: "attrs.Attribute[float]", value: float) -> None:
        if not 0 < value < np.inf:
            raise InputError(f"--link-gbps is {value:g}; give gigabytes a second into one rank, as in 326.")


@command("place", PlaceRequest)
@click.option("--recorded", required=True, metavar="FILE[:LAYER]", help="counts of all ranks that an engine recorded")
@click.option("--plan", required=True, metavar="PLAN.json", help="made for a rank: --num-local-experts at profile")
@click.option("--ep-size", required=True, type=positive, help="ranks that the experts are spread over")
@click.option(
    "--redundant", type=click.IntRange(min=0), metavar="R", help="further slots, over all ranks, for replicas"
)
@click.option("--held-out", type=float, help="share of the steps, the last ones, to judge by (0.5)")
@click.option("--link-gbps", type=float, help=f"gigabytes a second into a rank, for the cost of moving ({LINK_GBPS:g})")
@click.option("--out", metavar="MAPS.json", help="what SGLang's --init-expert-location takes")
def place(its: PlaceRequest) -> Answer:
    """Places, judges and writes."""
    if its.out:
        check_target(its.out)
    plan = Plan.load(its.plan)
    recording = read_for(plan, its.recorded, its.ep_size, its.redundant)
    said = account(its.recorded, recording.counts.shape[1], plan.shape.top_k)
    with tqdm(desc="layers", disable=None, leave=False) as bar:

        def show(done: int, layers: int) -> None:
            bar.total = layers
            bar.update(done - bar.n)

        found = study(
            plan,
            recording,
            its.ep_size,
            its.redundant,
            held_out=its.held_out,
            said=show,
        )
    if its.out:
        found.maps[found.best].save(its.out)
    return _answer(its, found, str(said) if said.worth_saying else "")


def _answer(its: PlaceRequest, found: Study, said: str) -> Answer:
    """A table, and what the move costs."""
    maps, base = found.maps[found.best], found.judged[CONTIGUOUS].slowest_us
    lines = [
        f"{found.layers} layers of {maps.num_experts} experts on {its.ep_size} ranks, {maps.slots_per_rank} slots each; judged on "
        f"{found.held_out} held-out steps of layers, predicted by {its.plan}",
        f"{'placement':<16}{'slowest rank':>14}{'mean rank':>12}{'balance':>9}{'gain':>8}",
    ]
    for name, judged in found.judged.items():
        lines.append(
            f"{name:<16}{judged.slowest_us:>11.1f} us{judged.mean_us:>9.1f} us{judged.balance:>9.2f}"
            f"{base / judged.slowest_us:>7.3f}x"
        )
    judged = found.judged[found.best]
    saved_us = (base - judged.slowest_us) * found.layers
    moving_us = judged.busiest_bytes / (its.link_gbps * 1e3)
    pays = moving_us / saved_us if saved_us > 0 else None
    after = "which never pays" if pays is None else f"which pays after {int(np.ceil(pays))} steps"
    lines.append(
        f"from contiguous to {found.best}, {judged.arrivals} experts move, {judged.busiest_bytes / 1e9:.2f} GB to the busiest rank: "
        f"{moving_us / 1e3:.1f} ms at {its.link_gbps:g} GB/s, {after}"
    )
    if found.beyond:
        lines.append(
            f"{found.beyond} of {found.seen + found.held_out} steps are beyond the plan's batches: extrapolated"
        )
    if said:
        lines.append(said)
    if its.out:
        lines.append(f"{its.out}: {found.best} (SGLang: --init-expert-location {its.out})")
    values = {
        "num_experts": maps.num_experts,
        "ep_size": its.ep_size,
        "redundant": its.redundant,
        "layers": found.layers,
        "seen": found.seen,
        "held_out": found.held_out,
        "beyond": found.beyond,
        "best": found.best,
        "placements": {name: attrs.asdict(each) for name, each in found.judged.items()},
        "moving_us": moving_us,
        "pays_after_steps": pays,
        "out": its.out,
    }
    return Answer("\n".join(lines), values)
