"""What stands at the place of a new table: cells to go on from, or another table that is not thrown away unasked."""

import os
import pathlib
from collections.abc import Sequence

import attrs
import numpy as np

from rampwrap.errors import TableError
from rampwrap.files import is_regular
from rampwrap.kernel.protocol import config_key, format_config, index_by_key
from rampwrap.measure.records import Header, RowKey
from rampwrap.measure.timings import Timings


def standing(out: str | os.PathLike[str], header: Header, rows: Sequence[RowKey]) -> Timings | None:
    """The table at `out`, if all it holds goes into the one that is to be written there; None if there is none.

    Raises:
        TableError: something else stands there, and would be lost.
    """
    if not is_regular(out) or not pathlib.Path(out).exists() or not pathlib.Path(out).stat().st_size:
        return None
    try:
        found = Timings.load(out)
    except TableError as error:
        raise TableError(f"{os.fspath(out)} is there and no readable timing table; {_FIX}.") from error
    difference = header.difference(_header(found, header)) or _lost(found, header, rows)
    if difference:
        raise TableError(f"{os.fspath(out)} is there and holds another profile ({difference}); {_FIX}.")
    return found


def cells_of(found: Timings, header: Header) -> dict[RowKey, dict[int, tuple[float, float]]]:
    """The measured cells of a table, by row, then by the config's number in `header`."""
    number = index_by_key(header.configs)
    place = [number.get(config_key(config)) for config in found.configs]
    cells: dict[RowKey, dict[int, tuple[float, float]]] = {}
    for row, key in enumerate(_keys(found)):
        for column in np.flatnonzero(np.isfinite(found.us[row])).tolist():
            index = place[column]
            if index is not None:
                spread = 0.0 if found.spread is None else float(found.spread[row, column])
                cells.setdefault(key, {})[index] = (float(found.us[row, column]), spread)
    return cells


_FIX = "pass --replace (replace=True) to overwrite it, or choose another output file"


def _header(found: Timings, wanted: Header) -> Header:
    """How a table was measured; its choice of configs is compared elsewhere."""
    return attrs.evolve(
        wanted,
        kernel=found.kernel,
        kernel_version=found.kernel_version,
        device=found.device,
        shape=found.shape,
        timer=str(found.notes.get("timer", wanted.timer)),
    )


def _lost(found: Timings, header: Header, rows: Sequence[RowKey]) -> str | None:
    """In words, what a table holds that the new one would not."""
    number, wanted = index_by_key(header.configs), set(rows)
    for column, config in enumerate(found.configs):
        if config_key(config) not in number and np.isfinite(found.us[:, column]).any():
            return f"config {format_config(config)}, which is not asked for"
    for key in _keys(found):
        if key not in wanted:
            return f"workload {key[0]} of {key[1]}, which is not asked for"
    return None


def _keys(found: Timings) -> list[RowKey]:
    return list(zip(found.label, found.split, map(tuple, found.counts.tolist()), strict=True))
