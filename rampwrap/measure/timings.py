"""`Timings`: measured microseconds of configs on workloads, and the `.npz` file that holds them (schema 1)."""

import json
import os
import pathlib
import re
from functools import cached_property
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap import schema
from rampwrap.errors import RampwrapError, TableError
from rampwrap.files import replacing
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid, FloatArray, IntArray
from rampwrap.kernel.protocol import Config, check_configs
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.archive import Array, read_arrays

SCHEMA = 1
ARRAYS = {
    "us": Array("f", 2),
    "counts": Array("iu", 2),
    "split": Array("U", 1),
    "label": Array("U", 1),
    "meta": Array("U", 0),
    "spread": Array("f", 2, optional=True),
}
MOST_COUNT = (1 << 31) - 1
"Counts are stored as int32."
LEAST_US, MOST_US = 1e-3, 1e9
"Times below a nanosecond and above a quarter of an hour are none of a layer."
MOST_SPREAD = 6e4
"Below the largest float16."
_LABEL = re.compile(r"^M=([0-9]{1,9})(?:\s+(.*))?$", re.DOTALL)


@attrs.define(frozen=True, eq=False, slots=False)
class Timings:
    """Microseconds of every config on every workload, with all that is needed to fit a model to them.

    Attributes:
        us: float64 [workloads, configs], medians; NaN where a config did not run.
        counts: int64 [workloads, num_local_experts], the histogram of each workload.
        split: per workload, ``train`` or ``eval``.
        label: per workload, ``M=64 zipf1.2``.
        kernel, kernel_version: which kernel was measured.
        spread: float64 [workloads, configs], (p80 - p20) / median of the repeats; None where not recorded.
        reasons: why a config is NaN, by config index.
        notes: anything else worth keeping (how and when it was measured), JSON-able.
    """

    us: FloatArray
    counts: IntArray
    split: tuple[str, ...]
    label: tuple[str, ...]
    kernel: str
    device: Device
    shape: MoEShape
    configs: tuple[Config, ...]
    grids: tuple[CtaGrid, ...]
    kernel_version: str = "0"
    spread: FloatArray | None = None
    reasons: dict[int, str] = attrs.field(factory=dict)
    notes: dict[str, Any] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        workloads, configs = self.us.shape if self.us.ndim == 2 else (-1, -1)
        sizes = {
            "counts": (len(self.counts), workloads),
            "split": (len(self.split), workloads),
            "label": (len(self.label), workloads),
            "configs": (len(self.configs), configs),
            "grids": (len(self.grids), configs),
        }
        for name, (got, wanted) in sizes.items():
            if got != wanted:
                raise TableError(f"{name} has {got} entries but us has {wanted}; the table contradicts itself.")
        if not workloads or not configs:
            raise TableError(
                f"the table has {workloads} workloads and {configs} configs; profile at least one of each."
            )
        if self.counts.ndim != 2 or self.counts.shape[1] != self.shape.num_local_experts:
            raise TableError(
                f"counts has shape {self.counts.shape}; give one column for each of {self.shape.num_local_experts} experts."
            )
        if self.counts.min() < 0 or self.counts.max() > MOST_COUNT:
            wrong = int(self.counts.min() if self.counts.min() < 0 else self.counts.max())
            raise TableError(f"counts holds {wrong}; a count is from 0 to {MOST_COUNT}.")
        if not ((self.us >= LEAST_US) & (self.us <= MOST_US) | np.isnan(self.us)).all():
            raise TableError(
                f"us holds a time that is not positive, or not from {LEAST_US:g} to {MOST_US:g} microseconds; mark cells "
                "that did not run with NaN."
            )
        if self.spread is not None and self.spread.shape != self.us.shape:
            raise TableError(
                f"spread has shape {self.spread.shape} but us has {self.us.shape}; the table contradicts itself."
            )
        if self.spread is not None and not ((self.spread >= 0) & (self.spread < np.inf) | np.isnan(self.spread)).all():
            raise TableError("spread holds a negative or infinite share; profile the table anew.")
        for index in self.reasons:
            if index not in range(configs):
                raise TableError(f"reasons names config {index} but us has {configs}; the table contradicts itself.")
        for text in self.label:
            match = _LABEL.match(text)
            if match is None or int(match[1]) > schema.MOST_TOKENS:
                raise TableError(
                    f"label {text!r:.80} is not of the form 'M=64 zipf1.2': at most {schema.MOST_TOKENS} tokens first, then "
                    "the distribution."
                )
        check_configs(self.configs, "the table")

    @cached_property
    def num_tokens(self) -> IntArray:
        """Tokens of each workload, int64 [workloads], read from the label."""
        return np.array([int(match[1]) for match in map(_LABEL.match, self.label) if match], dtype=np.int64)

    @cached_property
    def routing(self) -> tuple[str, ...]:
        """The distribution of each workload, the label without its token count."""
        return tuple(match[2] or "" for match in map(_LABEL.match, self.label) if match)

    @cached_property
    def is_uniform(self) -> npt.NDArray[np.bool_]:
        """Rows measured under uniform routing, from which a uniform-tuned static table is built."""
        return np.array([name == "uniform" for name in self.routing])

    def rows(self, split: str) -> IntArray:
        """Indices of the workloads of a split.

        Raises:
            TableError: there is none.
        """
        rows = np.flatnonzero(np.array(self.split) == split)
        if not len(rows):
            raise TableError(f"the table has no {split!r} workloads; it has {', '.join(sorted(set(self.split)))}.")
        return rows

    def take(self, rows: npt.ArrayLike) -> "Timings":
        """The same table with only these workloads, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        return attrs.evolve(
            self,
            us=self.us[rows],
            counts=self.counts[rows],
            split=tuple(self.split[i] for i in rows),
            label=tuple(self.label[i] for i in rows),
            spread=None if self.spread is None else self.spread[rows],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table; the old file stays whole until the new one is on disk."""
        arrays: dict[str, Any] = {
            "us": self.us.astype(np.float32),
            "counts": self.counts.astype(np.int32),
            "split": np.array(self.split),
            "label": np.array(self.label),
        }
        if self.spread is not None:
            arrays["spread"] = np.minimum(self.spread, MOST_SPREAD).astype(np.float16)
        meta = schema.dump(_Meta(**{field.name: getattr(self, field.name) for field in attrs.fields(_Meta)}))
        sealed = schema.seal({"schema": SCHEMA, **meta}, *_content(arrays))
        with replacing(path) as stream:
            np.savez_compressed(stream, **arrays, meta=np.array(json.dumps(sealed)))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sealed: bool = True) -> "Timings":
        """Reads a table of schema 1, whole: what is loaded can be fitted and replayed, or says what it lacks.

        Args:
            sealed: whether the file's checksum must fit; False for a table that was edited on purpose.

        Raises:
            TableError: the file is missing, damaged, too large, of another schema, contradicts itself, has a field that
                is missing, unknown or out of range, or another checksum than its content has.
        """
        name = os.fspath(path)
        try:
            arrays = read_arrays(path, ARRAYS)
            raw = schema.parse(str(arrays.pop("meta")).encode(), "meta")
            content = _content(arrays)
        except ValueError as error:
            raise TableError(
                f"{name} is not a readable timing table ({error}); make one with 'rampwrap profile'."
            ) from error
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        if found is True or found != SCHEMA:
            raise TableError(f"{name} has schema {found!r:.60}; this version reads schema {SCHEMA}.")
        try:
            raw = schema.unseal(raw, *content, check=sealed)
        except ValueError as error:
            raise TableError(
                f"{name} is not the table that was written ({error}); make it anew with 'rampwrap profile', or, if you "
                f"edited it on purpose, run 'rampwrap seal {name}'."
            ) from error
        try:
            meta = schema.read({key: value for key, value in raw.items() if key != "schema"}, _Meta, TableError)
            spread = arrays.get("spread")
            return cls(
                us=arrays["us"].astype(np.float64),
                counts=arrays["counts"].astype(np.int64),
                split=tuple(arrays["split"].tolist()),
                label=tuple(arrays["label"].tolist()),
                spread=None if spread is None else spread.astype(np.float64),
                **{field.name: getattr(meta, field.name) for field in attrs.fields(_Meta)},
            )
        except RampwrapError as error:
            raise TableError(f"{name} is not usable ({error}); make it anew with 'rampwrap profile'.") from error


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive, or, where it cannot be read, is named like one."""
    try:
        with pathlib.Path(path).open("rb") as stream:
            return stream.read(2) == b"PK"
    except OSError:
        return pathlib.Path(path).suffix == ".npz"


@attrs.frozen(kw_only=True)
class _Meta:
    """What stands beside the arrays, as JSON."""

    kernel: str
    kernel_version: str = "0"
    device: Device
    shape: MoEShape
    configs: tuple[Config, ...]
    grids: tuple[CtaGrid, ...]
    reasons: dict[int, str] = attrs.field(factory=dict)
    notes: dict[str, Any] = attrs.field(factory=dict)


def _content(arrays: dict[str, npt.NDArray[Any]]) -> list[bytes]:
    """What the checksum covers of the arrays: their names, shapes and values, whatever width they are stored in."""
    parts = []
    for name in sorted(arrays):
        array = arrays[name]
        parts.append(f"{name}{array.shape}".encode())
        if array.dtype.kind == "U":
            parts.append(json.dumps(array.tolist(), ensure_ascii=False).encode())  # refuses half characters
        else:
            parts.append(array.astype("<f8" if array.dtype.kind == "f" else "<i8").tobytes())
    return parts
