"""`Spans`: what serves each token count inside a CUDA graph, looked up in a microsecond and made once.

Token counts that share the plan's bucket and static config share one shortlist and its tables, so that memory is
bounded by the plan, however many batch sizes an engine runs.
"""

import bisect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch

from rampwrap.errors import CaptureError
from rampwrap.kernel.protocol import Config
from rampwrap.model.in_graph import pack
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import COSTS, Shortlist, Span, in_graph, token_spans
from rampwrap.policy.policies import Policy, Static, WaveCost
from rampwrap.policy.reach import Reach
from rampwrap.policy.static import StaticTable


@attrs.frozen(eq=False)
class Prepared:
    """What serves some token counts: the shortlist, and the tables on the GPU."""

    position: int
    shortlist: Shortlist
    configs: tuple[Config, ...]
    candidates: Any
    "`kernels.triton.select.Candidates`; None where there is nothing to choose."


class Spans:
    """All spans of a plan for one kernel, or of a policy without one.

    Args:
        plan: whose model and shortlists serve; None serves the policy's table.
        policy: of the host; anything but `WaveCost` serves static configs alone.
        chooses: whether the GPU may choose; one config serves each span elsewhere.
        costs: microseconds by number of candidates; None takes the plan's own shortlists where it has them, and
            `graph_lists.COSTS` elsewhere.
        max_candidates: at most four.
        device: where the tables go.
    """

    def __init__(
        self,
        plan: Plan | None,
        policy: Policy,
        chooses: bool,
        costs: Mapping[int, float] | None,
        max_candidates: int,
        device: torch.device,
    ) -> None:
        self._plan, self._policy, self._device, self._max_candidates = plan, policy, device, max_candidates
        routed = isinstance(policy, WaveCost)
        self._costs = (COSTS if costs is None else costs) if routed and chooses else {}
        self._lists: tuple[Shortlist | Span, ...]
        lists = () if plan is None else plan.in_graph
        stored = costs is None and max_candidates >= max((len(its.candidates) for its in lists), default=9)
        if plan is None:
            table = _table(policy, plan)
            self._lists = _alone(sorted(_changes(table)), table, f"there is no plan, its {table.source} serves")
        elif routed and stored and (chooses or all(len(its.candidates) == 1 for its in lists)):
            self._lists = lists
        else:
            # A kernel that cannot choose has one config a span too: the best over skews, not the uniform-tuned one.
            self._lists = token_spans(plan.shape, _table(policy, plan), plan.buckets if routed else ())
        if isinstance(policy, WaveCost) and policy.reach is not None:
            self._lists = _within(self._lists, policy.reach, policy.static)
        self._firsts = [its.first for its in self._lists]
        self._made: list[Prepared | None] = [None] * len(self._lists)

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Prepared]:
        """Those that were made, by token count."""
        return (span for span in self._made if span is not None)

    def of(self, num_tokens: int) -> Prepared:
        """What serves a batch of `num_tokens`, made at the first call for its span.

        Raises:
            CaptureError: it would have to be made under capture.
        """
        position = max(0, bisect.bisect_right(self._firsts, num_tokens) - 1)
        found = self._made[position]
        if found is None:
            if capturing():
                raise CaptureError(
                    f"nothing is prepared for {num_tokens} tokens; run one eager step of that size, or call "
                    f"warm([{num_tokens}], ...), before capturing."
                )
            found = self._made[position] = self._make(position)
        return found

    def _make(self, position: int) -> Prepared:
        its, plan = self._lists[position], self._plan
        if isinstance(its, Span):
            assert plan is not None
            its = in_graph(plan.model, plan.shape, its, self._costs, self._max_candidates)
        configs = tuple(self._policy.configs[index] for index in its.candidates)
        if len(configs) == 1:
            return Prepared(position, its, configs, None)
        assert plan is not None
        from rampwrap.kernels.triton.select.host import Candidates

        packed = pack(plan.model.take(its.candidates), margin_steps=len(plan.model.local_error))
        return Prepared(position, its, configs, Candidates.on(packed, self._device))


def _within(lists: "tuple[Shortlist | Span, ...]", reach: Reach, static: StaticTable) -> "tuple[Shortlist | Span, ...]":
    """A plan's lists where it speaks for the batch, and what serves elsewhere: one config each."""
    at_low = 0 if reach.low <= 1 else reach.low  # where one list goes on from below, it begins within reach
    edges = [*(its.first for its in lists[1:]), reach.high + 1]
    reaching = [its for its, end in zip(lists, edges, strict=True) if end > at_low and its.first <= reach.high]
    inside = [attrs.evolve(its, first=max(its.first, at_low)) for its in reaching]
    firsts = _changes(static) | {reach.high + 1}
    far = sorted(first for first in firsts if not reach.inside(first) and (first or reach.low > 1))
    return tuple(sorted([*inside, *_alone(far, static, reach.beyond())], key=lambda its: its.first))


def _changes(static: StaticTable) -> set[int]:
    """0, and every token count from which on a table has another config."""
    indices = static.indices
    later = (place for place in range(1, len(indices)) if indices[place] != indices[place - 1])
    return {0, *(static.span(place)[0] for place in later)}


def _alone(firsts: Iterable[int], static: StaticTable, why: str) -> "tuple[Shortlist, ...]":
    """One config of a table for each span."""
    at = static.index
    return tuple(Shortlist(first, max(first, 1), (at(first),), at(first), None, None, why) for first in firsts)


def _table(policy: Policy, plan: Plan | None) -> StaticTable:
    """The static table in the policy's own numbering."""
    if isinstance(policy, Static):
        return policy.table
    assert plan is not None  # without one a dispatcher's policy is static
    return plan.static


def capturing() -> bool:
    """Whether the current stream is under CUDA graph capture."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
