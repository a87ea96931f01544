"""The kernels of several ranks at once on one GPU, each on a stream of its own: ``pytest -m gpu tests/gpu/ep``. Not run yet.

Their memory is of one GPU, so flags and rows go through its L2 and not over a link; all else is as on several: launches that wait
for each other, ranks at any distance, steps that follow each other without the host, and the same steps in a CUDA graph.
"""

import pathlib
import random
import runpy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from rampwrap.ep.layout import Layout
from rampwrap.ep.owners import Owners, contiguous
from rampwrap.ep.received import sum_in_order
from rampwrap.kernels.ep import host
from rampwrap.kernels.triton.interpreter import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
HELP = runpy.run_path(str(pathlib.Path(__file__).parent / "on_gpus.py"))
SHAPE, MOST, STEPS = HELP["SHAPE"], HELP["MOST"], 8


class Rank:
    """One rank: its memory, its stream, and a step of it."""

    def __init__(self, mapped: host.Mapped, owners: Owners) -> None:
        self.mapped, self.owners, self.stream = mapped, owners, torch.cuda.Stream()
        self.counts = torch.zeros(owners.num_local_experts, dtype=torch.int32, device="cuda")

    def step(self, brought, counts: list[int], out, masked: bool) -> None:
        hidden, ids, weights = brought
        rows = sum(counts)
        host.dispatch(self.mapped, hidden, ids, weights, counts, masked=masked, expert_counts=self.counts)
        views = self.mapped.views
        host.push(self.mapped, experts(views["rows"][:rows], views["topk_ids"][:rows], self.owners), counts)
        host.add(self.mapped, out, ids, counts)


def experts(rows, ids, owners: Owners):
    """bf16 [N, top_k, H], NaN in slots of other ranks."""
    each = (rows.float()[:, None] * (ids[:, :, None] + 1)).bfloat16()
    return torch.where(owners.is_local(ids)[:, :, None], each, torch.nan)


def made(num_ranks: int, partials: str) -> list[Rank]:
    layout = Layout(SHAPE, num_ranks, MOST, partials=partials)
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
            torch.zeros(32, dtype=torch.int32, device="cuda")[:1],
            torch.zeros(1, dtype=torch.int64, pin_memory=True),
            owners.rank_of_expert,
            owners.expert_map,
            owners.num_local_experts,
            20.0,
        )
        ranks.append(Rank(mapped, owners))
    return ranks


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


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("partials", "masked"), [("bf16", False), ("fp32", True)])
def test_steps_of_all_ranks(num_ranks: int, partials: str, masked: bool) -> None:
    """Eager steps with any counts, then a captured one with other routing at each replay, for each rank on its stream."""
    ranks, rng = made(num_ranks, partials), random.Random(num_ranks)
    dtype = ranks[0].mapped.views["partials"].dtype
    for number in range(20):
        plans = []
        for step in range(STEPS):
            counts = [rng.choice((0, 1, 8, rng.randrange(MOST + 1))) for _ in range(num_ranks)]
            kind = rng.choice(HELP["KINDS"])
            seeds = (1000 * number + 10 * step + rank for rank in range(num_ranks))
            brought = [HELP["batch"](count, kind, seed, "cuda") for count, seed in zip(counts, seeds, strict=True)]
            plans.append((brought, counts, [torch.empty_like(its[0]) for its in brought]))
        torch.cuda.synchronize()
        for place, rank in enumerate(ranks):
            with torch.cuda.stream(rank.stream):
                for brought, counts, outs in plans:
                    if rng.random() < 0.3:
                        torch.cuda._sleep(rng.randrange(500_000))
                    rank.step(brought[place], counts, outs[place], masked)
        torch.cuda.synchronize()
        for rank in ranks:
            assert host.said_by(int(rank.mapped.fault), 20.0) is None
        for brought, _, outs in plans:
            for found, wanted in zip(outs, expected(brought, ranks, dtype), strict=True):
                assert torch.equal(found, wanted)

    counts = [8] * num_ranks
    brought = [HELP["batch"](8, "spread", rank, "cuda") for rank in range(num_ranks)]
    outs = [torch.empty_like(its[0]) for its in brought]
    graphs = []
    for place, rank in enumerate(ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream):
            rank.step(brought[place], counts, outs[place], masked)
        graphs.append(graph)
    for number in range(50):
        fresh = [HELP["batch"](8, HELP["KINDS"][number % 5], 77 + number + rank, "cuda") for rank in range(num_ranks)]
        for mine, its in zip(brought, fresh, strict=True):
            for tensor, other in zip(mine, its, strict=True):
                tensor.copy_(other)
        torch.cuda.synchronize()
        for place in rng.sample(range(num_ranks), num_ranks):
            with torch.cuda.stream(ranks[place].stream):
                graphs[place].replay()
        torch.cuda.synchronize()
        for found, wanted in zip(outs, expected(fresh, ranks, dtype), strict=True):
            assert torch.equal(found, wanted)
