"""`Bench`: a kernel with workloads, any cell of which can be timed once, and is kept whatever happens."""

import contextlib
import datetime
import functools
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import attrs
import numpy as np

from rampwrap._version import __version__
from rampwrap.errors import ConfigError, InputError, RampwrapError
from rampwrap.files import check_target
from rampwrap.kernel.device import Device, device_of, no_gpu
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.kernel.protocol import (
    Config,
    Kernel,
    check_configs,
    config_key,
    format_config,
    index_by_key,
    kernel_version,
    refusals,
)
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.graph_timer import default_timer
from rampwrap.measure.guard import Guard
from rampwrap.measure.inputs import Arguments, Inputs
from rampwrap.measure.journal import Journal, journal_path
from rampwrap.measure.losses import Losses
from rampwrap.measure.progress import Progress
from rampwrap.measure.records import Begun, Header, row_keys, to_timings
from rampwrap.measure.rounds import HOPELESS, summarise
from rampwrap.measure.standing import cells_of, standing
from rampwrap.measure.timer import Timed, Timer
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Workload

PATIENCE_S = 300.0
"Seconds after which a launch, its compilation included, counts as hung."
# A config in whose launch the process ended so often is passed over; once may be a kill from outside.
ENOUGH_DEATHS = 2


class Bench:
    """A kernel with workloads, any cell of which can be timed: ``with Bench(...) as bench: bench.measure(0, [3, 7])``.

    Cells already in the journal, or in a table that stands at `out`, are never timed again. What a kernel needs to be
    timed is described at `profile`.

    Attributes:
        counts: int64 [workloads, num_local_experts].
        reasons: configs that cannot run, with the reason: refused, or they end or hang what runs them.
        lost: cells and rows without a time; another run tries them again.
        progress: shows nothing until it is told how many cells to expect.
    """

    def __init__(
        self,
        kernel: Kernel,
        shape: MoEShape,
        workloads: Sequence[Workload],
        *,
        configs: Sequence[Config] | None = None,
        out: str | os.PathLike[str] | None = None,
        timer: Timer | None = None,
        inputs: Inputs | None = None,
        rounds: int = 4,
        device: Device | None = None,
        quiet: bool = False,
        seed: int = 0,
        replace: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if rounds < 1:
            raise InputError(f"rounds is {rounds}; give at least 1.")
        made = inputs or getattr(kernel, "inputs", None)
        if made is None:
            raise InputError(f"kernel {kernel.name!r} has no inputs(shape, topk_ids); pass inputs= to profile it.")
        self.kernel, self.shape, self.workloads = kernel, shape, tuple(workloads)
        self.configs = check_configs(kernel.configs if configs is None else configs, f"kernel {kernel.name!r}")
        self.keys = row_keys(shape, self.workloads)
        self.counts: IntArray = np.array([counts for _, _, counts in self.keys], dtype=np.int64)
        refused = refusals(kernel, self.configs, shape)
        self.device = device or device_of(kernel)
        simulated = isinstance(getattr(kernel, "device", device), Device)
        self.timer = timer or default_timer(self.device, shape, simulated=simulated)
        self._arguments = Arguments(
            made, shape, self.workloads, self.counts, self.timer, simulated=self.device.name == "simulated", seed=seed
        )
        self._rounds, self._quiet, self._seed = rounds, quiet, seed
        self._out = out
        self._header = Header(
            kernel=kernel.name,
            kernel_version=kernel_version(kernel),
            device=self.device,
            shape=shape,
            configs=self.configs,
            grids=tuple(kernel.grid(config, shape) for config in self.configs),
            timer=self.timer.name,
        )
        if out is not None:
            check_target(out)
        self._journal = Journal(journal_path(out), self._header, replace=replace)
        self._reused = 0
        try:
            if out is not None and not replace:
                self._reuse(out)
        except RampwrapError:
            self._journal.close()
            raise
        self._journal.cells.reasons.update(refused)
        self.reasons = self._journal.cells.reasons
        self.lost = Losses()
        self.progress = Progress(quiet=quiet)
        self._guard = Guard(
            *(self._journal, self.lost, self.timer, self.configs, self.keys),
            say=self.progress.say,
            patience_s=patience_s,
        )
        self._compiled: set[int] = set()
        self._start = time.monotonic()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        self._guard.close()
        self._journal.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self._journal.path and not self._quiet:
            kept = len(self._journal.cells.rows)
            print(
                f"Stopped. {kept} of {len(self.keys)} workloads are kept in {self._journal.path}; "
                "the same command goes on from there.",
                file=sys.stderr,
            )

    @property
    def elapsed(self) -> float:
        """Seconds since this bench was made."""
        return time.monotonic() - self._start

    def missing(self, row: int, configs: Sequence[int]) -> list[int]:
        """Those of the configs that may run on this workload and are not yet measured nor given up in this run."""
        if row in self.lost.rows:
            return []
        known = self._known(row)
        ran = {config for cells in self._journal.cells.rows.values() for config in cells}
        tired = self.lost.tired(ran)
        return [
            config
            for config in configs
            if not (config in known or config in self.reasons or config in tired or (row, config) in self.lost.cells)
        ]

    def measure(self, row: int, configs: Sequence[int]) -> FloatArray:
        """Microseconds of some configs on one workload, float64 [len(configs)]; NaN for a cell that has none.

        What fails is tried once more, without the others, whose graphs and memory are free by then.

        Raises:
            DeviceFault: a config lost the GPU; it is recorded as failed.
            TableError: the journal cannot be written.
        """
        self._probe()
        todo = self.missing(row, configs)
        for attempt in range(2):
            if not todo or row in self.lost.rows:
                break
            start = time.monotonic()
            cells = self._revisit(row, todo) if self.timer.drifts else self._time(row, todo)
            if cells:
                self._journal.append(self.keys[row], cells, time.monotonic() - start)
            failed = [config for config in todo if (row, config) in self.lost.cells]
            if attempt == 0:
                # Where none had room, one shows whether that was all there is to it.
                todo = failed[:1] if self._guard.short and not self._known(row) else failed
                for config in todo:
                    del self.lost.cells[row, config]
        known = self._known(row)
        if not known and row not in self.lost.rows:
            self.lost.skip(row)
        nan = (np.nan, np.nan)
        return np.array([(nan if config in self.reasons else known.get(config, nan))[0] for config in configs])

    def _known(self, row: int) -> dict[int, tuple[float, float]]:
        return self._journal.cells.rows.get(self.keys[row], {})

    def _reuse(self, out: str | os.PathLike[str]) -> None:
        """Takes over the cells of a table that stands at the place, and what it says of configs that end a process."""
        found = standing(out, self._header, self.keys)
        if found is None:
            return
        cells = self._journal.cells
        for key, row in cells_of(found, self._header).items():
            new = {config: cell for config, cell in row.items() if config not in cells.rows.get(key, {})}
            cells.rows.setdefault(key, {}).update(new)
            self._reused += len(new)
        number = index_by_key(self.configs)
        for config, why in found.notes.get("passed_over", {}).items():
            if config in number:
                cells.reasons[number[config]] = self._journal.booked[number[config]] = why

    def _probe(self) -> None:
        """Tries first, and alone, what was about to run when the last process ended; twice is enough."""
        if not self._journal.cells.begun:
            return
        begun: Begun = self._journal.cells.begun[0]
        self._journal.cells.begun.clear()
        if begun.begun >= len(self.configs) or begun.begun in self.reasons:
            return
        what = f"{format_config(self.configs[begun.begun])} on {begun.label}"
        deaths = begun.deaths + 1
        if deaths >= ENOUGH_DEATHS:
            self._journal.fail(begun.begun, f"the process ended {deaths} times while it ran on {begun.label}")
            self.progress.say(f"config {what}: {self.reasons[begun.begun]}; it is passed over.")
            return
        row = next((row for row, key in enumerate(self.keys) if key[:2] == (begun.label, begun.split)), None)
        if row is None:
            return
        self.progress.say(f"the process ended while config {what} ran; it is tried once more, alone.")
        kwargs = self._guard.made(row, self._arguments)
        if kwargs:
            with self._guard.launching(row, begun.begun, begin=deaths):
                call = functools.partial(self.kernel.launch, self.configs[begun.begun], **kwargs[0])
                self.timer.prepare([call]).sample()
            self.lost.cells.pop((row, begun.begun), None)  # it lived: whatever else it had is seen again
            self.timer.release()
        self._journal.pause()

    def _revisit(self, row: int, todo: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Times configs of a workload on the scale of its earlier visits.

        Compute-bound cells came out 2-4 % faster in a short visit than in a long one, at clocks not yet brought down:
        the best config known so far is timed again, and its ratio to then is taken out of the others.
        """
        known = self._known(row)
        if not known:
            return self._time(row, todo)
        best = min(known, key=lambda config: known[config][0])
        cells = self._time(row, [best, *todo])
        again = cells.pop(best, known[best])[0]
        scale = known[best][0] / again
        return {config: (us * scale, spread) for config, (us, spread) in cells.items()}

    def timings(self, rows: Sequence[int] | None = None, *, notes: dict[str, Any] | None = None) -> Timings:
        """The table of these workloads, all by default; those that were skipped are left out.

        Raises:
            ConfigError: there is no time in it.
        """
        chosen = [row for row in (range(len(self.keys)) if rows is None else rows) if row not in self.lost.rows]
        if not any(self._known(row) for row in chosen):
            missing = no_gpu() if not isinstance(getattr(self.kernel, "device", None), Device) else None
            start = f"there is no GPU ({missing}), and " if missing else ""
            raise ConfigError(start + self.lost.nothing(self.kernel.name, self.shape, self.reasons, self.keys))
        everything = {**self._provenance(), **self._losses(), **(notes or {})}
        table = to_timings(self._header, [self.keys[row] for row in chosen], self._journal.cells, everything)
        never = {config: why for (_, config), why in self.lost.cells.items() if np.isnan(table.us[:, config]).all()}
        return attrs.evolve(table, reasons=dict(sorted({**never, **table.reasons}.items())))

    def finish(self, timings: Timings, *, complete: bool = True) -> Timings:
        """Saves the table, where there is an output file, and removes the journal if nothing is left to measure."""
        if self._out is not None:
            timings.save(self._out)
            if complete:
                self._journal.remove()
        return timings

    def blank(self) -> Timings:
        """The table of all workloads as far as it is known, with nothing measured in it perhaps."""
        return to_timings(self._header, self.keys, self._journal.cells, {})

    def _losses(self) -> dict[str, Any]:
        """What a table lacks, and what it had already, for its notes."""
        found = self.lost.notes(self.keys, self.configs)
        if self._journal.booked:
            found["passed_over"] = {config_key(self.configs[c]): why for c, why in self._journal.booked.items()}
        if self._reused:
            found["reused_cells"] = self._reused
        return found

    def _time(self, row: int, todo: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Prepares all; the first round surveys them, the leaders are sampled in the others.

        The survey also brings the GPU to the clocks of sustained work: under a power limit, compute-bound launches
        ran 5-9 % faster in the first second than later, which is more than what configs differ by.
        """
        rng = np.random.default_rng([self._seed, row])
        samples: dict[int, list[list[float]]] = {}
        ready: dict[int, Timed] = {}

        def lost(config: int) -> bool:
            return config in self.reasons or (row, config) in self.lost.cells

        self._guard.short = False
        try:
            variants = self._guard.made(row, self._arguments)
            if not variants:
                return {}
            self._precompile(todo, variants[0])
            for config in todo:
                with self._guard.launching(row, config, begin=0):
                    chosen = self.configs[config]
                    calls = [functools.partial(self.kernel.launch, chosen, **kwargs) for kwargs in variants]
                    ready[config] = self.timer.prepare(calls)
                if config not in ready:
                    self.progress.advance()
            for done in range(self._rounds):
                for config in rng.permutation(np.array(list(ready), dtype=np.int64)).tolist():
                    with self._guard.launching(row, config, begin=None if done else 0):
                        taken = ready[config].sample()
                        samples.setdefault(config, []).append(taken)
                self._journal.pause()
                best = min((min(found[0]) for found in samples.values() if found), default=0.0)
                for config in list(ready):
                    hopeless = config in samples and min(samples[config][0]) > HOPELESS * best
                    if lost(config) or hopeless or done == self._rounds - 1:
                        del ready[config]
                        self.progress.advance()
        finally:
            ready.clear()
            self.timer.release()
        found = summarise({config: rounds for config, rounds in samples.items() if not lost(config)})
        if found:
            config = min(found, key=lambda index: found[index].us)
            text = f"{self.workloads[row].label}: {found[config].us:.1f} us with {format_config(self.configs[config])}"
            self.progress.found(text)
        return {config: (m.us, m.spread) for config, m in found.items()}

    def _precompile(self, todo: Sequence[int], arguments: dict[str, Any]) -> None:
        """Lets a kernel with a member ``precompile(configs, **arguments)`` compile in parallel what is new to it."""
        hook = getattr(self.kernel, "precompile", None)
        new = [config for config in todo if config not in self._compiled]
        self._compiled.update(new)
        if hook is not None and new:
            with contextlib.suppress(Exception):  # whatever cannot be compiled says so again when it is launched
                hook([self.configs[config] for config in new], **arguments)

    def _provenance(self) -> dict[str, Any]:
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rampwrap": __version__,
            **self.timer.provenance(),
            "rounds": self._rounds,
            "elapsed_s": round(self._journal.seconds, 1),
            "weight_bytes": self.shape.weight_bytes,
        }
