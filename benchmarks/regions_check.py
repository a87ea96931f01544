"""Are the performance regions right? Each prediction of `rampwrap.model.bounds` against our Triton kernel on this GPU.

    python benchmarks/regions_check.py --out OUT.json [--shapes olmoe ...] [--batch-size 8 256 4096]

For every layer and token count (uniform routing, weights not in L2, CUDA graphs) it times the same tiles with and
without a property: group_m 1 and 8; split_k 1 and 4 (where the kernel has it); block_n 64 or 128 and 256. A measured
gain is the best time without over the best time with it, minus 1. A prediction is right if it says what was measured;
where the two differ by at most 1 % nothing was there to predict, and it counts as a tie. The held-out shapes were not
looked at while the rules were derived.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs
import torch
import triton

from rampwrap import schema
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import config_key, format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.triton.moe import configs as tuning
from rampwrap.kernels.triton.moe.host import DIRECT_FACTOR, fused_moe
from rampwrap.measure.graph_timer import GraphTimer
from rampwrap.measure.timer import Call, Measurement
from rampwrap.model.bounds import GROUP_M, HELD_OUT, SPLIT_K, WIDE_N, Region, regions
from rampwrap.routing.workloads import Routing, Workload

TIE = 0.01
TOLERANCE = 1e-2
ROUNDS = 3
PROPERTIES = ("swizzle", "split_k", "wide_n")

Config = dict[str, Any]

# block_m, block_n, block_k, num_warps, num_stages, swap_ab, by tokens an expert gets on average: tiles that win
# somewhere, narrow and wide ones alike.
TILES: dict[float, list[tuple[int, int, int, int, int, bool]]] = {
    8: [
        (16, 64, 128, 4, 3, False),
        (16, 64, 256, 4, 3, False),
        (16, 64, 128, 4, 5, True),
        (16, 128, 64, 4, 4, False),
        (16, 128, 128, 4, 3, True),
        (16, 256, 64, 8, 4, False),
        (16, 256, 128, 8, 2, False),
        (16, 256, 64, 8, 4, True),
    ],
    48: [
        (16, 64, 128, 4, 3, False),
        (16, 128, 64, 4, 4, False),
        (32, 128, 64, 4, 3, False),
        (32, 128, 64, 4, 4, True),
        (64, 128, 64, 4, 3, False),
        (16, 256, 64, 8, 4, False),
        (32, 256, 64, 8, 3, True),
        (64, 256, 64, 8, 3, False),
    ],
    math.inf: [
        (64, 128, 64, 4, 3, False),
        (128, 64, 64, 4, 4, False),
        (128, 128, 64, 4, 3, False),
        (128, 128, 64, 8, 3, False),
        (128, 128, 64, 8, 4, False),
        (64, 256, 64, 8, 4, False),
        (128, 256, 64, 8, 3, False),
        (128, 256, 64, 8, 4, False),
    ],
}


@attrs.frozen
class Finding:
    """One property of one layer at one token count."""

    model: str
    num_tokens: int
    name: str
    "The property."
    without_us: float
    with_us: float
    spread: float
    "Of the noisier of the two, (p80 - p20) / median."
    without: Config
    chosen: Config
    predicted: bool
    predicted_gain: float
    published: bool

    @property
    def gain(self) -> float:
        """What the property saves: time without / time with - 1."""
        return self.without_us / self.with_us - 1

    def verdict(self, said: bool) -> str:
        """``right``, ``wrong`` or ``tie``."""
        return "tie" if abs(self.gain) <= TIE else "right" if (self.gain > 0) == said else "wrong"


def splits(shape: MoEShape) -> bool:
    """Whether the kernel knows `split_k`: one that does not would ignore the key."""
    kernel = TritonFusedMoE(shape)
    config = dict(kernel.default_config(1)) | {"split_k": SPLIT_K}
    knows = "split_k" in tuning.KEYS or kernel.grid(config, shape).split_k == SPLIT_K
    return knows and kernel.supports(config, shape) is None


def variants(shape: MoEShape, num_tokens: int) -> list[Config]:
    """Every tile for this batch plain, with group_m, and with split_k."""
    per_expert = num_tokens * shape.top_k / shape.num_experts
    kernel, has_split = TritonFusedMoE(shape), splits(shape)
    found = []
    for row in next(tiles for bound, tiles in TILES.items() if per_expert <= bound):
        keys = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "swap_ab")
        base = dict(kernel.default_config(num_tokens)) | dict(zip(keys, row, strict=True)) | {"group_m": 1}
        base |= {"split_k": 1} if has_split else {}
        found += [base, base | {"group_m": GROUP_M}]
        found += [base | {"split_k": SPLIT_K}] if has_split else []
    return [config for config in found if kernel.supports(config, shape) is None]


def compile_once(shape: MoEShape, num_tokens: int, configs: Sequence[Config]) -> list[str]:
    """Runs configs on zeros, one expert's weights seen as many, in a process of its own; returns what failed."""
    experts, hidden, inter = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def zeros(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, device="cuda")

    # What is compiled depends on whether slots are blocks of their own, not on how many there are.
    direct = num_tokens * shape.top_k * DIRECT_FACTOR <= experts
    tokens = 1 if direct else experts // (DIRECT_FACTOR * shape.top_k) + 1
    w13, w2 = zeros(1, 2 * inter, hidden).expand(experts, -1, -1), zeros(1, hidden, inter).expand(experts, -1, -1)
    ids, weights = zeros(tokens, shape.top_k, dtype=torch.int32), zeros(tokens, shape.top_k, dtype=torch.float32)
    failed = []
    for config in configs:
        try:
            fused_moe(config, zeros(tokens, hidden), w13, w2, weights, ids)
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{shape} {format_config(config)}: {error}".splitlines()[0])
    return failed


def compile_all(cells: Sequence[tuple[str, int]], processes: int) -> None:
    """Fills Triton's disk cache before this process has a CUDA context."""
    jobs: dict[tuple[str, bool], tuple[int, dict[str, Config]]] = {}
    for name, num_tokens in cells:
        shape = SHAPES[name]
        direct = num_tokens * shape.top_k * DIRECT_FACTOR <= shape.num_experts
        _, configs = jobs.setdefault((name, direct), (num_tokens, {}))
        configs.update({config_key(config): config for config in variants(shape, num_tokens)})
    work = []
    for (name, _), (num_tokens, configs) in jobs.items():
        every = list(configs.values())
        # Neighbours share their up kernel: they go to the same process.
        work += [(SHAPES[name], num_tokens, every[i : i + 6]) for i in range(0, len(every), 6)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rampwrap.adapters.triton_fused_moe", "rampwrap.routing.workloads", "rampwrap.model.bounds"]
    )
    with context.Pool(min(processes, len(work))) as pool:
        for failed in pool.starmap(compile_once, work, chunksize=1):
            for reason in failed:
                print(reason, file=sys.stderr)


def measure(
    kernel: TritonFusedMoE, shape: MoEShape, num_tokens: int, timer: GraphTimer
) -> list[tuple[Config, Measurement]]:
    """Every variant of a batch that agrees with the first one, timed in interleaved rounds."""
    ids = torch.from_numpy(Workload(num_tokens, Routing("uniform")).topk_ids(shape.num_experts, shape.top_k)).cuda()
    active = int((torch.bincount(ids.flatten(), minlength=shape.num_experts) > 0).sum())
    inputs = kernel.inputs(shape, ids)
    shifts = timer.rotations(shape.weight_bytes // shape.num_experts * active)
    batches = [
        inputs | {"topk_ids": ((ids + i * shape.num_experts // shifts) % shape.num_experts).int().contiguous()}
        for i in range(shifts)
    ]
    expected: torch.Tensor | None = None
    timed = []
    for config in variants(shape, num_tokens):
        try:
            out = kernel.launch(config, **inputs).float()
            expected = out if expected is None else expected
            error = float((out - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                print(f"WRONG {shape} T={num_tokens} {format_config(config)}: {error:.3g}", file=sys.stderr)
                continue
            timed.append((config, timer.prepare([call_of(kernel, config, batch) for batch in batches])))
        except Exception as failure:
            print(f"{shape} T={num_tokens} {format_config(config)}: {failure}".splitlines()[0], file=sys.stderr)
    samples: list[list[float]] = [[] for _ in timed]
    for _ in range(ROUNDS):
        for found, (_, ready) in zip(samples, timed, strict=True):
            found.extend(ready.sample())
    timer.release()
    return [(config, Measurement.of(found)) for (config, _), found in zip(timed, samples, strict=True)]


def call_of(kernel: TritonFusedMoE, config: Config, inputs: dict[str, Any]) -> Call:
    return lambda: kernel.launch(config, **inputs)


def findings(model: str, region: Region, measured: Sequence[tuple[Config, Measurement]]) -> list[Finding]:
    """What each property was worth: the best of the tiles without it against the best with it."""

    def best(group_m: int, split_k: int, widths: Sequence[int]) -> tuple[Config, Measurement] | None:
        wanted = [
            (config, m)
            for config, m in measured
            if (config["group_m"], config.get("split_k", 1)) == (group_m, split_k) and config["block_n"] in widths
        ]
        return min(wanted, key=lambda item: item[1].us, default=None)

    narrow, every = (64, 128), (64, 128, WIDE_N)
    pairs = {
        "swizzle": (best(1, 1, every), best(GROUP_M, 1, every)),
        "split_k": (best(1, 1, every), best(1, SPLIT_K, every)),
        "wide_n": (best(1, 1, narrow), best(1, 1, (WIDE_N,))),
    }
    found = []
    for name, (without, chosen) in pairs.items():
        if without is not None and chosen is not None:
            said = getattr(region, name)
            found.append(
                Finding(
                    model=model,
                    num_tokens=region.num_tokens,
                    name=name,
                    without_us=without[1].us,
                    with_us=chosen[1].us,
                    spread=max(without[1].spread, chosen[1].spread),
                    without=without[0],
                    chosen=chosen[0],
                    predicted=said.helps,
                    predicted_gain=said.gain,
                    published=said.published,
                )
            )
    return found


def line(f: Finding) -> str:
    tiles = ["x".join(str(int(value)) for value in config.values()) for config in (f.without, f.chosen)]
    words = [f"{'yes' if said else 'no':>3} {f.verdict(said):<5}" for said in (f.predicted, f.published)]
    model = f.model + "*" * (f.model in HELD_OUT)
    return (
        f"{model:<16} {f.num_tokens:>6} {f.name:<8} {f.without_us:>8.1f} -> {f.with_us:>8.1f} us {f.gain:>+7.1%} "
        f"+-{f.spread / 2:.1%}  derived {words[0]} ({f.predicted_gain:>+4.0%})  published {words[1]}  {tiles[0]} -> {tiles[1]}"
    )


def summary(found: Sequence[Finding]) -> str:
    """Right, wrong and tied predictions by rule and property, then every mistake by its size."""
    lines = []
    for rule in ("predicted", "published"):
        for where in ("all shapes", "held out"):
            cells = [f for f in found if where == "all shapes" or f.model in HELD_OUT]
            for name in PROPERTIES:
                count = Counter(f.verdict(getattr(f, rule)) for f in cells if f.name == name)
                lines.append(
                    f"{rule:<10} {where:<11} {name:<8} {count['right']:>3} right {count['wrong']:>3} wrong {count['tie']:>3} ties"
                )
        wrong = [f for f in found if f.verdict(getattr(f, rule)) == "wrong"]
        for f in sorted(wrong, key=lambda f: -abs(f.gain)):
            missed = "missed a gain of" if f.gain > 0 else "would lose"
            lines.append(f"    wrong: {f.model} T={f.num_tokens} {f.name}: {missed} {abs(f.gain):.1%}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=sorted(SHAPES))
    parser.add_argument("--batch-size", nargs="+", type=int, default=[8, 256, 4096])
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--budget", type=float, default=130.0, help="seconds after which no further shape is begun")
    parser.add_argument("--out", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    start = time.monotonic()
    # Small layers first: what a short budget leaves out is the large ones.
    names = sorted(arguments.shapes, key=lambda name: SHAPES[name].weight_bytes)
    compile_all([(name, tokens) for name in names for tokens in arguments.batch_size], arguments.processes)
    print(f"[{time.monotonic() - start:4.0f}s] compiled", flush=True)
    device = Device.current()
    if not splits(SHAPES[names[0]]):
        print("split_k: not in this kernel, left out", flush=True)
    found: list[Finding] = []
    left_out, times = [], []
    for name in names:
        if time.monotonic() - start > arguments.budget:
            left_out.append(name)
            continue
        shape = SHAPES[name]
        kernel = TritonFusedMoE(shape)
        timer = GraphTimer(device.l2_bytes, shape.weight_bytes, target_us=300, replays=3, warm_s=0.2)
        for num_tokens in arguments.batch_size:
            measured = measure(kernel, shape, num_tokens, timer)
            times.append([name, num_tokens, [[config, m.us, m.spread] for config, m in measured]])
            new = findings(name, regions(shape, device, num_tokens), measured)
            found += new
            print(f"[{time.monotonic() - start:4.0f}s]", *map(line, new), sep="\n", flush=True)
        del kernel, timer
        torch.cuda.empty_cache()
    print(f"\n{summary(found)}")
    if left_out:
        print(f"not measured, --budget {arguments.budget:.0f} was spent: {', '.join(left_out)}")
    if arguments.out is not None:
        rows = [
            attrs.asdict(f)
            | {"gain": f.gain, "derived_is": f.verdict(f.predicted), "published_is": f.verdict(f.published)}
            for f in found
        ]
        raw = {
            "command": " ".join(sys.argv),
            "device": schema.dump(device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
            "held_out": HELD_OUT,
            "not_measured": left_out,
            "findings": rows,
            "times": times,
        }
        arguments.out.write_text(json.dumps(raw, indent=1))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
