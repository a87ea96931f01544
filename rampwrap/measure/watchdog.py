"""`Watchdog`: ends what does not return, after saying what it was."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE_S = 5.0
"Seconds that an interrupted call has to come back; a wait for the GPU never does."


class Hung(Exception):  # noqa: N818
    """What was watched did not return in time, and was interrupted."""


class Watchdog:
    """``with watchdog.watching("config 3"): launch()``.

    A call that is still running after `limit_s` seconds is reported to `report`, then interrupted: Python code leaves
    with `Hung`. What cannot be interrupted, a kernel that hangs on the GPU above all, ends the process: its context is
    lost anyway, and only the end of the process takes the kernel off the GPU.

    Args:
        limit_s: seconds; infinity never ends anything.
        report: called in another thread with what was watched, before anything is interrupted.
    """

    def __init__(self, limit_s: float, report: Callable[[str], None]) -> None:
        self._limit_s, self._report = limit_s, report
        self._change = threading.Condition()
        self._what: str | None = None
        self._deadline = 0.0
        self._expired = False
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Raises:
        Hung: the body was interrupted.
        """
        if self._limit_s == float("inf"):
            yield
            return
        self._watched = threading.current_thread()
        with self._change:
            self._what, self._deadline, self._expired = what, time.monotonic() + self._limit_s, False
            self._change.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="rampwrap-watchdog", daemon=True)
            self._thread.start()
        try:
            yield
            if self._leave():
                time.sleep(1.0)  # the interruption is under way: it must not reach what comes next
        except KeyboardInterrupt:
            if not self._leave():
                raise
        else:
            if not self._expired:
                return
        finally:
            self._leave()
        raise Hung(f"it did not return within {self._limit_s:g} s")

    def close(self) -> None:
        """Ends the thread."""
        with self._change:
            self._limit_s = float("inf")
            self._change.notify_all()

    def _leave(self) -> bool:
        with self._change:
            self._what = None
            self._change.notify_all()
            return self._expired

    def _watch(self) -> None:
        with self._change:
            while self._limit_s != float("inf"):
                left = self._deadline - time.monotonic()
                if self._what is None or left > 0:
                    self._change.wait(None if self._what is None else left)
                    continue
                self._expired, what = True, self._what
                self._report(what)
                if self._watched is threading.main_thread() and self._watched.ident is not None:
                    signal.pthread_kill(self._watched.ident, signal.SIGINT)
                    self._change.wait_for(lambda: self._what is None, GRACE_S)
                if self._what is not None:
                    self._end(what)

    def _end(self, what: str) -> None:
        print(
            f"rampwrap: {what} did not return within {self._limit_s:g} s and cannot be interrupted; "
            "run the same command again to go on without it.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
