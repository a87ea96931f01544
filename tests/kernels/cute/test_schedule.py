"""Which CTA does which tile, by the kernels' own code on Python numbers, against what their grids say."""

import functools

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.kernel.grid import max_blocks, num_blocks
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.build.library import Library
from rampwrap.kernels.cute.configs import FORMS, all_configs
from rampwrap.model.features import Geometry

pytest.importorskip("torch")
if building.dsl_version() is None:
    pytest.skip("needs the CuTe DSL (pip install rampwrap[cute])", allow_module_level=True)
from rampwrap.kernels.cute.build import emit  # tells the DSL the architecture
from rampwrap.kernels.cute.device import pipeline, prefill

SHAPE = MoEShape(8, 2, 1024, 768, "fp8")
histograms = st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 700)), min_size=8, max_size=8)


@functools.cache
def grid_of(form, dtype, place):
    """(config, its grid) of an adapter whose kernels are all there; `place` in the list of its form."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = CuteFusedMoE(shape, form, Library(None))
    keys = kernel.configs[place % len(kernel.configs)]
    config = next(c for c in all_configs(form, dtype) if c.keys(keys["group_m"]) == keys)
    return config, kernel.grid(keys, shape)


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """The device's unsigned division, of Python's numbers."""
    monkeypatch.setattr(pipeline, "quotient", lambda value, divisor: value // divisor)


def tiles_of(config, role, num_blocks, capacity, tiles_n, group_m, sms):
    """The tiles of every CTA, in its order, as the kernels' loops go through them."""
    gemm = emit.KERNELS[role, config.dtype](config)
    ctas = type(gemm).grid_of.__wrapped__(gemm, capacity, tiles_n, sms)
    groups = tiles_n // gemm.cluster
    tile_of = type(gemm).tile_of.__wrapped__
    return [
        [
            (block, tile * gemm.cluster + cta % gemm.cluster)
            for index in range(cta // gemm.cluster, num_blocks * groups, ctas // gemm.cluster)
            for block, tile in [tile_of(gemm, index, num_blocks, groups, group_m)]
        ]
        for cta in range(ctas)
    ]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(["fp8", "bf16"]), st.integers(0, 400), histograms, st.sampled_from([4, 8, 132]), st.integers(1, 9))  # fmt: skip
def test_every_tile_is_done_once_in_as_many_turns_as_the_wave_model_says(form, dtype, place, counts, sms, group_m):
    config, grid = grid_of(form, dtype, place)
    blocks, capacity = int(num_blocks(counts, grid.block_m)), max_blocks(sum(counts), len(counts), grid.block_m)
    slots = sms * grid.ctas_per_sm
    geometry = Geometry.of((grid,), sms)
    geometry = attrs.evolve(geometry, resident=np.array([grid.ctas_per_sm]))
    waves, unused = geometry.waves(np.array([float(blocks)]))
    turns = idle = 0
    for variant, tiles_n in zip(config.variants, grid.launches, strict=True):
        each = tiles_of(config, variant.role, blocks, capacity, tiles_n, group_m, slots)
        done = sorted(tile for tiles in each for tile in tiles)
        assert done == [(block, tile) for block in range(blocks) for tile in range(tiles_n)]
        most = max(map(len, each), default=0)
        turns, idle = turns + most, idle + most * slots - len(done)
    assert turns == waves == grid.waves(counts, sms)[0] and unused == pytest.approx(idle / slots, abs=2.0**-19)


@given(histograms)
def test_the_prefill_form_pads_to_128_rows_and_multiplies_64(counts):
    """An M block is 128 rows of one expert; its second half is left out where its first slot is none."""
    config, grid = grid_of("prefill", "fp8", 0)
    blocks, halves = int(num_blocks(counts, grid.block_m)), 0
    for count in counts:
        ids = np.arange(-(-count // grid.block_m) * grid.block_m)
        first = ids.reshape(-1, grid.block_m)[:, :: prefill.GROUP_TOKENS] < count
        assert first[:, 0].all()  # which is why the first half is never asked
        halves += int(first.sum())
    assert grid.block_m == config.block_m == 2 * prefill.GROUP_TOKENS
    assert halves == num_blocks(counts, prefill.GROUP_TOKENS)
    assert 2 * blocks - halves <= np.count_nonzero(counts)  # at most one half an expert is left out


def test_tiles_of_a_block_are_those_of_the_products():
    """gate+up: 128 columns of h a tile, from a box of gate and one of up rows; down: both boxes are columns of the output."""
    _, grid = grid_of("prefill", "fp8", 0)
    assert grid.launches == (SHAPE.intermediate_size // prefill.BOX_ROWS, SHAPE.hidden_size // (2 * prefill.BOX_ROWS))
    assert grid.persistent and grid.ctas_per_sm == 1
