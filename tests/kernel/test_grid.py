"""Blocks, waves and the grid descriptor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap import schema
from rampwrap.errors import ConfigError
from rampwrap.kernel.grid import CtaGrid, last_wave_util, max_blocks, num_blocks, num_waves

counts = st.lists(st.integers(0, 300), min_size=1, max_size=40)
block_ms = st.integers(1, 130)


@given(counts, block_ms)
def test_blocks_hold_every_token_and_waste_less_than_one_block_an_expert(counts: list[int], block_m: int) -> None:
    blocks = int(num_blocks(counts, block_m))
    active = sum(c > 0 for c in counts)
    assert blocks * block_m >= sum(counts)
    assert blocks * block_m - sum(counts) <= active * (block_m - 1)


@given(st.integers(1, 40), st.integers(0, 500), block_ms, st.integers(0, 2**32 - 1))
def test_capacity_is_never_exceeded_and_is_reached(num_experts: int, num_slots: int, block_m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_slots, rng.dirichlet(np.full(num_experts, 0.3)))
    capacity = max_blocks(num_slots, num_experts, block_m)
    assert int(num_blocks(counts, block_m)) <= capacity
    # The worst case: one row in every expert but the first, which takes the rest.
    active = min(num_experts, num_slots)
    worst = np.zeros(num_experts, dtype=int)
    worst[:active] = 1
    if active:
        worst[0] += num_slots - active
    assert int(num_blocks(worst, block_m)) == capacity


@given(st.integers(0, 100_000), st.integers(1, 200), st.integers(1, 8))
def test_waves_and_the_last_ones_use_add_up(num_ctas: int, num_sms: int, resident: int) -> None:
    waves, use = num_waves(num_ctas, num_sms, resident), last_wave_util(num_ctas, num_sms, resident)
    assert 0 < use <= 1
    if num_ctas:
        assert round((waves - 1 + use) * num_sms * resident) == num_ctas


@given(counts, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 200))
def test_launches_come_one_after_the_other(counts: list[int], launches: list[int], num_sms: int) -> None:
    """None shares a wave with the next: no fewer waves than all CTAs at once need, and at most one more a launch."""
    grid = CtaGrid(16, sum(launches), launches=launches, ctas_per_sm=2)
    waves, last = grid.waves(counts, num_sms)
    together = num_waves(grid.num_ctas(counts), num_sms, 2)
    assert together <= waves <= together + len(launches) - 1
    assert last == last_wave_util(int(num_blocks(counts, 16)) * launches[-1], num_sms, 2)


def test_batched_histograms_give_one_number_each() -> None:
    assert num_blocks([[1, 16, 17], [0, 0, 0]], 16).tolist() == [4, 0]


def test_json_keeps_only_what_is_not_default() -> None:
    grid = CtaGrid(16, 48, launches=(32, 16), ctas_per_sm=2)
    assert schema.read(schema.dump(grid), CtaGrid, ConfigError) == grid
    assert schema.dump(CtaGrid(16, 8)) == {"block_m": 16, "ctas_per_block": 8}


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"block_m": 0, "ctas_per_block": 1}, "block_m is 0"),
        ({"block_m": 16, "ctas_per_block": 4, "launches": [1, 2]}, "add up to ctas_per_block=4"),
        ({"ctas_per_block": 4}, "block_m"),
        ({"block_m": 16, "ctas_per_block": 4, "ctas_per_sm": 0}, "ctas_per_sm is 0"),
        ({"block_m": 8, "ctas_per_block": 4, "of_a_newer_version": 1}, "'of_a_newer_version' is unknown"),
        ({"block_m": True, "ctas_per_block": 4}, "block_m: True is not a whole number"),
    ],
)
def test_a_bad_grid_is_refused_by_name(raw: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        schema.read(raw, CtaGrid, ConfigError)
