"""Performance regions: when GROUP_M swizzle, split-K and wide N tiles pay, from a GPU's constants alone.

A layer has two launches, up (N = 2I, K = H) and down (N = H, K = I). RaMP (arXiv 2604.26039) describes a launch by
``rho = N K / (tile_n tile_k)``, weight tiles of an M block; ``lambda = ceil(N / tile_n)``, its CTAs; ``omega = CTAs /
SMs``, wave use; ``kappa = ceil(K / tile_k)``, steps; and states three thresholds (`published`). Here a property helps if
the best tile with it beats the best without it by `MIN_GAIN` in `Bound`, which knows `Device` and five constants. None
is fitted; that shared memory is what limits narrow tiles was recognised from OLMoE timings of vLLM's kernel on an H200.

GROUP_M. N tiles first (group_m = 1), an M block sweeps all weights W = N K of its expert before the expert's next
    block does, which finds what L2 kept. The L2 of A100 and H100 is two halves with a copy each of what all SMs read:
    it holds ``l2_bytes / 2``. (1440 tiles of 128 rows x 128 bytes are 23.6 MB, 90 % of half an H100's.) But W > l2/2
    only makes re-reads possible. They happen if an expert has more M blocks than are in flight together, and cost
    time if fewer rows share a read of W than the ridge, ``FLOP/s / (bytes/s) * element / 2``.
split-K. CTAs with q bytes of loads in flight draw q / latency each (Little): HBM is saturated from ``omega = bandwidth
    latency / (q SMs)`` up; below, more CTAs draw more. (0.2 is q = 163 KB on an H200.) SwiGLU needs whole sums, so
    only the down launch can be split; its float32 parts are written, and read by the top-k sum.
Wide N tile. While HBM is the limit nothing is gained: it delivers the weights once whatever the tile. Arithmetic is
    first held up by shared memory, which takes in what is loaded and feeds the matrix unit: 160 bytes a clock for
    128x128, 128 for 128x256, and 128 is what it does. So a wide tile pays from ``ridge / slowdown`` rows of an expert
    up, unless fewer, larger CTAs fill the last wave worse.
"""

import functools
import math
from typing import Any

import attrs
import numpy as np

from rampwrap import schema
from rampwrap.errors import InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape

# Constants of sm_80 to sm_100 that `Device` does not carry.
LATENCY_US = 1.0  # HBM under load, and as much for the fill and the epilogue of a CTA
CLOCK_GHZ = 1.75
PORT_BYTES, SMEM_BYTES = 64, 128  # bytes a clock: into an SM; in or out of its shared memory
REGISTERS = 65_536

MIN_GAIN = 0.03
"Predicted gain that counts as help. `Bound` overlaps everything perfectly, so its gains are upper bounds."
GROUP_M, SPLIT_K, WIDE_N = 8, 4, 256
"Values with which the properties are tried, against 1, 1 and 64 or 128."
HELD_OUT = ("glm-4.5-air", "gpt-oss-120b", "kimi-k2-tp8")
"Shapes that nobody looked at while the rules were derived."


@attrs.frozen
class Tile:
    """What a CTA computes: block_m token rows x block_n weight rows, block_k deep a step."""

    block_m: int
    block_n: int
    block_k: int


@attrs.frozen
class Launch:
    """One launch of a layer, in the terms of RaMP."""

    name: str
    n: int
    k: int
    rho: float
    n_tiles: int  # lambda
    omega: float
    kappa: int


@attrs.frozen
class Verdict:
    """Whether a property helps the layer."""

    helps: bool
    gain: float  # predicted time without / with - 1
    value: float
    threshold: float
    "What `value` has to exceed (split-K: stay under) for the property to have anything to win."
    published: bool


@attrs.frozen
class Region:
    """Where a batch of a layer lies on a device, under uniform routing."""

    shape: MoEShape
    device: str
    num_tokens: int
    tile: Tile
    up: Launch
    down: Launch
    swizzle: Verdict
    split_k: Verdict
    wide_n: Verdict

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        raw = attrs.asdict(self) | {"shape": schema.dump(self.shape)}
        for launch in (raw["up"], raw["down"]):
            launch["lambda"] = launch.pop("n_tiles")
        return raw


def published(n_tiles: float, kappa: float, omega: float) -> dict[str, bool]:
    """RaMP's rules to the letter: lambda kappa > 1440; kappa >= 48 and omega < 0.2; omega > 1."""
    return {"swizzle": n_tiles * kappa > 1440, "split_k": kappa >= 48 and omega < 0.2, "wide_n": omega > 1}


@functools.lru_cache(maxsize=4096)
def expected_blocks(shape: MoEShape, num_tokens: int, block_m: int) -> float:
    """Expected M blocks under uniform routing: an expert's tokens are binomial, ``E[ceil(c/b)] = sum_j P(c > j b)``."""
    from scipy import stats

    tail = stats.binom.sf(np.arange(0, num_tokens, block_m), num_tokens, shape.top_k / shape.num_experts)
    return float(shape.num_local_experts * tail.sum())


def missed(ratio: float) -> float:
    """Share of a cyclic sweep over `ratio` times a randomly replaced cache that misses: ``1 - m = exp(-m ratio)``."""
    miss = 1.0
    for _ in range(60):
        miss = 1 - math.exp(-miss * ratio)
    return miss if ratio > 1 else 0.0


class Bound:
    """Lower bounds on the time of a layer's launches, for one device, shape and batch."""

    def __init__(self, device: Device, shape: MoEShape, num_tokens: int) -> None:
        if num_tokens < 1:
            raise InputError(f"num_tokens is {num_tokens}; give at least 1.")
        rate = "fp8_tflops" if shape.dtype == "fp8" else "bf16_tflops"
        for name in (rate, "copy_gbps", "l2_bytes", "smem_bytes_per_sm"):
            if not getattr(device, name):
                raise InputError(f"device {device.name!r} states no {name}, which regions follow from; add it.")
        self.device, self.shape, self.num_tokens = device, shape, num_tokens
        self.element = 1 if shape.dtype == "fp8" else 2
        self.bandwidth = float(device.copy_gbps or 0) * 1e3  # bytes a microsecond
        self.sm_flops = float(getattr(device, rate)) * 1e6 / device.num_sms  # of an SM in a microsecond
        # Rows that have to share one read of a weight from HBM for the matrix unit to be the limit.
        self.ridge_rows = self.sm_flops * device.num_sms / self.bandwidth * self.element / 2

    def slowdown(self, tile: Tile) -> float:
        """How much shared memory slows the matrix unit down in this tile, at least 1.

        A multiply-add needs ``element (1/block_n + 1/block_m)`` bytes written by loads and ``element (1/block_n +
        1/64)`` read, because an instruction takes 64 rows. The unit's multiply-adds a clock are a power of two,
        the next one above the device's rate.
        """
        per_clock = 2 ** math.ceil(math.log2(self.sm_flops / (2e3 * CLOCK_GHZ)))
        load = self.element * (2 / tile.block_n + 1 / tile.block_m + 1 / min(tile.block_m, 64))
        return float(max(1.0, per_clock * load / SMEM_BYTES))

    def pipeline(self, tile: Tile) -> tuple[int, int]:
        """Bytes of loads that a CTA has in flight, and CTAs resident on an SM (0: the tile does not fit).

        The pipeline is as deep as two CTAs an SM leave room for, 3 to 5 stages, one of which is being multiplied.
        """
        smem, stage = self.device.smem_bytes_per_sm or 0, (tile.block_m + tile.block_n) * tile.block_k * self.element
        stages = max(3, min(5, (smem // 2 - 1024) // stage))
        by_registers = REGISTERS // (2 * tile.block_m * tile.block_n)
        return (stages - 1) * stage, min(smem // (stages * stage + 1024), by_registers, 32)

    def saturating_omega(self, tile: Tile) -> float:
        """CTAs over SMs from which HBM is saturated, by Little's law and by the port of an SM."""
        draw = min(self.pipeline(tile)[0] / LATENCY_US, PORT_BYTES * CLOCK_GHZ * 1e3)
        return self.bandwidth / draw / self.device.num_sms

    def launch_us(self, n: int, k: int, tile: Tile, group_m: int = 1, split_k: int = 1) -> float:
        """Microseconds of one launch if memory and arithmetic overlap perfectly; inf if the tile does not fit."""
        resident = self.pipeline(tile)[1]
        if not resident:
            return math.inf
        blocks, active = (expected_blocks(self.shape, self.num_tokens, m) for m in (tile.block_m, self.num_tokens))
        ctas = blocks * -(-n // tile.block_n) * split_k
        omega, in_flight = ctas / self.device.num_sms, max(1.0, self.device.num_sms * resident * blocks / ctas, group_m)
        miss = missed(n * k * self.element / (self.device.l2_bytes / 2))
        sweeps = 1 + (max(1.0, blocks / active / in_flight) - 1) * miss
        rows = self.num_tokens * self.shape.top_k * self.shape.num_local_experts / self.shape.num_experts
        memory = self.element * (active * n * k * sweeps + rows * k) / self.bandwidth
        memory /= min(1.0, min(omega, resident) / self.saturating_omega(tile))
        flops = 2 * tile.block_m * tile.block_n * -(-k // split_k)
        cta = flops / self.sm_flops * self.slowdown(tile) + LATENCY_US / resident
        # The number of blocks is random: past the first wave, half a CTA is lost on average.
        us = LATENCY_US + max(memory, max(1.0, omega + 0.5) * cta)
        parts = LATENCY_US + 2 * (4 * split_k - 2) * rows * n / self.bandwidth
        return us + (parts if split_k > 1 else 0.0)

    def layer_us(self, tile: Tile, group_m: int = 1, split_k: int = 1) -> float:
        """Both launches; only the down launch is split."""
        inter, hidden = self.shape.intermediate_size, self.shape.hidden_size
        return self.launch_us(2 * inter, hidden, tile, group_m) + self.launch_us(hidden, inter, tile, group_m, split_k)


def regions(shape: MoEShape, device: Device, num_tokens: int, tile: Tile | None = None) -> Region:
    """The region of one batch.

    Args:
        shape: the layer on this rank.
        device: its constants; all of them are needed.
        num_tokens: tokens of the batch, routed uniformly.
        tile: the tile without the properties. Absent: the best by `Bound` of those that kernels have, shown
            as block_m x 128 rows x 128 bytes, the tile for which the published thresholds read naturally.

    Raises:
        InputError: a number below 1, a constant that the device lacks, a tile that does not fit.
    """
    bound = Bound(device, shape, num_tokens)
    step, heights = 128 // bound.element, (16, 32, 64, 128)
    if tile is None:
        narrow = [Tile(m, n, k) for m in heights for n in (64, 128) for k in sorted({step, 128})]
        wide = [Tile(m, WIDE_N, step) for m in heights]
    else:
        narrow, wide = [tile], [attrs.evolve(tile, block_n=max(WIDE_N, 2 * tile.block_n))]
    if (tile and min(attrs.astuple(tile)) < 1) or not any(bound.pipeline(t)[1] for t in narrow):
        raise InputError(f"{tile or 'a tile'} does not fit an SM of {device.name}; give positive numbers that do.")
    every = narrow if tile else narrow + wide
    plain, without = min(map(bound.layer_us, every)), min(narrow, key=bound.layer_us)
    gains = {
        "swizzle": plain / min(bound.layer_us(t, group_m=GROUP_M) for t in every) - 1,
        "split_k": plain / min(bound.layer_us(t, split_k=SPLIT_K) for t in every) - 1,
        "wide_n": bound.layer_us(without) / min(map(bound.layer_us, wide)) - 1,
    }
    shown = tile or Tile(without.block_m, 128, step)
    blocks = expected_blocks(shape, num_tokens, shown.block_m)

    def launch(name: str, n: int, k: int) -> Launch:
        n_tiles, rho = -(-n // shown.block_n), n * k / (shown.block_n * shown.block_k)
        return Launch(name, n, k, rho, n_tiles, blocks * n_tiles / device.num_sms, -(-k // shown.block_k))

    up = launch("up", 2 * shape.intermediate_size, shape.hidden_size)
    down = launch("down", shape.hidden_size, shape.intermediate_size)
    rules = published(up.n_tiles, up.kappa, up.omega)
    rules["split_k"] = published(down.n_tiles, down.kappa, down.omega)["split_k"]
    rows = shown.block_m * blocks / expected_blocks(shape, num_tokens, num_tokens)
    limits = {
        "swizzle": (up.n_tiles * up.kappa, device.l2_bytes / 2 / (shown.block_n * shown.block_k * bound.element)),
        "split_k": (down.omega, bound.saturating_omega(shown)),
        "wide_n": (rows, bound.ridge_rows / bound.slowdown(shown)),
    }
    verdicts = {}
    for name, (value, limit) in limits.items():
        possible = value < limit if name == "split_k" else value > limit
        verdicts[name] = Verdict(possible and gains[name] > MIN_GAIN, gains[name], value, limit, rules[name])
    return Region(shape, device.name, num_tokens, shown, up, down, **verdicts)
