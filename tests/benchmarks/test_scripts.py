"""Every script imports and says what it does; every file of results is in the index, with a command, device, date and commit."""

import pathlib
import re
import runpy
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
RESULTS = FOLDER / "results"
SCRIPTS = sorted(FOLDER.glob("*.py"))
PARTS = {
    "common",
    "ep_bulk_layers",
    "ep_deepep",
    "ep_flashinfer",
    "ep_layer",
    "ep_mapped",
    "ep_nccl_ep",
    "ep_ranks",
    "ep_shard",
    "ep_sides",
    "ep_vllm_worker",
    "race_check",
    "race_field",
    "race_layer",
    "serve_arm",
    "serve_vllm_setup",
    "serve_vllm_report",
}  # of other scripts


SLOW = {"generate_transformers"}  # half a minute of imports


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in SCRIPTS]
)
def test_says_what_it_does(path, script, monkeypatch, capsys):
    if path.stem in SLOW:
        pytest.importorskip("transformers")
    if path.stem in PARTS:
        assert not hasattr(script(path.stem), "main")
        return
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: " + path.name)


def test_results_are_in_the_index():
    rows = [
        line.split("|")[1:-1] for line in (RESULTS / "README.md").read_text().splitlines() if line.startswith("| `")
    ]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(named) == sorted(path.name for path in RESULTS.iterdir() if path.name != "README.md")
    for row in rows:
        files, _what, _command, device, date, commit = (cell.strip() for cell in row)
        prefix = {"H200": "h200-", "H100": "h100-", "CPU": "cpu-"}[device]
        assert all(name.startswith(prefix) for name in re.findall(r"`([^`]+)`", files))
        assert re.fullmatch(r"2026-\d\d-\d\d", date)
        assert re.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*( \*)?|not kept", commit)
