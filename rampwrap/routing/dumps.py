"""Files that engines write about routing, opened: blocks of counts and ids as they stand there, nothing judged yet.

A file is data: a ``.pt`` is opened with ``weights_only=True``, an array never as a pickle, and what a header promises is
compared with the bytes that are there before memory is asked for.
"""

import json
import math
import pathlib
import stat
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray

SUFFIXES = (".pt", ".json", ".npy", ".npz")
MOST_VALUES = 1 << 25
"Numbers that any file may hold, 256 MiB as int64; a larger file holds as many as it has bytes."
MOST_LOAD = 2.0**40
"Tokens of one expert, far beyond any sum over steps: no total of a row overflows, and every whole number is one as a float."
Array = npt.NDArray[Any]


@attrs.frozen(eq=False)
class Block:
    """One array of a file.

    Attributes:
        values: counts [steps, layers, experts], or integer ids [layers, tokens, width].
        ids: which of both.
        physical: int64 [layers, physical experts], the expert that each column, or id, is a copy of; None where they
            are the experts themselves.
        where: its name in the file, for messages.
        request: all tokens of one request, so that those of one position of several make a decode step.
        rank: the counts are what one process saw.
    """

    values: Array
    ids: bool = False
    physical: IntArray | None = None
    where: str = ""
    request: bool = False
    rank: bool = False


def read_blocks(path: str, num_experts: int) -> Iterator[Block | str]:
    """The blocks of a file in its order; of an array that is something else, its name.

    Raises:
        InputError: the file is none of these kinds, cannot be read, or holds a block that contradicts itself.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise InputError(f"trace {path!r} is of no known kind; give {', '.join(SUFFIXES)}.")
    try:
        yield from _PARSERS[suffix](path, num_experts)
    except InputError:
        raise
    except (Exception, MemoryError) as error:  # a damaged archive makes torch and numpy stumble over anything
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
        raise InputError(
            f"trace {path!r} cannot be read ({said}); give the file as the engine wrote it, or loads [rows, experts]."
        ) from error


def file_key(path: str) -> tuple[int, ...]:
    """What changes when the file does.

    Raises:
        InputError: there is no such file, or it is a folder, a pipe or a device.
    """
    try:
        found = pathlib.Path(path).stat()
    except (OSError, ValueError) as error:
        raise InputError(f"trace {path!r} cannot be read ({error}); check the path.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise InputError(f"trace {path!r} is {kind}; check the path.")
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _check_size(path: str, values: int) -> None:
    most = max(MOST_VALUES, pathlib.Path(path).stat().st_size)
    if values > most:
        raise InputError(
            f"trace {path!r} unpacks to {values} numbers, more than {most}; give fewer steps, layers or requests of it."
        )


def _parse_torch(path: str, num_experts: int) -> Iterator[Block | str]:
    import torch

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch stores what it writes as it is: a member larger than the file would be unpacked.
            _check_size(path, sum(member.file_size for member in _members(path, archive)) // 8)
            if damaged := archive.testzip():  # torch itself compares no checksum
                raise InputError(f"trace {path!r} is damaged in {damaged!r}; copy it anew from where it was recorded.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = torch.load(path, map_location="cpu", weights_only=True)

    def plain(value: Any, what: str) -> Array:
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"trace {path!r} holds {type(value).__name__} as {what}; an expert-distribution dump has a tensor there."
            )
        _check_size(path, value.numel())
        wide = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        return np.asarray(wide.numpy())

    if not isinstance(raw, dict) or not {"logical_count", "records"} & set(raw):
        raise InputError(f"trace {path!r} {_no_counts(raw)}")
    if "logical_count" in raw:
        yield _of_counts(path, plain(raw["logical_count"], "logical_count"), num_experts)
        return
    records, where = raw["records"], raw.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"trace {path!r} holds {type(records).__name__} as records; a dump has a list of passes.")
    if not records:
        raise InputError(
            f"trace {path!r} holds no pass; dump it after requests ran between start and stop of the recording."
        )
    physical = None if where is None else _physical(path, plain(where, "the map of experts"), num_experts)
    total = 0
    for number, record in enumerate(records):
        keys = {"topk_ids_of_layer", "global_physical_count"} & set(record)
        if not keys:
            raise InputError(
                f"trace {path!r} holds a record {number} of {_names(record)}; a pass has topk_ids_of_layer or "
                "global_physical_count."
            )
        key = max(keys)  # ids tell more than counts
        values = plain(record[key], key)
        total += values.size
        _check_size(path, total)
        yield _of_record(path, values, key, f"record {number}", num_experts, physical)


def _of_record(path: str, values: Array, key: str, where: str, num_experts: int, physical: IntArray | None) -> Block:
    """One pass of SGLang's modes per_token and per_pass."""
    ids = key == "topk_ids_of_layer"
    axes = "[layers, tokens, top_k]" if ids else "[layers, experts]"
    if values.dtype.kind not in "iu" or values.ndim != (3 if ids else 2):
        raise InputError(f"trace {path!r} holds {key} {values.dtype} {values.shape}; give integers {axes}.")
    if physical is not None and (len(physical) != len(values) or (not ids and physical.shape[1] != values.shape[1])):
        raise InputError(
            f"trace {path!r} maps {len(physical)} layers of {physical.shape[1]} experts but {where} has "
            f"{values.shape}; it contradicts itself."
        )
    if ids:
        return Block(values, ids=True, physical=physical, where=where)
    if physical is None and values.shape[1] != num_experts:
        raise InputError(
            f"trace {path!r} counts {values.shape[1]} experts a layer and has no last_physical_to_logical_map; this "
            f"layer has {num_experts}."
        )
    return Block(values[None], physical=physical, where=where, rank=True)


def _physical(path: str, raw: Array, num_experts: int) -> IntArray:
    """The map [layers, physical experts], checked: every expert of every layer has a copy, and no other has."""
    if raw.dtype.kind not in "iu" or raw.ndim != 2 or not raw.size:
        raise InputError(
            f"trace {path!r} maps experts by {raw.dtype} {raw.shape}; a map is integers [layers, experts]."
        )
    physical = raw.astype(np.int64)
    present = np.zeros((len(physical), num_experts), dtype=bool)
    if physical.min() >= 0 and physical.max() < num_experts:
        np.put_along_axis(present, physical, True, axis=1)
    if not present.all():
        raise InputError(
            f"trace {path!r} maps physical experts to {physical.max() + 1} logical ones; the layer has {num_experts}."
        )
    return physical


def _names(raw: dict[Any, Any]) -> str:
    """The keys, cut where they are many or long."""
    found = ", ".join(str(key)[:40] for key in list(raw)[:8])
    return ascii(found)[1:-1] or "nothing"


def _no_counts(raw: Any) -> str:
    if isinstance(raw, dict) and "physical_to_logical_map" in raw:
        return (
            "holds a placement of experts (physical_to_logical_map) and no counts; give the dump with logical_count that "
            "it was made from."
        )
    found = _names(raw) if isinstance(raw, dict) else type(raw).__name__
    return f"holds {found} and no logical_count or records; give an expert-distribution dump."


def _parse_json(path: str, num_experts: int) -> Iterator[Block | str]:
    raw = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    if isinstance(raw, dict):
        if "logical_count" not in raw:
            raise InputError(f"trace {path!r} {_no_counts(raw)}")
        yield _of_counts(path, np.asarray(raw["logical_count"]), num_experts)
    else:
        yield _of_array(np.asarray(raw), num_experts, "") or _of_counts(path, np.asarray(raw), num_experts)


def _parse_numpy(path: str, num_experts: int) -> Iterator[Block | str]:
    if pathlib.Path(path).suffix == ".npy":
        with pathlib.Path(path).open("rb") as stream:
            _check_size(path, _promised(path, stream, pathlib.Path(path).stat().st_size))
        array = np.load(path, allow_pickle=False)
        yield _of_array(array, num_experts, "") or _of_counts(path, array, num_experts)
        return
    promised = 0
    with zipfile.ZipFile(path) as archive:
        for member in _members(path, archive):
            with archive.open(member) as stream:
                promised += _promised(path, stream, member.file_size)
    _check_size(path, promised)
    with np.load(path, allow_pickle=False) as loaded:
        for name in loaded.files:
            array = loaded[name]
            yield _of_array(array, num_experts, f"array {name}") or name if isinstance(array, np.ndarray) else name


def _members(path: str, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive; neither numpy nor torch packs in ways whose smallest piece may unpack to gigabytes."""
    found = archive.infolist()
    for member in found:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"trace {path!r} packs {member.filename!r:.60} in a way of its own; give it as it was written."
            )
    return found


def _promised(path: str, stream: IO[bytes], size: int) -> int:
    """Numbers of one array by its header, which must fit its size in bytes; those of anything else that is stored."""
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError:
        return size
    head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = head(stream)
    numbers = math.prod(shape)
    if numbers * dtype.itemsize > size or min(shape, default=0) < 0:
        raise InputError(
            f"trace {path!r} promises an array {str(shape)[:80]} in {size} bytes; give the file as the engine wrote it."
        )
    return numbers


_PARSERS = {".pt": _parse_torch, ".json": _parse_json, ".npy": _parse_numpy, ".npz": _parse_numpy}


def _of_array(array: Array, num_experts: int, where: str) -> Block | None:
    """Counts whose last axis is the experts, or what may be ids [tokens, layers, top_k]; None for anything else."""
    if array.ndim and array.shape[-1] == num_experts and array.dtype.kind in "iuf":
        return Block(_by_step(array), where=where)
    if array.ndim == 3 and array.dtype.kind in "iu" and 0 < array.shape[2] < num_experts:
        return Block(array.transpose(1, 0, 2), ids=True, where=where, request=True)
    return None


def _of_counts(path: str, counts: Array, num_experts: int) -> Block:
    if counts.dtype.kind not in "iuf" or counts.ndim < 1 or counts.shape[-1] != num_experts:
        raise InputError(
            f"trace {path!r} holds {counts.dtype} {counts.shape}, no loads of {num_experts} experts; the last axis must be "
            "the experts of this model, or give ids [tokens, layers, top_k]."
        )
    return Block(_by_step(counts))


def _by_step(counts: Array) -> Array:
    if not counts.size:
        return np.zeros((0, 1, counts.shape[-1]), dtype=np.int64)
    return counts.reshape(-1, counts.shape[-2] if counts.ndim > 1 else 1, counts.shape[-1])
