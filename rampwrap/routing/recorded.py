"""Readers for what engines record about routing.

| file | who writes it | holds |
|---|---|---|
| ``.pt`` with ``logical_count`` | SGLang, ``--expert-distribution-recorder-mode stat`` | counts [steps, layers, experts] |
| ``.pt`` with ``records`` | SGLang, modes ``per_token`` and ``per_pass`` | ids [layers, tokens, top_k] or counts [layers, experts] of each pass |
| ``.json`` with ``logical_count`` | SGLang, as given to ``--init-expert-location`` | counts [layers, experts] or [steps, layers, experts] |
| ``.npy``, ``.npz`` of ids | vLLM, ``CompletionOutput.routed_experts`` | ids [tokens, layers, top_k] of each request |
| ``.npy``, ``.npz``, ``.json`` of counts | anyone | counts or loads [..., layers, experts] |

Passes that recorded nothing, layers without experts and tokens that no expert saw leave no row, and `Account` says how
many there were. `rampwrap.routing.dumps` opens the files, `rampwrap.routing.passes` makes
histograms of them.
"""

import os
import pathlib
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import InputError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.routing.passes import one_part, read_passes, surely_one_part

MOST_TOKENS = 65_536
"Of one launch: SGLang splits larger batches here, vLLM at half of it. A histogram of more is a sum over steps."
SAYING = {
    "steps_without_tokens": "steps without tokens",
    "layers_without_experts": "layers without experts",
    "rows_without_tokens": "histograms without tokens",
    "padding_tokens": "padding tokens",
    "incomplete_tokens": "tokens with fewer experts than top_k",
    "other_arrays": "arrays of something else",
    "sums_over_steps": f"histograms of more than {MOST_TOKENS} tokens",
}
"What can be left out, and how it is said."


@attrs.frozen(eq=False)
class Recording:
    """Expert histograms of passes that an engine really ran.

    Attributes:
        path: the file.
        counts: int64 [rows, num_experts], no row empty.
        step, layer: int64 [rows], where each row stood in the file.
        top_k: experts a token where the file holds ids; 0 where it holds counts alone.
        steps: in the file, those without tokens included.
        left_out: how many of each kind of `SAYING` the file had, none of 0.
    """

    path: str
    counts: IntArray
    step: IntArray
    layer: IntArray
    top_k: int = 0
    steps: int = 0
    left_out: dict[str, int] = attrs.field(factory=dict)

    def num_tokens(self, top_k: int) -> IntArray:
        """Tokens of each row, int64 [rows].

        Raises:
            InputError: a row is not the histogram of any batch that visits `top_k` different experts a token.
        """
        if self.top_k not in (0, top_k):
            raise InputError(
                f"{self.path!r} records ids of {self.top_k} experts a token, which no batch with top_k={top_k} has; "
                f"give the top_k of the recorded model{', and ids of all ranks' if self.top_k < top_k else ''}."
            )
        slots, busiest = self.counts.sum(axis=1), self.counts.max(axis=1)
        wrong = np.flatnonzero((slots % top_k != 0) | (busiest * top_k > slots))
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"{self.path!r} records {slots[row]} slots, {busiest[row]} of them on one expert, in step "
                f"{self.step[row]}, layer {self.layer[row]}, which no batch with top_k={top_k} gives; {self._why(len(wrong))}."
            )
        out: IntArray = slots // top_k
        return out

    def _why(self, wrong: int) -> str:
        """What would explain that many rows that are no histogram with the top_k that was asked for."""
        slots, busiest = self.counts.sum(axis=1), self.counts.max(axis=1)
        most = int((slots // busiest).min())
        common = int(np.gcd.reduce(slots))
        fits = [top_k for top_k in range(2, most + 1) if common % top_k == 0]
        other = (
            f"give the top_k of the recorded model (all rows fit {' or '.join(map(str, fits[-3:]))})" if fits else ""
        )
        if 4 * wrong < len(slots):
            damaged = f"{wrong} of {len(slots)} histograms are so: give the file without their steps, which are cut off or damaged"
            return f"{damaged}, or {other}" if other else damaged
        if other:
            return other
        part = one_part(self.counts.max(axis=0))
        which = "" if part is None else f" (only experts {part[0]} to {part[1]} have any)"
        return (
            f"all rows fit top_k=1 alone, so they are part of their batches{which}: give counts of all ranks of expert "
            "parallelism together, with no slot left out"
        )

    def batches(self, top_k: int) -> tuple["Recording", IntArray]:
        """The rows that one launch may have had, and the tokens of each, int64 [rows].

        Raises:
            InputError: as `num_tokens`, or most rows are sums over many steps.
        """
        # Before anything else: loads that were summed up are often scaled or rounded too, and fit no top_k.
        launched = self.counts.sum(axis=1) <= MOST_TOKENS * top_k
        sums = int((~launched).sum())
        if 2 * sums > len(launched):
            raise InputError(
                f"{self.path!r} records up to {self.counts.sum(axis=1).max() // top_k} tokens a step, and no launch has more "
                f"than {MOST_TOKENS}: these are sums over many steps; use their popularities, --routing trace:{self.path}."
            )
        tokens = self.num_tokens(top_k)
        if not sums:
            return self, tokens
        kept = attrs.evolve(
            self,
            counts=self.counts[launched],
            step=self.step[launched],
            layer=self.layer[launched],
            left_out={**self.left_out, "sums_over_steps": sums},
        )
        return kept, tokens[launched]

    def pick(self, limit: int, top_k: int) -> IntArray:
        """At most `limit` rows that stand for all, ascending: spread over token counts (by powers of two), and within
        each over how much of the batch the busiest expert has."""
        tokens = self.num_tokens(top_k)
        if len(tokens) <= limit:
            return np.arange(len(tokens))
        share = self.counts.max(axis=1) / tokens
        groups = [np.flatnonzero(np.log2(tokens).astype(np.int64) == power) for power in range(64)]
        ordered = [group[np.lexsort((group, share[group]))] for group in groups if len(group)]
        taken: set[int] = set()
        quota = [0] * len(ordered)
        while sum(quota) < min(limit, len(tokens)):
            # The group with fewest rows so far that has one left; larger batches first, where a config costs most.
            open_ = [g for g in range(len(ordered)) if quota[g] < len(ordered[g])]
            quota[min(open_, key=lambda g: (quota[g], -g))] += 1
        for group, count in zip(ordered, quota, strict=True):
            places = np.rint((np.arange(count) + 0.5) * len(group) / max(count, 1) - 0.5).astype(np.int64)
            taken.update(group[places].tolist())
        return np.array(sorted(taken), dtype=np.int64)


@attrs.frozen
class Account:
    """What became of a file: for people as a sentence, for programs as JSON.

    Attributes:
        file: with the layer, as it was given.
        found: histograms that are whole.
        taken: how many of them stand for all.
        left_out: how many of each kind of `SAYING`.
        tokens: of the largest batch where the file holds counts of a single step, which may be a sum; else 0.
        part: first and last expert of the n-th part of all that alone has tokens, which may be one rank's; else None.
    """

    file: str
    found: int
    taken: int
    left_out: dict[str, int]
    tokens: int = 0
    part: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.taken} of {self.found} histograms taken"]
        if self.left_out:
            parts += ["left out: " + ", ".join(f"{SAYING[kind]} ({count})" for kind, count in self.left_out.items())]
        if self.tokens:
            parts += [
                f"it holds one step, read as one batch of {self.tokens} tokens; where that is a sum over steps, use "
                f"--routing trace:{self.file}"
            ]
        if self.part:
            parts += [
                f"only experts {self.part[0]} to {self.part[1]} have tokens; where that is one rank's part under expert "
                "parallelism, give the counts of all ranks together"
            ]
        return f"{self.file}: {'; '.join(parts)}."

    @property
    def worth_saying(self) -> bool:
        """Whether anything is left out, or may be other than it looks."""
        return bool(self.left_out or self.tokens or self.part or self.taken < self.found)


def account(path: str, num_experts: int, top_k: int | None = None, limit: int | None = None) -> Account:
    """Of ``FILE`` or ``FILE:LAYER``: what `recorded_workloads` takes of it, or with `top_k` None what a trace does.

    Raises:
        InputError: as `read_recording`.
    """
    file, layer = split_layer(path)
    if top_k is None:
        dump = read_passes(file, num_experts, layer)
        return Account(path, len(dump.rows), len(dump.rows), dump.left_out, part=surely_one_part(dump.rows))
    found, tokens = read_recording(file, num_experts, layer).batches(top_k)
    taken = len(tokens) if limit is None else min(limit, len(tokens))
    once = found.top_k == 0 and found.steps == 1
    largest = int(tokens.max()) if once else 0
    return Account(path, len(tokens), taken, found.left_out, largest, surely_one_part(found.counts))


def read_recording(path: str | os.PathLike[str], num_experts: int, layer: int | None = None) -> Recording:
    """Histograms of the passes in a file.

    Ids of several requests give a row for each request (its tokens in one batch, as in prefill) and a row for each
    position (the tokens of all requests there in one batch, as in decode).

    Args:
        path: one of the kinds above.
        num_experts: experts of a layer; arrays of other models in the same file are passed over.
        layer: only this one; None takes all.

    Raises:
        InputError: the file cannot be read, holds nothing for `num_experts` experts or nothing of `layer`, holds what
            one rank of several saw, ids that no engine writes, or counts that are no whole numbers of tokens.
    """
    name = os.fspath(path)
    dump = read_passes(name, num_experts, layer)
    counts = np.rint(dump.rows).astype(np.int64)
    if dump.rows.dtype.kind == "f" and (counts != dump.rows).any():
        odd = dump.rows[counts != dump.rows][0]
        raise InputError(f"{name!r} holds a count of {odd:g}; whole histograms need whole numbers of tokens.")
    return Recording(name, counts, dump.step, dump.layer, dump.top_k, dump.steps, dict(dump.left_out))


def read_trace(path: str, num_experts: int, layer: int | None = None) -> FloatArray:
    """Recorded expert loads: float64 [rows, num_experts], one row a layer of a step, as popularities.

    Args: as for `read_recording`; loads may be fractions here.

    Raises:
        InputError: as `read_recording`, but for fractions.
    """
    return read_passes(path, num_experts, layer).rows.astype(np.float64)


def split_layer(text: str) -> tuple[str, int | None]:
    """``FILE`` or ``FILE:LAYER``: the file, and the layer where one is named."""
    file, _, last = text.rpartition(":")
    named = file and last.isascii() and last.isdecimal() and len(last) < 10
    return (file, int(last)) if named and not pathlib.Path(text).exists() else (text, None)
