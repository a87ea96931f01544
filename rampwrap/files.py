"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from typing import Any

from rampwrap.errors import TableError


class replacing:
    """``with replacing(path) as stream``: the bytes appear at `path` whole or not at all.

    Written beside the target, synced, then renamed; a full disk or a kill leaves the old file as it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)

    def __enter__(self) -> Any:
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise TableError(
                f"{self.path} cannot be written ({error.strerror}); choose a folder that exists and is writable."
            ) from error
        os.fchmod(handle, 0o644)
        self._temporary = pathlib.Path(name)
        self._stream = os.fdopen(handle, "wb")
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        failure = error if isinstance(error, OSError) else None
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                self._temporary.replace(self.path)
        except OSError as late:
            failure = late
        finally:
            # Closing flushes what is buffered, which a full disk refuses a second time.
            with contextlib.suppress(OSError):
                self._stream.close()
            self._temporary.unlink(missing_ok=True)
        if failure is not None:
            raise TableError(
                f"{self.path} could not be written ({failure.strerror}); free some space and run again."
            ) from failure
