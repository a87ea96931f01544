"""The split of the ragged form: all of the work once, in legal pieces, evenly, and the same every time."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.configs import RAGGED
from rampwrap.kernels.cute.schedule import FRAGMENTS, TICK, WIDTHS, Work, cuts, least_share, line_cost, pieces

WIDEST = WIDTHS["fp8"][-1]
EDGES = sorted({0, 1, *(width + more for width in WIDTHS["fp8"] for more in (-1, 0, 1)), 2 * WIDEST, 2 * WIDEST + 1})


def work(groups=3, steps=16, dtype="fp8", memory=1771, reread=960, base=350, slope=13, overhead=1500):
    return Work(WIDTHS[dtype], groups, steps, memory, reread, base, slope, overhead)


works = st.builds(
    work,
    groups=st.integers(1, 16),
    steps=st.one_of(st.integers(1, 12), st.integers(13, 112)),
    dtype=st.sampled_from(["fp8", "bf16"]),
    memory=st.integers(900, 3000),
    reread=st.integers(100, 900),
    base=st.integers(0, 600),
    slope=st.integers(0, 30),
    overhead=st.integers(0, 6000),
)
counts = st.lists(
    st.one_of(st.just(0), st.sampled_from(EDGES), st.integers(1, 40), st.integers(1, 1500)), min_size=1, max_size=40
)
sizes = st.sampled_from([1, 2, 7, 33, 66, 132, 148])


def all_of(work, counts, ctas):
    """By unit (expert, first row, group): its pieces as (cta, piece), in the order of the CTAs."""
    units = defaultdict(list)
    for cta, mine in enumerate(pieces(work, counts, ctas)):
        for piece in mine:
            units[piece.expert, piece.first_row, piece.group].append((cta, piece))
    return units


@settings(max_examples=300, deadline=None)
@given(works, counts, sizes)
@example(work(), [700] + [0] * 20, 132)  # one hot expert
@example(work(), [1] * 40, 132)
@example(work(groups=8, steps=8), [1] * 8, 132)  # one token, top-8: hardly four steps a CTA
@example(work(), [0] * 5, 132)
def test_every_step_of_every_unit_is_done_once(work, counts, ctas):
    units = all_of(work, counts, ctas)
    wanted = set()
    row = 0
    for expert, count in enumerate(counts):
        rows = work.rows(count)
        assert 0 <= rows - count < 8
        starts = range(row, row + rows, work.pass_rows(count)) if count else ()
        wanted |= {(expert, start, group) for start in starts for group in range(work.groups)}
        assert len(starts) == work.passes(count)
        row += rows
    assert set(units) == wanted
    tokens = defaultdict(int)
    for (expert, start, group), done in units.items():
        end = 0
        for _, piece in done:
            assert piece.begin == end < piece.end
            end = piece.end
        assert end == work.steps
        some = {(piece.tokens, piece.width) for _, piece in done}
        assert len(some) == 1
        ((its, width),) = some
        assert (
            0 < its <= width
            and width in work.widths
            and (width == 8 or its > work.widths[work.widths.index(width) - 1])
        )
        if group == 0:
            tokens[expert] += its
        assert start % 8 == 0
    assert [tokens[expert] for expert in range(len(counts))] == list(counts)


@settings(max_examples=300, deadline=None)
@given(works, counts, sizes)
@example(work(groups=8, steps=8), [1] * 8, 132)
def test_who_waits_for_whom_ends(work, counts, ctas):
    """An owner does the shared unit last; fragments come first and from the CTAs right behind it, none of them waiting before."""
    for mine in pieces(work, counts, ctas):
        for place, piece in enumerate(mine):
            assert piece.owned() or place == 0
            assert piece.end == work.steps or place == len(mine) - 1
            if piece.begin or piece.end < work.steps:
                # Cuts go by the width of an expert's full passes; the last one may be narrower.
                (width,) = {work.width(work.pass_rows(counts[piece.expert]))}
                assert piece.end - piece.begin >= FRAGMENTS[width > 16]
    for done in all_of(work, counts, ctas).values():
        owner = done[0][0]
        assert [cta for cta, _ in done] == list(range(owner, owner + len(done)))


@settings(max_examples=300, deadline=None)
@given(works, counts, sizes)
def test_no_cta_has_more_than_its_share_and_what_cannot_be_cut(work, counts, ctas):
    """Both ends of a share may move by less than a fragment, and begin inside a step: together less than two fragments."""
    total = line_cost(work, counts)
    mine = [sum(piece.cost for piece in some) for some in pieces(work, counts, ctas)]
    assert sum(mine) == total
    least = least_share(work, counts)
    used = work.ctas(total, least, ctas)
    assert max(mine) <= total / used + 1 + 2 * least
    assert used == ctas or total <= (used + 1) * least
    assert all(cost == 0 for cost in mine[used:])


@given(works, counts, sizes)
def test_the_same_counts_are_split_the_same_way(work, counts, ctas):
    assert pieces(work, counts, ctas) == pieces(work, tuple(counts), ctas)
    marks = cuts(work, counts, ctas)
    assert marks == sorted(marks) and marks[0] == (0, 0)


@given(works, st.integers(1, 5000))
def test_passes_are_as_few_as_fit_and_about_equal(work, count):
    passes, rows = work.passes(count), work.pass_rows(count)
    widest = work.widths[-1]
    assert passes == -(-count // widest) and rows % 8 == 0 and rows <= widest
    each = [work.tokens(turn, count) for turn in range(passes)]
    assert sum(each) == count and min(each) > 0 and max(each) <= work.width(rows)
    # Rows of eight are shared out; what is left over is less than one of them a pass.
    assert rows * passes - count < 8 * (passes + 1)


def test_costs_are_those_of_the_formula():
    """Per step the larger of reading and of multiplying and a part of storing the unit; in ticks of 16 clocks."""
    its = work(steps=16)
    assert its.step_cost(8, its.memory) == 1771 >> TICK
    assert its.step_cost(128, its.memory) == (350 + 13 * 128 + 93) >> TICK
    first, later = its.step_costs(150)  # two passes of 80 rows
    assert (first, later) == (its.step_cost(96, 1771), its.step_cost(96, 960))
    assert its.cost(150) == 3 * 16 * (first + later) and its.cost(0) == 0
    assert its.width(80) == 96 and [its.tokens(turn, 150) for turn in range(2)] == [80, 70]


@pytest.mark.parametrize("ctas", [33, 66, 132])
def test_a_layer_of_many_experts_is_even(ctas):
    """OLMoE, 256 tokens, a few hot experts: the worst CTA is within a tenth of the mean."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(2048, rng.dirichlet([0.1] * 64)).tolist()
    its = work(groups=8, steps=16)
    mine = [sum(piece.cost for piece in some) for some in pieces(its, counts, ctas)]
    assert max(mine) < 1.1 * np.mean(mine)


# ---- the kernels' own code, on numbers of Python


@pytest.fixture(scope="module")
def device():
    if building.dsl_version() is None:
        pytest.skip("needs the CuTe DSL (pip install rampwrap[cute])")
    from rampwrap.kernels.cute.build import emit  # tells the DSL the architecture
    from rampwrap.kernels.cute.device import pipeline, ragged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "quotient", lambda value, divisor: value // divisor)
        patch.setattr(pipeline, "quotient", lambda value, divisor: value // divisor)
        patch.setattr(ragged, "Int32", int)
        patch.setattr(ragged.cutlass, "range", lambda *of, unroll: range(*of))
        yield {dtype: emit.KERNELS["ragged_up", dtype] for dtype in RAGGED}


class Counts(list):
    """Tokens of experts, as a tensor of the kernels."""

    @property
    def shape(self):
        return (len(self),)


def by_device(gemm, work, counts, ctas):
    """What each CTA does by `split` and `piece`, its threads one after the other and their prefix sums by numpy."""
    gemm.set_work(work.groups, work.steps, work.memory, work.reread, work.base, work.slope, work.overhead)
    experts = range(len(counts) + 3)  # those that are none, too
    numbers = [gemm.numbers(Counts(counts), expert) for expert in experts]
    sums = np.cumsum([its[1:5] for its in numbers], 0)
    before, totals = (sums - [its[1:5] for its in numbers]).tolist(), sums[-1].tolist()
    totals.append(max(its[5] for its in numbers))
    enter, close = type(gemm).enter.__wrapped__, type(gemm).close.__wrapped__
    found = []
    for cta in range(ctas):
        shared = np.full((4, len(counts) + 1), -1).astype(object), np.zeros(8, int).astype(object), None
        # In any order: they write to different places.
        for expert in sorted(experts, key=lambda expert: expert * 7 % len(experts)):
            enter(gemm, expert, numbers[expert], before[expert], totals, shared, cta, ctas)
        close(gemm, totals, shared, cta, ctas)
        number, place = gemm.share_of(shared)
        mine = []
        for index in range(number):
            place, *piece = gemm.piece(shared, index, place)
            mine.append(tuple(piece))
        found.append(mine)
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(works, counts, st.sampled_from([1, 2, 7, 33]))
@example(work(groups=8, steps=8), [1] * 8, 33)
@example(work(), [0] * 5, 7)
@example(work(), [1] * 400, 7)
def test_the_kernels_cut_as_the_host_does(device, its, counts, ctas):
    for dtype in [dtype for dtype in RAGGED if WIDTHS[dtype] == its.widths]:
        gemm = device[dtype](RAGGED[dtype])
        wanted = [
            [(p.expert, p.tokens, p.first_row, p.group, p.begin, p.end) for p in mine]
            for mine in pieces(its, counts, ctas)
        ]
        assert by_device(gemm, its, counts, ctas) == wanted


def test_every_number_of_tokens_has_one_width(device):
    """The branch that a kernel takes is the width that the split counted with."""
    for dtype in RAGGED:
        its = device[dtype](RAGGED[dtype])
        for tokens in range(1, its.widths[-1] + 1):
            (taken,) = [
                width for below, width in zip((0, *its.widths), its.widths, strict=False) if below < tokens <= width
            ]
            assert taken == work(dtype=dtype).width(tokens) and [n.block_m for n in its.narrow] == list(its.widths)


def test_one_token_is_cut_into_equal_shares():
    """Units of eight steps on more CTAs than there are pieces of two: as many CTAs as pieces, and all the same."""
    mine = pieces(work(groups=4, steps=8), [1] * 8, 132)
    assert [len(some) for some in mine] == [1] * 128 + [0] * 4
    assert {piece.end - piece.begin for some in mine for piece in some} == {2}
