"""The expert-parallel tests on GPUs, one process each: ``python on_gpus.py RANKS CHECK... [--rounds N] [--limit-s S]``.

Each check compares with the path over torch.distributed, bit for bit where rows are not quantised on the way. The first rank that fails ends the others and its traceback
is shown; ranks that still run at the limit show where they stand. On a small case under compute-sanitizer:
``compute-sanitizer --target-processes all python on_gpus.py 2 soak --rounds 6``.
"""

import argparse
import contextlib
import faulthandler
import os
import pathlib
import random
import runpy
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.ep import layout
from rampwrap.ep.gathered import Gathered
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.path import BY_SOURCE_TOKENS
from rampwrap.ep.received import Received
from rampwrap.errors import GroupError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import local_ids
from rampwrap.kernels.common.reference import quantise, random_weights

SHAPE = MoEShape(32, 8, 1024, 128)
MOST = 48
KINDS = ("spread", "one expert", "dropped", "twice", "one rank")
Batch = tuple[torch.Tensor, ...]
"Hidden states, ids and weights of one rank; scales where the states are e4m3."


def batch(count: int, kind: str, seed: int, device: str, quantised: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    size = (count, SHAPE.top_k)
    ids = torch.rand(count, SHAPE.num_experts, generator=generator).argsort(1)[:, : SHAPE.top_k]
    if kind == "one expert":
        ids = torch.full(size, 5)
    elif kind == "one rank":
        ids = ids % 8
    elif kind == "dropped":
        ids = torch.where(torch.rand(size, generator=generator) < 0.6, -1, ids)
    elif kind == "twice":
        ids = ids[:, :1].expand(size)
    hidden = torch.randn(count, SHAPE.hidden_size, generator=generator)
    weights = torch.rand(size, generator=generator)
    rest = ids.int().contiguous().to(device), weights.to(device)
    if quantised:
        rows, scales = quantise(hidden.bfloat16())
        return rows.to(device), *rest, scales.to(device)
    return hidden.bfloat16().to(device), *rest


def experts(received: Received) -> torch.Tensor:
    """bf16 [N, top_k, H]: what stands for the experts, by slot; NaN in slots of other ranks."""
    rows = received.hidden_states(torch.bfloat16).float()
    each = (rows[:, None] * (received.topk_ids[:, :, None] + 1)).bfloat16()
    here = received.owners.is_local(received.topk_ids)
    return torch.where(here[:, :, None], each, torch.nan)


def step(ep: ExpertParallel, brought: Batch, counts: list[int]) -> torch.Tensor:
    scales = brought[3] if len(brought) > 3 else None
    return ep.combine(experts(ep.dispatch(*brought[:3], scales=scales, tokens_per_rank=counts)))


def slots(**its: torch.Tensor) -> torch.Tensor:
    """What stands for a kernel that gives one row a slot, as `experts`."""
    rows, ids = its["hidden_states"].float(), its["topk_ids"]
    here = local_ids(ids, its["expert_map"]) >= 0
    return torch.where(here[:, :, None], (rows[:, None] * (ids[:, :, None] + 1)).bfloat16(), torch.nan)


def summed(*, out: torch.Tensor | None = None, **its: torch.Tensor) -> torch.Tensor:
    """What stands for one that adds them up: bf16 [N, H], in `out` where it is given, NaN in rows without a local expert."""
    ids = its["topk_ids"]
    here = local_ids(ids, its["expert_map"]) >= 0
    factor = torch.zeros(len(ids), device=ids.device)
    for slot in range(ids.shape[1]):  # in one order, for any number of rows
        factor += torch.where(here[:, slot], its["topk_weights"][:, slot] * (ids[:, slot] + 1), 0.0)
    total = torch.where(here.any(1)[:, None], its["hidden_states"].float() * factor[:, None], torch.nan).bfloat16()
    return total if out is None else out.copy_(total)


def layer(ep: ExpertParallel, brought: Batch, counts: list[int], run: Callable[..., torch.Tensor]) -> torch.Tensor:
    scales = brought[3] if len(brought) > 3 else None
    return ep.layer(run, *brought[:3], scales=scales, tokens_per_rank=counts)


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Our kernels divide by scales to the last bit but one, so that now and then a value falls to the next of e4m3."""
    if torch.equal(found, wanted):
        return True
    apart, most = (found.float() - wanted.float()).abs().amax(), wanted.float().abs().amax()
    return bool((found != wanted).float().mean() < 0.01) and bool(apart <= 0.15 * most)


def room_for(few: int, ranks: int, bytes_of_sum: int) -> contextlib.AbstractContextManager[Any]:
    """Groups opened meanwhile have room for so many tokens whose sums are their own flags; of more, cells tell."""
    return mock.patch.object(layout, "MARKED_BYTES", few * ranks * SHAPE.hidden_size * bytes_of_sum)


def poison(ep: ExpertParallel) -> None:
    """NaN in all rows and sums of this rank, while nobody writes there; but where sums are their own flags none may be left."""
    mover = ep._movers[0] if ep._movers else None
    views = mover._mapped.views if hasattr(mover, "_mapped") else mover._regions  # type: ignore[union-attr]
    for name in ("rows", "partials"):
        views[name].view(torch.uint8).fill_(0xFF)
    if "marked" in views:
        assert bool((views["marked"].float().view(torch.int32) == -(1 << 31)).all()), "sums are left"


class Replayed:
    """A step of as many tokens on every rank, captured once, replayed with other routing."""

    def __init__(self, ep: ExpertParallel, count: int, device: str, quantised: bool) -> None:
        self.brought = batch(count, "spread", 0, device, quantised)
        counts = [count] * ep.num_ranks
        step(ep, self.brought, counts)  # compiles
        ep.check()
        dist.barrier(ep.group)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.out = step(ep, self.brought, counts)

    def __call__(self, brought: Batch) -> torch.Tensor:
        for mine, its in zip(self.brought, brought, strict=True):
            mine.copy_(its)
        self._graph.replay()
        return self.out.clone()


def soak(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 2000) -> int:
    """Rounds with any counts and routing, graphs and eager steps mixed, ranks late and memory poisoned; those that ran."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    on_gpu, done = device != "cpu", 0
    cases = (("bf16", "bf16", False, False, MOST), ("fp8", "fp32", True, True, 8), ("fp8", "bf16", False, False, 0))
    for payload, partials, masked, quantised, few in cases:
        options: dict[str, Any] = {"payload": payload, "partials": partials, "device": device, "timeout_s": 15.0}
        with (
            room_for(few, ranks, 4 if partials == "fp32" else 2),
            ExpertParallel(group, SHAPE, MOST, backend=backend, masked=masked, **options) as ours,
            ExpertParallel(group, SHAPE, MOST, backend="collectives", **options) as theirs,
        ):
            graphs = {count: Replayed(ours, count, device, quantised) for count in (1, 8, 48)} if on_gpu else {}
            same = random.Random(7)  # as on the other ranks
            own = random.Random(rank)
            for number in range(-(-rounds // 3)):
                captured = same.choice((None, None, *graphs))
                most = same.choice((1, 8, MOST))
                counts = [same.choice((0, 1, most, same.randrange(MOST + 1))) for _ in range(ranks)]
                counts = counts if captured is None else [captured] * ranks
                kind, poisons = same.choice(KINDS), same.random() < 0.25
                brought = batch(counts[rank], kind, 1000 * number + rank, device, quantised)
                wanted = step(theirs, brought, counts)
                if poisons:
                    ours.check()
                    dist.barrier(group)
                    poison(ours)
                    ours.check()
                    dist.barrier(group)
                if on_gpu and own.random() < 0.3:
                    torch.cuda._sleep(own.randrange(2_000_000))  # cycles, a millisecond at most
                found = step(ours, brought, counts) if captured is None else graphs[captured](brought)
                alike = near if payload == "fp8" and not quantised else torch.equal
                assert alike(found, wanted), (payload, number, kind, counts, captured)
                done += 1
            ours.check()
    return done


def aligned(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 20) -> None:
    """Blocks that a dispatch was asked for are those of the gathered ids."""
    from rampwrap.kernels.triton.align.host import align_tokens

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with ExpertParallel(group, SHAPE, 512, backend=backend, device=device) as ep:
        for number in range(rounds):
            count = (3, 17, 48, 300)[number % 4]
            brought = batch(count, KINDS[number % 5], number + 100 * rank, device)
            received = ep.dispatch(*brought, tokens_per_rank=[count] * ranks, block_m=16)
            blocks, local = received.blocks, received.owners.num_local_experts
            assert blocks is not None
            wanted = align_tokens(received.topk_ids, 16, local, expert_map=received.expert_map)
            rows = int(wanted.num_tokens_post_padded)
            ep.check()
            assert int(blocks.num_tokens_post_padded) == rows
            assert torch.equal(blocks.sorted_token_ids[:rows], wanted.sorted_token_ids[:rows])
            assert torch.equal(blocks.expert_ids[: rows // 16], wanted.expert_ids[: rows // 16])
            ep.combine(experts(received))
        ep.check()


def late(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 1) -> None:
    """The last rank comes too late: all others are told so, it too, as it cannot have their sums, none hangs, and after a reset all is
    well. Counts, likewise. By both ways of a combine."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    counts, last = [2] * ranks, ranks - 1
    seen = counts if rank else [*counts[:-1], 3]
    others = f"rank{'s' * (last > 1)} {', '.join(map(str, range(last)))}"
    brought = batch(2, "spread", rank, device)
    for few in (MOST, 0):
        with room_for(few, ranks, 2):
            with ExpertParallel(group, SHAPE, MOST, backend=backend, device=device) as ep:
                right = step(ep, brought, counts)  # compiles, while nobody is missed
            with ExpertParallel(group, SHAPE, MOST, backend=backend, device=device, timeout_s=2.0) as ep:
                for _ in range(rounds):
                    dist.barrier(group)
                    if rank == last:
                        time.sleep(3.0)
                    reason = said(lambda: (step(ep, brought, counts), ep.check()))
                    missed = (
                        f"rank {last} did not arrive at dispatch" if rank != last else f"{others} did not arrive at"
                    )
                    assert reason.startswith(missed), reason
                    dist.barrier(group)
                    ep.reset()
                    assert torch.equal(step(ep, brought, counts), right)
                    ep.check()
                dist.barrier(group)
                reason = said(lambda: (step(ep, brought, seen), ep.check()))
                assert (not rank) == ("with other tokens_per_rank than this rank has" in reason), reason
                dist.barrier(group)
                ep.reset()
                assert torch.equal(step(ep, brought, counts), right)
                ep.check()


def gathered(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 300) -> None:
    """Rows to every rank and sums back by `Gathered`, for any counts, in graphs too; each rank draws what all bring."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    most, hidden = 64, SHAPE.hidden_size
    sizes = {"token_bytes": 4 * hidden, "hidden_size": hidden, "dtype": torch.bfloat16}
    with room_for(16, ranks, 2):
        ours = Gathered.open(group, torch.device(device), timeout_s=15.0, max_tokens_per_rank=most, **sizes)

    def drawn(counts: list[int], seed: int) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
        generator = torch.Generator(device).manual_seed(seed)
        batches, total = [], sum(counts)
        for count in counts:
            row, weights = (torch.randn(count, size, generator=generator, device=device) for size in (hidden, 8))
            ids = torch.randint(0, 99, (count, 8), generator=generator, device=device)
            odd = torch.randint(0, 99, (count, 3), generator=generator, device=device).int()
            batches.append([row.bfloat16() if seed % 2 else row.to(torch.float8_e4m3fn), weights, ids, odd])
        y = [torch.randn(total, hidden, generator=generator, device=device).bfloat16() for _ in counts]
        for its in y:  # what stands elsewhere for a sum that is not there
            its[::3], its[:, 4:15] = -0.0, -0.0
        return batches, y

    def compare(found: list[torch.Tensor], out: torch.Tensor, drew: Any, counts: list[int], where: str) -> None:
        for field, wanted in zip(found, map(torch.cat, zip(*drew[0], strict=True)), strict=True):
            assert torch.equal(field.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), where
        total = torch.zeros(drew[1][0].shape, device=device)
        for its in drew[1]:
            total += its.float()
        assert torch.equal(out, total.bfloat16().split(counts)[rank]), where

    random_counts = random.Random(3)
    for number in range(rounds):
        counts = [random_counts.choice((0, 1, 8, most, random_counts.randrange(most + 1))) for _ in range(ranks)]
        drew = drawn(counts, number)
        # Copies: once the sums are sent, the next gather of a peer may overwrite the rows.
        found = [its.clone() for its in ours.gather(drew[0][rank], counts)]
        out = ours.scatter(drew[1][rank], counts)
        compare(found, out, drew, counts, f"round {number} of {counts} tokens: {ours.fault()}")

    ours.reset()
    counts = [8] * ranks
    mine = drawn(counts, 1)
    given = [*mine[0][rank], mine[1][rank]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [its.clone() for its in ours.gather(given[:-1], counts)]
        out = ours.scatter(given[-1], counts)
    for number in range(1, rounds, 2):
        drew = drawn(counts, number)
        for its, other in zip(given, [*drew[0][rank], drew[1][rank]], strict=True):
            its.copy_(other)
        graph.replay()
        compare(found, out, drew, counts, f"replay {number}: {ours.fault()}")
    torch.cuda.synchronize()
    assert ours.fault() is None
    dist.barrier(group)
    ours.close()


BULK: tuple[dict[str, Any], ...] = (
    {"payload": "bf16", "partials": "bf16"},
    {"payload": "fp8", "partials": "bf16"},
    {"payload": "bf16", "partials": "fp32"},
)
"Steps by source."
BULK_MOST = 400
BY_SOURCE: dict[str, Any] = {"by_source": True, "by_source_tokens": 64, "timeout_s": 15.0}


class Lagging:
    """`summed`, on some ranks and for some sources after a while, so that the others are far ahead."""

    stores_once = True

    def __init__(self, rank: int, device: str) -> None:
        self._own, self._on_gpu = random.Random(rank), device != "cpu"

    def __call__(self, *, out: torch.Tensor | None = None, **its: torch.Tensor) -> torch.Tensor:
        if self._on_gpu and self._own.random() < 0.4:
            torch.cuda._sleep(self._own.randrange(1_000_000))
        return summed(out=out, **its)


def bulk(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 60) -> int:
    """Three steps in a row of any counts and routing, by source and by one launch, with nothing between them; memory poisoned before."""
    rank, ranks, done = dist.get_rank(group), dist.get_world_size(group), 0
    lagging = Lagging(rank, device)
    for given in BULK:
        same = random.Random(11)
        with (
            ExpertParallel(group, SHAPE, BULK_MOST, backend=backend, device=device, **BY_SOURCE, **given) as ours,
            ExpertParallel(group, SHAPE, BULK_MOST, backend="collectives", device=device, **given) as theirs,
        ):
            for number in range(rounds):
                plans = []
                for at in range(3):
                    most = same.choice((8, BULK_MOST, BULK_MOST))
                    counts = [same.choice((0, 1, most, same.randrange(most + 1))) for _ in range(ranks)]
                    seed = 3000 * number + 1000 * at + rank
                    quantised = given["payload"] == "fp8" and number % 2 > 0
                    brought = batch(counts[rank], same.choice(KINDS), seed, device, quantised)
                    run = (slots, lagging, lagging, None)[(number + at) % 4]
                    plans.append((brought, counts, run))
                wanted = [step(theirs, *its[:2]) if its[2] is None else layer(theirs, *its) for its in plans]
                if same.random() < 0.25:
                    ours.check()
                    dist.barrier(group)
                    poison(ours)
                    ours.check()
                    dist.barrier(group)
                found = [step(ours, *its[:2]) if its[2] is None else layer(ours, *its) for its in plans]
                alike = near if given["payload"] == "fp8" and number % 2 == 0 else torch.equal
                for at, (one, other) in enumerate(zip(found, wanted, strict=True)):
                    assert alike(one, other), (given, number, at, [counts for _, counts, _ in plans])
                    done += 1
            ours.check()
    return done


def captured(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 30) -> None:
    """Layers by source in CUDA graphs, replayed with other routing between eager steps of both kinds and of other counts.

    What they must give comes from one launch, whose places are those of the graph's and whose steps others cannot overlap.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    counts, few = [200] * ranks, [3 + 70 * (other % 2) for other in range(ranks)]
    for given in BULK[:2]:
        lagging = Lagging(rank, device)
        with (
            ExpertParallel(group, SHAPE, BULK_MOST, backend=backend, device=device, **BY_SOURCE, **given) as ours,
            ExpertParallel(group, SHAPE, BULK_MOST, backend=backend, device=device, timeout_s=15.0, **given) as theirs,
        ):
            brought = batch(counts[rank], "spread", rank, device)
            for _ in range(2):
                layer(ours, brought, counts, summed)
                layer(theirs, brought, counts, summed)
            ours.check()
            dist.barrier(group)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer(ours, brought, counts, lagging)
            for number in range(rounds):
                fresh = batch(counts[rank], KINDS[number % len(KINDS)], 1000 * number + rank, device)
                other = batch(few[rank], KINDS[number % 3], number + rank, device)
                wanted, less = layer(theirs, fresh, counts, summed), layer(theirs, other, few, summed)
                eager = layer(ours, fresh, counts, lagging)
                found = layer(ours, other, few, lagging) if number % 2 else step(ours, other, few)
                for mine, its in zip(brought, fresh, strict=True):
                    mine.copy_(its)
                graph.replay()
                after = layer(ours, other, few, lagging)
                alike = near if given["payload"] == "fp8" else torch.equal
                assert alike(eager, wanted), (given, number, "eager by source", differ(eager, wanted))
                assert alike(out, wanted), (given, number, "replayed", differ(out, wanted))
                assert alike(after, less), (given, number, "eager after the replay", differ(after, less))
                assert not number % 2 or torch.equal(found, after), (given, number, "eager before the replay")
            ours.check()


def differ(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """The rows in which two tensors differ."""
    rows = (found != wanted).any(1).nonzero().flatten().tolist()
    return f"rows {rows[:12]} of {len(found)}, {len(rows)} in all"


def large(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 10) -> None:
    """Layers of as many tokens as decide between one launch and source by source, and of the most that one launch takes."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    most, same = 2 * BY_SOURCE_TOKENS, random.Random(5)
    sizes = (0, 2048, BY_SOURCE_TOKENS - 1, BY_SOURCE_TOKENS, most)
    options: dict[str, Any] = {"device": device, "timeout_s": 15.0}
    with (
        ExpertParallel(group, SHAPE, most, backend=backend, by_source=True, **options) as ours,
        ExpertParallel(group, SHAPE, most, backend="collectives", **options) as theirs,
    ):
        for number in range(rounds):
            top = sizes[number % len(sizes)]
            counts = [same.choice((0, top, same.randrange(top + 1))) for _ in range(ranks)]
            brought = batch(counts[rank], KINDS[number % len(KINDS)], 1000 * number + rank, device)
            found = layer(ours, brought, counts, summed)
            assert torch.equal(found, layer(theirs, brought, counts, summed)), (number, counts)
            # The same bits again, and by one launch.
            ours.by_source = number % 2 == 0
            assert torch.equal(found, layer(ours, brought, counts, summed)), (number, counts)
            ours.by_source = True
        ours.check()


def layers(group: dist.ProcessGroup, device: str, backend: str, rounds: int = 40) -> None:
    """Whole layers that choose by the local histogram, eager and replayed with other routing: the bits of eager ones by collectives."""
    helpers = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "dispatch" / "test_graph.py"))
    ranks, most = dist.get_world_size(group), 16
    shape = MoEShape(8 * ranks, 2, 64, 32)
    options: dict[str, Any] = {"device": device, "timeout_s": 15.0}
    with (
        ExpertParallel(group, shape, most, backend=backend, **options) as ours,
        ExpertParallel(group, shape, most, backend="collectives", **options) as theirs,
    ):
        kernel = helpers["Small"](ours.shape)
        plan = helpers["every"](helpers["small_plan"](kernel, ours.shape, num_buckets=4))
        chooses = [GraphDispatcher(kernel, plan, max_tokens=most * ranks) for _ in range(2)]
        weights = random_weights(ours.shape, torch.device(device), seed=ours.rank)

        def drawn(seed: int) -> Batch:
            """Some experts of all are popular, the same on every rank."""
            same = torch.Generator().manual_seed(seed)
            popular = torch.randperm(shape.num_experts, generator=same)[: 2 + seed % (shape.num_experts - 1)]
            generator = torch.Generator().manual_seed(100 * seed + ours.rank)
            ids = popular[torch.rand(most, len(popular), generator=generator).argsort(1)[:, :2]].int()
            hidden = torch.randn(most, shape.hidden_size, generator=generator).bfloat16()
            return hidden.to(device), ids.to(device), torch.rand(most, 2, generator=generator).to(device)

        def layer(ep: ExpertParallel, run: Any, its: Batch) -> torch.Tensor:
            return ep.layer(run, *its, tokens_per_rank=[most] * ranks, **weights)

        given = drawn(0)
        layer(ours, chooses[0], given)
        layer(theirs, chooses[1], given)
        ours.check()
        dist.barrier(group)
        graph = None
        if device != "cpu":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer(ours, chooses[0], given)
        for number in range(rounds):
            fresh = drawn(number)
            wanted = layer(theirs, chooses[1], fresh)
            assert torch.equal(layer(ours, chooses[0], fresh), wanted), f"eager layer {number}"
            if graph is not None:
                for mine, its in zip(given, fresh, strict=True):
                    mine.copy_(its)
                graph.replay()
                assert torch.equal(out, wanted), f"replayed layer {number}"
        ours.check()
        found = [{index for counts in its.counts().values() for index, n in counts.items() if n} for its in chooses]
        assert all(len(its) > 1 for its in found), f"only {found} were chosen"


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except GroupError as error:
        return str(error)
    return ""


CHECKS: dict[str, Callable[..., Any]] = {
    its.__name__: its for its in (aligned, late, gathered, layers, bulk, captured, large, soak)
}


def serve(rank: int, ranks: int, port: int, its: argparse.Namespace) -> None:
    """The checks on one rank."""
    faulthandler.dump_traceback_later(its.limit_s, exit=True)
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=its.limit_s),
        device_id=torch.device("cuda", rank),
    )
    for check in its.checks:
        start = time.monotonic()
        options = {"rounds": its.rounds} if its.rounds and check in ("soak", "bulk", "captured") else {}
        found = CHECKS[check](dist.group.WORLD, f"cuda:{rank}", "symmetric", **options)
        print(f"rank {rank}: {check} passed in {time.monotonic() - start:.1f} s {found or ''}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int)
    parser.add_argument("checks", nargs="+", choices=sorted(CHECKS))
    parser.add_argument("--rounds", type=int, help="of soak, bulk and captured")
    parser.add_argument("--limit-s", type=float, default=600.0)
    its = parser.parse_args()
    # Multicast of NVLink is never used, by NCCL and torch neither.
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.spawn(serve, (its.ranks, port, its), nprocs=its.ranks)


if __name__ == "__main__":
    main()
