"""`Study`: placements of a recorded model's experts, judged on steps that none of them saw."""

from collections.abc import Callable

import attrs
import numpy as np

from rampwrap.ep.expert_maps import ExpertMaps
from rampwrap.ep.forecast import Forecast, Marginal
from rampwrap.ep.place import Steps, by_time, by_tokens
from rampwrap.errors import InputError, PlanMismatchError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import Plan, shape_arguments
from rampwrap.routing.recorded import Recording, read_recording, split_layer

SAMPLES = 256
"Histograms of single ranks from which the marginal cost of an expert is fitted."
CONTIGUOUS, TOKENS, TIME = "contiguous", "token-balanced", "predicted time"


@attrs.frozen
class Judged:
    """One placement on the held-out steps of all layers, in microseconds of a layer and step.

    Attributes:
        slowest_us: of the slowest rank, what a step waits for.
        mean_us: over the ranks, which no placement of the same experts can beat by much.
        arrivals: experts that ranks must fetch, coming from contiguous.
        busiest_bytes: weights that the rank with most of them must fetch.
    """

    slowest_us: float
    mean_us: float
    arrivals: int
    busiest_bytes: int

    @property
    def balance(self) -> float:
        """Mean over slowest, 1 for ranks that end together."""
        return self.mean_us / self.slowest_us


@attrs.frozen(eq=False)
class Study:
    """Three placements and what each is worth.

    Attributes:
        maps: by name, contiguous first.
        judged: the same.
        layers: the recorded ones that were placed; the others stay contiguous.
        seen, held_out: steps of all layers.
        beyond: of the steps seen or held out, those for whose token count the plan only extrapolates.
    """

    maps: dict[str, ExpertMaps]
    judged: dict[str, Judged]
    layers: int
    seen: int
    held_out: int
    beyond: int

    @property
    def best(self) -> str:
        """The placement with the least time on the held-out steps, the earlier one on a tie."""
        return min(self.judged, key=lambda name: self.judged[name].slowest_us)


def read_for(plan: Plan, path: str, ep_size: int, redundant: int = 0) -> Recording:
    """``FILE`` or ``FILE:LAYER`` with the experts of a plan for one rank, whether or not the plan counts replicas as experts.

    Raises:
        InputError: nothing is to be placed, or the file cannot be read or records another model.
        PlanMismatchError: the plan's ranks hold another number of experts.
    """
    if ep_size < 2:
        raise InputError(f"ep_size is {ep_size}; experts are placed on two ranks or more.")
    file, layer = split_layer(path)
    experts = plan.shape.num_experts
    try:
        found = read_recording(file, experts, layer)
    except InputError:
        if not 0 < redundant <= experts // 2:
            raise
        found = read_recording(file, experts - redundant, layer)
    _check(plan.shape, found.counts.shape[1], ep_size, redundant)
    return found


def _check(shape: MoEShape, num_experts: int, ep_size: int, redundant: int) -> None:
    if redundant < 0 or redundant > num_experts:
        raise InputError(f"redundant is {redundant} for {num_experts} experts; give at most one replica of each.")
    if (num_experts + redundant) % ep_size:
        raise InputError(
            f"{num_experts} experts and {redundant} replicas cannot be shared by ep_size={ep_size} ranks; give --redundant "
            f"{-num_experts % ep_size} or that and a multiple of {ep_size}."
        )
    slots = (num_experts + redundant) // ep_size
    if shape.num_local_experts != slots or shape.num_experts not in (num_experts, num_experts + redundant):
        fitting = attrs.evolve(shape, num_experts=num_experts + redundant, num_local_experts=slots)
        raise PlanMismatchError(
            f"the plan is for ranks with {shape.num_local_experts} of {shape.num_experts} experts, and {ep_size} ranks with "
            f"{redundant} replicas hold {slots} each; make one with 'rampwrap profile {shape_arguments(fitting)}'."
        )


def study(
    plan: Plan,
    recording: Recording,
    ep_size: int,
    redundant: int = 0,
    *,
    held_out: float = 0.5,
    most_steps: int = 64,
    said: Callable[[int, int], None] = lambda done, layers: None,
) -> Study:
    """Places a recorded model's experts three ways: contiguous, by tokens, by predicted time.

    Args:
        plan: for a rank's shape: with `num_local_experts` that of (experts + redundant) / ep_size.
        recording: counts of all ranks together.
        ep_size: ranks.
        redundant: slots for replicas, over all ranks.
        held_out: share of each layer's steps, the last ones, by which placements are judged and not made.
        most_steps: of a layer, evenly spread, to place by and to judge by.
        said: told how many layers of how many are done.

    Raises:
        InputError: sizes that do not fit, counts of no whole tokens, or no layer with two steps.
        PlanMismatchError: the plan's ranks hold another number of experts.
    """
    num_experts = recording.counts.shape[1]
    _check(plan.shape, num_experts, ep_size, redundant)
    recording, tokens = recording.batches(plan.shape.top_k)
    parts = (_split(recording, tokens, layer, held_out, most_steps) for layer in np.unique(recording.layer))
    layers = [its for its in parts if its is not None]
    if not layers:
        raise InputError(
            f"{recording.path!r} holds no layer with two steps, and a placement is judged on steps that it has not seen; "
            "record more of them."
        )
    count = max(
        int(recording.layer.max()) + 1,
        len(np.unique(recording.layer)) + recording.left_out.get("layers_without_experts", 0),
    )
    contiguous = ExpertMaps.contiguous(count, num_experts, ep_size, redundant)
    forecast = Forecast.by(plan)
    marginal = _marginal(forecast, layers, contiguous)
    placed = {name: contiguous.physical.copy() for name in (TOKENS, TIME)}
    for done, (layer, seen, _) in enumerate(layers):
        said(done, len(layers))
        placed[TOKENS][layer] = by_tokens(seen, ep_size, redundant)
        placed[TIME][layer] = by_time(seen, ep_size, redundant, forecast, marginal)
    said(len(layers), len(layers))
    maps = {CONTIGUOUS: contiguous}
    maps |= {name: attrs.evolve(contiguous, physical=physical) for name, physical in placed.items()}
    every = np.concatenate([part.num_tokens for _, *both in layers for part in both])
    expert_bytes = plan.shape.weight_bytes // plan.shape.num_local_experts
    return Study(
        maps,
        {name: _judge(forecast, layers, its, contiguous, expert_bytes) for name, its in maps.items()},
        len(layers),
        sum(len(seen.num_tokens) for _, seen, _ in layers),
        sum(len(later.num_tokens) for _, _, later in layers),
        sum(forecast.policy.beyond(int(its)) for its in every),
    )


_Split = tuple[int, Steps, Steps]
"A layer, the steps to place by and those to judge by."


def _split(recording: Recording, tokens: IntArray, layer: int, held_out: float, most_steps: int) -> _Split | None:
    """The first steps of a layer and its last; None where it has no two."""
    rows = np.flatnonzero(recording.layer == layer)
    rows = rows[np.argsort(recording.step[rows], kind="stable")]
    if len(rows) < 2:
        return None
    first = min(max(round(len(rows) * (1 - held_out)), 1), len(rows) - 1)

    def some(part: IntArray) -> Steps:
        spread = np.linspace(0, len(part) - 1, min(len(part), most_steps)).round().astype(np.int64)
        return Steps(recording.counts[part[spread]], tokens[part[spread]])

    return int(layer), some(rows[:first]), some(rows[first:])


def _marginal(forecast: Forecast, layers: list[_Split], contiguous: ExpertMaps) -> Marginal:
    """From ranks of the contiguous placement and of random ones, in steps that may be seen."""
    rng = np.random.default_rng(0)
    samples, tokens = [], []
    for number in range(SAMPLES):
        layer, seen, _ = layers[number % len(layers)]
        step = int(rng.integers(len(seen.num_tokens)))
        here = contiguous.counts(layer, seen.counts[step]).ravel()
        here = rng.permutation(here)[: contiguous.slots_per_rank] if number % 2 else here[: contiguous.slots_per_rank]
        samples.append(here)
        tokens.append(int(seen.num_tokens[step]))
    times = np.array([forecast.us(here, many) for here, many in zip(samples, tokens, strict=True)])
    return Marginal.fit(np.array(samples), times)


def _judge(forecast: Forecast, layers: list[_Split], maps: ExpertMaps, before: ExpertMaps, expert_bytes: int) -> Judged:
    times: list[FloatArray] = [
        forecast.table(maps.counts(layer, later.counts), later.num_tokens) for layer, _, later in layers
    ]
    us, arrivals = np.concatenate(times), maps.arrivals(before)
    return Judged(
        float(us.max(axis=1).mean()),
        float(us.mean()),
        int(arrivals.sum()),
        int(arrivals.sum(axis=0).max()) * expert_bytes,
    )
