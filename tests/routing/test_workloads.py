"""Histograms of real ids, and synthetic routings."""

import json
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.errors import InputError
from rampwrap.routing.counts import check_counts, expert_counts
from rampwrap.routing.workloads import Routing, Workload, read_trace, workload_grid

ROUTINGS = ["uniform", "zipf:1.2", "dirichlet:0.1", "hot:2", "lognormal:1.5"]


@given(st.sampled_from(ROUTINGS), st.integers(1, 50), st.integers(1, 40), st.data())
def test_every_token_visits_top_k_different_experts(name: str, tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    if name == "hot:2" and experts < 2:
        return
    ids = Workload(tokens, Routing.parse(name)).topk_ids(experts, top_k)
    assert ids.shape == (tokens, top_k) and ids.min() >= 0 and ids.max() < experts
    assert all(len(set(row)) == top_k for row in ids.tolist())
    counts = expert_counts(ids, experts)
    assert counts.sum() == tokens * top_k and len(counts) == experts


def test_the_same_workload_gives_the_same_ids_and_another_split_others() -> None:
    workload = Workload(64, Routing.parse("zipf:1.2"))
    np.testing.assert_array_equal(workload.topk_ids(64, 8), workload.topk_ids(64, 8))
    assert (workload.topk_ids(64, 8) != Workload(64, workload.routing, "eval").topk_ids(64, 8)).any()


def test_skew_is_what_its_name_says() -> None:
    def busiest(name: str) -> int:
        return int(expert_counts(Workload(1000, Routing.parse(name)).topk_ids(64, 8), 64).max())

    assert busiest("uniform") < 180 < busiest("zipf:1.2")
    hot = np.sort(expert_counts(Workload(1000, Routing.parse("hot:2")).topk_ids(64, 8), 64))[::-1]
    assert 860 < hot[1] <= hot[0] < 940 and hot[2] < 200


@pytest.mark.parametrize("ids", [[[0, 3], [1, 3]], np.array([[0, 3], [1, 3]]), torch.tensor([[0, 3], [1, 3]])])
def test_ids_may_be_lists_numpy_or_torch(ids: object) -> None:
    assert expert_counts(ids, 4).tolist() == [1, 1, 0, 2]


def test_an_expert_map_counts_local_experts_only() -> None:
    assert expert_counts([[0, 3], [1, 3], [2, 0]], 4, expert_map=[-1, 1, -1, 0]).tolist() == [2, 1]


@pytest.mark.parametrize("expert_map", [[0, 1, 5, -1], [0, 0, -1, -1], [1, 2, -1, -1], [0.0, 1.0, -1.0, -1.0]])
def test_a_map_that_gives_no_local_id_to_somebody_is_refused(expert_map: list[float]) -> None:
    with pytest.raises(InputError, match="expert_map gives its"):
        expert_counts([[0, 1]], 4, expert_map)
    assert expert_counts([[0, 1]], 4, [-1] * 4).tolist() == []


def test_unsigned_ids_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where numpy refuses to count them."""
    count = np.bincount

    def numpy_1(ids: np.ndarray, **options: int) -> np.ndarray:
        if ids.dtype == np.uint64:
            raise TypeError("Cannot cast array data from dtype('uint64') to dtype('int64')")
        return count(ids, **options)

    monkeypatch.setattr(np, "bincount", numpy_1)
    assert expert_counts(np.array([[0, 3], [1, 3]], dtype=np.uint64), 4).tolist() == [1, 1, 0, 2]


@pytest.mark.filterwarnings("error")
def test_the_widest_lognormal_is_the_most_skewed() -> None:
    """No load overflows: a few experts take all tokens, and loads that fitted before are the same bits."""
    popularity = Routing.parse("lognormal:1000").popularity(64, np.random.default_rng(0))
    assert np.isfinite(popularity.sum()) and popularity.argmax() == np.random.default_rng(0).normal(0, 1, 64).argmax()
    counts = np.sort(expert_counts(Workload(200, Routing.parse("lognormal:1000")).topk_ids(64, 8), 64))
    assert counts[-1] == 200
    usual = Routing.parse("lognormal:1.4").popularity(64, np.random.default_rng(0))
    np.testing.assert_array_equal(usual, np.exp(np.random.default_rng(0).normal(0.0, 1.4, 64)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [["a", "b", "c"], [None] * 3, [float("nan"), 1, 2], [float("inf"), 1, 2]])
def test_counts_that_are_no_numbers_are_named(counts: list[object]) -> None:
    with pytest.raises(InputError, match=r"expert_counts (has dtype|holds)"):
        check_counts(counts, 3)


def test_an_empty_batch_has_an_empty_histogram() -> None:
    assert expert_counts(np.zeros((0, 8), dtype=np.int32), 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([[0, -2]], "holds -2"),
        ([[0, 5]], "holds 5"),
        ([[0.5, 1.0]], "dtype float64"),
        ([[True, False]], "dtype bool"),
    ],
)
def test_bad_ids_are_named(ids: object, named: str) -> None:
    with pytest.raises(InputError, match=named):
        expert_counts(ids, 4)


@pytest.mark.parametrize(
    ("counts", "slots", "named"),
    [
        ([1, 2], None, "shape"),
        ([1, -2, 3], None, "-2"),
        ([1, 2.5, 3], None, "2.5"),
        ([1, 2, 3], 7, "sums to 6 instead of tokens x top_k = 7"),
    ],
)
def test_bad_counts_are_named(counts: list[float], slots: int | None, named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_counts(counts, 3, slots)


@pytest.mark.parametrize("text", ["", "unifrom", "zipf:-1", "zipf:x", "hot:0.5", "trace", "uniform:2", "dirichlet:nan"])
def test_an_unknown_routing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="routing"):
        Routing.parse(text)


def test_labels_are_those_of_the_timing_table() -> None:
    assert [w.label for w in workload_grid([1, 64], [Routing.parse("dirichlet:0.3"), Routing.parse("zipf:1.2")])] == [
        "M=1 dir0.3",
        "M=1 zipf1.2",
        "M=64 dir0.3",
        "M=64 zipf1.2",
    ]


def test_a_trace_gives_its_rows_as_popularities(tmp_path: pathlib.Path) -> None:
    loads = np.array([[0, 0, 5, 5], [0, 0, 0, 0]], dtype=np.int32)  # the second step recorded nothing
    np.savez(tmp_path / "steps.npz", decode=loads, of_another_model=np.ones((3, 7)))
    (tmp_path / "steps.json").write_text(json.dumps(loads.tolist()))
    for name in ("steps.npz", "steps.json"):
        assert read_trace(str(tmp_path / name), 4).tolist() == [[0, 0, 5, 5]]
    ids = Workload(20, Routing.parse(f"trace:{tmp_path / 'steps.npz'}")).topk_ids(4, 2)
    assert expert_counts(ids, 4).tolist() == [0, 0, 20, 20]


@pytest.mark.parametrize("name", ["none.npz", "torn.npz", "odd.csv", "other.json"])
def test_an_unusable_trace_is_one_sentence(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "other.json").write_text("[[1, 2, 3]]")
    with pytest.raises(InputError, match="trace"):
        read_trace(str(tmp_path / name), 4)
