"""`Outlook`: when a profile of several shapes, kernels and phases will be done as a whole."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Sequence

import attrs

from rampwrap.kernel.protocol import Kernel
from rampwrap.measure.timings import Timings

PRIOR = 0.1
"""Part of a phase that its projection counts for: the first cells of a phase, which compile, say little of the others."""
PLANNING = ("plan",)
"The phase in which a plan is made of tables, and what it launches is compiled."
Keep = Callable[[Kernel, Timings, str], None]
"``keep(kernel, timings, table)`` is called with what a phase measured, and the name of the table that holds it."
_current: contextvars.ContextVar["Outlook | None"] = contextvars.ContextVar("outlook", default=None)


@attrs.frozen
class Phase:
    """A part of a profile.

    Attributes:
        kind: of phases whose projections are wrong by one factor: ``("triton_fused_moe", "sweep")``.
        seconds: as projected.
        cells: that it times; 0 where its time is given, or it times none.
    """

    kind: tuple[str, ...]
    seconds: float
    cells: int = 0


class Outlook:
    """The phases of a profile, and the time until the last one is done.

    A projection knows the device and the number of cells. It is scaled by what cells of its kind took so far beside their
    own projection, else by what all took; where little is known yet, the projection counts too.

    Args:
        phases: in their order; those that find their work done are never begun.
        clock: seconds.

    Attributes:
        told: at the beginning of each phase, seconds since this was made and seconds that were foretold.
    """

    def __init__(self, phases: Sequence[Phase], clock: Callable[[], float] = time.monotonic) -> None:
        self.phases = tuple(phases)
        self.told: list[tuple[float, float]] = []
        self._clock, self._made = clock, clock()
        self._next = 0
        self._under_way: Phase | None = None
        self._start, self._cells, self._done = 0.0, 0, 0
        self._seen: list[tuple[tuple[str, ...], float, float]] = []
        "Of phases that are over: the kind, seconds, and what was projected for as many cells."

    @contextlib.contextmanager
    def during(self, kind: tuple[str, ...]) -> Iterator[None]:
        """Within it the next phase of a kind is under way; a bar of `Progress` that starts there shows the outlook."""
        at = next((at for at in range(self._next, len(self.phases)) if self.phases[at].kind == kind), None)
        if at is None:
            yield
            return
        self._under_way, self._next = self.phases[at], at + 1
        self._start, self._cells, self._done = self._clock(), self._under_way.cells, 0
        self.told.append((self.seconds, self.left))
        token = _current.set(self)
        try:
            yield
            if not self._under_way.cells or self._done:
                self._seen.append(self._so_far())
        finally:
            _current.reset(token)
            self._under_way = None

    def expect(self, cells: int) -> None:
        """How many cells the phase under way has left to time: those that an earlier run kept are not."""
        self._cells = cells

    def advance(self) -> None:
        """One of them is done with."""
        self._done += 1

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return self._clock() - self._made

    @property
    def left(self) -> float:
        """Seconds until the last phase is done."""
        rest = sum(phase.seconds * self._factor(phase) for phase in self.phases[self._next :])
        phase = self._under_way
        if phase is None:
            return rest
        whole = phase.seconds * self._factor(phase)
        if not phase.cells:
            return max(0.0, whole - (self._clock() - self._start)) + rest
        return whole * max(self._cells - self._done, 0) / phase.cells + rest

    def __str__(self) -> str:
        return f"phase {max(self._next, 1)} of {len(self.phases)}, all done in {about(self.left)}"

    def _so_far(self) -> tuple[tuple[str, ...], float, float]:
        phase = self._under_way
        assert phase is not None
        projected = phase.seconds * self._done / phase.cells if phase.cells else phase.seconds
        return phase.kind, self._clock() - self._start, projected

    def _factor(self, phase: Phase) -> float:
        """Seconds that one projected second takes, for a phase of its kind."""
        counts = self._under_way is not None and self._under_way.cells and self._done
        known = [*self._seen, *([self._so_far()] if counts else [])]
        factor, prior = 1.0, PRIOR * phase.seconds
        # First what all took, then phases of that step, then those of the same kernel too. A time that is given, or does not
        # come of cells, has nothing to do with theirs.
        for alike in ((), phase.kind[-1:], phase.kind) if phase.cells else (phase.kind,):
            its = [(took, projected) for kind, took, projected in known if kind[len(kind) - len(alike) :] == alike]
            took, projected = sum(its_took for its_took, _ in its), sum(one for _, one in its)
            if projected + prior > 0:
                factor = (took + prior * factor) / (projected + prior)
        return factor


def current() -> Outlook | None:
    """That of the profile which is under way."""
    return _current.get()


def about(seconds: float) -> str:
    """A duration in words: ``40 s``, ``3 min``."""
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
