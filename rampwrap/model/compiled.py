"""The default model's choice in C (`_score.c`), bit for bit that of numpy, where the optional extension was built."""

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.model.features import Tables

try:
    score: Any = importlib.import_module("rampwrap.model._score")
    "The extension; None where there is none, and numpy serves."
    if "outside" not in (score.choose.__text_signature__ or ""):
        score = None  # built from an older source
except ImportError:
    score = None

LAYOUT = 1
"Of the packed bytes, as in _score.c."
_MOST_WEIGHT = 2.0**-8
"Of all of a config's weights: they are multiples of 2**-40, so products with integers up to 2**20 add up exactly."
_MAX_CTAS = 2.0**20
"Per M block: times 2**40 slots it fits an int64."


def pack(tables: Tables, span: IntArray, margins: tuple[tuple[int, float], ...]) -> bytes:
    """What the extension reads of a model.

    Args:
        tables: of the model.
        span: int64 [C, 2], least and most slots of each config.
        margins: (slots, margin), one or more, ascending.

    Returns:
        Empty where the extension could not promise numpy's bits; then numpy serves.
    """
    cuts, support, slots = tables.cuts, tables.points.shape[2], [at for at, _ in margins]
    configs = len(tables.cut_of)
    sound = (
        tables.points.size
        # A damaged plan is refused elsewhere, by name.
        and (tables.coef.shape, tables.weights.shape, span.shape) == ((5, configs), (configs, support), (configs, 2))
        and tables.points[:2].min() >= 0
        and all(np.isfinite(array).all() for array in (tables.points, tables.coef, [m for _, m in margins]))
        and np.abs(tables.weights).sum(axis=1).max() <= _MOST_WEIGHT
        and cuts.ctas_per_block.max() <= _MAX_CTAS
        and cuts.slots.min() >= 1
        and np.abs(span).max() <= 1 << 60
        and slots == sorted(set(slots))
    )
    if not sound:
        return b""
    heights, cut_height = np.unique(cuts.block_m, return_inverse=True)
    order = np.argsort(tables.cut_of, kind="stable")
    first = np.searchsorted(tables.cut_of[order], np.arange(len(cuts.block_m) + 1))
    sizes = (configs, len(cuts.block_m), support, len(heights), cuts.launches.shape[1], len(margins), 0)
    words: tuple[npt.NDArray[np.int64] | FloatArray, ...] = (
        np.array([LAYOUT, *sizes]),
        heights,
        cut_height.ravel(),
        cuts.slots,
        cuts.ctas_per_block,
        cuts.launches.astype(np.float64),
        tables.low.T,
        tables.high.T,
        tables.points[:2, 0],
        tables.points[2:].transpose(1, 0, 2),
        first,
        order,
        np.logical_not(tables.unfitted)[order].astype(np.int64),
        tables.coef.T[order],
        tables.weights[order],
        span,
        np.array(slots),
        np.array([margin for _, margin in margins]),
    )
    return b"".join(np.ascontiguousarray(array).tobytes() for array in words)


def choose(
    packed: bytes, array: Any, num_experts: int, fallback: int, choosing_us: float, outside: int | None = None
) -> int | None:
    """`Wave.choose` straight from expert ids; from a histogram where `num_experts` is 0.

    Returns:
        None where the extension is missing or the input unusual, out-of-range ids among it: numpy must serve.
    """
    if score is None:
        return None
    index: int | None = score.choose(
        packed, array, num_experts, fallback, choosing_us, fallback if outside is None else outside
    )
    return index


def predict(packed: bytes, counts: Any, size: int) -> FloatArray | None:
    """`Wave.predict` of one histogram for `size` configs, or None as in `choose`."""
    if score is None:
        return None
    out = np.empty(size)
    return out if score.predict(packed, counts, out) else None
