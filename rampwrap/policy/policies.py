"""Policies: pure functions from a histogram to a config.

All of them answer `index`, the hot path, and `select`, the same choice with its reasons.
"""

from typing import Any, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernel.grid import CtaGrid, IntArray
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.model.base import CostModel
from rampwrap.policy.reach import Reach
from rampwrap.policy.static import StaticTable
from rampwrap.schema import LARGEST, between

_OUTSIDE = -1
"In place of a candidate: the histogram is unlike everything profiled."


@attrs.frozen
class Choice:
    """What a policy chose for one histogram, and why."""

    index: int
    config: Config
    why: str
    predicted_us: float | None = None
    num_waves: int | None = None
    last_wave_util: float | None = None
    runner_up: Config | None = None
    runner_up_us: float | None = None

    def __str__(self) -> str:
        parts = [format_config(self.config)]
        if self.predicted_us is not None:
            parts.append(f"predicted {self.predicted_us:.1f} us")
        if self.num_waves is not None and self.last_wave_util is not None:
            parts.append(f"{self.num_waves} waves, the last {self.last_wave_util:.0%} full")
        if self.runner_up is not None and self.runner_up_us is not None:
            parts.append(f"runner-up {format_config(self.runner_up)} {self.runner_up_us:.1f} us")
        return "; ".join([*parts, self.why])


class Policy(Protocol):
    """A rule by which a config is chosen; ties go to the lower index, so every rank chooses alike."""

    @property
    def configs(self) -> tuple[Config, ...]:
        """What it chooses from."""
        ...

    @property
    def needs_counts(self) -> bool:
        """False where the token count is enough, so that the histogram is never read."""
        ...

    def index(self, expert_counts: IntArray, num_tokens: int) -> int:
        """Index of the config to launch."""
        ...

    def select(self, expert_counts: IntArray, num_tokens: int) -> Choice:
        """The same choice, explained."""
        ...


@attrs.frozen
class Static:
    """The config that a table names for the token count: what engines do today."""

    configs: tuple[Config, ...]
    table: StaticTable
    needs_counts = False

    def index(self, expert_counts: IntArray, num_tokens: int) -> int:
        """The nearest token count's config."""
        return self.table.index(num_tokens)

    def select(self, expert_counts: IntArray, num_tokens: int) -> Choice:
        """The same, explained."""
        index = self.index(expert_counts, num_tokens)
        return Choice(index, self.configs[index], f"static table ({self.table.source}) at {num_tokens} tokens")


@attrs.frozen
class Pinned:
    """Always the same config."""

    configs: tuple[Config, ...]
    pinned: int
    needs_counts = False

    def index(self, expert_counts: IntArray, num_tokens: int) -> int:
        """The pinned config."""
        return self.pinned

    def select(self, expert_counts: IntArray, num_tokens: int) -> Choice:
        """The same, explained."""
        return Choice(self.pinned, self.configs[self.pinned], "pinned")


@attrs.frozen
class Bucket:
    """The candidates around one token count."""

    num_tokens: int = attrs.field(validator=between(0, LARGEST, InputError))
    shortlist: tuple[int, ...]
    "Indices of configs, ascending; the model chooses among these and the static config."
    why: str = ""


@attrs.frozen(eq=False)
class WaveCost:
    """The config that the cost model predicts to be fastest, if its gain over static exceeds the model's own error.

    Attributes:
        model: predicts microseconds of every config from the histogram.
        static: what serves when the predicted gain is within the model's error or the histogram is empty.
        grids, num_sms: for explanations.
        buckets: candidates by token count, the nearest bucket serves; none means every config, always.
        choosing_us: cost of choosing, which a gain must exceed too.
        reach: the batches that all of this is known for, and what serves others; None claims it for every batch.
            `configs` may go on after the model's with what serves there.
    """

    configs: tuple[Config, ...]
    model: CostModel
    static: StaticTable
    grids: tuple[CtaGrid, ...]
    num_sms: int
    buckets: tuple[Bucket, ...] = ()
    choosing_us: float = 0.0
    reach: Reach | None = None
    _near: StaticTable | None = attrs.field(init=False, default=None)
    _parts: tuple[tuple[CostModel, tuple[int, ...]], ...] = attrs.field(init=False, default=())
    needs_counts = True

    def __attrs_post_init__(self) -> None:
        if not self.buckets:
            every = tuple(range(self.model.num_configs))
            object.__setattr__(self, "_parts", ((self.model, every),))
            return
        tokens = tuple(bucket.num_tokens for bucket in self.buckets)
        near = StaticTable("buckets", tokens, tuple(range(len(tokens))))
        # Every static config that can serve inside a bucket is one of its candidates: never slower than static.
        candidates = [
            tuple(sorted(self.static.used(*self._known(*near.span(position))).union(bucket.shortlist)))
            for position, bucket in enumerate(self.buckets)
        ]
        object.__setattr__(self, "_near", near)
        object.__setattr__(self, "_parts", tuple((self.model.take(some), some) for some in candidates))

    def _known(self, low: int, high: int) -> tuple[int, int]:
        return (low, high) if self.reach is None else (max(low, self.reach.low), min(high, self.reach.high))

    def beyond(self, num_tokens: int) -> bool:
        """Whether so many tokens are far from every profiled batch."""
        return self.reach is not None and not self.reach.inside(num_tokens)

    def speaks(self, expert_counts: IntArray, num_tokens: int) -> bool:
        """Whether a batch is within all that is known, so that what serves depends on nothing else than the plan."""
        return not (self.beyond(num_tokens) or self._too_few(expert_counts, num_tokens))

    def _too_few(self, expert_counts: IntArray, num_tokens: int) -> bool:
        """Whether fewer experts are active than any workload had."""
        return 0 < int(np.count_nonzero(expert_counts)) < self._part(num_tokens)[0]._least_active

    def _outside(self, num_tokens: int) -> int:
        """What serves where fewer experts are active than were ever profiled."""
        return (
            self.static.index(num_tokens)
            if self.reach is None or not self.reach.own
            else self.reach.outside.index(num_tokens)
        )

    def _part(self, num_tokens: int) -> tuple[CostModel, tuple[int, ...]]:
        return self._parts[0 if self._near is None else self._near.index(num_tokens)]

    def index(self, expert_counts: IntArray, num_tokens: int) -> int:
        """argmin of the prediction, or the static config."""
        fallback = self.static.index(num_tokens)
        if num_tokens == 0 or self.beyond(num_tokens):
            return fallback
        model, candidates = self._part(num_tokens)
        chosen = model.choose(expert_counts, candidates.index(fallback), self.choosing_us, _OUTSIDE)
        return self._outside(num_tokens) if chosen == _OUTSIDE else candidates[chosen]

    def index_of_ids(self, topk_ids: npt.NDArray[Any], num_experts: int) -> int | None:
        """`index` straight from expert ids, all experts local; None where they must be counted first."""
        num_tokens = len(topk_ids)
        if not num_tokens or self.beyond(num_tokens):
            return None
        fallback = self.static.index(num_tokens)
        model, candidates = self._part(num_tokens)
        chosen = model.choose_ids(topk_ids, num_experts, candidates.index(fallback), self.choosing_us, _OUTSIDE)
        if chosen is None:
            return None
        return self._outside(num_tokens) if chosen == _OUTSIDE else candidates[chosen]

    def select(self, expert_counts: IntArray, num_tokens: int) -> Choice:
        """The same choice, with predicted times, waves and the runner-up."""
        index, fallback = self.index(expert_counts, num_tokens), self.static.index(num_tokens)
        if not expert_counts.any():
            return Choice(index, self.configs[index], "no tokens: the static config")
        if self.reach is not None and not self.reach.inside(num_tokens):
            return Choice(index, self.configs[index], self.reach.beyond())
        model, candidates = self._part(num_tokens)
        few = self._too_few(expert_counts, num_tokens)
        if few and self.reach is not None and self.reach.own:
            why = f"outside the profiled spread (fewer active experts than any workload had): {self.reach.serves}"
            return Choice(index, self.configs[index], why)
        predicted = dict(zip(candidates, model.predict(expert_counts).tolist(), strict=True))
        order = sorted(candidates, key=lambda candidate: predicted[candidate])
        runner_up = next((candidate for candidate in order if candidate != index), None)
        gain = predicted[fallback] / predicted[order[0]] - 1
        if index != fallback:
            why = f"predicted {gain:.1%} faster than static ({format_config(self.configs[fallback])})"
        elif order[0] == fallback:
            why = "the static config is predicted fastest"
        else:
            why = f"static kept: the predicted gain of {gain:.1%} is within the model's error"
        if few:
            why = "outside the profiled spread (fewer active experts than any workload had): the static config serves"
        elif self.reach is not None and (far := self.reach.spread(expert_counts, num_tokens)):
            why += f"; {far}"
        waves, last = self.grids[index].waves(expert_counts, self.num_sms)
        return Choice(
            index,
            self.configs[index],
            why,
            predicted[index],
            waves,
            last,
            None if runner_up is None else self.configs[runner_up],
            None if runner_up is None else predicted[runner_up],
        )
