"""Steps by source in the interpreter: tensors of one process are the memory of several ranks, whose launches follow each other.

Nothing waits there, so all ranks send before any of them waits; sending again changes nothing.
"""

import pathlib
import runpy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")
from rampwrap.ep.bulk import Bulk
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.layout import Layout
from rampwrap.ep.mover import first_row, groups, in_order_of_arrival
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received, sum_in_order
from rampwrap.ep.sent import Sent
from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.ep import host, routing
from rampwrap.kernels.ep.flags import COMBINE, DISPATCH
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.quantise import quantise_rows

KERNELS = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "kernels" / "ep" / "test_ep_kernels.py"))
SHAPE: MoEShape = KERNELS["SHAPE"]
PATH = Path(False, True)
pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="without the interpreter these kernels need several GPUs")


def made(layout: Layout) -> list[Bulk]:
    placements = [contiguous(SHAPE.num_experts, layout.num_ranks, rank) for rank in range(layout.num_ranks)]
    ranks = KERNELS["made"](layout, placements)
    starts = ranks[0].bases.tolist()
    # The first region begins at the first byte.
    wholes = [its.views["header"].untyped_storage() for its in ranks]
    peers = [torch.tensor([], dtype=torch.uint8).set_(its) for its in wholes]  # type: ignore[call-overload]
    assert [its.data_ptr() for its in peers] == starts
    owners = [Owners.of(placements, rank, "cpu") for rank in range(layout.num_ranks)]
    return [Bulk(its, own, layout, peers) for its, own in zip(ranks, owners, strict=True)]


def experts(received: Received) -> torch.Tensor:
    """bf16 [N, H], what a rank adds to each row; NaN where it adds nothing."""
    rows = received.hidden_states(torch.bfloat16).float()
    here = received.owners.is_local(received.topk_ids)
    factor = torch.where(here, received.topk_weights * (received.topk_ids + 1), 0.0).sum(1)
    return torch.where(here.any(1)[:, None], rows * factor[:, None], torch.nan).bfloat16()


def known(ids: torch.Tensor) -> torch.Tensor:
    """Ids of experts, -1 for all others."""
    return torch.where((ids >= 0) & (ids < SHAPE.num_experts), ids, -1).int()


def of_all(bulk: Bulk, counts: list[int], by_source: bool = False) -> Received:
    """What lies at a rank, of all sources by rank."""
    views, places = bulk._mapped.views, torch.arange(sum(counts))
    if by_source:
        firsts = [first_row(source, bulk._owners.rank, counts) for source in range(len(counts))]
        places = torch.cat([torch.arange(count) + first for first, count in zip(firsts, counts, strict=True)])
    scales = views["scales"][places] if "scales" in views else None
    its = views["rows"].view(torch.uint8)[places].view(views["rows"].dtype), scales
    return Received(*its, views["topk_ids"][places], views["topk_weights"][places], tuple(counts), bulk._owners, PATH)


def send(bulk: Bulk, own: Sent, counts: tuple[int, ...]) -> None:
    """The part of a rank that waits for nobody."""
    plan = bulk._planned(counts)
    bulk._send(bulk._own(own, plan), plan)


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_few_launches_take_all_sources(num_ranks: int) -> None:
    """Each once, a rank's own alone and first, one alone at the end; what lies together came together."""
    counts = [7 * rank % 5 for rank in range(num_ranks)]
    for rank in range(num_ranks):
        found = groups(rank, num_ranks)
        order = [source for its in found for source in its]
        assert order == in_order_of_arrival(rank, num_ranks) and found[0] == (rank,) and len(found[-1]) == 1
        sizes = [len(its) for its in found[1:]]
        assert sizes == sorted(sizes, reverse=True) and len(found) <= 5
        firsts = [first_row(source, rank, counts) for source in order]
        assert firsts == [sum(counts[other] for other in order[:place]) for place in range(num_ranks)]
    assert groups(1, 4) == [(1,), (0, 3), (2,)]


@pytest.mark.parametrize(
    ("counts", "payload", "partials"), [([5], "bf16", "bf16"), ([2, 4, 0, 1], "bf16", "fp32"), ([2, 0], "fp8", "bf16")]
)
def test_steps_of_both_kinds(counts: list[int], payload: str, partials: str) -> None:
    """By source and by one launch, one after the other: the same rows and the same bits."""
    layout = Layout(SHAPE, len(counts), 6, payload=payload, partials=partials)
    bulks, their_counts = made(layout), tuple(counts)
    for step, by_source in enumerate((True, False, True)):
        brought = KERNELS["drawn"](counts, 100 * step + len(counts), (torch.int64, torch.int32)[step % 2])
        sent = [Sent(its["x"], its["topk_ids"], its["topk_weights"], None) for its in brought]
        if payload == "fp8" and step == 2:
            sent = [
                Sent(*(q := reference.quantise(its.hidden_states))[:1], its.topk_ids, its.topk_weights, q[1])
                for its in sent
            ]
        outs, maps = [], [its._mapped for its in bulks]
        if by_source:
            for its, own in zip(bulks, sent, strict=True):
                send(its, own, their_counts)
            for its, own in zip(bulks, sent, strict=True):
                sources = []
                for piece in its.pieces(own, their_counts, PATH):
                    sources += piece.sources
                    its.send_home(piece, experts(piece.received))
                assert sources == in_order_of_arrival(its._owners.rank, len(counts))
            for each in maps:
                routing.tell(each, COMBINE, counts[each.rank])()
            outs = [its.summed(None) for its in bulks]
        else:
            KERNELS["sent"](maps, brought, counts, masked=False)
            for its in bulks:
                received = of_all(its, counts)
                host.push(its._mapped, received.partial(experts(received), layout.partial_dtype), counts)
            for each, own in zip(maps, sent, strict=True):
                outs.append(torch.empty(own.num_tokens, SHAPE.hidden_size, dtype=torch.bfloat16))
                host.add(each, outs[-1], own.topk_ids, counts)
        seen = [of_all(its, counts, by_source) for its in bulks]

        ids = torch.cat([its["topk_ids"] for its in brought])
        rows = torch.cat([its["x"] for its in brought])
        weights = torch.cat([its["topk_weights"] for its in brought])
        sums = []
        for rank, received in enumerate(seen):
            assert torch.equal(known(received.topk_ids), known(ids))
            assert torch.equal(received.topk_weights, weights)
            wanted: Received = Received(rows, None, received.topk_ids, weights, their_counts, received.owners, PATH)
            if payload == "fp8":
                q, scales = reference.quantise(rows)
                if step != 2:  # the interpreter rounds the smallest of e4m3 twice
                    quantise_rows(rows, q, scales)
                wanted = Received(q, scales, received.topk_ids, weights, their_counts, received.owners, PATH)
            sums.append(wanted.partial(experts(wanted), layout.partial_dtype))
            assert bulks[rank]._mapped.fault == 0
            assert int(bulks[rank]._mapped.views["header"][0]) == step + 1
        first = 0
        for rank, (out, count) in enumerate(zip(outs, counts, strict=True)):
            owned = bulks[rank]._owners.ranks_of(brought[rank]["topk_ids"])
            parts = torch.stack([its[first : first + count] for its in sums])
            assert torch.equal(out, sum_in_order(parts, owned).bfloat16()), (step, rank)
            first += count


def test_what_stays_the_same_is_looked_at_once() -> None:
    """Arguments by name to Triton, then by place to what it compiled, constants among them."""
    seen: list[object] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *its: seen.append((grid, its))

    class Kernel:
        arg_names = ("rank", "peer", "RANKS")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda **its: seen.append((grid, its)) or Compiled()

    its = routing.Repeated(Kernel(), {"RANKS": 4, "rank": 1, "peer": 0})
    for _ in range(3):
        its()
    again = ((1, 1, 1), (1, 0, 4))
    assert seen == [((1, 1, 1), {"RANKS": 4, "rank": 1, "peer": 0, "num_warps": 1}), again, again]


def test_who_adds_into_its_output_gets_no_memory_of_another_gpu() -> None:
    bulk, counts = made(Layout(SHAPE, 2, 4))[0], (1, 2)
    its = KERNELS["drawn"](list(counts), 5)[0]
    seen: list[bool] = []

    class Run:
        stores_once = False

        def __call__(self, *, out: torch.Tensor | None = None, **its: torch.Tensor) -> torch.Tensor:
            seen.append(out is not None)
            return torch.zeros_like(its["hidden_states"])

    class Once(Run):
        stores_once = True

    for run in (Run(), Once()):
        own, other = bulk.pieces(Sent(its["x"], its["topk_ids"], its["topk_weights"], None), counts, PATH)
        for piece in (own, other):
            piece.settle(piece.received.through(run, torch.bfloat16, {}, piece.room, piece.away))
    assert seen == [True, False, True, True]
    assert not other.room.any() and other.room.data_ptr() == bulk._regions[1]["partials"][0].data_ptr()


def test_rows_that_are_being_sent_are_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy engines read a rank's own tokens where the caller has them while the kernel runs; those of others lie here for it alone."""
    bulks, counts = made(Layout(SHAPE, 2, 4)), (1, 2)
    sent = [Sent(its["x"], its["topk_ids"], its["topk_weights"], None) for its in KERNELS["drawn"](list(counts), 5)]
    send(bulks[1], sent[1], counts)
    for piece in bulks[0].pieces(sent[0], counts, PATH):
        rows = piece.received.rows
        own = piece.sources == (0,)
        for output, written in ((rows, own), (torch.stack([rows] * SHAPE.top_k, 1), False), (rows.clone(), False)):
            assert ("wrote its output over hidden_states" in str(piece.refusal(output))) == written
            assert written or piece.refusal(output) is None
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    ep = ExpertParallel(None, SHAPE, 4, by_source=True, by_source_tokens=1)  # type: ignore[arg-type]
    ep._movers, ep._board, ep._state = (Quiet(), bulks[0]), Quiet(), "idle"  # type: ignore[assignment]

    def run(hidden_states: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return hidden_states.mul_(2)

    its = sent[0]
    with pytest.raises(
        InputError, match="hidden_states, whose rows are sent while it runs by source; let it write elsewhere"
    ):
        ep.layer(run, its.hidden_states, its.topk_ids, its.topk_weights, tokens_per_rank=counts)


class Quiet:
    """A board and a mover of nothing."""

    def fault(self) -> None:
        """None."""


def test_a_source_that_does_not_come() -> None:
    """It is named, and it alone."""
    bulks, counts = made(Layout(SHAPE, 3, 4)), (1, 2, 1)
    brought = KERNELS["drawn"](list(counts), 5)[2]
    send(bulks[2], Sent(brought["x"], brought["topk_ids"], brought["topk_weights"], None), counts)
    routing.wait(bulks[0]._mapped, [2], DISPATCH, counts)()
    assert bulks[0]._mapped.fault == 0
    routing.wait(bulks[0]._mapped, [2, 1], DISPATCH, counts)()
    said = host.said_by(int(bulks[0]._mapped.fault), 1.0)
    assert str(said).startswith("rank 1 did not arrive at dispatch of step 1 within 1 s")


def test_no_rank_goes_on_while_rows_of_another_are_read() -> None:
    """Rank 2 has sent rank 1 its sums and not yet read rank 0's rows, where those of rank 1 may lie in the next step."""
    bulks, counts = made(Layout(SHAPE, 3, 4)), (1, 2, 1)
    sent = [Sent(its["x"], its["topk_ids"], its["topk_weights"], None) for its in KERNELS["drawn"](list(counts), 5)]
    for its, own in zip(bulks, sent, strict=True):
        send(its, own, counts)
    for its, own in zip(bulks[:2], sent, strict=False):
        for piece in its.pieces(own, counts, PATH):
            its.send_home(piece, experts(piece.received))
        routing.tell(its._mapped, COMBINE, counts[its._owners.rank])()
    slow = bulks[2].pieces(sent[2], counts, PATH)
    for piece in (next(slow), next(slow)):
        bulks[2].send_home(piece, experts(piece.received))
    assert piece.sources == (1,)
    bulks[1].summed(None)
    said = host.said_by(int(bulks[1]._mapped.fault), 1.0)
    assert str(said).startswith("rank 2 did not arrive at combine of step 1"), said
