"""What is written for GPUs runs on the ranks of these tests, over collectives, as far as a CPU goes."""

import pathlib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_the_soak_of_the_gpu_tests(ranks: Any) -> None:
    """Its own arithmetic: both of its sides are the same path here."""
    script = str(ROOT / "tests/gpu/ep/on_gpus.py")
    if not pathlib.Path(script).exists():
        pytest.skip("the GPU tests are not beside these")
    assert ranks.run(2, "script", script, "soak", ["cpu", "collectives", 30]) == [30, 30]
