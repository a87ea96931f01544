"""Active profiling: measures only the cells of a timing table that can change a choice.

Most configs are far from the best on most workloads, so most cells of a table teach nothing. Three stages:

1. every config on the two workloads furthest apart (the fewest and the most tokens);
2. every workload, from coarse to fine: the few configs that its measured neighbours do not rule out. A config's
   time over the best is taken to change smoothly with tokens, active experts and the hottest expert, and a config
   gets the benefit of the doubt for the distance to where it was last measured (successive elimination);
3. a few times: fit the cost model to what is known and measure where it now expects the leaders, so that its
   optimistic mistakes are corrected by a measurement; and what a static table may pick under uniform routing.

`explore` only plans: it sees times through a callback, so that a live kernel and the replay of a full table take
the same path.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import FitError, InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.kernel.protocol import Config, Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.inputs import Inputs
from rampwrap.measure.session import PATIENCE_S, Bench
from rampwrap.measure.timer import Timer
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Workload

Measure = Callable[[int, Sequence[int]], FloatArray]
"``measure(workload, configs)``: microseconds [configs], NaN for one that cannot run."
Predict = Callable[[FloatArray], FloatArray]
"``predict(us)``: microseconds [W, C] expected by a model fitted to `us` [W, C], NaN where unknown."
Fitted = Callable[[Timings], FloatArray]
"``fitted(table)``: microseconds [W, C] expected by a model fitted to a table's known cells: `rampwrap.model.fit.fitted_us`."

SHARE = 0.15
# All of the following were chosen by replay of two kernels' tables and of random 80 % of their configs: the mean
# regret of the fit is flat around them.
SEEDS = 2
DOUBT = 0.1  # log time that a config is forgiven per doubling of distance to its nearest measurement
ELIMINATION = 0.5  # share of the cells left after the seeds that stage 2 spends; the model spends the rest
FITS = 8
# Each further config of the same workload has to look 1 % better to be measured in the same round.
SPREAD = 0.01
# Fewer cells than this a workload teach a model nothing, however small the table.
MIN_CELLS = 3
# Configs timed between two looks at the clock: enough to compare fairly, few enough to stop in time.
CHUNK = 24


@attrs.frozen(eq=False)
class Exploration:
    """What was measured.

    Attributes:
        us: float64 [W, C], NaN in cells that were not.
        cells: how many were measured.
        gave_up: one sentence on what time did not allow; None if all went as planned.
    """

    us: FloatArray
    cells: int
    gave_up: str | None


def explore(
    counts: IntArray,
    uniform: npt.NDArray[np.bool_],
    num_configs: int,
    measure: Measure,
    predict: Predict,
    *,
    share: float = SHARE,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Exploration:
    """Measures at most `share` of the cells, in at most `budget_s` seconds.

    A small table gets `SEEDS` cells for each config and `MIN_CELLS` for each workload whatever the share.

    Args:
        counts: int64 [W, E].
        uniform: bool [W], workloads that a uniform-tuned static table is made from.
        num_configs: C.
        measure, predict: the kernel and the model.
        share: of all cells, in (0, 1].
        budget_s: seconds from now; the cells under way when they are over are finished (at most `CHUNK`).
        clock: seconds.

    Raises:
        InputError: `share` is out of range or the budget is not positive.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; give a part of all cells, above 0 and up to 1.")
    if budget_s is not None and not budget_s > 0:
        raise InputError(f"budget_s is {budget_s}; give a positive number of seconds.")
    search = _Search(counts, num_configs, measure, clock, budget_s)
    total = len(counts) * num_configs
    cells = min(total, max(int(share * total), SEEDS * num_configs + MIN_CELLS * len(counts)))
    planned = cells - search.seed()
    statics = int(uniform.sum())  # set aside for stage 3's second half
    planned -= search.eliminate(max(int(search.affordable(planned) * ELIMINATION), len(counts)))
    for left in range(FITS, 0, -1):
        # What a cell costs is known better with each round, so what the time left can pay for is asked anew.
        planned -= search.follow(predict, max(0, search.affordable(planned) - statics) // left)
    planned -= search.cover(uniform, max(search.affordable(planned), 0))
    planned -= search.follow(predict, search.affordable(planned))
    return search.result(planned)


class _Search:
    """The cells known so far, and the stages that add to them; each stage returns how many it added."""

    def __init__(
        self,
        counts: IntArray,
        num_configs: int,
        measure: Measure,
        clock: Callable[[], float],
        budget_s: float | None,
    ) -> None:
        self.us: FloatArray = np.full((len(counts), num_configs), np.nan)
        self._asked = np.zeros(self.us.shape, dtype=np.bool_)
        self._measure, self._clock = measure, clock
        self._start = clock()
        self._budget = budget_s
        self._seconds_per_cell = 0.0
        self._late = False
        self._since: tuple[float, int] | None = None  # when the seeds were done, and how many cells they were
        self._slots = counts.sum(axis=1)
        sizes = np.stack([self._slots, np.count_nonzero(counts, axis=1), counts.max(axis=1)], axis=1)
        place = np.log2(np.maximum(sizes, 1))
        self._distance: FloatArray = np.sqrt(((place[:, None] - place[None]) ** 2).sum(axis=-1))
        self._order = _coarse_to_fine(self._distance, [int(self._slots.argmin()), int(self._slots.argmax())])

    def seed(self) -> int:
        """Every config on the first workloads; half of the time at most, for all configs compile here."""
        added = 0
        # Shuffled, so that a budget that ends here has tried a bit of everything.
        configs = np.random.default_rng(0).permutation(self.us.shape[1]).tolist()
        number = 0
        for row in self._order:
            if number == SEEDS:
                break
            start = self._clock()
            # A config that the first workload had no time for is not begun on the second.
            wanted = configs if number == 0 else [c for c in configs if self._asked[self._order[0], c]]
            got = self._ask(row, wanted, 0.5 if number else 0.4)
            # The second seed has the most tokens: its cells take twice as long as the average one, or more.
            self._seconds_per_cell = 0.5 * (self._clock() - start) / max(got, 1)
            added += got
            number += not self._lost()[row]  # one that nothing ran on teaches nothing
        return added

    def affordable(self, cells: int) -> int:
        """At most `cells`, fewer where the time left is too short for them at the pace since the seeds."""
        if self._budget is None:
            return max(0, cells)
        now, asked = self._clock(), int(self._asked.sum())
        self._since = self._since or (now, asked)
        start, before = self._since
        pace = (now - start) / (asked - before) if asked > before else self._seconds_per_cell
        return max(0, min(cells, int((self._start + self._budget - now) / max(pace, 1e-9))))

    def eliminate(self, cells: int) -> int:
        """Spends `cells` evenly over the workloads, on the configs that their neighbours speak for."""
        rows = self._order[SEEDS:]
        added, due = 0, 0.0
        for row in rows:
            due += cells / len(rows)
            take = max(1, int(due))
            due -= take
            score = self._forgiving(row)
            added += self._ask(row, _least(score, take))
        return added

    def follow(self, predict: Predict, cells: int) -> int:
        """Measures the cells where the model expects a time closest to the best measured one, or below it."""
        if cells <= 0:
            return 0
        try:
            expected = predict(self.us)
        except FitError:
            # Too little is known for a model: the neighbours decide once more.
            expected = np.exp([self._forgiving(row) for row in range(len(self.us))])
        else:
            with np.errstate(invalid="ignore"):  # nothing measured in a row yet, nor predicted for a config
                expected = expected / np.nanmin(np.where(np.isnan(self.us), np.inf, self.us), axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.log(expected)
        score[np.isnan(score) | self._asked | self._dead() | self._lost()[:, None]] = np.inf
        score += SPREAD * np.argsort(np.argsort(score, axis=1, kind="stable"), axis=1, kind="stable")
        chosen = np.zeros(score.shape, dtype=np.bool_)
        chosen.flat[_least(score.ravel(), cells)] = True
        return sum(self._ask(row, np.flatnonzero(chosen[row]).tolist()) for row in self._order)

    def cover(self, uniform: npt.NDArray[np.bool_], cells: int) -> int:
        """On uniform rows, measures what leads any workload of as many tokens: candidates for a static table."""
        added = 0
        best = np.where(np.isnan(self.us), np.inf, self.us)
        leads = np.where(np.isfinite(best).any(axis=1), best.argmin(axis=1), -1)
        for row in np.flatnonzero(uniform).tolist():
            leaders = {int(leads[other]) for other in np.flatnonzero(self._slots == self._slots[row])} - {-1}
            added += self._ask(row, sorted(leaders)[: cells - added])
        return added

    def result(self, left: int) -> Exploration:
        """What is known, with `left` planned cells that were not measured."""
        us = self.us.copy()
        return Exploration(us, int(np.isfinite(us).sum()), self._gave_up(left))

    def _gave_up(self, left: int) -> str | None:
        """What the clock cut off."""
        # Without a clock, fewer cells than planned only means that there was nothing more to measure.
        if self._budget is None or not (self._late or self._short(left)):
            return None
        configs = int((~self._asked.any(axis=0)).sum())
        rows = int((~self._asked.any(axis=1)).sum())
        return (
            f"{self._budget:g} s allowed {int(self._asked.sum())} of {int(self._asked.sum()) + max(left, 0)} planned cells; "
            f"{configs} of {self.us.shape[1]} configs and {rows} of {len(self.us)} workloads were never measured."
        )

    def _short(self, left: int) -> bool:
        """Whether cells are left that time, not the lack of candidates, kept from being measured."""
        return left > 0 and self.affordable(left) < left

    def _ask(self, row: int, configs: Sequence[int], until: float = 1.0) -> int:
        """Measures those configs that were not yet, in chunks, until that share of the budget is over."""
        if self._lost()[row]:
            return 0
        todo = [config for config in configs if not self._asked[row, config] and not self._dead()[config]]
        step = max(len(todo), 1) if self._budget is None else CHUNK
        for first in range(0, len(todo), step):
            if self._budget is not None and self._clock() - self._start >= until * self._budget:
                self._late = True
                return first
            chunk = todo[first : first + step]
            self.us[row, chunk] = self._measure(row, chunk)
            self._asked[row, chunk] = True
        return len(todo)

    def _dead(self) -> npt.NDArray[np.bool_]:
        """Configs that ran nowhere, though they were asked for on a workload where others did."""
        tried = self._asked & ~self._lost()[:, None]
        return np.asarray(tried.any(axis=0) & np.isnan(self.us).all(axis=0))

    def _lost(self) -> npt.NDArray[np.bool_]:
        """Workloads on which nothing ran: too large for the memory, say."""
        return np.asarray(self._asked.any(axis=1) & np.isnan(self.us).all(axis=1))

    def _forgiving(self, row: int) -> FloatArray:
        """Log time over the best that each config can be hoped to have on a workload, float64 [C].

        The mean over the workloads where it was measured, near ones first, minus `DOUBT` for the distance to the
        nearest; infinite for configs never tried, dead, or measured here.
        """
        seen = np.flatnonzero((~np.isnan(self.us)).any(axis=1))
        if not len(seen):
            return np.full(self.us.shape[1], np.inf)
        us, distance = self.us[seen], self._distance[row, seen][:, None]
        known = ~np.isnan(us)
        ratio = np.log(np.where(known, us, 1.0)) - np.log(np.nanmin(us, axis=1, keepdims=True))
        weight = known * (np.exp(-distance) + 1e-9)
        total = weight.sum(axis=0)
        mean = (weight * ratio).sum(axis=0) / np.where(total > 0, total, 1.0)
        nearest = np.where(known, distance, np.inf).min(axis=0)
        out: FloatArray = np.where(total > 0, mean - DOUBT * np.where(total > 0, nearest, 0.0), np.inf)
        out[self._asked[row] | self._dead()] = np.inf
        return out


def _least(score: FloatArray, number: int) -> list[int]:
    """Indices of the `number` least finite scores, ties by index."""
    order = np.argsort(score, kind="stable")[:number]
    return [int(index) for index in order if np.isfinite(score[index])]


def _coarse_to_fine(distance: FloatArray, first: Sequence[int]) -> list[int]:
    """All workloads, each the furthest from those before it."""
    order = list(dict.fromkeys(first))
    near = distance[order].min(axis=0)
    while len(order) < len(distance):
        near[order] = -1.0
        order.append(int(near.argmax()))
        near = np.minimum(near, distance[order[-1]])
    return order


def profile_active(
    kernel: Kernel,
    shape: MoEShape,
    workloads: Sequence[Workload],
    fitted: Fitted,
    *,
    configs: Sequence[Config] | None = None,
    share: float = SHARE,
    budget_s: float | None = None,
    out: str | os.PathLike[str] | None = None,
    timer: Timer | None = None,
    inputs: Inputs | None = None,
    rounds: int = 4,
    device: Device | None = None,
    quiet: bool = False,
    seed: int = 0,
    replace: bool = False,
    patience_s: float = PATIENCE_S,
) -> Timings:
    """Like `profiler.profile`, but of few cells: the others are NaN, and such a table is fitted as it is.

    `share` and `budget_s` are explained at `explore`; a journal makes it resumable, and cells already in it take no
    time of the budget. ``Timings.notes`` tells under ``active`` how many cells were measured and, under
    ``gave_up``, what the budget did not allow.

    Raises:
        InputError, ConfigError, TableError, DeviceFault: as `profile`.
    """
    with Bench(
        kernel,
        shape,
        workloads,
        configs=configs,
        out=out,
        timer=timer,
        inputs=inputs,
        rounds=rounds,
        device=device,
        quiet=quiet,
        seed=seed,
        replace=replace,
        patience_s=patience_s,
    ) as bench:
        num_configs = len(bench.configs)
        bench.progress.expect(
            max(int(share * len(bench.keys) * num_configs), SEEDS * num_configs + MIN_CELLS * len(bench.keys))
        )
        uniform = np.array([str(workload.routing) == "uniform" for workload in bench.workloads])
        blank = bench.blank()

        def predict(us: FloatArray) -> FloatArray:
            return fitted(attrs.evolve(blank, us=us, spread=None))

        found = explore(bench.counts, uniform, num_configs, bench.measure, predict, share=share, budget_s=budget_s)
        table = bench.timings(notes=_notes(found))
        return bench.finish(table, complete=found.gave_up is None)


def replay_active(timings: Timings, fitted: Fitted, *, share: float = SHARE, split: str = "train") -> Timings:
    """What active profiling would have measured of a full table: the rows of `split` lose all other cells.

    Rows of other splits stay whole, so that `compare.replay` of the result judges the sparse fit by full rows.

    Raises:
        TableError: the table has no such split.
    """
    rows = timings.rows(split)
    part = timings.take(rows)

    def measure(row: int, configs: Sequence[int]) -> FloatArray:
        return part.us[row, list(configs)]

    def predict(us: FloatArray) -> FloatArray:
        return fitted(attrs.evolve(part, us=us, spread=None))

    found = explore(part.counts, part.is_uniform, part.us.shape[1], measure, predict, share=share)
    us = timings.us.copy()
    us[rows] = found.us
    spread = _where_known(timings.spread, us)
    return attrs.evolve(timings, us=us, spread=spread, notes={**timings.notes, **_notes(found)})


def _where_known(spread: FloatArray | None, us: FloatArray) -> FloatArray | None:
    return None if spread is None else np.where(np.isnan(us), np.nan, spread)


def _notes(found: Exploration) -> dict[str, Any]:
    notes: dict[str, Any] = {"active": {"cells": found.cells, "of": found.us.size}}
    if found.gave_up:
        notes["gave_up"] = found.gave_up
    return notes
