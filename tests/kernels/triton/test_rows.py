"""Rows for grouped GEMMs: where they lie, against the definition in Python."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.rows import CONTIGUOUS, LAYOUTS, MASKED, PSUM, place, rows_needed

pytestmark = pytest.mark.skipif(
    not INTERPRETED.value and not torch.cuda.is_available(),
    reason="Triton was imported before TRITON_INTERPRET=1 and there is no GPU",
)
DEVICE = "cpu" if INTERPRETED.value else "cuda"


@settings(max_examples=40)
@given(
    layout=st.sampled_from(LAYOUTS),
    block_m=st.sampled_from([4, 16, 64]),
    ids=st.lists(st.integers(-1, 6), min_size=1, max_size=40),
)
def test_places(layout, block_m, ids):
    """Each slot of an expert has a row of its own in its expert's piece, in slot order; the layout says where pieces end."""
    experts = 5
    if layout == MASKED:
        block_m = max(block_m, -(-len(ids) // block_m) * block_m)
    blocks = align_tokens(torch.tensor(ids, dtype=torch.int32, device=DEVICE)[:, None], block_m, experts)
    of_slot = torch.full((len(ids),), -7, dtype=torch.int32, device=DEVICE)
    memory = torch.full((len(ids) * block_m + experts * block_m,), -7, dtype=torch.int32, device=DEVICE)
    rows = place(blocks, layout, of_slot, memory)
    assert rows.num_rows == rows_needed(len(ids), experts, block_m, layout)
    assert rows.stride == (block_m if layout == MASKED else rows.num_rows)
    expected, named, first, ends = [-7] * len(ids), [-1] * rows.num_rows, 0, []
    for expert in range(experts):
        slots = [slot for slot, name in enumerate(ids) if name == expert]
        start = expert * block_m if layout == MASKED else first
        for rank, slot in enumerate(slots):
            expected[slot] = start + rank
            named[start + rank] = expert
        ends.append(start + len(slots))
        first = -(-ends[-1] // block_m) * block_m
    assert of_slot.tolist() == expected
    counts = [ids.count(expert) for expert in range(experts)]
    assert rows.layout.tolist() == {CONTIGUOUS: named, PSUM: ends, MASKED: counts}[layout]
