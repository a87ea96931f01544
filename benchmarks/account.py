"""Where a layer's time goes beyond reading its weights once: each launch alone, in pairs and together, beside plain streaming.

    python benchmarks/account.py --build DIR                  # anywhere with the CuTe DSL, no GPU
    python benchmarks/account.py --library DIR --out OUT.json # on an sm_90 GPU; with --ragged that form's

A layer of the CuTe kernels is four launches: P aligns and, in FP8, quantises; U and D are the GEMMs; S sums over top-k. For each
workload the fastest two-launch or prefill config of the whole layer is looked for and checked against float64 on poisoned memory,
then timed in CUDA graphs of several launches, all in turn, weights not in L2:

    P U D S         each by itself; in a graph of many a launch overlaps with its own kind
    P U, U D, D S   pairs; P U D, U D S and P U D S
    waits           what a pair takes beyond its parts, negative where they overlap
    w13, w2         a kernel that only reads the active experts' weights of U, of D (`device/stream.py`), a CTA an SM
    one, two        the bytes of both in one launch, in two; `two overlapping` by programmatic launch
    one/2, one/4    one launch with a CTA for every second, every fourth SM: what one SM can pull over its fair share

Predicted for one H100 before any run, from single figures of it: one launch that streams N bytes takes 2.35 us + N / 3.13 TB/s.

    two overlapping     3.0-3.5 us + bytes, where two one after the other take 4.7
    one/4               45-55 % of the bandwidth of all SMs (an SM pulls about twice its share), one/2 90-97 %
    U + D over w13 + w2 FP8: 1 token 2-5 us, 64 tokens 6-9, 256 tokens 15-22, 512 tokens 25-45, hardly more when skewed; bf16: a
                        third of it up to 64 tokens, half beyond
    P                   FP8 2-3 us up to 64 tokens, 4-6 at 256 and 512; bf16 1 less
    S                   1.5-2.5 us
    waits               -2 to +1 us each: launches overlap already
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from common import interleaved, stamp

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.errors import RampwrapError
from rampwrap.kernel.device import device_of
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.common.operands import Operands
from rampwrap.kernels.cute.build.build import build
from rampwrap.kernels.cute.build.library import Library, load
from rampwrap.kernels.cute.configs import STREAM_CHUNK, STREAMS, all_variants, from_keys
from rampwrap.kernels.cute.host.launch import run_layer
from rampwrap.kernels.cute.host.prepare import prepare, sum_rows
from rampwrap.kernels.triton.moe.workspace import Workspace
from rampwrap.measure.graph_timer import GraphTimer
from rampwrap.measure.inputs import Arguments
from rampwrap.measure.timer import Timer
from rampwrap.routing.workloads import Routing, Workload, workload_grid

SHAPE_NAMES = ("olmoe", "qwen3-30b")
TOKENS = (1, 16, 64, 256, 512)
ROUTINGS = ("uniform", "dirichlet:0.1")
TOGETHER = ("P", "U", "D", "S", "PU", "UD", "DS", "PUD", "UDS", "PUDS")
BOUND = {"bf16": 5e-3, "fp8": 1.2e-2}
"Largest relative error against float64 with the same quantisation steps, as of the GPU tests."
FINALISTS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Calls = Sequence[Callable[[], Any]]


def poison(memory: Workspace) -> Workspace:
    """A workspace full of NaN."""
    for tensor in attrs.asdict(memory, recurse=False).values():
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(0xFF)
    return memory


def launches(
    kernel: CuteFusedMoE, config: Config, inputs: dict[str, Any], memory: Workspace, out: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """P, U, D and S of one layer, each a call that does what the layer does; run in this order they are the layer."""
    found = from_keys(config, kernel.shape.dtype)
    assert not isinstance(found, str)
    operands = Operands(**inputs, out=out)
    seen: list[tuple[Any, ...]] = []
    most = kernel._most_ctas(found.ctas_per_sm, operands.topk_ids.device)
    note = lambda *arguments: seen.append(arguments)  # noqa: E731
    run_layer(found, (note, note), config["group_m"], most, operands, workspace=memory)
    up, down = (
        functools.partial(kernel.library.function(variant), *arguments)
        for variant, arguments in zip(found.variants, seen, strict=True)
    )
    ids, experts = operands.topk_ids, kernel.shape.num_local_experts
    blocks = memory.token_blocks(*ids.shape, experts, found.block_m)
    assert blocks is not None
    quantised = (seen[0][0], seen[0][1]) if kernel.shape.dtype == "fp8" else None
    aligned = functools.partial(
        prepare, operands.hidden_states, quantised, None, ids, found.block_m, experts, expert_map=None, memory=blocks,
        widest_first=found.form == "ragged",
    )  # fmt: skip
    return {
        "P": aligned,
        "U": up,
        "D": down,
        "S": functools.partial(sum_rows, out, memory.y, ids, experts, expert_map=None),
    }


def together(parts: dict[str, Callable[[], Any]], names: str) -> Callable[[], None]:
    """One call of some launches after each other."""
    chosen = [parts[name] for name in names]

    def call() -> None:
        for part in chosen:
            part()

    return call


def memories(kernel: CuteFusedMoE, given: Sequence[dict[str, Any]]) -> list[Workspace]:
    """A workspace for each routing; h and the rows before the sum are those of the first, as one layer after another has them."""
    tokens = len(given[0]["topk_ids"])
    first = kernel.workspace(tokens, DEVICE)
    mine = [kernel.workspace(tokens, DEVICE) for _ in given[1:]]
    shared = {"h": first.h, "y": first.y, "h_fp8": first.h_fp8, "h_scale": first.h_scale}
    return [first, *(attrs.evolve(memory, **shared) for memory in mine)]


def best_config(
    kernel: CuteFusedMoE, timer: Timer, given: Sequence[dict[str, Any]], most: int, rounds: int
) -> tuple[Config, int]:
    """The fastest config of the whole layer, and among how many; blocks that no expert half fills are passed over."""
    tall = max(8, 2 * most)
    tried = [c for c in kernel.configs if c["form"] != "one" and c["group_m"] == 1]
    tried = [c for c in tried if c["form"] == "ragged" or c["block_m"] <= tall]
    memory, out = kernel.workspace(len(given[0]["topk_ids"]), DEVICE), torch.empty_like(given[0]["hidden_states"])
    left = {format_config(config): config for config in tried}
    for _ in range(2):
        calls = {
            name: [functools.partial(kernel.launch, config, **its, workspace=memory, out=out) for its in given]
            for name, config in left.items()
        }
        us = interleaved(timer, calls, 1 if len(left) > FINALISTS else rounds)
        left = {name: left[name] for name in sorted(us, key=us.__getitem__)[:FINALISTS]}
    return next(iter(left.values())), len(tried)


def wrong(kernel: CuteFusedMoE, config: Config, given: dict[str, Any]) -> str | None:
    """Why a config or its launches one by one must not be timed; None if they may. On poisoned memory, before any timing."""
    memory = poison(kernel.workspace(len(given["topk_ids"]), DEVICE))
    whole = kernel.launch(config, **given, workspace=memory)
    expected = kernel.reference(kernel.shape, given)
    off = float((whole.double() - expected).norm() / expected.norm())
    if not off < BOUND[kernel.shape.dtype]:
        return f"off float64 by {off:.3g}"
    out = torch.full_like(whole, torch.nan)
    parts = launches(kernel, config, given, poison(memory), out)
    poison(memory)
    out.fill_(torch.nan)
    together(parts, "PUDS")()
    return None if torch.equal(out, whole) else "P, U, D and S one by one give other bits than the layer"


def streams(library: Library, given: Sequence[dict[str, Any]], shape: MoEShape, sms: int) -> dict[str, Calls]:
    """Calls that read the active experts' weights and do nothing with them, by name; one for each routing."""
    plain, overlapping = (library.function(variant) for variant in STREAMS)
    # Half an expert's w13 has as many bytes as its w2.
    w13 = given[0]["w13"].view(torch.uint8).view(2 * shape.num_local_experts, -1)
    w2 = given[0]["w2"].view(torch.uint8).view(shape.num_local_experts, -1)
    found: dict[str, list[Callable[[], Any]]] = {}
    for its in given:
        counts = np.bincount(its["topk_ids"].cpu().numpy().ravel(), minlength=shape.num_experts)
        active, idle = np.flatnonzero(counts), np.flatnonzero(counts == 0)
        first = np.stack([2 * active, 2 * active + 1], 1).ravel()
        # What one launch reads in place of w2: other experts' w13 where there are any, else those read longest ago.
        others = np.concatenate([idle, active])
        more = np.stack([2 * others, 2 * others + 1], 1).ravel()[: len(active)]
        ups, downs, both = (
            torch.from_numpy(ids.astype(np.int32)).to(DEVICE) for ids in (first, active, np.concatenate([first, more]))
        )
        calls = {
            "w13": [(plain, w13, ups, sms)],
            "w2": [(plain, w2, downs, sms)],
            "one": [(plain, w13, both, sms)],
            "one/2": [(plain, w13, both, sms // 2)],
            "one/4": [(plain, w13, both, sms // 4)],
            "two": [(plain, w13, ups, sms), (plain, w2, downs, sms)],
            "two overlapping": [(overlapping, w13, ups, sms), (overlapping, w2, downs, sms)],
        }
        for name, some in calls.items():
            one = {str(place): functools.partial(call[0], *call[1:]) for place, call in enumerate(some)}
            found.setdefault(name, []).append(together(one, "".join(one)))
    return dict(found)


def row(
    kernel: CuteFusedMoE, library: Library, timer: Timer, workload: Workload, copy_gbps: float | None, a: Any
) -> dict[str, Any]:
    """The account of one workload."""
    shape = kernel.shape
    ids = workload.topk_ids(shape.num_experts, shape.top_k)
    counts = np.bincount(ids.ravel(), minlength=shape.num_experts).astype(np.int64)
    given = Arguments(kernel.inputs, shape, [workload], counts[None], timer, DEVICE == "cpu", a.seed)(0)
    config, tried = best_config(kernel, timer, given, int(counts.max()), a.rounds)
    active = int(np.count_nonzero(counts))
    found = {
        "label": workload.label,
        "tokens": workload.num_tokens,
        "routing": str(workload.routing),
        "active_experts": active,
        "hottest": int(counts.max()),
        "weight_bytes": shape.weight_bytes * active // shape.num_experts,
        "turns": len(given),
        "config": config,
        "of_configs": tried,
        "wrong": wrong(kernel, config, given[0]),
    }
    if found["wrong"] is not None:
        return found
    out = torch.empty_like(given[0]["hidden_states"])
    each = [
        launches(kernel, config, its, memory, out) for its, memory in zip(given, memories(kernel, given), strict=True)
    ]
    for parts in each:
        together(parts, "PUDS")()  # what a launch by itself reads is there
    sms = kernel._most_ctas(1, torch.device(DEVICE))
    calls: dict[str, Calls] = {" ".join(names): [together(parts, names) for parts in each] for names in TOGETHER}
    plain = streams(library, given, shape, sms)
    us = interleaved(timer, calls | plain, a.rounds)
    layer, floor = us["P U D S"], us["two overlapping"]
    found["us"] = {name: us[name] for name in calls}
    found["stream_us"] = {name: us[name] for name in plain}
    found["waits_us"] = {
        pair: us[pair] - sum(us[name] for name in pair.split()) for pair in ("P U", "U D", "D S", "P U D S")
    }
    found["beyond_us"] = {
        "layer": layer - floor,
        "U": us["U"] - us["w13"],
        "D": us["D"] - us["w2"],
        "U D": us["U D"] - floor,
        "P and S": us["P"] + us["S"],
    }
    found["copy_share"] = None if not copy_gbps else found["weight_bytes"] / layer / copy_gbps * 1e-3
    return found


def show(found: dict[str, Any]) -> str:
    """A row of the table, microseconds."""
    if found["wrong"] is not None:
        return f"{found['label']:22s} not timed, {format_config(found['config'])}: {found['wrong']}"
    us, plain, beyond = found["us"], found["stream_us"], found["beyond_us"]
    parts = "".join(f"{us[name]:7.1f}" for name in ("P", "U", "D", "S", "P U", "U D", "D S", "P U D S"))
    floors = "".join(f"{plain[name]:7.1f}" for name in plain)
    more = "".join(f"{value:7.1f}" for value in (*found["waits_us"].values(), *beyond.values()))
    return f"{found['label']:22s}{found['active_experts']:5d} |{parts} |{floors} |{more} | {format_config(found['config'])}"


HEAD = (
    f"{'us':22s}{'act.':>5s} |"
    + "".join(f"{name:>7s}" for name in ("P", "U", "D", "S", "PU", "UD", "DS", "PUDS"))
    + " |"
    + "".join(f"{name:>7s}" for name in ("w13", "w2", "one", "one/2", "one/4", "two", "overl."))
    + " |"
    + "".join(f"{name:>7s}" for name in ("w PU", "w UD", "w DS", "w all", "layer+", "U+", "D+", "UD+", "P,S"))
)


def account(shape: MoEShape, library: Library, a: argparse.Namespace) -> list[dict[str, Any]]:
    """All workloads of a layer."""
    kernel = CuteFusedMoE(shape, "ragged" if a.ragged else "both", library)
    device = device_of(kernel)
    timer: Timer = GraphTimer(device.l2_bytes, shape.weight_bytes)
    rows = []
    print(f"{shape}\n{HEAD}", flush=True)
    for workload in workload_grid(a.tokens, [Routing.parse(text) for text in a.routings], seed=a.seed):
        rows.append(row(kernel, library, timer, workload, device.copy_gbps, a))
        print(show(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, metavar="DIR", help="compiles what an account needs, and ends")
    parser.add_argument("--library", type=pathlib.Path, metavar="DIR", help="of --build; the default one where absent")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPE_NAMES), choices=sorted(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--ragged", action="store_true", help="of the ragged form instead of the best config")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    if a.build:
        print(build([*all_variants(), *STREAMS], a.build))
        return 0
    library = load(a.library)
    found: dict[str, Any] = {}
    for name in a.shapes:
        for dtype in a.dtype:
            shape = attrs.evolve(SHAPES[name], dtype=dtype)
            if shape.weight_bytes // (3 * shape.num_local_experts) % STREAM_CHUNK:
                parser.error(f"w2 of {name} {dtype} is no multiple of {STREAM_CHUNK} bytes an expert; leave it out.")
            found[f"{name} {dtype}"] = account(shape, library, a)
            if a.out:
                a.out.write_text(json.dumps(stamp() | {"accounts": found}, indent=1) + "\n", encoding="utf-8")
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    return 1 if any(row["wrong"] is not None for rows in found.values() for row in rows) else 0


if __name__ == "__main__":
    with torch.inference_mode():
        try:
            sys.exit(main())
        except RampwrapError as error:
            sys.exit(f"account.py: {error}")
