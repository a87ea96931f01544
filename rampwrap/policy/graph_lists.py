"""Shortlists: the few configs worth choosing from around each token count, on the host and inside a CUDA graph."""

import bisect
from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from rampwrap.errors import InputError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.base import CostModel
from rampwrap.model.in_graph import MAX_IN_GRAPH
from rampwrap.policy import reach
from rampwrap.policy.buckets import draw
from rampwrap.policy.policies import Bucket
from rampwrap.policy.static import StaticTable
from rampwrap.schema import LARGEST, between

FEW_SLOTS = 4
"""With this many experts a slot kernels skip the alignment, so nothing is chosen anew at each step. Which config serves is
chosen over skews all the same: the one tuned under uniform routing is up to 19 % slower at 2 to 4 tokens (three tables)."""

SINGLE, CHOICE = "single", "graph"
"How a shortlist of one runs, and one of several."
WORTH_BASE = 0.003
"Least relative gain, expected over skews, for another config than the static table's to serve where none is chosen."
WORTH_CHOOSING = 0.01
"""Least expected gain of choosing on top of its cost. A predicted gain is the luckiest of many: on held-out rows of six
measured tables lists admitted at 0 lost up to 1.4 % against the base alone where they gained nothing, at 1 % or more
almost none did, and next to no gain was given up."""
# Microseconds that so many candidates cost over one config in a graph: OLMoE and Qwen3-30B, 8 to 512 tokens, on an H200
# (benchmarks/README.md), the larger of two runs. All in one launch cost 12, a conditional node 10.
COSTS: Mapping[int, float] = {1: 0.0, 2: 6.6, 3: 7.4, 4: 9.7}
_microseconds = attrs.validators.optional(between(0, 1e12, InputError, whole=False))


@attrs.frozen
class Shortlist:
    """What batches of some token counts choose from inside a CUDA graph.

    Attributes:
        first: the least token count that it serves, up to the next one's first.
        num_tokens: of the plan's bucket that it belongs to.
        candidates: indices of the plan's configs, ascending, the static one among them; one means nothing to choose.
        static: index of the config that serves without a clear gain: the one with the least geometric mean of predicted
            times over drawn routings, the static table's where no other is clearly better.
        expected_us: mean predicted time over drawn routings, the cost of choosing included; None without a prediction.
        static_us: the same for `static` alone.
        why: in one sentence.
    """

    first: int = attrs.field(validator=between(0, LARGEST, InputError))
    num_tokens: int = attrs.field(validator=between(0, LARGEST, InputError))
    candidates: tuple[int, ...]
    static: int
    expected_us: float | None = attrs.field(validator=_microseconds)
    static_us: float | None = attrs.field(validator=_microseconds)
    why: str

    def __attrs_post_init__(self) -> None:
        few = list(self.candidates)
        if self.static not in few or len(few) > MAX_IN_GRAPH or few != sorted(set(few)):
            raise InputError(
                f"a shortlist has candidates {few}; give 1 to {MAX_IN_GRAPH}, ascending, with {self.static}."
            )

    @property
    def mode(self) -> str:
        """`CHOICE` where the GPU chooses, `SINGLE` where one config serves."""
        return CHOICE if len(self.candidates) > 1 else SINGLE

    @property
    def fallback(self) -> int:
        """Place of the static config among the candidates."""
        return self.candidates.index(self.static)


@attrs.frozen
class Span:
    """Token counts that share a bucket and a static config."""

    first: int
    last: int
    num_tokens: int
    "Of the bucket."
    static: int
    pool: tuple[int, ...]
    "Configs besides the static one that may be taken; none where only static may serve."
    reason: str
    "Why one config has to serve, whatever the routing; empty where steps may choose."


def token_spans(shape: MoEShape, static: StaticTable, buckets: Sequence[Bucket]) -> tuple[Span, ...]:
    """All token counts from 0, cut wherever the bucket or the static config changes."""
    if not buckets:
        firsts = sorted({0, *(static.span(place)[0] for place in range(len(static.token_counts)))})
        lasts = [*(first - 1 for first in firsts[1:]), 1 << 62]
        return tuple(
            Span(first, last, first, static.index(first), (), "the plan has no buckets")
            for first, last in zip(firsts, lasts, strict=True)
        )
    tokens = tuple(bucket.num_tokens for bucket in buckets)
    near = StaticTable("buckets", tokens, tuple(range(len(tokens))))
    few = shape.num_experts // (FEW_SLOTS * shape.top_k)
    low, high = reach.span(tokens)
    edges = {0, low, high + 1, few + 1}
    edges |= {near.span(place)[0] for place in range(len(tokens))}
    edges |= {static.span(place)[0] for place in range(len(static.token_counts))}
    spans = []
    ordered = sorted(edges)
    for first, last in zip(ordered, [*(edge - 1 for edge in ordered[1:]), 1 << 62], strict=True):
        bucket, chosen = buckets[near.index(first)], static.index(first)
        reason = ""
        if first <= few:
            reason = "so few slots rarely share an expert"
        elif not low <= first <= high:
            reason = f"{low} to {high} tokens are within reach of what was profiled"
        # Every static config that serves inside the bucket is worth a look, not only the one of this span.
        others = sorted(static.used(*near.span(near.index(first))).union(bucket.shortlist) - {chosen})
        pool = tuple(others) if low <= first <= high else ()
        spans.append(Span(first, last, bucket.num_tokens, chosen, pool, reason))
    return tuple(spans)


def in_graph(
    model: CostModel,
    shape: MoEShape,
    span: Span,
    costs: Mapping[int, float] = COSTS,
    max_candidates: int = MAX_IN_GRAPH,
) -> Shortlist:
    """The one to four configs with the least expected time over drawn routings, the cost of choosing included.

    The base is the single config with the least geometric mean of predicted times: it costs nothing, and over the skews
    of serving it is ahead of a table tuned under uniform routing by 0.7-2.2 % on average (nine measured tables, up to
    512 tokens; the arithmetic mean, in which a skew that leaves few experts active counts little, gave 0.7-2.1 %, on no
    table more). Greedy from there; each list is judged by what its own guarded choice would run, so a candidate that
    the guard never lets win adds cost and no gain.

    Args:
        model: of all configs that the span names.
        shape: the layer, for drawing routings.
        span: the token counts to serve.
        costs: microseconds by number of candidates; numbers that are missing are not used.
        max_candidates: at most `MAX_IN_GRAPH`.
    """
    table = static = span.static
    if not span.pool:
        why = span.reason or "the plan has no other config for these token counts"
        return Shortlist(span.first, span.num_tokens, (static,), static, None, None, why)
    counts = draw(shape, sorted({span.first, min(span.last, span.num_tokens * 3 // 2)}))
    counts = counts[counts.any(axis=1)]
    predicted = model.predict(counts)
    # Nothing is compared with a time of 0, which a fit may give far below what was measured.
    positive = np.asarray((predicted > 0).all(axis=0))
    if not len(counts) or not positive[table] or not np.isfinite(predicted[:, table]).all():
        why = "the static config has no predicted time"
        return Shortlist(span.first, span.num_tokens, (table,), table, None, None, why)
    means = predicted.mean(axis=0)
    typical = np.exp(np.log(np.maximum(predicted, np.finfo(np.float64).tiny)).mean(axis=0))
    every = [table, *(index for index in span.pool if positive[index])]
    base = min(every, key=lambda index: (typical[index], index))
    if typical[table] > (1 + WORTH_BASE) * typical[base]:
        static = base
    static_us = float(means[static])
    best: tuple[tuple[int, ...], float] = ((static,), static_us)
    taken: tuple[int, ...] = (static,)
    pool, steps = [index for index in every if index != static], []
    while pool and not span.reason and len(taken) < min(max_candidates, MAX_IN_GRAPH):
        found = [_reached(model, counts, predicted, tuple(sorted((*taken, extra))), static) for extra in pool]
        place = int(np.argmin(found))
        taken = tuple(sorted((*taken, pool.pop(place))))
        steps.append((taken, found[place]))
    for candidates, reached in steps:
        us = reached + costs.get(len(candidates), np.inf)
        if us < best[1] and (1 + WORTH_CHOOSING) * us < static_us:
            best = (candidates, us)
    if span.reason:
        why = span.reason
    elif len(best[0]) == 1:
        most = max((0.0, *(1 - reached / static_us for _, reached in steps)))
        why = f"choosing costs more than the {most:.1%} that it is predicted to gain"
    else:
        gain, cost = static_us / best[1] - 1, costs[len(best[0])]
        why = f"{len(best[0])} candidates are predicted {gain:.1%} faster than one, {cost:.1f} us of choosing included"
    if static != table:
        gain = typical[table] / typical[static] - 1
        why += f"; over skews config {static} is {gain:.1%} faster than the static table's {table}"
    expected = round(best[1], 3), round(static_us, 3)
    return Shortlist(span.first, span.num_tokens, best[0], static, *expected, why)


def all_in_graph(
    model: CostModel, shape: MoEShape, static: StaticTable, buckets: Sequence[Bucket], costs: Mapping[int, float]
) -> tuple[Shortlist, ...]:
    """`in_graph` of every span: what a plan's file holds. No `costs`: one config each, for a kernel that has no other."""
    return tuple(in_graph(model, shape, span, costs) for span in token_spans(shape, static, buckets))


def serving(lists: Sequence[Shortlist], num_tokens: int) -> int:
    """Which of some shortlists, ascending by `first`, serves a token count."""
    return max(0, bisect.bisect_right(lists, num_tokens, key=lambda its: its.first) - 1)


def _reached(
    model: CostModel, counts: IntArray, predicted: FloatArray, candidates: tuple[int, ...], static: int
) -> float:
    """Mean predicted time of what the guarded choice among candidates would run."""
    few, fallback = model.take(candidates), candidates.index(static)
    chosen = [candidates[few.choose(row, fallback)] for row in counts]
    return float(predicted[np.arange(len(counts)), chosen].mean())
