"""What every figure is filed with."""

import datetime
import importlib.metadata
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from rampwrap.kernel.device import Device


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
