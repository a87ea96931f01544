"""What the README shows and the examples do, run as a reader would."""

import ast
import doctest
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import rampwrap
from rampwrap import Plan
from rampwrap.cli.main import main
from rampwrap.kernel.protocol import Config
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.sim import SimKernel

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


class Layer(SimKernel):
    """The simulated kernel with the arguments of a real one."""

    def launch(self, config: Config, hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> float:  # type: ignore[override]
        return super().launch(config, topk_ids)


def test_the_three_lines_of_the_readme(sim_plan: Plan, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("the README is not beside the tests")
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.strip()]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    sim_plan.save("olmoe.plan.json")
    topk_ids = Workload(96, Routing.parse("hot:2")).topk_ids(64, 8)
    scope: dict[str, Any] = dict.fromkeys(("hidden_states", "w13", "w2", "topk_weights"))
    scope |= {"kernel": Layer(sim_plan.shape), "topk_ids": topk_ids}
    exec(block[1], scope)
    assert scope["out"] > 0 and sum(scope["moe"].launch_counts) == 1


def test_the_replay_of_the_readme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what stands there, to the last digit; ``...`` stands for lines."""
    if not (ROOT / "README.md").exists():
        pytest.skip("the README is not beside the tests")
    block = re.search(r"```console\n\$ rampwrap (replay .*?)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    monkeypatch.chdir(ROOT)
    assert main(block[1].split()) == 0
    said = capsys.readouterr().out
    assert doctest.OutputChecker().check_output(block[2], said, doctest.ELLIPSIS), said


@pytest.mark.parametrize(
    ("name", "says"), [("wrap_in_three_lines", "predicted"), ("demo", "A/B by tokens: static-uniform -> wave")]
)
def test_examples_run(name: str, says: str, tmp_path: pathlib.Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the demo profiles for a minute")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout
    if name == "demo":
        errors = [float(found) for found in re.findall(r"relative error ([\d.]+)", done.stdout)]
        assert len(errors) == 3 and max(errors) < 0.01
        assert (tmp_path / "build/demo/ab.png").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_public_names_only(path: pathlib.Path) -> None:
    """Of rampwrap itself what `__all__` names, and the modules that the API page calls public."""
    public = {f"rampwrap.{name}" for name in rampwrap.__all__}
    rooms = re.compile(r"rampwrap\.(adapters\.\w+|engines(\.\w+)?|testing|observe)$")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "rampwrap":
            assert all(f"rampwrap.{alias.name}" in public for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("rampwrap."):
            assert rooms.match(str(node.module)), node.module
        elif isinstance(node, ast.Import):
            assert all(a.name in {"rampwrap"} or not a.name.startswith("rampwrap.") for a in node.names)


def test_the_layer_over_two_processes(tmp_path: pathlib.Path) -> None:
    """As torchrun starts them; each compares its tokens with a layer whose experts are all here."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "expert_parallel.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 of 2: 3 tokens, 4 experts" in done.stdout and "rank 1 of 2: 4 tokens, 4 experts" in done.stdout
