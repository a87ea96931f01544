"""Experts to ranks, so that the slowest rank's predicted layer time is least.

Token counts are not times: two experts with 17 tokens each fill two tiles more than one with 33, and an expert with a single
token still reads all its weights. So exchanges of experts between ranks are proposed by what an expert adds to a rank's time
(`Marginal`) and kept where the plan's own prediction (`Forecast`) gets better.
"""

from collections.abc import Iterator

import attrs
import numpy as np

from rampwrap.ep.expert_maps import ExpertMaps
from rampwrap.ep.forecast import Forecast, Marginal
from rampwrap.kernel.grid import FloatArray, IntArray

TRIES = 6
"Exchanges that are judged by the plan before a rank is given up."
MOST_RANKS = 3
"Ranks that are tried, the slowest first, before a layer is left as it is."
LEAST_GAIN = 1e-4
"Share of the time that an exchange must save."


@attrs.frozen(eq=False)
class Steps:
    """What one layer's router did in several steps.

    Attributes:
        counts: int64 [steps, num_experts], over all ranks.
        num_tokens: int64 [steps], over all ranks.
    """

    counts: IntArray
    num_tokens: IntArray


def slowest_us(times_us: FloatArray) -> float:
    """Mean over the steps of the slowest rank's time; `times_us` is float64 [steps, ranks]."""
    return float(times_us.max(axis=1).mean())


def replicated(loads: FloatArray, redundant: int) -> IntArray:
    """The expert of each of num_experts + redundant slots: each further one goes to whoever has most load a replica."""
    copies = np.ones(len(loads), dtype=np.int64)
    for _ in range(redundant):
        copies[np.argmax(loads / copies)] += 1
    return np.repeat(np.arange(len(loads)), copies)


def balanced(experts: IntArray, loads: FloatArray, ep_size: int) -> IntArray:
    """Slots by load, heaviest first, each to the rank with least load that has room and not this expert.

    This is how engines balance tokens; `loads` float64 [num_slots] may be of any kind.

    Returns:
        int64 [num_slots], the experts rank after rank.
    """
    room = len(experts) // ep_size
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    carried = np.zeros(ep_size)
    for slot in np.argsort(-loads, kind="stable"):
        expert = int(experts[slot])
        open_ = [rank for rank in range(ep_size) if len(ranks[rank]) < room]
        apart = [rank for rank in open_ if expert not in ranks[rank]] or open_
        best = min(apart, key=lambda rank: (carried[rank], rank))
        ranks[best].append(expert)
        carried[best] += loads[slot]
    return np.array([expert for rank in ranks for expert in rank], dtype=np.int64)


def by_tokens(steps: Steps, ep_size: int, redundant: int) -> IntArray:
    """Placement of a layer by token counts summed over the steps, as engines balance: int64 [num_slots]."""
    return _by_load(steps.counts.sum(axis=0).astype(np.float64), ep_size, redundant)


def _by_load(loads: FloatArray, ep_size: int, redundant: int) -> IntArray:
    experts = replicated(loads, redundant)
    copies = np.bincount(experts, minlength=len(loads))
    return balanced(experts, (loads / copies)[experts], ep_size)


def by_time(steps: Steps, ep_size: int, redundant: int, forecast: Forecast, marginal: Marginal) -> IntArray:
    """Placement of a layer by predicted time: int64 [num_slots]. Never predicted slower on these steps than `by_tokens`."""
    num_experts = steps.counts.shape[1]
    starts = [by_tokens(steps, ep_size, redundant)]
    starts.append(_by_load(marginal.of(steps.counts).sum(axis=0), ep_size, redundant))
    if not redundant:
        starts.append(np.arange(num_experts))
    layers = [_Layer(steps, ExpertMaps(num_experts, ep_size, start[None]), forecast, marginal) for start in starts]
    best = min(layers, key=lambda layer: slowest_us(layer.times_us))
    for _ in range(2 * best.row.size):
        if not best.improved():
            break
    return best.row


class _Layer:
    """One layer while its experts are exchanged."""

    def __init__(self, steps: Steps, maps: ExpertMaps, forecast: Forecast, marginal: Marginal) -> None:
        self.steps, self.maps, self.forecast, self.marginal = steps, maps, forecast, marginal
        self.counts = maps.counts(0, steps.counts)
        self.times_us = forecast.table(self.counts, steps.num_tokens)

    @property
    def row(self) -> IntArray:
        row: IntArray = self.maps.physical[0]
        return row

    def improved(self) -> bool:
        """Makes one exchange that the plan predicts to be faster, if one is found."""
        before = slowest_us(self.times_us)
        for rank in self._slow():
            for ours, other, theirs in self._proposed(rank, before):
                row = self.row.reshape(self.maps.ep_size, -1).copy()
                row[rank, ours], row[other, theirs] = row[other, theirs], row[rank, ours]
                maps = attrs.evolve(self.maps, physical=row.reshape(1, -1))
                counts, times_us = maps.counts(0, self.steps.counts), self.times_us.copy()
                # More ranks than the two where a replica elsewhere gets or loses the token that is left over.
                changed = np.flatnonzero((counts != self.counts).any(axis=(0, 2)))
                times_us[:, changed] = self.forecast.table(counts[:, changed], self.steps.num_tokens)
                if slowest_us(times_us) < before * (1 - LEAST_GAIN):
                    self.maps, self.counts, self.times_us = maps, counts, times_us
                    return True
        return False

    def _slow(self) -> list[int]:
        """Ranks by how much time would be saved if they took as long as the next."""
        two = np.sort(self.times_us, axis=1)[:, -2:]
        saved = np.zeros(self.maps.ep_size)
        np.add.at(saved, self.times_us.argmax(axis=1), two[:, -1] - two[:, 0])
        order = np.argsort(-saved, kind="stable")[:MOST_RANKS]
        return [int(rank) for rank in order if saved[rank] > 0]

    def _proposed(self, rank: int, before: float) -> Iterator[tuple[int, int, int]]:
        """The most promising exchanges of a rank's slot with another rank's: (slot, other rank, its slot)."""
        ranks, room = self.counts.shape[1:]
        row, adds = self.row.reshape(ranks, room), self.marginal.of(self.counts)
        predicted = np.full((ranks, room, room), np.inf)
        for other in range(ranks):
            if other == rank:
                continue
            rest = np.delete(self.times_us, [rank, other], axis=1).max(axis=1, initial=0.0)
            moved = adds[:, other, None, :] - adds[:, rank, :, None]
            ours = self.times_us[:, rank, None, None] + moved
            theirs = self.times_us[:, other, None, None] - moved
            slowest = np.maximum(np.maximum(ours, theirs), rest[:, None, None]).mean(axis=0)
            # Two replicas of an expert on one rank would share nothing.
            twice = np.isin(row[rank], row[other])[:, None] | np.isin(row[other], row[rank])[None]
            predicted[other] = np.where(twice, np.inf, slowest)
        for place in np.argsort(predicted, axis=None, kind="stable")[:TRIES]:
            other, ours_at, theirs_at = np.unravel_index(place, predicted.shape)
            if predicted[other, ours_at, theirs_at] < before * (1 - LEAST_GAIN):
                yield int(ours_at), int(other), int(theirs_at)
