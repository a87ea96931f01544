"""For authors of kernels: the conformance suite and a simulated kernel. Imports `dispatch` and below; nothing but `cli` and tests imports it."""

from rampwrap.testing.conformance import check
from rampwrap.testing.sim import SimKernel

__all__ = ["SimKernel", "check"]
