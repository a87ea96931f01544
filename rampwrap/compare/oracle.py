"""Policies that only a measured table has: the best of each row, and policies renumbered to be compared."""

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.protocol import Config
from rampwrap.measure.timings import Timings
from rampwrap.policy.policies import Choice, Policy


@attrs.frozen(eq=False)
class Renumbered:
    """Another policy, over a longer list of configs in which its own stand at `where`."""

    configs: tuple[Config, ...]
    inner: Policy
    where: tuple[int, ...]

    @property
    def needs_counts(self) -> bool:
        """As the other policy."""
        return self.inner.needs_counts

    def index(self, expert_counts: IntArray, num_tokens: int) -> int:
        """As the other policy, in this numbering."""
        return self.where[self.inner.index(expert_counts, num_tokens)]

    def index_of_ids(self, topk_ids: npt.NDArray[Any], num_experts: int) -> int | None:
        """As the other policy, in this numbering; None where it cannot."""
        of_ids = getattr(self.inner, "index_of_ids", None)
        index = None if of_ids is None else of_ids(topk_ids, num_experts)
        return None if index is None else self.where[index]

    def select(self, expert_counts: IntArray, num_tokens: int) -> Choice:
        """As the other policy, in this numbering."""
        choice = self.inner.select(expert_counts, num_tokens)
        return attrs.evolve(choice, index=self.where[choice.index])


class Oracle:
    """The config that was measured fastest on this very histogram; only for histograms of its timing table."""

    needs_counts = True

    def __init__(self, timings: Timings, rows: Sequence[int] | IntArray | None = None) -> None:
        self.configs = timings.configs
        self._best: dict[bytes, tuple[int, float]] = {}
        for row in range(len(timings.us)) if rows is None else rows:
            us = timings.us[row]
            if not np.isnan(us).all():
                best = int(np.nanargmin(us))
                self._best.setdefault(timings.counts[row].tobytes(), (best, float(us[best])))

    def _find(self, expert_counts: IntArray) -> tuple[int, float]:
        found = self._best.get(np.ascontiguousarray(expert_counts, dtype=np.int64).tobytes())
        if found is None:
            raise InputError(
                "this histogram was not measured, so no oracle exists for it; use a row of the timing table."
            )
        return found

    def index(self, expert_counts: IntArray, num_tokens: int) -> int:
        """The measured best."""
        return self._find(expert_counts)[0]

    def select(self, expert_counts: IntArray, num_tokens: int) -> Choice:
        """The same, explained."""
        index, us = self._find(expert_counts)
        return Choice(index, self.configs[index], "measured fastest on this histogram", us)
