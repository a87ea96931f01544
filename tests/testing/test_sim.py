"""The simulated kernel's times, by hand: what everything that runs without a GPU is tested against."""

import math

import pytest

from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.shape import MoEShape
from rampwrap.testing.sim import SIM_CONFIGS, NullKernel, SimKernel

# 10 SMs, 1 TB/s, 100 TFLOP/s; 4 experts of 3 x 1000 x 500 weights.
DEVICE = Device("toy", 10, copy_gbps=1000.0, bf16_tflops=100.0)
SHAPE = MoEShape(4, 2, 1000, 500)
CONFIG = {"block_m": 16, "block_n": 128, "stages": 4}


def test_a_grid_by_hand():
    """1000 rows of both GEMMs are 8 tiles of 128; 4 stages of 256 x (16 + 128) bytes fit once into 220 KB, 2 stages twice."""
    kernel = SimKernel(SHAPE, device=DEVICE)
    assert kernel.grid(CONFIG, SHAPE) == CtaGrid(16, 16, launches=(8, 8), ctas_per_sm=1)
    assert kernel.grid(CONFIG | {"stages": 2}, SHAPE).ctas_per_sm == 2
    assert kernel.grid({"block_m": 16, "block_n": 64, "stages": 1}, SHAPE) == CtaGrid(
        16, 32, launches=(16, 16), ctas_per_sm=4
    )
    assert kernel.grid({"block_m": 128, "block_n": 256, "stages": 4}, SHAPE).ctas_per_sm == 1
    assert len(SIM_CONFIGS) == len({tuple(config.values()) for config in SIM_CONFIGS})


@pytest.mark.parametrize(("stages", "share"), [(4, 0.97), (3, 0.97), (2, 0.86)])
def test_a_time_by_hand(stages, share):
    """17, 0, 1 and 16 tokens: 3 experts, 4 blocks. 6 us, then memory and arithmetic together, longer by 0.35 of what idles."""
    kernel = SimKernel(SHAPE, device=DEVICE)
    config = CONFIG | {"stages": stages}
    memory = 3 * 1000 * 500 * 2 * (3 + 0.12 * 1) / (1e6 * share)
    compute = 6 * 64 * 1000 * 500 / (100e6 * (0.25 + 16 / 160))
    slots = 10 * kernel.grid(config, SHAPE).ctas_per_sm  # 32 CTAs a launch
    idle = 1 - 32 / slots / math.ceil(32 / slots)
    us = 6 + math.hypot(memory, compute) * (1 + 0.35 * idle)
    assert kernel.time_us(config, [17, 0, 1, 16]) == pytest.approx(us, rel=1e-9)
    assert kernel.time_us(config, [0, 0, 0, 0]) == 4.0


def test_bytes_and_rates_of_other_devices_and_types():
    """FP8 weights are half as many bytes; 128 rows reach the full rate; an unmeasured device has 3 TB/s and 500 TFLOP/s."""
    config = {"block_m": 128, "block_n": 128, "stages": 4}
    idle = 1 + 0.35 * (1 - 0.8)  # 8 CTAs of each launch on 10 SMs
    unknown, fp8 = Device("unknown", 10), MoEShape(4, 2, 1000, 500, "fp8")
    compute = 6 * 128 * 1000 * 500 / 500e6
    for shape, size in ((SHAPE, 2), (fp8, 1)):
        found = SimKernel(shape, device=unknown).time_us(config, [128, 0, 0, 0])
        memory = 3 * 1000 * 500 * size / (3e6 * 0.97)
        assert found == pytest.approx(6 + math.hypot(memory, compute) * idle, rel=1e-9)


def test_a_launch_says_its_time_with_noise_of_its_seed():
    ids = [[0, 1], [0, 2]]
    plain = SimKernel(SHAPE, device=DEVICE)
    us = plain.time_us(CONFIG, [2, 1, 1, 0])
    assert plain.launch(CONFIG, ids) == us and plain.launches == 1
    noisy = [SimKernel(SHAPE, device=DEVICE, noise=0.1, seed=seed).launch(CONFIG, ids) for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2] and all(abs(value / us - 1) < 0.6 for value in noisy)
    assert NullKernel(SHAPE).launch(CONFIG, ids) == 0.0
    assert plain.inputs(SHAPE, ids) == {"topk_ids": ids}
