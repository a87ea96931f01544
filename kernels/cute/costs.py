"""What the ragged form does with a histogram, and how long a layer should take, without a GPU.

A model of tiles: an SM takes a number of clocks for each step of its tiles, by the tile's width, and all of them together read the
weights of the active experts once; a GEMM takes the root of the squares of both. Its numbers were fitted to 3639 timings of whole
layers in the two-launch form, whose tiles are of one width: OLMoE and Qwen3-30B on an H200, 32 to 1024 tokens, each within 1.6x of
the best. They lie 2.5-2.8 % (one standard deviation) beside the model. A shortened race on an H100 gave one number more, how fast an
H100 reads: with it the ragged form's times from 2 tokens on are 1.00x the prediction, give or take 1.4 % in bf16 and 2.7 % in FP8, but 1.04x from 512 tokens in FP8;
at one token 0.94x (`benchmarks/predicted.py`). An H200 was not measured since L2 fetches 256 bytes, and may read faster than its figures say.
"""

import math
from collections import Counter
from collections.abc import Sequence

import attrs

from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES, Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.configs import CuteConfig, all_configs, why_illegal
from rampwrap.kernels.cute.defaults import default

ROWS = 256
"Weight rows of a tile that `Points` are of."


@attrs.frozen
class Points:
    """Of one type of weights, on Hopper."""

    base: float
    "Clocks of a step of 256 weight rows, ..."
    slope: float
    "... and more for each column of its wgmma."
    reading: float
    "Bytes that are read in the time of one that a copy reads or writes: what is read alone comes faster."
    fixed_us: float
    "Of a layer besides both GEMMs, and their launches, ..."
    token_us: float
    "... and more for each token."
    clock_mhz: float = 1755.0

    def step(self, width: int) -> float:
        """Clocks of a step of 256 weight rows."""
        return self.base + self.slope * width


POINTS = {"fp8": Points(637, 8.58, 1.14, 11.7, 0.029), "bf16": Points(811, 2.64, 1.175, 9.6, 0.049)}
READING = {"H100": {"fp8": 1.06, "bf16": 1.09}}
"Other figures for `Points.reading`, by a word of the device's name."


def points_of(device: Device, dtype: str) -> Points:
    """The points of a type of weights on a device."""
    points = POINTS[dtype]
    others = [its[dtype] for word, its in READING.items() if word in device.name.split()]
    return attrs.evolve(points, reading=others[0]) if others else points


def known(device: Device) -> Device:
    """A device whose bandwidth is stated; for one of which nobody said it, as much for each SM as an H100 has."""
    if device.copy_gbps:
        return device
    h100 = DEVICES["nvidia-h100-80gb-hbm3"]
    assert h100.copy_gbps is not None
    return attrs.evolve(device, copy_gbps=h100.copy_gbps * device.num_sms / h100.num_sms)


@attrs.frozen
class Predicted:
    """A layer for one histogram."""

    config: CuteConfig
    widths: tuple[tuple[int, ...], ...]
    "Of the blocks of each expert; none of one without tokens."
    up_us: tuple[float, ...]
    "What each SM multiplies in gate+up, ..."
    down_us: tuple[float, ...]
    "... and in down."
    reading_us: float
    "The active experts' weights."
    us: float
    "The layer, alignment, quantisation and the sum among it."

    @property
    def tiles(self) -> dict[int, int]:
        """Blocks of each width."""
        every = [width for widths in self.widths for width in widths]
        return {width: every.count(width) for width in sorted(set(every))}

    @property
    def experts(self) -> str:
        """How many experts get which blocks: ``3 without tokens, 12 of 8, 2 of 3x72+24``."""
        every = Counter(self.widths)
        idle, found = every.pop((), 0), [f"{every[widths]} of {_sum_of(widths)}" for widths in sorted(every, key=sum)]
        return ", ".join([f"{idle} without tokens"] * (idle > 0) + found)

    def __str__(self) -> str:
        shares = "; ".join(
            f"{name}: {sum(each) / len(each):.1f} us an SM, at most {max(each):.1f}"
            for name, each in (("gate+up", self.up_us), ("down", self.down_us))
        )
        return f"{self.config.name}; experts by widths of their blocks: {self.experts}; {shares}; reading {self.reading_us:.1f} us; all {self.us:.1f} us"


def _sum_of(widths: Sequence[int]) -> str:
    """``3x72+24`` for 72, 72, 72, 24."""
    every = Counter(widths)
    return "+".join(f"{times}x{width}" if times > 1 else str(width) for width, times in every.items())


def widths_of(config: CuteConfig, count: int) -> tuple[int, ...]:
    """Of the blocks of an expert with so many tokens, in order."""
    sizes = [config.block_m] * (count // config.block_m) + [count % config.block_m]
    return tuple(next(width for width in config.widths if width >= size) for size in sizes if size)


def predict(shape: MoEShape, counts: Sequence[int], device: Device, config: CuteConfig) -> Predicted:
    """What a config of the ragged form does with a histogram.

    Args:
        shape: of the config's dtype, with sizes that it runs.
        counts: tokens of each local expert.
        device: its number of SMs and bandwidth (`known`).
        config: of `all_configs("ragged", ...)`.

    Raises:
        InputError: the bandwidth is not known.
    """
    if not device.copy_gbps:
        raise InputError(f"the bandwidth of {device.name} is not known; give a device whose copy_gbps is stated.")
    points, sms = points_of(device, shape.dtype), device.num_sms
    widths = tuple(widths_of(config, int(count)) for count in counts)
    read = sum(map(bool, widths)) / len(widths) * shape.weight_bytes / (points.reading * device.copy_gbps) * 1e-3
    us = points.fixed_us + points.token_us * sum(counts) / shape.top_k
    found: list[tuple[float, ...]] = []
    for rows, columns, part in (
        (2 * shape.intermediate_size, shape.hidden_size, 2 / 3),
        (shape.hidden_size, shape.intermediate_size, 1 / 3),
    ):
        step_us = columns / config.step * config.rows / ROWS / points.clock_mhz
        each = [0.0] * sms
        tiles = [width for its in widths for width in its for _ in range(rows // config.rows)]
        for index, width in enumerate(tiles):
            turn, place = divmod(index, sms)
            each[sms - 1 - place if turn % 2 else place] += points.step(width) * step_us
        us += math.hypot(max(each), read * part)
        found.append(tuple(each))
    up, down = found
    return Predicted(config, widths, up, down, read, us)


def listed(shape: MoEShape, forms: Sequence[str] = ("ragged",)) -> list[CuteConfig]:
    """The configs of some forms that run a layer.

    Raises:
        InputError: none does.
    """
    who = "the ragged form does" if tuple(forms) == ("ragged",) else "the CuTe kernels do"
    every = [config for form in forms for config in all_configs(form, shape.dtype)]
    if not every:
        raise InputError(f"{who} not run dtype {shape.dtype}; use one of {', '.join(POINTS)}.")
    if shape.form:
        raise InputError(f"{who} not run {' and '.join(shape.form)}; use silu and block-128.")
    legal = [config for config in every if why_illegal(config, shape) is None]
    if not legal:
        raise InputError(f"{who} not run {shape}: {why_illegal(every[0], shape)}")
    return legal


def predict_default(shape: MoEShape, counts: Sequence[int], num_tokens: int, device: Device) -> Predicted:
    """What the config does that serves a number of tokens where the ragged form serves (`defaults`).

    Raises:
        InputError: none runs the layer, or the bandwidth is not known.
    """
    legal = listed(shape)
    chosen = default([config.keys(1) for config in legal], shape, num_tokens)
    return predict(shape, counts, device, legal[chosen])
