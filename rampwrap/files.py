"""Files: written whole or not at all, used by one process at a time, and where a cache lies."""

import contextlib
import errno
import io
import os
import pathlib
import re
import stat
import tempfile
import time
from types import TracebackType
from typing import IO, Any

from rampwrap.errors import InputError, TableError

FilePath = str | os.PathLike[str]

# What file systems without locks (some network and FUSE mounts) answer.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_WRITING_S = 60.0
"Seconds that a writer waits for another one of the same file."
_READER_S = 20.0
"Seconds that a FIFO is waited for to have a reader."


def check_target(path: FilePath) -> None:
    """Refuses a place where no file can be written, before anything is spent on its content.

    Raises:
        TableError: a folder stands there, or its folder is absent or may not be written.
    """
    place = pathlib.Path(path)
    if place.is_dir() or os.fspath(path).endswith(os.sep):
        raise TableError(f"{os.fspath(path)} is a folder; name a file in it.")
    if _is_special(place):
        return
    folder = _target(place).parent
    reason = errno.ENOENT if not folder.is_dir() else 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    if reason:
        raise TableError(
            f"{place} cannot be written ({os.strerror(reason)}); choose a folder that exists and is writable."
        )


def is_regular(path: FilePath) -> bool:
    """Whether a plain file stands at `path` or may be made there; not so for FIFOs, devices and open descriptors."""
    return not _is_special(pathlib.Path(path))


class replacing:
    """``with replacing(path) as stream``: the bytes appear at `path` whole or not at all.

    They are written beside the target under the umask, synced, then renamed; a full disk or a kill leaves the old file
    as it was, and what a kill left over goes with the next writing. A link stays and its target is replaced; a FIFO, a
    device or ``/dev/stdout`` gets the bytes when all are there.

    Raises:
        TableError: the place cannot be written, or the disk is full.
    """

    def __init__(self, path: FilePath) -> None:
        self.path = pathlib.Path(path)
        self._given = path
        self._temporary: pathlib.Path | None = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> IO[bytes]:
        check_target(self._given)
        if _is_special(self.path):
            self._stream: IO[bytes] = io.BytesIO()
            return self._stream
        self._place = _target(self.path)
        hidden = self._place.with_name(f".{self._place.name}")
        try:
            self._lock.enter_context(locked(hidden, wait_s=_WRITING_S))
            self._temporary = hidden.with_name(f"{hidden.name}.tmp")
            self._temporary.unlink(missing_ok=True)  # a kill left it
            handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except TimeoutError as error:
            raise TableError(
                f"{self.path} is being written by another process; run again when it has ended."
            ) from error
        except OSError as error:
            self._lock.close()
            raise TableError(
                f"{self.path} cannot be written ({error.strerror}); choose a folder that exists and is writable."
            ) from error
        self._stream = os.fdopen(handle, "wb")
        return self._stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error if isinstance(error, OSError) else None
        try:
            if kind is None:
                self._finish()
        except OSError as late:
            failure = late
        finally:
            # Closing flushes what is buffered, which a full disk refuses a second time.
            with contextlib.suppress(OSError):
                self._stream.close()
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)
            self._lock.close()
        if failure is not None:
            fix = "free some space and run again" if failure.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it"
            raise TableError(f"{self.path} could not be written ({failure.strerror}); {fix}.") from failure

    def _finish(self) -> None:
        if self._temporary is None:
            assert isinstance(self._stream, io.BytesIO)
            _pour(self.path, self._stream.getvalue())
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._temporary.replace(self._place)


class locked:
    """``with locked(path)``: no other process holds the same path meanwhile. A file ``path.lock`` stands for it.

    A killed holder's lock is free. Where the file system has no locks, the mere presence of a file serves.

    Args:
        path: what is locked; it need not exist, but its folder must.
        wait_s: how long to wait for another holder; -1 for ever.

    Raises:
        TimeoutError: another process holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: FilePath, wait_s: float = 0.0) -> None:
        self._path = f"{os.fspath(path)}.lock"
        self._wait_s = wait_s
        self._held: Any = None

    def __enter__(self) -> "locked":
        import filelock

        try:
            self._held = filelock.FileLock(self._path, thread_local=False)
            self._held.acquire(timeout=self._wait_s)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                pathlib.Path(self._path).unlink()  # of no use to anyone here
            self._path = self._path.removesuffix(".lock") + ".softlock"
            self._held = filelock.SoftFileLock(self._path, thread_local=False)
            self._held.acquire(timeout=self._wait_s)
        return self

    def __exit__(self, *_: object) -> None:
        # While it is held: who waits for it finds that the file is gone and makes a new one.
        with contextlib.suppress(OSError):
            pathlib.Path(self._path).unlink()
        with contextlib.suppress(OSError):
            self._held.release()


def cache_folder() -> pathlib.Path:
    """Where rampwrap keeps what outlives a process: ``$XDG_CACHE_HOME/rampwrap``, by default ``~/.cache/rampwrap``.

    A user without a home gets a folder of the user's own among the temporary files. Nothing is made but that.

    Raises:
        InputError: someone else owns that.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return pathlib.Path(given) / "rampwrap"
    try:
        return pathlib.Path.home() / ".cache" / "rampwrap"
    except RuntimeError:
        pass
    place = pathlib.Path(tempfile.gettempdir()) / f"rampwrap-{os.getuid()}"
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700)
    # Plans and libraries are loaded from it: whoever could write there could run code here.
    with contextlib.suppress(FileNotFoundError):
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise InputError(f"{place} is open to others, and there is no home folder; set XDG_CACHE_HOME or HOME.")
    return place


def make_folder(path: FilePath, fix: str) -> pathlib.Path:
    """Makes a folder with its parents, where it is not there.

    Raises:
        InputError: it cannot be made or written; `fix` says what to do.
    """
    place = pathlib.Path(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        reason = 0 if os.access(place, os.W_OK | os.X_OK) else errno.EACCES
    except OSError as error:
        reason = error.errno or errno.EACCES
    if reason:
        raise InputError(f"the folder {place} cannot be written ({os.strerror(reason)}); {fix}.")
    return place


def _target(path: pathlib.Path) -> pathlib.Path:
    """Where links lead."""
    return pathlib.Path(os.path.realpath(path))


def _is_special(path: pathlib.Path) -> bool:
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: pathlib.Path) -> int | None:
    """Which of our open files ``/dev/stdout``, ``/dev/fd/3`` and the like name."""
    names = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", os.fspath(path))
    return int(found[1]) if found else names.get(os.fspath(path))


def _pour(path: pathlib.Path, data: bytes) -> None:
    """Writes into what is no plain file, and leaves it there."""
    number = _descriptor(path)
    handle = os.dup(number) if number is not None else _open_special(path)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)


def _open_special(path: pathlib.Path) -> int:
    end = time.monotonic() + _READER_S
    while True:
        try:
            # Opened without waiting: a FIFO that nobody reads would be waited for without end.
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() >= end:
                raise OSError(errno.ENXIO, "nobody reads it") from error
            time.sleep(0.05)
        else:
            os.set_blocking(handle, True)
            return handle
