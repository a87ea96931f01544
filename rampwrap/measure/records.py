"""What a profile under way records: how it measures, cells line by line, and the table that they make."""

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import InputError, TableError
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid, IntArray
from rampwrap.kernel.protocol import Config, check_configs, config_key
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import LEAST_US, MOST_COUNT, MOST_SPREAD, MOST_US, Timings
from rampwrap.routing.counts import first_counts
from rampwrap.routing.workloads import Workload
from rampwrap.schema import between

RowKey = tuple[str, str, tuple[int, ...]]
"What a row of the table is found by: label, split, histogram."


@attrs.frozen
class Header:
    """What was measured, and how: a journal with another header is never mixed in."""

    kernel: str
    kernel_version: str
    device: Device
    shape: MoEShape
    configs: tuple[Config, ...]
    grids: tuple[CtaGrid, ...]
    timer: str

    def __attrs_post_init__(self) -> None:
        check_configs(self.configs, "the journal")
        if len(self.grids) != len(self.configs):
            raise TableError(f"the journal has {len(self.configs)} configs and {len(self.grids)} grids.")

    def difference(self, other: "Header") -> str | None:
        """In words, the first thing in which `other` was measured differently; None if it goes together."""
        for name, mine, theirs in (
            ("kernel", self.kernel, other.kernel),
            ("kernel version", self.kernel_version, other.kernel_version),
            ("shape", self.shape, other.shape),
            ("device", self.device.name, other.device.name),
            ("number of SMs", self.device.num_sms, other.device.num_sms),
            ("timer", self.timer, other.timer),
            ("number of configs", len(self.configs), len(other.configs)),
        ):
            if mine != theirs:
                return f"{name} {theirs} instead of {mine}"
        for index, (config, old) in enumerate(zip(self.configs, other.configs, strict=True)):
            if config_key(config) != config_key(old):
                return f"config {index} {config_key(old)} instead of {config_key(config)}"
        return None


@attrs.frozen
class Measured:
    """A line of the file: cells of one row, as (config, microseconds, spread)."""

    label: str
    split: str
    counts: tuple[int, ...]
    cells: tuple[tuple[int, float, float], ...] = attrs.field()
    seconds: float = attrs.field(default=0.0, validator=between(0, 1e9, TableError, whole=False))

    @cells.validator
    def _times(self, attribute: "attrs.Attribute[Any]", value: tuple[tuple[int, float, float], ...]) -> None:
        for config, us, spread in value:
            if not (LEAST_US <= us <= MOST_US and 0 <= spread <= MOST_SPREAD):
                raise TableError(f"config {config} took {us} us with a spread of {spread}, which cannot be.")

    def check(self, header: Header) -> None:
        """Whether it is of this profile; TableError where a config or an expert is not."""
        if len(self.counts) != header.shape.num_local_experts or not all(0 <= n <= MOST_COUNT for n in self.counts):
            raise TableError(f"counts is no histogram of {header.shape.num_local_experts} experts.")
        for config, _, _ in self.cells:
            check_index(config, header)


@attrs.frozen
class Failed:
    """A line of the file: a config that ends or hangs what runs it."""

    failed: int
    reason: str

    def check(self, header: Header) -> None:
        """Whether it is of this profile; TableError where it has no such config."""
        check_index(self.failed, header)


@attrs.frozen
class Begun:
    """The last line of a file whose process ended meanwhile: a launch that was about to happen."""

    begun: int
    label: str
    split: str
    deaths: int = attrs.field(default=0, validator=between(0, 1000, TableError))
    "How often the process had ended in it before."

    def check(self, header: Header) -> None:
        """Whether it is of this profile; TableError where it has no such config."""
        check_index(self.begun, header)


def check_index(config: int, header: Header) -> None:
    """TableError where a profile has no such config."""
    if config not in range(len(header.configs)):
        raise TableError(f"config {config} is none of the {len(header.configs)} of this profile.")


@attrs.frozen
class Cells:
    """What is known so far: by row, then by config, microseconds and spread."""

    rows: dict[RowKey, dict[int, tuple[float, float]]] = attrs.field(factory=dict)
    reasons: dict[int, str] = attrs.field(factory=dict)
    "Why a config cannot run, by its index."
    begun: list[Begun] = attrs.field(factory=list)
    "What was about to run when nothing more was recorded: one entry, or none."

    def add(self, record: "Measured | Failed | Begun") -> float:
        """Takes in one record of the file and returns the seconds it took."""
        self.begun.clear()
        if isinstance(record, Begun):
            self.begun.append(record)
            return 0.0
        if isinstance(record, Failed):
            self.reasons[record.failed] = record.reason
            return 0.0
        key = (record.label, record.split, record.counts)
        self.rows.setdefault(key, {}).update({config: (us, spread) for config, us, spread in record.cells})
        return record.seconds


def to_timings(header: Header, rows: Sequence[RowKey], cells: Cells, notes: dict[str, Any]) -> Timings:
    """The table of these rows, in this order; a config that failed anywhere is NaN everywhere."""
    us = np.full((len(rows), len(header.configs)), np.nan)
    spread = np.full_like(us, np.nan)
    for row, key in enumerate(rows):
        for config, pair in cells.rows.get(key, {}).items():
            if config not in cells.reasons:
                us[row, config], spread[row, config] = pair
    counts: IntArray = np.array([counts for _, _, counts in rows], dtype=np.int64)
    return Timings(
        us=us,
        counts=counts,
        split=tuple(split for _, split, _ in rows),
        label=tuple(label for label, _, _ in rows),
        kernel=header.kernel,
        device=header.device,
        shape=header.shape,
        configs=header.configs,
        grids=header.grids,
        kernel_version=header.kernel_version,
        spread=spread,
        reasons=dict(sorted(cells.reasons.items())),
        notes=notes,
    )


def row_keys(shape: MoEShape, workloads: Sequence[Workload]) -> list[RowKey]:
    """Label, split and histogram of each workload; experts of this rank are the first `num_local_experts`.

    Raises:
        InputError: there is no workload, or one without tokens.
    """
    if not workloads:
        raise InputError("there are no workloads to profile; give at least one token count and one routing.")
    keys = []
    for workload in workloads:
        if workload.num_tokens < 1:
            raise InputError(f"a workload has {workload.num_tokens} tokens; give at least 1.")
        ids = workload.topk_ids(shape.num_experts, shape.top_k)
        counts = first_counts(ids, shape)
        keys.append((workload.label, workload.split, tuple(counts.tolist())))
    return keys
