"""rampwrap launches, at each step, the MoE kernel config that is fastest for that step's expert histogram.

A public name is imported where it is first used (PEP 562): ``import rampwrap`` alone loads not even numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rampwrap._version import __version__

if TYPE_CHECKING:
    from rampwrap import observe
    from rampwrap.compare.evaluate import replay
    from rampwrap.compare.oracle import Oracle
    from rampwrap.dispatch.graph import GraphDispatcher
    from rampwrap.dispatch.host import Dispatcher
    from rampwrap.ep.group import ExpertParallel
    from rampwrap.ep.received import Received
    from rampwrap.errors import RampwrapError
    from rampwrap.kernel.activation import Activation
    from rampwrap.kernel.device import Device
    from rampwrap.kernel.grid import CtaGrid
    from rampwrap.kernel.portfolio import Portfolio
    from rampwrap.kernel.protocol import Config, Kernel, format_config
    from rampwrap.kernel.shape import SHAPES, MoEShape
    from rampwrap.measure.full import profile
    from rampwrap.measure.timings import Timings
    from rampwrap.observe.registry import stats
    from rampwrap.plan.make import make_plan
    from rampwrap.plan.plan import Plan
    from rampwrap.policy.policies import Choice, Pinned, Policy, Static, WaveCost
    from rampwrap.routing.counts import expert_counts
    from rampwrap.routing.workloads import Routing, Workload, workload_grid

_HOME = {
    "Activation": "kernel.activation",
    "Choice": "policy.policies",
    "Config": "kernel.protocol",
    "CtaGrid": "kernel.grid",
    "Device": "kernel.device",
    "Dispatcher": "dispatch.host",
    "ExpertParallel": "ep.group",
    "GraphDispatcher": "dispatch.graph",
    "Kernel": "kernel.protocol",
    "MoEShape": "kernel.shape",
    "Oracle": "compare.oracle",
    "Pinned": "policy.policies",
    "Plan": "plan.plan",
    "Policy": "policy.policies",
    "Portfolio": "kernel.portfolio",
    "RampwrapError": "errors",
    "Received": "ep.received",
    "Routing": "routing.workloads",
    "SHAPES": "kernel.shape",
    "Static": "policy.policies",
    "Timings": "measure.timings",
    "WaveCost": "policy.policies",
    "Workload": "routing.workloads",
    "expert_counts": "routing.counts",
    "format_config": "kernel.protocol",
    "make_plan": "plan.make",
    "profile": "measure.full",
    "replay": "compare.evaluate",
    "stats": "observe.registry",
    "workload_grid": "routing.workloads",
}
"The module of each public name. A type checker reads the imports above; a test compares both."

__all__ = [
    "SHAPES",
    "Activation",
    "Choice",
    "Config",
    "CtaGrid",
    "Device",
    "Dispatcher",
    "ExpertParallel",
    "GraphDispatcher",
    "Kernel",
    "MoEShape",
    "Oracle",
    "Pinned",
    "Plan",
    "Policy",
    "Portfolio",
    "RampwrapError",
    "Received",
    "Routing",
    "Static",
    "Timings",
    "WaveCost",
    "Workload",
    "__version__",
    "expert_counts",
    "format_config",
    "make_plan",
    "observe",
    "profile",
    "replay",
    "stats",
    "workload_grid",
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
