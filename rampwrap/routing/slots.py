"""Recorded expert ids, slot by slot: which hold an expert, which are padding, and which no engine can have written."""

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.kernel.grid import IntArray

CHUNK = 1 << 22
"Values that are looked at together: 32 MiB as int64."
BY_CHANCE = 0.05
"Tokens that may look unrouted by chance, with one expert a token; where more would, none is taken for it."


@attrs.frozen(eq=False)
class Slots:
    """The ids of one batch, cleaned.

    Attributes:
        ids: int16 or int32 [layers, tokens, width], -1 where a slot holds no expert.
        valid: int64 [layers, tokens], slots that hold one.
        odd: (layer, token) pairs that no engine can have written.
        why: what is wrong with the first of them, "" where none is.
    """

    ids: npt.NDArray[np.integer]
    valid: IntArray
    odd: int
    why: str

    def whole(self, top_k: int) -> "Slots":
        """Without the tokens that hold fewer experts than `top_k`."""
        part = self.valid < top_k
        return attrs.evolve(
            self, ids=np.where(part[..., None], self.ids.dtype.type(-1), self.ids), valid=np.where(part, 0, self.valid)
        )

    def counts(self, num_experts: int) -> IntArray:
        """Histograms, int64 [layers, num_experts]."""
        layers = len(self.ids)
        offset = np.arange(layers, dtype=np.int64)[:, None, None] * num_experts
        found = (self.ids + offset)[self.ids >= 0]
        return np.bincount(found, minlength=layers * num_experts).reshape(layers, num_experts)


def read_slots(ids: npt.NDArray[np.integer], num_experts: int, physical: IntArray | None = None) -> Slots:
    """Ids [layers, tokens, width] as an engine keeps them.

    -1, also as an unsigned number, and the number of experts are padding wherever they stand. A token whose slots all
    hold 0, or all the largest number of the dtype, was never routed: engines clear their buffers so, and no token
    visits an expert twice. With one expert a token, zeros are told from visits to expert 0 where every layer has one
    and that is no matter of chance.

    Args:
        physical: int64 [layers, physical experts], the expert that each copy is of; ids then count copies.
    """
    limit = num_experts if physical is None else physical.shape[1]
    layers, tokens, width = ids.shape
    out = np.empty(ids.shape, dtype=np.int16 if num_experts < 1 << 15 else np.int32)
    odd, why = 0, ""
    step = max(1, CHUNK // max(tokens * width, 1))
    for first in range(0, layers, step):
        part = slice(first, first + step)
        copies = None if physical is None else physical[part]
        out[part], wrong, said = _clean(ids[part], limit, copies, first)
        odd, why = odd + wrong, why or said
    valid = (out >= 0).sum(axis=2)
    if width and valid.max(initial=0) == 1 and layers > 1:
        unrouted = (out <= 0).all(axis=(0, 2))
        chance = (out[:, ~unrouted] == 0).any(axis=2).mean(axis=1).prod() * tokens if not unrouted.all() else 0.0
        if chance < BY_CHANCE:
            out[:, unrouted] = -1
            valid[:, unrouted] = 0
    return Slots(out, valid, odd, why)


def _clean(
    ids: npt.NDArray[np.integer], limit: int, physical: IntArray | None, first: int
) -> tuple[IntArray, int, str]:
    """Some layers: their slots, how many tokens are odd, and what is wrong with the first."""
    largest = np.iinfo(ids.dtype).max
    padding = ids == limit
    if ids.dtype.kind == "i":
        padding |= ids == -1
    elif largest > limit:
        padding |= ids == largest
    outside = ~padding & ((ids < 0) | (ids >= limit))
    here = np.where(padding | outside, -1, ids.astype(np.int64))
    if physical is not None:
        layers = np.arange(len(ids))[:, None, None]
        here = np.where(here >= 0, physical[layers, here], -1)
    ordered = np.sort(here, axis=2)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    used = ~padding
    filled = ((ids == 0) | ~used).all(axis=2) | ((ids == largest) | ~used).all(axis=2)
    never = filled & (used.sum(axis=2) > 1) & ~outside.any(axis=2)
    here[never] = -1
    twice[never] = False
    wrong = outside.any(axis=2) | twice.any(axis=2)
    if not wrong.any():
        return here, 0, ""
    layer, token = (int(place) for place in np.argwhere(wrong)[0])
    if outside[layer, token].any():
        value = int(ids[layer, token][outside[layer, token]][0])
        said = f"expert {value}, out of experts 0 to {limit - 1}"
    else:
        said = f"expert {int(ordered[layer, token, 1:][twice[layer, token]][0])} twice"
    return here, int(wrong.sum()), f"token {token} of layer {layer + first} visits {said}"
