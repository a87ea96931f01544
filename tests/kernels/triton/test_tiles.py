"""Where the tokens of a tile end, against the definition in Python."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap.kernel.grid import max_blocks
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.tiles import tile_ends

pytestmark = pytest.mark.skipif(
    not INTERPRETED.value and not torch.cuda.is_available(),
    reason="Triton was imported before TRITON_INTERPRET=1 and there is no GPU",
)
DEVICE = "cpu" if INTERPRETED.value else "cuda"


@settings(max_examples=40)
@given(block_m=st.sampled_from([4, 16, 64]), ids=st.lists(st.integers(-1, 6), min_size=1, max_size=80))
def test_ends(block_m, ids):
    """Of full tiles behind the tile, of an expert's last one behind its last token; of tiles that nobody has, their start."""
    experts = 5
    blocks = align_tokens(torch.tensor(ids, dtype=torch.int32, device=DEVICE)[:, None], block_m, experts)
    memory = torch.full((max_blocks(len(ids), experts, block_m) + 1,), -7, dtype=torch.int32, device=DEVICE)
    tile_ends(blocks, memory[:-1], memory[-1:])
    expected: list[int] = []
    for expert in range(experts):
        left = ids.count(expert)
        while left > 0:
            expected.append(len(expected) * block_m + min(left, block_m))
            left -= block_m
    tiles = len(expected)
    expected += [tile * block_m for tile in range(tiles, len(memory) - 1)]
    assert memory.tolist() == [*expected, tiles]
