"""How a command times a kernel, and what it says of what it could not time."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import click

from rampwrap.cli.command import options
from rampwrap.cli.types import positive, seconds
from rampwrap.kernel.protocol import format_config
from rampwrap.measure.session import PATIENCE_S

ROUNDS = 4


@attrs.frozen
class MeasuringRequest:
    """How a kernel is timed."""

    rounds: int | None = None
    quiet: bool = False
    replace: bool = False
    patience: float = PATIENCE_S

    def arguments(self, out: str | None, seed: int) -> dict[str, Any]:
        """Those of `rampwrap.profile`."""
        its = {"out": out, "rounds": self.rounds or ROUNDS, "quiet": self.quiet, "seed": seed}
        return {**its, "replace": self.replace, "patience_s": self.patience}


measuring_options = options(
    click.option(
        "--rounds", type=positive, metavar="N", help="interleaved rounds of measurement; the first only sorts out"
    ),
    click.option("--quiet", is_flag=True, help="no progress bar"),
    click.option(
        "--replace",
        is_flag=True,
        help="measure anew and overwrite what stands at --out; by default its cells are kept, and another table is refused",
    ),
    click.option("--patience", type=seconds, metavar="5m", help="after which a launch counts as hung, 5m by default"),
)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """What a scheduler's SIGTERM ends leaves as after Ctrl-C: the journal is in good order, and no locks stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def losses(notes: Mapping[str, Any]) -> list[str]:
    """Lines on what a table lacks, and on what was not measured anew."""
    lines = []
    if again := notes.get("reused_cells"):
        lines.append(f"{again} cells were there already and were kept; --replace measures all anew")
    if skipped := notes.get("skipped"):
        label, why = next(iter(skipped.items()))
        lines.append(f"{len(skipped)} workloads could not be measured and are left out, as {label}: {why}")
    if failed := notes.get("failed"):
        first = failed[0]
        lines.append(
            f"{len(failed)} cells failed, as {format_config(first['config'])} on {first['workload']}: {first['reason']}"
        )
    lines += [f"passed over: {config}: {why}" for config, why in notes.get("passed_over", {}).items()]
    if skipped or failed:
        lines.append("the same command tries again what is missing")
    return lines
