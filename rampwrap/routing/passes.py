"""From the blocks of a file to histograms of passes: copies become experts, padding is left out and counted."""

import functools
from collections.abc import Sequence

import attrs
import numpy as np

from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.routing.dumps import MOST_LOAD, Array, Block, file_key, read_blocks
from rampwrap.routing.slots import Slots, read_slots

CERTAIN = 32
"Visits that all fall to one of n parts of the experts by chance once in 2**32 times are one rank's."


@attrs.frozen(eq=False)
class Passes:
    """What a file holds: rows int64 or float64 [rows, num_experts], none empty, and the rest as in `Recording`."""

    rows: Array
    step: IntArray
    layer: IntArray
    top_k: int
    steps: int
    left_out: dict[str, int]


def one_part(used: Array) -> tuple[int, int] | None:
    """The smallest of n equal parts of the experts, n >= 2, that holds all that are used: its first and last expert."""
    where, experts = np.flatnonzero(used), used.size
    for size in range(1, experts // 2 + 1):
        if experts % size == 0 and len(where) and where[0] // size == where[-1] // size:
            first = int(where[0]) // size * size
            return first, first + size - 1
    return None


def surely_one_part(rows: Array) -> tuple[int, int] | None:
    """`one_part` of what all rows [rows, experts] use, where so many visits do not fall there by chance."""
    seen = rows.sum(axis=0, dtype=np.float64)
    part = one_part(seen)
    if part is None or seen.sum() * np.log2(len(seen) / (part[1] - part[0] + 1)) < CERTAIN:
        return None
    return part


def read_passes(path: str, num_experts: int, layer: int | None) -> Passes:
    """The histograms of a file, of all layers or of one.

    Raises:
        InputError: the file cannot be read, holds nothing for `num_experts` experts or nothing of `layer`, or what it
            holds is damaged, impossible or one rank's part.
    """
    return _read(path, num_experts, layer, file_key(path))


@functools.lru_cache(maxsize=8)
def _read(path: str, num_experts: int, layer: int | None, key: tuple[int, ...]) -> Passes:
    """Kept for as long as the file does not change: a profile asks once for every workload."""
    blocks, others = [], 0
    odd: tuple[Block, Slots] | None = None
    for block in read_blocks(path, num_experts):
        if isinstance(block, str):
            others += 1
            continue
        slots = read_slots(block.values, num_experts, block.physical) if block.ids else None
        if slots is not None and slots.odd:
            if 2 * slots.odd <= (slots.valid > 0).sum() or not block.request:
                raise InputError(
                    f"trace {path!r} holds ids that no engine writes: {_odd(block, slots)}; record it anew."
                )
            # More odd tokens than others: no ids of this model.
            others, odd = others + 1, odd or (block, slots)
            continue
        blocks.append((block, slots))
    if not blocks:
        why = "" if odd is None else f" (read as ids, {_odd(*odd)})"
        raise InputError(
            f"trace {path!r} holds no loads of {num_experts} experts{why}; give counts whose last axis is the experts, or "
            "ids [tokens, layers, top_k]."
        )
    _check_parts(path, [block for block, slots in blocks if slots is None and block.rank])
    top_k = max((int(slots.valid.max(initial=0)) for _, slots in blocks if slots is not None), default=0)
    found = _Rows(num_experts, layer)
    requests: list[Slots] = []
    for block, slots in blocks:
        if slots is None:
            found.add(_checked(path, block, num_experts))
            continue
        whole = found.add_ids(slots, top_k)
        requests += [whole] if block.request else []
    if 2 * found.incomplete > found.complete + found.incomplete:
        raise InputError(
            f"trace {path!r} holds {found.incomplete} tokens with fewer experts than the {top_k} of others: it is one "
            "rank's part under expert parallelism, or cut off; give ids with all experts of a token."
        )
    for batch in _positions(requests):
        found.add(batch.counts(num_experts)[None], derived=True)
    return found.dump(path, top_k, others)


def _odd(block: Block, slots: Slots) -> str:
    return f"{slots.why}{' in ' + block.where if block.where else ''} ({slots.odd} tokens like it)"


def _check_parts(path: str, blocks: Sequence[Block]) -> None:
    """Refuses counts of one rank of several: they stand on its own physical experts alone."""
    if not blocks or len({block.values.shape[2] for block in blocks}) > 1:
        return
    part = surely_one_part(np.concatenate([block.values.sum(axis=0, dtype=np.float64) for block in blocks]))
    if part is None:
        return
    raise InputError(
        f"trace {path!r} records visits to experts {part[0]} to {part[1]} of {blocks[0].values.shape[2]} alone: it is one rank's part under "
        "expert parallelism; record with SGLang's mode stat, which adds up all ranks."
    )


def _checked(path: str, block: Block, num_experts: int) -> Array:
    """Counts [steps, layers, num_experts] of a block of counts, finite, not negative and exact."""
    values = block.values
    with np.errstate(over="ignore"):  # half precision holds nothing that large
        good = np.isfinite(values) & (values >= 0) & (values <= MOST_LOAD)
    if not good.all():
        bad = values[~good][0]
        raise InputError(f"trace {path!r} holds a load of {bad}; a count is finite, not negative and at most 2**40.")
    if block.physical is None:
        return values
    logical = np.zeros((*values.shape[:2], num_experts), dtype=np.int64)
    for layer, experts in enumerate(block.physical):
        np.add.at(logical[:, layer].T, experts, values[:, layer].T.astype(np.int64))
    return logical


def _positions(requests: Sequence[Slots]) -> list[Slots]:
    """Positions that at least two requests have: what a decode step of them would route."""
    alike = [its for its in requests if its.ids.shape[::2] == requests[0].ids.shape[::2]]
    shared = sorted((its.ids.shape[1] for its in alike), reverse=True)[1] if len(alike) > 1 else 0
    found = []
    for position in range(shared):
        here = [its for its in alike if its.ids.shape[1] > position]
        ids = np.stack([its.ids[:, position] for its in here], axis=1)
        found.append(Slots(ids, (ids >= 0).sum(axis=2), 0, ""))
    return found


class _Rows:
    """Histograms as they are found, and what is left out on the way; `layer` keeps one alone."""

    def __init__(self, num_experts: int, layer: int | None) -> None:
        self.num_experts, self.layer = num_experts, layer
        self.complete = self.incomplete = self.padding = self.steps = 0
        self._rows: list[Array] = []
        self._places: list[IntArray] = []
        self._all: list[IntArray] = []

    def add_ids(self, slots: Slots, top_k: int) -> Slots:
        """Adds one batch; returns it without the tokens that are not whole."""
        whole = slots.whole(top_k)
        part = slice(None) if self.layer is None else slice(self.layer, self.layer + 1)
        valid, complete = slots.valid[part], whole.valid[part] > 0
        self.incomplete += int((valid > 0).sum() - complete.sum())
        self.complete += int(complete.sum())
        # A layer in which no token has experts is no layer of experts: its tokens are no padding.
        self.padding += int((valid[valid.any(axis=1)] == 0).sum())
        self.add(whole.counts(self.num_experts)[None])
        return whole

    def add(self, counts: Array, derived: bool = False) -> None:
        """Adds counts [steps, layers, num_experts]; `derived` ones stand for rows that are counted already."""
        numbers = np.arange(counts.shape[1])
        numbers = numbers if self.layer is None else numbers[numbers == self.layer]
        counts = counts[:, numbers]
        filled = counts.any(axis=2)
        step, layer = (place.ravel() for place in np.indices(filled.shape))
        places = np.stack([step + self.steps, numbers[layer], filled.ravel()], axis=1)
        self.steps += len(counts)
        self._rows.append(counts[filled])
        self._places.append(places[filled.ravel()])
        if not derived:
            self._all.append(places)

    def dump(self, path: str, top_k: int, others: int) -> Passes:
        """All of them together."""
        rows, places, every = (np.concatenate(part) for part in (self._rows, self._places, self._all))
        if not len(rows):
            if self.layer is not None:
                raise InputError(
                    f"trace {path!r} holds nothing of layer {self.layer} for {self.num_experts} experts; name a layer it has."
                )
            raise InputError(
                f"trace {path!r} holds no loads of {self.num_experts} experts that are not 0; record while requests run."
            )
        filled = every[:, 2] > 0
        ran, routed = (np.unique(every[filled, column]) for column in (0, 1))
        idle = ~np.isin(every[:, 0], ran)
        dense = ~np.isin(every[:, 1], routed)
        left_out = {
            "steps_without_tokens": len(np.unique(every[idle, 0])),
            "layers_without_experts": len(np.unique(every[dense, 1])),
            "rows_without_tokens": int((~filled & ~idle & ~dense).sum()),
            "padding_tokens": self.padding,
            "incomplete_tokens": self.incomplete,
            "other_arrays": others,
        }
        whole = rows if rows.dtype.kind == "f" else rows.astype(np.int64)
        return Passes(
            whole.astype(np.float64) if whole.dtype.kind == "f" else whole,
            places[:, 0],
            places[:, 1],
            top_k,
            self.steps,
            {kind: count for kind, count in left_out.items() if count},
        )
