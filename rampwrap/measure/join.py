"""Timing tables of several kernels, measured one by one, as the one table that profiling their `Portfolio` gives."""

from collections.abc import Sequence

import attrs
import numpy as np

from rampwrap.errors import TableError
from rampwrap.kernel.names import joint_name, joint_version, members_of
from rampwrap.kernel.protocol import MEMBER
from rampwrap.measure.timings import Timings


def join(tables: Sequence[Timings]) -> Timings:
    """The configs of all kernels side by side, over the workloads that every table has.

    Measure them one after the other on one GPU, with the same token counts, routings and seeds: what two kernels are
    compared by here are times of two runs.

    Args:
        tables: of different kernels; one alone comes back as it is.

    Raises:
        TableError: no tables, two of one kernel, one that is joined already, or tables of different shapes, GPUs or
            workloads.
    """
    if not tables:
        raise TableError("there is no table to join; give at least one.")
    first = tables[0]
    if len(tables) == 1:
        return first
    names = [table.kernel for table in tables]
    if len(set(names)) < len(names):
        raise TableError(f"two of the tables are of one kernel ({', '.join(names)}); give one table for each.")
    for table in tables:
        if members_of(table.kernel) or any(MEMBER in config for config in table.configs):
            raise TableError(f"the table of {table.kernel} is joined already, or has a key {MEMBER!r}; give its parts.")
        for what, mine, its in (("shape", first.shape, table.shape), ("GPU", first.device.label, table.device.label)):
            if mine != its:
                raise TableError(
                    f"the tables of {first.kernel} and {table.kernel} differ in {what} ({mine} and {its}); "
                    "profile both kernels for one layer on one GPU."
                )
    rows = [_rows(table) for table in tables]
    common = [key for key in rows[0] if all(key in its for its in rows[1:])]
    if not common:
        raise TableError(
            f"the tables of {', '.join(names)} share no workload; "
            "profile with the same token counts, routings and seed."
        )
    parts = [table.take(np.array([its[key] for key in common])) for table, its in zip(tables, rows, strict=True)]
    gave_up = [f"{part.kernel}: {part.notes['gave_up']}" for part in parts if part.notes.get("gave_up")]
    offsets = np.cumsum([0, *(len(part.configs) for part in parts)]).tolist()
    spreads = [part.spread for part in parts if part.spread is not None]
    return attrs.evolve(
        parts[0],
        us=np.hstack([part.us for part in parts]),
        spread=np.hstack(spreads) if len(spreads) == len(parts) else None,
        reasons={at + i: why for at, part in zip(offsets, parts, strict=False) for i, why in part.reasons.items()},
        kernel=joint_name(names),
        kernel_version=joint_version([part.kernel_version for part in parts]),
        configs=tuple({MEMBER: part.kernel, **config} for part in parts for config in part.configs),
        grids=tuple(grid for part in parts for grid in part.grids),
        notes={
            "members": {part.kernel: dict(part.notes) for part in parts},
            **({"gave_up": " ".join(gave_up)} if gave_up else {}),
        },
    )


def _rows(table: Timings) -> dict[tuple[str, str, bytes], int]:
    """Where each workload stands; of equal ones the last."""
    keys = zip(table.split, table.label, (row.tobytes() for row in table.counts), strict=True)
    return {key: index for index, key in enumerate(keys)}
