"""A thousand damaged recordings: each is read as a slow second reader reads it, or refused with one sentence.

Run as a program (folder, seed, count) it does the work in a process of its own, whose memory and time can be told.
"""

import collections
import io
import json
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rampwrap.errors import InputError
from rampwrap.routing.recorded import read_recording, read_trace
from rampwrap.routing.workloads import recorded_workloads

E, K, LAYERS, TOKENS = 16, 4, 3, 20
SECONDS = 20
"Of one file; reading one takes milliseconds, damaged or not."


class Runs:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def ids_of(rng: np.random.Generator, tokens: int = TOKENS) -> np.ndarray[Any, Any]:
    """int64 [tokens, layers, top_k]."""
    return np.argsort(rng.random((tokens, LAYERS, E)), axis=2)[..., :K]


def counts_of(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """int64 [layers, experts] of ids [tokens, layers, top_k]."""
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=E) for layer in range(LAYERS)])


def made(rng: np.random.Generator, folder: pathlib.Path, change: Any) -> pathlib.Path:
    """One of the formats, its arrays sent through `change` first."""
    kind = rng.choice(["stat.pt", "token.pt", "pass.pt", "counts.json", "requests.npz", "ids.npy", "counts.npy"])
    path = folder / kind
    ids = ids_of(rng)
    steps = np.stack([counts_of(ids_of(rng, tokens)) for tokens in (1, 9, 30)])

    def tensor(array: Any) -> Any:
        array = np.asarray(change(array))
        return (
            torch.from_numpy(np.ascontiguousarray(array))
            if array.dtype.kind in "iufbc" and array.dtype.isnative
            else array
        )

    if kind == "stat.pt":
        torch.save({"rank": 0, "logical_count": tensor(steps.astype(np.int32))}, path)
    elif kind == "token.pt":
        wide = np.full((LAYERS, TOKENS, 8), -1, np.int32)
        wide[..., :K] = ids.transpose(1, 0, 2)
        records = [{"rank": 0, "topk_ids_of_layer": tensor(wide)}]
        torch.save({"records": records, "last_physical_to_logical_map": torch.arange(E).repeat(LAYERS, 1)}, path)
    elif kind == "pass.pt":
        where = np.concatenate([np.arange(E), [0, 5]])
        physical = np.zeros((LAYERS, E + 2), np.int32)
        physical[:, :E] = counts_of(ids)
        records = [{"rank": 0, "global_physical_count": tensor(physical)}]
        torch.save(
            {"records": records, "last_physical_to_logical_map": torch.from_numpy(where).repeat(LAYERS, 1)}, path
        )
    elif kind == "counts.json":
        path.write_text(
            json.dumps({"logical_count": np.asarray(change(steps)).tolist()}, default=str), encoding="utf-8"
        )
    elif kind == "requests.npz":
        save = np.savez_compressed if rng.random() < 0.5 else np.savez
        save(path, a=change(ids.astype(np.int16)), b=ids_of(rng, 7).astype(np.int16))
    else:
        np.save(path, change(ids.astype(np.uint8) if kind == "ids.npy" else steps))
    return path


def other_bytes(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    path = made(rng, folder, lambda array: array)
    raw = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 9))):
        raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
    cut = int(rng.integers(len(raw))) if rng.random() < 0.2 else len(raw)
    path.write_bytes(raw[:cut])
    return path


def other_dtype(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    names = [
        "i1",
        "u1",
        "i2",
        "u2",
        "i4",
        "u4",
        "i8",
        "u8",
        "f2",
        "f4",
        "f8",
        "?",
        "c8",
        ">i4",
        ">f8",
        "U3",
        "O",
        "M8[s]",
        "V4",
    ]
    return made(rng, folder, lambda array: array.astype(rng.choice(names)))


def other_shape(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    def change(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        ways = [
            lambda a: a.transpose(rng.permutation(a.ndim)),
            lambda a: a.ravel(),
            lambda a: a[..., :-1],
            lambda a: a[:0],
            lambda a: a[None],
            lambda a: a[0],
            lambda a: np.repeat(a, 2, axis=-1),
            lambda a: a.reshape(-1, 1),
            lambda a: a[..., :0],
            lambda a: a.ravel()[0],
        ]
        found: np.ndarray[Any, Any] = ways[int(rng.integers(len(ways)))](array)
        return found

    return made(rng, folder, change)


def nonsense(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    values = [-1, -5, 0, 1, E - 1, E, E + 1, 127, 255, 2**31 - 1, 2**40, 2**62, np.nan, np.inf, -0.5, 0.5, 1e300]

    def change(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        value = values[int(rng.integers(len(values)))]
        wide = array.astype(np.float64 if isinstance(value, float) else np.int64)
        flat = wide.reshape(-1, wide.shape[-1])
        row = int(rng.integers(len(flat)))
        flat[row, slice(None) if rng.random() < 0.4 else int(rng.integers(flat.shape[1]))] = value
        fits = array.dtype.kind in "iu" and isinstance(value, int) and rng.random() < 0.7
        return wide.astype(array.dtype) if fits else wide

    return made(rng, folder, change)


def huge(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    """Little bytes that promise much."""
    way, size = int(rng.integers(6)), 10 ** int(rng.integers(6, 20))
    header = io.BytesIO()
    shape = (size, LAYERS, E)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    if way == 0:
        path = folder / "huge.npy"
        path.write_bytes(header.getvalue() + bytes(64))
    elif way == 1:
        path = folder / "huge.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(64))
    elif way == 2:
        path = folder / "bomb.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as stream:
            rows = 4_000_000
            np.lib.format.write_array_header_1_0(
                stream, {"descr": "|u1", "fortran_order": False, "shape": (rows, 1, E)}
            )
            for _ in range(rows // 1_000_000):
                stream.write(b"\x01" * (E * 1_000_000))
    elif way == 3:
        path = folder / "wide.pt"
        torch.save({"logical_count": torch.ones(1, dtype=torch.uint8).expand(min(size, 10**9), LAYERS, E)}, path)
    elif way == 4:
        path = folder / "deep.json"
        path.write_text('{"logical_count": ' + "[" * 100_000 + "]" * 100_000 + "}", encoding="utf-8")
    else:
        path = folder / "long.json"
        path.write_text('{"logical_count": [[' + "9" * min(size, 10**6) + "]]}", encoding="utf-8")
    return path


def code(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    """Pickles that would leave a file."""
    runs = Runs(folder / "executed")
    way = int(rng.integers(5))
    if way == 0:
        torch.save({"logical_count": torch.ones(1, LAYERS, E), "x": runs}, path := folder / "code.pt")
    elif way == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save([runs], path := folder / "old.pt", _use_new_zipfile_serialization=False)
    elif way == 2:
        np.save(path := folder / "code.npy", np.array([runs] * E, dtype=object), allow_pickle=True)
    elif way == 3:
        np.savez(path := folder / "code.npz", np.array([runs] * E, dtype=object))
    else:
        path = folder / f"raw{rng.choice(['.pt', '.npy', '.npz', '.json'])}"
        path.write_bytes(pickle.dumps(runs))
    return path


KINDS = (other_bytes, other_dtype, other_shape, nonsense, huge, code)


def reference(path: pathlib.Path) -> collections.Counter[tuple[int, ...]]:
    """The histograms of a file that has been read, token by token, as plainly as can be."""
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    ids: list[tuple[Any, Any]] = []  # [layers][tokens][width], map

    def counts(array: Any) -> None:
        for row in np.asarray(array).reshape(-1, np.asarray(array).shape[-1]):
            found[tuple(int(value) for value in row)] += any(row)

    if path.suffix == ".pt":
        raw = torch.load(path, weights_only=True)
        if "logical_count" in raw:
            counts(raw["logical_count"].numpy())
        else:
            where = raw["last_physical_to_logical_map"].tolist()
            for record in raw["records"]:
                if "topk_ids_of_layer" in record:
                    ids.append((record["topk_ids_of_layer"].numpy(), where))
                    continue
                for layer, row in enumerate(record["global_physical_count"].tolist()):
                    out = [0] * E
                    for copy, count in enumerate(row):
                        out[where[layer][copy]] += count
                    found[tuple(out)] += any(out)
    elif path.suffix == ".json":
        raw = json.loads(path.read_text(encoding="utf-8"))
        counts(raw["logical_count"] if isinstance(raw, dict) else raw)
    else:
        loaded = np.load(path)
        for array in [loaded] if path.suffix == ".npy" else [loaded[name] for name in loaded.files]:
            if array.ndim and array.shape[-1] == E and array.dtype.kind in "iuf":
                counts(array)
            elif array.ndim == 3 and array.dtype.kind in "iu" and 0 < array.shape[2] < E:
                ids.append((array.transpose(1, 0, 2), None))
    cleaned, widths = [], []
    for array, where in ids:
        limit = E if where is None else len(where[0])
        largest = int(np.iinfo(array.dtype).max)
        nobody = {-1, limit, *([largest] if array.dtype.kind == "u" and largest > limit else [])}
        layers: list[list[list[int]]] = []
        for layer, tokens in enumerate(array.tolist()):
            layers.append([])
            for token in tokens:
                used = [value for value in token if value not in nobody]
                if len(used) > 1 and len(set(used)) == 1 and used[0] in (0, largest):
                    used = []
                layers[-1].append([value if where is None else where[layer][value] for value in used])
        flat = [token for layer in layers for token in layer]
        if any(len(set(token)) < len(token) or any(not 0 <= value < E for value in token) for token in flat):
            continue  # an array of something else, or the file is refused
        cleaned.append(layers)
        widths.append(array.shape[::2])
    width = max((len(token) for layers in cleaned for layer in layers for token in layer), default=0)
    batches = [*cleaned]
    if len(cleaned) > 1 and widths[0] == widths[1]:
        for position in range(min(len(cleaned[0][0]), len(cleaned[1][0]))):
            batches.append(
                [[cleaned[0][layer][position], cleaned[1][layer][position]] for layer in range(len(cleaned[0]))]
            )
    for layers in batches:
        for layer in layers:
            out = np.bincount([value for token in layer if len(token) == width for value in token], minlength=E)
            found[tuple(out.tolist())] += bool(out.any())
    return +found


READERS: tuple[Callable[[str], Any], ...] = (
    lambda path: read_recording(path, E),
    lambda path: read_trace(path, E),
    lambda path: recorded_workloads(path, E, K),
)
"Of which the first is counted, and its histograms compared."


def work(folder: pathlib.Path, seed: int, count: int) -> dict[str, Any]:
    """Reads `count` damaged files; what became of them, by kind."""
    rng = np.random.default_rng(seed)
    tally: collections.Counter[str] = collections.Counter()
    for number in range(count):
        make = KINDS[number % len(KINDS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                path = make(rng, folder)
            except (ValueError, TypeError, OverflowError):  # numpy itself cannot make it
                tally[f"{make.__name__} not made"] += 1
                continue
        signal.alarm(SECONDS)
        for read in READERS:
            first = read is READERS[0]
            try:
                result = read(str(path))
                tally[f"{make.__name__} read"] += first
            except InputError as error:
                assert str(error).endswith(".") and "\n" not in str(error) and len(str(error)) < 700, error
                tally[f"{make.__name__} refused"] += first
                continue
            if first:
                rows = collections.Counter(tuple(row) for row in result.counts.tolist())
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert rows == reference(path), (number, make.__name__, path.name)
        signal.alarm(0)
        assert not (folder / "executed").exists(), (number, make.__name__, path.name)
        path.unlink()
    tally = +tally
    # Not getrusage: a process started by vfork counts what its parent, a worker of pytest, held until exec.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return {"peak_mib": int(peak) // 1024, **tally}


@pytest.mark.slow
def test_a_thousand_damaged_recordings_are_read_or_refused(tmp_path: pathlib.Path) -> None:
    run = [sys.executable, __file__, str(tmp_path), "1", "1000"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    tally = json.loads(done.stdout)
    print(tally)
    assert tally["peak_mib"] < 1024
    assert tally["code refused"] >= 150 and tally["huge refused"] >= 150
    assert "code read" not in tally and "huge read" not in tally
    assert min(tally[f"{kind} read"] for kind in ("other_bytes", "other_dtype", "other_shape", "nonsense")) > 0


if __name__ == "__main__":
    print(json.dumps(work(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
