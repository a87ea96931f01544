"""`profile`: times every config of a kernel on every workload, once, and keeps what it measured whatever happens."""

import os
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import TableError
from rampwrap.kernel.device import Device, device_of
from rampwrap.kernel.grid import FloatArray
from rampwrap.kernel.protocol import Config, Kernel, check_configs, kernel_version, refusals
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.inputs import Inputs
from rampwrap.measure.journal import journal_path
from rampwrap.measure.outlook import about
from rampwrap.measure.records import row_keys
from rampwrap.measure.session import PATIENCE_S, Bench
from rampwrap.measure.timer import Timer
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Workload


def profile(
    kernel: Kernel,
    shape: MoEShape,
    workloads: Sequence[Workload],
    *,
    configs: Sequence[Config] | None = None,
    out: str | os.PathLike[str] | None = None,
    timer: Timer | None = None,
    inputs: Inputs | None = None,
    rounds: int = 4,
    budget_s: float | None = None,
    device: Device | None = None,
    quiet: bool = False,
    seed: int = 0,
    replace: bool = False,
    patience_s: float = PATIENCE_S,
) -> Timings:
    """Times every config on every workload.

    A config that `kernel.supports` refuses becomes NaN, with its reason in `Timings.reasons`. A launch that raises costs
    its cell alone, tried twice; a workload whose inputs cannot be made, or on which nothing ran, is left out. The notes
    say so under ``failed`` and ``skipped``, and the same call measures what is missing. A config that ends the process,
    loses the GPU or hangs is passed over by the next call (``passed_over``).

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
        replace: overwrites what stands at `out`; by default its cells are taken over, and a table of anything else is
            refused. An unfinished profile of the same is gone on with all the same.
        patience_s: seconds after which a launch, its compilation included, counts as hung.

    Returns:
        Timings [workloads, configs].

    Raises:
        InputError, ConfigError: nothing that can be measured was asked for.
        TableError: `out` or its journal cannot be written, or is another profile's.
        DeviceFault: a config lost the GPU.
    """
    with Bench(
        kernel,
        shape,
        workloads,
        configs=configs,
        out=out,
        timer=timer,
        inputs=inputs,
        rounds=rounds,
        device=device,
        quiet=quiet,
        seed=seed,
        replace=replace,
        patience_s=patience_s,
    ) as bench:
        everything = range(len(bench.configs))
        bench.progress.expect(sum(len(bench.missing(row, everything)) for row in range(len(bench.keys))))
        done: list[int] = []
        timed = 0
        for row in np.random.default_rng(seed).permutation(len(bench.keys)).tolist():
            new = bool(bench.missing(row, everything))
            # The next workload takes as long as the last ones did on average; one is measured in any case.
            if new and budget_s is not None and done and bench.elapsed * (1 + 1 / max(timed, 1)) > budget_s:
                continue
            bench.measure(row, everything)
            done.append(row)
            timed += new and row not in bench.lost.rows
        left = len(bench.keys) - len(done)
        notes = {} if not left else {"gave_up": f"{left} of {len(bench.keys)} workloads: {budget_s:g} s were over."}
        return bench.finish(bench.timings(sorted(done), notes=notes), complete=not left)


def finished(
    out: str | os.PathLike[str] | None, kernel: Kernel, shape: MoEShape, workloads: Sequence[Workload]
) -> Timings | None:
    """The table at `out`, if it is a finished profile of the kernel as it is here, on this GPU and these workloads."""
    journal = journal_path(out)
    if out is None or journal is None or os.path.lexists(journal):  # no journal goes beside a FIFO
        return None
    try:
        found = Timings.load(out)
    except TableError:  # there is none, or it is cut off
        return None
    here = kernel.name, kernel_version(kernel), device_of(kernel).label, shape
    if (found.kernel, found.kernel_version, found.device.label, found.shape) != here:
        return None
    rows = zip(found.label, found.split, map(tuple, found.counts.tolist()), strict=True)
    return found if list(rows) == row_keys(shape, workloads) else None


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
    seconds: float | None
    "A projection from the device's bandwidth and matrix rate, first compilation included; None without a GPU."

    def __str__(self) -> str:
        text = f"{self.workloads} workloads x {self.configs} configs = {self.cells} cells"
        if self.refused:
            text += f" ({len(self.refused)} configs refused)"
        text += f", {self.weight_bytes / 1e6:.0f} MB of weights"
        return (
            f"{text}, about {about(self.seconds)}"
            if self.seconds is not None
            else f"{text}; no GPU to project a time for"
        )


def plan_profile(
    kernel: Kernel,
    shape: MoEShape,
    workloads: Sequence[Workload],
    *,
    configs: Sequence[Config] | None = None,
    rounds: int = 4,
    device: Device | None = None,
    compiled: bool = False,
) -> ProfilePlan:
    """Counts and projects without a launch; the arguments and errors of `profile`.

    Args:
        compiled: whether the configs are, as after a sweep of them.
    """
    stated = isinstance(device or getattr(kernel, "device", None), Device)
    device = device or device_of(kernel)
    configs = check_configs(kernel.configs if configs is None else configs, f"kernel {kernel.name!r}")
    refused = refusals(kernel, configs, shape)
    counts = np.array([counts for _, _, counts in row_keys(shape, workloads)])
    usable = len(configs) - len(refused)
    seconds: float | None = None
    if device.name == "simulated":
        # Measured: 0.06 ms a launch and its bookkeeping; what a kernel on the CPU takes is not known.
        seconds = 6e-5 * rounds * len(counts) * usable if stated else None
    else:
        # Set-up of a cell (eager launch, two captures) 10 ms, four replays of 0.4 ms or two launches a round; the average
        # config is 2.5 times the roofline. Most cells are hopeless after the first round: with 0.15 for each one more, six
        # tables of an H200, of two to four rounds, took 0.83-1.09 of what comes out.
        launch = 2.5e-6 * roofline_us(device, shape, counts)
        sampled = 4 * (1 + 0.15 * (rounds - 1))
        seconds = usable * float(np.sum(0.01 + sampled * np.maximum(4e-4, 2 * launch)))
        seconds += 0.0 if compiled else compiling_s(kernel, [its for i, its in enumerate(configs) if i not in refused])
    return ProfilePlan(len(counts), len(configs), refused, len(counts) * usable, shape.weight_bytes, seconds)


def compiling_s(kernel: Kernel, configs: Sequence[Config]) -> float:
    """Seconds that compiling configs takes, by a kernel's members ``precompile`` and ``must_compile`` where it has them."""
    must = getattr(kernel, "must_compile", None)
    if must is not None and not must(configs):
        return 0.0
    if not hasattr(kernel, "precompile") or len(configs) < 2:
        return 1.5 * len(configs)
    # Beside an H100 16 processes took 40 s for 200 configs of our Triton kernel, 10 s of it until they were there.
    return 10.0 + 2.4 * len(configs) / min(len(configs), os.cpu_count() or 1, 16)


def roofline_us(device: Device, shape: MoEShape, counts: npt.ArrayLike) -> FloatArray:
    """Microseconds that no config can beat: reading the active weights or the matrix rate. float64 [W]."""
    counts = np.atleast_2d(np.asarray(counts))
    active = np.count_nonzero(counts, axis=1) / shape.num_local_experts
    traffic = active * shape.weight_bytes / ((device.copy_gbps or 3000.0) * 1e3)
    rate = (device.fp8_tflops if shape.dtype == "fp8" else device.bf16_tflops) or 700.0
    flop = 6.0 * counts.sum(axis=1) * shape.hidden_size * shape.intermediate_size
    out: FloatArray = np.maximum(traffic, flop / (rate * 1e6))
    return out
