"""benchmarks/ep_rivals.py without GPUs: what its checks refuse, what it prints and leaves out, others' structures."""

import argparse
import ctypes
import json
import os
import pathlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ROW = {"hidden_size": 2048, "payload": "bf16", "tokens": 8, "ours_us": 20.0, "ours_spread": 0.01}
NCCL = {"nccl_us": 30.0, "nccl_spread": 0.02}
NEWER = {"nccl_ep_us": 60.0, "nccl_ep_spread": 0.03}
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


def test_structures_are_those_of_nccl_ep(script):
    """Sizes and some places as a C compiler says, and how each begins."""
    its = script("ep_nccl_ep")
    names = ("_Tensor", "_Group", "_Layout", "_Sent", "_Received", "_Given", "_Sums", "_Dispatch")
    assert [ctypes.sizeof(getattr(its, name)) for name in names] == [48, 112, 48, 32, 40, 32, 24, 24]
    assert (its._Group.buffer_bytes.offset, its._Group.wait_ns.offset, its._Group.top_k.offset) == (32, 88, 104)
    assert (its._Layout.by_rank.offset, its._Layout.ids.offset, its._Dispatch.scales.offset) == (16, 40, 20)
    assert (its._Tensor().size, its._Tensor().mark, its._Sums().mark) == (48, 0xCAFECAFE, 0xC00FFFEE)


def run(rivals, monkeypatch, tmp_path, fails, nccl_ep=None):
    """With processes that write a row, or raise."""

    def start(_, its):
        key = (its.side, its.graphs, its.flashinfer is not None, its.deepep is not None)
        assert ("LD_PRELOAD" in os.environ) == (its.side == "newer")
        if its.side == "newer":
            key = (its.side, its.in_place)
        if key in fails:
            raise RuntimeError(f"traceback\n{key} is broken")
        row = {"near": ROW | NCCL, "far": FAR | NCCL, "newer": ROW | NCCL | NEWER}[its.side]
        its.rows.write_text(json.dumps(row) + "\n", encoding="utf-8")

    monkeypatch.setattr(rivals, "start", start)
    monkeypatch.setattr("torch.distributed._symmetric_memory.is_nvshmem_available", lambda: True)
    said = []
    its = argparse.Namespace(
        device="cuda", ranks=2, flashinfer="a.so", deepep="b.so", nccl_ep=nccl_ep, sides=rivals.SIDES, seconds=[1, 1]
    )
    its.out = tmp_path / "out.json"
    found = rivals.run(its, said.append)
    assert json.loads(its.out.read_text()) == found
    return found, "\n".join(said)


def test_whoever_fails_is_left_out_and_the_others_are_timed(rivals, monkeypatch, tmp_path):
    fails = {("near", True, True, True), ("near", True, True, False), ("far", True, False, False)}
    found, said = run(rivals, monkeypatch, tmp_path, fails)
    assert found["near"] == [ROW | NCCL] and found["far"] == [FAR | NCCL]
    assert set(found["left_out"]) == {
        "ours, NCCL, FlashInfer, DeepEP", "ours, NCCL, FlashInfer", "vdev_2d in graphs", "NCCL EP",
    }  # fmt: skip
    assert "ours, NCCL, FlashInfer: ('near', True, True, False) is broken" in said
    assert "1.50x" in said and "2.50x" in said and "without graphs" in said


def test_nothing_is_tried_twice_where_it_works(rivals, monkeypatch, tmp_path):
    found, said = run(rivals, monkeypatch, tmp_path, set())
    assert found["left_out"] == {"NCCL EP": "no --nccl-ep was given"} and said.count("2048 bf16") == 2


def test_nccl_ep_has_its_nccl_and_is_tried_twice(rivals, monkeypatch, tmp_path):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    found, said = run(rivals, monkeypatch, tmp_path, {("newer", True)}, pathlib.Path("folder"))
    assert found["newer"] == [ROW | NCCL | NEWER] and "LD_PRELOAD" not in os.environ
    assert found["left_out"] == {"NCCL EP, rows in place": "('newer', True) is broken"}
    assert said.endswith("2048 bf16         8 |    20.0     1% |    30.0     2%   1.50x |    60.0     3%   3.00x")
