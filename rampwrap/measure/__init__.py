"""Microseconds of configs on workloads: timers, journals, tables, profiles. Imports `kernel` and `routing`; any later room may import it."""
