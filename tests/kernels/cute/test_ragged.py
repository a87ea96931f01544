"""The ragged form: how wide a tile is and which CTA has it, by the kernels' own code on numbers of Python."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.configs import DTYPES, all_configs
from rampwrap.kernels.cute.costs import widths_of

if building.dsl_version() is None:
    pytest.skip("needs the CuTe DSL (pip install rampwrap[cute])", allow_module_level=True)
from rampwrap.kernels.cute.build import emit  # tells the DSL the architecture
from rampwrap.kernels.cute.device import ragged

CONFIGS = [config for dtype in DTYPES for config in all_configs("ragged", dtype)]


@pytest.fixture(autouse=True, scope="module")
def numbers():
    """A lane's vote is its own, so that all lanes' votes can be added; the device's division, of Python's numbers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ragged, "const_expr", lambda value: value)
        patched.setattr(ragged, "quotient", lambda value, divisor: value // divisor)
        patched.setattr(ragged.cute.arch, "vote_ballot_sync", int)
        patched.setattr(ragged.cute.arch, "popc", lambda votes: votes)
        yield


def gemm_of(config):
    return emit.KERNELS["ragged_up", config.dtype](config)


def plain(gemm, name):
    """A method before the DSL has it."""
    method = getattr(type(gemm), name)
    return lambda *its: getattr(method, "__wrapped__", method)(gemm, *its)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_tile_takes_the_narrowest_width_that_holds_its_block(config):
    """Whatever stands before and behind it."""
    gemm = gemm_of(config)
    load, told = plain(gemm, "load_of"), plain(gemm, "told_by")
    num_slots = 1000
    near = {1} | {width + more for width in config.widths for more in (-1, 0, 1)}
    for count in sorted(count for count in near if count <= config.block_m):
        real = list(range(count))
        before, after = [7] * config.block_m, [5] * config.block_m
        ids = before + real + [num_slots] * (config.block_m - count) + after
        seen = [told(*load(ids, 1, consumer), num_slots, consumer) for consumer in range(max(32, config.block_m))]
        eights = 1 + sum(votes - 1 for _, votes in seen[:32])
        fitting = [width for which, width in enumerate(config.widths) if gemm.fits(which, eights)]
        assert fitting == list(widths_of(config, count)), (count, eights)
        assert [slot for slot, _ in seen[: config.block_m]] == real + [-1] * (config.block_m - count)


def test_sums_say_which_width_they_are_of(monkeypatch):
    """Of every config all widths have another number of sums."""
    monkeypatch.setattr(ragged.cute, "size", lambda sums: sums)
    for config in CONFIGS:
        gemm = gemm_of(config)
        assert [gemm.as_wide_as(width // 2 * config.block_n // 16).block_m for width in config.widths] == [
            *config.widths
        ]


@given(stop=st.integers(1, 900), by=st.integers(1, 140))
@example(stop=132, by=132)
@example(stop=133, by=132)
@example(stop=395, by=132)
def test_every_tile_is_done_once_and_rounds_go_forth_and_back(stop, by):
    gemm = gemm_of(CONFIGS[0])
    end_of, tile_after = plain(gemm, "end_of"), plain(gemm, "tile_after")
    done = {}
    for start in range(min(by, stop)):
        tile = start
        for index in range(start, end_of(start, stop, by), by):
            done[tile] = done.get(tile, 0) + 1
            turn, place = divmod(tile, by)
            assert start == (by - 1 - place if turn % 2 else place)
            tile = tile_after(index, stop, by)
            assert 0 <= tile < stop  # of one that is read ahead and not done, too
    assert done == dict.fromkeys(range(stop), 1)
