"""Dispatch and combine through shared memory on 2 and 4 GPUs: ``pytest -m gpu tests/gpu/ep``. No GPU has run them yet."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from rampwrap.kernels.triton.interpreter import INTERPRETED

SCRIPT = pathlib.Path(__file__).parent / "on_gpus.py"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
RANKS = [ranks for ranks in (2, 4, 8) if ranks <= torch.cuda.device_count()]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("check", ["aligned", "late", "soak"])
def test_on_gpus(check: str, ranks: int) -> None:
    """One process a GPU; each must end well, within ten minutes for 2,000 rounds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Multicast of NVLink is never used, by NCCL neither.
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "PYTHONPATH": os.pathsep.join(its for its in sys.path if its)}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(ranks), str(port), check],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, text) in enumerate(zip(started, said, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {text[-3000:]}"
    if check == "soak":
        assert all(int(text.split()[-1]) >= 2000 for text in said)
