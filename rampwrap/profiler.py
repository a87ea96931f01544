"""`profile`: times every config of a kernel on every workload, once, and keeps what it measured whatever happens."""

import contextlib
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import attrs
import numpy as np

from rampwrap._version import __version__
from rampwrap.device import Device
from rampwrap.errors import ConfigError, InputError
from rampwrap.grid import FloatArray, IntArray
from rampwrap.journal import Header, Journal, row_keys, to_timings
from rampwrap.kernel import Config, Kernel, MoEShape, check_configs, format_config, kernel_version, refusal
from rampwrap.routing import Workload
from rampwrap.timer import DeviceFault, Measurement, Timed, Timer, default_timer, roofline_us
from rampwrap.timings import Timings

Inputs = Callable[..., dict[str, Any]]
"``inputs(shape, topk_ids, seed=0)``: keyword arguments for `Kernel.launch` on random data."

JOURNAL_SUFFIX = ".journal.jsonl"
# A config this many times slower than the best of its workload after the first round is not measured again: it
# will not be chosen, and the slowest configs are where most of the time would go.
HOPELESS = 2.0
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
        rounds: int = 3,
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
            cells = self._time(row, todo)
            self._journal.append(self.keys[row], cells, time.monotonic() - start)
        known = self._journal.cells.rows.get(self.keys[row], {})
        nan = (np.nan, np.nan)
        return np.array([(nan if config in self.reasons else known.get(config, nan))[0] for config in configs])

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
        """Prepares all, samples in shuffled rounds."""
        rng = np.random.default_rng([self._seed, row])
        samples: dict[int, list[float]] = {}
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
                        samples[config] = samples.get(config, []) + taken
                best = min((min(values) for values in samples.values()), default=0.0)
                for config in list(ready):
                    hopeless = config in samples and min(samples[config]) > HOPELESS * best
                    if config in self.reasons or hopeless or done == self._rounds - 1:
                        del ready[config]
                        self._advance()
        finally:
            ready.clear()
            self.timer.release()
        found = {config: Measurement.of(values) for config, values in samples.items() if config not in self.reasons}
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


def profile(
    kernel: Kernel,
    shape: MoEShape,
    workloads: Sequence[Workload],
    *,
    configs: Sequence[Config] | None = None,
    out: str | os.PathLike[str] | None = None,
    timer: Timer | None = None,
    inputs: Inputs | None = None,
    rounds: int = 3,
    budget_s: float | None = None,
    device: Device | None = None,
    quiet: bool = False,
    seed: int = 0,
) -> Timings:
    """Times every config on every workload.

    A config that `kernel.supports` refuses or that raises becomes NaN, with its reason in `Timings.reasons`.
    Measured workloads are on disk (`journal_path(out)`) before the next one starts: after a kill, Ctrl-C or a full
    disk the same call goes on where it stopped, and `journal.read_journal` reads what is there.

    Args:
        kernel: what to time.
        shape: the layer.
        configs: which configs; all of the kernel's by default.
        workloads: rows of the table, in this order; they are measured in a shuffled one, so that the projected
            time is sound and a budget leaves a bit of everything.
        out: the table's file; None keeps no journal either.
        timer: `default_timer` by default.
        inputs: makes the arguments of a launch; `kernel.inputs` by default.
        rounds: how often each config is sampled, in turn with all others.
        budget_s: seconds after which no further workload is begun; the table then holds the finished ones, and the
            journal stays for another run.
        device: where it runs; the kernel's own `device` or torch's GPU by default.
        quiet: no progress on stderr.
        seed: of the input data and of the order.

    Returns:
        Timings [workloads, configs].

    Raises:
        InputError, ConfigError: nothing that can be measured was asked for.
        TableError: `out` or its journal cannot be written, or the journal is another profile's.
        DeviceFault: a config lost the GPU.
    """
    options = {"configs": configs, "out": out, "timer": timer, "inputs": inputs, "rounds": rounds, "device": device}
    with Bench(kernel, shape, workloads, quiet=quiet, seed=seed, **options) as bench:  # type: ignore[arg-type]
        everything = range(len(bench.configs))
        bench.expect(sum(len(bench.missing(row, everything)) for row in range(len(bench.keys))))
        done: list[int] = []
        timed = 0
        for row in np.random.default_rng(seed).permutation(len(bench.keys)).tolist():
            new = bool(bench.missing(row, everything))
            # The next workload takes as long as the last ones did on average; one is measured in any case.
            if new and budget_s is not None and done and bench.elapsed * (1 + 1 / max(timed, 1)) > budget_s:
                continue
            bench.measure(row, everything)
            done.append(row)
            timed += new
        left = len(bench.keys) - len(done)
        notes = {} if not left else {"gave_up": f"{left} of {len(bench.keys)} workloads: {budget_s:g} s were over."}
        return bench.finish(bench.timings(sorted(done), notes=notes), complete=not left)


@attrs.frozen
class ProfilePlan:
    """What a call of `profile` would do."""

    workloads: int
    configs: int
    refused: dict[int, str]
    "Configs that the kernel refuses, with its reason."
    cells: int
    "Cells to time: workloads x configs without the refused ones."
    weight_bytes: int
    seconds: float
    "A projection from the device's bandwidth and matrix rate; first compilation included."

    def __str__(self) -> str:
        text = f"{self.workloads} workloads x {self.configs} configs = {self.cells} cells"
        if self.refused:
            text += f" ({len(self.refused)} configs refused)"
        return f"{text}, {self.weight_bytes / 1e6:.0f} MB of weights, about {_clock(self.seconds)}"


def plan_profile(
    kernel: Kernel,
    shape: MoEShape,
    workloads: Sequence[Workload],
    *,
    rounds: int = 3,
    device: Device | None = None,
) -> ProfilePlan:
    """Counts and projects without a launch; the arguments and errors of `profile`."""
    device = device or device_of(kernel)
    configs = check_configs(kernel.configs, f"kernel {kernel.name!r}")
    refused = refusals(kernel, configs, shape)
    counts = np.array([counts for _, _, counts in row_keys(shape, workloads)])
    usable = len(configs) - len(refused)
    seconds = 0.0
    if device.name != "simulated":
        # Set-up of a cell (eager launch, two captures) 10 ms, a compilation 1.5 s, four replays of 0.4 ms or two
        # launches a round; the average config is 2.5 times the roofline.
        launch = 2.5e-6 * roofline_us(device, shape, counts)
        seconds = usable * (1.5 + float(np.sum(0.01 + 4 * rounds * np.maximum(4e-4, 2 * launch))))
    return ProfilePlan(len(counts), len(configs), refused, len(counts) * usable, shape.weight_bytes, seconds)


def journal_path(out: str | os.PathLike[str] | None) -> str | None:
    """Where the journal of a table lies: beside it."""
    return None if out is None else os.fspath(out) + JOURNAL_SUFFIX


def device_of(kernel: Kernel) -> Device:
    """The device a kernel says it runs on (a simulated one does), else torch's GPU."""
    stated = getattr(kernel, "device", None)
    return stated if isinstance(stated, Device) else Device.current()


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


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
