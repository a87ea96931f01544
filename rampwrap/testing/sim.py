"""`SimKernel`: a fused-MoE kernel made of arithmetic, for tests, overhead figures and examples without a GPU.

Its time is not any of the forms that rampwrap fits, so a model cannot recover it by construction.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rampwrap.kernel.device import SIMULATED, Device
from rampwrap.kernel.grid import CtaGrid, num_blocks
from rampwrap.kernel.protocol import Config, check_configs
from rampwrap.kernel.shape import MoEShape
from rampwrap.routing.counts import expert_counts

SIM_CONFIGS: tuple[Config, ...] = tuple(
    {"block_m": block_m, "block_n": block_n, "stages": stages}
    for block_m in (16, 32, 64, 128)
    for block_n in (64, 128, 256)
    for stages in (2, 4)
)


class SimKernel:
    """A kernel whose `launch` returns the microseconds that it would have taken; it is its own timer.

    Args:
        shape: the layer it pretends to run.
        configs: dicts with block_m, block_n and stages.
        device: where it pretends to run.
        noise: relative deviation of repeated timings, 0 for none.
    """

    name = "sim"
    version = "1"

    def __init__(
        self,
        shape: MoEShape,
        configs: Sequence[Config] = SIM_CONFIGS,
        *,
        device: Device = SIMULATED,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.configs = check_configs(configs, "SimKernel")
        self.device = device
        self.noise = noise
        self._rng = np.random.default_rng(seed)
        self.launches = 0

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """Up and down projection, `block_n` weight rows a CTA."""
        up = -(-2 * shape.intermediate_size // config["block_n"])
        down = -(-shape.hidden_size // config["block_n"])
        resident = max(1, 220_000 // (config["stages"] * 128 * (config["block_m"] + config["block_n"]) * 2))
        return CtaGrid(config["block_m"], up + down, launches=(up, down), ctas_per_sm=min(resident, 4))

    def time_us(self, config: Config, counts: npt.ArrayLike) -> float:
        """Microseconds of one layer with this config on this histogram, without noise."""
        counts = np.asarray(counts)
        grid = self.grid(config, self.shape)
        blocks = int(num_blocks(counts, grid.block_m))
        if not blocks:
            return 4.0
        active = int(np.count_nonzero(counts))
        element = 1 if self.shape.dtype == "fp8" else 2
        weights = 3 * self.shape.hidden_size * self.shape.intermediate_size * element
        bandwidth = (self.device.copy_gbps or 3000.0) * 1e3 * (0.97 if config["stages"] > 2 else 0.86)  # bytes per us
        # A second block of an expert finds the weights in L2 unless the experts are too many to stay there.
        traffic = weights * (active + 0.12 * (blocks - active))
        rows = config["block_m"] * blocks
        rate = (self.device.bf16_tflops or 500.0) * 1e6 * min(1.0, 0.25 + config["block_m"] / 160)  # FLOP per us
        compute = 6 * rows * self.shape.hidden_size * self.shape.intermediate_size / rate
        slots = self.device.num_sms * (grid.ctas_per_sm or 1)
        idle = 0.0
        for ctas in grid.launches:
            waves = blocks * ctas / slots
            idle += (np.ceil(waves) - waves) / np.ceil(waves) / len(grid.launches)
        return float(6.0 + np.hypot(traffic / bandwidth, compute) * (1.0 + 0.35 * idle))

    def launch(self, config: Config, topk_ids: Any) -> float:
        """Pretends to run the layer; returns its simulated microseconds."""
        self.launches += 1
        # As with every kernel that is timed: a rank has the first experts.
        counts = expert_counts(topk_ids, self.shape.num_experts)[: self.shape.num_local_experts]
        return self.time_us(config, counts) * (1.0 + self.noise * float(self._rng.standard_normal()))

    def inputs(self, shape: MoEShape, topk_ids: Any, *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `launch`."""
        return {"topk_ids": topk_ids}


class NullKernel(SimKernel):
    """A SimKernel whose launch does nothing, for measuring the overhead of everything around it."""

    name = "null"

    def launch(self, config: Config, topk_ids: Any) -> float:
        """Returns at once."""
        return 0.0
