"""Dispatch and combine of others beside ours, steps of low latency, on the GPUs of one host.

    python benchmarks/ep_rivals.py --ranks 2 --flashinfer LIBRARY.so --deepep LIBRARY.so --nccl-ep FOLDER --out FILE.json

ours        given rows, in FP8 with their scales as they are; ids and weights travel with them
NCCL        all-gather of the same fields, reduce-scatter of the sums: what engines do by default
FlashInfer  its one-sided all-to-all, same fields; sums are read where the experts would leave them, in its workspace, which
            spares it a copy. `ep_flashinfer.py` says how its library is made
DeepEP      V1's intranode kernels, made for prefill, same fields (`ep_deepep.py`)
vdev_2d     torch's all_to_all_vdev_2d over NVSHMEM, there and back: a row for each slot, sorted by expert, bf16 alone. Sorting
            before it and adding up after it are not counted, and neither are ids and weights. It takes at most 16 experts a rank
NCCL EP     its kernels of low latency, same fields, rows by rank, written in place where that works (`ep_nccl_ep.py`)

All route alike, over 16 experts a rank. All are captured in CUDA graphs of as many steps; a time is the median over replays, on
the slowest rank. Those of one process take turns. Memory of a process is CUDA's or NVSHMEM's, so that vdev_2d runs in processes
of its own afterwards, beside NCCL, which shows how far the two compare. Results are exact: rows are small whole numbers, a rank's
experts multiply them by its number, and the sums are compared before and after timing. NVLink multicast is off everywhere.
NCCL EP has processes of its own too, over the NCCL that it needs: ours and NCCL are timed there again and take turns with it.
Whoever cannot run is left out with the reason. With --device cpu ours and NCCL's part run over gloo, to show that they run.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
import torch.distributed as dist
from common import stamp
from ep_deepep import Intranode
from ep_flashinfer import OneSided
from ep_nccl_ep import LowLatency, environment
from ep_ranks import STEPS, Timed, in_time, in_turn, joined, slowest, start
from ep_sides import EXPERTS, Batch, DeepEp, FlashInfer, Nccl, NcclEp, Ours, Side, Vdev

from rampwrap.ep.group import ExpertParallel
from rampwrap.kernel.shape import MoEShape

HEADER = "H    payload tokens | {}, and how many times as long as ours{}"
LATE_S = 12.0
"After so many seconds more, processes say where they are, and end."
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
ALONE = {"NVSHMEM_REMOTE_TRANSPORT": "none", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo"}
"NVSHMEM without a network."

LIBRARIES = {"flashinfer": "FlashInfer", "deepep": "DeepEP", "nccl_ep": "NCCL EP"}
SIDES = ("near", "far", "newer")
"Sets of processes: of most, of vdev_2d over NVSHMEM, of NCCL EP over a newer NCCL."

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
    parser.add_argument("--deepep", type=pathlib.Path, metavar="LIBRARY")
    parser.add_argument("--nccl-ep", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="the sets of processes that run")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=2,
        default=[600, 600],
        help="of others and of vdev_2d, after which no row is begun",
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


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


def near(
    group: dist.ProcessGroup,
    its: argparse.Namespace,
    device: torch.device,
    until: float,
    more: Callable[[Batch], dict[str, Side]] = lambda batch: {},
) -> Iterator[Row]:
    """Ours, NCCL, what was given and `more`: a row for each hidden size, payload and number of tokens; same on all ranks."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    most, experts = max(its.tokens), ranks * EXPERTS
    widest = 2 * max(its.hidden_size)
    if its.flashinfer:
        one_sided = OneSided(its.flashinfer, group, most, experts, its.top_k, widest + 8 * its.top_k, widest, device)
    if its.deepep:
        intranode = Intranode(its.deepep, group, experts, its.top_k, widest, device)
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
                    if its.flashinfer:
                        sides["flashinfer"] = FlashInfer(one_sided, batch)
                    if its.deepep:
                        sides["deepep"] = DeepEp(intranode, batch)
                    sides |= more(batch)
                    row = {"hidden_size": hidden_size, "payload": payload, "tokens": tokens}
                    yield row | timed(group, sides, its)


def newer(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """Ours, NCCL and NCCL EP, as `near`."""
    sizes = {"num_experts": dist.get_world_size(group) * EXPERTS, "top_k": its.top_k}
    sizes |= {"most_tokens": max(its.tokens), "row_bytes": 2 * max(its.hidden_size)}
    low_latency = LowLatency(its.nccl_ep, group, device, in_place=its.in_place, **sizes)
    return near(group, its, device, until, lambda batch: {"nccl_ep": NcclEp(low_latency, batch)})


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
    rows = {"near": near, "far": far, "newer": newer}[its.side]
    for row in rows(group, its, device, begun + its.limit_s - LATE_S):
        if not rank:  # after each row: what was measured stays, whatever comes
            with its.rows.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    slowest(group, {})
    its.done.touch()
    if its.side != "near":
        os._exit(0)  # NVSHMEM and NCCL EP's communicator are not asked to end
    dist.destroy_process_group()


@attrs.frozen
class Attempt:
    """A set of processes; one that is a second try runs only where those of its name before it failed."""

    side: str
    what: str
    reason: str | None = None
    graphs: bool = True
    libraries: tuple[str, ...] = ()
    again: bool = False
    in_place: bool = True


def attempts(its: argparse.Namespace) -> Iterator[Attempt]:
    """What is tried, in this order, or the reason why not."""
    given = tuple(name for name in ("flashinfer", "deepep") if getattr(its, name) is not None)
    tries = [given, *((name,) for name in given if len(given) > 1), *([()] if given else [])]
    for number, some in enumerate(tries):
        yield Attempt(
            "near", ", ".join(["ours", "NCCL", *(LIBRARIES[its] for its in some)]), None, True, some, number > 0
        )
    reason = "it needs GPUs" if its.device == "cpu" else None
    yield from _of_far(reason)
    if its.nccl_ep is not None:
        yield Attempt("newer", "NCCL EP, rows in place", reason, libraries=("nccl_ep",))
        yield Attempt("newer", "NCCL EP, rows copied", reason, libraries=("nccl_ep",), again=True, in_place=False)


def _of_far(reason: str | None) -> Iterator[Attempt]:
    import torch.distributed._symmetric_memory as symmetric_memory

    if reason is None and not symmetric_memory.is_nvshmem_available():
        reason = "this torch finds no NVSHMEM"
    if reason is not None:
        yield Attempt("far", "vdev_2d", reason)
        return
    yield Attempt("far", "vdev_2d in graphs")
    yield Attempt("far", "vdev_2d without graphs", graphs=False, again=True)


@contextlib.contextmanager
def begun_with(variables: dict[str, str]) -> Iterator[None]:
    """What processes begun meanwhile find in their environment."""
    before = dict(os.environ)
    os.environ |= variables
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def run(its: argparse.Namespace, said: Callable[[str], None]) -> Row:
    """Everything that can run; rows by the name of the set, and why what is missing is missing."""
    found: Row = {**stamp(), "ranks": its.ranks, **{side: [] for side in its.sides}, "left_out": {}}
    left_out, failed = found["left_out"], dict.fromkeys(SIDES, False)
    libraries = {name: getattr(its, name) for name in LIBRARIES}
    for name in (name for name in LIBRARIES if libraries[name] is None):
        left_out[LIBRARIES[name]] = f"no --{name.replace('_', '-')} was given"
    with tempfile.TemporaryDirectory() as folder:
        for number, attempt in enumerate([*attempts(its)]):
            if attempt.side not in its.sides or (attempt.again and not failed[attempt.side]):
                continue
            for name, library in libraries.items():
                setattr(its, name, library if name in attempt.libraries else None)
            its.side, its.graphs, its.in_place, reason = attempt.side, attempt.graphs, attempt.in_place, attempt.reason
            its.rows, its.done = (pathlib.Path(folder, f"{number}.{name}") for name in ("rows", "done"))
            its.limit_s = its.seconds[attempt.side == "far"] + LATE_S
            its.rows.touch()
            if reason is None:
                try:
                    with begun_with(environment(its.nccl_ep) if its.nccl_ep else {}):
                        start(serve, its)
                except Exception as error:  # a process that raised, exited or was ended
                    last = [line for line in str(error).splitlines() if line.strip()]
                    reason = None if its.done.exists() else (last[-1] if last else type(error).__name__)[:300]
                failed[attempt.side] = reason is not None
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
    ours = {_key(row): row["ours_us"] for row in [*found.get("near", []), *found[side]] if "ours_us" in row}
    its = found[side][0]
    names = ", ".join(name.removesuffix("_us") for name in its if name.endswith("_us"))
    header = HEADER.format(f"us and spread of {names}", " in other processes" if side == "far" else "")
    return "\n".join([header, *(line(row, ours.get(_key(row), math.nan)) for row in found[side])])


def _key(row: Row) -> tuple[Any, ...]:
    return row["hidden_size"], row["payload"], row["tokens"]


def line(row: Row, ours: float) -> str:
    """A row under `HEADER`; `ours` in microseconds."""
    first, *others = [name.removesuffix("_us") for name in row if name.endswith("_us")]
    parts = [f"{row['hidden_size']:<5d}{row['payload']:7s}{row['tokens']:7d}"]
    for name in (first, *others):
        us, spread = row[f"{name}_us"], row[f"{name}_spread"]
        parts.append(f" |{us:8.1f}{spread:7.0%}" + ("" if name == "ours" else f"{us / ours:7.2f}x"))
    return "".join(parts) + ("" if row.get("graphs", True) else "  without graphs")


def main() -> int:
    its = arguments().parse_args()
    os.environ |= MULTICAST_OFF | {name: os.environ.get(name, value) for name, value in ALONE.items()}
    for name in LIBRARIES:
        if getattr(its, name) is not None:
            setattr(its, name, getattr(its, name).resolve(strict=True))
    found = run(its, functools.partial(print, flush=True))
    return 0 if found[its.sides[0]] else 1


if __name__ == "__main__":
    sys.exit(main())
