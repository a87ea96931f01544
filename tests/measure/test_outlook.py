"""When all of a profile will be done, said while it runs: by a clock that the tests turn."""

import numpy as np
import pytest

from rampwrap.measure.outlook import PLANNING, Outlook, Phase, about, current
from rampwrap.measure.progress import Progress

SWEEP, TABLE = ("ours", "sweep"), ("ours", "table")
STARTS = [0.0, 40.0, 220.0, 224.0, 264.0, 444.0]
SHAPE = [Phase(SWEEP, 20.0, 100), Phase(TABLE, 60.0, 1000), Phase(PLANNING, 10.0)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(outlook: Outlook, clock: Clock, phase: Phase, seconds: np.ndarray, cells: int | None = None) -> list[float]:
    """Lets a phase take so many seconds for each cell; what was foretold before each."""
    told = []
    with outlook.during(phase.kind):
        assert current() is outlook
        progress = Progress(quiet=True)
        if phase.cells:
            progress.expect(phase.cells if cells is None else cells)
        for one in seconds:
            told.append(outlook.left)
            clock.now += float(one)
            if phase.cells:
                progress.advance()
        progress.close()
    assert current() is None
    return told


def test_what_is_foretold_comes_true() -> None:
    """Phases take two and three times what was projected, and each begins with slow cells; a second shape is foretold right."""
    clock = Clock()
    outlook = Outlook([*SHAPE, *SHAPE], clock)
    assert outlook.left == 180.0 and str(outlook) == "phase 1 of 6, all done in 3 min"
    sweep, table = np.r_[np.full(10, 2.0), np.full(90, 40 / 180)], np.full(1000, 0.18)
    planning = np.full(4, 1.0)
    total = 2 * (sweep.sum() + table.sum() + planning.sum())
    told: list[tuple[float, float]] = []
    for phase, seconds in zip([*SHAPE, *SHAPE], [sweep, table, planning] * 2, strict=True):
        start = clock.now
        found = run(outlook, clock, phase, seconds)
        told += zip(found, total - start - np.r_[0.0, seconds.cumsum()[:-1]], strict=True)
    assert clock.now == outlook.seconds == pytest.approx(total) and outlook.left == 0.0
    assert [at for at, _ in outlook.told] == pytest.approx(STARTS) and outlook.told[0][1] == 180.0
    said, true = np.array(told).T
    half = len(said) // 2
    # From a fifth of the first table on it is off by at most 10 % of all, from the second shape on by 7 %.
    assert np.abs(said - true)[301:].max() < 0.1 * total
    assert np.abs(said - true)[half:].max() < 0.07 * total
    assert np.abs(said - true)[-1] < 3.0


def test_cells_that_were_kept_cost_nothing() -> None:
    clock = Clock()
    outlook = Outlook(SHAPE, clock)
    with outlook.during(TABLE):  # the sweep is there
        Progress(quiet=True).expect(100)
        assert outlook.left == pytest.approx(6.0 + 10.0) and str(outlook).startswith("phase 2 of 3, all done in 16 s")
    assert outlook.left == 10.0  # nothing was timed, and nothing learned


def test_a_given_time_runs_out() -> None:
    clock = Clock()
    outlook = Outlook([Phase(("ours", "budget"), 90.0), Phase(("theirs", "budget"), 90.0)], clock)
    with outlook.during(("ours", "budget")):
        Progress(quiet=True).expect(50)
        outlook.advance()
        clock.now = 40.0
        assert outlook.left == 140.0
        clock.now = 100.0
        assert outlook.left == 90.0


def test_a_phase_that_is_cut_off_teaches_nothing() -> None:
    clock = Clock()
    outlook = Outlook(SHAPE, clock)
    with pytest.raises(KeyboardInterrupt), outlook.during(SWEEP):
        clock.now = 1000.0
        outlook.advance()
        raise KeyboardInterrupt
    assert current() is None and outlook.left == 70.0
    with outlook.during(("unheard", "of")):
        assert outlook.left == 70.0


def test_durations() -> None:
    assert [about(seconds) for seconds in (0.0, 1.0, 89.0, 90.0, 3600.0)] == [
        "a second",
        "1 s",
        "89 s",
        "2 min",
        "60 min",
    ]
