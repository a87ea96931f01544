"""Steps through shared memory between processes of a CPU: each rank maps the memory of all, Triton's interpreter runs the kernels.

A wait is a Python loop here, ahead of the kernel's own, which then finds what it waited for. Everything else is what runs on GPUs: the
host's calls, the fixed rows, the flags and their epochs, ranks at any distance. What it cannot show is how a GPU orders memory.
"""

import contextlib
import pathlib
import random
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import triton.language as tl

from rampwrap.ep import gathered, layout, terms
from rampwrap.ep.board import Board
from rampwrap.ep.gathered import Gathered
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.shared import Shared
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import local_ids
from rampwrap.kernels.common.reference import quantise
from rampwrap.kernels.ep import bulk, combine, flags, marked

SHAPE = MoEShape(12, 3, 128, 128)
MOST = 4
PATIENCE_S = 30.0


wait_of_the_kernel = flags.await_cells


def await_cells(cells_ptr: Any, header_ptr: Any, fault_ptr: Any, epoch: Any, *rest: Any) -> None:
    """`flags.await_cells`, after all wanted cells hold the epoch or patience ends."""
    wanted, lanes = rest[1], rest[4]
    start, lane = time.monotonic(), tl.arange(0, int(lanes))
    while time.monotonic() - start < PATIENCE_S:
        cells = tl.load(cells_ptr + lane, mask=wanted, other=0).handle.data
        if (cells >> 32 == epoch.handle.data)[wanted.handle.data.astype(bool)].all():
            break
        time.sleep(1e-4)
    wait_of_the_kernel(cells_ptr, header_ptr, fault_ptr, epoch, *rest)


class Handle:
    """Stands for that of torch's symmetric memory."""

    def __init__(self, every: list[torch.Tensor]) -> None:
        self._every = every

    def get_buffer(self, rank: int, size: tuple[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        return self._every[rank][offset : offset + size[0]]


class Mapped:
    """Stands for `Shared.mapped`: the memory of a rank is a file that all of them map."""

    def __init__(self, folder: str) -> None:
        self._folder, self._number = pathlib.Path(folder), 0

    def __call__(self, group: dist.ProcessGroup, num_bytes: int, device: torch.device, board: Board) -> Shared:
        self._number += 1
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        files = [str(self._folder / f"{self._number}-{its}") for its in range(ranks)]
        torch.from_file(files[rank], shared=True, size=num_bytes, dtype=torch.uint8).zero_()
        board.exchange("zeroed", None)
        every = [torch.from_file(its, shared=True, size=num_bytes, dtype=torch.uint8) for its in files]
        return Shared(every[rank], [its.data_ptr() for its in every], Handle(every))


def emulated(folder: str) -> Any:
    """A context in which ranks share memory so."""
    zeros = torch.zeros
    patches: list[Any] = [
        mock.patch.object(module, "await_cells", await_cells) for module in (flags, combine, bulk, marked)
    ]
    patches += [
        mock.patch.object(Shared, "mapped", Mapped(folder)),
        mock.patch.object(terms, "apart", lambda *_: None),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(torch, "zeros", lambda *its, pin_memory=False, **more: zeros(*its, **more)),
        mock.patch.object(layout, "CELLS", 2),
        mock.patch.object(gathered, "CELLS", 2),
    ]
    stack = contextlib.ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack


def brought(count: int, seed: int, quantised: bool) -> dict[str, torch.Tensor]:
    """Of one rank; ids out of range go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, SHAPE.num_experts + 1, (count, SHAPE.top_k), generator=generator)
    hidden = torch.randn(count, SHAPE.hidden_size, generator=generator).bfloat16()
    its = {"topk_ids": ids, "topk_weights": torch.rand(count, SHAPE.top_k, generator=generator)}
    if not quantised:
        return its | {"hidden_states": hidden}
    rows, scales = quantise(hidden)
    return its | {"hidden_states": rows, "scales": scales}


def slots(**its: torch.Tensor) -> torch.Tensor:
    """bf16 [N, top_k, H]: a kernel that gives one row a slot, NaN for the experts of other ranks."""
    rows, ids, local = its["hidden_states"].float(), its["topk_ids"], its["expert_map"]
    here = local_ids(ids, local) >= 0
    return torch.where(here[:, :, None], (rows[:, None] * (ids[:, :, None] + 1)).bfloat16(), torch.nan)


def summed(*, out: torch.Tensor | None = None, **its: torch.Tensor) -> torch.Tensor:
    """bf16 [N, H]: one that adds them up, in `out` where it is given, NaN in rows without a local expert."""
    each = slots(**its)
    total = torch.nansum(its["topk_weights"][:, :, None] * each.float(), 1)
    total = torch.where(each.isnan().all(1), torch.nan, total).bfloat16()
    return total if out is None else out.copy_(total)


summed.stores_once = True  # type: ignore[attr-defined]


def steps(group: dist.ProcessGroup, folder: str, rounds: int) -> int:
    """Steps of any counts by shared memory beside those by collectives, bit for bit; how many ran."""
    rank, ranks, done = dist.get_rank(group), dist.get_world_size(group), 0
    same, own = random.Random(1), random.Random(rank)
    with emulated(folder):
        for payload, partials, masked, more in (
            ("bf16", "bf16", False, {}),
            ("fp8", "fp32", True, {"by_source_tokens": 3, "by_source": True}),
            ("bf16", "bf16", False, {"by_source_tokens": 2, "by_source": True}),
        ):
            options: dict[str, Any] = {
                "payload": payload,
                "partials": partials,
                "device": "cpu",
                "timeout_s": PATIENCE_S,
            }
            with (
                ExpertParallel(group, SHAPE, MOST, backend="symmetric", masked=masked, **options, **more) as ours,
                ExpertParallel(group, SHAPE, MOST, backend="collectives", **options) as theirs,
            ):
                for number in range(rounds):
                    counts = [same.randrange(MOST + 1) for _ in range(ranks)]
                    its = brought(counts[rank], 100 * number + rank, payload == "fp8")
                    outs = []
                    for ep in (theirs, ours):
                        if own.random() < 0.3:
                            time.sleep(own.random() * 0.01)
                        if number % 3 == 1:
                            received = ep.dispatch(**its, tokens_per_rank=counts)
                            outs.append(ep.combine(received.through(slots, torch.bfloat16, {})))
                        else:
                            outs.append(ep.layer((slots, None, summed)[number % 3], **its, tokens_per_rank=counts))
                    assert torch.equal(*outs), (payload, number, counts)
                    done += 1
                ours.check()
    return done


def rows(group: dist.ProcessGroup, folder: str, rounds: int) -> int:
    """Rows to every rank and sums back, as all ranks know them; how many rounds ran."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    same = random.Random(2)
    with emulated(folder):
        sizes = {"token_bytes": 512, "hidden_size": 64, "dtype": torch.bfloat16, "max_tokens_per_rank": MOST}
        ours = Gathered.open(group, torch.device("cpu"), timeout_s=PATIENCE_S, **sizes)  # type: ignore[arg-type]
        for number in range(rounds):
            counts = [same.randrange(MOST + 1) for _ in range(ranks)]
            generator = torch.Generator().manual_seed(number)
            each = [torch.randn(count, 64, generator=generator).bfloat16() for count in counts]
            ids = [torch.randint(0, 9, (count, 3), generator=generator) for count in counts]
            y = [torch.randn(sum(counts), 64, generator=generator).bfloat16() for _ in counts]
            found = ours.gather([each[rank], ids[rank]], counts)
            assert torch.equal(found[0], torch.cat(each)) and torch.equal(found[1], torch.cat(ids)), (number, counts)
            total = torch.zeros(sum(counts), 64)
            for its in y:
                total += its.float()
            assert torch.equal(ours.scatter(y[rank], counts), total.bfloat16().split(counts)[rank]), (number, counts)
        assert ours.fault() is None
        dist.barrier(group)
    return rounds
