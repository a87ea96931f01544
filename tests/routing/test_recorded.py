"""What engines record, read back: every format, whole histograms, and files that are not what they should be."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rampwrap.cli.main import main
from rampwrap.errors import InputError
from rampwrap.measure.timings import Timings
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.recorded import MOST_TOKENS, Recording, account, read_recording, read_trace, split_layer
from rampwrap.routing.workloads import RecordedWorkload, Routing, Workload, recorded_workloads

E, K, LAYERS, STEPS = 16, 4, 3, 5
TOKENS = [1, 7, 64, 64, 200]


def steps_ids(seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Ids [layers, tokens, top_k] of each step."""
    rng = np.random.default_rng(seed)
    routing = Routing.parse("dirichlet:0.4")
    return [np.stack([routing.sample(tokens, E, K, rng) for _ in range(LAYERS)]) for tokens in TOKENS]


def histograms(steps: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """int64 [steps, layers, experts]."""
    return np.array([[expert_counts(layer, E) for layer in ids] for ids in steps])


def as_stat(folder: pathlib.Path) -> str:
    """SGLang's circular buffer: steps that never ran are zeros."""
    counts = np.concatenate([histograms(steps_ids()), np.zeros((2, LAYERS, E), dtype=np.int64)])
    data = {
        "rank": 0,
        "logical_count": torch.from_numpy(counts.astype(np.int32)),
        "average_utilization_rate_over_window": None,
    }
    torch.save(data, folder / "stat.pt")
    return str(folder / "stat.pt")


def as_records(folder: pathlib.Path) -> str:
    """SGLang's per-token mode: ids in a buffer of top-8, padded with -1."""
    records = []
    for number, ids in enumerate(steps_ids()):
        buffer = np.full((LAYERS, ids.shape[1], 8), -1, dtype=np.int32)
        buffer[..., :K] = ids
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": list(range(ids.shape[1])),
                "forward_mode": 1,
                "topk_ids_of_layer": torch.from_numpy(buffer),
                "misc_objects": [],
            }
        )
    data = {"records": records, "last_physical_to_logical_map": torch.arange(E).repeat(LAYERS, 1)}
    torch.save(data, folder / "records.pt")
    return str(folder / "records.pt")


def as_json(folder: pathlib.Path) -> str:
    (folder / "counts.json").write_text(json.dumps({"logical_count": histograms(steps_ids()).tolist()}))
    return str(folder / "counts.json")


@pytest.mark.parametrize("write", [as_stat, as_records, as_json])
def test_all_formats_give_the_same_histograms(write: Any, tmp_path: pathlib.Path) -> None:
    path, expected = write(tmp_path), histograms(steps_ids())
    recording = read_recording(path, E)
    np.testing.assert_array_equal(recording.counts, expected.reshape(-1, E))
    np.testing.assert_array_equal(recording.step, np.repeat(np.arange(STEPS), LAYERS))
    np.testing.assert_array_equal(recording.layer, np.tile(np.arange(LAYERS), STEPS))
    np.testing.assert_array_equal(recording.num_tokens(K), np.repeat(TOKENS, LAYERS))
    np.testing.assert_array_equal(read_recording(path, E, 1).counts, expected[:, 1])
    np.testing.assert_array_equal(read_trace(path, E, 2), expected[:, 2])


def test_physical_experts_are_counted_as_the_logical_ones_they_copy(tmp_path: pathlib.Path) -> None:
    where = torch.tensor([[0, 1, 2, 3, 0, 0]])  # expert 0 has three copies
    ids = torch.tensor([[[0, 1], [4, 2], [5, 3]]], dtype=torch.int32)
    torch.save({"records": [{"topk_ids_of_layer": ids}], "last_physical_to_logical_map": where}, tmp_path / "a.pt")
    assert read_recording(tmp_path / "a.pt", 4).counts.tolist() == [[3, 1, 1, 1]]
    counts = torch.tensor([[1, 1, 1, 1, 1, 1]])
    torch.save(
        {"records": [{"global_physical_count": counts}], "last_physical_to_logical_map": where}, tmp_path / "b.pt"
    )
    assert read_recording(tmp_path / "b.pt", 4).counts.tolist() == [[3, 1, 1, 1]]


def test_requests_of_vllm_give_their_batches_and_those_of_each_position(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(1)
    requests = []
    for tokens in (5, 3, 1):
        ids = np.stack([Routing.parse("uniform").sample(tokens, E, K, rng) for _ in range(LAYERS)], axis=1)
        ids[:, 0] = 0  # a layer without experts: vLLM leaves zeros
        requests.append(ids.astype(np.int16))
    np.savez(tmp_path / "requests.npz", *requests)
    recording = read_recording(tmp_path / "requests.npz", E)
    assert set(recording.layer.tolist()) == {1, 2}
    assert recording.num_tokens(K)[recording.layer == 1].tolist() == [5, 3, 1, 3, 2, 2]
    np.testing.assert_array_equal(recording.counts[0], expert_counts(requests[0][:, 1], E))
    position = expert_counts(np.stack([ids[0, 1] for ids in requests]), E)
    np.testing.assert_array_equal(recording.counts[recording.layer == 1][3], position)


@given(st.integers(1, 40), st.integers(1, 24), st.data())
@settings(max_examples=60, deadline=None)
def test_a_histogram_comes_back_exactly_and_no_token_visits_an_expert_twice(
    tokens: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 2**31))
    ids = Routing.parse("dirichlet:0.1").sample(tokens, experts, top_k, np.random.default_rng(seed))
    counts = expert_counts(ids, experts)
    workload = RecordedWorkload(tokens, Routing("trace", "f.npz"), counts=tuple(counts.tolist()))
    made = workload.topk_ids(experts, top_k)
    assert made.shape == (tokens, top_k) and made.dtype == np.int32
    np.testing.assert_array_equal(expert_counts(made, experts), counts)
    assert all(len(set(row)) == top_k for row in made.tolist())
    np.testing.assert_array_equal(made, workload.topk_ids(experts, top_k))


@given(st.integers(1, 60), st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_what_is_picked_stands_for_all(limit: int, tokens: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.array([rng.multinomial(count, rng.dirichlet(np.ones(8))) for count in tokens])
    places = np.arange(len(tokens))
    recording = Recording("f.npy", counts, places, places)
    picked = recording.pick(limit, 1)
    assert picked.tolist() == sorted(set(picked.tolist())) and len(picked) == min(limit, len(tokens))
    sizes = np.log2(recording.num_tokens(1)).astype(int)
    if limit >= len(set(sizes.tolist())):
        assert set(sizes[picked]) == set(sizes)


def test_a_recording_may_be_one_layer_of_a_trace(tmp_path: pathlib.Path) -> None:
    path = as_stat(tmp_path)
    workload = Workload(32, Routing.parse(f"trace:{path}:1"))
    assert workload.label == "M=32 tr:stat:1"
    assert workload.topk_ids(E, K).shape == (32, K)
    assert split_layer("a/b.pt:7") == ("a/b.pt", 7) and split_layer("a/b.pt") == ("a/b.pt", None)
    assert split_layer("7") == ("7", None)


def test_a_changed_file_is_read_anew(tmp_path: pathlib.Path) -> None:
    for value in (3, 5):
        np.save(tmp_path / "a.npy", np.full((value, 2, E), value))
        assert read_recording(tmp_path / "a.npy", E).counts[0, 0] == value


class Opens:
    """Would create a file when unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


SAID = {
    "code.pt": "cannot be read",
    "list.pt": "logical_count or records",
    "model.pt": "weights",
    "other.pt": "16 experts",
    "negative.pt": "-",
    "nan.pt": "nan",
    "half.pt": "0.5",
    "empty.pt": "holds no loads",
    "ids.pt": "experts 0 to 15",
    "map.pt": "maps 1 layers",
    "flat.pt": r"\[layers, tokens, top_k\]",
    "none.pt": "record 0 of rank",
    "torn.pt": "cannot be read",
    "torn.json": "cannot be read",
    "odd.json": "no logical_count",
    "ragged.json": "cannot be read",
    "pickled.npz": "cannot be read",
    "twice.npy": "holds no loads",
    "loads.csv": "no known kind",
    "absent.pt": "check the path",
}
"What the message must say, by damaged file."


def damaged(folder: pathlib.Path) -> None:
    """Writes the files of `SAID`, all but the absent one."""
    good = histograms(steps_ids())
    map_ = torch.arange(E).repeat(LAYERS, 1)
    ids = torch.from_numpy(steps_ids()[1])
    torch.save({"logical_count": torch.from_numpy(good), "x": Opens(folder / "opened")}, folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"weights": torch.ones(3)}, folder / "model.pt")
    torch.save({"logical_count": torch.from_numpy(good[..., :9])}, folder / "other.pt")
    torch.save({"logical_count": torch.from_numpy(-good)}, folder / "negative.pt")
    torch.save({"logical_count": torch.full((2, 3, E), float("nan"))}, folder / "nan.pt")
    torch.save({"logical_count": torch.full((2, 3, E), 0.5)}, folder / "half.pt")
    torch.save({"logical_count": torch.zeros(2, 3, E)}, folder / "empty.pt")
    torch.save({"records": [{"topk_ids_of_layer": ids + 9}]}, folder / "ids.pt")
    torch.save({"records": [{"topk_ids_of_layer": ids}], "last_physical_to_logical_map": map_[:1]}, folder / "map.pt")
    torch.save({"records": [{"topk_ids_of_layer": ids[0]}]}, folder / "flat.pt")
    torch.save({"records": [{"rank": 0}]}, folder / "none.pt")
    torch.save({"logical_count": torch.from_numpy(good)}, folder / "whole.pt")
    (folder / "torn.pt").write_bytes((folder / "whole.pt").read_bytes()[:700])
    (folder / "torn.json").write_text('{"logical_count": [[1, 2')
    (folder / "odd.json").write_text('{"other": 1}')
    (folder / "ragged.json").write_text('{"logical_count": [[1, 2], [1]]}')
    np.savez(folder / "pickled.npz", np.array([object()], dtype=object), allow_pickle=True)
    np.save(folder / "twice.npy", np.ones((4, 2, 3), dtype=np.int16))
    (folder / "loads.csv").write_text("1,2")


@pytest.mark.parametrize("name", SAID)
def test_a_file_that_is_none_is_refused_with_one_sentence(name: str, tmp_path: pathlib.Path) -> None:
    damaged(tmp_path)
    with pytest.raises(InputError, match=SAID[name]) as refused:
        read_recording(tmp_path / name, E)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")
    assert not (tmp_path / "opened").exists()


@given(st.binary(max_size=300), st.sampled_from([".pt", ".npz", ".npy", ".json"]))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: pathlib.Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"{abs(hash(content))}{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_recording(path, E)


@pytest.mark.parametrize("top_k", [3, 5, 8])
def test_another_top_k_is_refused(top_k: int, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=f"top_k={top_k}"):
        recorded_workloads(as_stat(tmp_path), E, top_k)
    with pytest.raises(InputError, match="layer 7"):
        recorded_workloads(as_stat(tmp_path) + ":7", E, K)


def test_profile_compare_and_replay_take_recordings(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, layer = as_records(tmp_path), ["-E", "16", "--top-k", "4", "-K", "512", "-N", "256"]
    profile = ["profile", "--kernel", "sim", *layer, "--quiet", "--batch-size", "8", "32", "128", "512"]
    few = ["--recorded", path, "--recorded-limit", "9", "--eval-recorded", f"{path}:2", "--eval-routing", "hot:1"]
    assert main([*profile, *few, "--eval-batch-size", "16", "--out", "t.npz"]) == 0
    table = Timings.load("t.npz")
    whole = {tuple(row) for row in histograms(steps_ids()).reshape(-1, E).tolist()}
    trained = [row for row, label in enumerate(table.label) if "tr:records" in label and table.split[row] == "train"]
    assert len(trained) == 9 and all(tuple(table.counts[row].tolist()) in whole for row in trained)
    held_out = [label for row, label in enumerate(table.label) if table.split[row] == "eval"]
    assert [label for label in held_out if "tr:" in label] == [f"M={m} tr:records:2@{s}" for s, m in enumerate(TOKENS)]
    assert main(["replay", "t.npz"]) == 0 and main(["fit", "t.npz"]) == 0
    capsys.readouterr()
    as_stat(tmp_path)
    assert main(["explain", "t.plan.json", "--batch-size", "8", "--routing", "trace:stat.pt", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["recorded"][0]["left_out"] == {"steps_without_tokens": 2}
    assert "steps without tokens (2)" in said.err
    assert main(["compare", "t.plan.json", "--recorded", path, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workloads"] == LAYERS * STEPS


def test_a_bad_recording_leaves_the_table_as_it_was(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = [
        "profile",
        "--kernel",
        "sim",
        "-E",
        "16",
        "--top-k",
        "4",
        "-K",
        "512",
        "-N",
        "256",
        "--quiet",
        "--out",
        "t.npz",
    ]
    run += ["--batch-size", "8", "--eval-batch-size", "16"]
    assert main(run) == 0
    before = (tmp_path / "t.npz").read_bytes()
    damaged(tmp_path)
    for name in SAID:
        assert main([*run, "--recorded", name]) == 1, name
        assert capsys.readouterr().err.count("\n") == 1, name
    assert (tmp_path / "t.npz").read_bytes() == before
    assert not list(tmp_path.glob("*.journal*"))


def routed(tokens: int = 40, seed: int = 3) -> np.ndarray[Any, Any]:
    """uint8 [tokens, layers, top_k], no token of which visits expert 0."""
    rng = np.random.default_rng(seed)
    return (np.argsort(rng.random((tokens, LAYERS, E - 1)), axis=2)[..., :K] + 1).astype(np.uint8)


PADDING = {
    "zeros": lambda row: row * 0,
    "num_experts": lambda row: row * 0 + E,
    "-1 as uint8": lambda row: row * 0 + 255,
    "-1 as uint16": lambda row: row.astype(np.uint16) * 0 + 65535,
    "-1": lambda row: row.astype(np.int32) * 0 - 1,
    "-1 as int8": lambda row: row.astype(np.int8) * 0 - 1,
}
"What engines and trainers leave in the rows of tokens that were never routed."


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_that_were_never_routed_count_nothing(kind: str, rows: int, tmp_path: pathlib.Path) -> None:
    real, padding = routed(), PADDING[kind](routed(rows))
    expected = [expert_counts(real[:, layer], E).tolist() for layer in range(LAYERS)]
    for name, place in (("end.npy", len(real)), ("start.npy", 0), ("middle.npy", 7)):
        ids = np.insert(real.astype(padding.dtype), place, padding, axis=0)
        np.save(tmp_path / name, ids)
        recording = read_recording(tmp_path / name, E)
        assert recording.counts.tolist() == expected
        assert recording.num_tokens(K).tolist() == [40] * LAYERS
        assert recording.left_out == {"padding_tokens": rows * LAYERS}
        assert read_trace(str(tmp_path / name), E)[:, 0].max() == 0
        said = str(account(str(tmp_path / name), E, K, 24))
        assert f"padding tokens ({rows * LAYERS})" in said and "3 of 3 histograms" in said


def test_with_one_expert_a_token_zeros_are_visits_where_chance_can_make_them(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, E, (60, LAYERS, 1)).astype(np.int16)
    ids[np.flatnonzero((ids[..., 0] == 0).all(axis=1))] = 1
    expected = [expert_counts(ids[:, layer], E).tolist() for layer in range(LAYERS)]
    np.save(tmp_path / "a.npy", np.concatenate([ids, ids[:4] * 0]))
    recording = read_recording(tmp_path / "a.npy", E)
    assert recording.counts.tolist() == expected and recording.counts[:, 0].min() > 0
    assert recording.left_out == {"padding_tokens": 4 * LAYERS}
    skewed = np.where(rng.random((60, LAYERS, 1)) < 0.6, 0, ids)  # a fifth of the tokens visit expert 0 in every layer
    np.save(tmp_path / "b.npy", skewed)
    assert read_recording(tmp_path / "b.npy", E).counts[:, 0].tolist() == (skewed == 0).sum(axis=(0, 2)).tolist()


def test_an_expert_whose_number_is_also_the_largest_of_its_dtype_is_an_expert(tmp_path: pathlib.Path) -> None:
    ids = np.array([[[255, 3]], [[1, 255]], [[255, 255]]], dtype=np.uint8)
    np.save(tmp_path / "a.npy", ids)
    counts = read_recording(tmp_path / "a.npy", 256).counts[0]
    assert (counts[255], counts[3], counts[1], counts.sum()) == (2, 1, 1, 4)


ODD = {
    "an expert twice": ([3, 3, 7, 9], "visits expert 3 twice"),
    "too large": ([3, 99, 7, 9], "visits expert 99, out of experts 0 to 15"),
    "negative": ([3, -2, 7, 9], "visits expert -2, out of experts 0 to 15"),
}


@pytest.mark.parametrize("kind", ODD)
def test_one_odd_slot_is_named(kind: str, tmp_path: pathlib.Path) -> None:
    row, why = ODD[kind]
    ids = routed().astype(np.int16)
    ids[4, 2] = row
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "ids.npz", routed(5).astype(np.int16), ids)
    record = {"topk_ids_of_layer": torch.from_numpy(ids.transpose(1, 0, 2).copy())}
    torch.save({"records": [record]}, tmp_path / "ids.pt")
    for name in ("ids.npy", "ids.npz", "ids.pt"):
        with pytest.raises(InputError, match=f"token 4 of layer 2 {why}"):
            read_recording(tmp_path / name, E)


def test_a_token_that_lacks_a_slot_is_left_out_and_counted(tmp_path: pathlib.Path) -> None:
    ids = routed().astype(np.int32)
    ids[4, 2, 1] = -1
    np.save(tmp_path / "ids.npy", ids)
    recording = read_recording(tmp_path / "ids.npy", E)
    assert recording.left_out == {"incomplete_tokens": 1} and recording.num_tokens(K).tolist() == [40, 40, 39]
    expected = np.delete(ids[:, 2], 4, axis=0)
    assert recording.counts[2].tolist() == expert_counts(expected, E).tolist()


def test_ids_of_another_top_k_are_refused_also_where_the_sums_would_fit(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "ids.npy", routed())
    for top_k, why in ((2, "ids of 4 experts a token"), (8, "ids of all ranks")):
        with pytest.raises(InputError, match=why):
            recorded_workloads(str(tmp_path / "ids.npy"), E, top_k)


def one_rank(rank: int, ranks: int, redundant: int = 0) -> dict[str, Any]:
    """A per-pass dump of DeepEP's low-latency mode: the counts of this rank's physical experts."""
    physical = E + redundant
    where = (np.arange(physical) * 5 + 3) % E
    size = physical // ranks
    counts = np.zeros((LAYERS, physical), dtype=np.int32)
    counts[:, rank * size : (rank + 1) * size] = np.random.default_rng(rank).integers(1, 9, (LAYERS, size)) * K
    record = {"forward_pass_id": 0, "rank": rank, "gatherer_key": "primary"}
    return {
        "records": [{**record, "global_physical_count": torch.from_numpy(counts)}],
        "last_physical_to_logical_map": torch.from_numpy(where).repeat(LAYERS, 1),
    }


@pytest.mark.parametrize(("rank", "ranks", "redundant"), [(0, 2, 0), (1, 4, 0), (3, 4, 8), (2, 8, 0)])
def test_the_dump_of_one_rank_is_refused_as_one(rank: int, ranks: int, redundant: int, tmp_path: pathlib.Path) -> None:
    """Whatever the sums: they are multiples of top_k here, and a trace does not look at them."""
    torch.save(one_rank(rank, ranks, redundant), tmp_path / "rank.pt")
    size = (E + redundant) // ranks
    for read in (read_recording, read_trace):
        with pytest.raises(
            InputError, match=f"experts {rank * size} to {rank * size + size - 1} of .* one rank's part"
        ):
            read(str(tmp_path / "rank.pt"), E)


def test_ids_of_one_rank_are_refused_as_its_part(tmp_path: pathlib.Path) -> None:
    ids = routed(200).astype(np.int16)
    np.save(tmp_path / "ids.npy", np.where(ids < 8, ids, -1))
    with pytest.raises(InputError, match="one rank's part"):
        read_recording(tmp_path / "ids.npy", E)


def test_counts_of_a_part_are_told_from_those_of_another_top_k(tmp_path: pathlib.Path) -> None:
    counts = histograms(steps_ids())
    np.save(tmp_path / "part.npy", np.where(np.arange(E) < 8, counts, 0))
    with pytest.raises(InputError, match=r"part of their batches \(only experts 0 to 7"):
        recorded_workloads(str(tmp_path / "part.npy"), E, K)
    assert "only experts 0 to 7 have tokens" in str(account(str(tmp_path / "part.npy"), E))
    np.save(tmp_path / "whole.npy", counts)
    with pytest.raises(InputError, match=r"all rows fit 2 or 4\)"):
        recorded_workloads(str(tmp_path / "whole.npy"), E, 3)


def test_one_step_that_was_cut_off_is_told_from_another_top_k(tmp_path: pathlib.Path) -> None:
    counts = histograms(steps_ids())
    counts[3, 1, 5] += 1
    np.save(tmp_path / "cut.npy", counts)
    with pytest.raises(InputError, match=r"step 3, layer 1, .* 1 of 15 histograms are so: .* damaged\.$"):
        recorded_workloads(str(tmp_path / "cut.npy"), E, K)


def test_sums_that_fit_no_top_k_are_sums_all_the_same(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).integers(20_000, 60_000, (2, E)).astype(np.float32) * 9)
    with pytest.raises(InputError, match="sums over many steps"):
        recorded_workloads(str(tmp_path / "loads.npy"), E, K)


def test_sums_over_many_steps_are_no_batch(tmp_path: pathlib.Path) -> None:
    rows = np.full((4, LAYERS, E), 8 * K)
    rows[0] *= MOST_TOKENS
    np.save(tmp_path / "one.npy", rows)
    found = recorded_workloads(str(tmp_path / "one.npy"), E, K)
    assert [workload.step for workload in found] == sorted([1, 2, 3] * LAYERS)
    assert account(str(tmp_path / "one.npy"), E, K, 24).left_out == {"sums_over_steps": LAYERS}
    (tmp_path / "all.json").write_text(json.dumps({"logical_count": rows[0].tolist()}))
    with pytest.raises(InputError, match="sums over many steps; use their popularities, --routing trace:"):
        recorded_workloads(str(tmp_path / "all.json"), E, K)
    assert len(read_trace(str(tmp_path / "all.json"), E)) == LAYERS
    (tmp_path / "step.json").write_text(json.dumps({"logical_count": rows[1].tolist()}))
    assert "one batch of 128 tokens; where that is a sum over steps" in str(account(str(tmp_path / "step.json"), E, K))


def test_the_largest_launch_is_a_batch_and_half_of_the_rows_may_be_sums() -> None:
    """65,536 tokens; one more is a sum over steps. Which half is left out, the others keep their places."""
    most, beyond = ([65_536 // E * K] * E, [65_536 // E * K] * (E - K) + [65_536 // E * K + 1] * K)

    def recording(*rows: list[int]) -> Recording:
        places = np.arange(len(rows))
        return Recording("r", np.array(rows), step=places, layer=places + 7, left_out={})

    kept, tokens = recording(most, most).batches(K)
    assert tokens.tolist() == [65_536] * 2 and not kept.left_out
    kept, tokens = recording(beyond, most).batches(K)
    assert (tokens.tolist(), kept.step.tolist(), kept.layer.tolist()) == ([65_536], [1], [8])
    assert kept.left_out == {"sums_over_steps": 1} and kept.counts.tolist() == [most]
    with pytest.raises(InputError, match=r"records up to 65537 tokens a step.*sums over many steps"):
        recording(beyond, beyond, most).batches(K)


def test_steps_layers_and_arrays_that_are_left_out_are_counted(tmp_path: pathlib.Path) -> None:
    assert read_recording(as_stat(tmp_path), E).left_out == {"steps_without_tokens": 2}
    counts = histograms(steps_ids())
    counts[:, 1], counts[3, 0] = 0, 0
    np.savez(
        tmp_path / "some.npz", counts, names=np.array(["a", "b"]), weights=np.ones((4, 2, 3)), other=np.ones((2, 9))
    )
    recording = read_recording(tmp_path / "some.npz", E)
    assert recording.left_out == {"layers_without_experts": 1, "rows_without_tokens": 1, "other_arrays": 3}
    assert len(recording.counts) == STEPS * LAYERS - STEPS - 1


def test_a_placement_and_a_map_of_another_model_are_refused_as_such(tmp_path: pathlib.Path) -> None:
    (tmp_path / "place.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1]]}))
    with pytest.raises(InputError, match="placement of experts"):
        read_recording(tmp_path / "place.json", E)
    record = {"global_physical_count": torch.ones(1, 8, dtype=torch.int32)}
    torch.save({"records": [record], "last_physical_to_logical_map": torch.arange(8)[None]}, tmp_path / "half.pt")
    with pytest.raises(InputError, match="8 logical ones; the layer has 16"):
        read_recording(tmp_path / "half.pt", E)
    torch.save({"records": [record]}, tmp_path / "bare.pt")
    with pytest.raises(InputError, match="counts 8 experts a layer"):
        read_recording(tmp_path / "bare.pt", E)


def test_what_is_no_file_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    for name, why in (("folder.npy", "a folder"), ("pipe.npy", "no regular file")):
        with pytest.raises(InputError, match=why):
            read_recording(tmp_path / name, E)


def test_the_commands_say_what_is_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.concatenate([routed(), routed(2) * 0]))
    as_stat(tmp_path)
    run = ["profile", "--kernel", "sim", "-E", "16", "--top-k", "4", "-K", "512", "-N", "256", "--dry-run", "--json"]
    run += ["--batch-size", "8", "--eval-batch-size", "--routing", "uniform", "trace:stat.pt"]
    assert main([*run, "--recorded", "ids.npy", "--recorded-limit", "2"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["recorded"] == [
        {"file": "ids.npy", "found": 3, "taken": 2, "left_out": {"padding_tokens": 6}, "tokens": 0, "part": None},
        {
            "file": "stat.pt",
            "found": 15,
            "taken": 15,
            "left_out": {"steps_without_tokens": 2},
            "tokens": 0,
            "part": None,
        },
    ]
    assert "ids.npy: 2 of 3 histograms taken; left out: padding tokens (6)." in said.err
    assert "stat.pt: 15 of 15 histograms taken; left out: steps without tokens (2)." in said.err
