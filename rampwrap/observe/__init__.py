"""What ran: tallies of layers, and statistics, metrics and log lines made of them. Imports `routing` and `kernel`; `dispatch` and `engines` report to it."""

import importlib
from typing import TYPE_CHECKING, Any

from rampwrap.observe.registry import line, start_log, stats, watch

if TYPE_CHECKING:
    from rampwrap.observe.metrics import Collector, prometheus

__all__ = ["Collector", "line", "prometheus", "start_log", "stats", "watch"]


def __getattr__(name: str) -> Any:
    if name not in ("Collector", "prometheus"):  # which need prometheus_client
        raise AttributeError(f"module 'rampwrap.observe' has no attribute {name!r}")
    return getattr(importlib.import_module("rampwrap.observe.metrics"), name)
