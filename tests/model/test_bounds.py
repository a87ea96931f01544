"""Performance regions: the published rule, the derived ones, and their text, JSON and picture."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.compare.regions import run, table
from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES, Device
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.model.bounds import HELD_OUT, Bound, Region, Tile, expected_blocks, missed, published, regions

H200 = DEVICES["nvidia-h200"]
OLMOE = SHAPES["olmoe"]
shapes = st.sampled_from(sorted(SHAPES)).map(SHAPES.__getitem__)
tiles = st.builds(
    Tile, st.sampled_from((16, 32, 64, 128)), st.sampled_from((64, 128, 256)), st.sampled_from((32, 64, 128))
)


def test_regions_of_published_layers(is_recorded: Callable[[str, Any], None]) -> None:
    """All on an H200; some on every GPU, with few and many tokens, in FP8, with the best tile and with given ones."""
    olmoe, qwen, deepseek = (SHAPES[name] for name in ("olmoe", "qwen3-30b", "deepseek-v3-tp8"))
    fp8 = attrs.evolve(deepseek, dtype="fp8")
    cases: list[tuple[MoEShape, Device, int, Tile | None]] = [(shape, H200, 64, None) for shape in SHAPES.values()]
    for device in DEVICES.values():
        cases += [(olmoe, device, 1, None), (olmoe, device, 256, None), (qwen, device, 4096, None)]
        cases += [(deepseek, device, 2048, Tile(64, 128, 128))]
        cases += [(fp8, device, 16, None), (fp8, device, 4096, Tile(16, 64, 256))] if device.fp8_tflops else []
    found = [regions(shape, device, tokens, tile).to_dict() for shape, device, tokens, tile in cases]
    is_recorded("regions", found)


class TestPublished:
    @pytest.mark.parametrize(
        ("n_tiles", "kappa", "omega", "swizzle", "split_k", "wide_n"),
        [
            (1440, 1, 1.0, False, False, False),
            (1441, 1, 1.001, True, False, True),
            (30, 48, 0.2, False, False, False),
            (30, 48, 0.1999, False, True, False),
            (31, 47, 0.1, True, False, False),
        ],
    )
    def test_edges(self, n_tiles: int, kappa: int, omega: float, swizzle: bool, split_k: bool, wide_n: bool) -> None:
        """lambda kappa > 1440; kappa >= 48 and omega < 0.2; omega > 1: strict where the paper is strict."""
        assert published(n_tiles, kappa, omega) == {"swizzle": swizzle, "split_k": split_k, "wide_n": wide_n}

    @given(shape=shapes, tokens=st.integers(1, 8192))
    def test_region_carries_it(self, shape: MoEShape, tokens: int) -> None:
        """Swizzle and wide N are judged on the up launch, split-K on the down launch, which alone can be split."""
        region = regions(shape, H200, tokens)
        up, down = region.up, region.down
        assert region.swizzle.published == (up.n_tiles * up.kappa > 1440)
        assert region.wide_n.published == (up.omega > 1)
        assert region.split_k.published == (down.kappa >= 48 and down.omega < 0.2)

    def test_1440_tiles_are_half_of_an_l2(self) -> None:
        """The number is the capacity of half an H100's L2, as the derivation says."""
        half = DEVICES["nvidia-h100-80gb-hbm3"].l2_bytes / 2
        assert abs(1440 * 128 * 128 / half - 1) < 0.11


class TestGeometry:
    def test_olmoe(self) -> None:
        """By hand: N = 2048, K = 2048 and N = 2048, K = 1024 in tiles of 128 x 64."""
        region = regions(OLMOE, H200, 4096)
        assert region.tile == Tile(128, 128, 64)
        assert (region.up.rho, region.up.n_tiles, region.up.kappa) == (512, 16, 32)
        assert (region.down.rho, region.down.n_tiles, region.down.kappa) == (256, 16, 16)
        assert region.up.omega == pytest.approx(expected_blocks(OLMOE, 4096, 128) * 16 / 132)

    @given(shape=shapes, tokens=st.integers(1, 4096), block_m=st.sampled_from((16, 64, 128)))
    def test_expected_blocks_are_bounded(self, shape: MoEShape, tokens: int, block_m: int) -> None:
        """Between what the rows need and one more for each expert; more tokens never make fewer."""
        blocks = expected_blocks(shape, tokens, block_m)
        rows = tokens * shape.top_k / block_m
        assert rows * (1 - 1e-9) <= blocks <= rows + min(shape.num_experts, tokens * shape.top_k) + 1e-9
        assert blocks <= expected_blocks(shape, tokens + 1, block_m) + 1e-9

    def test_expected_blocks_of_one_expert(self) -> None:
        """Without chance there is no expectation: all tokens go to the one expert."""
        assert expected_blocks(MoEShape(1, 1, 64, 64), 33, 16) == 3

    def test_only_local_experts_count(self) -> None:
        """A rank with half of the experts has half of the blocks."""
        half = attrs.evolve(OLMOE, num_local_experts=32)
        assert expected_blocks(half, 256, 16) == pytest.approx(expected_blocks(OLMOE, 256, 16) / 2)


class TestBound:
    @given(shape=shapes, tile=tiles, tokens=st.integers(1, 4096), factor=st.floats(1.0, 4.0))
    def test_better_devices_are_faster(self, shape: MoEShape, tile: Tile, tokens: int, factor: float) -> None:
        """More bandwidth or more L2 never costs time."""
        assert H200.copy_gbps is not None
        now = Bound(H200, shape, tokens).layer_us(tile)
        faster = attrs.evolve(H200, copy_gbps=H200.copy_gbps * factor)
        larger = attrs.evolve(H200, l2_bytes=int(H200.l2_bytes * factor))
        for device in (faster, larger):
            assert Bound(device, shape, tokens).layer_us(tile) <= now * (1 + 1e-9)

    @given(shape=shapes, tile=tiles, tokens=st.integers(1, 4096), group=st.sampled_from((2, 8, 16)))
    def test_swizzle_never_adds_traffic(self, shape: MoEShape, tile: Tile, tokens: int, group: int) -> None:
        """More M blocks side by side share at least as many reads."""
        bound = Bound(H200, shape, tokens)
        assert bound.layer_us(tile, group_m=group) <= bound.layer_us(tile)

    @given(shape=shapes, tile=tiles, tokens=st.integers(1, 4096))
    def test_time_is_at_least_the_weights(self, shape: MoEShape, tile: Tile, tokens: int) -> None:
        """No launch beats reading the active experts once."""
        bound = Bound(H200, shape, tokens)
        share = expected_blocks(shape, tokens, tokens) / shape.num_local_experts
        assert bound.layer_us(tile) >= shape.weight_bytes * share / bound.bandwidth

    @given(low=st.floats(0.01, 8), high=st.floats(0.01, 8))
    def test_misses_grow_with_the_sweep(self, low: float, high: float) -> None:
        """Nothing misses that fits; 20 % hit at twice the cache, 2 % at four times, as `timer.COLD` counts on."""
        low, high = sorted((low, high))
        assert 0 <= missed(low) <= missed(high) + 1e-6 <= 1 + 1e-6
        assert missed(0.99) == 0
        assert missed(2) == pytest.approx(0.80, abs=0.01)
        assert missed(4) == pytest.approx(0.98, abs=0.01)

    def test_shared_memory_by_hand(self) -> None:
        """160 bytes a clock for 128x128, 128 for 128x256, 224 for 128x64; shared memory moves 128."""
        bound = Bound(H200, OLMOE, 1)
        found = [bound.slowdown(Tile(128, n, 64)) for n in (64, 128, 256)]
        assert found == pytest.approx([1.75, 1.25, 1.0])

    def test_ridge_by_hand(self) -> None:
        """790 TFLOP/s over 4.3 TB/s, two bytes a weight, two operations a weight and row."""
        assert Bound(H200, OLMOE, 1).ridge_rows == pytest.approx(790e12 / 4.3e12, rel=1e-6)

    # 100 SMs of 7 TFLOP/s, 4 TB/s; one expert, so that nothing is random; a tile of 64 x 128, 64 deep.
    PLAIN = Device("plain", 100, 100_000_000, 4000.0, 233_472, 700.0, None)

    def test_a_launch_by_hand(self) -> None:
        """32 CTAs on 100 SMs draw too little of HBM; each multiplies at 2/3 of its rate, held up by shared memory."""
        bound = Bound(self.PLAIN, MoEShape(1, 1, 4096, 2048), 64)
        tile = Tile(64, 128, 64)
        # 24576 bytes a stage; 4 stages and 1 KB fit twice into an SM, and 64 KB of registers hold 4.
        assert bound.pipeline(tile) == (3 * 24_576, 2)
        assert bound.saturating_omega(tile) == pytest.approx(4e6 / 73_728 / 100)
        assert bound.slowdown(tile) == pytest.approx(2048 * 2 * (2 / 128 + 1 / 64 + 1 / 64) / 128)
        cta = 2 * 64 * 128 * 4096 / 7e6 * 1.5 + 0.5
        assert bound.launch_us(4096, 4096, tile) == pytest.approx(1 + cta)  # 15.88 us; its loads take 14.44
        # Four parts: 128 CTAs, 1.78 of a wave with the half CTA lost; parts are written and read in float32.
        parts = 1 + 2 * (4 * 4 - 2) * 64 * 4096 / 4e6
        loads = 2 * (4096 * 4096 + 64 * 4096) / 4e6
        split = 1 + max(loads, 1.78 * (2 * 64 * 128 * 1024 / 7e6 * 1.5 + 0.5)) + parts
        assert bound.launch_us(4096, 4096, tile, split_k=4) == pytest.approx(split)

    def test_what_is_read_again_by_hand(self) -> None:
        """1024 rows are 16 blocks, 12.5 of them in flight; weights of twice the half L2 are missed at 0.797."""
        bound = Bound(self.PLAIN, MoEShape(1, 1, 8192, 2048), 1024)
        tile = Tile(64, 128, 64)
        columns = 50_000_000 // 8192
        ctas = 16 * -(-columns // 128)
        in_flight = 100 * 2 * 16 / ctas
        sweeps = 1 + (16 / in_flight - 1) * missed(columns * 8192 * 2 / 50e6)
        memory = 2 * (columns * 8192 * sweeps + 1024 * 8192) / 4e6
        cta = 2 * 64 * 128 * 8192 / 7e6 * 1.5 + 0.5
        assert bound.launch_us(columns, 8192, tile) == pytest.approx(1 + max(memory, (ctas / 100 + 0.5) * cta))
        assert bound.launch_us(columns, 8192, Tile(64, 8192, 64)) == math.inf


class TestVerdicts:
    @given(
        shape=shapes,
        tokens=st.integers(1, 16384),
        name=st.sampled_from(sorted(DEVICES)),
        dtype=st.sampled_from(("bf16", "fp16", "fp8")),
    )
    def test_every_number_is_finite(self, shape: MoEShape, tokens: int, name: str, dtype: str) -> None:
        """For every shape, batch, device and type that the device has."""
        device = DEVICES[name]
        if dtype == "fp8" and device.fp8_tflops is None:
            return
        region = regions(attrs.evolve(shape, dtype=dtype), device, tokens)
        for verdict in (region.swizzle, region.split_k, region.wide_n):
            assert all(math.isfinite(value) for value in (verdict.gain, verdict.value, verdict.threshold))
            assert verdict.threshold > 0
        for launch in (region.up, region.down):
            assert min(launch.rho, launch.n_tiles, launch.omega, launch.kappa) > 0

    @given(shape=shapes, tokens=st.integers(1, 16384))
    def test_help_needs_its_threshold(self, shape: MoEShape, tokens: int) -> None:
        """No property is predicted to help on the wrong side of its necessary condition."""
        region = regions(shape, H200, tokens)
        assert not region.swizzle.helps or region.swizzle.value > region.swizzle.threshold
        assert not region.wide_n.helps or region.wide_n.value > region.wide_n.threshold
        assert not region.split_k.helps or region.split_k.value < region.split_k.threshold

    @pytest.mark.parametrize("name", sorted(set(SHAPES) - set(HELD_OUT)))
    def test_one_token_needs_no_wide_tile(self, name: str) -> None:
        """A block with one row is all weights: they are read once whatever the tile."""
        region = regions(SHAPES[name], H200, 1)
        assert not region.wide_n.helps and not region.swizzle.helps

    def test_olmoe_as_measured(self) -> None:
        """vLLM's kernel on an H200 (an earlier table): a wide tile loses up to 512 tokens and wins from 1024 up."""
        helps = {tokens: regions(OLMOE, H200, tokens).wide_n.helps for tokens in (8, 64, 256, 512, 1024, 2048, 4096)}
        assert helps == {8: False, 64: False, 256: False, 512: False, 1024: True, 2048: True, 4096: True}

    def test_swizzle_needs_two_sweeps(self) -> None:
        """Mixtral's experts overflow L2, but only several M blocks of an expert read them again."""
        mixtral = SHAPES["mixtral-8x7b"]
        assert not regions(mixtral, H200, 8).swizzle.helps
        assert regions(mixtral, H200, 4096).swizzle.helps
        assert not regions(mixtral, attrs.evolve(H200, l2_bytes=1 << 30), 4096).swizzle.helps

    def test_split_k_fills_an_idle_gpu(self) -> None:
        """A few CTAs with a long reduction leave HBM idle; many CTAs do not, and short ones have nothing to split."""
        lone = MoEShape(2, 1, 512, 16384)
        assert regions(lone, H200, 1).split_k.helps
        assert not regions(lone, H200, 4096).split_k.helps
        assert not regions(MoEShape(2, 1, 512, 64), H200, 1).split_k.helps

    def test_as_predicted_before_the_race(self) -> None:
        """The gains that were written down for ten layers before they were measured (benchmarks/README.md)."""
        record = pathlib.Path(__file__).parent.parent.parent / "benchmarks" / "results" / "h200-regions.json"
        if not record.exists():
            pytest.skip("the figures are in the repository only")
        findings = json.loads(record.read_text())["findings"]
        assert len(findings) == 84
        for its in findings:
            verdict = getattr(regions(SHAPES[its["model"]], H200, its["num_tokens"]), its["name"])
            assert verdict.gain == pytest.approx(its["predicted_gain"], rel=1e-6, abs=1e-9), its
            assert (verdict.helps, verdict.published) == (its["predicted"], its["published"]), its

    def test_own_tile(self) -> None:
        """A given tile is what is shown and judged."""
        region = regions(OLMOE, H200, 256, Tile(64, 64, 32))
        assert region.tile == Tile(64, 64, 32)
        assert (region.up.n_tiles, region.up.kappa) == (32, 64)


class TestBadInput:
    @pytest.mark.parametrize("tokens", [0, -3])
    def test_no_tokens(self, tokens: int) -> None:
        with pytest.raises(InputError, match="num_tokens"):
            regions(OLMOE, H200, tokens)

    @pytest.mark.parametrize("name", ["copy_gbps", "bf16_tflops", "smem_bytes_per_sm", "l2_bytes"])
    def test_unknown_constant(self, name: str) -> None:
        """The message names the constant."""
        with pytest.raises(InputError, match=name):
            regions(OLMOE, attrs.evolve(H200, **{name: 0}), 8)

    def test_a100_has_no_fp8(self) -> None:
        with pytest.raises(InputError, match="fp8_tflops"):
            regions(attrs.evolve(OLMOE, dtype="fp8"), DEVICES["nvidia-a100-sxm4-80gb"], 8)

    @pytest.mark.parametrize("tile", [Tile(0, 64, 64), Tile(16, 64, -1), Tile(4096, 4096, 64), Tile(16, 128, 4096)])
    def test_tile_that_does_not_fit(self, tile: Tile) -> None:
        with pytest.raises(InputError, match="does not fit"):
            regions(OLMOE, H200, 8, tile)

    def test_device_without_room(self) -> None:
        """No tile at all fits an SM of a few kilobytes."""
        with pytest.raises(InputError, match="does not fit"):
            regions(OLMOE, attrs.evolve(H200, smem_bytes_per_sm=8192), 8)


class TestOutput:
    def test_run(self, tmp_path: pathlib.Path) -> None:
        """What the command prints: text, and JSON under the published names."""
        found = run(SHAPES, H200, [8, 4096], None)
        text = found.pop("text")
        assert all(name in text for name in SHAPES) and "kimi-k2-tp8*" in text
        raw = json.loads(json.dumps(found))
        assert set(raw["regions"]) == set(SHAPES) and raw["held_out"] == list(HELD_OUT)
        region = raw["regions"]["olmoe"][1]
        assert region["up"]["lambda"] == 16 and region["wide_n"]["helps"] is True

    def test_table_has_a_line_a_region(self) -> None:
        rows: dict[str, list[Region]] = {"olmoe": [regions(OLMOE, H200, tokens) for tokens in (1, 2, 3)]}
        assert len(table(rows).splitlines()) == 5

    def test_picture(self, tmp_path: pathlib.Path) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "regions.png"
        run({"olmoe": OLMOE}, H200, [8, 4096], path)
        assert path.read_bytes().startswith(b"\x89PNG")
