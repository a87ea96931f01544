"""What mkdocs does besides: a line ``{{ help COMMAND }}`` becomes what ``rampwrap COMMAND --help`` prints."""

import contextlib
import io
import os
import re
from typing import Any
from unittest import mock

from rampwrap.cli.main import main


def help_of(command: str) -> str:
    """The help text of a command, 100 columns wide; of all of them for ""."""
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        main([*command.split(), "--help"])
    return said.getvalue().rstrip()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return re.sub(
        r"^\{\{ help ?(.*?) \}\}$", lambda found: f"```text\n{help_of(found[1])}\n```", markdown, flags=re.MULTILINE
    )
