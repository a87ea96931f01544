"""What a step of the ragged form takes, from a handful of measured points; and what follows for a layer, without a GPU.

The points are measured on an H200 (`benchmarks/ragged.py --points`, `NOTES.md` 8).
"""

from collections.abc import Sequence

import attrs

from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES, Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.schedule import TICK, UNIT_ROWS, WIDTHS, Work, pieces

STEP_BYTES = 128


@attrs.frozen
class Points:
    """Clocks of one SM, for one type of weights."""

    narrow: tuple[int, int]
    "Tokens, and clocks of multiplying a step of 256 weight rows with them where nothing waits for memory, ..."
    wide: tuple[int, int]
    "... and the same of more tokens."
    reread_bytes: float
    "Bytes of weights a clock from L2."
    unit: int
    "Clocks of a unit besides its steps."
    clock_mhz: float = 1755.0
    launches_us: float = 9.0
    "Of both GEMMs besides their work: their launches, the split, and the sums of fragments; 7.3 to 10.6 were measured."

    @property
    def slope(self) -> float:
        """Clocks of a step for each token."""
        return (self.wide[1] - self.narrow[1]) / (self.wide[0] - self.narrow[0])

    @property
    def base(self) -> float:
        """Clocks of a step without tokens."""
        return self.narrow[1] - self.slope * self.narrow[0]


POINTS = {
    "fp8": Points(narrow=(8, 787), wide=(96, 1966), reread_bytes=34.0, unit=3200),
    "bf16": Points(narrow=(64, 865), wide=(128, 1289), reread_bytes=34.0, unit=2500),
}
"Of Hopper; what its memory gives is the device's."


@attrs.frozen
class Costs:
    """The five numbers that the kernels are launched with, in clocks: see `schedule.Work`."""

    memory: int
    reread: int
    base: int
    slope: int
    overhead: int

    @classmethod
    def of(cls, device: Device, dtype: str) -> "Costs":
        """Those of a GPU.

        Raises:
            InputError: its bandwidth is not known, or no points were measured for the type.
        """
        if dtype not in POINTS:
            raise InputError(f"dtype {dtype} has no ragged form; use one of {', '.join(POINTS)}.")
        if not device.copy_gbps:
            raise InputError(f"the bandwidth of {device.name} is not known; give a device whose copy_gbps is stated.")
        its = POINTS[dtype]
        step = UNIT_ROWS * STEP_BYTES
        memory = step * device.num_sms / device.copy_gbps * its.clock_mhz * 1e-3
        return cls(
            round(memory), round(min(memory, step / its.reread_bytes)), round(its.base), round(its.slope), its.unit
        )


def known(device: Device) -> Device:
    """A device whose bandwidth is stated; for one of which nobody said it, as much for each SM as an H100 has."""
    if device.copy_gbps:
        return device
    h100 = DEVICES["nvidia-h100-80gb-hbm3"]
    assert h100.copy_gbps is not None
    return attrs.evolve(device, copy_gbps=h100.copy_gbps * device.num_sms / h100.num_sms)


def works_of(shape: MoEShape, costs: Costs) -> tuple[Work, Work]:
    """The lines of both GEMMs of a layer, gate+up and down."""
    columns = STEP_BYTES if shape.dtype == "fp8" else STEP_BYTES // 2
    numbers = attrs.astuple(costs)
    up = Work(WIDTHS[shape.dtype], 2 * shape.intermediate_size // UNIT_ROWS, shape.hidden_size // columns, *numbers)
    down = Work(WIDTHS[shape.dtype], shape.hidden_size // UNIT_ROWS, shape.intermediate_size // columns, *numbers)
    return up, down


@attrs.frozen
class Predicted:
    """One GEMM for one histogram."""

    each_us: tuple[float, ...]
    "Of each CTA, one an SM; 0 of those without work."
    fragments: int
    steps: int

    @property
    def ctas(self) -> int:
        """That get work."""
        return sum(us > 0 for us in self.each_us)

    @property
    def mean_us(self) -> float:
        """Of all CTAs."""
        return sum(self.each_us) / len(self.each_us)

    @property
    def most_us(self) -> float:
        """Of the CTA with the most, which is the GEMM's time without its launch."""
        return max(self.each_us)


@attrs.frozen
class Explained:
    """A layer for one histogram, as predicted."""

    widths: dict[int, int]
    "Experts by wgmma width; an expert of several passes counts at that of each pass."
    passes: int
    "Of all experts; as many as experts have tokens where each goes through once."
    up: Predicted
    down: Predicted
    us: float
    "Both GEMMs with their launches; alignment, quantisation and the sum come on top."

    def __str__(self) -> str:
        widths = ", ".join(f"{number} x {width}" for width, number in self.widths.items())
        shares = "; ".join(
            f"{name}: {its.steps} steps on {its.ctas} CTAs, {its.fragments} fragments, {its.mean_us:.1f} us a CTA, "
            f"at most {its.most_us:.1f}"
            for name, its in (("gate+up", self.up), ("down", self.down))
        )
        return f"widths {widths or 'none'} ({self.passes} passes); {shares}; predicted {self.us:.1f} us for both GEMMs"


def explain(shape: MoEShape, counts: Sequence[int], device: Device) -> Explained:
    """What the ragged form does with a histogram, and how long its GEMMs take by the points.

    Args:
        shape: bf16 or FP8, with sizes that the form runs (`configs.why_illegal`).
        counts: tokens of each local expert.
        device: its number of SMs and bandwidth.
    """
    counts = [int(count) for count in counts]
    works = works_of(shape, Costs.of(device, shape.dtype))
    tick_us = (1 << TICK) / POINTS[shape.dtype].clock_mhz
    found = []
    for work in works:
        mine = pieces(work, counts, device.num_sms)
        found.append(
            Predicted(
                tuple(sum(piece.cost for piece in some) * tick_us for some in mine),
                sum(not piece.owned() for some in mine for piece in some),
                sum(work.units(count) for count in counts) * work.steps,
            )
        )
    widths: dict[int, int] = {}
    for count in counts:
        for turn in range(works[0].passes(count)):
            width = works[0].width(works[0].tokens(turn, count))
            widths[width] = widths.get(width, 0) + 1
    up, down = found
    us = up.most_us + down.most_us + POINTS[shape.dtype].launches_us
    return Explained(dict(sorted(widths.items())), sum(widths.values()), up, down, us)
