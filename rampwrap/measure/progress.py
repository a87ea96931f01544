"""`Progress`: a bar over the cells of a profile, before it the outlook for all of it, and what is said beside, on stderr."""

import sys
from typing import Any

from rampwrap.measure.outlook import current


class Progress:
    """Shows nothing until the number of cells is known, and no bar at all where it is quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._outlook = current()

    def expect(self, cells: int) -> None:
        """Starts the bar, with the number of cells that will be timed."""
        from tqdm import tqdm

        # Where stderr is a file, a line every half minute; a terminal is redrawn at tqdm's own pace.
        every = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=cells, unit=" cells", disable=self._quiet, file=sys.stderr, mininterval=every, dynamic_ncols=True
        )
        if self._outlook is not None:
            self._outlook.expect(cells)

    def advance(self) -> None:
        """One cell more is done with."""
        if self._outlook is not None:
            self._outlook.advance()
            if self._bar is not None and len(self._outlook.phases) > 1:
                self._bar.set_description_str(str(self._outlook), refresh=False)
        if self._bar is not None:
            self._bar.update(1)

    def found(self, text: str) -> None:
        """Shows the latest result behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """A line that is said also where it is quiet."""
        if self._bar is not None and not self._quiet:
            self._bar.clear()
        print(f"rampwrap: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
