"""`.npz` files read within bounds: which arrays, of which kind and rank, and how many bytes, decided before they are unpacked."""

import io
import math
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

MOST_BYTES = 1 << 26
"Of all arrays together; a table of 1000 workloads x 800 configs x 512 experts has 7 MB."
MOST_FILE = 1 << 26
"Of the file: stored without compression it is as large as its arrays."
MOST_HEADER = 10_000
"Characters of an array's header, as numpy reads it."


@attrs.frozen
class Array:
    """What an array has to be: kinds of dtype (``f``, ``iu``, ``U``), number of dimensions, and whether it may lack."""

    kinds: str
    ndim: int
    optional: bool = False


def read_arrays(path: str | os.PathLike[str], wanted: Mapping[str, Array]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an `.npz` file, none of them unpickled.

    Raises:
        ValueError: the file cannot be read, is no archive, is damaged or too large, or an array is missing, unknown or
            of another kind; says which.
    """
    try:
        with pathlib.Path(path).open("rb") as stream:
            data = stream.read(MOST_FILE + 1)
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    if len(data) > MOST_FILE:
        raise ValueError(f"it has more than {MOST_FILE >> 20} MB")
    if data.lstrip()[:1] == b"{":
        raise ValueError("it is JSON, a plan perhaps, and no .npz archive")
    if data[:2] != b"PK":
        raise ValueError("it is no .npz archive")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _unpacked(archive, wanted)
    # What zipfile, zlib and numpy's header reader raise for damaged bytes.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError) as error:
        raise ValueError(f"damaged: {error}") from error
    except (KeyError, RuntimeError, OverflowError, TypeError, MemoryError, SyntaxError, IndexError) as error:
        raise ValueError(f"damaged: {type(error).__name__}: {error!s:.80}") from error


def _unpacked(archive: zipfile.ZipFile, wanted: Mapping[str, Array]) -> dict[str, npt.NDArray[Any]]:
    members = {info.filename: info for info in archive.infolist()}
    names = {f"{name}.npy" for name in wanted}
    unknown = sorted(members.keys() - names)
    if unknown or len(members) < len(archive.infolist()):
        raise ValueError(f"it holds {f'{unknown[0]!r:.60}' if unknown else 'an array twice'}; not a timing table")
    found, left = {}, MOST_BYTES
    for name, its in wanted.items():
        info = members.get(f"{name}.npy")
        if info is None:
            if its.optional:
                continue
            raise ValueError(f"it lacks the array {name}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in an unknown way")
        with archive.open(info) as member:
            # The directory may state less than what comes out.
            data = member.read(left + 1)
        left -= len(data)
        if left < 0:
            raise ValueError(f"its arrays have more than {MOST_BYTES >> 20} MB")
        found[name] = _array(name, data, its)
    return found


def _array(name: str, data: bytes, its: Array) -> npt.NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has the unknown format {version}")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(stream, max_header_size=MOST_HEADER)
    if dtype.kind not in its.kinds or dtype.hasobject or len(shape) != its.ndim:
        raise ValueError(f"{name} is {dtype} of {len(shape)} dimensions; wanted is kind {its.kinds} of {its.ndim}")
    body = data[stream.tell() :]
    # Also says no to shapes that claim more than is there.
    if min(shape, default=1) < 1 or math.prod(shape) * dtype.itemsize != len(body) or not dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} and {dtype} has {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
