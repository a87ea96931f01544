"""How far routing lies from what was profiled: the numbers, their ranges, their sums, and the distance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.errors import InputError
from rampwrap.routing.drift import Profiled, Sums, drift, profiled_ranges, routing_numbers

EVEN, ONE = np.array([2, 2, 2, 2]), np.array([8, 0, 0, 0])
histograms = st.lists(st.integers(0, 1000), min_size=2, max_size=9).filter(any)


@given(histograms)
def test_numbers_of_a_histogram(counts: list[int]) -> None:
    """Concentration is least where all active experts have as much."""
    active, concentration = routing_numbers(np.array([counts]))
    total = sum(counts)
    assert active.tolist() == [sum(count > 0 for count in counts)]
    assert concentration[0] == pytest.approx(sum(count * count for count in counts) / total**2)
    assert 1 / active[0] - 1e-12 <= concentration[0] <= 1


@pytest.mark.parametrize(
    "bad", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan)]
)
def test_ranges_are_positive_finite_and_in_order(bad: tuple[float, float]) -> None:
    assert Profiled(1, (1.0, 1.0), (1.0, 1.0)).active_experts == (1.0, 1.0)
    for ranges in ((bad, (0.1, 0.2)), ((1.0, 2.0), bad)):
        with pytest.raises(InputError, match="give a least and a largest number above 0"):
            Profiled(4, *ranges)
    with pytest.raises(InputError, match="num_tokens"):
        Profiled(0, (1.0, 2.0), (0.1, 0.2))


def test_a_token_count_has_its_neighbours_workloads_too() -> None:
    """Those with no tokens say nothing."""
    tokens = np.array([1, 4, 4, 16, 64, 64])
    counts = np.array([[1, 1, 0, 0], [4, 4, 0, 0], [2, 2, 2, 2], [32, 0, 0, 0], [48, 48, 32, 0], [0, 0, 0, 0]])
    found = profiled_ranges(tokens, counts)
    assert [its.num_tokens for its in found] == [1, 4, 16, 64]
    assert [its.active_experts for its in found] == [(2.0, 4.0), (1.0, 4.0), (1.0, 4.0), (1.0, 3.0)]
    last = round((48**2 * 2 + 32**2) / 128**2, 9)
    assert [its.concentration for its in found] == [(0.25, 0.5), (0.25, 1.0), (0.25, 1.0), (last, 1.0)]
    assert profiled_ranges(tokens[:1], counts[:1]) == (Profiled(1, (2.0, 2.0), (0.5, 0.5)),)


class TestSums:
    def test_add_up(self) -> None:
        sums = Sums()
        for counts in (EVEN, ONE, np.zeros(4, dtype=np.int64)):
            sums.add(counts)
        assert sums.numbers() == {"active_experts": 5.0, "concentration": 1.25, "outside": 0, "seen": 2}

    def test_an_array_that_comes_again_counts_once(self) -> None:
        sums = Sums()
        for counts in (EVEN, EVEN, ONE, EVEN, EVEN.copy()):
            sums.add(counts)
        assert sums.seen == 4

    @given(histograms, st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 9))
    def test_outside_is_less_than_half_more_than_twice_or_too_few_experts(
        self, counts: list[int], least: int, more: int, least_active: int
    ) -> None:
        sums, slots, active = Sums(least, least + more, least_active), sum(counts), sum(c > 0 for c in counts)
        sums.add(np.array(counts))
        assert sums.seen == (slots > 0)
        assert sums.outside == (slots > 0) * (slots < least / 2 or slots > 2 * (least + more) or active < least_active)

    @pytest.mark.parametrize(
        ("bounds", "outside"),
        [((16, 99, 0), 0), ((17, 99, 0), 1), ((0, 4, 0), 0), ((0, 3, 0), 1), ((0, 99, 4), 0), ((0, 99, 5), 1)],
    )
    def test_edges(self, bounds: tuple[int, int, int], outside: int) -> None:
        """Eight slots on four experts."""
        sums = Sums(*bounds)
        sums.add(EVEN)
        assert sums.outside == outside


class TestDistance:
    RANGES = (Profiled(4, (2.0, 4.0), (0.25, 0.5)), Profiled(16, (8.0, 8.0), (0.2, 0.2)))

    @pytest.mark.parametrize(
        ("tokens", "active", "concentration", "outside", "found"),
        [
            (4, 3.0, 0.3, 0.0, 0.0),
            (4, 2.0, 0.5, 0.0, 0.0),
            (4, 1.0, 0.3, 0.0, 0.5),
            (4, 8.0, 0.3, 0.0, 2.0),
            (4, 3.0, 1.0, 0.0, 1.0),  # a factor of 2 beyond a range of 2
            (4, 3.0, 0.0625, 0.0, 2.0),
            (4, 3.0, 0.3, 0.75, 0.75),
            (4, 1.0, 0.3, 0.25, 0.5),
            (16, 7.5, 0.2, 0.0, 0.5),  # a range of nothing is one expert wide
            (16, 8.0, 0.2 * math.exp(0.05), 0.0, 0.5),  # and 0.1 in logarithms
            (9, 8.0, 0.3, 0.0, 2.0),  # nearest is 4
            (10, 8.0, 0.2, 0.0, None),  # both as near: the smaller
            (11, 8.0, 0.2, 0.0, 0.0),
        ],
    )
    def test_in_widths_of_the_range(
        self, tokens: int, active: float, concentration: float, outside: float, found: float | None
    ) -> None:
        its = drift(self.RANGES, tokens, active, concentration, outside)
        if found is None:
            found = drift(self.RANGES, 4, active, concentration, outside)
            assert drift(self.RANGES[::-1], tokens, active, concentration, outside) == found == its
        assert its == pytest.approx(found)

    def test_what_is_not_known(self) -> None:
        assert drift((), 4, 3.0, 0.3) is None and drift(self.RANGES, 4, 3.0, 0.0) is None
        assert drift(self.RANGES, 4, 3.0, 0.3) == 0.0
