"""Dispatch and combine through shared memory on 2 and more GPUs: ``pytest -m gpu tests/gpu/ep``."""

import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from rampwrap.kernels.triton.interpreter import INTERPRETED

SCRIPT = pathlib.Path(__file__).parent / "on_gpus.py"
CHECKS = ("aligned", "late", "gathered", "layers", "bulk", "captured", "large", "soak")
LIMIT_S = float(os.environ.get("RAMPWRAP_EP_LIMIT_S", "600"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
RANKS = [ranks for ranks in (2, 4, 8) if ranks <= torch.cuda.device_count()]


@pytest.mark.parametrize("ranks", RANKS)
def test_on_gpus(ranks: int, tmp_path: pathlib.Path) -> None:
    """One process a GPU, all checks one after the other; 2,000 rounds of the soak."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(its for its in sys.path if its)}
    command = [sys.executable, str(SCRIPT), str(ranks), *CHECKS, "--limit-s", f"{LIMIT_S:g}"]
    # Not a pipe: processes that outlive the first one would keep it open.
    with (tmp_path / "said").open("w+", encoding="utf-8") as said:
        code = subprocess.call(command, env=environment, stdout=said, stderr=subprocess.STDOUT, timeout=LIMIT_S + 20)
        said.seek(0)
        text = said.read()
    assert code == 0, text[-6000:]
    passed = [line for line in text.splitlines() if " passed in " in line]
    print(*passed, sep="\n")
    assert len(passed) == len(CHECKS) * ranks, text[-6000:]
    assert all(int(line.split()[-1]) >= 2000 for line in passed if ": soak " in line)
