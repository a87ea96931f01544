"""The path through shared memory between processes, in Triton's interpreter: `across_processes`."""

import pathlib
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = str(pathlib.Path(__file__).parent / "across_processes.py")


@pytest.mark.parametrize(("num_ranks", "rounds"), [(2, 4), (4, 3)])
def test_steps(num_ranks: int, rounds: int, ranks: Any, tmp_path: pathlib.Path) -> None:
    """Ranks with any number of tokens and at any distance: the bits of the path over torch.distributed."""
    assert ranks.run(num_ranks, "script", SCRIPT, "steps", [str(tmp_path), rounds]) == [3 * rounds] * num_ranks


def test_rows(ranks: Any, tmp_path: pathlib.Path) -> None:
    assert ranks.run(2, "script", SCRIPT, "rows", [str(tmp_path), 4]) == [4, 4]
