"""`Journal`: an append-only record of a profile under way, from which a killed run goes on."""

import contextlib
import errno
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rampwrap import schema
from rampwrap.errors import RampwrapError, TableError
from rampwrap.files import is_regular, locked
from rampwrap.measure.records import Begun, Cells, Failed, Header, Measured, RowKey, to_timings
from rampwrap.measure.timings import MOST_SPREAD, SCHEMA, Timings

MOST_BYTES = 1 << 26
"Of the file, 2.5 million cells; read, they take 500 MB."


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


JOURNAL_SUFFIX = ".journal.jsonl"


def journal_path(out: str | os.PathLike[str] | None) -> str | None:
    """Where the journal of a table lies: beside it; none for a table that goes into a FIFO or a device."""
    return None if out is None or not is_regular(out) else os.fspath(out) + JOURNAL_SUFFIX
