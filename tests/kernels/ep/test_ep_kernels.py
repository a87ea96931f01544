"""Dispatch and combine kernels in the interpreter: several tensors of one process are the memory of several ranks.

Launches follow each other, so nothing waits: all ranks send, then all wait. Index arithmetic shows here, ordering does not
(`tests/ep/test_protocol.py`); what they compile to for sm_90 does too.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import attrs
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import rampwrap
from rampwrap.ep.layout import CELLS, Layout
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.received import prefix, sum_in_order
from rampwrap.ep.symmetric import RECEIVED
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.ep import host, routing
from rampwrap.kernels.ep.flags import COMBINE, EPOCH
from rampwrap.kernels.triton.interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="without the interpreter these kernels need several GPUs")
SHAPE = MoEShape(12, 3, 256, 128)


def made(layout: Layout, placements: list[Placement], timeout_s: float = 1.0) -> list[host.Mapped]:
    """The ranks, their memory full of what nobody may read: NaN in every float type and no id of an expert."""
    memories = [torch.full((layout.bytes,), 0x7F, dtype=torch.uint8) for _ in placements]
    bases = torch.tensor([its.data_ptr() for its in memories])
    ranks = []
    for rank, memory in enumerate(memories):
        owners = Owners.of(placements, rank, "cpu")
        views = layout.views(memory)
        views["rows"].view(torch.uint8).fill_(0xFF)  # NaN in bf16 and in e4m3
        views["partials"].view(torch.uint8).fill_(0xFF)
        ranks.append(
            host.Mapped(
                rank,
                len(placements),
                bases,
                views,
                {its.name: its.offset for its in layout.regions},
                torch.zeros(1, dtype=torch.int64),
                owners.rank_of_expert,
                owners.expert_map,
                timeout_s,
            )
        )
        ranks[-1].begin()
    return ranks


def drawn(counts: list[int], seed: int, ids_dtype: torch.dtype = torch.int64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    brought = []
    for count in counts:
        ids = torch.randint(-2, SHAPE.num_experts + 1, (count, SHAPE.top_k), generator=generator)
        if ids_dtype == torch.int64 and count:
            ids[0, 0] = 1 << 32  # not expert 0
        brought.append(
            {
                "x": torch.randn(count, SHAPE.hidden_size, generator=generator).bfloat16(),
                "topk_ids": ids.to(ids_dtype),
                "topk_weights": torch.rand(count, SHAPE.top_k, generator=generator),
            }
        )
    return brought


def sent(ranks: list[host.Mapped], brought, counts, **its) -> None:
    """A dispatch of all ranks."""
    for sends in (True, False):
        for rank, what in zip(ranks, brought, strict=True):
            host.dispatch(rank, **what, tokens_per_rank=counts, sends=sends, waits=not sends, **its)


PLACEMENTS = {
    1: [contiguous(12, 1, 0)],
    2: [contiguous(12, 2, rank) for rank in range(2)],
    3: [Placement(12, np.array(its)) for its in ([11, 0], [5], [3, 4, 1, 2, 10, 9, 8, 7, 6])],
    4: [contiguous(12, 4, rank) for rank in range(4)],
}
UNEVEN = [Placement(12, np.arange(5)), Placement(12, np.arange(5, 12))]
CASES = [
    (1, [3], "bf16", False),
    (2, [3, 2], "bf16", False),
    (2, [0, 4], "fp8", True),
    (3, [2, 0, 5], "fp8", False),
    (4, [1, 6, 0, 2], "bf16", True),
]


def without_sums(ranks: list[host.Mapped]) -> bool:
    """Whether all places of sums that are their own flags are marked."""
    return all(bool((its.views["marked"].float().view(torch.int32) == -(1 << 31)).all()) for its in ranks)


@pytest.mark.parametrize(
    ("by_slot", "marked"), [(False, True), (True, False)], ids=["summed, own flags", "by slot, cells"]
)
@pytest.mark.parametrize(("num_ranks", "counts", "payload", "masked"), CASES)
def test_rows_and_sums(
    num_ranks: int,
    counts: list[int],
    payload: str,
    masked: bool,
    by_slot: bool,
    marked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps: rows and ids where they belong, the sums of the right ranks, and nothing elsewhere; by both ways of a combine."""
    layout = Layout(SHAPE, num_ranks, 6, payload=payload, partials="fp32" if by_slot else "bf16")
    if not marked:
        monkeypatch.setattr("rampwrap.ep.layout.CELLS", 2)  # CTAs, which take several tokens each
    ranks = made(layout, PLACEMENTS[num_ranks])
    assert {its.marks(counts) for its in ranks} == {marked}
    for step in range(2):
        brought = drawn(counts, 10 * num_ranks + step, (torch.int64, torch.int32)[step])
        sent(ranks, brought, counts, masked=masked)
        ids, weights, rows = (torch.cat([its[name] for its in brought]) for name in ("topk_ids", "topk_weights", "x"))
        for rank, its in enumerate(ranks):
            owners = Owners.of(PLACEMENTS[num_ranks], rank, "cpu")
            read = owners.is_local(ids).any(1)
            seen = {name: view[: sum(counts)] for name, view in its.views.items() if name in RECEIVED}
            assert torch.equal(seen["topk_ids"], torch.where(ids < (1 << 31) - 1, ids, -1).clamp(min=-1).int())
            assert torch.equal(seen["topk_weights"], weights)
            if payload == "fp8":
                q, scales = reference.quantise(rows)
                assert torch.equal(seen["rows"].view(torch.uint8)[read], q.view(torch.uint8)[read])
                assert torch.equal(seen["scales"][read], scales[read])
            else:
                assert torch.equal(seen["rows"][read], rows[read])
            untouched = seen["rows"].view(torch.uint8)[~read]
            assert not masked or bool((untouched == 0xFF).all()) or step
            beyond = its.views["rows"].view(torch.uint8)[sum(counts) :]
            assert bool((beyond == 0xFF).all())

        outputs, sums = [], []
        for rank in range(num_ranks):
            owners = Owners.of(PLACEMENTS[num_ranks], rank, "cpu")
            here = owners.is_local(ids)
            y = torch.full((*ids.shape, SHAPE.hidden_size), torch.nan)
            generator = torch.Generator().manual_seed(rank)
            y[here] = torch.randn(int(here.sum()), SHAPE.hidden_size, generator=generator)
            y = y.bfloat16()
            total = torch.zeros(rows.shape)
            for slot in range(SHAPE.top_k):
                more = total + weights[:, slot, None] * y[:, slot].float()
                total = torch.where(here[:, slot, None], more, total)
            total[~here.any(1)] = torch.nan
            sums.append(total.to(layout.partial_dtype))
            outputs.append(y if by_slot else sums[-1])
        for rank, y in zip(ranks, outputs, strict=True):
            host.push(rank, y, counts)
        first = prefix(tuple(counts))
        for rank, its in enumerate(ranks):
            out = torch.full((counts[rank], SHAPE.hidden_size), torch.nan, dtype=torch.bfloat16)
            host.add(its, out, brought[rank]["topk_ids"], counts)
            own = slice(first[rank], first[rank + 1])
            owned = Owners.of(PLACEMENTS[num_ranks], rank, "cpu").ranks_of(brought[rank]["topk_ids"])
            wanted = sum_in_order(torch.stack([part[own] for part in sums]), owned).bfloat16()
            assert torch.equal(out, wanted)
            assert int(its.fault) == 0 and int(its.views["header"][EPOCH]) == step + 1
        assert without_sums(ranks)


def stepped(ranks: list[host.Mapped], counts: list[int], outputs: list[torch.Tensor], dtype: torch.dtype) -> list:
    """Sums of a step in which every rank has an expert of every token, from what each pushes."""
    brought = [
        its | {"topk_ids": torch.tensor([[0, 5, 11]] * len(its["x"]))[:, : SHAPE.top_k]} for its in drawn(counts, 3)
    ]
    sent(ranks, brought, counts, masked=False)
    for rank, y in zip(ranks, outputs, strict=True):
        host.push(rank, y, counts)
    outs = [torch.full((count, SHAPE.hidden_size), 7.0, dtype=dtype) for count in counts]
    for rank, out, its in zip(ranks, outs, brought, strict=True):
        host.add(rank, out, its["topk_ids"], counts)
    return outs


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("partials", ["bf16", "fp32"])
def test_any_bits_travel_as_sums(partials: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-0.0 among them, which says elsewhere that no sum is there; alone, in pairs and in whole rows. The bits are those of the other way."""
    counts, found = [2, 3], []
    generator = torch.Generator().manual_seed(1)
    wide = partials == "fp32"
    bits = torch.randint(-(1 << 31), 1 << 31, (2, 5, SHAPE.hidden_size // (1 if wide else 2)), generator=generator)
    outputs = bits.int().view(torch.float32 if wide else torch.bfloat16)
    outputs[:, 0] = -0.0
    outputs[0, 3, ::2] = -0.0
    outputs[1, 4, :9] = -0.0
    for room in (1 << 22, 0):
        monkeypatch.setattr("rampwrap.ep.layout.MARKED_BYTES", room)
        ranks = made(Layout(SHAPE, 2, 4, partials=partials), UNEVEN)
        assert ranks[0].marks(counts) == bool(room)
        found.append(torch.cat([out for _ in range(2) for out in stepped(ranks, counts, [*outputs], torch.bfloat16)]))
        assert without_sums(ranks) and not any(int(its.fault) for its in ranks)
    assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))


def test_sums_that_do_not_arrive() -> None:
    """Where the cells are there all the same: their rank is named."""
    ranks, counts = made(Layout(SHAPE, 2, 4), PLACEMENTS[2]), [1, 2]
    brought = drawn(counts, 9)
    for its in brought:
        its["topk_ids"] = torch.tensor([[0, 7, -1]] * len(its["x"]))
    sent(ranks, brought, counts, masked=False)
    for rank in ranks:
        host.push(rank, torch.ones(3, 256).bfloat16(), counts)
    ranks[1].views["marked"][0, 1, 8:10] = -0.0
    for rank, its in zip(ranks, brought, strict=True):
        host.add(rank, torch.empty(its["x"].shape), its["topk_ids"], counts)
    assert int(ranks[0].fault) == 0
    assert str(host.said_by(int(ranks[1].fault), 1.0)).startswith("rank 0 did not arrive at combine of step 1")


@pytest.mark.parametrize("room", [0, 1 << 22], ids=["cells", "own flags"])
def test_a_late_rank_adds_the_sums_of_its_own_step(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has told its sums and not yet added those of others, when a rank that is a step ahead gives it up: nothing of that step may lie there."""
    monkeypatch.setattr("rampwrap.ep.layout.MARKED_BYTES", room)
    ranks, counts = made(Layout(SHAPE, 2, 4), PLACEMENTS[2]), [1, 2]
    brought = drawn(counts, 9)
    for its in brought:
        its["topk_ids"] = torch.tensor([[0, 7, -1]] * len(its["x"]))
    sent(ranks, brought, counts, masked=False)
    for rank in ranks:
        host.push(rank, torch.ones(3, 256).bfloat16(), counts)
    host.add(ranks[0], torch.empty(1, 256), brought[0]["topk_ids"], counts)
    host.dispatch(ranks[0], **brought[0], tokens_per_rank=counts, masked=False)
    assert str(host.said_by(int(ranks[0].fault), 1.0)).startswith("rank 1 did not arrive at dispatch of step 2")
    host.push(ranks[0], torch.full((3, 256), 100.0).bfloat16(), counts)
    out = torch.empty(2, 256)
    host.add(ranks[1], out, brought[1]["topk_ids"], counts)
    assert int(ranks[1].fault) == 0 and out.unique().tolist() == [2.0]


def test_e4m3_rows_with_scales_are_copied() -> None:
    ranks, counts = made(Layout(SHAPE, 2, 4, payload="fp8"), PLACEMENTS[2]), [3, 1]
    brought = drawn(counts, 4)
    given = []
    for its in brought:
        rows, scales = reference.quantise(its["x"])
        given.append(its | {"x": rows, "scales": scales})
    sent(ranks, given, counts, masked=False)
    rows, scales = reference.quantise(torch.cat([its["x"] for its in brought]))
    for its in ranks:
        assert torch.equal(its.views["rows"][:4].view(torch.uint8), rows.view(torch.uint8))
        assert torch.equal(its.views["scales"][:4], scales)


@pytest.mark.parametrize("room", [0, 1 << 22], ids=["cells", "own flags"])
def test_a_rank_that_does_not_come(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named once, with its phase; later waits do not wait, and what the host reads stays the first fault."""
    monkeypatch.setattr("rampwrap.ep.layout.MARKED_BYTES", room)
    ranks, counts = made(Layout(SHAPE, 3, 4), PLACEMENTS[3], timeout_s=2.5), [1, 2, 1]
    brought = drawn(counts, 5)
    for sends in (True, False):
        for rank in (0, 2):
            host.dispatch(
                ranks[rank],
                **brought[rank],
                tokens_per_rank=counts,
                masked=False,
                sends=sends,
                waits=not sends,
            )
    for rank in (0, 2):
        host.push(ranks[rank], torch.zeros(4, 256), counts)
        host.add(ranks[rank], torch.empty(1, 256), brought[rank]["topk_ids"], counts)
    assert host.said_by(int(ranks[0].fault), 2.5) == (
        "rank 1 did not arrive at dispatch of step 1 within 2.5 s; see what became of it, then call reset() on every rank."
    )
    assert host.said_by(int(ranks[2].fault), 2.5) == host.said_by(int(ranks[0].fault), 2.5)
    assert host.said_by(int(ranks[1].fault), 2.5) is None
    # It comes, and finds all there but sums, which others made without its rows: it misses them, and their next steps.
    for sends in (True, False):
        its = {"tokens_per_rank": counts, "masked": False, "sends": sends, "waits": not sends}
        host.dispatch(ranks[1], **brought[1], **its)
    assert host.said_by(int(ranks[1].fault), 2.5) is None
    host.push(ranks[1], torch.zeros(4, 256), counts)
    host.add(ranks[1], torch.empty(2, 256), brought[1]["topk_ids"], counts)
    assert str(host.said_by(int(ranks[1].fault), 2.5)).startswith("ranks 0, 2 did not arrive at combine of step 1")
    # Nor do they store anything: a rank may be a step behind them.
    names = ("cells", "routing", "rows", "topk_ids", "topk_weights", "marked", "partials")
    before = [{name: its.views[name].view(torch.uint8).clone() for name in names} for its in ranks]
    for rank, masked in ((0, False), (2, True)):
        its = drawn([2], 6)[0]
        host.dispatch(ranks[rank], **its, tokens_per_rank=[2, 2, 2], masked=masked)
        host.push(ranks[rank], torch.ones(6, 256), [2, 2, 2])
        routing.tell(ranks[rank], COMBINE, counts[rank])()
    for its, was in zip(ranks, before, strict=True):
        assert all(torch.equal(its.views[name].view(torch.uint8), was[name]) for name in names)
    assert "ranks 0, 2 did not arrive at combine of step 17 within 1 s; see what became of them" in str(
        host.said_by(17 << 32 | 1 << 16 | 2 << 8 | 5, 1.0)
    )


def test_ranks_that_count_differently() -> None:
    ranks = made(Layout(SHAPE, 2, 4), PLACEMENTS[2])
    brought = drawn([2, 2], 6)
    for sends in (True, False):
        for rank, counts in ((0, [2, 2]), (1, [3, 2])):
            host.dispatch(
                ranks[rank],
                **brought[rank],
                tokens_per_rank=counts,
                masked=False,
                sends=sends,
                waits=not sends,
            )
    assert int(ranks[0].fault) == 0
    assert host.said_by(int(ranks[1].fault), 1.0) == (
        "rank 0 came to dispatch of step 1 with other tokens_per_rank than this rank has; give all ranks the same, then call "
        "reset() on every rank."
    )


def test_a_rank_that_does_not_come_after_the_last_epoch() -> None:
    """Cells that nobody wrote are 0, which no step has for a number: the one after 2**31 - 1 is 1."""
    its, brought = made(Layout(SHAPE, 2, 4), PLACEMENTS[2])[0], drawn([1], 7)[0]
    its.views["header"][EPOCH] = (1 << 31) - 1
    host.dispatch(its, **brought, tokens_per_rank=[1, 0], masked=False)
    assert str(host.said_by(int(its.fault), 1.0)).startswith("rank 1 did not arrive at dispatch of step 1 within 1 s")


@pytest.mark.parametrize("kernel", ["dispatch", "gather"])
def test_all_ranks_launch_as_many_ctas(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rank of most tokens needs, so that each CTA waits for its namesakes alone (`tests/ep/test_protocol.py`)."""
    ranks, counts = made(Layout(SHAPE, 4, 500), PLACEMENTS[4]), [1, 500, 0, 3]
    grids: list[tuple[int, int]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(host, f"{kernel}_kernel", Recorded())
    for rank, its in zip(ranks, drawn(counts, 8), strict=True):
        if kernel == "dispatch":
            host.dispatch(rank, **its, tokens_per_rank=counts, masked=False)
        else:
            host.gather(rank, [its["x"].view(torch.int32)], [0], counts)
    assert grids == [(CELLS, 1)] * 4


def test_what_is_pushed_is_apart_from_the_sums() -> None:
    """The second launch of a combine writes while the first may read, ranks that have their sums send rows: a copy is pushed where memory is shared."""
    memory = torch.randn(6, 256)
    for y, out, copied in (
        (memory, memory[2:4], True),
        (memory[:3], memory[2:4], True),
        (memory[:2], memory[2:4], False),
        (memory[4:], memory[2:4], False),
        (memory[:0], memory, False),
        (memory, memory[:0], False),
        (memory[:, :128].t(), memory[5:], True),
        (memory, torch.empty(6, 256), False),
    ):
        found = host.apart(y, memory[:0], out)
        assert torch.equal(found, y) and found.is_contiguous() and (found.data_ptr() != y.data_ptr()) == copied


def test_more_ranks_than_arguments() -> None:
    its = made(Layout(SHAPE, 1, 4), PLACEMENTS[1])[0]
    with pytest.raises(ValueError, match="9 ranks share memory; up to 8 of one host do"):
        attrs.evolve(its, num_ranks=9)


COMPILE = r"""
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rampwrap.kernels.ep import bulk, combine, dispatch, gather, host, marked
from rampwrap.kernels.triton import interpreter
import triton.language as tl

LONG = {"bases_ptr", "cells_ptr", "header_ptr", "fault_ptr"}
REAL = {"topk_weights_ptr": "fp32", "scales_ptr": "fp32", "x_scales_ptr": "fp32", "y_ptr": "bf16", "out_ptr": "bf16", "partials_ptr": "bf16"} | {"marked_ptr": "i32"}

def build(name, kernel, constants, absent=(), x="i32", ids="i32", **options):
    signature, constexprs, attrs = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument.isupper() or argument in absent:
            signature[argument] = "constexpr"
            constexprs[argument] = constants.get(argument)
        elif argument.endswith("_ptr"):
            kind = "i64" if argument in LONG else x if argument == "x_ptr" else ids if argument == "topk_ids_ptr" else REAL.get(argument, "i32")
            signature[argument] = "*" + kind
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i64" if argument == "limit_ns" or argument.startswith("at_") else "i32"
    options = {"enable_fp_fusion": False, "launch_pdl": "PDL" in kernel.arg_names} | options
    built = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"][built.asm["ptx"].index(".entry"):]
    print(json.dumps(dict(name=name, shared=built.metadata.shared, ptx=[line.split("//")[0].strip() for line in ptx.splitlines()],
        spills=len(re.findall(r"\b(STL|LDL)\b", built.asm["sass"])),
        sass=[line.split(";")[0].split("\t")[-1].strip() for line in built.asm["sass"].splitlines()])))

ranks = 4
shared = dict(RANKS=ranks, LANES=ranks, TOP_K=8, SLOTS=8, COLUMNS=7168, PDL=True, CELLS_AT=512, MOST=384, MAX_TOKENS=128)
send = shared | dict(ROW_BYTES=14336, QUANTISES=False, MASKED=True, SENDS=True, WAITS=True, IDS_AT=1024, WEIGHTS_AT=9216, PUSH_AT=1 << 22, ROWS_AT=17408, SCALES_AT=1 << 33,
    BLOCK=4096, GROUPS=64)
build("dispatch", dispatch.dispatch_kernel, send, ("x_scales_ptr",), num_warps=8)
quantises = send | dict(QUANTISES=True, ROW_BYTES=7168)
build("dispatch quantises", dispatch.dispatch_kernel, quantises, ("x_scales_ptr",), x="bf16", ids="i64", num_warps=8)
build("dispatch scales", dispatch.dispatch_kernel, send | dict(ROW_BYTES=7168), num_warps=8)
push = shared | dict(PARTIAL=tl.bfloat16, PARTIAL_BYTES=2, SUMS_AT=1 << 20, ROOM=128, MARKED=False, BLOCK=8192, EVERY=False)
build("push", combine.push_kernel, push | dict(BY_SLOT=True), num_warps=8)
added = push | dict(BLOCK=2048, BY_SOURCE=False)
build("sum", combine.sum_kernel, added, num_warps=8, maxnreg=64)
build("sum by source", combine.sum_kernel, added | dict(BY_SOURCE=True), num_warps=8, maxnreg=64)
every = push | dict(EVERY=True, TOP_K=1, SLOTS=1, BY_SLOT=False)
build("push every", combine.push_kernel, every, ("routing_ptr",), num_warps=8)
build("push marked", combine.push_kernel, push | dict(BY_SLOT=False, MARKED=True), num_warps=8)
build("push marked by slot", combine.push_kernel, push | dict(BY_SLOT=True, MARKED=True), num_warps=8)
build("push marked, 64 columns", combine.push_kernel, push | dict(BY_SLOT=False, MARKED=True, COLUMNS=64) | host._row_at_once(64), num_warps=host._row_at_once(64)["num_warps"])
takes = added | dict(BLOCK=1024, EAGER=False)
build("take", marked.take_kernel, takes, num_warps=8)
build("take eagerly in float32", marked.take_kernel, takes | dict(PARTIAL=tl.float32, EAGER=True, RANKS=8, LANES=8), num_warps=8)
build("take every", marked.take_kernel, every | takes | dict(EVERY=True, TOP_K=1, SLOTS=1), ("routing_ptr",), num_warps=8)
build("sum every", combine.sum_kernel, every | added | dict(EVERY=True, TOP_K=1, SLOTS=1), ("topk_ids_ptr", "rank_of_expert_ptr"), num_warps=8, maxnreg=64)
rows = dict(WORDS_0=3584, WORDS_1=8, WORDS_2=8, WORDS_3=56, WORDS_4=0, AT_0=1024, AT_1=1 << 24, AT_2=1 << 25, AT_3=1 << 26, AT_4=0)
build("tell", bulk.tell_kernel, dict(RANKS=1, CELLS_AT=512), num_warps=1)
build("tell all", bulk.tell_kernel, dict(RANKS=ranks, CELLS_AT=512), num_warps=1)
build("end", bulk.end_kernel, {}, num_warps=1)
build("wait", bulk.wait_kernel, dict(PHASE=1, RANKS=ranks, LANES=ranks), num_warps=1)
build("routing", bulk.routing_kernel, dict(RANKS=ranks, TOP_K=8, SCALES=56, IDS_AT=256, WEIGHTS_AT=512, SCALES_AT=1024, BLOCK=1024), num_warps=4)
build("gather", gather.gather_kernel, shared | rows | dict(SENDS=True, WAITS=True), ("field_4_ptr",), num_warps=8, maxnreg=64)
"""


def compiled(folder: pathlib.Path) -> dict[str, dict]:
    """Every kernel for sm_90, without a GPU, by name."""
    root = str(pathlib.Path(rampwrap.__file__).parent.parent)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {its["name"]: its for its in found}


FLAGS = ("tell", "tell all", "wait", "end", "routing")
"Kernels that move no rows."
TAKES = ("take", "take eagerly in float32", "take every")
LATE = ("sum", "sum every", *TAKES)
"Those that wait for the launch before at their end."


def places(ptx: list[str], pattern: str) -> list[int]:
    return [number for number, line in enumerate(ptx) if re.search(pattern, line)]


def stores_in_wide_pieces(kernels: dict[str, dict]) -> None:
    """16 bytes a thread, 8 of quantised ones, through addresses that are read from memory: only a hint tells their alignment."""
    for name, its in kernels.items():
        wide = places(its["ptx"], r"st\.global\.v4\.b32|st\.global\.v2\.b64")
        ranks = 4
        if name in ("dispatch", "dispatch scales", "gather"):
            assert len(wide) >= ranks, name
        elif "quantises" in name:
            assert len(places(its["ptx"], r"st\.global\.v2\.b32|st\.global\.b64|st\.global\.v4\.b32")) >= ranks, name
        elif name not in FLAGS and "64 columns" not in name:
            assert wide, name
        # Half of a word is no mark: who reads sums that are their own flags would take it for one.
        assert "marked" not in name or not places(its["ptx"], r"st\.global\.b16"), name


def test_what_is_compiled_orders_memory_as_the_protocol_must(tmp_path: pathlib.Path) -> None:
    """In each kernel: stores, a barrier, cells with release, system-wide, and no other fence; and polls with acquire, then a barrier."""
    kernels = compiled(tmp_path)
    stores_in_wide_pieces(kernels)
    for name, its in kernels.items():
        ptx, told, waits = (
            its["ptx"],
            not name.startswith(("sum", "take", "wait", "end", "routing")),
            not name.startswith(("push", "tell", "end", "routing")),
        )
        assert its["spills"] == 0, name
        begins, memory = places(ptx, r"griddepcontrol\.wait"), places(ptx, r"\b(?:ld|st|atom)\.\w*\.*global")
        assert len(begins) == len(places(ptx, r"griddepcontrol\.launch_dependents")) == (name not in FLAGS)
        if begins and name in LATE:
            assert begins[0] > memory[-1], name
        elif begins:
            assert begins[0] < memory[0], name
        barriers = places(ptx, r"bar\.sync|barrier\.sync")
        covers = "marked" not in name  # else sums are their own flags
        cells = places(ptx, rf"st\.{'release' if covers else 'relaxed'}\.sys\.global\.b64")
        polls = places(ptx, r"ld\.acquire\.sys\.global\.b64")
        assert len(cells) == told and len(polls) == waits, name
        assert not places(ptx, r"\batom\.(?!cas\.relaxed)|\bred\.|\bfence|\bmembar"), name
        fences = [line for line in its["sass"] if "MEMBAR" in line]
        assert len(fences) == (told and covers) and all("SYS" in line for line in fences), (name, fences)
        if told and name not in FLAGS:
            wide = [place for place in places(ptx, r"st\.global\.v|st\.global\.b32") if place < cells[0]]
            assert wide and any(wide[-1] < barrier < cells[0] for barrier in barriers), name
        if waits:
            assert len(places(ptx, "globaltimer")) == 1 + (name in TAKES) and any(
                barrier > polls[0] for barrier in barriers
            ), name
            assert not told or cells[0] < polls[0], name
            voted = places(ptx, r"vote\.sync\.any")
            assert len(voted) == 2 and voted[0] > polls[0], name
        if name.startswith(("sum", "take")):  # the loads of all ranks, then the first sum
            loads = [at for at, line in enumerate(its["sass"]) if "LDG.E.128" in line]
            sums = [at for at, line in enumerate(its["sass"]) if re.search(r"\bFADD\b", line)]
            assert len(loads) == (8 if "float32" in name else 4) and loads[-1] < sums[0], name
            assert name not in TAKES or all("STRONG.SYS" in its["sass"][at] for at in loads), name
        if "marked" in name:  # 0.0 is added to each sum, which makes one of -0.0
            added = [line for line in its["sass"] if "ADD2.BF16" in line or "FMA2.MMA.BF16" in line]
            assert len(added) == (1 if "64 columns" in name else 16), name
        assert not places(ptx, r"multimem|multicast"), name
