"""The side of an arm's process, of `serve_vllm.py` and the scripts like it: a JSON object a line, settings first, then what to do."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def opened() -> tuple[dict[str, Any], TextIO]:
    """The settings, and where answers go; what anybody prints goes to the log from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return json.loads(sys.stdin.readline()), answers


def say(answers: TextIO, answer: Any) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def asked() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of methods to call, until the other side is done."""
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quit":
            return
        yield name, command
