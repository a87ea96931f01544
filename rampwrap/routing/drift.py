"""How far the routing that is served lies from the routing that a plan was profiled on."""

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.schema import LARGEST, between

# Ranges narrower than this are taken as this wide: with few tokens every profiled batch has the same numbers.
LEAST_EXPERTS = 1.0
LEAST_LOG = 0.1


@attrs.frozen
class Profiled:
    """What the workloads around one profiled token count looked like: least and largest of each number.

    Attributes:
        num_tokens: the token count; workloads of its two neighbours count too, since a batch between them is served
            by one of the three.
        active_experts: experts with at least one token.
        concentration: sum_e (c_e / slots)^2: 1 / experts for even routing, 1 with all tokens on one expert.
    """

    num_tokens: int = attrs.field(validator=between(1, LARGEST, InputError))
    active_experts: tuple[float, float] = attrs.field()
    concentration: tuple[float, float] = attrs.field()

    @active_experts.validator
    @concentration.validator
    def _range(self, attribute: "attrs.Attribute[Any]", value: tuple[float, float]) -> None:
        if not 0 < value[0] <= value[1] < math.inf:
            raise InputError(f"Profiled.{attribute.name} is {list(value)}; give a least and a largest number above 0.")


def routing_numbers(counts: IntArray) -> tuple[Any, Any]:
    """Active experts and concentration of histograms [..., experts], each float64 [...]; histograms must have tokens."""
    slots = counts.sum(axis=-1)
    return (counts > 0).sum(axis=-1).astype(np.float64), np.square(counts / slots[..., None]).sum(axis=-1)


def profiled_ranges(num_tokens: IntArray, counts: IntArray) -> tuple[Profiled, ...]:
    """The ranges of a table's workloads, by token count.

    Args:
        num_tokens: int64 [workloads].
        counts: int64 [workloads, experts].
    """
    filled = counts.any(axis=1)
    tokens, (active, concentration) = num_tokens[filled], routing_numbers(counts[filled])
    known = np.unique(tokens)
    found = []
    for place, here in enumerate(known):
        low, high = known[max(place - 1, 0)], known[min(place + 1, len(known) - 1)]
        rows = (tokens >= low) & (tokens <= high)
        ranges = [(round(float(v[rows].min()), 9), round(float(v[rows].max()), 9)) for v in (active, concentration)]
        found.append(Profiled(int(here), *ranges))
    return tuple(found)


class Sums:
    """What histograms that the host read add up to, as the GPU keeps it for launches of its own.

    Args:
        least_slots, most_slots: of what any config was profiled on; twice as far each way may be served.
        least_active: experts with tokens below which nothing was profiled.

    Attributes:
        seen: histograms.
        active_experts, concentration: sums of `routing_numbers`.
        outside: histograms with more or fewer slots than are served, or with fewer active experts.
    """

    def __init__(self, least_slots: int = 0, most_slots: int = 1 << 62, least_active: int = 0) -> None:
        self.seen = self.outside = 0
        self.active_experts = self.concentration = 0.0
        self._bounds = least_slots, most_slots, least_active
        self._last: IntArray | None = None

    def numbers(self) -> dict[str, Any]:
        """The attributes, as `Telemetry` takes them."""
        return {name: getattr(self, name) for name in ("active_experts", "concentration", "outside", "seen")}

    def add(self, counts: IntArray) -> None:
        """Adds int64 [experts]; the very array that was added last counts once, one without slots never. 3 us for 256."""
        if counts is self._last:
            return
        self._last = counts
        slots, active = int(counts.sum()), int(np.count_nonzero(counts))
        if not slots:
            return
        least, most, least_active = self._bounds
        self.outside += active < least_active or not least <= 2 * slots <= 4 * most
        self.active_experts += active
        self.concentration += int(counts @ counts) / (slots * slots)
        self.seen += 1


def drift(
    ranges: Sequence[Profiled], num_tokens: int, active_experts: float, concentration: float, outside: float = 0.0
) -> float | None:
    """How far batches are outside what was profiled around their token count; None where the plan does not say.

    The largest of three numbers, each 0 inside the profiled range: the distance of the mean number of active experts
    from the range, in widths of the range; the same for the logarithm of the mean concentration; and the share of
    launches with more or fewer slots than any candidate was profiled for. So 0 is inside, and 1 is as far out
    as the range is wide, or never inside.

    Args:
        ranges: a plan's.
        num_tokens: of the bucket that served.
        active_experts, concentration: means over launches.
        outside: share of launches.
    """
    if not ranges or concentration <= 0:
        return None
    near = min(ranges, key=lambda its: (abs(its.num_tokens - num_tokens), its.num_tokens))
    logs = (math.log(near.concentration[0]), math.log(near.concentration[1]))
    return max(
        _beyond(active_experts, near.active_experts, LEAST_EXPERTS),
        _beyond(math.log(concentration), logs, LEAST_LOG),
        outside,
    )


def _beyond(value: float, span: tuple[float, float], least: float) -> float:
    return max(span[0] - value, value - span[1], 0.0) / max(span[1] - span[0], least)
