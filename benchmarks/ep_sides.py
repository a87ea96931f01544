"""Ways there and back of `ep_rivals.py`, each of which checks its sums exactly."""

from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist
from ep_deepep import Intranode
from ep_flashinfer import OneSided
from ep_nccl_ep import LowLatency
from ep_ranks import Gathered

from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.received import Received
from rampwrap.kernels.common.operands import FP8

EXPERTS = 16
"Of a rank."


@attrs.frozen(eq=False)
class Batch:
    """What a rank sends, and the sums that it must get back.

    Attributes:
        fields: rows, scales where rows are e4m3, topk_ids, topk_weights: half their id, which tells where they came from.
        expected: bf16 [T, H], exact.
    """

    fields: list[torch.Tensor]
    expected: torch.Tensor
    rank: int

    @classmethod
    def drawn(
        cls, rank: int, ranks: int, tokens: int, hidden_size: int, top_k: int, payload: str, device: Any
    ) -> "Batch":
        generator = torch.Generator().manual_seed(tokens * ranks + rank)
        ids = torch.rand(tokens, ranks * EXPERTS, generator=generator).argsort(1)[:, :top_k].int().contiguous()
        hidden = torch.randint(-8, 9, (tokens, hidden_size), generator=generator).float()
        reached = (ids[:, :, None] // EXPERTS == torch.arange(ranks)).any(1)
        expected = hidden * (reached * (torch.arange(ranks) + 1)).sum(1, keepdim=True)
        fields = [hidden.bfloat16()]
        if payload == "fp8":
            scale = 2.0 ** (torch.arange(tokens) % 3)[:, None]
            fields, expected = [hidden.to(FP8), scale.repeat(1, hidden_size // 128).contiguous()], expected * scale
        fields += [ids, ids * 0.5]
        return cls([its.to(device) for its in fields], expected.bfloat16().to(device), rank)

    @property
    def ids(self) -> torch.Tensor:
        return self.fields[-2]

    def y(self, fields: list[torch.Tensor], what: str) -> torch.Tensor:
        """What this rank's experts give for received rows [..., H], 0 for rows of others: bf16.

        Raises:
            AssertionError: ids and weights are of different tokens.
        """
        rows, *scales, ids, weights = fields
        here = (ids // EXPERTS == self.rank).any(-1, keepdim=True)
        assert torch.equal((ids * 0.5)[here[..., 0]], weights[here[..., 0]]), f"{what}: weights are not of their ids"
        found = rows.float() * (self.rank + 1)
        for its in scales:
            found = found * its.repeat_interleave(128, -1)
        return torch.where(here, found, 0.0).bfloat16()

    def check(self, out: torch.Tensor, what: str) -> None:
        assert torch.equal(out, self.expected), f"{what}: sums of {len(out)} tokens are wrong on rank {self.rank}"


class Side(Protocol):
    """A way there and back."""

    def call(self) -> None:
        """One step."""

    def check(self) -> None:
        """One step, whose results must be exact."""


class Ours:
    """`ExpertParallel`."""

    def __init__(self, ep: ExpertParallel, batch: Batch) -> None:
        self._ep, self._batch = ep, batch
        self._out = torch.empty_like(batch.expected)
        self._counts = [len(batch.ids)] * ep.num_ranks
        rows, *scales, ids, weights = batch.fields
        self._given = (rows, ids, weights)
        self._scales = scales[0] if scales else None
        self._y = torch.zeros(ep.num_ranks * len(ids), rows.shape[1], dtype=torch.bfloat16, device=rows.device)

    def _there(self) -> Received:
        return self._ep.dispatch(*self._given, scales=self._scales, tokens_per_rank=self._counts)

    def call(self) -> None:
        self._there()
        self._ep.combine(self._y, out=self._out)

    def check(self) -> None:
        its = self._there()
        fields = [its.rows, *([] if its.scales is None else [its.scales]), its.topk_ids, its.topk_weights]
        self._y.copy_(self._batch.y(fields, "ours"))
        self._ep.combine(self._y, out=self._out.fill_(torch.nan))
        self._ep.check()
        self._batch.check(self._out, "ours")


class Nccl:
    """All-gather and reduce-scatter."""

    def __init__(self, group: dist.ProcessGroup, batch: Batch) -> None:
        self._gathered, self._batch = Gathered(group, batch.fields), batch
        self._out = torch.empty_like(batch.expected)
        size = (dist.get_world_size(group) * len(batch.ids), self._out.shape[1])
        self._y = torch.zeros(size, dtype=torch.bfloat16, device=self._out.device)

    def call(self) -> None:
        self._gathered.gather()
        self._gathered.scatter(self._y, self._out)

    def check(self) -> None:
        self._gathered.gather()
        self._y.copy_(self._batch.y(self._gathered.all, "NCCL"))
        self._gathered.scatter(self._y, self._out.fill_(torch.nan))
        self._batch.check(self._out, "NCCL")


class FlashInfer:
    """Its one-sided all-to-all."""

    def __init__(self, one_sided: OneSided, batch: Batch) -> None:
        self._its, self._batch = one_sided, batch
        self._out = torch.empty_like(batch.expected)

    def call(self) -> None:
        self._its.dispatch(self._batch.ids, self._batch.fields)
        self._its.combine(self._out)

    def check(self) -> None:
        its, batch = self._its, self._batch
        its.dispatch(batch.ids, batch.fields)
        received = its.rows(batch.fields)
        counts = its.mapped.view("received", torch.int32, its.ranks)
        there = torch.arange(len(batch.ids), device=counts.device) < counts[:, None]
        # Behind the last row of a source stands anything.
        ids, weights = (torch.where(there[:, :, None], x, -1) for x in received[-2:])
        weights = torch.where(there[:, :, None], weights, -0.5)
        assert bool(((ids // EXPERTS == its.rank).any(2) == there).all()), "FlashInfer: rows of experts elsewhere came"
        y = batch.y([*received[:-2], ids, weights], "FlashInfer")
        its.mapped.view("y", torch.bfloat16, *y.shape).copy_(y)
        its.combine(self._out.fill_(torch.nan))
        batch.check(self._out, "FlashInfer")


class DeepEp:
    """Its intranode kernels."""

    def __init__(self, intranode: Intranode, batch: Batch) -> None:
        rows, *scales, ids, weights = batch.fields
        self._step, self._batch = intranode.of(ids, [rows, *scales, weights]), batch
        self._out = torch.empty_like(batch.expected)
        self._y = torch.zeros(len(self._step.rows), rows.shape[1], dtype=torch.bfloat16, device=rows.device)

    def call(self) -> None:
        self._step.dispatch()
        self._step.combine(self._y, self._out)

    def check(self) -> None:
        step, batch = self._step, self._batch
        step.dispatch()
        there = torch.arange(len(step.rows), device=self._out.device) < step.count
        mine = step.ids >= 0
        assert bool((mine.any(1) == there).all()), "DeepEP: rows of experts elsewhere came"
        ids = torch.where(mine, step.ids + batch.rank * EXPERTS, -1)
        weights = torch.where(mine, step.weights, -0.5)
        self._y.copy_(batch.y([step.rows, *step.scales, ids, weights], "DeepEP"))
        step.combine(self._y, self._out.fill_(torch.nan))
        batch.check(self._out, "DeepEP")


class Vdev:
    """torch's all_to_all_vdev_2d and all_to_all_vdev_2d_offset, a row for each slot."""

    def __init__(self, group: dist.ProcessGroup, most_tokens: int, top_k: int, hidden_size: int, device: Any) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        ranks = dist.get_world_size(group)
        most, self._name = most_tokens * top_k, group.group_name
        wide, experts = torch.bfloat16, ranks * EXPERTS
        sizes = [
            ((most, hidden_size), wide),
            ((ranks * most + EXPERTS, hidden_size), wide),
            ((most, hidden_size), wide),
        ]
        sizes += [((experts,), torch.int64), ((2, experts), torch.int64), ((2, experts), torch.int64)]
        made = [symmetric_memory.empty(size, dtype=dtype, device=device) for size, dtype in sizes]
        for its in made:
            symmetric_memory.rendezvous(its, self._name)
        self._sent, self._received, self._back, self._splits, self._there, self._home = made

    def of(self, batch: Batch) -> "Vdev":
        """With the rows of a batch, sorted by expert."""
        order = batch.ids.flatten().argsort(stable=True)
        rows = batch.fields[0].repeat_interleave(batch.ids.shape[1], 0)[order]
        self._rows = len(rows)
        self._sent.zero_()[: self._rows] = rows
        self._splits.copy_(torch.bincount(batch.ids.flatten().long(), minlength=len(self._splits)))
        torch.cuda.synchronize()
        return self

    def call(self) -> None:
        ops = torch.ops.symm_mem
        ops.all_to_all_vdev_2d(self._sent, self._received, self._splits, self._there, self._name)
        ops.all_to_all_vdev_2d_offset(self._received, self._back, self._there, self._home, self._name)

    def check(self) -> None:
        self._received.fill_(torch.nan)
        self._back.fill_(torch.nan)
        torch.cuda.synchronize()
        dist.barrier()
        self.call()
        torch.cuda.synchronize()
        came = self._there[0].sum()
        assert int(self._received.isnan().all(1).logical_not().sum()) >= int(came), "vdev_2d: rows did not arrive"
        assert torch.equal(self._back[: self._rows], self._sent[: self._rows]), (
            "vdev_2d: rows did not come back as sent"
        )


class NcclEp:
    """Its kernels of low latency, rows by rank."""

    def __init__(self, low_latency: LowLatency, batch: Batch) -> None:
        rows, *scales, ids, weights = batch.fields
        self._its, self._step, self._batch = low_latency, low_latency.of(ids, [rows, *scales, weights]), batch
        self._out = torch.empty_like(batch.expected)
        self._y = torch.zeros(self._step.rows.shape, dtype=torch.bfloat16, device=rows.device)

    def call(self) -> None:
        self._step.dispatch()
        self._step.combine(self._y, self._out)

    def check(self) -> None:
        its, step, batch = self._its, self._step, self._batch
        step.dispatch()
        there = torch.arange(its.most_tokens, device=self._out.device) < its.counts[:, None]
        # Behind the last row of a source stands anything.
        ids = torch.where(there[:, :, None], its.ids, -1)
        assert bool(((ids >= 0).any(2) == there).all()), "NCCL EP: rows of experts elsewhere came"
        weights = torch.where(ids >= 0, its.weights, -0.5)
        self._y.copy_(batch.y([step.rows, *step.scales, ids, weights], "NCCL EP"))
        step.combine(self._y, self._out.fill_(torch.nan))
        batch.check(self._out, "NCCL EP")
