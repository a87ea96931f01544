"""Buckets: the few configs worth choosing from around each token count."""

import functools
import itertools
from collections.abc import Iterable

import numpy as np

from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.base import CostModel
from rampwrap.policy.policies import Bucket
from rampwrap.policy.static import StaticTable
from rampwrap.routing.counts import first_counts
from rampwrap.routing.workloads import Routing

MAX_CANDIDATES = 8


# A further candidate must lower the mean predicted time of the bucket by this much.
WORTH = 0.0002


# Routings that a bucket is prepared for: none to extreme skew. Drawn, not profiled: the model fills in the rest.
ROUTINGS = (
    *("uniform", "lognormal:0.7", "lognormal:1.4", "zipf:0.8", "zipf:1.2", "zipf:1.6"),
    *("dirichlet:1", "dirichlet:0.3", "dirichlet:0.1", "hot:1", "hot:2"),
)


DRAWS = 2


def bucket_tokens(token_counts: Iterable[int]) -> tuple[int, ...]:
    """Profiled token counts and the middle between neighbours: half-octave steps where octaves were profiled."""
    known = sorted({int(tokens) for tokens in token_counts})
    return tuple(sorted({*known, *((a + b) // 2 for a, b in itertools.pairwise(known))}))


def make_buckets(
    model: CostModel,
    shape: MoEShape,
    static: StaticTable,
    token_counts: Iterable[int],
    max_candidates: int = MAX_CANDIDATES,
    worth: float = WORTH,
) -> tuple[Bucket, ...]:
    """For each bucket of token counts, the configs that together keep the model's best predicted time.

    Shortlists judged by the profiled workloads alone (five routings a token count) lose a tenth of the headroom on
    others; the model's predictions for drawn routings lose next to nothing, since it is the model that chooses.
    Greedy: starts with the static config and adds the config that lowers the mean over routings of
    (predicted time of the shortlist / predicted best) the most, until none is worth it.

    Args:
        model: fitted to all configs.
        shape: the layer, for drawing routings.
        static: the baseline; its config is always a candidate.
        token_counts: profiled token counts.
        max_candidates: candidates of one bucket, the static one included; the config that is best on average over
            routings, which a graph may hold alone, comes on top.
        worth: least relative gain of a further candidate.
    """
    tokens = bucket_tokens(token_counts)
    near = StaticTable("buckets", tokens, tuple(range(len(tokens))))
    buckets = []
    for position, middle in enumerate(tokens):
        low, high = near.span(position)
        edges = sorted({max(1, low), middle, min(high, middle * 3 // 2)})
        predicted = model.predict(draw(shape, edges))
        buckets.append(_shortlist(predicted, middle, static.index(middle), max_candidates, worth))
    return tuple(buckets)


def draw(shape: MoEShape, token_counts: Iterable[int]) -> IntArray:
    """Histograms of all `ROUTINGS` at some token counts: int64 [W, num_local_experts], the same at every call, not to be written.

    They take nearly all of the time that a plan is made in, 4 s where 13 token counts were profiled, and are the same for all
    kernels of a layer.
    """
    return _draw(shape, tuple(token_counts))


@functools.lru_cache(maxsize=256)
def _draw(shape: MoEShape, token_counts: tuple[int, ...]) -> IntArray:
    rng = np.random.default_rng(0)
    rows = []
    for tokens in token_counts:
        for name in ROUTINGS:
            routing = Routing.parse(name)
            if routing.kind == "hot" and int(routing.value) > shape.num_experts:
                continue
            for _ in range(DRAWS):
                ids = routing.sample(tokens, shape.num_experts, shape.top_k, rng)
                rows.append(first_counts(ids, shape))
    # A rank of few experts may get no token of a small batch, of which there is nothing to learn.
    drawn = np.array([row for row in rows if row.any()] or rows)
    drawn.setflags(write=False)
    return drawn


def _shortlist(predicted: FloatArray, tokens: int, first: int, most: int, worth: float) -> Bucket:
    # A time of 0, of a rank without tokens or far below what was measured, is nothing to compare with.
    floor = predicted.min(axis=1, keepdims=True)
    known = floor[:, 0] > 0
    if not known.any():
        return Bucket(tokens, (first,), "no routing has a predicted time")
    relative = predicted[known] / floor[known]
    # A static config that could not be fitted must not make every other one look infinitely better.
    best = np.where(np.isfinite(relative[:, first]), relative[:, first], 2.0)
    shortlist, start = [first], float(best.mean())
    while len(shortlist) < most:
        reached = np.minimum(best[:, None], relative).mean(axis=0)
        candidate = int(np.argmin(reached))
        if reached[candidate] > best.mean() - worth:
            break
        shortlist.append(candidate)
        best = np.minimum(best, relative[:, candidate])
    why = f"static is predicted {start - 1:.2%} above the best of all configs, this shortlist {best.mean() - 1:.2%}"
    # For graphs that hold one config: the best on average need not be the best anywhere.
    alone = int(np.argmin(np.log(np.where(np.isfinite(relative), relative, np.inf)).mean(axis=0)))
    return Bucket(tokens, tuple(sorted({*shortlist, alone})), why)
