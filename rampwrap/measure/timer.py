"""What times calls, and the timers that need no GPU: `HostTimer` goes by the clock, `ReturnTimer` believes a simulated kernel."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import numpy as np

from rampwrap.errors import InputError

Call = Callable[[], Any]


# Launches in one graph; more would make captures slow for calls of which a graph this long is precise enough.
MAX_REPEATS = 200


@attrs.frozen
class Measurement:
    """A median time and how far its repeats scatter."""

    us: float
    "Median microseconds of one call."
    spread: float
    "(p80 - p20) / median of the repeats."

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Measurement":
        """Summarises the microseconds of repeated calls; at least one."""
        low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8))
        return cls(float(middle), float((high - low) / middle))


class Timed(Protocol):
    """A call made ready once, so that its samples can be taken in turn with those of others."""

    def sample(self) -> list[float]:
        """Microseconds of one call, a few repeats of it."""
        ...


class Timer(Protocol):
    """Times calls. To compare calls fairly, prepare them all, then sample them in interleaved rounds:

    a GPU that slows down while it warms up then slows all of them alike.
    """

    name: str
    drifts: bool
    "Whether times measured a while apart differ by more than the calls do, as a GPU's clocks make them."

    def rotations(self, active_bytes: int) -> int:
        """With how many different sets of experts a call should be given, if one set has `active_bytes` of weights."""
        ...

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Makes equivalent calls (one or more, run in turn) ready; whatever they raise comes through."""
        ...

    def release(self) -> None:
        """Frees all that `prepare` holds on to; what it returned is of no use afterwards."""
        ...

    def time(self, call: Call) -> Measurement:
        """Prepares, samples and releases one call."""
        ...

    def fault(self) -> str | None:
        """Why the device can no longer be used; None if it can."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What a reader of the table should know of how it was timed, JSON-able."""
        ...


class ReturnTimer:
    """Takes what a call returns as its microseconds: for `SimKernel` and other kernels that know their time."""

    name = "returned"
    drifts = False

    def rotations(self, active_bytes: int) -> int:
        """One: there is no cache to be fooled by."""
        return 1

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Runs nothing yet."""
        return _Returned(calls[0])

    def release(self) -> None:
        """Nothing is held."""

    def time(self, call: Call) -> Measurement:
        """One call."""
        return Measurement.of(self.prepare([call]).sample())

    def fault(self) -> str | None:
        """Never."""
        return None

    def provenance(self) -> dict[str, Any]:
        """Its name."""
        return {"timer": self.name}


@attrs.frozen
class _Returned:
    call: Call

    def sample(self) -> list[float]:
        value = self.call()
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(
                f"launch returned {value!r} where the timer expects positive microseconds; profile a real kernel on a GPU."
            )
        return [float(value)]


class HostTimer(ReturnTimer):
    """Where there is no GPU: believes a number that a call returns, and times any other call by the clock.

    Args:
        target_us: duration of one sample, over as many calls as it takes.
        samples: of one round.
    """

    name = "host"
    drifts = True

    def __init__(self, *, target_us: float = 2000.0, samples: int = 3) -> None:
        self._target_us, self._samples = target_us, samples

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Runs one call, which shows what it is and warms it up."""
        value = calls[0]()
        if isinstance(value, int | float):
            return _Returned(calls[0])
        once = self._clock(calls[0], 1)
        return _Clocked(self, calls[0], max(1, min(round(self._target_us / once), MAX_REPEATS)))

    def _clock(self, call: Call, repeats: int) -> float:
        """Microseconds of one of so many calls."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return max((time.perf_counter() - start) * 1e6 / repeats, 0.01)


@attrs.frozen
class _Clocked:
    timer: HostTimer
    call: Call
    repeats: int

    def sample(self) -> list[float]:
        return [self.timer._clock(self.call, self.repeats) for _ in range(self.timer._samples)]


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too short, as torch, CUDA and Python do."""
    return (
        isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "out of memory" in str(error).lower()
    )
