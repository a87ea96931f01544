"""What every figure is filed with, and how calls are timed beside each other."""

import datetime
import importlib.metadata
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rampwrap.kernel.device import Device
from rampwrap.measure.timer import Measurement, Timer


def stamp() -> dict[str, Any]:
    """Command, date, commit, GPU and versions of a run."""
    root = pathlib.Path(__file__).parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
        commit = said.stdout.strip()
    except OSError:
        commit = ""
    versions = {}
    for name in ("torch", "triton", "vllm", "sglang"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": Device.current().label,
        "versions": versions,
    }


def geometric_mean(values: Any) -> float:
    """Of positive numbers, at least one."""
    return float(np.exp(np.log(np.asarray(values, dtype=float)).mean()))


def interleaved(timer: Timer, calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int) -> dict[str, float]:
    """Median microseconds of each, sampled in turn."""
    try:
        ready = {name: timer.prepare(some) for name, some in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, timed in ready.items():
                samples[name] += timed.sample()
    finally:
        timer.release()
    return {name: Measurement.of(found).us for name, found in samples.items()}
