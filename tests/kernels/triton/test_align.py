"""`rampwrap.kernels.triton.align.host` against a plain Python reading of the contract, on the GPU or in the interpreter."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rampwrap.errors import InputError
from rampwrap.kernel.grid import max_blocks, num_blocks
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.interpreter import INTERPRETED

if not INTERPRETED.value and not torch.cuda.is_available():
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 and there is no GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED.value else "cuda"
# The interpreter runs a CTA in about a millisecond.
relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected(ids, block_m, num_local, expert_map=None):
    """(rows in blocks, expert of each block, counts) as the contract says, experts and slots ascending."""
    flat = ids.reshape(-1).tolist()
    known = num_local if expert_map is None else len(expert_map)
    local = [(i if expert_map is None else int(expert_map[i])) if 0 <= i < known else -1 for i in flat]
    rows, experts, counts = [], [], []
    for expert in range(num_local):
        mine = [slot for slot, e in enumerate(local) if e == expert]
        blocks = -(-len(mine) // block_m)
        rows += mine + [len(flat)] * (blocks * block_m - len(mine))
        experts += [expert] * blocks
        counts.append(len(mine))
    return rows, experts, counts


def check(ids, block_m, num_local, expert_map=None, blocks=None, path=None):
    """Aligns and compares every defined value."""
    device_map = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32, device=DEVICE)
    blocks = align.align_tokens(ids.to(DEVICE), block_m, num_local, expert_map=device_map, blocks=blocks, path=path)
    rows, experts, counts = expected(ids, block_m, num_local, expert_map)
    post_padded = int(blocks.num_tokens_post_padded)
    assert post_padded == len(rows) == int(num_blocks(counts, block_m)) * block_m
    got = blocks.sorted_token_ids.tolist()
    assert got[:post_padded] == rows
    assert got[post_padded:] == [ids.numel()] * (len(got) - post_padded)
    assert blocks.expert_ids.tolist()[: len(experts)] == experts
    assert blocks.expert_counts.tolist() == counts
    assert len(experts) <= max_blocks(ids.numel(), num_local, block_m) <= blocks.expert_ids.numel()
    return blocks


@pytest.fixture(params=["expert", "chunks", "pieces"])
def path(request, monkeypatch):
    """All paths, with chunks small enough to have several; ``pieces`` has several in a chunk."""
    monkeypatch.setattr(align, "PIECE", 32)
    monkeypatch.setattr(align, "MAX_CHUNKS", 2 if request.param == "pieces" else 8)
    return "chunks" if request.param == "pieces" else request.param


@st.composite
def routings(draw):
    num_experts = draw(st.sampled_from([1, 2, 7, 16, 33, 64]))
    top_k = draw(st.integers(1, min(4, num_experts)))
    num_tokens = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["uniform", "few", "hot", "wild"]))
    low, high = {
        "uniform": (0, num_experts),
        "few": (0, max(1, num_experts // 8)),
        "hot": (0, 1),
        "wild": (-3, num_experts + 3),
    }[kind]
    ids = rng.integers(low, high, size=(num_tokens, top_k))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(ids, dtype=dtype), num_experts, draw(st.sampled_from([8, 16, 64, 128]))


@relaxed
@given(case=routings())
def test_keeps_the_contract(path, case):
    """Any ids, any number of experts: the defined values are exactly the stable order."""
    ids, num_experts, block_m = case
    check(ids, block_m, num_experts, path=path)


@relaxed
@given(case=routings(), seed=st.integers(0, 1000))
def test_expert_map_drops_remote_experts(path, case, seed):
    """Slots of experts on other ranks take no row and are not counted."""
    ids, num_experts, block_m = case
    rng = np.random.default_rng(seed)
    here = rng.permutation(num_experts)[: max(1, num_experts // 2)]
    expert_map = np.full(num_experts, -1)
    expert_map[here] = rng.permutation(len(here))
    check(ids, block_m, len(here), expert_map.tolist(), path=path)


def test_same_memory_again(path):
    """Reused memory is overwritten completely, whatever the batch before left in it."""
    generator = torch.Generator().manual_seed(0)
    blocks = align.allocate_blocks(30, 2, 16, 16, DEVICE)
    for _ in range(3):
        for tensor in (blocks.sorted_token_ids, blocks.num_tokens_post_padded, blocks.expert_counts, blocks.scratch):
            tensor.fill_(-12345)
        check(torch.randint(0, 16, (30, 2), generator=generator), 16, 16, blocks=blocks, path=path)


def test_no_slot_is_here(path):
    """A batch whose experts are all elsewhere makes no block."""
    blocks = check(torch.zeros(5, 2, dtype=torch.int64), 16, 1, [-1, 0], path=path)
    assert int(blocks.num_tokens_post_padded) == 0


def test_empty_batch():
    """No tokens, no blocks, and no launch of an empty grid."""
    blocks = align.align_tokens(torch.empty(0, 8, dtype=torch.int32, device=DEVICE), 16, 4)
    assert int(blocks.num_tokens_post_padded) == 0 and blocks.expert_counts.tolist() == [0] * 4


def test_capacity():
    """n + E (B - 1), and never more than one block a slot."""
    assert align.alignment_capacity(64, 8, 64, 16) == 64 * 8 + 64 * 15
    assert align.alignment_capacity(1, 8, 64, 16) == 8 * 16


def test_workspace_fits_every_block_size():
    """Memory for the largest block_m holds the layout of every smaller one."""
    for num_tokens, top_k, num_experts in [
        (1, 1, 1),
        (1, 8, 64),
        (7, 8, 64),
        (64, 8, 128),
        (4096, 8, 64),
        (9000, 8, 256),
    ]:
        memory = torch.empty(
            align.alignment_ints(num_tokens, top_k, num_experts, 128), dtype=torch.int32, device="meta"
        )
        for block_m in (1, 8, 16, 64, 128):
            align.blocks_in(memory, num_tokens, top_k, num_experts, block_m)


def test_bad_arguments():
    """One sentence that names the value."""
    ids = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(InputError, match="float32"):
        align.align_tokens(ids.float(), 16, 4)
    with pytest.raises(InputError, match="path 'fast' is unknown"):
        align.align_tokens(ids, 16, 4, path="fast")
    with pytest.raises(InputError, match="block_m=0"):
        align.align_tokens(ids, 0, 4)
    with pytest.raises(InputError, match="laid out for 6 slots"):
        align.align_tokens(ids, 16, 4, blocks=align.allocate_blocks(3, 2, 4, 16, DEVICE))


@pytest.mark.parametrize(("num_experts", "top_k"), [(512, 10), (256, 8), (128, 8), (64, 6), (8, 2)])
def test_memory_for_a_batch_holds_every_smaller_one(num_experts, top_k):
    """Also where a chunk gets one more piece and their number falls: 32,768 slots have 128 chunks, 32,769 have 65."""
    sizes = [align._scratch_ints(tokens * top_k, num_experts) for tokens in range(1, 9000)]
    assert sizes == sorted(sizes)
