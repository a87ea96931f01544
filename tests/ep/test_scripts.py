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
    assert ranks.run(2, "script", script, "soak", ["cpu", "collectives", 12]) == [12, 12]
    assert ranks.run(2, "script", script, "bulk", ["cpu", "collectives", 2]) == [18, 18]


def test_the_bulk_benchmark(ranks: Any) -> None:
    script = str(ROOT / "benchmarks/ep_bulk.py")
    if not pathlib.Path(script).exists():
        pytest.skip("the benchmarks are not beside these tests")
    arguments = ["--device", "cpu", "--hidden-size", "256", "--tokens", "4", "1", "--rounds", "1"]
    first, second = ranks.run(2, "bulk_benchmark", script, arguments)
    assert [row["nccl"] for row in first[0]] == [row["nccl"] for row in second[0]]
    phases, (layer,), lines = first
    assert [(row["payload"], row["tokens"]) for row in phases] == [(p, t) for p in ("fp8", "bf16") for t in (4, 1)]
    assert all(row[way]["us"] > 0 for row in phases for way in ("launch", "nccl"))
    assert all(layer[way]["us"] > 0 for way in ("launch", "source", "nccl", "pieces", "source_moves"))
    assert not layer["wrong"] and 0 < max(layer["errors"].values()) < 0.01 and len(lines) == 5


def test_the_benchmark(ranks: Any) -> None:
    script = str(ROOT / "benchmarks/ep.py")
    if not pathlib.Path(script).exists():
        pytest.skip("the benchmarks are not beside these tests")
    arguments = ["--device", "cpu", "--hidden-size", "256", "--tokens", "1", "4", "--replays", "2"]
    arguments += ["--layer-tokens", "2", "--layer-shape", "4", "1", "128", "128", "--routing", "uniform"]
    first, second = ranks.run(2, "benchmark", script, arguments)
    assert first == second
    phases, layers, lines = first
    assert [(row["payload"], row["tokens"]) for row in phases] == [(p, t) for p in ("fp8", "bf16") for t in (0, 1, 4)]
    assert [row["dtype"] for row in layers] == ["bf16", "fp8"]
    assert all(row["ours_us"] > 0 and row["rival_us"] > 0 for row in phases if row["tokens"])
    assert all(row[f"{side}_us"] > 0 for row in layers for side in ("ours", "same", "triton"))
    assert all(0 < error < 0.01 for row in layers for error in row["errors"].values())
    assert len(lines) == 8


def test_rivals_are_right(ranks: Any) -> None:
    """Ours and NCCL's part: the sums are compared inside, before and after timing."""
    script = str(ROOT / "benchmarks/ep_rivals.py")
    if not pathlib.Path(script).exists():
        pytest.skip("the benchmarks are not beside these tests")
    arguments = ["--device", "cpu", "--hidden-size", "256", "--tokens", "1", "4", "--replays", "2"]
    first, second = ranks.run(2, "rivals", script, arguments)
    assert first == second
    assert [(row["payload"], row["tokens"]) for row in first] == [(p, t) for p in ("bf16", "fp8") for t in (1, 4)]
    assert all(row["ours_us"] > 0 and row["nccl_us"] > 0 for row in first)
