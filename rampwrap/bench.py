"""`Bench`: a kernel with workloads, any cell of which can be timed once, and is kept whatever happens."""

import contextlib
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from rampwrap._version import __version__
from rampwrap.device import Device, device_of
from rampwrap.errors import ConfigError, DeviceFault, InputError
from rampwrap.grid import FloatArray, IntArray
from rampwrap.journal import Header, Journal, row_keys, to_timings
from rampwrap.kernel import Config, Kernel, MoEShape, check_configs, format_config, kernel_version, refusal
from rampwrap.routing import Workload
from rampwrap.timer import Measurement, Timed, Timer, default_timer
from rampwrap.timings import Timings

Inputs = Callable[..., dict[str, Any]]
"``inputs(shape, topk_ids, seed=0)``: keyword arguments for `Kernel.launch` on random data."

JOURNAL_SUFFIX = ".journal.jsonl"
# A config this many times slower than the best of its workload in the survey is not measured again: it will not be
# chosen, and the slowest configs are where most of the time would go.
HOPELESS = 1.25
# Of so many leaders the median drift between two rounds is known better than the time of any one of them.
ENOUGH_FOR_DRIFT = 8
# More shifts than this would need more copies of the activations than is worth a cold L2.
MAX_ROTATIONS = 16


class Bench:
    """A kernel with workloads, any cell of which can be timed: ``with Bench(...) as bench: bench.measure(0, [3, 7])``.

    Cells already in the journal are never timed again. What a kernel needs to be timed is described at `profile`.

    Attributes:
        counts: int64 [workloads, num_local_experts].
        reasons: configs that cannot run, with the reason.
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
        self.timer = timer or default_timer(self.device, shape)
        self._inputs: Inputs = made
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
        self._journal = Journal(journal_path(out), self._header)
        self._journal.cells.reasons.update(refused)
        self.reasons = self._journal.cells.reasons
        self._progress: Any = None
        self._compiled: set[int] = set()
        self._start = time.monotonic()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.close()
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

    def expect(self, cells: int) -> None:
        """Starts the progress bar, with the number of cells that will be timed."""
        from tqdm import tqdm

        # Where stderr is a file, a line every half minute; a terminal is redrawn at tqdm's own pace.
        every = 0.1 if sys.stderr.isatty() else 30.0
        self._progress = tqdm(
            total=cells, unit=" cells", disable=self._quiet, file=sys.stderr, mininterval=every, dynamic_ncols=True
        )

    def missing(self, row: int, configs: Sequence[int]) -> list[int]:
        """Those of the configs that can run and are not yet measured on this workload."""
        known = self._journal.cells.rows.get(self.keys[row], {})
        return [config for config in configs if config not in known and config not in self.reasons]

    def measure(self, row: int, configs: Sequence[int]) -> FloatArray:
        """Microseconds of some configs on one workload, float64 [len(configs)]; NaN for a config that cannot run.

        Raises:
            DeviceFault: a config lost the GPU; it is recorded as failed.
            TableError: the journal cannot be written.
        """
        todo = self.missing(row, configs)
        if todo:
            start = time.monotonic()
            cells = self._revisit(row, todo) if self.timer.drifts else self._time(row, todo)
            self._journal.append(self.keys[row], cells, time.monotonic() - start)
        known = self._journal.cells.rows.get(self.keys[row], {})
        nan = (np.nan, np.nan)
        return np.array([(nan if config in self.reasons else known.get(config, nan))[0] for config in configs])

    def _revisit(self, row: int, todo: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Times configs of a workload on the scale of its earlier visits.

        Compute-bound cells came out 2-4 % faster in a short visit than in a long one, at clocks not yet brought down:
        the best config known so far is timed again, and its ratio to then is taken out of the others.
        """
        known = self._journal.cells.rows.get(self.keys[row], {})
        if not known:
            return self._time(row, todo)
        best = min(known, key=lambda config: known[config][0])
        cells = self._time(row, [best, *todo])
        again = cells.pop(best, known[best])[0]
        scale = known[best][0] / again
        return {config: (us * scale, spread) for config, (us, spread) in cells.items()}

    def timings(self, rows: Sequence[int] | None = None, *, notes: dict[str, Any] | None = None) -> Timings:
        """The table of these workloads, all by default.

        Raises:
            ConfigError: no config ran.
        """
        if len(self.reasons) == len(self.configs):
            first = next(iter(self.reasons.values()))
            raise ConfigError(f"no config of kernel {self.kernel.name!r} can run {self.shape}; the first says: {first}")
        chosen = range(len(self.keys)) if rows is None else rows
        everything = {**self._provenance(), **(notes or {})}
        return to_timings(self._header, [self.keys[row] for row in chosen], self._journal.cells, everything)

    def finish(self, timings: Timings, *, complete: bool = True) -> Timings:
        """Saves the table, where there is an output file, and removes the journal if nothing is left to measure."""
        if self._out is not None:
            timings.save(self._out)
            if complete:
                self._journal.remove()
        return timings

    def _time(self, row: int, todo: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Prepares all; the first round surveys them, the leaders are sampled in the others.

        The survey also brings the GPU to the clocks of sustained work: under a power limit, compute-bound launches
        ran 5-9 % faster in the first second than later, which is more than what configs differ by.
        """
        rng = np.random.default_rng([self._seed, row])
        samples: dict[int, list[list[float]]] = {}
        ready: dict[int, Timed] = {}
        try:
            variants = self._arguments(row)
            self._precompile(todo, variants[0])
            for config in todo:
                with self._surviving(config):
                    chosen = self.configs[config]
                    calls = [functools.partial(self.kernel.launch, chosen, **kwargs) for kwargs in variants]
                    ready[config] = self.timer.prepare(calls)
                if config not in ready:
                    self._advance()
            for done in range(self._rounds):
                for config in rng.permutation(np.array(list(ready), dtype=np.int64)).tolist():
                    with self._surviving(config):
                        taken = ready[config].sample()
                        samples.setdefault(config, []).append(taken)
                best = min((min(found[0]) for found in samples.values() if found), default=0.0)
                for config in list(ready):
                    hopeless = config in samples and min(samples[config][0]) > HOPELESS * best
                    if config in self.reasons or hopeless or done == self._rounds - 1:
                        del ready[config]
                        self._advance()
        finally:
            ready.clear()
            self.timer.release()
        found = summarise({config: rounds for config, rounds in samples.items() if config not in self.reasons})
        if found and self._progress is not None:
            config = min(found, key=lambda index: found[index].us)
            text = f"{self.workloads[row].label}: {found[config].us:.1f} us with {format_config(self.configs[config])}"
            self._progress.set_postfix_str(text, refresh=False)
        return {config: (m.us, m.spread) for config, m in found.items()}

    def _precompile(self, todo: Sequence[int], arguments: dict[str, Any]) -> None:
        """Lets a kernel with a member ``precompile(configs, **arguments)`` compile in parallel what is new to it."""
        hook = getattr(self.kernel, "precompile", None)
        new = [config for config in todo if config not in self._compiled]
        self._compiled.update(new)
        if hook is not None and new:
            with contextlib.suppress(Exception):  # whatever cannot be compiled says so again when it is launched
                hook([self.configs[config] for config in new], **arguments)

    def _arguments(self, row: int) -> list[dict[str, Any]]:
        """Keyword arguments of a launch, once for each shift of the expert ids that the timer asks for."""
        import torch

        shape = self.shape
        ids = self.workloads[row].topk_ids(shape.num_experts, shape.top_k)
        active = int(np.count_nonzero(self.counts[row]))
        turns = 1
        if shape.num_local_experts == shape.num_experts:  # else a shift would move tokens between ranks
            turns = self.timer.rotations(shape.weight_bytes * active // shape.num_experts)
        turns = min(turns, MAX_ROTATIONS, shape.num_experts)
        where = "cpu" if self.device.name == "simulated" or not torch.cuda.is_available() else "cuda"
        variants = []
        for turn in range(turns):
            shifted = ((ids + turn * shape.num_experts // turns) % shape.num_experts).astype(np.int32)
            variants.append(self._inputs(shape, torch.from_numpy(shifted).to(where), seed=self._seed))
        return variants

    @contextlib.contextmanager
    def _surviving(self, config: int) -> Iterator[None]:
        """Turns whatever the body raises into the reason why `config` is NaN."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
            fault = self.timer.fault()
            self._journal.fail(config, reason)
            if fault is not None:
                kept = f"run the same command again to go on without it (kept in {self._journal.path})"
                raise DeviceFault(
                    f"config {format_config(self.configs[config])} lost the GPU ({fault}); "
                    + (kept if self._journal.path else "leave it out, and give an output file to keep what is measured")
                    + "."
                ) from error

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress.update(1)

    def _provenance(self) -> dict[str, Any]:
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rampwrap": __version__,
            **self.timer.provenance(),
            "rounds": self._rounds,
            "elapsed_s": round(self._journal.seconds, 1),
            "weight_bytes": self.shape.weight_bytes,
        }


def summarise(samples: Mapping[int, list[list[float]]]) -> dict[int, Measurement]:
    """Median and spread of each config, after the drift that all leaders share is taken out of every round.

    Args:
        samples: by config, its microseconds round by round; the survey first, and alone for configs that were out.
    """
    leaders = {config: rounds[1:] for config, rounds in samples.items() if len(rounds) > 1}
    if len(leaders) < ENOUGH_FOR_DRIFT:
        return {
            config: Measurement.of(np.concatenate(rounds[1:] or rounds).tolist()) for config, rounds in samples.items()
        }
    middle = {config: float(np.median(np.concatenate(rounds))) for config, rounds in leaders.items()}

    def drift(number: int) -> float:
        """Of a round, against the medians of the leaders it holds."""
        shares = [np.median(samples[c][number]) / middle[c] for c in leaders if len(samples[c]) > number]
        return float(np.median(shares))

    drifts = [drift(number) for number in range(max(map(len, samples.values())))]
    return {
        config: Measurement.of(
            [us / drifts[n] for n, part in enumerate(rounds) for us in part if n or len(rounds) == 1]
        )
        for config, rounds in samples.items()
    }


def journal_path(out: str | os.PathLike[str] | None) -> str | None:
    """Where the journal of a table lies: beside it."""
    return None if out is None else os.fspath(out) + JOURNAL_SUFFIX


def refusals(kernel: Kernel, configs: Sequence[Config], shape: MoEShape) -> dict[int, str]:
    """Configs that the kernel refuses, with its reasons.

    Raises:
        ConfigError: it refuses all of them.
    """
    said = {index: refusal(kernel, config, shape) for index, config in enumerate(configs)}
    refused = {index: reason for index, reason in said.items() if reason is not None}
    if len(refused) == len(configs):
        raise ConfigError(f"kernel {kernel.name!r} refuses every config for {shape}; the first: {refused[0]}")
    return refused
