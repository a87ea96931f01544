"""`rampwrap ep`: what a layer over several ranks takes."""

import json

import pytest

from rampwrap.cli.main import main
from rampwrap.ep.layout import CELLS

LAYER = ["ep", "--model", "deepseek-v3", "--dtype", "fp8", "--ep-size", "8", "--dry-run"]


def test_memory_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Larger steps go another way, through the same memory."""
    pytest.importorskip("triton")
    assert main([*LAYER, "--max-tokens-per-rank", "16384", "--batch-size", "1", "128", "16384", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    paths = [step["path"] for step in found["steps"]]
    assert paths == ["all rows", "masked", "masked"]
    rows, cells = 8 * 16384 * (7168 + 224 + 2 * 64 + 2 * 7168), 2 * CELLS * 8 * 8
    marked = 36 * 8 * 2 * 7168  # 4 MB at most
    assert rows + cells + marked < found["memory"]["shared"] < rows + cells + marked + 8192
    assert found["memory"]["collectives"] == 0
    assert found["steps"][1]["most_dispatch_bytes"] == 7 * 128 * (7168 + 224 + 64)
    assert found["steps"][1]["most_combine_bytes"] == 7 * 128 * 2 * 7168


def test_most_ranks_are_those_of_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from rampwrap.cli.ep import MOST_RANKS
    from rampwrap.kernels.ep import host

    assert MOST_RANKS == host.MOST_RANKS
    assert main([*LAYER, "--ep-size", "16", "--backend", "collectives", "--batch-size", "1"]) == 0
    assert "on 16 ranks" in capsys.readouterr().out


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYER, "--backend", "collectives", "--partials", "fp32", "--batch-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "fp8 on 8 ranks; rows travel in fp8, sums in fp32" in said
    megabytes = 8 * 512 * (7168 + 4 * 56 + 8 * 8 + 4 * 7168) / 1e6  # no cells and no copy of the routing
    assert f"memory of a rank (collectives): {megabytes:.1f} MB, 0.0 shared" in said


@pytest.mark.parametrize(("most", "looked_at"), [(4, [1, 4]), (128, [1, 8, 32, 128]), (512, [1, 8, 32, 128, 512])])
def test_sizes_up_to_the_most_where_none_are_given(
    most: int, looked_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LAYER, "--backend", "collectives", "--max-tokens-per-rank", str(most), "--json"]) == 0
    assert [step["tokens_per_rank"] for step in json.loads(capsys.readouterr().out)["steps"]] == looked_at


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (LAYER[:-1], "add --dry-run"),
        (
            [*LAYER, "--max-tokens-per-rank", "8", "--batch-size", "9"],
            "--batch-size 9 is more than --max-tokens-per-rank 8",
        ),
        ([*LAYER, "--payload", "fp16"], "payload is 'fp16'; a layer in fp8 sends bf16 or fp8"),
        ([*LAYER, "--ep-size", "16"], "--ep-size 16 is more than 8 ranks, which share memory at most; use --backend"),
        ([*LAYER, "--ep-size", "7"], "256 experts cannot be divided equally among 7 ranks"),
    ],
)
def test_refusals(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert said in capsys.readouterr().err
