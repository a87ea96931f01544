"""benchmarks/host.py, short."""

import json
import sys


def test_what_it_records(script, monkeypatch, tmp_path):
    host = script("host")
    monkeypatch.setattr(host, "TOKENS", (1, 64))
    monkeypatch.setattr(host, "PROFILED", [1, 8, 64])
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "PROCESSES", {"python itself": ["-c", "pass"]})
    score, out = host.compiled.score, tmp_path / "host.json"
    monkeypatch.setattr(sys, "argv", ["host.py", "--rounds", "3", "--runs", "2", "--out", str(out)])
    host.main()
    found = json.loads(out.read_text())
    assert host.compiled.score is score
    ways = {"pinned", "numpy", "numpy, all"} | ({"native", "native, all"} if score is not None else set())
    assert found["choice_us"].keys() == ways
    for its in found["choice_us"].values():
        assert list(its) == ["1", "64"]
        assert all(low <= middle <= high for low, middle, high in its.values())
    started = found["import_ms"]["python itself"]
    assert 0 < started["least"] <= started["median"] <= started["most"]
    assert {"command", "date", "commit", "device"} <= found.keys()
