"""What runs around the CuTe kernels: one launch gives the bits of alignment, quantisation and zeroing apart."""

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap.kernels.cute.host import prepare as preparing
from rampwrap.kernels.cute.host.prepare import narrow_rows, prepare, sum_rows
from rampwrap.kernels.triton.align.host import align_tokens, alignment_ints, allocate_blocks, blocks_in, fits_one_launch
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.quantise import quantise_rows

needs_kernels = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")


def memory(ids, block_m, experts):
    """Blocks full of what nobody wrote."""
    blocks = allocate_blocks(*ids.shape, experts, block_m, "cpu")
    for tensor in (blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded):
        tensor.fill_(-77)
    return blocks


@needs_kernels
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("hidden", [128, 1280])
@pytest.mark.parametrize("quantises", [True, False])
@pytest.mark.parametrize("zeroes", [True, False])
def test_one_launch_or_two_are_what_three_are(small, hidden, quantises, zeroes, monkeypatch):
    if not small:
        monkeypatch.setattr(preparing, "fits_one_launch", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(5, 6, generator=generator).topk(3).indices.int()
    ids[2, 1] = -1
    expert_map = torch.tensor([0, -1, 1, 2, -1, 3], dtype=torch.int32)
    x = torch.randn(5, hidden, generator=generator).bfloat16()
    expected = align_tokens(ids, 8, 4, expert_map=expert_map, blocks=memory(ids, 8, 4))
    found = memory(ids, 8, 4)
    q, q_expected = (torch.full((5, hidden), 7.0).to(torch.float8_e4m3fn) for _ in range(2))
    scale, scale_expected = torch.full((5, hidden // 128), 7.0), torch.empty(5, hidden // 128)
    quantise_rows(x, q_expected, scale_expected)
    out = torch.full_like(x, torch.nan, dtype=torch.float32)
    prepare(
        x, (q, scale) if quantises else None, out if zeroes else None, ids, 8, 4, expert_map=expert_map, memory=found
    )
    rows = int(expected.num_tokens_post_padded)
    assert int(found.num_tokens_post_padded) == rows and rows > 0
    assert torch.equal(found.sorted_token_ids, expected.sorted_token_ids)
    assert torch.equal(found.expert_ids[: rows // 8], expected.expert_ids[: rows // 8])
    if quantises:
        assert torch.equal(q.view(torch.uint8), q_expected.view(torch.uint8)) and torch.equal(scale, scale_expected)
    else:
        assert (scale == 7).all()
    assert not out.any() if zeroes else out.isnan().all()


@st.composite
def batches(draw):
    """Ids of a batch, padding and ids of nobody among them, on a rank with some of the experts; and a larger batch."""
    experts = draw(st.sampled_from([1, 2, 33, 200, 512]))
    local = draw(st.one_of(st.just(experts), st.integers(1, experts)))
    num_tokens, top_k = draw(st.sampled_from([1, 2, 25, 26, 103, 257])), draw(st.sampled_from([1, 2, 10]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(
        0, experts, (num_tokens, top_k), generator=generator, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )
    if draw(st.booleans()):
        ids[:] = draw(st.integers(0, experts - 1))
    odd = torch.rand(ids.shape, generator=generator)
    ids[odd < 0.1], ids[odd > 0.9] = -1, experts + 3
    if ids.dtype == torch.int64:
        ids[(odd > 0.4) & (odd < 0.45)] = 2**32
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[torch.randperm(experts, generator=generator)[:local]] = torch.arange(local, dtype=torch.int32)
    more = draw(st.sampled_from([0, 1, 700]))
    return ids, None if local == experts else expert_map, local, num_tokens + more


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(batches(), st.sampled_from([8, 56, 144]), st.sampled_from([128, 7168]), st.booleans(), st.booleans())
def test_any_batch_in_the_memory_of_a_larger_one(batch, block_m, hidden, one_launch, widest_first):
    """Blocks as by hand, rows as `quantise_rows`, zeros; nothing is written beyond any of them."""
    ids, expert_map, local, room = batch
    (num_tokens, top_k), num_slots = ids.shape, ids.numel()
    hidden = hidden if num_tokens < 26 else 128
    ints = torch.full((alignment_ints(room, top_k, local, 144),), -77, dtype=torch.int32)
    blocks = blocks_in(ints, num_tokens, top_k, local, block_m)
    x = torch.randn(num_tokens, hidden).bfloat16()
    q, scale = (
        torch.full((num_tokens + 1, hidden), 7.0).to(torch.float8_e4m3fn),
        torch.full((num_tokens + 1, hidden // 128), 7.0),
    )
    zeroed = torch.full((num_tokens + 1, hidden), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        if not one_launch:
            patch.setattr(preparing, "fits_one_launch", lambda *_: False)
        quantised = q[:num_tokens], scale[:num_tokens]
        prepare(
            x,
            quantised,
            zeroed[:num_tokens],
            ids,
            block_m,
            local,
            expert_map=expert_map,
            memory=blocks,
            widest_first=widest_first,
        )
    # By hand.
    known = (ids.long() >= 0) & (ids.long() < (local if expert_map is None else len(expert_map)))
    its = torch.where(known, ids.long(), 0)
    its = torch.where(known, its if expert_map is None else expert_map[its].long(), -1).view(-1)
    rows, experts = [], []
    order = range(local)
    if widest_first and (local <= 128 or (one_launch and fits_one_launch(num_slots, local))):
        order = sorted(order, key=lambda expert: -int((its == expert).sum()))
    for expert in order:
        slots = (its == expert).nonzero().view(-1).tolist()
        count = -(-len(slots) // block_m)
        rows += slots + [num_slots] * (count * block_m - len(slots))
        experts += [expert] * count
    assert int(blocks.num_tokens_post_padded) == len(rows)
    assert blocks.sorted_token_ids.tolist() == rows + [num_slots] * (blocks.sorted_token_ids.numel() - len(rows))
    assert blocks.expert_ids[: len(experts)].tolist() == experts
    assert torch.equal(blocks.expert_counts.long(), torch.bincount(its[its >= 0], minlength=local))
    end = blocks.scratch.storage_offset() + blocks.scratch.numel()
    assert (ints[end:] == -77).all()
    expected, expected_scale = (
        torch.empty(num_tokens, hidden).to(torch.float8_e4m3fn),
        torch.empty(num_tokens, hidden // 128),
    )
    quantise_rows(x, expected, expected_scale)
    assert torch.equal(q[:-1].view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale[:-1], expected_scale)
    assert not zeroed[:-1].any() and zeroed[-1].isnan().all() and (scale[-1] == 7).all() and (q[-1].float() == 7).all()


@needs_kernels
def test_a_given_alignment_is_left_alone():
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    blocks, out = memory(ids, 8, 2), torch.full((1, 128), torch.nan).bfloat16()
    prepare(out.clone(), None, out, ids, 8, 2, expert_map=None, memory=blocks, aligned=True)
    assert (blocks.sorted_token_ids == -77).all() and not out.any()


@needs_kernels
def test_rows_without_an_expert_here_are_not_read():
    ids = torch.tensor([[0, 5], [-1, 9], [1, 0]])
    rows = torch.randn(6, 192).bfloat16()
    rows[1:4] = torch.nan
    out = torch.full((3, 192), torch.nan).bfloat16()
    sum_rows(out, rows, ids, 2, expert_map=None)
    assert torch.equal(out[0], rows[0]) and not out[1].any()
    assert torch.equal(out[2], (rows[4].float() + rows[5].float()).bfloat16())


@needs_kernels
def test_sums_are_rounded_to_nearest():
    sums, out = torch.randn(3, 320), torch.full((3, 320), torch.nan).bfloat16()
    narrow_rows(out, sums)
    assert torch.equal(out, sums.bfloat16())


COMPILE = r"""
import itertools, json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rampwrap.kernels.cute.host import prepare
from rampwrap.kernels.triton.moe import gemm

INTS = {"num_slots", "num_experts", "num_local_experts", "block_m", "capacity", "num_groups", "num_chunks", "pieces", "most_rows"}

def build(kernel, pointers, constants, **options):
    signature, constexprs = {}, {}
    for name in kernel.arg_names:
        signature[name] = "*" + pointers[name] if name in pointers else "i32" if name in INTS else "constexpr"
        if signature[name] == "constexpr":
            constexprs[name] = constants.get(name)
    constexprs["PDL"] = True
    options["launch_pdl"] = True
    built = triton.compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    print(json.dumps({"waits": ptx.count("griddepcontrol.wait"), "starts": ptx.count("griddepcontrol.launch_dependents"),
                      "local": ptx.count("ld.local") + ptx.count("st.local")}))

ids = dict.fromkeys(("topk_ids_ptr", "sorted_token_ids_ptr", "expert_ids_ptr", "num_tokens_post_padded_ptr", "expert_counts_ptr"), "i32")
for quantises, zeroes, chunk in itertools.product((0, 1), (0, 1), (256, 4096)):
    pointers = ids | {"x_ptr": "bf16"} | ({"q_ptr": "fp8e4nv", "scale_ptr": "fp32"} if quantises else {}) | ({"zero_ptr": "fp32"} if zeroes else {})
    constants = {"GROUPS": prepare.GROUPS, "CHUNK": chunk, "BINS": 512, "WIDEST_FIRST": bool(quantises)}
    build(prepare.prepare_kernel, pointers, constants, num_warps=8 if chunk > 1024 else 4)
    if chunk == 256:
        build(prepare.count_and_prepare_kernel, pointers | {"scratch_ptr": "i32"}, constants | {"PIECE": 256})
pointers = {"out_ptr": "bf16", "y_ptr": "bf16", "topk_ids_ptr": "i32"}
build(gemm.sum_kernel, pointers, {"TOP_K": 8, "HIDDEN": 2048, "SPLIT_K": 1, "SPLIT_OF": 0, "BLOCK_H": 1024})
build(prepare.narrow_after_kernel, {"out_ptr": "bf16", "sums_ptr": "fp32"}, {"COLUMNS": 2048, "BLOCK": 1024})
"""


def test_compiles_for_hopper(tmp_path):
    """Compiled, each waits for the launch before it and lets the next one begin."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 14 and all(row == {"waits": 1, "starts": 1, "local": 0} for row in found), found
