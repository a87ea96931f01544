"""A short sweep: which of a kernel's configs can matter, so that the others are not timed on every workload.

The CuTe kernels list 148 configs and our Triton kernel 80 (162 and 50 in FP8). When these were 592 and 167, a table of the 40
of each that a sweep over 14 workloads keeps took 150 s and 110 s on an H200; all cells of the Triton kernel alone took 255 s.
"""

import os
from collections.abc import Sequence

import numpy as np

from rampwrap.kernel.protocol import Config, Kernel, config_key
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import finished, profile
from rampwrap.measure.timer import Timer
from rampwrap.measure.timings import Timings
from rampwrap.routing.workloads import Routing, Workload, workload_grid

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
ROUTINGS = ("uniform", "dirichlet:0.2")
KEEP = 1.04
"A config is kept if it is within this factor of the best one at some workload of the sweep."


def sweep(
    kernel: Kernel,
    shape: MoEShape,
    most: int,
    *,
    workloads: Sequence[Workload] = (),
    configs: Sequence[Config] | None = None,
    out: str | os.PathLike[str] | None = None,
    timer: Timer | None = None,
    quiet: bool = False,
    seed: int = 0,
) -> list[Config]:
    """The configs to profile: those near the best at some workload of a short sweep, or all where there are few.

    Args:
        kernel, shape, configs, timer, quiet, seed: as for `profile`.
        most: configs to keep; at least one for each workload of the sweep that a config of its own wins.
        workloads: what will be profiled: the sweep stays within their token counts.
        out: keeps the sweep, so that the same call keeps the same configs.

    Raises:
        As `profile`.
    """
    configs = list(kernel.configs if configs is None else configs)
    if len(configs) <= most:
        return configs
    rows = sweep_workloads(workloads, seed)
    # Another choice of configs would keep a profile that was killed from going on.
    found = finished(out, kernel, shape, rows)
    if found is None or list(map(config_key, found.configs)) != list(map(config_key, configs)):
        found = profile(
            kernel, shape, rows, configs=configs, out=out, timer=timer, rounds=1, quiet=quiet, seed=seed, replace=True
        )
        # What a run that goes on will read: a file holds float32.
        found = found if out is None else Timings.load(out)
    return worth_keeping(found, most)


def sweep_workloads(workloads: Sequence[Workload] = (), seed: int = 0) -> list[Workload]:
    """Rows of the sweep, other draws than those to be profiled and within their token counts."""
    wanted = [its.num_tokens for its in workloads] or [*TOKENS]
    low, high = min(wanted), max(wanted)
    tokens = sorted({low, high, *(each for each in TOKENS if low <= each <= high)})
    return workload_grid(tokens, [Routing.parse(text) for text in ROUTINGS], "train", seed + 2)


def worth_keeping(timings: Timings, most: int, within: float = KEEP) -> list[Config]:
    """Winners first, then the configs that are within a factor of the best at most workloads."""
    timings = timings.take(np.flatnonzero(np.isfinite(timings.us).any(axis=1)))
    near = timings.us <= np.nanmin(timings.us, axis=1, keepdims=True) * within
    winners = np.unique(np.nanargmin(timings.us, axis=1)).tolist()
    often = [int(i) for i in np.argsort(-near.sum(axis=0), kind="stable") if near[:, i].any()]
    kept = list(dict.fromkeys([*winners, *often]))
    return [timings.configs[index] for index in kept[: max(most, len(winners))]]
