"""The wave model's choice in C (`_score.c`), bit for bit that of numpy, where the optional extension was built.

`packed` is `Packed.to_bytes()`, or empty where numpy must serve.
"""

import importlib
from typing import Any

import numpy as np

from rampwrap.kernel.grid import FloatArray

try:
    score: Any = importlib.import_module("rampwrap.model._score")
    "The extension; None where there is none, and numpy serves."
    if "layout" not in (score.choose.__text_signature__ or ""):
        score = None  # built from an older source
except ImportError:
    score = None


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
