"""What ran: tallies of layers, and statistics, metrics and log lines made of them. Imports `routing` and `kernel`; `dispatch` and `engines` report to it."""

from rampwrap.observe.registry import line, prometheus, start_log, stats, watch

__all__ = ["line", "prometheus", "start_log", "stats", "watch"]
