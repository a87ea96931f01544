"""benchmarks/ep_rivals.py without GPUs: what its checks refuse, what it prints and leaves out, FlashInfer's structures."""

import argparse
import ctypes
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ROW = {"hidden_size": 2048, "payload": "bf16", "tokens": 8, "ours_us": 20.0, "ours_spread": 0.01}
NCCL = {"nccl_us": 30.0, "nccl_spread": 0.02}
FAR = {"hidden_size": 2048, "payload": "bf16", "tokens": 8, "graphs": False, "vdev_us": 50.0, "vdev_spread": 0.1}


@pytest.fixture
def rivals(script):
    return script("ep_rivals")


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_sums_are_exact_and_a_wrong_one_is_refused(rivals, payload):
    sent = [rivals.Batch.drawn(rank, 2, 4, 256, 8, payload, "cpu") for rank in range(2)]
    every = [torch.cat([its.fields[field].float() for its in sent]) for field in range(len(sent[0].fields))]
    total = sum(its.y(every, "all").float() for its in sent)
    for rank, its in enumerate(sent):
        part = total[rank * 4 : rank * 4 + 4].bfloat16()
        its.check(part, "all")
        with pytest.raises(AssertionError, match=f"all: sums of 4 tokens are wrong on rank {rank}"):
            its.check(part + 1, "all")


def test_rows_of_other_tokens_are_refused(rivals):
    its = rivals.Batch.drawn(0, 2, 4, 256, 8, "bf16", "cpu")
    rows, ids, weights = its.fields
    with pytest.raises(AssertionError, match="weights are not of their ids"):
        its.y([rows, ids, weights.roll(1, 0)], "all")


def test_structures_are_those_of_the_header(script):
    """Sizes and some places as a C++ compiler says."""
    its = script("ep_flashinfer")
    assert (ctypes.sizeof(its._Dispatch), its._Dispatch.received.offset, its._Dispatch.stream.offset) == (
        4848,
        200,
        4840,
    )
    assert (ctypes.sizeof(its._Combine), its._Combine.epoch.offset, its._Combine.stream.offset) == (1184, 104, 1176)


def run(rivals, monkeypatch, tmp_path, fails):
    """With processes that write a row, or raise."""

    def start(_, its):
        key = (its.side, its.graphs, its.flashinfer is not None, its.deepep is not None)
        if key in fails:
            raise RuntimeError(f"traceback\n{key} is broken")
        its.rows.write_text(json.dumps(ROW | NCCL if its.side == "near" else FAR | NCCL) + "\n", encoding="utf-8")

    monkeypatch.setattr(rivals, "start", start)
    monkeypatch.setattr("torch.distributed._symmetric_memory.is_nvshmem_available", lambda: True)
    said = []
    its = argparse.Namespace(
        device="cuda", ranks=2, flashinfer="a.so", deepep="b.so", seconds=[1, 1], out=tmp_path / "out.json"
    )
    found = rivals.run(its, said.append)
    assert json.loads(its.out.read_text()) == found
    return found, "\n".join(said)


def test_whoever_fails_is_left_out_and_the_others_are_timed(rivals, monkeypatch, tmp_path):
    fails = {("near", True, True, True), ("near", True, True, False), ("far", True, False, False)}
    found, said = run(rivals, monkeypatch, tmp_path, fails)
    assert found["near"] == [ROW | NCCL] and found["far"] == [FAR | NCCL]
    assert set(found["left_out"]) == {
        "ours, NCCL, FlashInfer, DeepEP", "ours, NCCL, FlashInfer", "vdev_2d in graphs",
    }  # fmt: skip
    assert "ours, NCCL, FlashInfer: ('near', True, True, False) is broken" in said
    assert "1.50x" in said and "2.50x" in said and "without graphs" in said


def test_nothing_is_tried_twice_where_it_works(rivals, monkeypatch, tmp_path):
    found, said = run(rivals, monkeypatch, tmp_path, set())
    assert found["left_out"] == {} and said.count("2048 bf16") == 2
