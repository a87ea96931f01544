"""torch's all_to_all_vdev_2d beside dispatch and combine of ours, on the GPUs of one host that NVSHMEM reaches.

    python benchmarks/ep_vdev.py --ranks 2 --out FILE.json

The operator sends a row for each slot, sorted by expert: top_k rows a token where ours sends one to each rank. It takes at most 16 experts
a rank and no scales beside the rows, so rows are bf16 and there are 16 experts a rank. Sorting the rows before it and adding them up
after it is not counted. Its symmetric memory comes from NVSHMEM, ours from CUDA, and a process has one of the two: each side runs in
processes of its own, one after the other, in CUDA graphs of as many steps. Ours is beside NCCL as in `ep.py`.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import ep
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from common import stamp
from ep_ranks import Timed, in_turn, joined, start

EXPERTS = 16
"Of a rank, the most that the operator takes."
HEADER = "H    tokens | ours us  vdev_2d us  faster |  NCCL us  faster"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ep_vdev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[2048, 7168])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit-s", type=float, default=300.0, help="of each side")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    return parser


def rivals(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each hidden size and number of tokens: there and back, checked."""
    ranks, name = dist.get_world_size(group), group.group_name
    num_experts, most = ranks * EXPERTS, max(its.tokens) * its.top_k
    ops = torch.ops.symm_mem
    for hidden_size in its.hidden_size:
        made = [
            symmetric_memory.empty(size, dtype=dtype, device=device)
            for size, dtype in (
                ((most, hidden_size), torch.bfloat16),
                ((ranks * most, hidden_size), torch.bfloat16),
                ((most, hidden_size), torch.bfloat16),
                ((num_experts,), torch.int64),
                ((2, num_experts), torch.int64),
                ((2, num_experts), torch.int64),
            )
        ]
        for tensor in made:
            symmetric_memory.rendezvous(tensor, name)
        sent, received, back, splits, where, home = made
        for tokens in its.tokens:
            generator = torch.Generator().manual_seed(tokens * ranks + dist.get_rank(group))
            ids = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, : its.top_k].flatten()
            splits.copy_(torch.bincount(ids, minlength=num_experts))
            sent.copy_(torch.randn(sent.shape, generator=generator).bfloat16())
            back.zero_()
            torch.cuda.synchronize()
            dist.barrier(group)

            def call(
                sent: Any = sent, received: Any = received, back: Any = back, its: Any = (splits, where, home)
            ) -> None:
                ops.all_to_all_vdev_2d(sent, received, its[0], its[1], name)
                ops.all_to_all_vdev_2d_offset(received, back, its[1], its[2], name)

            found = in_turn(group, {"vdev": Timed(group, call, True)}, its.replays)
            rows = tokens * its.top_k
            assert torch.equal(back[:rows], sent[:rows]), f"{tokens} tokens did not come back as they were sent"
            yield {"hidden_size": hidden_size, "tokens": tokens} | found


def serve(rank: int, its: argparse.Namespace) -> None:
    group, device = joined(rank, its)
    if its.side == "vdev":
        symmetric_memory.set_backend("NVSHMEM")
        rows = list(rivals(group, its, device))
    else:
        rows = list(ep.phases(group, its, device, math.inf))
    if not rank:
        its.rows.write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def line(ours: dict[str, Any], vdev: dict[str, Any]) -> str:
    """A row of both sides under `HEADER`."""
    times = [vdev["vdev_us"], ours["rival_us"]]
    faster = [us / ours["ours_us"] for us in times]
    return (
        f"{ours['hidden_size']:<5d}{ours['tokens']:6d} |{ours['ours_us']:8.1f}{times[0]:12.1f}{faster[0]:7.2f}x |"
        f"{times[1]:9.1f}{faster[1]:7.2f}x"
    )


def main() -> int:
    its = arguments().parse_args()
    if its.device == "cpu" or not symmetric_memory.is_nvshmem_available():
        print("all_to_all_vdev_2d needs GPUs and a torch with NVSHMEM; this is neither or lacks one.", file=sys.stderr)
        return 1
    its.payload, its.num_experts = ["bf16"], its.ranks * EXPERTS
    # Without NVLink multicast, and without a network.
    os.environ |= {"NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_REMOTE_TRANSPORT": "none"}
    found: dict[str, Any] = stamp()
    with tempfile.TemporaryDirectory() as folder:
        for its.side in ("ours", "vdev"):
            its.rows = pathlib.Path(folder, its.side)
            start(serve, its)
            found[its.side] = json.loads(its.rows.read_text(encoding="utf-8"))
            if its.out:
                its.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(HEADER)
    mine = {(row["hidden_size"], row["tokens"]): row for row in found["ours"]}
    for row in found["vdev"]:
        print(line(mine[row["hidden_size"], row["tokens"]], row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
