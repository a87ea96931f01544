"""Spans of token counts: whose shortlists serve, and never more candidates than were asked for."""

from collections.abc import Mapping

import attrs
import pytest

torch = pytest.importorskip("torch")

from rampwrap.dispatch.spans import Spans
from rampwrap.plan.plan import Plan

CPU = torch.device("cpu")


def spans(plan: Plan, chooses: bool = True, costs: Mapping[int, float] | None = None, most: int = 4) -> Spans:
    return Spans(plan, plan.policy(), chooses, costs, most, CPU)


@pytest.fixture(scope="module")
def several(sim_plan: Plan) -> Plan:
    """Its first spans have one candidate each, and others three and two; the last is beyond the profiled batches."""
    lists = list(sim_plan.in_graph)
    for place, candidates in ((len(lists) // 2, (0, 1, 2)), (len(lists) - 3, (0, 1))):
        lists[place] = attrs.evolve(lists[place], candidates=candidates, static=0, expected_us=1.0, static_us=2.0)
    assert len(lists[0].candidates) == 1
    return attrs.evolve(sim_plan, in_graph=tuple(lists))


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_never_more_candidates_than_asked(several: Plan, most: int) -> None:
    """The plan's own lists where all of them have as few, others made anew where one has more."""
    made = spans(several, most=most)
    found = [made.of(its.first).shortlist for its in several.in_graph]
    assert all(len(its.candidates) <= most for its in found)
    assert (found[:-1] == list(several.in_graph[:-1])) == (most >= 3)


def test_a_kernel_that_cannot_choose_has_one_config_a_span(several: Plan, sim_plan: Plan) -> None:
    """The plan's own where it has no others."""
    for its in several.in_graph:
        assert len(spans(several, chooses=False).of(its.first).shortlist.candidates) == 1
    alone = attrs.evolve(
        sim_plan, in_graph=tuple(attrs.evolve(its, candidates=(its.static,)) for its in sim_plan.in_graph)
    )
    made = spans(alone, chooses=False)
    assert [made.of(its.first).shortlist for its in alone.in_graph][:-1] == list(alone.in_graph[:-1])


def test_costs_of_ones_own_and_plans_without_lists_make_them_anew(several: Plan) -> None:
    """Choosing that costs a second is never worth it."""
    dear = spans(several, costs={2: 1e6, 3: 1e6, 4: 1e6})
    bare = spans(attrs.evolve(several, in_graph=()))
    for its in several.in_graph:
        assert len(dear.of(its.first).shortlist.candidates) == 1
        assert len(bare.of(its.first).shortlist.candidates) >= 1
