"""What leaves the command line: pictures of every ending, and answers to where nothing can be written."""

import os
import pathlib
import subprocess
import sys

import pytest

from rampwrap.cli.main import main
from rampwrap.compare import report
from rampwrap.errors import InputError
from rampwrap.measure.timings import Timings
from rampwrap.plan.plan import Plan

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("ending", ["xyz", "docx", "png2", "json"])
@pytest.mark.parametrize("option", ["--plot", "--plot-fit"])
def test_unknown_pictures_are_refused_before_the_work(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], ending: str, option: str
) -> None:
    """The table is not even there."""
    assert main(["replay", str(tmp_path / "none.npz"), option, str(tmp_path / f"picture.{ending}")]) == 1
    assert f"writes no {ending!r}; end it in .png" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_regions_refuses_them_too(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regions", "--plot", str(tmp_path / "picture.xyz")]) == 1
    assert "writes no 'xyz'" in capsys.readouterr().err
    assert main(["regions", "--model", "olmoe", "--plot", str(tmp_path / "picture")]) == 0
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("a.png", b"\x89PNG"),
        ("a.PNG", b"\x89PNG"),
        ("a.svg", b"<?xml"),
        ("a.pdf", b"%PDF"),
        ("of v1.5/a", b"\x89PNG"),
        (".hidden", b"\x89PNG"),
    ],
)
def test_a_picture_is_of_the_type_its_name_ends_in(tmp_path: pathlib.Path, name: str, starts: bytes) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    report.save_figure(report.pyplot().figure(), path)
    assert path.read_bytes().startswith(starts)


def test_what_a_backend_cannot_do_is_a_sentence(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = report.pyplot().figure()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("xelatex not found")))
    with pytest.raises(InputError, match=r"cannot be drawn \(xelatex not found\); end it in \.png"):
        report.save_figure(figure, tmp_path / "a.pgf")
    assert not list(tmp_path.iterdir())


def test_the_policies_of_a_report_stand_in_columns(sim_timings: Timings) -> None:
    from rampwrap.compare import evaluate as compare
    from rampwrap.policy.static import StaticTable

    long = "static E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8"
    lines = report.text(compare.replay(sim_timings, extra={long: StaticTable("a file", (1,), (0,))})).splitlines()
    ends = {line.rindex("%") for line in lines[2:7]}
    assert len(ends) == 1 and lines[1].rindex("slower") + 5 in ends


def test_an_answer_that_cannot_be_written_is_a_sentence(tmp_path: pathlib.Path, sim_plan: Plan) -> None:
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    sim_plan.save(tmp_path / "p.plan.json")
    for arguments in (["show", "p.plan.json"], ["show", "p.plan.json", "--json"], ["--version"], ["show", "--help"]):
        with pathlib.Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "rampwrap", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent.parent)},
            )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
