"""P, what runs before the first GEMM of a CuTe layer, by itself: alignment and quantisation in one launch, in two, or apart.

    python benchmarks/prepare.py --out OUT.json

one N    one launch, N groups of 128 columns for each CTA that quantises; up to 4096 slots
two N    counting and quantising in one launch, placing in the second
apart    quantisation and the alignment, launches of their own

In graphs of many calls, so a launch may begin while its own kind ends: in a layer the next launch is a GEMM, which needs whole
SMs, and differences are smaller (`kernels/cute/NOTES.md`, 9). Every way is checked against the others before it is timed.
"""

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

import torch
from common import interleaved, stamp

from rampwrap.kernels.cute.host import prepare as preparing
from rampwrap.kernels.triton.align.host import BY_EXPERT_MAX_SLOTS, align_tokens, allocate_blocks
from rampwrap.kernels.triton.quantise import quantise_rows
from rampwrap.measure.graph_timer import GraphTimer
from rampwrap.measure.timer import HostTimer, Timer

TOP_K, BLOCK_M = 8, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ways:
    """The ways to prepare one batch, by name."""

    def __init__(self, num_tokens: int, num_experts: int, hidden_size: int, fp8: bool, groups: list[int]) -> None:
        self.x = torch.randn(num_tokens, hidden_size, device=DEVICE).bfloat16()
        self.ids = torch.rand(num_tokens, num_experts, device=DEVICE).topk(TOP_K).indices.int()
        self.blocks = allocate_blocks(num_tokens, TOP_K, num_experts, BLOCK_M, DEVICE)
        q = torch.empty(self.x.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
        self.quantised = (q, torch.empty(num_tokens, hidden_size // 128, device=DEVICE)) if fp8 else None
        few = num_tokens * TOP_K <= BY_EXPERT_MAX_SLOTS
        self.calls = {f"one {each}": functools.partial(self.together, True, each) for each in groups if few}
        self.calls |= {f"two {each}": functools.partial(self.together, False, each) for each in groups}
        self.calls["apart"] = self.apart

    def together(self, one: bool, groups: int) -> None:
        """As a layer does it, but for the number of launches and groups."""
        kept = preparing.fits_one_launch, preparing.GROUPS, preparing.GROUPS_BEHIND
        preparing.fits_one_launch = lambda *_: one
        preparing.GROUPS = preparing.GROUPS_BEHIND = groups
        experts = self.blocks.expert_counts.numel()
        preparing.prepare(self.x, self.quantised, None, self.ids, BLOCK_M, experts, expert_map=None, memory=self.blocks)
        preparing.fits_one_launch, preparing.GROUPS, preparing.GROUPS_BEHIND = kept

    def apart(self) -> None:
        """Each by itself."""
        if self.quantised is not None:
            quantise_rows(self.x, *self.quantised)
        align_tokens(self.ids, BLOCK_M, self.blocks.expert_counts.numel(), blocks=self.blocks)

    def wrong(self) -> list[str]:
        """Ways that leave other bits than the last one, on poisoned memory."""

        def left(call: Any) -> list[torch.Tensor]:
            written = [self.blocks.sorted_token_ids, self.blocks.expert_counts, self.blocks.num_tokens_post_padded]
            written += [its.view(torch.uint8) for its in self.quantised or ()]
            for tensor in written:
                tensor.fill_(77)
            call()
            return [tensor.clone() for tensor in written]

        wanted = left(self.apart)
        same = {
            name: all(torch.equal(*pair) for pair in zip(left(call), wanted, strict=True))
            for name, call in self.calls.items()
        }
        return [name for name, good in same.items() if not good]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-experts", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--dtype", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16"])
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    timer: Timer = GraphTimer(0, 0) if DEVICE == "cuda" else HostTimer()
    rows, failed = [], False
    for num_experts in a.num_experts:
        for num_tokens in a.tokens:
            for dtype in a.dtype:
                ways = Ways(num_tokens, num_experts, a.hidden_size, dtype == "fp8", a.groups)
                wrong = ways.wrong()
                failed = failed or bool(wrong)
                us = interleaved(timer, {k: [call] for k, call in ways.calls.items() if k not in wrong}, a.rounds)
                rows.append(
                    {"num_experts": num_experts, "tokens": num_tokens, "dtype": dtype, "us": us, "wrong": wrong}
                )
                said = "  ".join(f"{name} {value:.2f}" for name, value in us.items())
                print(
                    f"E={num_experts} {num_tokens:5d} {dtype:4s}  {said}  {'WRONG: ' + ', '.join(wrong) if wrong else ''}"
                )
    if a.out is not None:
        a.out.write_text(json.dumps(stamp() | {"rows": rows}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
