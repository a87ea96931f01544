"""The optional extension makes numpy's choices, bit for bit, and leaves to numpy whatever it was not made for."""

import functools
import pickle
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rampwrap import Dispatcher, MoEShape, Plan
from rampwrap.compare.oracle import Renumbered
from rampwrap.errors import InputError
from rampwrap.kernel.grid import IntArray
from rampwrap.measure.timings import Timings
from rampwrap.model import compiled as native
from rampwrap.model.features import Geometry, pass_over
from rampwrap.model.in_graph import pack
from rampwrap.model.wave import Wave
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, Workload, workload_grid
from rampwrap.testing.sim import NullKernel, SimKernel

pytestmark = pytest.mark.skipif(
    native.score is None,
    reason="rampwrap.model._score is not built; 'pip install -e .' builds it where there is a C compiler",
)


def numpy_only(call: Any) -> Any:
    """What `call` returns where the extension is missing."""
    score, native.score = native.score, None
    try:
        return call()
    finally:
        native.score = score


@functools.cache
def fitted(num_experts: int, seed: int) -> Plan:
    """A plan of the simulated kernel; some configs were measured on some workloads only, one on none."""
    rng = np.random.default_rng(seed)
    shape = MoEShape(num_experts, min(8, num_experts), 2048, int(rng.choice([512, 1024, 1536])))
    kernel = SimKernel(shape)
    names = ("uniform", "dirichlet:0.3", "zipf:1.2") if num_experts > 1 else ("uniform",)
    rows = workload_grid([1, 4, 16, 64, 256, 1024], [Routing.parse(name) for name in names])
    counts = np.stack([expert_counts(row.topk_ids(num_experts, shape.top_k), num_experts) for row in rows])
    us = np.array([[kernel.time_us(config, row) for config in kernel.configs] for row in counts])
    us *= rng.lognormal(0.0, 0.05, us.shape)
    us[:, 5] = np.nan
    us[len(us) // 2 :, 7] = np.nan
    table = Timings(
        us=us,
        counts=counts,
        split=("train",) * len(rows),
        label=tuple(row.label for row in rows),
        kernel=NullKernel.name,
        kernel_version=kernel.version,
        device=kernel.device,
        shape=shape,
        configs=kernel.configs,
        grids=tuple(kernel.grid(config, shape) for config in kernel.configs),
    )
    return make_plan(table)


def random_model(seed: int) -> Wave:
    """Numbers of every size that can be packed, and some that no fit would state."""
    rng = np.random.default_rng(seed)
    configs, launches = int(rng.integers(1, 40)), int(rng.integers(1, 4))
    geometry = Geometry(
        int(rng.integers(8, 200)),
        rng.choice([1, 8, 16, 24, 48, 64, 100, 128, 256], configs),
        np.column_stack([rng.integers(low, 128, configs) for low in (1, 0, 0)[:launches]]),
        rng.integers(1, 9, configs),
    )
    block_ms = np.unique(geometry.block_m)
    points = np.sort(rng.integers(1, 2 ** rng.integers(2, 18), (int(rng.integers(1, 97)), 2 + len(block_ms))), axis=0)
    coef = rng.integers(0, 2 ** rng.integers(1, 36, 5), (configs, 5))
    coef[rng.random(configs) < 0.1] = 0
    weights = rng.integers(-(2**20), 2**20, (configs, len(points))) >> int(rng.integers(0, 12))
    span = np.sort(rng.integers(0, 2 ** rng.integers(1, 20), (configs, 2)), axis=1)
    local = tuple((int(s), float(e)) for s, e in zip(np.unique(points[:, 0])[::7], rng.random(99) / 10, strict=False))
    return Wave(
        geometry, span, float(rng.random() / 10), local[: int(rng.integers(0, 9))], coef, weights, points, block_ms
    )


def histograms(num_experts: int) -> st.SearchStrategy[IntArray]:
    """Ordinary, empty, one expert with everything, huge, and everything at the edge of a block."""

    def made(kind: str, seed: int, top: int) -> IntArray:
        rng, out = np.random.default_rng(seed), np.zeros(num_experts, dtype=np.int64)
        if kind == "one":
            out[rng.integers(num_experts)] = 1 << top
        elif kind == "equal":
            out[:] = rng.integers(1 << min(top, 28))
        elif kind == "skewed":
            out[:] = rng.multinomial(1 << min(top, 30), rng.dirichlet(np.full(num_experts, 0.05)))
        elif kind == "blocks":
            out[:] = rng.choice([16, 32, 64, 128, 1024]) * rng.integers(0, 3, num_experts) + rng.integers(-1, 2)
        elif kind == "few":
            np.add.at(out, rng.integers(num_experts, size=8), 1)
        return np.maximum(out, 0)

    kinds = st.sampled_from(["zero", "one", "equal", "skewed", "blocks", "few"])
    return st.builds(made, kinds, st.integers(0, 2**32 - 1), st.integers(0, 43))


def assert_same(model: Wave, counts: IntArray, fallback: int, choosing_us: float) -> None:
    expected = numpy_only(lambda: (model.choose(counts, fallback, choosing_us), model.predict(counts)))
    slots, _, heights = pass_over(counts, model.block_ms)
    waves, _ = model.geometry.waves(heights[np.searchsorted(model.block_ms, model.geometry.block_m)])
    # Numpy serves where a float32 does not hold all bits of a number and of half its logarithm.
    large = slots >= 1 << 22 or (slots and waves.max() >= 1 << 23)
    assert (native.choose(model._packed, counts, 0, fallback, choosing_us) is None) == large
    assert model.choose(counts, fallback, choosing_us) == expected[0]
    assert model.predict(counts).tobytes() == expected[1].tobytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fitted_plans_choose_and_predict_the_same_bits(data: st.DataObject) -> None:
    num_experts = data.draw(st.sampled_from([1, 2, 64, 1024]))
    plan = fitted(num_experts, data.draw(st.integers(0, 1)))
    counts = data.draw(histograms(num_experts))
    policy = plan.policy(data.draw(st.sampled_from([0.0, 0.5, 4.0])))
    tokens = -(-int(counts.sum()) // plan.shape.top_k)
    assert policy.index(counts, tokens) == numpy_only(lambda: policy.index(counts, tokens))
    assert policy.select(counts, tokens) == numpy_only(lambda: policy.select(counts, tokens))
    model, candidates = policy._part(tokens)
    for some, size in ((model, len(candidates)), (plan.model, len(plan.configs))):
        assert isinstance(some, Wave) and some._packed
        if size > 1:
            assert_same(some, counts, data.draw(st.integers(0, size - 1)), policy.choosing_us)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 64, 257]), st.data())
def test_any_model_chooses_and_predicts_the_same_bits(seed: int, num_experts: int, data: st.DataObject) -> None:
    model = random_model(seed)
    # Some configs twice, so that there are ties.
    model = model.take(np.random.default_rng(seed).integers(0, model.num_configs, model.num_configs))
    assert model._packed
    if model.num_configs > 1:
        fallback = data.draw(st.integers(0, model.num_configs - 1))
        assert_same(model, data.draw(histograms(num_experts)), fallback, data.draw(st.floats(0.0, 50.0)))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 64, 257]), st.data())
def test_a_bucket_packed_for_the_gpu_is_one_for_c(seed: int, num_experts: int, data: st.DataObject) -> None:
    """One layout: with a cut for each candidate, filled up to powers of two, it makes the same choice."""
    model, rng = random_model(seed), np.random.default_rng(seed)
    high = np.flatnonzero(model.geometry.block_m > 1)
    assume(len(high))
    some = model.take(rng.choice(high, rng.integers(1, 5)))
    counts, choosing_us = data.draw(histograms(num_experts)), data.draw(st.floats(0.0, 50.0))
    fallback = data.draw(st.integers(0, some.num_configs - 1))
    chosen = native.choose(pack(some).to_bytes(), counts, 0, fallback, choosing_us)
    assert chosen == native.choose(some._packed, counts, 0, fallback, choosing_us)


@pytest.mark.parametrize(
    ("slots", "chosen"), [(4, 2), (5, 0), (14, 0), (15, 0), (16, 2), (20, 2), (30, 2), (36, 0), (40, 0), (41, 2)]
)
def test_ties_and_edges(slots: int, chosen: int) -> None:
    """Two configs at 100 us, measured on 10 .. 20 slots, and the static one at 103; the error is 0, 9 and 0 %."""
    geometry = Geometry(10, np.full(3, 16), np.ones((3, 1), dtype=np.int64), np.ones(3, dtype=np.int64))
    coef = np.outer([100 << 30, 100 << 30, 103 << 30], [1, 0, 0, 0, 0])
    span, local = np.array([[10, 20], [10, 20], [0, 99]]), ((10, 0.0), (20, 0.09), (50, 0.0))
    model = Wave(
        geometry,
        span,
        0.0,
        local,
        coef,
        np.zeros((3, 1), dtype=np.int64),
        np.ones((1, 3), dtype=np.int64),
        np.array([16]),
    )
    counts = np.array([slots - 1, 0, 1])
    assert native.choose(model._packed, counts, 0, 2, 0.0) == chosen
    assert numpy_only(lambda: model.choose(counts, 2)) == chosen


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2, 64, 1024]),
    st.integers(0, 700),
    st.integers(1, 9),
    st.sampled_from(["int32", "int64", "torch.int32", "torch.int64", "strided", "uint8", "big-endian", "list"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0, 0, -1, 1, 1 << 31]),
)
def test_a_call_chooses_alike_from_any_ids(
    num_experts: int, tokens: int, top_k: int, kind: str, seed: int, wrong: int
) -> None:
    rng, plan = np.random.default_rng(seed), fitted(num_experts, 0)
    ids = rng.permutation(num_experts)[rng.zipf(1.3, (tokens, top_k)) % num_experts]
    if wrong and tokens and kind != "uint8":
        # One id out of range, of each kind: negative, past the end, past 32 bits; -1 and num_experts are padding.
        out = {-1: -1 - int(rng.integers(9)), 1: num_experts + int(rng.integers(2))}.get(
            wrong, wrong if "32" not in kind else num_experts
        )
        ids[rng.integers(tokens), rng.integers(top_k)] = out
    given: Any = {
        "strided": np.repeat(ids, 2, axis=1)[:, ::2],
        "uint8": (ids % min(num_experts, 200)).astype(np.uint8),
        "big-endian": ids.astype(">i8"),
        "list": ids.tolist(),
    }.get(kind)
    if given is None:
        given = ids.astype(kind.removeprefix("torch."))
        given = torch.from_numpy(given) if kind.startswith("torch.") else given
    moe = Dispatcher(NullKernel(plan.shape), plan)

    def chosen() -> int | str:
        try:
            return moe._choose(given, None)
        except InputError as error:
            return str(error)

    assert chosen() == numpy_only(chosen)


def test_ids_in_the_usual_form_never_reach_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fitted(64, 0)
    moe = Dispatcher(NullKernel(plan.shape), plan)
    monkeypatch.setattr("rampwrap.dispatch.host.expert_counts", None)
    for tokens in (1, 64, 700):
        ids = Workload(tokens, Routing.parse("zipf:1.2")).topk_ids(64, 8)
        for usual in (ids.astype(np.int32), ids.astype(np.int64), torch.from_numpy(ids)):
            assert moe(usual) == 0.0
    read_only = ids.astype(np.int32)
    read_only.setflags(write=False)
    moe(read_only)
    assert sum(moe.launch_counts) == 10


def test_an_expert_map_is_left_to_numpy() -> None:
    plan = fitted(64, 0)
    moe = Dispatcher(NullKernel(plan.shape), plan)
    ids = Workload(256, Routing.parse("zipf:1.2")).topk_ids(64, 8)
    mine = np.where(np.arange(64) < 32, np.arange(64), -1)
    assert moe._choose(ids, mine) == numpy_only(lambda: moe._choose(ids, mine))
    assert moe._choose(ids, mine) == moe.policy.index(expert_counts(ids, 64, mine), 256)


def test_a_renumbered_policy_chooses_in_its_numbering() -> None:
    plan = fitted(64, 0)
    inner, where = plan.policy(), tuple(reversed(range(len(plan.configs))))
    outer = Renumbered(tuple(reversed(plan.configs)), inner, where)
    ids = Workload(256, Routing.parse("dirichlet:0.3")).topk_ids(64, 8)
    chosen = inner.index(expert_counts(ids, 64), 256)
    assert outer.index_of_ids(ids, 64) == where[chosen]
    explained = outer.select(expert_counts(ids, 64), 256)
    own = inner.select(expert_counts(ids, 64), 256)
    assert (
        explained == attrs.evolve(own, index=where[chosen])
        and outer.index(expert_counts(ids, 64), 256) == where[chosen]
    )
    static = Renumbered(outer.configs, plan.static_policy(), where)
    assert static.index_of_ids(ids, 64) is None and outer.needs_counts and not static.needs_counts


def test_one_candidate_still_has_its_ids_checked() -> None:
    model = fitted(64, 0).model.take((3,))
    assert model.choose_ids(np.zeros((1, 8), dtype=np.int32), 64, 0) == 0
    assert model.choose_ids(np.full((1, 8), 64, dtype=np.int32), 64, 0) == 0  # padding
    assert model.choose_ids(np.full((1, 8), 65, dtype=np.int32), 64, 0) is None


def test_a_model_that_cannot_be_exact_is_left_to_numpy() -> None:
    model = fitted(64, 0).model
    assert isinstance(model, Wave)
    heavy = attrs.evolve(model, weights=model.weights + (1 << 31))
    assert heavy._packed == b""
    assert heavy.choose_ids(np.zeros((1, 8), dtype=np.int32), 64, 0) is None
    assert np.isfinite(heavy.predict(np.ones(64, dtype=np.int64))).any()


def test_a_model_survives_pickling() -> None:
    model = fitted(64, 0).model
    again, counts = pickle.loads(pickle.dumps(model)), np.arange(64)
    assert again.choose(counts, 2) == model.choose(counts, 2)
    assert np.array_equal(again.predict(counts), model.predict(counts))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_no_bytes_make_it_read_outside_of_them(seed: int, noise: bytes) -> None:
    rng, packed = np.random.default_rng(seed), bytearray(fitted(64, 0).model._packed)  # type: ignore[attr-defined]
    ids, out = np.zeros((4, 8), dtype=np.int32), np.empty(23)
    for broken in (noise, bytes(packed[: rng.integers(len(packed))]), bytes(packed) + noise + b"1"):
        assert native.choose(broken, ids, 64, 0, 0.0) is None
    for _ in range(8):
        at = int(rng.integers(64 if rng.random() < 0.5 else len(packed)))
        packed[at] = int(rng.integers(256))
    assert native.choose(bytes(packed), ids, 64, 0, 0.0) in {None, *range(24)}
    assert native.predict(bytes(packed), np.ones(64, dtype=np.int64), len(out)) is None


def test_wrong_arguments_raise_or_are_left_to_numpy() -> None:
    packed, ids = fitted(64, 0).model._packed, np.zeros((4, 8), dtype=np.int32)  # type: ignore[attr-defined]
    assert native.choose(packed, ids, 64, 0, 0.0) is not None
    for array, experts, fallback in (
        (ids, 64, 24),
        (ids, 64, -1),
        (ids, -1, 0),
        (ids, 1 << 40, 0),
        (None, 64, 0),
        (ids, 0, 0),
    ):
        assert native.choose(packed, array, experts, fallback, 0.0) is None
    for wrong in ((packed, ids, 64, 0), (packed, ids, "64", 0, 0.0), (packed, ids, 64, 0, "0")):
        with pytest.raises(TypeError):
            native.score.choose(*wrong)
    with pytest.raises(TypeError):
        native.score.predict(packed)
    assert not native.score.predict(packed, np.ones(64, dtype=np.int64), np.empty(24, dtype=np.int64))
