"""Four processes that the expert-parallel tests share, each a rank of gloo."""

import os
import pathlib
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

SCRIPT = pathlib.Path(__file__).parent / "on_ranks.py"
HELP = runpy.run_path(str(SCRIPT))
RANKS = 4


class Ranks:
    """Runs functions of `on_ranks.py` on the first ranks at once."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(its for its in sys.path if its)
        pairs = [socket.socketpair() for _ in range(RANKS)]
        theirs = [its.fileno() for _, its in pairs]
        command = [sys.executable, str(SCRIPT), str(port), *map(str, theirs)]
        self._process = subprocess.Popen(command, env=environment, pass_fds=theirs)
        for mine, its in pairs:
            its.close()
            mine.settimeout(40)
        self._streams = [mine.makefile("rwb") for mine, _ in pairs]
        self._sockets = [mine for mine, _ in pairs]
        self._answers(RANKS)

    def _answers(self, number: int) -> list[Any]:
        return [HELP["hear"](its) for its in self._streams[:number]]

    def run(self, number: int, function: str, *arguments: Any) -> list[Any]:
        """Answers of the first ranks; the error of the lowest that has one is raised."""
        for its in self._streams[:number]:
            HELP["tell"](its, (function, number, arguments))
        answers = self._answers(number)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def end(self) -> None:
        for stream, its in zip(self._streams, self._sockets, strict=True):
            stream.close()
            its.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.end()
