"""Dispatch and combine of others beside ours, steps of low latency, on the GPUs of one host.

    python benchmarks/ep_rivals.py --ranks 2 --flashinfer LIBRARY.so --out FILE.json

ours        given rows, in FP8 with their scales as they are; ids and weights travel with them
NCCL        all-gather of the same fields, reduce-scatter of the sums: what engines do by default
FlashInfer  its one-sided all-to-all, same fields; sums are read where the experts would leave them, in its workspace, which
            spares it a copy. `ep_flashinfer.py` says how its library is made
vdev_2d     torch's all_to_all_vdev_2d over NVSHMEM, there and back: a row for each slot, sorted by expert, bf16 alone. Sorting
            before it and adding up after it are not counted, and neither are ids and weights. It takes at most 16 experts a rank

All route alike, over 16 experts a rank. All are captured in CUDA graphs of as many steps; a time is the median over replays, on
the slowest rank. Those of one process take turns. Memory of a process is CUDA's or NVSHMEM's, so that vdev_2d runs in processes
of its own afterwards, beside NCCL, which shows how far the two compare. Results are exact: rows are small whole numbers, a rank's
experts multiply them by its number, and the sums are compared before and after timing. NVLink multicast is off everywhere.
Whoever cannot run is left out with the reason. With --device cpu ours and NCCL's part run over gloo, to show that they run.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist
from common import stamp
from ep_flashinfer import OneSided
from ep_ranks import STEPS, Gathered, Timed, in_time, in_turn, joined, slowest, start

from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.received import Received
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8

EXPERTS = 16
"Of a rank."
HEADERS = {
    "near": "H    payload tokens | ours us spread | NCCL us spread  slower | FlashInfer us spread  slower",
    "far": "H    payload tokens | vdev_2d us spread  slower | NCCL us spread  slower, than ours in other processes",
}
LATE_S = 12.0
"After so many seconds more, processes say where they are, and end."
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
ALONE = {"NVSHMEM_REMOTE_TRANSPORT": "none", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo"}
"NVSHMEM without a network."

Row = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep_rivals.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[2048, 7168])
    parser.add_argument("--payload", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--flashinfer", type=pathlib.Path, metavar="LIBRARY")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=[600, 600], help="of ours and of vdev_2d, after which no row is begun"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


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
        counts = its.view("received", torch.int32, its.ranks)
        there = torch.arange(len(batch.ids), device=counts.device) < counts[:, None]
        # Behind the last row of a source stands anything.
        ids, weights = (torch.where(there[:, :, None], x, -1) for x in received[-2:])
        weights = torch.where(there[:, :, None], weights, -0.5)
        assert bool(((ids // EXPERTS == its.rank).any(2) == there).all()), "FlashInfer: rows of experts elsewhere came"
        y = batch.y([*received[:-2], ids, weights], "FlashInfer")
        its.view("y", torch.bfloat16, *y.shape).copy_(y)
        its.combine(self._out.fill_(torch.nan))
        batch.check(self._out, "FlashInfer")


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


class Launched(Timed):
    """Steps behind each other without a graph, for what cannot be captured: the host's part may show."""

    def us(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(STEPS):
            self._call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / STEPS


def timed(group: dist.ProcessGroup, sides: dict[str, Side], its: argparse.Namespace) -> Row:
    """Microseconds of each, checked before and after."""
    for side in sides.values():
        side.check()
    graphs: dict[str, Timed] = {}
    for name, side in sides.items():
        plain = name == "vdev" and not its.graphs
        graphs[name] = Launched(group, side.call, False) if plain else Timed(group, side.call, its.device == "cuda")
    found: Row = in_turn(group, graphs, its.replays)
    for side in sides.values():
        side.check()
    return found


def near(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """Ours, NCCL and FlashInfer: a row for each hidden size, payload and number of tokens; the same on every rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    most, experts = max(its.tokens), ranks * EXPERTS
    one_sided = None
    if its.flashinfer:
        widest = max(its.hidden_size)
        size = 2 * widest + 8 * its.top_k
        one_sided = OneSided(its.flashinfer, group, most, experts, its.top_k, size, 2 * widest, device)
    for hidden_size in its.hidden_size:
        for payload in its.payload:
            shape = MoEShape(experts, its.top_k, hidden_size, 128)
            backend = "symmetric" if device.type == "cuda" else "collectives"
            with ExpertParallel(group, shape, most, payload=payload, backend=backend, device=device) as ep:
                for tokens in its.tokens:
                    if not in_time(group, until):
                        return
                    batch = Batch.drawn(rank, ranks, tokens, hidden_size, its.top_k, payload, device)
                    sides: dict[str, Side] = {"ours": Ours(ep, batch), "nccl": Nccl(group, batch)}
                    if one_sided is not None:
                        sides["flashinfer"] = FlashInfer(one_sided, batch)
                    row = {"hidden_size": hidden_size, "payload": payload, "tokens": tokens}
                    yield row | timed(group, sides, its)


def far(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """vdev_2d and NCCL, bf16."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for hidden_size in its.hidden_size:
        vdev = Vdev(group, max(its.tokens), its.top_k, hidden_size, device)
        for tokens in its.tokens:
            if not in_time(group, until):
                return
            batch = Batch.drawn(rank, ranks, tokens, hidden_size, its.top_k, "bf16", device)
            sides: dict[str, Side] = {"vdev": vdev.of(batch), "nccl": Nccl(group, batch)}
            row = {"hidden_size": hidden_size, "payload": "bf16", "tokens": tokens, "graphs": its.graphs}
            yield row | timed(group, sides, its)


def serve(rank: int, its: argparse.Namespace) -> None:
    begun = time.monotonic()
    group, device = joined(rank, its)
    if its.side == "far":
        import torch.distributed._symmetric_memory as symmetric_memory

        symmetric_memory.set_backend("NVSHMEM")
    for row in {"near": near, "far": far}[its.side](group, its, device, begun + its.limit_s - LATE_S):
        if not rank:  # after each row: what was measured stays, whatever comes
            with its.rows.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    slowest(group, {})
    its.done.touch()
    if its.side == "far":
        os._exit(0)  # NVSHMEM is not asked to end
    dist.destroy_process_group()


@attrs.frozen
class Attempt:
    """A set of processes; one that is a second try runs only where the first of its name failed."""

    side: str
    what: str
    reason: str | None = None
    graphs: bool = True
    flashinfer: bool = True
    again: bool = False


def attempts(its: argparse.Namespace) -> Iterator[Attempt]:
    """What is tried, in this order, or the reason why not."""
    yield Attempt("near", "ours, NCCL" + (", FlashInfer" if its.flashinfer else ""))
    if its.flashinfer:
        yield Attempt("near", "ours, NCCL", flashinfer=False, again=True)
    if its.device == "cpu":
        yield Attempt("far", "vdev_2d", "it needs GPUs")
        return
    import torch.distributed._symmetric_memory as symmetric_memory

    if not symmetric_memory.is_nvshmem_available():
        yield Attempt("far", "vdev_2d", "this torch finds no NVSHMEM")
        return
    yield Attempt("far", "vdev_2d in graphs")
    yield Attempt("far", "vdev_2d without graphs", graphs=False, again=True)


def run(its: argparse.Namespace, said: Callable[[str], None]) -> Row:
    """Everything that can run; rows by the name of the set, and why what is missing is missing."""
    found: Row = {**stamp(), "ranks": its.ranks, "near": [], "far": [], "left_out": {}}
    left_out, failed, library = found["left_out"], set(), its.flashinfer
    if library is None:
        left_out["FlashInfer"] = "no --flashinfer LIBRARY was given"
    with tempfile.TemporaryDirectory() as folder:
        for number, attempt in enumerate(attempts(its)):
            if attempt.again and attempt.side not in failed:
                continue
            its.side, its.graphs, its.flashinfer = attempt.side, attempt.graphs, library if attempt.flashinfer else None
            its.rows, reason = pathlib.Path(folder, str(number)), attempt.reason
            its.done = its.rows.with_suffix(".done")
            its.limit_s = its.seconds[attempt.side == "far"] + LATE_S
            its.rows.touch()
            if reason is None:
                try:
                    start(serve, its)
                except Exception as error:  # a process that raised, exited or was ended
                    last = [line for line in str(error).splitlines() if line.strip()]
                    reason = None if its.done.exists() else (last[-1] if last else type(error).__name__)[:300]
                if reason is not None:
                    failed.add(attempt.side)
            rows = [json.loads(line) for line in its.rows.read_text(encoding="utf-8").splitlines()]
            if len(rows) >= len(found[attempt.side]):
                found[attempt.side] = rows
            if reason is not None:
                left_out[attempt.what] = reason
                said(f"{attempt.what}: {reason}")
            if rows:
                said(table(attempt.side, found))
            if its.out:
                its.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def table(side: str, found: Row) -> str:
    """What a set of processes measured."""
    ours = {_key(row): row["ours_us"] for row in found["near"]}
    return "\n".join([HEADERS[side], *(line(row, ours.get(_key(row), math.nan)) for row in found[side])])


def _key(row: Row) -> tuple[Any, ...]:
    return row["hidden_size"], row["payload"], row["tokens"]


def line(row: Row, ours: float) -> str:
    """A row under one of the `HEADERS`; `ours` in microseconds."""
    first, *others = [name.removesuffix("_us") for name in row if name.endswith("_us")]
    parts = [f"{row['hidden_size']:<5d}{row['payload']:7s}{row['tokens']:7d}"]
    for name in (first, *others):
        us, spread = row[f"{name}_us"], row[f"{name}_spread"]
        parts.append(f" |{us:8.1f}{spread:7.0%}" + ("" if name == "ours" else f"{us / ours:7.2f}x"))
    return "".join(parts) + ("" if row.get("graphs", True) else "  without graphs")


def main() -> int:
    its = arguments().parse_args()
    os.environ |= MULTICAST_OFF | {name: os.environ.get(name, value) for name, value in ALONE.items()}
    if its.flashinfer:
        its.flashinfer = its.flashinfer.resolve(strict=True)
    found = run(its, functools.partial(print, flush=True))
    return 0 if found["near"] else 1


if __name__ == "__main__":
    sys.exit(main())
