"""benchmarks/prepare.py without a GPU: every way to prepare a batch, in Triton's interpreter, leaves the same bits."""

import json
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.kernels.triton.interpreter import INTERPRETED

if not INTERPRETED.value:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)


def test_every_way_is_right_and_timed(script, monkeypatch, tmp_path):
    prepare, out = script("prepare"), tmp_path / "out.json"
    small = ["--num-experts", "32", "--tokens", "3", "--groups", "8", "--hidden-size", "256", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *small, "--out", str(out)])
    assert prepare.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["fp8", "bf16"]
    assert all(set(row["us"]) == {"one 8", "two 8", "apart"} and not row["wrong"] for row in rows)


def test_a_way_that_is_wrong_is_not_timed(script, monkeypatch):
    prepare = script("prepare")
    ways = prepare.Ways(3, 32, 256, True, [8])
    ways.calls["one 8"] = lambda: None
    assert ways.wrong() == ["one 8"]
