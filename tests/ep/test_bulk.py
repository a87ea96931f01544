"""Bulk steps in the interpreter: tensors of one process are the memory of several ranks, whose launches follow each other.

Nothing waits there, so all ranks send before any of them waits; sending again changes nothing.
"""

import pathlib
import runpy

import pytest
import torch

pytest.importorskip("triton")
from rampwrap.ep.bulk import Bulk
from rampwrap.ep.layout import Layout
from rampwrap.ep.mover import in_order_of_arrival
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.path import Path
from rampwrap.ep.received import Received, sum_in_order
from rampwrap.ep.sent import Sent
from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.ep import copies, host
from rampwrap.kernels.ep.flags import DISPATCH
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.quantise import quantise_rows

KERNELS = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "kernels" / "ep" / "test_ep_kernels.py"))
SHAPE: MoEShape = KERNELS["SHAPE"]
WHOLE, BY_SOURCE = Path(False, False, False), Path(False, False, True)
pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="without the interpreter these kernels need several GPUs")


def made(layout: Layout, max_ctas: int) -> list[Bulk]:
    placements = [contiguous(SHAPE.num_experts, layout.num_ranks, rank) for rank in range(layout.num_ranks)]
    ranks = KERNELS["made"](layout, placements)
    starts = ranks[0].bases.tolist()
    # The first region begins at the first byte.
    wholes = [its.views["header"].untyped_storage() for its in ranks]
    peers = [torch.tensor([], dtype=torch.uint8).set_(its) for its in wholes]  # type: ignore[call-overload]
    assert [its.data_ptr() for its in peers] == starts
    owners = [Owners.of(placements, rank, "cpu") for rank in range(layout.num_ranks)]
    return [Bulk(its, own, layout, peers, max_ctas) for its, own in zip(ranks, owners, strict=True)]


def experts(received: Received) -> torch.Tensor:
    """bf16 [N, H], what a rank adds to each row; NaN where it adds nothing."""
    rows = received.hidden_states(torch.bfloat16).float()
    here = received.owners.is_local(received.topk_ids)
    factor = torch.where(here, received.topk_weights * (received.topk_ids + 1), 0.0).sum(1)
    return torch.where(here.any(1)[:, None], rows * factor[:, None], torch.nan).bfloat16()


def known(ids: torch.Tensor) -> torch.Tensor:
    """Ids of experts, -1 for all others."""
    return torch.where((ids >= 0) & (ids < SHAPE.num_experts), ids, -1).int()


@pytest.mark.parametrize(
    ("counts", "payload", "partials", "max_ctas"),
    [
        ([5], "bf16", "bf16", 0),
        ([2, 0], "fp8", "fp32", 3),
        ([2, 4, 0], "bf16", "fp32", 2),
        ([1, 2, 0, 3], "fp8", "bf16", 0),
    ],
)
def test_steps_of_all_kinds(counts: list[int], payload: str, partials: str, max_ctas: int) -> None:
    """Whole, by source and of low latency, one after the other: the same rows and the same bits."""
    layout = Layout(SHAPE, len(counts), 6, payload=payload, partials=partials)
    bulks, their_counts = made(layout, max_ctas), tuple(counts)
    for step, path in enumerate((WHOLE, BY_SOURCE, None, BY_SOURCE)):
        brought = KERNELS["drawn"](counts, 100 * step + len(counts), (torch.int64, torch.int32)[step % 2])
        sent = [Sent(its["x"], its["topk_ids"], its["topk_weights"], None) for its in brought]
        if payload == "fp8" and step == 3:
            sent = [
                Sent(*(q := reference.quantise(its.hidden_states))[:1], its.topk_ids, its.topk_weights, q[1])
                for its in sent
            ]
        outs = []
        if path is None:
            maps = [its._mapped for its in bulks]
            KERNELS["sent"](maps, brought, counts, masked=False)
            seen = [its._view(0, sum(counts), their_counts, WHOLE) for its in bulks]
            for its, received in zip(maps, seen, strict=True):
                host.push(its, received.partial(experts(received), layout.partial_dtype), counts)
            for its, own in zip(maps, sent, strict=True):
                outs.append(torch.empty(own.num_tokens, SHAPE.hidden_size, dtype=torch.bfloat16))
                host.add(its, outs[-1], own.topk_ids, counts)
        else:
            for its, own in zip(bulks, sent, strict=True):
                its._send(its._own(own, counts), counts)
            if path.by_source:
                for its, own in zip(bulks, sent, strict=True):
                    sources = []
                    for piece in its.pieces(own, their_counts, path):
                        sources.append(piece.source)
                        its.send_home(piece, experts(piece.received))
                    assert sources == in_order_of_arrival(its._owners.rank, len(counts))
                outs = [its.summed(None) for its in bulks]
                seen = [its._view(0, sum(counts), their_counts, path) for its in bulks]
            else:
                seen = [its.dispatch(own, their_counts, path, None) for its, own in zip(bulks, sent, strict=True)]
                for its, received in zip(bulks, seen, strict=True):  # a first time, for the flags of all
                    partial = received.partial(experts(received), layout.partial_dtype)
                    for source in range(len(counts)):
                        its._push(partial[slice(*its._span(source, counts))], source, counts)
                outs = [
                    its.combine(experts(received), received, None) for its, received in zip(bulks, seen, strict=True)
                ]

        ids = torch.cat([its["topk_ids"] for its in brought])
        rows = torch.cat([its["x"] for its in brought])
        weights = torch.cat([its["topk_weights"] for its in brought])
        sums = []
        for rank, received in enumerate(seen):
            assert torch.equal(known(received.topk_ids), known(ids))
            assert torch.equal(received.topk_weights, weights)
            wanted: Received = Received(rows, None, received.topk_ids, weights, their_counts, received.owners, WHOLE)
            if payload == "fp8":
                q, scales = reference.quantise(rows)
                if step != 3:  # the interpreter rounds the smallest of e4m3 twice
                    quantise_rows(rows, q, scales)
                wanted = Received(q, scales, received.topk_ids, weights, their_counts, received.owners, WHOLE)
            sums.append(wanted.partial(experts(wanted), layout.partial_dtype))
            assert bulks[rank].fault() is None
            assert int(bulks[rank]._mapped.views["header"][0]) == step + 1 and int(bulks[rank]._mapped.ticket) == 0
        first = 0
        for rank, (out, count) in enumerate(zip(outs, counts, strict=True)):
            owned = bulks[rank]._owners.ranks_of(brought[rank]["topk_ids"])
            parts = torch.stack([its[first : first + count] for its in sums])
            assert torch.equal(out, sum_in_order(parts, owned).bfloat16()), (step, rank)
            first += count


def test_a_source_that_does_not_come() -> None:
    """It is named, and it alone."""
    bulks = made(Layout(SHAPE, 3, 4), 0)
    brought = KERNELS["drawn"]([1, 2, 1], 5)
    sent = [Sent(its["x"], its["topk_ids"], its["topk_weights"], None) for its in brought]
    bulks[2]._send(bulks[2]._own(sent[2], (1, 2, 1)), (1, 2, 1))
    copies.wait(bulks[0]._mapped, 1, 2, DISPATCH, (1, 2, 1))
    assert bulks[0].fault() is None
    copies.wait(bulks[0]._mapped, 2, 1, DISPATCH, (1, 2, 1))
    assert str(bulks[0].fault()).startswith("rank 1 did not arrive at dispatch of step 1 within 1 s")


@pytest.mark.parametrize(("words", "start"), [(1, 0), (4096, 0), (4100, 4), (9001, 1)])
def test_copies_of_any_length(words: int, start: int) -> None:
    """Each byte once, and none beyond: with CTAs that have no block and with several blocks for one."""
    mapped = made(Layout(SHAPE, 2, 40), 0)[0]._mapped
    data = torch.arange(1, words + start + 1, dtype=torch.int32)[start:]
    at = mapped.offsets["rows"] + 4 * start
    copies._copy(mapped, [(data, at)], 0, (3, 1), None, BLOCK=1024, num_warps=4)
    memory = mapped.views["rows"].view(-1).view(torch.int32)
    assert torch.equal(memory[start : start + words], data)
    assert bool((memory[start + words :] == -1).all()) and bool((memory[:start] == -1).all())
    with pytest.raises(InputError, match="0 tensors are copied; give one to 3"):
        copies.copy_to_all(mapped, [])
