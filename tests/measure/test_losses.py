"""What a run could not measure, counted once."""

from rampwrap.measure.losses import Losses

KEYS = (("8 tokens", "train", (1,)), ("16 tokens", "eval", (2,)))
CONFIGS = ({"block_m": 16}, {"block_m": 32})


def test_a_skipped_row_is_told_by_itself_and_not_again_by_its_cells() -> None:
    losses = Losses({(0, 0): "it raised", (1, 0): "out of rows", (1, 1): "out of rows"})
    losses.skip(1)
    notes = losses.notes(KEYS, CONFIGS)
    assert notes["skipped"] == {"16 tokens (eval)": "out of rows"}
    assert notes["failed"] == [{"workload": "8 tokens", "config": {"block_m": 16}, "reason": "it raised"}]


def test_a_row_without_a_failed_cell_is_not_skipped() -> None:
    losses = Losses({(0, 0): "it raised"})
    losses.skip(1)
    assert losses.rows == {} and "skipped" not in losses.notes(KEYS, CONFIGS)


def test_nothing_lost_is_nothing_said() -> None:
    assert Losses().notes(KEYS, CONFIGS) == {}
