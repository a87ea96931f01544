"""`Timings`: measured microseconds of configs on workloads, and the `.npz` file that holds them (schema 1)."""

import json
import os
import re
import zipfile
from functools import cached_property
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.device import Device
from rampwrap.errors import ConfigError, InputError, TableError
from rampwrap.files import replacing
from rampwrap.grid import CtaGrid, FloatArray, IntArray
from rampwrap.kernel import Config, MoEShape, check_configs

SCHEMA = 1
_LABEL = re.compile(r"^M=(\d+)(?:\s+(.*))?$")


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
        if self.counts.min() < 0:
            raise TableError(f"counts holds {int(self.counts.min())}; a count cannot be negative.")
        if np.any(self.us <= 0) or np.any(np.isinf(self.us)):
            raise TableError("us holds a time that is not positive and finite; mark cells that did not run with NaN.")
        if self.spread is not None and self.spread.shape != self.us.shape:
            raise TableError(
                f"spread has shape {self.spread.shape} but us has {self.us.shape}; the table contradicts itself."
            )
        for text in self.label:
            if _LABEL.match(text) is None:
                raise TableError(
                    f"label {text!r} is not of the form 'M=64 zipf1.2'; tokens first, then the distribution."
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
        meta = {
            "schema": SCHEMA,
            "kernel": self.kernel,
            "kernel_version": self.kernel_version,
            "device": self.device.to_dict(),
            "shape": self.shape.to_dict(),
            "configs": [dict(config) for config in self.configs],
            "grids": [grid.to_dict() for grid in self.grids],
            "reasons": {str(index): reason for index, reason in self.reasons.items()},
            "notes": self.notes,
        }
        arrays: dict[str, Any] = {
            "us": self.us.astype(np.float32),
            "counts": self.counts.astype(np.int32),
            "split": np.array(self.split),
            "label": np.array(self.label),
            "meta": np.array(json.dumps(meta)),
        }
        if self.spread is not None:
            arrays["spread"] = self.spread.astype(np.float16)
        with replacing(path) as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Timings":
        """Reads a table of schema 1.

        Raises:
            TableError: the file is missing, truncated, of another schema, or contradicts itself.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            meta = json.loads(str(arrays["meta"]))
        except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
            raise TableError(
                f"{os.fspath(path)} is not a readable timing table ({error}); make one with 'rampwrap profile'."
            ) from error
        if meta.get("schema") != SCHEMA:
            raise TableError(
                f"{os.fspath(path)} has schema {meta.get('schema')!r}; this version reads schema {SCHEMA}."
            )
        try:
            shape = MoEShape(**meta["shape"])
            spread = arrays.get("spread")
            return cls(
                us=arrays["us"].astype(np.float64),
                counts=arrays["counts"].astype(np.int64),
                split=tuple(arrays["split"].tolist()),
                label=tuple(arrays["label"].tolist()),
                kernel=str(meta["kernel"]),
                kernel_version=str(meta.get("kernel_version", "0")),
                device=Device.from_dict(meta["device"]),
                shape=shape,
                configs=tuple(meta["configs"]),
                grids=tuple(CtaGrid.from_dict(raw) for raw in meta["grids"]),
                spread=None if spread is None else spread.astype(np.float64),
                reasons={int(index): reason for index, reason in meta.get("reasons", {}).items()},
                notes=meta.get("notes", {}),
            )
        except (KeyError, TypeError, AttributeError, InputError, ConfigError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is not usable: {error}"
            raise TableError(f"{os.fspath(path)} {what}; make it anew with 'rampwrap profile'.") from error
