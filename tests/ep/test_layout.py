"""The memory of a rank, who owns what, and the path of a step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.ep.layout import ALIGNED, CELLS, MARKED_BYTES, Layout, marked
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.path import BY_SOURCE_TOKENS, path_of, share_of_ranks
from rampwrap.ep.terms import Terms, apart
from rampwrap.errors import InputError
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape

layouts = st.builds(
    lambda ranks, tokens, top_k, columns, dtype, fp8, fp32: Layout(
        MoEShape(64, top_k, 128 * columns, 128, dtype),
        ranks,
        tokens,
        **({"payload": "fp8"} if fp8 else {}),
        **({"partials": "fp32"} if fp32 else {}),
    ),
    *(st.integers(1, most) for most in (8, 64, 10, 4)),
    st.sampled_from(["bf16", "fp16", "fp8"]),
    st.booleans(),
    st.booleans(),
)


@given(layouts)
def test_regions_lie_one_after_the_other(layout: Layout) -> None:
    """Aligned, of one memory, none in another: what is written through one view is seen through no other."""
    end = 0
    for region in layout.regions:
        assert region.offset % ALIGNED == 0 and region.offset >= end
        end = region.offset + region.bytes
    assert end <= layout.bytes < end + ALIGNED
    memory = torch.zeros(layout.bytes, dtype=torch.uint8)
    for number, its in enumerate(layout.views(memory).values(), 1):
        its.view(torch.uint8).fill_(number)
    for number, its in enumerate(layout.views(memory).values(), 1):
        assert bool((its.view(torch.uint8) == number).all())


def test_memory_of_published_layers() -> None:
    """128 tokens a rank of DeepSeek-V3 on 4 GPUs: 4 x 128 rows of 7,392 bytes, as many sums of 14,336 and 4 x 73 that are their own
    flags, 64 bytes of each row for its push, and cells."""
    layout = Layout(MoEShape(256, 8, 7168, 2048, "fp8"), 4, 128)
    rows = 4 * 128 * (7168 + 4 * 56 + 2 * 4 * 8)
    push, cells = 2 * 4 * 128 * 8 * 4, 2 * CELLS * 4 * 8
    assert 0 <= layout.bytes - rows - 4 * (128 + 73) * 2 * 7168 - push - cells - 512 < 8 * ALIGNED
    assert Layout(MoEShape(256, 8, 7168, 2048), 4, 128, partials="fp32").bytes > layout.bytes


@given(layouts)
def test_room_for_sums_that_are_their_own_flags(layout: Layout) -> None:
    """Never more than was said, a CTA for each, and for no more tokens than a rank may bring."""
    _, dtype, (ranks, few, columns) = marked(
        layout.num_ranks, layout.max_tokens_per_rank, layout.shape.hidden_size, layout.partial_dtype
    )
    its = ranks * columns * dtype.itemsize
    assert few * its <= MARKED_BYTES and few <= min(layout.max_tokens_per_rank, CELLS)
    assert few == min(layout.max_tokens_per_rank, CELLS) or (few + 1) * its > MARKED_BYTES
    assert marked(2, 8, 68, torch.bfloat16)[2] == (2, 0, 68)  # rows of no whole stores
    assert marked(2, 8, 32, torch.bfloat16)[2] == (2, 0, 32)  # less than a word a thread


@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_owners(num_ranks: int, most: int, random: object) -> None:
    """Any placement: each expert's rank and local id, and the ranks of a row."""
    rng = np.random.default_rng(random.randrange(1 << 30))  # type: ignore[attr-defined]
    sizes = rng.integers(1, most + 1, num_ranks)
    experts = np.split(rng.permutation(sizes.sum()), sizes.cumsum()[:-1])
    placements = [Placement(int(sizes.sum()), its) for its in experts]
    ids = torch.from_numpy(rng.integers(-1, sizes.sum() + 2, (5, 3)))
    for rank in range(num_ranks):
        owners = Owners.of(placements, rank, "cpu")
        mine = set(experts[rank].tolist())
        assert owners.is_local(ids).tolist() == [[int(e) in mine for e in row] for row in ids]
        assert owners.counts(ids).tolist() == [int((ids == int(e)).sum()) for e in experts[rank]]
        assert owners.ranks_of(ids)[:, rank].tolist() == [bool(mine & {int(e) for e in row}) for row in ids]


def test_placements_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="9 experts cannot be divided equally among 2 ranks"):
        contiguous(9, 2, 0)
    for experts, said in (([0, 1], "expert 1 is on ranks 0 and 1"), ([0], "expert 2 is on no rank")):
        placements = [Placement(3, np.array(experts)), Placement(3, np.array([1]))]
        with pytest.raises(InputError, match=said):
            Owners.of(placements, 0, "cpu")


@given(layouts, st.data())
def test_all_ranks_take_the_same_path(layout: Layout, data: st.DataObject) -> None:
    """It depends on the layout and the counts, which all ranks have; in no way on which rank asks, or on its routing."""
    counts = data.draw(
        st.lists(st.integers(0, 2 * BY_SOURCE_TOKENS), min_size=layout.num_ranks, max_size=layout.num_ranks)
    )
    paths = {path_of(layout, list(counts), by_source=True) for _ in range(layout.num_ranks)}
    assert len(paths) == 1
    (path,) = paths
    assert path == path_of(layout, sorted(counts), by_source=True)
    assert path.by_source == (max(counts) >= BY_SOURCE_TOKENS) and not path_of(layout, counts).by_source
    assert not (path.masked and path.by_source)
    assert path_of(layout, counts, masked=True).masked and not path_of(layout, counts, masked=False).masked


def test_where_rows_are_masked() -> None:
    """Two ranks of top-8 save nothing; eight ranks save a third once there are bytes to save."""
    shape = MoEShape(256, 8, 7168, 2048, "fp8")
    assert share_of_ranks(2, 8) == pytest.approx(1 - 2**-8) and math.isclose(share_of_ranks(1, 4), 1.0)
    assert not path_of(Layout(shape, 2, 4096), [128] * 2).masked
    assert path_of(Layout(shape, 8, 4096), [128] * 8).masked
    assert not path_of(Layout(shape, 8, 4096), [1] * 8).masked
    assert str(path_of(Layout(shape, 8, 2048), [0] * 7 + [2047])) == "masked"
    assert str(path_of(Layout(shape, 2, 8192), [0, 4096])) == "all rows"
    assert str(path_of(Layout(shape, 8, 8192), [0] * 7 + [8192], by_source=True)) == "all rows, by source"
    assert path_of(Layout(shape, 8, 64), [9] * 8, by_source=True, by_source_tokens=9).by_source
    assert not path_of(Layout(shape, 8, 64), [8] * 8, by_source=True, by_source_tokens=9).by_source


def terms(host: str = "a", gpu: int | None = 0, gpu_id: str | None = None) -> Terms:
    return Terms({}, host, gpu, gpu_id or f"{host}{gpu}")


@pytest.mark.parametrize(
    ("others", "reach", "said"),
    [
        ([terms(), terms(gpu=1)], True, None),
        ([terms(), terms(gpu_id="another")], False, None),  # each process sees one GPU: only the mapping can tell
        (
            [terms(), terms(gpu=1)],
            False,
            "GPU 0 of rank 0 has no access to GPU 1 of rank 1; use GPUs that NVLink connects",
        ),
        ([terms(), terms(host="b")], True, "ranks 0 and 1 are on the hosts a and b; use the backend 'collectives'"),
        ([terms(), terms()], True, "ranks 0 and 1 share one GPU; give each rank its own"),
        ([terms(gpu=None), terms()], True, "rank 0 runs on a CPU; use the backend 'collectives'"),
    ],
)
def test_ranks_that_cannot_share_memory(others: list[Terms], reach: bool, said: str | None) -> None:
    reason = apart(others, 0, lambda mine, its: reach)
    assert reason is None if said is None else said in str(reason)
