"""`rampwrap profile --engine` and `doctor` on a GPU: what one makes the other finds, and the end was foretold."""

import json
import pathlib
from typing import Any

import attrs
import pytest

pytest.importorskip("triton")

from rampwrap.cli.main import main
from rampwrap.engines import installed
from rampwrap.kernel.device import Device
from rampwrap.kernels.triton.moe import configs as tuning
from rampwrap.plan.folder import PLANS, Plans

pytestmark = pytest.mark.gpu
OLMOE = {
    "model_type": "olmoe",
    **{"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 16, "hidden_act": "silu", "torch_dtype": "bfloat16"},
}


def test_a_profile_is_foretold_and_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the card that is here, with all its properties. Every eighth config: all 80 take a minute more to compile."""
    usual = tuning.listed
    monkeypatch.setattr(tuning, "listed", lambda *its: usual(*its)[::8])
    monkeypatch.setenv(PLANS, str(tmp_path / "plans"))
    monkeypatch.setattr(installed, "_version", lambda engine: "")
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))

    def run(*command: str) -> Any:
        capsys.readouterr()
        status = main([*command, "--json"])
        said = capsys.readouterr()
        # 130 is an interruption: of the test's own time limit, where it ends with SIGTERM.
        assert status == 0 and said.out, f"{command[0]} ended with {status}: {said.out[-500:]} {said.err[-4000:]}"
        return json.loads(said.out)

    profile = ["profile", "--engine", "vllm", "--model", str(tmp_path), "--kernel", "triton_fused_moe", "--quiet"]
    few = ["--batch-size", "16", "256", "--eval-batch-size", "64", "--rounds", "2", "--most-configs", "4"]
    planned = run(*profile, *few, "--dry-run")
    found = run(*profile, *few)
    assert planned["shapes"][0]["seconds"] > 0
    # From the table's phase on, the end was known to 30 s or by half.
    (at, left) = found["foretold"][1]
    took = found["seconds"] - at
    assert abs(left - took) < max(30.0, 0.5 * took), found["foretold"]
    ((_, plan),) = Plans.read().found
    here = Device.current()
    assert plan.device == here and here.capability and here.memory_bytes
    said = run("doctor", str(tmp_path))
    assert said["served"]
    (served,) = said["layers"][0]["served"]
    assert served["gpu"] == here.label and served["kernel"] == "triton_fused_moe" and served["source"] == "own"
    # Under another name the same card takes the plan.
    fit = Plans.read().find(plan.shape, attrs.evolve(here, name="X"), ("triton_fused_moe",))
    assert fit is not None and fit.plan.device == here
