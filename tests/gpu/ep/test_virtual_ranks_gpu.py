"""The kernels of several ranks at once on one GPU, each on a stream of its own: ``pytest -m gpu tests/gpu/ep``.

Their memory is of one GPU, so flags and rows go through its L2 and not over a link; all else is as on several: launches that wait
for each other, ranks at any distance, steps that follow each other without the host, and the same steps in a CUDA graph.

One process launches for all ranks. While the launch of one rank waits for another, the host must do nothing that may wait for the
GPU: no loading of a kernel, no allocation, no pageable copy, or the launch that is waited for never comes. So every step is first
run by each rank alone, with flags of its peers that are written by hand (`Rank.alone`).
"""

# ruff: noqa: N803

import pathlib
import random
import runpy
from collections.abc import Callable, Sequence

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import triton.language as tl

from rampwrap.ep.bulk import Bulk
from rampwrap.ep.layout import Layout
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received, sum_in_order
from rampwrap.ep.sent import Sent
from rampwrap.kernels.ep import host
from rampwrap.kernels.triton.interpreter import INTERPRETED, downcast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
HELP = runpy.run_path(str(pathlib.Path(__file__).parent / "on_gpus.py"))
SHAPE, MOST, STEPS, ROUNDS = HELP["SHAPE"], HELP["MOST"], 8, 12
LIMIT_S = 2.0
Batch = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


@triton.jit
def experts_kernel(rows_ptr, ids_ptr, expert_map_ptr, y_ptr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """What stands for the experts of one slot: its row times its id and one; NaN where another rank has the expert."""
    row, slot, column = tl.program_id(0), tl.program_id(1), tl.arange(0, COLUMNS)
    expert = tl.load(ids_ptr + row * TOP_K + slot)
    local = tl.load(expert_map_ptr + expert, mask=expert >= 0, other=-1)
    x = tl.load(rows_ptr + row * COLUMNS + column).to(tl.float32)
    y = tl.where(local >= 0, x * (expert + 1).to(tl.float32), float("nan"))
    tl.store(y_ptr + (row * TOP_K + slot) * COLUMNS + column, downcast(y, tl.bfloat16))


def experts(rows, ids, owners: Owners):
    """The same by torch: bf16 [N, top_k, H]."""
    each = (rows.float()[:, None] * (ids[:, :, None] + 1)).bfloat16()
    return torch.where(owners.is_local(ids)[:, :, None], each, torch.nan)


class Rank:
    """One rank: its memory, its stream, and a step of it that allocates nothing."""

    def __init__(self, mapped: host.Mapped, owners: Owners) -> None:
        self.mapped, self.owners, self.stream = mapped, owners, torch.cuda.Stream()
        rows = mapped.num_ranks * MOST
        self._y = torch.zeros(rows, SHAPE.top_k, SHAPE.hidden_size, dtype=torch.bfloat16, device="cuda")

    def step(self, brought: Batch, counts: Sequence[int], out, masked: bool) -> None:
        host.dispatch(self.mapped, *brought, counts, masked=masked)
        views, rows = self.mapped.views, sum(counts)
        if rows:
            experts_kernel[(rows, SHAPE.top_k)](
                views["rows"], views["topk_ids"], self.mapped.expert_map, self._y, SHAPE.top_k, SHAPE.hidden_size
            )
        host.push(self.mapped, self._y[:rows], counts)
        host.add(self.mapped, out, brought[1], counts)

    def alone(self, counts: Sequence[int], call: Callable[[], None], cells_alone: bool = False) -> None:
        """A step for which all peers seem to have come: it compiles, loads and warms what it launches and waits for nobody.

        Or their cells alone have come, and no sums that are their own flags.
        """
        views = self.mapped.views
        torch.cuda.synchronize()
        epoch = int(views["header"][0]) + 1
        views["cells"].copy_(torch.tensor(counts, device="cuda") + (epoch << 32))
        views["marked"].fill_(-0.0 if cells_alone else 0.0)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            call()
        torch.cuda.synchronize()


def made(num_ranks: int, partials: str, limit_s: float = LIMIT_S) -> list[Rank]:
    return made_with_memory(Layout(SHAPE, num_ranks, MOST, partials=partials), limit_s)[0]


def made_with_memory(layout: Layout, limit_s: float = LIMIT_S) -> tuple[list[Rank], list]:
    num_ranks = layout.num_ranks
    memories = [torch.zeros(layout.bytes, dtype=torch.uint8, device="cuda") for _ in range(num_ranks)]
    placements = [contiguous(SHAPE.num_experts, num_ranks, rank) for rank in range(num_ranks)]
    bases = torch.tensor([its.data_ptr() for its in memories], device="cuda")
    ranks = []
    for rank, memory in enumerate(memories):
        owners, views = Owners.of(placements, rank, "cuda"), layout.views(memory)
        for name in ("rows", "partials"):
            views[name].view(torch.uint8).fill_(0xFF)
        mapped = host.Mapped(
            rank,
            num_ranks,
            bases,
            views,
            {its.name: its.offset for its in layout.regions},
            torch.zeros(1, dtype=torch.int64, pin_memory=True),
            owners.rank_of_expert,
            owners.expert_map,
            limit_s,
        )
        mapped.begin()
        ranks.append(Rank(mapped, owners))
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    return ranks, memories


class Bulked(Rank):
    """A rank whose steps go source by source, or by one launch; the layer of each source takes its time."""

    def __init__(self, rank: Rank, layout: Layout, peers) -> None:
        self.mapped, self.owners, self.stream = rank.mapped, rank.owners, rank.stream
        self._bulk = Bulk(self.mapped, self.owners, layout, peers)
        self.cycles = 0

    def layer(self, received: Received, room=None):
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return received.through(HELP["summed"], torch.bfloat16, {}, room)

    def step(self, brought: Batch, counts: Sequence[int], out, by_source: bool) -> None:
        sent, path = Sent(*brought, None), Path(False, by_source)
        if not by_source:
            host.dispatch(self.mapped, *brought, counts, masked=False)
            its = [self.mapped.views[name][: sum(counts)] for name in ("rows", "topk_ids", "topk_weights")]
            received = Received(its[0], None, *its[1:], tuple(counts), self.owners, path)
            host.push(self.mapped, self.layer(received), counts)
            host.add(self.mapped, out, brought[1], counts)
            return
        for piece in self._bulk.pieces(sent, tuple(counts), path):
            rows = self.layer(piece.received, piece.room) if piece.received.num_tokens else piece.room
            self._bulk.send_home(piece, rows)
        self._bulk.summed(out)


def faults(ranks: Sequence[Rank], where: str) -> str:
    """What the ranks found, each in a sentence; empty where all is well."""
    said = {its.mapped.rank: host.said_by(int(its.mapped.fault), its.mapped.timeout_s) for its in ranks}
    return "\n".join(f"{where}: on rank {rank}: {sentence}" for rank, sentence in said.items() if sentence)


def end_alone(ranks: Sequence[Rank], where: str) -> None:
    """After steps alone: nothing went wrong; sums that nobody awaited at a peer are gone."""
    assert not faults(ranks, where)
    for its in ranks:
        its.mapped.views["marked"].fill_(-0.0)
    torch.cuda.synchronize()


def same(found, wanted, where: str) -> str:
    """Where two tensors differ; empty where they do not."""
    if torch.equal(found, wanted):
        return ""
    rows = (found != wanted).any(1).nonzero().flatten().tolist()
    return f"{where}: rows {rows[:8]} of {len(found)} differ, the first {found[rows[0], :4].tolist()} for {wanted[rows[0], :4].tolist()}"


def expected(brought, ranks: list[Rank], dtype):
    """The output of each rank, by plain torch."""
    rows, ids, weights = (torch.cat([its[place] for its in brought]) for place in range(3))
    parts = []
    for rank in ranks:
        here, y = rank.owners.is_local(ids), experts(rows, ids, rank.owners)
        total = torch.zeros(rows.shape, device="cuda")
        for slot in range(SHAPE.top_k):
            more = total + weights[:, slot, None] * y[:, slot].float()
            total = torch.where(here[:, slot, None], more, total)
        parts.append(total.to(dtype))
    out = sum_in_order(torch.stack(parts), ranks[0].owners.ranks_of(ids)).bfloat16()
    return out.split([len(its[0]) for its in brought])


def drawn(counts: Sequence[int], kind: str, seed: int) -> list[Batch]:
    return [HELP["batch"](count, kind, seed + rank, "cuda") for rank, count in enumerate(counts)]


@pytest.mark.parametrize("num_ranks", [2, 4], ids=["two", "four"])
@pytest.mark.parametrize(("partials", "masked", "few"), [("bf16", False, MOST), ("fp32", True, 8)])
def test_steps_of_all_ranks(num_ranks: int, partials: str, masked: bool, few: int) -> None:
    """Eager steps with any counts, then a captured one with other routing at each replay, for each rank on its stream; sums of few tokens
    are their own flags."""
    with HELP["room_for"](few, num_ranks, 4 if partials == "fp32" else 2):
        ranks, rng = made(num_ranks, partials), random.Random(num_ranks)
    dtype = ranks[0].mapped.views["partials"].dtype
    captured = [8] * num_ranks
    brought = drawn(captured, "spread", 0)
    outs = [torch.empty_like(its[0]) for its in brought]
    # Both ways of a combine: what compiled in the middle of a step would be waited for.
    for counts, full in ((captured, brought), ([MOST] * num_ranks, drawn([MOST] * num_ranks, "spread", 0))):
        for rank, its in zip(ranks, full, strict=True):
            out = torch.empty_like(its[0])
            rank.alone(counts, lambda rank=rank, its=its, out=out, counts=counts: rank.step(its, counts, out, masked))
        end_alone(ranks, "alone")

    for number in range(ROUNDS):
        plans = []
        for step in range(STEPS):
            counts = [rng.choice((0, 1, 8, rng.randrange(MOST + 1))) for _ in range(num_ranks)]
            fresh = drawn(counts, rng.choice(HELP["KINDS"]), 1000 * number + 10 * step)
            plans.append((fresh, counts, [torch.empty_like(its[0]) for its in fresh]))
        torch.cuda.synchronize()
        for place, rank in enumerate(ranks):
            with torch.cuda.stream(rank.stream):
                for fresh, counts, results in plans:
                    if rng.random() < 0.3:
                        torch.cuda._sleep(rng.randrange(500_000))
                    rank.step(fresh[place], counts, results[place], masked)
        torch.cuda.synchronize()
        found = faults(ranks, f"eager round {number}, steps of {[counts for _, counts, _ in plans]} tokens")
        assert not found, found
        for step, (fresh, counts, results) in enumerate(plans):
            for rank, (result, wanted) in enumerate(zip(results, expected(fresh, ranks, dtype), strict=True)):
                where = f"eager round {number}, step {step} of {counts} tokens, rank {rank}"
                assert not (text := same(result, wanted, where)), text

    graphs = []
    for rank, its, out in zip(ranks, brought, outs, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream):
            rank.step(its, captured, out, masked)
        graphs.append(graph)
    for rank, graph in zip(ranks, graphs, strict=True):
        rank.alone(captured, graph.replay)
    end_alone(ranks, "graphs alone")
    for number in range(50):
        fresh = drawn(captured, HELP["KINDS"][number % 5], 77 + number)
        for mine, its in zip(brought, fresh, strict=True):
            for tensor, other in zip(mine, its, strict=True):
                tensor.copy_(other)
        torch.cuda.synchronize()
        for place in rng.sample(range(num_ranks), num_ranks):
            with torch.cuda.stream(ranks[place].stream):
                graphs[place].replay()
        torch.cuda.synchronize()
        found = faults(ranks, f"replay {number}")
        assert not found, found
        for rank, (out, wanted) in enumerate(zip(outs, expected(fresh, ranks, dtype), strict=True)):
            assert not (text := same(out, wanted, f"replay {number}, rank {rank}")), text


@pytest.mark.parametrize(
    ("counts", "others"), [([48, 48], [3, 1]), ([40, 0, 7, 48], [3, 3, 48, 3])], ids=["two", "four"]
)
def test_steps_by_source_of_all_ranks(counts: list[int], others: list[int]) -> None:
    """By source, then by one launch with other counts, so that rows lie elsewhere, then in a CUDA graph by source, and by source with
    the other counts. Nothing is between them but ranks of which one is slow, another one each time. Each kind was run alone before, so
    that no memory is missing.
    """
    layout = Layout(SHAPE, len(counts), MOST)
    made_ranks, memories = made_with_memory(layout)
    ranks = [Bulked(its, layout, memories) for its in made_ranks]
    kinds = [(counts, True), (others, False), (others, True)]

    def planned(number: int) -> list:
        plans = []
        for at, (each, by_source) in enumerate(kinds):
            fresh = drawn(each, HELP["KINDS"][(number + at) % 5], 500 * number + 50 * at)
            plans.append((fresh, each, by_source, [torch.empty_like(its[0]) for its in fresh]))
        return plans

    def wanted(brought: list[Batch], each: list[int]) -> list:
        rows, ids, weights = (torch.cat([its[place] for its in brought]) for place in range(3))
        given = {"hidden_states": rows, "topk_ids": ids, "topk_weights": weights}
        parts = [HELP["summed"](expert_map=rank.owners.expert_map, **given) for rank in ranks]
        return sum_in_order(torch.stack(parts), ranks[0].owners.ranks_of(ids)).bfloat16().split(each)

    def compare(brought: list[Batch], each: list[int], results: list, where: str) -> None:
        for rank, (result, its) in enumerate(zip(results, wanted(brought, each), strict=True)):
            assert not (text := same(result, its, f"{where}, rank {rank}")), text

    first = planned(0)
    for brought, each, by_source, outs in first * 2:
        for rank, its, out in zip(ranks, brought, outs, strict=True):
            rank.alone(each, lambda rank=rank, b=its, e=each, o=out, s=by_source: rank.step(b, e, o, s))
    end_alone(ranks, "alone")
    kept, _, _, outs = first[0]
    graphs = []
    for place, rank in enumerate(ranks):
        rank.cycles = 400_000 * (place == len(ranks) - 1)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=rank.stream):
            rank.step(kept[place], counts, outs[place], True)
    for rank, graph in zip(ranks, graphs, strict=True):
        rank.alone(counts, graph.replay)
    end_alone(ranks, "graphs alone")

    for number in range(1, ROUNDS):
        plans = planned(number)
        for mine, its in zip(kept, plans[0][0], strict=True):
            for tensor, other in zip(mine, its, strict=True):
                tensor.copy_(other)
        torch.cuda.synchronize()
        for place, rank in enumerate(ranks):
            rank.cycles = 400_000 * (place == number % len(ranks))
            with torch.cuda.stream(rank.stream):
                for at, (brought, each, by_source, results) in enumerate(plans):
                    if at == 2:
                        graphs[place].replay()
                    rank.step(brought[place], each, results[place], by_source)
        torch.cuda.synchronize()
        found = faults(ranks, f"round {number}")
        assert not found, found
        for at, (brought, each, _, results) in enumerate(plans):
            compare(brought, each, results, f"round {number}, step {at}")
        compare(kept, counts, outs, f"round {number}, replayed")


@pytest.mark.parametrize("few", [MOST, 0], ids=["own flags", "cells"])
def test_a_rank_that_does_not_come(few: int) -> None:
    """A launch that waits ends after the limit and says for whom it waited, in which phase of which step."""
    with HELP["room_for"](few, 2, 2):
        ranks = made(2, "bf16", limit_s=0.25)
    counts = [2, 3]
    brought = drawn(counts, "spread", 1)
    out = torch.empty_like(brought[0][0])
    ranks[0].alone(counts, lambda: ranks[0].step(brought[0], counts, out, False))
    end_alone(ranks, "alone")
    ranks[0].step(brought[0], counts, out, False)
    torch.cuda.synchronize()
    assert faults(ranks, "late") == (
        "late: on rank 0: rank 1 did not arrive at dispatch of step 2 within 0.25 s; see what became of it, then call "
        "reset() on every rank."
    )


def test_sums_that_do_not_arrive() -> None:
    """Where all cells are there, and sums are their own flags: whose sums are missing is said, in which step."""
    ranks, counts = made(2, "bf16", limit_s=0.25), [2, 3]
    brought = drawn(counts, "spread", 1)
    out = torch.empty_like(brought[0][0])
    for cells_alone in (False, True):
        ranks[0].alone(counts, lambda: ranks[0].step(brought[0], counts, out, False), cells_alone)
        if not cells_alone:
            end_alone(ranks, "alone")
    assert faults(ranks, "lost").startswith(
        "lost: on rank 0: rank 1 did not arrive at combine of step 2 within 0.25 s; see what became of it"
    )
