"""The expert histogram: how many tokens of a batch visit each expert."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """A numpy view of a numpy array, a list or a torch tensor; a CUDA tensor is copied, which waits for the GPU."""
    if hasattr(array, "detach"):
        array = array.numpy(force=True)
    return np.asarray(array)


def expert_counts(topk_ids: Any, num_experts: int, expert_map: Any = None) -> IntArray:
    """The histogram: how many tokens each local expert receives.

    Args:
        topk_ids: integers [num_tokens, top_k], ids of the experts each token visits, or padding (see above); numpy,
            torch or nested lists.
        num_experts: number of experts over all ranks.
        expert_map: integers [num_experts], local id of each expert or -1 for an expert of another rank;
            None when all experts are local.

    Returns:
        int64 [num_local_experts].

    Raises:
        InputError: an id lies outside -1 .. num_experts, ids are not integers, or the map does not give each local
            expert once.
    """
    ids = to_numpy(topk_ids).reshape(-1)
    if ids.size == 0:
        ids = ids.astype(np.int64)
    elif ids.dtype.kind not in "iu":
        raise InputError(f"topk_ids has dtype {ids.dtype}; give integers.")
    # Looked at first: bincount allocates as many bins as the largest id says.
    if ids.size and not (ids.min() >= 0 and ids.max() < num_experts):
        ids = _without_padding(ids, num_experts)
    counts = np.bincount(ids.astype(np.int64, copy=False), minlength=num_experts)
    return counts if expert_map is None else Placement.of_map(to_numpy(expert_map), num_experts).counts(counts)


def first_counts(topk_ids: Any, shape: MoEShape) -> IntArray:
    """The histogram of a rank that holds the first experts of a layer, as it is profiled; arguments are `expert_counts`'s."""
    return Placement.first(shape).counts(expert_counts(topk_ids, shape.num_experts))


def _without_padding(ids: npt.NDArray[Any], num_experts: int) -> npt.NDArray[Any]:
    inside = (ids >= 0) & (ids < num_experts)
    bad = ids[np.logical_not(inside | (ids == -1) | (ids == num_experts))]
    if bad.size:
        raise InputError(
            f"topk_ids holds {int(bad[0])}; give ids from 0 to {num_experts - 1}, and -1 or {num_experts} for padding."
        )
    return ids[inside]


def check_counts(counts: Any, num_experts: int, num_slots: int | None = None) -> IntArray:
    """A histogram from outside, checked.

    Args:
        counts: integers [num_experts].
        num_experts: length the histogram must have.
        num_slots: tokens x top_k that it must sum to; None where some experts live on other ranks.

    Returns:
        int64 [num_experts].

    Raises:
        InputError: wrong length, a fraction, a negative count or another sum.
    """
    raw = to_numpy(counts)
    if raw.dtype.kind not in "iufb":
        raise InputError(f"expert_counts has dtype {raw.dtype}; give integers.")
    if raw.shape != (num_experts,):
        raise InputError(f"expert_counts has shape {raw.shape}; give one count for each of {num_experts} experts.")
    with np.errstate(invalid="ignore"):  # what is not finite is told apart below
        out = raw.astype(np.int64)
    if not np.array_equal(out, raw):
        raise InputError(f"expert_counts holds {raw[out != raw][0]}; give whole numbers of tokens.")
    if out.size and out.min() < 0:
        raise InputError(f"expert_counts holds {int(out.min())}; a count cannot be negative.")
    if num_slots is not None and out.sum() != num_slots:
        raise InputError(
            f"expert_counts sums to {int(out.sum())} instead of tokens x top_k = {num_slots}; recount topk_ids."
        )
    return out
