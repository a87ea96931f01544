"""rampwrap launches, at each step, the MoE kernel config that is fastest for that step's expert histogram."""

from rampwrap._version import __version__
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
    "stats",
]
