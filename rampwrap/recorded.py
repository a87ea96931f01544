"""Readers for what engines record about routing.

| file | who writes it | holds |
|---|---|---|
| ``.pt`` with ``logical_count`` | SGLang, ``--expert-distribution-recorder-mode stat`` | counts [steps, layers, experts] |
| ``.pt`` with ``records`` | SGLang, modes ``per_token`` and ``per_pass`` | ids [layers, tokens, top_k] or counts [layers, experts] of each pass |
| ``.json`` with ``logical_count`` | SGLang, as given to ``--init-expert-location`` | counts [layers, experts] or [steps, layers, experts] |
| ``.npy``, ``.npz`` of ids | vLLM, ``CompletionOutput.routed_experts`` | ids [tokens, layers, top_k] of each request |
| ``.npy``, ``.npz``, ``.json`` of counts | anyone | counts or loads [..., layers, experts] |

Passes that recorded nothing, and layers without experts, leave no row. A ``.pt`` file is opened with
``weights_only=True``: it cannot run code.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.grid import FloatArray, IntArray

SUFFIXES = (".pt", ".json", ".npy", ".npz")
Array = npt.NDArray[Any]


@attrs.frozen(eq=False)
class Recording:
    """Expert histograms of passes that an engine really ran.

    Attributes:
        path: the file.
        counts: int64 [rows, num_experts], no row empty.
        step, layer: int64 [rows], where each row stood in the file.
    """

    path: str
    counts: IntArray
    step: IntArray
    layer: IntArray

    def num_tokens(self, top_k: int) -> IntArray:
        """Tokens of each row, int64 [rows].

        Raises:
            InputError: a row is not the histogram of any batch that visits `top_k` different experts a token.
        """
        slots, busiest = self.counts.sum(axis=1), self.counts.max(axis=1)
        wrong = np.flatnonzero((slots % top_k != 0) | (busiest * top_k > slots))
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"{self.path!r} records {slots[row]} slots, {busiest[row]} of them on one expert, in step "
                f"{self.step[row]}, layer {self.layer[row]}, which no batch with top_k={top_k} gives; give the top_k of "
                "the recorded model."
            )
        out: IntArray = slots // top_k
        return out

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


def read_recording(path: str | os.PathLike[str], num_experts: int, layer: int | None = None) -> Recording:
    """Histograms of the passes in a file.

    Ids of several requests give a row for each request (its tokens in one batch, as in prefill) and a row for each
    position (the tokens of all requests there in one batch, as in decode).

    Args:
        path: one of the kinds above.
        num_experts: experts of a layer; arrays of other models in the same file are passed over.
        layer: only this one; None takes all.

    Raises:
        InputError: the file cannot be read, holds nothing for `num_experts` experts or nothing of `layer`, or holds
            counts that are no whole numbers of tokens.
    """
    name = os.fspath(path)
    counts, steps, layers, at = [], [], [], 0
    for block in _blocks(name, num_experts):
        if block.dtype.kind == "f" and not np.array_equal(block, np.rint(block)):
            odd = block[block != np.rint(block)][0]
            raise InputError(f"{name!r} holds a count of {odd:g}; whole histograms need whole numbers of tokens.")
        found, chosen = _layers(block, layer)
        place = np.indices(found.shape[:2])
        counts.append(found.reshape(-1, num_experts).astype(np.int64))
        steps.append(place[0].ravel() + at)
        layers.append(chosen[place[1].ravel()])
        at += len(found)
    rows = [np.concatenate(part) if part else np.empty(0, dtype=np.int64) for part in (counts, steps, layers)]
    filled = np.flatnonzero(rows[0].any(axis=-1)) if rows[0].size else np.empty(0, dtype=np.int64)
    if not len(filled):
        raise InputError(_nothing(name, num_experts, layer))
    return Recording(name, *(part[filled] for part in rows))


def read_trace(path: str, num_experts: int, layer: int | None = None) -> FloatArray:
    """Recorded expert loads: float64 [rows, num_experts], one row a layer of a step, as popularities.

    Args: as for `read_recording`; loads may be fractions here.

    Raises:
        InputError: the file cannot be read, or holds no usable row.
    """
    rows = [_layers(block, layer)[0].reshape(-1, num_experts) for block in _blocks(path, num_experts)]
    every = np.concatenate(rows).astype(np.float64) if rows else np.empty((0, num_experts))
    loads: FloatArray = every[every.sum(axis=1) > 0]
    if not len(loads):
        raise InputError(_nothing(path, num_experts, layer))
    return loads


def split_layer(text: str) -> tuple[str, int | None]:
    """``FILE`` or ``FILE:LAYER``: the file, and the layer where one is named."""
    file, _, last = text.rpartition(":")
    return (file, int(last)) if file and last.isdecimal() and not pathlib.Path(text).exists() else (text, None)


def _nothing(path: str, num_experts: int, layer: int | None) -> str:
    if layer is not None:
        return f"trace {path!r} holds nothing of layer {layer} for {num_experts} experts; name a layer it has."
    return (
        f"trace {path!r} holds no loads of {num_experts} experts; give counts whose last axis is the experts, or ids "
        "[tokens, layers, top_k]."
    )


def _layers(block: Array, layer: int | None) -> tuple[Array, IntArray]:
    """Of a block [steps, layers, experts]: the part that was asked for, and the numbers of its layers."""
    numbers = np.arange(block.shape[1])
    keep = numbers if layer is None else numbers[numbers == layer]
    return block[:, keep], keep


def _blocks(path: str, num_experts: int) -> tuple[Array, ...]:
    """All histograms of a file, each block [steps, layers, num_experts], finite and not negative."""
    try:
        stat = pathlib.Path(path).stat()
    except (OSError, ValueError) as error:
        raise InputError(f"trace {path!r} cannot be read ({error}); check the path.") from error
    return _read_blocks(path, num_experts, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _read_blocks(path: str, num_experts: int, mtime_ns: int, size: int) -> tuple[Array, ...]:
    """Kept for as long as the file does not change: a profile asks once for every workload."""
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise InputError(f"trace {path!r} is of no known kind; give {', '.join(SUFFIXES)}.")
    try:
        blocks = tuple(_PARSERS[suffix](path, num_experts))
    except InputError:
        raise
    except Exception as error:  # torch.load and numpy raise whatever a damaged archive makes them stumble over
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"trace {path!r} cannot be read ({said}); give the file as the engine wrote it, or loads [rows, experts]."
        ) from error
    for block in blocks:
        if not np.isfinite(block).all() or block.min(initial=0) < 0:
            bad = block[~(np.isfinite(block) & (block >= 0))][0]
            raise InputError(f"trace {path!r} holds a load of {bad}; a count is finite and not negative.")
    return blocks


def _parse_torch(path: str, num_experts: int) -> Iterator[Array]:
    import torch

    raw = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(raw, dict) or not {"logical_count", "records"} & set(raw):
        found = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"trace {path!r} holds {found}; an expert-distribution dump has logical_count or records.")
    if "logical_count" in raw:
        yield from _of_counts(path, raw["logical_count"], num_experts)
        return
    where = raw.get("last_physical_to_logical_map")
    physical = None if where is None else np.asarray(where)
    if physical is not None and (physical.ndim != 2 or physical.min() < 0 or physical.max() >= num_experts):
        raise InputError(
            f"trace {path!r} maps physical experts to {physical.max(initial=0) + 1} logical ones; the layer has {num_experts}."
        )
    for record in raw["records"]:
        if "topk_ids_of_layer" in record:
            yield _of_ids(path, np.asarray(record["topk_ids_of_layer"]), num_experts, physical)[None]
        else:
            counts = np.asarray(record["global_physical_count"])
            logical = np.zeros((len(counts), num_experts), dtype=np.int64)
            np.add.at(logical, (np.arange(len(counts))[:, None], _logical(path, counts, physical)), counts)
            yield logical[None]


def _logical(path: str, counts: Array, physical: Array | None) -> Array:
    """Which logical expert each column of counts [layers, physical experts] stands for."""
    if physical is None:
        return np.broadcast_to(np.arange(counts.shape[1]), counts.shape)
    if physical.shape != counts.shape:
        raise InputError(
            f"trace {path!r} maps experts {physical.shape} but counts {counts.shape}; it contradicts itself."
        )
    return physical


def _parse_json(path: str, num_experts: int) -> Iterator[Array]:
    raw = json.loads(pathlib.Path(path).read_text())
    if isinstance(raw, dict):
        if "logical_count" not in raw:
            raise InputError(f"trace {path!r} has no logical_count; give an expert-distribution dump or nested lists.")
        raw = raw["logical_count"]
    yield from _of_counts(path, raw, num_experts)


def _parse_numpy(path: str, num_experts: int) -> Iterator[Array]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        arrays = [loaded]
    else:
        with loaded:
            arrays = [loaded[key] for key in loaded.files]
    requests = []
    for array in arrays:
        if array.ndim and array.shape[-1] == num_experts and array.dtype.kind in "iuf":
            yield from _of_counts(path, array, num_experts)
        elif _is_ids(array, num_experts):
            requests.append(array.astype(np.int64))
    for ids in requests:
        yield _of_ids(path, ids.transpose(1, 0, 2), num_experts)[None]
    # Positions that at least two requests have: what a decode step of them would route.
    alike = [ids for ids in requests if ids.shape[1:] == requests[0].shape[1:]]
    shared = sorted((len(ids) for ids in alike), reverse=True)[1] if len(alike) > 1 else 0
    for position in range(shared):
        batch = np.stack([ids[position] for ids in alike if len(ids) > position], axis=1)
        yield _of_ids(path, batch, num_experts)[None]


_PARSERS = {".pt": _parse_torch, ".json": _parse_json, ".npy": _parse_numpy, ".npz": _parse_numpy}


def _of_counts(path: str, raw: Any, num_experts: int) -> Iterator[Array]:
    counts = np.asarray(raw)
    if counts.dtype.kind not in "iuf" or counts.ndim < 1 or counts.shape[-1] != num_experts:
        raise InputError(
            f"trace {path!r} holds {counts.dtype} {counts.shape}, no loads of {num_experts} experts; the last axis must "
            "be the experts of this model."
        )
    layers = counts.shape[-2] if counts.ndim > 1 else 1
    yield counts.reshape(-1, layers, num_experts)


def _is_ids(array: Array, num_experts: int) -> bool:
    """Whether an array may be ids [tokens, layers, top_k]: no id too large and no expert twice for a token.

    Layers without experts are all zeros in vLLM's arrays, all -1 in SGLang's.
    """
    if array.ndim != 3 or array.dtype.kind not in "iu" or not array.size or array.shape[2] > num_experts:
        return False
    ids = array.astype(np.int64)
    if ids.min() < -1 or ids.max() >= num_experts:
        return False
    ordered = np.sort(ids, axis=2)
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(axis=2)
    return bool((~twice | ~ids.any(axis=2)).all())


def _of_ids(path: str, ids: Array, num_experts: int, physical: Array | None = None) -> Array:
    """Histograms, int64 [layers, num_experts], of ids [layers, tokens, top_k]; -1 is nobody.

    A layer of zeros has no experts unless top_k is 1: a token visits no expert twice.
    """
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(f"trace {path!r} holds ids {ids.dtype} {ids.shape}; give integers [layers, tokens, top_k].")
    limit = num_experts if physical is None else physical.shape[1]
    if physical is not None and len(physical) != len(ids):
        raise InputError(f"trace {path!r} maps {len(physical)} layers but records {len(ids)}; it contradicts itself.")
    if ids.size and (ids.max() >= limit or ids.min() < -1):
        bad = ids[(ids >= limit) | (ids < -1)][0]
        raise InputError(f"trace {path!r} holds expert {bad}; the layer has experts 0 to {limit - 1}.")
    out = np.zeros((len(ids), num_experts), dtype=np.int64)
    for layer, here in enumerate(ids):
        if here.shape[1] > 1 and not here.any():
            continue
        seen = here[here >= 0].astype(np.int64)
        found = seen if physical is None else physical[layer, seen]
        out[layer] = np.bincount(found, minlength=num_experts)
    return out
