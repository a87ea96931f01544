"""Starting worker processes from any script, with or without ``if __name__ == "__main__"``."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

NAMES = ("__file__", "__spec__")
"What of ``__main__`` tells `multiprocessing` how a child finds the parent's script."

_lock = threading.Lock()
_users = 0
_kept: dict[str, Any] = {}


@contextlib.contextmanager
def main_hidden() -> Iterator[None]:
    """Processes that start inside do not import the script that this one runs.

    By default a spawned child imports it first, to find functions of it. Where the script calls us without a guard the
    child would run it whole, call us again and die; a script from standard input it cannot find at all. Our workers run
    functions of this package only.

    Threads may overlap. A process that another thread starts meanwhile does not see its script either, so this belongs
    around the starting alone, which takes milliseconds.
    """
    global _users
    main = sys.modules["__main__"]
    with _lock:
        if not _users:
            _kept.update({name: getattr(main, name) for name in NAMES if hasattr(main, name)})
            for name in _kept:
                setattr(main, name, None)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for name, value in _kept.items():
                    setattr(main, name, value)
                _kept.clear()
