"""The command line, from profiling the simulated kernel to replaying its table."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import attrs
import click
import pytest

from rampwrap.cli.command import Command
from rampwrap.cli.main import COMMANDS, PLACES, main
from rampwrap.cli.tables import COST_MODEL
from rampwrap.cli.types import seconds
from rampwrap.kernel import catalog
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import SHIPPED
from rampwrap.testing.sim import SimKernel

SIM = ["--kernel", "sim", "--model", "olmoe"]
SMALL = [
    "--batch-size",
    "1",
    "16",
    "64",
    "256",
    "--eval-batch-size",
    "24",
    "96",
    "--eval-routing",
    "dirichlet:0.2",
    "hot:2",
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class Fewer(SimKernel):
    def __init__(self, shape: MoEShape) -> None:
        super().__init__(shape)
        self.configs = self.configs[:2]

    def supports(self, config: Config, shape: MoEShape) -> None:
        """All that looks like one of its configs."""


def test_profile_fit_show_explain_compare_replay(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = run(capsys, "profile", *SIM, *SMALL, "--dry-run")
    assert not list(tmp_path.iterdir()) and planned["out"] == "sim-E64-k8-H2048-I1024-bf16.npz"
    made = run(capsys, "profile", *SIM, *SMALL, "--quiet", "--out", "t.npz")
    assert (made["workloads"], made["configs"]) == (24, 24)
    fitted = run(capsys, "fit", "t.npz")
    assert fitted["out"] == "t.plan.json" and fitted["train_workloads"] == 20
    assert run(capsys, "show", "t.npz")["measured"] == 1.0
    assert run(capsys, "show", "t.plan.json")["kernel"] == "sim"
    chosen = run(capsys, "explain", "t.plan.json", "--batch-size", "96", "--routing", "hot:2")
    assert chosen["config"] and chosen["num_tokens"] == 96
    counts = ",".join(["0"] * 63 + ["8"])
    assert run(capsys, "explain", "t.plan.json", "--expert-counts", counts)["num_tokens"] == 1
    live = run(capsys, "compare", "t.plan.json", "--batch-size", "48", "--quiet", "--csv", "ab.csv", "--plot", "ab.png")
    assert live["policies"]["static-uniform"]["speedup"] == 1 and "wave" in live["policies"]
    assert {"ab.csv", "ab.png"} <= {path.name for path in tmp_path.iterdir()}
    # A kernel that lists two configs today, and still runs those of the plan.
    fewer = run(capsys, "compare", "t.plan.json", "--kernel", f"{__name__}:Fewer", "--batch-size", "48", "--quiet")
    assert fewer["policies"] == live["policies"]
    replayed = run(capsys, "replay", "t.npz")
    assert set(replayed["policies"]) == {"static-uniform", "static-averaged", "ramp4", "wave", "oracle"}
    for command in (["show", "t.npz"], ["show", "t.plan.json"], ["replay", "t.npz"], ["fit", "t.npz"]):
        assert main(command) == 0
        assert capsys.readouterr().out.strip()


def test_compare_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "no_gpu", lambda: "none here")
    plan = next(SHIPPED.glob("triton_fused_moe-*.plan.json"))
    assert main(["compare", str(plan)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rampwrap: there is no GPU here (none here)") and "rampwrap replay" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["replay", "none.npz"], "none.npz"),
        (["show", "none.json"], "none.json"),
        (["profile", "--kernel", "tritn", "--model", "olmoe"], "tritn"),
        (["profile", "--kernel", "no.such:thing", "--model", "olmoe"], "no.such"),
        (["profile", "--kernel", "sim"], "--num-experts, --top-k, --hidden-size, --intermediate-size"),
        (["profile", "--kernel", "sim", "--model", "olmo"], "olmo"),
        (["profile", *SIM, "--tp-size", "3"], "--tp-size 3"),
        (["profile", *SIM, "--routing", "zip:2"], "zip:2"),
        (["profile", *SIM, "--dtype", "int3"], "int3"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("rampwrap: ") and named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["profiel"], ["replay"], ["profile", "--batch-size", "0"], ["profile", "--budget", "soon"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profiel"], "Did you mean 'profile'?"),
        (["xyz"], "Use one of profile, doctor,"),
        (["profile", "--batchsize", "3"], "--batch-size"),
        (["profile", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["profile", "--eval-batch-size", "8", "x"], "'x' is not a whole number of at least 1"),
        (["profile", "--budget", "soon"], "'soon' is no duration; write 90s, 3m or 1h"),
        (["profile", "--out", "--quiet"], "'--out' requires a value"),
        (["profile", "--engine", "vlm"], "'vllm', 'sglang', 'transformers'"),
        (["explain", "p.json", "--expert-counts", "1,x"], "'1,x' is no list of whole numbers; write 3,0,5,..."),
        (["explain", "p.json", "q.json"], "q.json"),
        (["replay"], "TABLE.npz"),
        (["fit", "t.npz", "--fit", "ramp"], "'ramp4'"),
        (["fit", "t.npz", "--model", "ramp4"], "--fit"),
        (["replay", "t.npz", "--model", "default"], "--fit"),
        (["build-kernels", "--form", "two", "tow"], "'tow' is not one of"),
    ],
)
def test_wrong_usage_names_the_value_and_what_to_write(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and said in err.splitlines()[-1]


@pytest.mark.parametrize("name", PLACES)
def test_each_command_has_help_and_a_request_for_all_its_options(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code and PLACES[name][1].split()[0] in capsys.readouterr().out
    command = COMMANDS.get_command(click.Context(COMMANDS), name)
    assert isinstance(command, Command)
    options = {its.name for its in command.params if its.expose_value}
    assert options - {"as_json"} == set(fields(command.kind))


def fields(kind: type[Any]) -> list[str]:
    """Of a request and those inside it."""
    its = [(field.name, field.type) for field in attrs.fields(kind)]
    return [one for name, inner in its for one in (fields(inner) if attrs.has(inner) else [name])]


def test_a_cost_model_is_chosen_by_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, sim_timings: Timings
) -> None:
    table, plan = str(tmp_path / "t.npz"), str(tmp_path / "t.plan.json")
    sim_timings.save(table)
    for options, name in (([], COST_MODEL), (["--fit", "ramp4"], "ramp4"), (["--fit", "default"], COST_MODEL)):
        run(capsys, "fit", table, *options)
        assert run(capsys, "show", plan)["model"]["name"] == name
    assert "ramp4" in run(capsys, "replay", table, "--fit", "ramp4")["policies"]


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> Timings:
        raise KeyboardInterrupt

    monkeypatch.setattr(Timings, "load", interrupted)
    assert main(["replay", "t.npz"]) == 130


def test_durations() -> None:
    assert [seconds(text) for text in ("90", "90s", "3m", "1.5h")] == [90, 90, 180, 5400]


def test_python_dash_m_and_a_reader_that_leaves() -> None:
    command = [sys.executable, "-m", "rampwrap"]
    assert subprocess.run([*command, "--version"], capture_output=True, check=True).stdout.strip()
    child = subprocess.Popen([*command, "profile", *SIM, "--dry-run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read()
    child.wait()
