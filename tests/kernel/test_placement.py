"""Which experts are on a rank: maps there and back, and what of a histogram is here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.errors import InputError
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(1, n))))
def test_a_map_says_what_a_placement_does(drawn: tuple[list[int], int]) -> None:
    order, local = drawn
    placement = Placement(len(order), np.array(order[:local]))
    assert sorted(placement.expert_map.tolist()) == [-1] * (len(order) - local) + list(range(local))
    assert [placement.expert_map[expert] for expert in placement.experts] == list(range(local))
    assert np.array_equal(Placement.of_map(placement.expert_map, len(order)).experts, placement.experts)
    counts = np.arange(len(order)) * 10
    assert placement.counts(counts).tolist() == [10 * expert for expert in order[:local]]
    assert placement.counts(np.stack([counts, counts + 1])).shape == (2, local)


def test_a_rank_is_profiled_with_the_first_experts() -> None:
    shape = MoEShape(6, 2, 128, 128, num_local_experts=4)
    assert Placement.first(shape).expert_map.tolist() == [0, 1, 2, 3, -1, -1]
    assert Placement.first(shape).expert_map.dtype == np.int32
    assert Placement.first(MoEShape(3, 2, 128, 128)).expert_map.tolist() == [0, 1, 2]


def test_a_rank_without_experts() -> None:
    assert Placement.of_map([-1, -1], 2).counts(np.array([3, 4])).tolist() == []


@pytest.mark.parametrize(
    ("expert_map", "message"),
    [
        ([0, 1], r"expert_map has shape \(2,\); give one local id for each of 3 experts"),
        ([0, 0, -1], r"gives its 2 local experts the ids \[0, 0\]"),
        ([0, 2, -1], r"from 0 to 1 once and -1"),
        ([0.0, 1.0, -1.0], "give integers"),
    ],
)
def test_what_is_no_map_is_refused(expert_map: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement.of_map(expert_map, 3)
