"""rampwrap launches, at each step, the MoE kernel config that is fastest for that step's expert histogram.

A public name is imported where it is first used (PEP 562): ``import rampwrap`` alone loads not even numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rampwrap._version import __version__

if TYPE_CHECKING:
    from rampwrap import observe
    from rampwrap.device import Device
    from rampwrap.dispatch import Dispatcher
    from rampwrap.errors import RampwrapError
    from rampwrap.grid import CtaGrid
    from rampwrap.kernel import Config, Kernel, MoEShape
    from rampwrap.observe import stats
    from rampwrap.plan import Plan
    from rampwrap.policy import Choice, Oracle, Pinned, Policy, Static, WaveCost
    from rampwrap.routing import Routing, Workload, expert_counts
    from rampwrap.timings import Timings

_HOME = {
    "Choice": "policy",
    "Config": "kernel",
    "CtaGrid": "grid",
    "Device": "device",
    "Dispatcher": "dispatch",
    "Kernel": "kernel",
    "MoEShape": "kernel",
    "Oracle": "policy",
    "Pinned": "policy",
    "Plan": "plan",
    "Policy": "policy",
    "RampwrapError": "errors",
    "Routing": "routing",
    "Static": "policy",
    "Timings": "timings",
    "WaveCost": "policy",
    "Workload": "routing",
    "expert_counts": "routing",
    "stats": "observe",
}
"The module of each public name. A type checker reads the imports above; a test compares both."

__all__ = [
    "Choice",
    "Config",
    "CtaGrid",
    "Device",
    "Dispatcher",
    "Kernel",
    "MoEShape",
    "Oracle",
    "Pinned",
    "Plan",
    "Policy",
    "RampwrapError",
    "Routing",
    "Static",
    "Timings",
    "WaveCost",
    "Workload",
    "__version__",
    "expert_counts",
    "observe",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name == "observe":
        return importlib.import_module("rampwrap.observe")
    if name not in _HOME:
        raise AttributeError(f"module 'rampwrap' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"rampwrap.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
