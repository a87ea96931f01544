"""What engines record, read back: every format, whole histograms, and files that are not what they should be."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rampwrap.cli import main
from rampwrap.errors import InputError
from rampwrap.recorded import Recording, read_recording, read_trace, split_layer
from rampwrap.routing import RecordedWorkload, Routing, Workload, expert_counts, recorded_workloads
from rampwrap.timings import Timings

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
