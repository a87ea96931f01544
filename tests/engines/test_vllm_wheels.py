"""The contract and the plugin against the Python sources of vLLM's own wheels, the classes of each in a process of its own.

All releases: ``pytest -m "slow or release" FILE``.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from rampwrap.engines import vllm_contract as contract
from rampwrap.engines import vllm_cutlass
from rampwrap.plan import folder as places

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
IN_CI = ("0.26.0", "0.30.0", "0.33.0")
BETWEEN = ("0.27.1", "0.28.0", "0.29.0", "0.31.0", "0.32.0")
RELEASES = [pytest.param(one, marks=pytest.mark.slow) for one in IN_CI]
RELEASES += [pytest.param(one, marks=pytest.mark.release) for one in BETWEEN]
# Folders of a wheel, by the ends of which files are taken.
WANTED = ("vllm/model_executor/layers/fused_moe/", "vllm/model_executor/layers/quantization/utils/quant_utils.py")
WANTED += ("vllm/v1/worker/workspace.py", "vllm/utils/math_utils.py", "vllm/forward_context.py", "vllm/config/vllm.py")
WANTED += ("vllm/__init__.py", "vllm/_version.py")


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_keeps_the_contract(version, released):
    root = released("vllm", version, WANTED)
    assert contract.source_version(root) == version and contract.faults(root) == []
    assert vllm_cutlass.faults(root) == ()


def test_the_ends_of_what_was_read_are_checked():
    """The oldest and the newest release in CI are those that the contract names."""
    assert IN_CI[0].startswith(f"{contract.OLDEST}.") and IN_CI[-1].startswith(f"{contract.NEWEST}.")


@pytest.mark.parametrize("version", RELEASES)
def test_with_the_classes_of_a_release(tmp_path, version, released):
    """vLLM's own kernel, prepare, experts, configs and workspace around our launch; see `vllm_classes`."""
    environment = os.environ | {places.PLANS: str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "vllm_classes.py", released("vllm", version, WANTED), version, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"ran in vLLM {version}" in done.stdout
