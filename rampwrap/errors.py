"""Every error rampwrap raises on purpose.

    RampwrapError
    +-- InputError (ValueError)      expert ids, counts, tensors, arguments
    +-- ConfigError (ValueError)     a kernel's configs: none, twice the same, not runnable
    +-- TableError (ValueError)      a timing table that cannot be read or makes no sense
    +-- FitError (ValueError)        timings from which no model can be fitted
    +-- PlanError (ValueError)       a plan file that cannot be read
    |   +-- PlanMismatchError         a sound plan for another GPU, dtype, shape or kernel version
    +-- CaptureError (RuntimeError)  something that must not happen under CUDA graph capture
    +-- DeviceFault (RuntimeError)   the GPU context is lost
    +-- GroupError (RuntimeError)    ranks of a group disagree, one refused its part, or one did not arrive

A message is one sentence that names the offending value and the fix.
"""


class RampwrapError(Exception):
    """Base of all errors raised by rampwrap."""


class InputError(RampwrapError, ValueError):
    """Expert ids, counts, tensors or arguments that make no sense."""


class ConfigError(RampwrapError, ValueError):
    """A kernel's config list is empty, holds duplicates, or a config cannot run."""


class TableError(RampwrapError, ValueError):
    """A timing table that cannot be read or whose content contradicts itself."""


class FitError(RampwrapError, ValueError):
    """Timings from which no cost model can be fitted."""


class PlanError(RampwrapError, ValueError):
    """A plan file that cannot be read."""


class PlanMismatchError(PlanError):
    """A sound plan, made for another GPU, dtype, shape, kernel or kernel version."""


class CaptureError(RampwrapError, RuntimeError):
    """A host-side choice, allocation or timing was asked for under CUDA graph capture."""


class DeviceFault(RampwrapError, RuntimeError):  # noqa: N818
    """The GPU context is lost (illegal address, device assert); only a new process can use the GPU again."""


class GroupError(RampwrapError, RuntimeError):
    """Ranks of a group disagree, one of them refused its part, or one did not arrive."""
