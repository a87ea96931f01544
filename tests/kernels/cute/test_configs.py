"""The CuTe configs: how many there are, what is refused and why, and what each occupies."""

import re
from collections import Counter

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.cute.configs import (
    BLOCK_MS,
    DOWN_STAGES,
    DTYPES,
    FORMS,
    KEYS,
    LISTED,
    MAX_BLOCK_M,
    MAX_SHARED,
    CuteConfig,
    all_configs,
    all_variants,
    from_keys,
    why_illegal,
)

ONE = CuteConfig("one", "fp8", 16, 64, 4, 4)


WHOLE = {(16, 4): (6, 10), (32, 4): (4, 6), (64, 4): (3, 4), (16, 8): (4, 6, 8), (32, 8): (3, 4, 5, 6)}
"Tiles and depths that were compiled and measured before the list was cut to what tables need."


def test_as_many_are_legal_as_the_paper_has():
    """134 single-launch FP8 configs, twice that with group_m, and similar numbers of the others; plans may name any."""
    for form in ("two", "one"):
        for dtype in DTYPES:
            every = [
                CuteConfig(form, dtype, m, *tile, stages) for tile in WHOLE for stages in WHOLE[tile] for m in BLOCK_MS
            ]
            legal = {config for config in every if why_illegal(config) is None}
            assert len(legal) >= 134 and {config.block_m for config in legal} == set(range(8, 105, 8)) == set(BLOCK_MS)
            assert {config for config in all_configs(form, dtype) if config.block_m in BLOCK_MS} < legal
            assert all(from_keys(config.keys(8), dtype) == config for config in legal)


def test_how_many_are_listed():
    """What a library holds, and for how many tokens: 721 kernels, then 491, before the list was cut to what tables need."""
    assert {(form, dtype): len(all_configs(form, dtype)) for form in FORMS for dtype in DTYPES} == {
        ("two", "fp8"): 48,
        ("two", "bf16"): 39,
        ("one", "fp8"): 26,
        ("one", "bf16"): 28,
        ("prefill", "fp8"): 1,
        ("prefill", "bf16"): 1,
        ("ragged", "fp8"): 6,
        ("ragged", "bf16"): 6,
    }
    assert len(all_variants()) == 235
    assert {config.block_m for config in all_configs("one", "fp8")} == set(range(8, 49, 8))
    assert {config.block_m for config in all_configs("two", "bf16")} == {*BLOCK_MS, 112, 128, 144}


def test_every_listed_config_is_legal_and_fits():
    for form in FORMS:
        for dtype in DTYPES:
            for config in all_configs(form, dtype):
                assert why_illegal(config) is None
                assert config.shared_bytes <= MAX_SHARED
                registers = 128 * 40 + 32 * config.warp_n * config.consumer_registers
                assert registers <= 65_536 and config.consumer_registers % 8 == 0


def test_symbols_are_distinct_c_names():
    variants = all_variants()
    symbols = [variant.symbol for variant in variants]
    assert len(set(symbols)) == len(symbols)
    assert all(re.fullmatch(r"((prefill_|ragged_)?(up|down)|mega)_[a-z0-9_]+", symbol) for symbol in symbols)
    # Of the ragged form listed depths alone are legal, and its down kernels have the depth of their tile.
    assert all(why_illegal(variant.config) is None for variant in variants if variant.role != "ragged_down")


def test_configs_of_one_tile_share_their_down_kernel():
    used = Counter(c.variants[1].symbol for c in all_configs("two", "fp8"))
    assert len(used) < 0.7 * len(all_configs("two", "fp8"))
    deep, shallow = (CuteConfig("two", "fp8", 16, 16, 8, stages) for stages in (8, 4))
    assert deep.variants[1] == shallow.variants[1] and deep.variants[0] != shallow.variants[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"form": "three"}, "form='three' is unknown"),
        ({"dtype": "fp16"}, "dtype fp16 is not compiled"),
        ({"block_m": 12}, "multiple of 8"),
        ({"block_m": MAX_BLOCK_M + 8}, "multiple of 8"),
        ({"block_m": 0}, "multiple of 8"),
        ({"warp_n": 12}, "use 4 or 8"),
        ({"block_n": 8}, "use 16, 32 or 64"),
        ({"block_n": 64, "warp_n": 8}, "512 rows"),
        ({"stages": 1}, "use 2 to"),
        ({"stages": 8}, "bytes of shared memory"),
        ({"block_m": 104, "stages": 2}, "would spill"),
    ],
)
def test_refusals_name_the_value_and_the_fix(change, reason):
    found = why_illegal(attrs.evolve(ONE, **change))
    assert reason in found and found.endswith(".") and ";" in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "bf16"}, "dtype bf16 is not that of the config, fp8"),
        ({"hidden_size": 1000}, "hidden_size=1000 is no multiple of the 128-wide groups"),
        ({"intermediate_size": 192}, "intermediate_size=192 is no multiple"),
        (
            {"hidden_size": 384},
            "hidden_size=384 is no multiple of the 256 output columns of a tile; use the two-launch",
        ),
    ],
)
def test_shapes_that_do_not_divide_are_refused(change, reason):
    shape = attrs.evolve(MoEShape(8, 2, 1024, 512, "fp8"), **change)
    assert reason in why_illegal(ONE, shape)


def test_published_layers_have_configs():
    """Every FP8 layer in the list that 128-blocks divide runs, and narrow tiles run what wide ones do not."""
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            legal = [c for c in all_configs("two", dtype) if why_illegal(c, attrs.evolve(shape, dtype=dtype)) is None]
            blocks = shape.hidden_size % 128 == shape.intermediate_size % 128 == 0
            assert bool(legal) == (dtype == "bf16" or blocks), (name, dtype)
    odd = MoEShape(8, 2, 2880, 2880)
    assert {c.rows for c in all_configs("two", "bf16") if why_illegal(c, odd) is None} == {64}


def test_the_prefill_form_has_one_tile():
    """Its wgmma are as wide as the rows of a product, its tile has two scale groups of weights and 128 columns of h."""
    fp8, bf16 = all_configs("prefill", "fp8")[0], all_configs("prefill", "bf16")[0]
    assert (fp8.rows, fp8.product_columns, bf16.rows, bf16.product_columns) == (256, (128,), 256, (256,))
    assert (fp8.accumulators, bf16.accumulators) == (192, 128)
    assert [variant.symbol for variant in fp8.variants] == [
        "prefill_up_fp8_m128_n256_w8_s4",
        "prefill_down_fp8_m128_n256_w8_s4",
    ]
    assert fp8.ctas_per_sm == fp8.cluster == 1
    for changed, message in (
        ({"block_m": 64}, "are not compiled for form='prefill'"),
        ({"stages": 5}, "with stages=4"),
    ):
        assert message in why_illegal(attrs.evolve(fp8, **changed))
    assert "hidden_size=384" in why_illegal(fp8, MoEShape(8, 2, 384, 384, "fp8"))
    assert "intermediate_size=192" in why_illegal(bf16, MoEShape(8, 2, 512, 192))
    assert why_illegal(fp8, MoEShape(8, 2, 512, 384, "fp8")) is None


@given(
    st.sampled_from(("two", "one")),
    st.sampled_from(DTYPES),
    st.sampled_from(BLOCK_MS),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([4, 8]),
    st.integers(2, 12),
)
def test_what_is_legal_stays_legal_when_it_shrinks(form, dtype, block_m, block_n, warp_n, stages):
    """Fewer tokens or stages need less of everything."""
    config = CuteConfig(form, dtype, block_m, block_n, warp_n, stages)
    if why_illegal(config) is None:
        if block_m > 8:
            assert why_illegal(attrs.evolve(config, block_m=block_m - 8)) is None
        if stages > 2:
            assert why_illegal(attrs.evolve(config, stages=stages - 1)) is None


# The first draw of text loads Unicode's tables, 1.5 s on a busy machine.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(st.sampled_from([*KEYS, "other"]), st.one_of(st.integers(), st.booleans(), st.text(), st.none()))
)
def test_any_keys_give_a_config_or_a_sentence(keys):
    found = from_keys(keys, "fp8")
    if isinstance(found, CuteConfig):
        assert why_illegal(found) is None or why_illegal(found).endswith(".")
    else:
        assert found.endswith(".") and len(found) > 10


def test_keys_round_trip():
    for config in all_configs("one", "bf16"):
        assert from_keys(config.keys(8), "bf16") == config
    assert tuple(ONE.keys(1)) == KEYS
    assert "group_m=0" in from_keys(ONE.keys(0), "fp8")


def test_tiles_of_the_list_are_measured_ones_within_one_tma_box():
    for (form, _), tiles in LISTED.items():
        for block_n, warp_n, stages in tiles if form != "prefill" else ():
            assert block_n * warp_n <= 256 and stages in WHOLE[block_n, warp_n] and (block_n, warp_n) in DOWN_STAGES


@pytest.mark.parametrize(("dtype", "rows"), [("fp8", 128), ("bf16", 64)])
def test_layers_that_only_narrow_tiles_divide_have_configs_for_any_batch(dtype, rows):
    """Few tokens of an expert to many, whatever the least multiple that sizes of the dtype have."""
    shape = MoEShape(8, 2, 45 * rows, 45 * rows, dtype)
    legal = [config for config in all_configs("two", dtype) if why_illegal(config, shape) is None]
    heights = sorted({config.block_m for config in legal if config.rows == rows})
    assert heights[0] == 8 and heights[-1] == 104 and max(np.diff(heights)) <= 24
