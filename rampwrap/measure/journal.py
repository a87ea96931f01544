"""`Journal`: an append-only record of a profile under way, from which a killed run goes on."""

import contextlib
import errno
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap import schema
from rampwrap.errors import InputError, RampwrapError, TableError
from rampwrap.files import locked
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid, IntArray
from rampwrap.kernel.protocol import Config, check_configs, config_key
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import LEAST_US, MOST_COUNT, MOST_SPREAD, MOST_US, SCHEMA, Timings
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Workload
from rampwrap.schema import between

MOST_BYTES = 1 << 26
"Of the file, 2.5 million cells; read, they take 500 MB."

RowKey = tuple[str, str, tuple[int, ...]]
"What a row of the table is found by: label, split, histogram."


@attrs.frozen
class Header:
    """What was measured, and how: a journal with another header is never mixed in."""

    kernel: str
    kernel_version: str
    device: Device
    shape: MoEShape
    configs: tuple[Config, ...]
    grids: tuple[CtaGrid, ...]
    timer: str

    def __attrs_post_init__(self) -> None:
        check_configs(self.configs, "the journal")
        if len(self.grids) != len(self.configs):
            raise TableError(f"the journal has {len(self.configs)} configs and {len(self.grids)} grids.")

    def difference(self, other: "Header") -> str | None:
        """In words, the first thing in which `other` was measured differently; None if it goes together."""
        for name, mine, theirs in (
            ("kernel", self.kernel, other.kernel),
            ("kernel version", self.kernel_version, other.kernel_version),
            ("shape", self.shape, other.shape),
            ("device", self.device.name, other.device.name),
            ("number of SMs", self.device.num_sms, other.device.num_sms),
            ("timer", self.timer, other.timer),
            ("number of configs", len(self.configs), len(other.configs)),
        ):
            if mine != theirs:
                return f"{name} {theirs} instead of {mine}"
        for index, (config, old) in enumerate(zip(self.configs, other.configs, strict=True)):
            if config_key(config) != config_key(old):
                return f"config {index} {config_key(old)} instead of {config_key(config)}"
        return None


@attrs.frozen
class Measured:
    """A line of the file: cells of one row, as (config, microseconds, spread)."""

    label: str
    split: str
    counts: tuple[int, ...]
    cells: tuple[tuple[int, float, float], ...] = attrs.field()
    seconds: float = attrs.field(default=0.0, validator=between(0, 1e9, TableError, whole=False))

    @cells.validator
    def _times(self, attribute: "attrs.Attribute[Any]", value: tuple[tuple[int, float, float], ...]) -> None:
        for config, us, spread in value:
            if not (LEAST_US <= us <= MOST_US and 0 <= spread <= MOST_SPREAD):
                raise TableError(f"config {config} took {us} us with a spread of {spread}, which cannot be.")

    def check(self, header: Header) -> None:
        """Whether it is of this profile; TableError where a config or an expert is not."""
        if len(self.counts) != header.shape.num_local_experts or not all(0 <= n <= MOST_COUNT for n in self.counts):
            raise TableError(f"counts is no histogram of {header.shape.num_local_experts} experts.")
        for config, _, _ in self.cells:
            check_index(config, header)


@attrs.frozen
class Failed:
    """A line of the file: a config that ends or hangs what runs it."""

    failed: int
    reason: str

    def check(self, header: Header) -> None:
        """Whether it is of this profile; TableError where it has no such config."""
        check_index(self.failed, header)


@attrs.frozen
class Begun:
    """The last line of a file whose process ended meanwhile: a launch that was about to happen."""

    begun: int
    label: str
    split: str
    deaths: int = attrs.field(default=0, validator=between(0, 1000, TableError))
    "How often the process had ended in it before."

    def check(self, header: Header) -> None:
        """Whether it is of this profile; TableError where it has no such config."""
        check_index(self.begun, header)


def check_index(config: int, header: Header) -> None:
    """TableError where a profile has no such config."""
    if config not in range(len(header.configs)):
        raise TableError(f"config {config} is none of the {len(header.configs)} of this profile.")


@attrs.frozen
class Cells:
    """What is known so far: by row, then by config, microseconds and spread."""

    rows: dict[RowKey, dict[int, tuple[float, float]]] = attrs.field(factory=dict)
    reasons: dict[int, str] = attrs.field(factory=dict)
    "Why a config cannot run, by its index."
    begun: list[Begun] = attrs.field(factory=list)
    "What was about to run when nothing more was recorded: one entry, or none."

    def add(self, record: "Measured | Failed | Begun") -> float:
        """Takes in one record of the file and returns the seconds it took."""
        self.begun.clear()
        if isinstance(record, Begun):
            self.begun.append(record)
            return 0.0
        if isinstance(record, Failed):
            self.reasons[record.failed] = record.reason
            return 0.0
        key = (record.label, record.split, record.counts)
        self.rows.setdefault(key, {}).update({config: (us, spread) for config, us, spread in record.cells})
        return record.seconds


class Journal:
    """One JSON line a record, each on disk before `append` returns.

    Opening an existing file reads it back. A last line that a kill or a full disk left torn is dropped: the cells
    in it count as not measured.

    Attributes:
        cells: everything in the file.
        booked: configs that ended or hung what ran them, with the reason; `cells.reasons` may hold others too.
        seconds: time spent on it, over all runs.

    Args:
        path: the file; None keeps everything in memory only.

        replace: whether the journal of another profile is discarded; an empty one always is.

    Raises:
        TableError: the file is no journal, one of another kernel, version, shape, device or config list, or in use.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Header, *, replace: bool = False) -> None:
        self.path = None if path is None else pathlib.Path(path)
        self.cells = Cells()
        self.seconds = 0.0
        self.booked: dict[int, str] = {}
        self._stream: io.FileIO | None = None
        self._passing: int | None = None
        "Where a line starts that the next one replaces."
        self._lock = contextlib.ExitStack()
        if self.path is not None:
            with contextlib.ExitStack() as undo:
                undo.callback(self._lock.close)
                self._acquire(self.path)
                self._open(self.path, header, replace)
                undo.pop_all()

    def _acquire(self, path: pathlib.Path) -> None:
        try:
            self._lock.enter_context(locked(path))
        except TimeoutError as error:
            lines = _read(path)[0] if path.exists() else []
            raise TableError(
                f"{path} is in use by another profile, which has recorded {len(lines[1:])} lines so far; "
                "wait for it or choose another output file."
            ) from error
        except OSError as error:
            raise TableError(
                f"{path} cannot be written ({error.strerror}); choose a folder that exists and is writable."
            ) from error

    def _open(self, path: pathlib.Path, header: Header, replace: bool) -> None:
        """Reads what is there and opens it for more, all under the lock."""
        lines, good = _read(path) if path.exists() else ([], 0)
        if lines:
            difference = self._take(path, header, lines, replace)
            if difference and not replace and len(lines) > 1:
                raise TableError(
                    f"{path} is the journal of another profile ({difference}); delete it, choose another output file or "
                    "pass --replace (replace=True)."
                )
            if difference:
                lines, good, self.cells, self.seconds = [], 0, Cells(), 0.0
        try:
            # Unbuffered: a write either raises here or has reached the kernel, and nothing is retried at close.
            stream = path.open("ab", buffering=0)
        except OSError as error:
            raise TableError(
                f"{path} cannot be written ({error.strerror}); choose a folder that exists and is writable."
            ) from error
        stream.truncate(good)
        self._stream = stream
        self.booked.update(self.cells.reasons)
        if self.cells.begun:
            self._passing = good - len(lines[-1]) - 1
        if not lines:
            self._write({"journal": SCHEMA, **schema.dump(header)})

    def _take(self, path: pathlib.Path, header: Header, lines: Sequence[bytes], replace: bool) -> str | None:
        """Takes the lines in; in words, why they are another profile's."""
        try:
            other = _header(path, lines[0])
            difference = header.difference(other)
            if difference is None:
                self.seconds = _fill(path, other, self.cells, lines)
        except TableError as error:
            if not replace:
                raise
            return str(error)
        return difference

    def append(self, key: RowKey, cells: Mapping[int, tuple[float, float]], seconds: float) -> None:
        """Records measured cells of one row.

        Raises:
            TableError: the disk is full; everything recorded before stays readable.
        """
        label, split, counts = key
        listed = [
            (config, float(f"{us:.8g}"), float(f"{min(spread, MOST_SPREAD):.5g}"))
            for config, (us, spread) in cells.items()
        ]
        self._record(Measured(label, split, counts, tuple(listed), round(seconds, 3)))

    def fail(self, config: int, reason: str) -> None:
        """Records that a config ends what runs it, so that no later run tries it again."""
        self.booked[config] = reason
        self._record(Failed(config, reason))

    def begin(self, config: int, key: RowKey, deaths: int = 0) -> None:
        """Records that a config is about to be launched on a row: if nothing follows, it has ended the process.

        The next record takes its place. Not synced: the end of a process loses nothing that was written.
        """
        if self._stream is not None:
            record = Begun(config, key[0], key[1], deaths)
            self._write(schema.dump(record), passing=True)
            self.cells.add(record)

    def pause(self) -> None:
        """What was begun has returned, or was left in good order."""
        self.cells.begun.clear()
        if self._stream is not None and self._passing is not None:
            self._stream.truncate(self._passing)
            self._passing = None

    def close(self) -> None:
        """Leaves the file for the next run; one without a result goes."""
        if self._stream is None or self._stream.closed:
            return
        with contextlib.suppress(OSError):
            self.pause()
        self._stream.close()
        if self.path is not None and self.path.exists() and len(_read(self.path)[0]) < 2:
            self.path.unlink()
        self._lock.close()

    def remove(self) -> None:
        """Deletes and closes the file: the table that it led to is saved."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.close()

    def _record(self, record: Measured | Failed) -> None:
        self._write(schema.dump(record))
        self.seconds += self.cells.add(record)

    def _write(self, record: dict[str, Any], passing: bool = False) -> None:
        if self._stream is None:
            return
        line = json.dumps(schema.seal(record), separators=(",", ":")).encode() + b"\n"
        if self._passing is not None:
            self._stream.truncate(self._passing)
            self._passing = None
        start = os.fstat(self._stream.fileno()).st_size
        try:
            written = self._stream.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if passing:
                self._passing = start
            else:
                os.fsync(self._stream.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the reader drops a torn line as well
                self._stream.truncate(start)
            raise TableError(
                f"{self.path} could not be written ({error.strerror}); free some space and run again, "
                f"{len(self.cells.rows)} workloads are kept in it."
            ) from error


def read_journal(path: str | os.PathLike[str]) -> Timings:
    """The table of an unfinished profile: the workloads measured so far, NaN in cells that were not.

    Raises:
        TableError: the file is missing or no journal, or nothing was measured yet.
    """
    path = pathlib.Path(path)
    lines, _ = _read(path)
    if not lines:
        raise TableError(f"{path} is empty; start the profile anew.")
    header = _header(path, lines[0])
    cells = Cells()
    seconds = _fill(path, header, cells, lines)
    if not cells.rows:
        raise TableError(f"{path} holds no finished workload yet; run the profile again to go on with it.")
    return to_timings(header, list(cells.rows), cells, {"elapsed_s": round(seconds, 1), "unfinished": True})


def to_timings(header: Header, rows: Sequence[RowKey], cells: Cells, notes: dict[str, Any]) -> Timings:
    """The table of these rows, in this order; a config that failed anywhere is NaN everywhere."""
    us = np.full((len(rows), len(header.configs)), np.nan)
    spread = np.full_like(us, np.nan)
    for row, key in enumerate(rows):
        for config, pair in cells.rows.get(key, {}).items():
            if config not in cells.reasons:
                us[row, config], spread[row, config] = pair
    counts: IntArray = np.array([counts for _, _, counts in rows], dtype=np.int64)
    return Timings(
        us=us,
        counts=counts,
        split=tuple(split for _, split, _ in rows),
        label=tuple(label for label, _, _ in rows),
        kernel=header.kernel,
        device=header.device,
        shape=header.shape,
        configs=header.configs,
        grids=header.grids,
        kernel_version=header.kernel_version,
        spread=spread,
        reasons=dict(sorted(cells.reasons.items())),
        notes=notes,
    )


def row_keys(shape: MoEShape, workloads: Sequence[Workload]) -> list[RowKey]:
    """Label, split and histogram of each workload; experts of this rank are the first `num_local_experts`.

    Raises:
        InputError: there is no workload, or one without tokens.
    """
    if not workloads:
        raise InputError("there are no workloads to profile; give at least one token count and one routing.")
    keys = []
    for workload in workloads:
        if workload.num_tokens < 1:
            raise InputError(f"a workload has {workload.num_tokens} tokens; give at least 1.")
        ids = workload.topk_ids(shape.num_experts, shape.top_k)
        counts = expert_counts(ids, shape.num_experts)[: shape.num_local_experts]
        keys.append((workload.label, workload.split, tuple(counts.tolist())))
    return keys


def _read(path: pathlib.Path) -> tuple[list[bytes], int]:
    """The whole lines of a file and how many bytes they take."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise TableError(f"{path} cannot be read ({error.strerror}); name the journal of a profile.") from error
    if len(data) > MOST_BYTES:
        raise TableError(
            f"{path} has more than {MOST_BYTES >> 20} MB, which no profile fills; delete it or name another."
        )
    whole = data[: data.rfind(b"\n") + 1]
    return whole.split(b"\n")[:-1], len(whole)


def _header(path: pathlib.Path, line: bytes) -> Header:
    try:
        raw = _line(line)
        if raw.pop("journal", None) != SCHEMA:
            raise ValueError(f"it is none of schema {SCHEMA}")
        return schema.read(raw, Header, TableError)
    except (ValueError, RampwrapError) as error:
        raise TableError(
            f"{path} is not a profile journal ({error}); delete it or choose another output file."
        ) from error


def _fill(path: pathlib.Path, header: Header, cells: Cells, lines: Sequence[bytes]) -> float:
    seconds, sealed = 0.0, schema.CHECKSUM.encode() in lines[0]
    for number, line in enumerate(lines[1:], start=2):
        try:
            raw = _line(line, sealed)
            kind: type[Measured | Failed | Begun] = Failed if "failed" in raw else Begun if "begun" in raw else Measured
            record = schema.read(raw, kind, TableError)
            record.check(header)
            seconds += cells.add(record)
        except (ValueError, RampwrapError) as error:
            raise TableError(
                f"{path} is damaged in line {number} ({error}); delete that line (its cells are measured again) or the file."
            ) from error
    return seconds


def _line(line: bytes, sealed: bool = False) -> dict[str, Any]:
    raw = schema.parse(line)
    if not isinstance(raw, dict):
        raise ValueError("it is no object")
    if sealed and schema.CHECKSUM not in raw:
        raise ValueError("it lacks the checksum that the first line has")
    return schema.unseal(raw)
