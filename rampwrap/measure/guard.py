"""`Guard`: lets launches fail, hang or lose the GPU, and books what did."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rampwrap.errors import DeviceFault
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.measure.journal import Journal
from rampwrap.measure.losses import Losses, reason_of
from rampwrap.measure.records import RowKey
from rampwrap.measure.timer import Timer, is_memory
from rampwrap.measure.watchdog import Hung, Watchdog

T = TypeVar("T")


class Guard:
    """Around everything of a profile that runs a kernel.

    Attributes:
        short: whether memory was too short for a launch; whoever wants to know sets it to False before.

    Args:
        journal: where configs that hang or lose the GPU are booked.
        lost: where all other failures are.
        keys: of the rows.
        say: tells the user.
        patience_s: seconds after which a launch, its compilation included, counts as hung.
    """

    def __init__(
        self,
        journal: Journal,
        lost: Losses,
        timer: Timer,
        configs: Sequence[Config],
        keys: Sequence[RowKey],
        *,
        say: Callable[[str], None],
        patience_s: float,
    ) -> None:
        self.short = False
        self._journal, self._lost, self._timer = journal, lost, timer
        self._configs, self._keys = configs, keys
        self._say, self._patience_s = say, patience_s
        self._watchdog = Watchdog(patience_s, self._book_hang)
        self._watched: int | None = None

    @contextlib.contextmanager
    def launching(self, row: int, config: int, *, begin: int | None) -> Iterator[None]:
        """Turns whatever the body raises into the reason why the cell is NaN.

        Args:
            begin: how often the process ended in this launch before; None where the config has run on the row.

        Raises:
            DeviceFault: the GPU is lost; the config is booked.
        """
        what = f"config {format_config(self._configs[config])} on {self._keys[row][0]}"
        if begin is not None:
            self._journal.begin(config, self._keys[row], begin)
        self._watched = config
        try:
            with self._watchdog.watching(what):
                yield
        except Hung:
            self._say(f"{what} did not return in time; it is passed over.")
        except Exception as error:
            self._lost.cells[row, config] = reason = reason_of(error)
            self.short |= is_memory(error)
            fault = self._timer.fault()
            if fault is not None:
                self._journal.fail(config, reason)
                kept = f"run the same command again to go on without it (kept in {self._journal.path})"
                raise DeviceFault(
                    f"{what} lost the GPU ({fault}); "
                    + (kept if self._journal.path else "leave it out, and give an output file to keep what is measured")
                    + "."
                ) from error
        finally:
            self._watched = None

    def made(self, row: int, make: Callable[[int], list[T]]) -> list[T]:
        """``make(row)``: the inputs of a row; empty where they cannot be made, also when all else is freed.

        The row is skipped then.

        Raises:
            DeviceFault: the GPU is lost.
        """
        for attempt in range(2):
            try:
                with self._watchdog.watching(f"making the inputs of {self._keys[row][0]}"):
                    return make(row)
            except Exception as error:
                reason = reason_of(error)
                if (fault := self._timer.fault()) is not None:
                    raise DeviceFault(
                        f"the GPU was lost ({fault}) while the inputs of {self._keys[row][0]} were made; "
                        "run the same command again."
                    ) from error
            if attempt:
                self._lost.rows[row] = reason
            else:
                self._timer.release()
        return []

    def close(self) -> None:
        """Ends the thread that watches."""
        self._watchdog.close()

    def _book_hang(self, what: str) -> None:
        """In the watchdog's thread, while the launch still runs."""
        if self._watched is not None:
            self._journal.fail(
                self._watched, f"it did not return within {self._patience_s:g} s ({what.split(' on ')[-1]})"
            )
