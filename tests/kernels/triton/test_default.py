"""What the Triton kernel runs where nobody has measured anything, by the tokens that an expert gets."""

import pytest

pytest.importorskip("triton")

from rampwrap.kernels.triton.moe.configs import default_config

ROWS = {
    "bf16": [
        (2, (16, 64, 128, 1, 4, 3, False)),
        (12, (16, 128, 64, 1, 4, 4, False)),
        (24, (32, 128, 64, 1, 4, 3, False)),
        (48, (64, 128, 64, 1, 4, 3, False)),
        (96, (128, 128, 64, 8, 8, 3, False)),
        (4096, (128, 256, 64, 8, 8, 4, False)),
    ],
    "fp8": [
        (12, (16, 128, 128, 1, 4, 4, True)),
        (32, (32, 128, 128, 1, 4, 4, True)),
        (96, (64, 128, 128, 1, 4, 4, False)),
        (4096, (128, 128, 128, 8, 8, 4, False)),
    ],
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_each_row_serves_up_to_its_tokens_an_expert(dtype: str) -> None:
    """From one slot more than the row before; top_k and the number of experts count alike."""
    least = 1
    for most, row in ROWS["fp8" if dtype == "fp8" else "bf16"]:
        for slots in (least, 64 * most):
            assert tuple(default_config(slots, 64, 1, dtype).values()) == row, slots
            assert tuple(default_config(slots, 512, 8, dtype).values()) == row, slots
        least = 64 * most + 1
