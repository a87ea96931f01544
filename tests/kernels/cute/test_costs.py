"""What is predicted for the ragged form."""

import pathlib

import attrs
import numpy as np
import pytest

from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.cute.configs import CuteConfig
from rampwrap.kernels.cute.costs import POINTS, READING, known, listed, points_of, predict, predict_default, widths_of
from rampwrap.measure.timings import Timings

H200, H100 = DEVICES["nvidia-h200"], DEVICES["nvidia-h100-80gb-hbm3"]
OLMOE = attrs.evolve(SHAPES["olmoe"], dtype="fp8")
CONFIG = CuteConfig("ragged", "fp8", 96, 32, 8, 3)


def test_widths_of_an_expert():
    assert widths_of(CONFIG, 0) == () and widths_of(CONFIG, 8) == (8,) and widths_of(CONFIG, 9) == (16,)
    assert widths_of(CONFIG, 96) == (96,) and widths_of(CONFIG, 205) == (96, 96, 16)


def test_tiles_go_forth_and_back_over_the_sms():
    """Three experts' tiles on two SMs; w13 has two tiles an expert, w2 one."""
    shape = MoEShape(4, 1, 256, 256, "fp8")
    found = predict(shape, [1, 0, 9, 33], attrs.evolve(H200, num_sms=2), CONFIG)
    each = {width: 2 * POINTS["fp8"].step(width) / 1755 for width in (8, 16, 48)}
    assert found.up_us == pytest.approx((each[8] + each[16] + each[48],) * 2)
    assert found.down_us == pytest.approx((each[8], each[16] + each[48]))
    assert found.tiles == {8: 1, 16: 1, 48: 1} and found.widths == ((8,), (), (16,), (48,))


@pytest.mark.parametrize("tokens", [4, 16])
def test_a_layer_takes_longer_than_its_bytes_and_than_its_products(tokens):
    found = predict(OLMOE, [tokens] * 64, H200, CONFIG)
    assert found.us > found.reading_us > OLMOE.weight_bytes / H200.copy_gbps / 1.2e3
    assert found.us > max(found.up_us) + max(found.down_us)
    assert predict(OLMOE, [tokens] * 64, H100, CONFIG).us > found.us


def test_a_skewed_batch_gets_tiles_as_wide_as_each_expert_needs():
    """Of the config that serves so many tokens without a plan."""
    counts = [1] * 56 + [500] * 8
    found = predict_default(OLMOE, counts, 507, H200)
    assert found.config == CuteConfig("ragged", "fp8", 64, 32, 8, 4) and found.tiles == {8: 56, 64: 8 * 8}
    assert "56 of 8, 8 of 8x64;" in str(found)
    narrow = predict(OLMOE, counts, H200, CuteConfig("ragged", "fp8", 40, 64, 4, 4))
    assert found.us < 0.95 * narrow.us and "8 of 12x40+24" in str(narrow)
    few = predict_default(OLMOE, [1] * 64, 8, H200)
    assert few.config.block_m == 40 and set(few.tiles) == {8}


def test_no_tokens():
    found = predict_default(OLMOE, [0] * 64, 1, H200)
    assert found.tiles == {} and "64 without tokens;" in str(found) and found.us == POINTS["fp8"].fixed_us


@pytest.mark.parametrize("dtype", POINTS)
def test_an_h100_reads_no_faster_than_it_copies(dtype):
    assert points_of(H200, dtype) == POINTS[dtype]
    assert points_of(H100, dtype) == attrs.evolve(POINTS[dtype], reading=READING["H100"][dtype])
    assert points_of(attrs.evolve(H100, name="NVIDIA H1000"), dtype) == POINTS[dtype]


def test_what_cannot_be_predicted():
    other = attrs.evolve(H100, name="NVIDIA H20", num_sms=78, copy_gbps=None)
    assert known(other).copy_gbps == pytest.approx(H100.copy_gbps * 78 / 132) and known(H200) is H200
    with pytest.raises(InputError, match="bandwidth of NVIDIA H20 is not known"):
        predict_default(OLMOE, [1] * 64, 8, other)
    for changed, message in (
        ({"dtype": "fp16"}, "does not run dtype fp16"),
        ({"hidden_size": 384}, "hidden_size=384 is no multiple"),
        ({"scales": "channel"}, "does not run scales=channel"),
    ):
        with pytest.raises(InputError, match=message):
            listed(attrs.evolve(OLMOE, **changed))


def test_the_points_lie_near_measured_layers():
    """Two-launch layers of one width on an H200, from the tables that the points were fitted to: geometric mean within 5 %."""
    table = Timings.load(
        pathlib.Path(__file__).parents[3] / "benchmarks" / "results" / "h200-v2-cute-qwen3-30b-fp8.npz"
    )
    config = CuteConfig("ragged", "fp8", 96, 32, 8, 3)
    (column,) = [c for c, its in enumerate(table.configs) if its == config.keys(1) | {"form": "two", "block_m": 88}]
    one_width = attrs.evolve(config, form="two", block_m=88)
    off = [
        predict(table.shape, table.counts[row], H200, one_width).us / table.us[row, column]
        for row in range(len(table.us))
        if 128 <= table.num_tokens[row] <= 1024
    ]
    assert len(off) > 20 and abs(np.log(off).mean()) < 0.05
