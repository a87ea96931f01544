"""Timers without a GPU, and one time out of many samples."""

import time
import types
from typing import Any

import numpy as np
import pytest

from rampwrap.errors import InputError
from rampwrap.measure import timer as timers
from rampwrap.measure.rounds import summarise
from rampwrap.measure.timer import HostTimer, Measurement, ReturnTimer, is_memory


class TestHost:
    """By a clock that each call moves on."""

    @pytest.fixture
    def now(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [50.0]
        clock = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
        monkeypatch.setattr(timers, "time", clock)
        return now

    @pytest.mark.parametrize(
        ("us", "repeats"), [(100.0, 20), (7.0, 200), (1300.0, 2), (1400.0, 1), (5000.0, 1), (10.0, 200), (10.1, 198)]
    )
    def test_a_sample_lasts_two_milliseconds(self, now: list[float], us: float, repeats: int) -> None:
        calls: list[float] = []

        def call() -> str:
            calls.append(now[0])
            now[0] += us * 1e-6
            return "done"

        timed = HostTimer().prepare([call])
        assert len(calls) == 2, "once to warm up, once by the clock"
        assert timed.sample() == pytest.approx([us] * 3)
        assert len(calls) == 2 + 3 * repeats

    def test_samples_and_their_length_are_arguments(self, now: list[float]) -> None:
        calls: list[int] = []

        def call() -> None:
            calls.append(1)
            now[0] += 1e-4

        timed = HostTimer(target_us=500.0, samples=2).prepare([call])
        assert timed.sample() == pytest.approx([100.0] * 2) and len(calls) == 2 + 2 * 5

    def test_a_clock_that_stands_still_gives_no_zero(self, now: list[float]) -> None:
        assert HostTimer().prepare([lambda: None]).sample() == [0.01] * 3

    def test_a_number_that_is_returned_is_believed(self) -> None:
        calls = iter([4.0, 5.0, 6])
        timed = HostTimer().prepare([lambda: next(calls)])
        assert timed.sample() == [5.0] and timed.sample() == [6.0]
        assert HostTimer().time(lambda: 7.0) == Measurement(7.0, 0.0)


def test_what_the_timers_are() -> None:
    for made, name, drifts in ((ReturnTimer(), "returned", False), (HostTimer(), "host", True)):
        assert (made.name, made.drifts, made.rotations(10**9), made.fault()) == (name, drifts, 1, None)
        assert made.provenance() == {"timer": name} and made.release() is None


def test_median_and_spread_are_between_the_samples() -> None:
    """p20 and p80 of 0, 1, ..., 10 are 2 and 8."""
    assert Measurement.of([float(us) for us in range(11)]) == Measurement(5.0, pytest.approx(6 / 5))
    assert Measurement.of([3.0]) == Measurement(3.0, 0.0)


@pytest.mark.parametrize("value", [None, "5", 0, -1.0, float("nan"), float("inf"), [1.0]])
def test_what_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="expects positive microseconds"):
        ReturnTimer().prepare([lambda: value]).sample()
    assert ReturnTimer().prepare([lambda: 3]).sample() == [3.0]


def test_short_memory_by_any_name() -> None:
    class OutOfMemoryError(Exception):
        """torch's."""

    for error in (MemoryError(), OutOfMemoryError(), RuntimeError("CUDA error: Out of Memory")):
        assert is_memory(error)
    assert not is_memory(RuntimeError("memory is fine")) and not is_memory(ValueError("out of luck"))


class TestRounds:
    def test_few_leaders_keep_their_own_medians(self) -> None:
        """The survey counts only for configs that were out after it."""
        found = summarise({0: [[100.0], [10.0, 11.0], [12.0]], 1: [[50.0, 52.0]], 2: [[9.0], [1.0]]})
        assert {config: its.us for config, its in found.items()} == {0: 11.0, 1: 51.0, 2: 1.0}

    @pytest.mark.parametrize("leaders", [7, 8])
    def test_a_drift_that_eight_leaders_share_is_taken_out(self, leaders: int) -> None:
        """Round 2 is 20 % slower for all; one config ran in the survey alone, which was 10 % faster."""
        own = 10.0 + np.arange(leaders)
        samples = {
            config: [[0.9 * us], [us, us], [1.2 * us, 1.2 * us], [us, us]] for config, us in enumerate(own.tolist())
        }
        samples[99] = [[90.0]]
        found = summarise(samples)
        for config, us in enumerate(own.tolist()):
            assert found[config].us == pytest.approx(us)
            assert (found[config].spread < 1e-9) == (leaders == 8)
        assert found[99].us == pytest.approx(100.0 if leaders == 8 else 90.0)

    def test_rounds_of_which_some_leaders_were_left_out(self) -> None:
        """The drift of a round is that of those it has."""
        samples = {config: [[10.0], [10.0], [10.0], [30.0]] for config in range(8)} | {8: [[5.0], [5.0], [5.0]]}
        found = summarise(samples)
        assert found[8] == Measurement(5.0, 0.0) and found[0] == Measurement(10.0, 0.0)
