"""What is predicted for the ragged form from measured points."""

import attrs
import pytest

from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES, SIMULATED
from rampwrap.kernel.shape import SHAPES
from rampwrap.kernels.cute.costs import POINTS, Costs, explain, known, works_of

H200, H100 = DEVICES["nvidia-h200"], DEVICES["nvidia-h100-80gb-hbm3"]


def test_costs_go_through_the_points():
    for dtype, points in POINTS.items():
        its = Costs.of(H200, dtype)
        for tokens, clocks in (points.narrow, points.wide):
            assert its.base + its.slope * tokens == pytest.approx(clocks, rel=0.05)
    # 32 KB a step, and an SM's share of the bandwidth.
    assert Costs.of(H200, "fp8").memory == pytest.approx(32768 / (4300e9 / 132 / 1755e6), abs=1)
    assert Costs.of(H100, "fp8").memory > Costs.of(H200, "fp8").memory > Costs.of(H200, "fp8").reread


def test_a_gpu_of_unknown_bandwidth_has_that_of_an_h100_for_each_sm():
    other = attrs.evolve(H100, name="NVIDIA H20", num_sms=78, copy_gbps=None)
    assert Costs.of(known(other), "bf16") == Costs.of(H100, "bf16") and known(H200) is H200
    with pytest.raises(InputError, match="bandwidth of NVIDIA H20 is not known"):
        Costs.of(other, "bf16")
    with pytest.raises(InputError, match="fp16 has no ragged form"):
        Costs.of(H100, "fp16")


def test_lines_are_those_of_the_layer():
    shape = attrs.evolve(SHAPES["qwen3-30b"], dtype="fp8")
    up, down = works_of(shape, Costs.of(H200, "fp8"))
    assert (up.groups, up.steps, down.groups, down.steps) == (6, 16, 8, 6)
    up, down = works_of(attrs.evolve(shape, dtype="bf16"), Costs.of(H200, "bf16"))
    assert (up.groups, up.steps, down.groups, down.steps) == (6, 32, 8, 12)


@pytest.mark.parametrize("tokens", [8, 32])
def test_a_layer_that_memory_bounds_takes_its_bytes(tokens):
    """Evenly spread, few tokens an expert: bytes over bandwidth, whole steps, and two launches; an eighth on top."""
    shape = attrs.evolve(SHAPES["olmoe"], dtype="fp8")
    found = explain(shape, [tokens] * 64, H200)
    bytes_us = shape.weight_bytes / H200.copy_gbps / 1e3
    assert bytes_us < found.us < 1.13 * bytes_us
    assert found.widths == {tokens: 64} and found.passes == 64
    assert found.up.steps == 64 * 8 * 16 and found.up.ctas == 132


def test_no_tokens():
    found = explain(attrs.evolve(SHAPES["olmoe"], dtype="fp8"), [0] * 64, SIMULATED)
    assert found.widths == {} and found.up.most_us == 0 and "widths none (0 passes)" in str(found)
