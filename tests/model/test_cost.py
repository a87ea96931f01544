"""The cost models: what they predict, what they state about themselves, and what they do with poor tables."""

import json
import time
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap import schema
from rampwrap.errors import FitError, InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid, num_blocks
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.model.base import CostModel
from rampwrap.model.cost import MODELS
from rampwrap.model.features import Geometry, float_log2, pass_over
from rampwrap.model.fit import fit
from rampwrap.model.ramp4 import Ramp4
from rampwrap.model.wave import Wave
from rampwrap.plan import file as plan_file

SMS = 132
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HELD_OUT = (3, 6, 12, 24, 48, 96, 192, 384, 768, 1536)


def read_model(raw: Any) -> CostModel:
    return schema.read(raw, CostModel, FitError, plan_file.converter())


def dump_model(model: CostModel) -> Any:
    return plan_file.converter().unstructure(model, CostModel)


def histogram(rng, tokens, num_experts, skew, top_k=8):
    """Counts of top-k routing: no expert gets a token twice."""
    k = min(top_k, num_experts)
    share = np.ones(num_experts) if skew is None else rng.dirichlet(np.full(num_experts, skew)) + 1e-9
    scores = np.log(share) + rng.gumbel(size=(tokens, num_experts))
    return np.bincount(np.argsort(-scores, axis=1)[:, :k].ravel(), minlength=num_experts)


def truth(counts, grid, resident, speed):
    """Microseconds: memory-bound or compute-bound, whichever is longer, with whole waves. Not the fitted form."""
    blocks = int(num_blocks(counts, grid.block_m))
    waves = -(-blocks * grid.ctas_per_block // (SMS * resident))
    compute = waves * (1.0 + 0.08 * grid.block_m) * resident**0.7 * speed
    memory = 1.4 * np.count_nonzero(counts) * (1.0 + 8.0 / grid.block_m)
    return 9.0 + (memory**3 + compute**3) ** (1 / 3) + 0.002 * counts.sum()


def table(num_experts=64, tokens=TOKENS, skews=(None, 1.0, 0.3, 0.1), noise=0.003, seed=0, configs=24, split="train"):
    rng = np.random.default_rng(seed)
    grids, residents, speeds = [], [], []
    for index in range(configs):
        block_m = (16, 24, 32, 48, 64, 128)[index % 6]
        grids.append(CtaGrid(block_m, (8, 16, 32)[index // 6 % 3]))
        residents.append(1 + index % 4)
        speeds.append(0.8 + 0.4 * rng.random())
    counts, label = [], []
    for count in tokens:
        for skew in skews:
            counts.append(histogram(rng, count, num_experts, skew))
            label.append(f"M={count} " + ("uniform" if skew is None else f"dir{skew}"))
    us = np.array([[truth(c, *config) for config in zip(grids, residents, speeds, strict=True)] for c in counts])
    return Timings(
        us=us * rng.lognormal(0.0, noise, us.shape),
        counts=np.array(counts, dtype=np.int64),
        split=(split,) * len(counts),
        label=tuple(label),
        kernel="synthetic",
        device=Device("test", SMS),
        shape=MoEShape(num_experts, min(8, num_experts), 2048, 1024, "bf16"),
        configs=tuple({"index": index} for index in range(configs)),
        grids=tuple(grids),
    )


def with_us(timings, us):
    return attrs.evolve(timings, us=us)


@pytest.fixture(scope="module")
def profiled():
    return table()


@pytest.fixture(scope="module")
def unseen():
    """The same kernel (the same seed draws the same speeds) on other token counts and skews."""
    return table(tokens=HELD_OUT, skews=(0.6, 0.2, None))


@pytest.fixture(scope="module")
def default(profiled):
    return fit(profiled)


class TestFeatures:
    @given(st.integers(1, 2**42))
    def test_float_log2_is_exact_at_powers_of_two_and_near_elsewhere(self, value):
        got = float(float_log2(np.array([float(value)]))[0])
        assert 0.0 <= np.log2(value) - got <= 0.0861
        if value & (value - 1) == 0:
            assert got == value.bit_length() - 1

    @given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 300))
    def test_pass_over_counts_as_integers_do(self, counts, block_m):
        slots, active, blocks = pass_over(np.array(counts), np.array([block_m]))
        assert slots == sum(counts)
        assert active == sum(count > 0 for count in counts)
        assert blocks[0] == sum(-(-count // block_m) for count in counts)

    @given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 8), st.integers(1, 200))
    def test_waves_are_whole_and_unused_is_what_is_left(self, blocks, ctas, resident, sms):
        geometry = Geometry(sms, np.array([16]), np.array([[ctas]]), np.array([resident]))
        waves, unused = geometry.waves(np.array([float(blocks)]))
        assert waves[0] == -(-blocks * ctas // (sms * resident))
        assert 0.0 <= waves[0] - blocks * ctas / (sms * resident) - unused[0] <= 2.0**-19

    def test_waves_are_counted_by_launch(self):
        geometry = Geometry.of((CtaGrid(16, 8, launches=(4, 4)),), 4)
        assert geometry.waves(np.array([1.5]))[0][0] == 2 * np.ceil(1.5 * 4 / 4)


class TestPrediction:
    def test_shapes(self, default, profiled):
        assert default.predict(profiled.counts[0]).shape == (24,)
        assert default.predict(profiled.counts).shape == profiled.us.shape
        assert np.array_equal(default.predict(profiled.counts)[7], default.predict(profiled.counts[7]))
        with pytest.raises(InputError, match="shape"):
            default.predict(profiled.counts[None])

    def test_unseen_token_counts_and_skews(self, default, profiled, unseen):
        """Both fits see one half of what they are judged by: nothing."""
        best = unseen.us.min(axis=1)
        regret = {}
        for name, model in {"wave": default, "ramp4": fit(profiled, "ramp4")}.items():
            chosen = model.predict(unseen.counts).argmin(axis=1)
            regret[name] = float((unseen.us[np.arange(len(best)), chosen] / best - 1).mean())
        assert regret["wave"] < 0.008
        assert regret["wave"] < 0.5 * regret["ramp4"]

    def test_stated_error_is_of_the_size_of_the_real_one(self, default, unseen):
        near = unseen.us <= 1.1 * unseen.us.min(axis=1, keepdims=True)
        logs = np.where(near, np.log(default.predict(unseen.counts) / unseen.us), np.nan)
        apart = logs - np.nanmean(logs, axis=1, keepdims=True)
        assert 0.5 < default.error / (np.sqrt(2) * np.nanstd(apart)) < 4.0

    @pytest.mark.parametrize("resident", [1, 2, 3, 5, 8])
    def test_chooses_the_residency_that_made_the_waves(self, profiled, resident):
        """Times that are nothing but waves give it away for every config with enough of them."""
        blocks = np.stack([num_blocks(profiled.counts, grid.block_m) for grid in profiled.grids], axis=1)
        ctas = blocks * np.array([grid.ctas_per_block for grid in profiled.grids])
        model = fit(with_us(profiled, 5.0 + 3.0 * -(-ctas // (SMS * resident))))
        assert np.all(model.geometry.resident[ctas.max(axis=0) > 8 * SMS * resident] == resident)

    def test_far_outside_stays_sane(self, default, profiled):
        """Sixteen times the profiled load costs more than the most that was profiled, and not a hundredfold."""
        most = profiled.counts[profiled.num_tokens == 2048][0]
        ratio = default.predict(most * 16) / default.predict(most)
        assert np.all((ratio > 3.0) & (ratio < 64.0))
        assert np.all(default.predict(np.zeros(64, dtype=np.int64)) > 0)

    def test_a_histogram_unlike_any_profiled_leaves_static(self, default, profiled):
        """All slots on one expert, or on fewer experts than any profiled workload had: nothing is known of them."""
        least = int((profiled.counts > 0).sum(axis=1).min())
        slots = int(profiled.counts.sum(axis=1).max())
        for active in (0, 1, least - 1):
            counts = np.zeros(64, dtype=np.int64)
            counts[:active] = slots // max(1, active)
            for fallback in range(default.num_configs):
                assert default.choose(counts, fallback) == fallback
        best = [default.choose(row, fallback) for row in profiled.counts for fallback in range(default.num_configs)]
        assert len(set(best)) > 1 and least > 1

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 4096), min_size=64, max_size=64), st.randoms())
    def test_the_order_of_experts_does_not_matter(self, default, counts, random):
        shuffled = counts.copy()
        random.shuffle(shuffled)
        assert np.array_equal(default.predict(np.array(counts)), default.predict(np.array(shuffled)))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 4096), min_size=64, max_size=64))
    def test_sums_are_exact_so_their_order_cannot_matter(self, default, counts):
        """The formula in integers and fractions, support points backwards, gives the same bits."""
        t, got = default._fast, default.predict(np.array(counts))
        slots, active, heights = pass_over(np.array(counts), default.block_ms)
        for config in (0, 5, 17):
            cut = default.geometry.take(np.array([config]))
            blocks = heights[np.searchsorted(default.block_ms, cut.block_m)]
            waves, unused = cut.waves(blocks)
            row = np.array([slots, active, blocks[0], waves[0], unused[0]])
            row[:4] = float_log2(row[:4])
            row = np.clip(row / np.array([4.0, 2.0, 2.0, 2.0, 8.0]), *(x[:, t.cut_of[config]] for x in (t.low, t.high)))
            moved = 0
            for point in reversed(range(len(default.support))):
                far = float(sum(reversed(np.abs(row - t.points[:, t.cut_of[config], point]).tolist())))
                moved += int(2.0**20 / (1.0 + far)) * int(default.weights[config, point])
            features = [1, int(waves[0]), int(blocks[0] * cut.ctas_per_block[0]), int(active), int(slots)]
            trend = sum(int(a) * b for a, b in zip(default.coef[config], features, strict=True))
            us = trend * 2.0**-30 * (1.0 + min(max(moved * 2.0**-40, -0.6), 1.5))
            assert us == got[config]

    def test_one_prediction_takes_microseconds(self, profiled):
        """50 us is asked of 150 configs on a quiet machine; a shared one gets four times that."""
        model = fit(table(configs=150))
        model.predict(profiled.counts[30])
        took = []
        for _ in range(300):
            start = time.perf_counter()
            model.predict(profiled.counts[30])
            took.append(time.perf_counter() - start)
        assert min(took) < 200e-6


class TestChoice:
    def test_static_stays_within_the_margin(self, default, profiled):
        counts = profiled.counts[20]
        order = default.predict(counts).argsort()
        us = default.predict(counts)
        for fallback in order:
            gain = us[fallback] / us[order[0]] - 1
            expected = order[0] if gain > default.margin(counts) else fallback
            assert default.choose(counts, int(fallback)) == expected

    def test_choosing_must_pay_for_itself(self, default, profiled):
        counts = profiled.counts[20]
        assert default.choose(counts, int(default.predict(counts).argmax()), choosing_us=1e6) == int(
            default.predict(counts).argmax()
        )

    def test_ties_go_to_the_fallback_and_then_to_the_lower_index(self, profiled):
        us = np.tile(profiled.us[:, [0]], (1, 24))
        same = attrs.evolve(profiled, us=us, grids=(profiled.grids[0],) * 24)
        model = fit(same)
        assert model.choose(same.counts[5], 17) == 17
        assert int(model.predict(same.counts[5]).argmin()) == 0

    def test_a_config_never_serves_far_from_where_it_was_measured(self, profiled):
        us = profiled.us.copy()
        us[profiled.num_tokens > 64, 3] = np.nan
        us[profiled.num_tokens <= 64, 3] *= 0.2
        model = fit(with_us(profiled, us))
        large = profiled.counts[profiled.num_tokens == 2048][0]
        assert model.choose(large, 0) != 3
        assert model.choose(profiled.counts[profiled.num_tokens == 64][0], 0) == 3
        assert model.choose(large * 8, 5) == 5

    def test_ramp4_has_no_guard(self, profiled):
        model = fit(profiled, "ramp4")
        counts = profiled.counts[20]
        assert model.margin(counts) == 0.0
        assert model.choose(counts, 0) == int(model.predict(counts).argmin())

    def test_ramp4_is_the_published_form(self, profiled):
        model = fit(profiled, "ramp4")
        assert isinstance(model, Ramp4)
        blocks = num_blocks(profiled.counts, profiled.grids[4].block_m)
        waves = -(-blocks * profiled.grids[4].ctas_per_block // SMS)
        design = np.stack([np.ones(len(blocks)), waves, blocks, np.log(blocks + 1)], axis=1)
        expected = design @ np.linalg.lstsq(design, profiled.us[:, 4], rcond=None)[0]
        assert np.allclose(model.predict(profiled.counts)[:, 4], expected)


class TestFile:
    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_a_loaded_model_predicts_the_same_bits(self, name, profiled, unseen):
        us = profiled.us.copy()
        us[:, 2] = np.nan
        model = fit(with_us(profiled, us), name)
        again = read_model(json.loads(json.dumps(dump_model(model), allow_nan=False)))
        assert np.array_equal(again.predict(unseen.counts), model.predict(unseen.counts))
        assert np.all(np.isinf(again.predict(unseen.counts)[:, 2]))
        assert dump_model(again) == dump_model(model)
        assert [again.choose(c, 5) for c in unseen.counts] == [model.choose(c, 5) for c in unseen.counts]

    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_some_configs_predict_as_in_the_whole(self, name, profiled):
        model = fit(profiled, name)
        some = model.take((7, 2, 23))
        assert some.num_configs == 3
        assert np.array_equal(some.predict(profiled.counts), model.predict(profiled.counts)[:, [7, 2, 23]])

    def test_an_unknown_model_is_refused(self, profiled):
        with pytest.raises(FitError, match="choose one of ramp4, wave"):
            fit(profiled, "forest")
        with pytest.raises(FitError, match="ramp9"):
            read_model({"name": "ramp9"})

    def test_the_name_of_earlier_versions_is_read_and_not_written(self, profiled, unseen):
        model = fit(profiled, "default")
        written = dump_model(model)
        assert written["name"] == model.name == "wave"
        again = read_model({**written, "name": "default"})
        assert np.array_equal(again.predict(unseen.counts), model.predict(unseen.counts))


class TestPoorTables:
    def test_columns_and_cells_that_did_not_run(self, profiled, unseen):
        rng = np.random.default_rng(1)
        us = np.where(rng.random(profiled.us.shape) < 0.5, np.nan, profiled.us)
        us[:, :4] = np.nan
        model = fit(with_us(profiled, us))
        predicted = model.predict(unseen.counts)
        assert np.all(np.isinf(predicted[:, :4])) and np.all(np.isfinite(predicted[:, 4:]))
        best = unseen.us[:, 4:].min(axis=1)
        assert np.mean(unseen.us[np.arange(len(best)), predicted.argmin(axis=1)] / best - 1) < 0.03
        assert model.choose(unseen.counts[0], 0) == 0, "no gain can be shown over a config that was not fitted"

    def test_nothing_ran(self, profiled):
        nothing = with_us(profiled, np.full(profiled.us.shape, np.nan))
        for name in MODELS:
            with pytest.raises(FitError, match="profile"):
                fit(nothing, name)

    @pytest.mark.parametrize("rows", [[], [3], [3, 9], [3, 3, 3, 3, 3, 3]])
    def test_too_few_workloads(self, profiled, rows):
        with pytest.raises(FitError):
            fit(profiled, rows=np.array(rows, dtype=np.int64))

    def test_one_config(self, profiled):
        one = attrs.evolve(profiled, us=profiled.us[:, :1], configs=profiled.configs[:1], grids=profiled.grids[:1])
        model = fit(one)
        assert model.predict(one.counts).shape == (len(one.us), 1)
        assert model.choose(one.counts[0], 0) == 0

    def test_duplicated_workloads_change_nothing(self, profiled, unseen):
        twice = profiled.take(np.repeat(np.arange(len(profiled.us)), 2))
        assert np.array_equal(fit(twice).predict(unseen.counts), fit(profiled).predict(unseen.counts))

    def test_zero_spread(self, profiled):
        flat = with_us(profiled, np.full(profiled.us.shape, 40.0))
        model = fit(flat)
        assert np.allclose(model.predict(flat.counts), 40.0, rtol=1e-3)
        assert [model.choose(c, 9) for c in flat.counts] == [9] * len(flat.us)

    @pytest.mark.parametrize("num_experts", [1, 8, 1024])
    def test_few_and_many_experts(self, num_experts):
        timings = table(num_experts=num_experts, configs=6)
        model = fit(timings)
        error = np.abs(model.predict(timings.counts) / timings.us - 1)
        assert np.mean(error) < 0.03
        alone = np.zeros(num_experts, dtype=np.int64)
        alone[-1] = 3000
        assert np.all(np.isfinite(model.predict(alone)) & (model.predict(alone) > 0))

    def test_one_token_count(self):
        model = fit(table(tokens=(64,), skews=(None, 2.0, 1.0, 0.5, 0.2, 0.1)))
        assert np.isfinite(model.error)

    def test_empty_workloads_are_left_out(self, profiled):
        counts = profiled.counts.copy()
        counts[:3] = 0
        model = fit(attrs.evolve(profiled, counts=counts))
        assert isinstance(model, Wave)
        assert model.support[:, 0].min() > 0

    def test_more_workloads_than_support_points(self, unseen):
        many = table(skews=(None, 3.0, 2.0, 1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05))
        model = fit(many)
        assert isinstance(model, Wave)
        assert len(model.support) == 96 < len(many.us)
        best = many.us.min(axis=1)
        chosen = model.predict(many.counts).argmin(axis=1)
        assert np.mean(many.us[np.arange(len(best)), chosen] / best - 1) < 0.005

    @staticmethod
    def wild_table(experts, configs, rows, seed, wild, missing, most):
        rng = np.random.default_rng(seed)
        us = rng.lognormal(3.0, wild, (rows, configs)).clip(0.01, 1e6)  # what a table may hold
        us[rng.random(us.shape) < missing] = np.nan
        return Timings(
            us=us,
            counts=rng.integers(0, most, (rows, experts)),
            split=("train",) * rows,
            label=tuple(f"M={i // 3} x" for i in range(rows)),
            kernel="wild",
            device=Device("test", int(rng.integers(1, 200))),
            shape=MoEShape(experts, 1, 64, 64, "bf16"),
            configs=tuple({"i": i} for i in range(configs)),
            grids=tuple(CtaGrid(int(rng.integers(1, 200)), int(rng.integers(1, 99))) for _ in range(configs)),
        )

    def test_a_correction_beyond_all_bounds_is_left_out(self):
        """Found at random: nine workloads of one expert, times between 0.1 and 1e4 us."""
        timings = self.wild_table(1, 1, 9, 219, 3.0, 0.0, 50)
        model = fit(timings)
        predicted = model.predict(timings.counts)
        busy = timings.counts.any(axis=1)
        assert not model.weights.any() and (predicted[busy] > 0).all() and np.isfinite(predicted).all()
        assert np.allclose(predicted, [model.trend(row) for row in timings.counts])

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_table_gives_a_model_or_a_clear_error(self, data):
        """Random cells, missing or wild: predictions are positive, or the fit says why not."""
        sizes = [data.draw(st.integers(1, high)) for high in (9, 4, 12)]
        seed = data.draw(st.integers(0, 10**6))
        shares = [data.draw(st.sampled_from(some)) for some in ([0.0, 0.1, 3.0], [0.0, 0.3, 0.9], [1, 2, 50, 100000])]
        timings = self.wild_table(*sizes, seed, *shares)
        counts = timings.counts
        try:
            model = fit(timings)
        except FitError as error:
            assert "profile" in str(error)
            return
        predicted = model.predict(counts)
        # No tokens make no blocks: a trend without a start then predicts nothing at all.
        assert np.all(predicted[counts.any(axis=1)] > 0) and np.all(predicted >= 0)
        assert np.isfinite(model.error) and model.error >= 0
        assert 0 <= model.choose(counts[0], 0) < len(timings.configs)
        json.dumps(dump_model(model), allow_nan=False)
