"""`Losses`: cells and rows of a profile that have no time, and why. None of it is booked on a config."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.records import RowKey
from rampwrap.measure.timer import is_memory

# A config that failed on so many workloads and ran on none is not tried on the others of this run: some would be
# compiled in vain for each.
ENOUGH_FAILURES = 3
_MEMORY = "OutOfMemoryError"


@attrs.frozen
class Losses:
    """What a run could not measure; another one tries it again."""

    cells: dict[tuple[int, int], str] = attrs.field(factory=dict)
    "Why a cell has no time, by row and config."
    rows: dict[int, str] = attrs.field(factory=dict)
    "Why a row was skipped."

    def skip(self, row: int) -> None:
        """Skips a row on which all that was tried has failed."""
        reason = next((why for (where, _), why in self.cells.items() if where == row), None)
        if reason is not None:
            self.rows[row] = reason

    def tired(self, ran: Iterable[int]) -> set[int]:
        """Configs that failed wherever they were tried, other than for want of memory, and are none of `ran`."""
        failed = Counter(config for (_, config), why in self.cells.items() if not why.startswith(_MEMORY))
        return {config for config, times in failed.items() if times >= ENOUGH_FAILURES} - set(ran)

    def notes(self, keys: Sequence[RowKey], configs: Sequence[Config]) -> dict[str, Any]:
        """What a reader of the table should know of it, JSON-able."""
        found: dict[str, Any] = {}
        if self.rows:
            found["skipped"] = {f"{keys[row][0]} ({keys[row][1]})": why for row, why in self.rows.items()}
        lost = {cell: why for cell, why in self.cells.items() if cell[0] not in self.rows}
        if lost:
            found["failed"] = [
                {"workload": keys[row][0], "config": dict(configs[config]), "reason": why}
                for (row, config), why in lost.items()
            ]
        return found

    def nothing(self, kernel: str, shape: MoEShape, reasons: Mapping[int, str], keys: Sequence[RowKey]) -> str:
        """The end of a sentence on why there is no time at all; `reasons` are those of configs."""
        short = {row: why for row, why in self.rows.items() if why.startswith(_MEMORY)}
        if short:
            row, why = next(iter(short.items()))
            return (
                f"no workload of {shape} could be measured with kernel {kernel!r}; free memory or profile smaller "
                f"batches; {keys[row][0]} says: {why}"
            )
        first = next(iter([*self.rows.values(), *self.cells.values(), *reasons.values()]), "nothing was measured")
        return f"no config of kernel {kernel!r} can run {shape}; the first says: {first.removesuffix('.')}."


def reason_of(error: BaseException) -> str:
    """The first line of an error, for a table."""
    name = _MEMORY if is_memory(error) else type(error).__name__
    return f"{name}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
