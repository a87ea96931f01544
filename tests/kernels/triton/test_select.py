"""`rampwrap.kernels.triton.select.host` against `CostModel.choose` and `align_tokens`, on the GPU or in the interpreter."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import attrs
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rampwrap.errors import FitError, InputError, PlanError
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.select.host import (
    Candidates,
    align_and_select,
    allocate_selected,
    choose,
    selected_in,
    selection_ints,
)
from rampwrap.model.features import Geometry, pass_over
from rampwrap.model.in_graph import TALLY, pack
from rampwrap.model.packed import MAX_SLOTS
from rampwrap.model.ramp4 import Ramp4
from rampwrap.model.wave import Wave

if not INTERPRETED.value and not torch.cuda.is_available():
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 and there is no GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED.value else "cuda"
relaxed = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def histogram(rng, kind, num_experts, slots):
    """int64 [E] of `slots` routed rows."""
    if kind == "one":
        counts = np.zeros(num_experts, dtype=np.int64)
        counts[rng.integers(num_experts)] = slots
        return counts
    weights = {
        "even": lambda: np.ones(num_experts),
        "skewed": lambda: rng.dirichlet(np.full(num_experts, 0.1)),
        "few": lambda: (rng.random(num_experts) < 0.1) + 1e-9,
    }[kind]()
    return rng.multinomial(slots, weights / weights.sum())


def random_model(rng, num_candidates, num_experts=64):
    """A model whose numbers no fit would give: heavy weights, close coefficients, some configs unfitted."""
    block_m = rng.choice([8, 16, 24, 32, 40, 64, 104, 128], num_candidates)
    num_launches = rng.integers(1, 4)
    launches = rng.integers(1, 200, (num_candidates, num_launches))
    launches[:, 1:] *= rng.integers(0, 2, (num_candidates, num_launches - 1))
    geometry = Geometry(int(rng.choice([132, 148, 7])), block_m, launches, rng.integers(1, 9, num_candidates))
    block_ms = np.unique(block_m)
    points = rng.integers(1, 97)
    rows = np.array(
        [
            histogram(rng, rng.choice(["even", "skewed", "few", "one"]), num_experts, int(2 ** rng.uniform(0, 16)))
            for _ in range(points)
        ]
    )
    slots, active, heights = pass_over(rows, block_ms)
    support = np.concatenate([slots[:, None], active[:, None], heights], axis=1).astype(np.int64)
    coef = rng.integers(0, 2**34, (num_candidates, 5)) // np.array([1, 4, 256, 64, 256])
    coef[1:] = np.where(rng.random((num_candidates - 1, 1)) < 0.7, coef[0], coef[1:])  # near ties
    coef[rng.random(num_candidates) < 0.05] = 0
    spread = int(rng.choice([0, 2**4, 2**16, 2**22]))
    weights = rng.integers(-spread, spread + 1, (num_candidates, points))
    span = np.sort(rng.integers(1, 2**15, (num_candidates, 2)), axis=1)
    span[rng.random(num_candidates) < 0.7] = (1, 2**16)
    local = tuple((int(s), float(rng.choice([0.001, 0.01, 0.03]))) for s in np.unique(rng.integers(1, 2**14, 6)))
    return Wave(geometry, span, 0.01, local if rng.random() < 0.8 else (), coef, weights, support, block_ms)


@settings(parent=relaxed, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), num_candidates=st.integers(1, 4), costly=st.sampled_from([0.0, 0.37, 2.0]))
def test_chooses_like_the_host(seed, num_candidates, costly):
    """Bit for bit, whatever the model and the histogram: empty, even, all on one expert, a slot more or less."""
    rng = np.random.default_rng(seed)
    experts = int(rng.choice([3, 64, 100]))
    model = random_model(rng, num_candidates, experts)
    fallback = int(rng.integers(num_candidates))
    counts = [np.zeros(experts, dtype=np.int64)]
    for kind in ("even", "skewed", "few", "one"):
        for bits in (3, 9, 16):
            base = histogram(rng, kind, experts, int(2 ** rng.uniform(0, bits)))
            bumped = base.copy()
            bumped[rng.integers(experts)] += 1
            counts += [base, bumped]
    rows = np.array(counts)
    candidates = Candidates.on(pack(model, costly), DEVICE)
    got = choose(torch.tensor(rows, dtype=torch.int32, device=DEVICE), candidates, fallback)
    assert got.tolist() == [model.choose(row, fallback, costly) for row in rows]


def test_random_models_leave_the_fallback():
    """The test above would be worth nothing if static always won."""
    chosen = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        model = random_model(rng, 4)
        chosen += [model.choose(histogram(rng, "skewed", 64, 500), 1) for _ in range(5)]
    assert len(set(chosen)) == 4 and chosen.count(1) < 0.8 * len(chosen)


@pytest.fixture(params=["expert", "chunks", "pieces"])
def path(request, monkeypatch):
    """All paths, with chunks small enough to have several; ``pieces`` has several in a chunk."""
    monkeypatch.setattr(align, "PIECE", 32)
    monkeypatch.setattr(align, "MAX_CHUNKS", 2 if request.param == "pieces" else 8)
    return "chunks" if request.param == "pieces" else request.param


def check_tally(model, candidates, counts, choice, before):
    """One launch was added: its place, predicted times, active experts, concentration, and whether it was outside."""
    after, slots = candidates.tally.tolist(), int(counts.sum())
    if not slots:
        assert after == before, "padding alone is not counted"
        return
    expected = [0.0] * TALLY
    expected[choice] = 1.0
    us = model.predict(counts)
    if np.isfinite(us[0]):
        expected[4], expected[5] = us[0], us[choice]
    expected[6] = np.count_nonzero(counts)
    expected[7] = float((counts**2).sum()) / slots**2
    low, high = model.span[1:, 0] <= 2 * slots, slots <= 2 * model.span[1:, 1]
    strange = np.count_nonzero(counts) < model.support[:, 1].min()
    expected[8] = float(strange or not (low & high).any())
    assert after == pytest.approx([a + b for a, b in zip(before, expected, strict=True)], rel=1e-12)


@settings(parent=relaxed, max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), num_candidates=st.integers(2, 4), mapped=st.booleans())
def test_aligns_for_the_chosen(path, seed, num_candidates, mapped):
    """The alignment is that of `align_tokens` for the chosen block_m; the others have no rows; the choice is counted."""
    rng = np.random.default_rng(seed)
    experts, top_k = 16, 2
    model = random_model(rng, num_candidates, experts)
    candidates = Candidates.on(pack(model), DEVICE)
    expert_map, local = None, experts
    if mapped:
        local = 9
        expert_map = np.full(experts, -1)
        expert_map[rng.permutation(experts)[:local]] = rng.permutation(local)
        expert_map = torch.tensor(expert_map, dtype=torch.int32, device=DEVICE)
    memory = torch.full((selection_ints(90, top_k, local, candidates.packed.block_ms),), -7, dtype=torch.int32)
    memory = memory.to(DEVICE)
    for _ in range(2):
        num_tokens = int(rng.integers(1, 91))
        ids = (
            rng.integers(-1, experts + 1, (num_tokens, top_k)) if rng.random() < 0.5 else np.zeros((num_tokens, top_k))
        )
        ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
        before = candidates.tally.tolist()
        selected = selected_in(memory, num_tokens, top_k, local, candidates.packed.block_ms)
        align_and_select(ids, candidates, 0, local, expert_map=expert_map, selected=selected, path=path)
        counts = selected.expert_counts.cpu().numpy().astype(np.int64)
        choice = int(selected.choice)
        assert choice == model.choose(counts, 0)
        want = align.align_tokens(ids, candidates.packed.block_ms[choice], local, expert_map=expert_map)
        assert counts.tolist() == want.expert_counts.tolist()
        rows = int(want.num_tokens_post_padded)
        found = [int(blocks.num_tokens_post_padded) for blocks in selected.blocks]
        assert found == [rows if place == choice else 0 for place in range(num_candidates)]
        got = selected.blocks[choice]
        assert got.sorted_token_ids.tolist() == want.sorted_token_ids.tolist()
        blocks = rows // got.block_m
        assert got.expert_ids[:blocks].tolist() == want.expert_ids[:blocks].tolist()
        check_tally(model, candidates, counts, choice, before)


def test_no_tokens_choose_the_fallback():
    """An empty batch, and one without a slot for this rank."""
    candidates = Candidates.on(pack(random_model(np.random.default_rng(3), 3)), DEVICE)
    for ids in (torch.zeros((0, 2), dtype=torch.int32), torch.full((5, 2), -1, dtype=torch.int32)):
        selected = align_and_select(ids.to(DEVICE), candidates, 2, 64)
        assert int(selected.choice) == 2
        assert [int(blocks.num_tokens_post_padded) for blocks in selected.blocks] == [0, 0, 0]


def test_large_batches_are_exact():
    """All slots that are allowed, on one expert and on 512."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        model = random_model(rng, 4, 512)
        rows = np.array([histogram(rng, kind, 512, MAX_SLOTS) for kind in ("even", "one", "skewed")])
        got = choose(torch.tensor(rows, dtype=torch.int32, device=DEVICE), Candidates.on(pack(model), DEVICE), 0)
        assert got.tolist() == [model.choose(row, 0) for row in rows]


def test_memory():
    """The stated size is enough for every smaller batch, and one value less is refused."""
    for num_tokens, top_k, experts in [(1, 1, 1), (64, 8, 64), (4096, 8, 256), (65_536, 32, 512)]:
        ints = selection_ints(num_tokens, top_k, experts, (16, 128, 8))
        memory = torch.empty(ints, dtype=torch.int32, device="meta")
        for tokens in {1, max(1, num_tokens // 3), num_tokens}:
            selected = selected_in(memory, tokens, top_k, experts, (16, 128, 8))
            for tensor in (selected.record, *(b.num_tokens_post_padded for b in selected.blocks)):
                assert tensor.storage_offset() % 4 == 0
        with pytest.raises(InputError, match="allocate selection_ints"):
            selected_in(memory[:-1], num_tokens, top_k, experts, (16, 128, 8))


def test_what_cannot_be_packed():
    """A poisoned plan, another model, too many candidates, numbers beyond 32 bits: refused when the plan is loaded."""
    model = random_model(np.random.default_rng(0), 4)
    with pytest.raises(FitError, match="finite errors"):
        pack(attrs.evolve(model, local_error=((8, float("nan")),)))
    with pytest.raises(PlanError, match="inf; the plan is poisoned"):
        pack(model, float("inf"))
    with pytest.raises(PlanError, match="5 candidates"):
        pack(model.take((0, 1, 2, 3, 0)))
    with pytest.raises(PlanError, match="32 bits"):
        pack(attrs.evolve(model, weights=model.weights + 2**32))
    with pytest.raises(FitError, match="coef holds"):
        pack(attrs.evolve(model, coef=model.coef + 2**53))
    with pytest.raises(FitError, match="support holds"):
        pack(attrs.evolve(model, support=model.support * 0))
    published = Ramp4(model.geometry, model.span, 0.01, (), np.ones((4, 4)))
    with pytest.raises(PlanError, match="'ramp4' cannot choose on the GPU"):
        pack(published)


def test_bad_arguments():
    """Each says what to give."""
    candidates = Candidates.on(pack(random_model(np.random.default_rng(0), 2)), DEVICE)
    ids = torch.zeros((4, 2), dtype=torch.int32, device=DEVICE)
    with pytest.raises(InputError, match="float32"):
        align_and_select(ids.float(), candidates, 0, 8)
    with pytest.raises(InputError, match="fallback is 2"):
        align_and_select(ids, candidates, 2, 8)
    with pytest.raises(InputError, match="split the batch"):
        candidates.packed.check_slots(MAX_SLOTS + 1, 8)
    small = allocate_selected(4, 2, 8, candidates.packed.block_ms, DEVICE)
    assert align_and_select(ids, candidates, 0, 8, selected=small) is small
