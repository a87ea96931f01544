"""What the Triton kernel runs where nobody has measured anything, by the tokens that an expert gets."""

import pytest

pytest.importorskip("triton")

from rampwrap.kernels.triton.moe.configs import default_config, listed, refusal

ROWS = {
    "bf16": [
        (2.5, (16, 64, 128, 1, 4, 3, True)),
        (6.5, (32, 64, 128, 1, 4, 3, True)),
        (11, (32, 128, 64, 1, 4, 5, True)),
        (80, (64, 128, 64, 1, 4, 3, False)),
        (200, (128, 256, 64, 1, 8, 4, False)),
        (4096, (128, 256, 64, 8, 8, 4, False)),
    ],
    "fp8": [
        (7, (16, 128, 128, 1, 4, 3, True)),
        (28, (32, 256, 128, 8, 4, 3, True)),
        (4096, (64, 128, 128, 8, 4, 4, False)),
    ],
}
FEW = {
    "bf16": [
        (15, (16, 64, 128, 1, 4, 3, True)),
        (32, (16, 128, 64, 1, 4, 3, True)),
        (33, (16, 64, 128, 1, 4, 3, True)),
    ],
    "fp8": [(8, (16, 64, 128, 1, 4, 4, True)), (24, (16, 64, 128, 1, 4, 3, True)), (25, (16, 128, 128, 1, 4, 3, True))],
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_each_row_serves_up_to_its_tokens_an_expert(dtype: str) -> None:
    """From one slot more than the row before; top_k and the number of experts count alike."""
    least = 64
    for most, row in ROWS["fp8" if dtype == "fp8" else "bf16"]:
        for slots in (least + 31, int(64 * most)):
            assert tuple(default_config(slots, 64, 1, dtype).values()) == row, slots
            assert tuple(default_config(slots, 512, 8, dtype).values()) == row, slots
        least = int(64 * most) + 1


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_few_slots_count_themselves(dtype: str) -> None:
    """Each has an expert of its own there, however many there are."""
    for slots, row in FEW[dtype]:
        for experts in (64, 512):
            assert tuple(default_config(slots, experts, 1, dtype).values()) == row, slots
    # Of few experts each gets several.
    assert tuple(default_config(16, 8, 1, dtype).values()) == ROWS[dtype][0][1]


@pytest.mark.parametrize(
    ("dtype", "group"), [("bf16", 128), ("fp16", 128), ("fp8", 128), ("fp8", 64), ("fp8", 32), ("fp8", 0)]
)
def test_every_default_is_legal_and_listed(dtype: str, group: int) -> None:
    for tokens in [*range(1, 70), 100, 200, 500, 1000, 5000, 50000]:
        config = default_config(tokens, 64, 8, dtype, group)
        assert refusal(config, dtype, group) is None and config in listed(dtype, group), (tokens, config)
