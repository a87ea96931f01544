"""Whole layers of several kernels beside each other, one run: time over the roofline, by band of token counts and skew.

    python benchmarks/race.py --layers olmoe:bf16 qwen3-30b:fp8 --kernels cute_moe alpha_moe vllm_fused_moe --as-served vllm_fused_moe --out OUT.json

Adapters go by the names that `rampwrap profile --kernel` knows, `package.module:factory` among them; those of a layer form a `Portfolio`, so
that they read the same weights and routings. The first is ours. For each layer, token count and routing:

1. Every config that may win runs on poisoned memory against float64, replayed from a CUDA graph whose ids change between replays. One
   that is wrong is named and left out. The nodes of such a graph of one layer are listed.
2. A survey times these configs in graphs of two launches each; the best --finalists of a kernel go on, with what serves without a plan
   (`default_config`) and the config that is best under uniform routing (`static`). Of kernels --as-served only the default races.
3. Finalists are sampled in turn, --rounds times: alignment, quantisation, GEMMs and sum, weights not in L2.
4. Replayed with routing that changes: one graph for each winner, default and static config of a token count, ids of another routing before
   every replay. Its figures are those called "changing".

May win: block_m from a quarter of the mean of active experts to twice the tokens of the largest (at least 24), one launch up to a mean of 16, the prefill
form from 4 on, and the order of tiles with which blocks share weights only for finalists. On 434 workloads of five H200 tables of the CuTe
kernels up to 1024 tokens every winner is within these (`tests/benchmarks/test_race.py`).

Layers with fewer experts here than in all get tokens that name at least one of them; `slots` says how many rows that makes.

Floor: max(bytes of active experts / copy bandwidth + 2 us, FLOPs / 1500 or 750 TFLOP/s). Bands hold geometric means:

    default, oracle, static, ragged   time over the floor: what serves without a plan; the best config of our other forms; the config best
                                      under uniform routing at that token count; the form "ragged", where the kernel has it
    d/o, worst                        default over oracle, and at worst; o:static and d:static the static config over them
    others                            the best of their configs over our default; above 1 we are faster

A race cut short by --budget-seconds holds the token counts that were finished, as does one that fails; exits 1 then, and where a layer was not raced.
"""

import argparse
import json
import pathlib
import signal
import sys
import time
import traceback
from typing import Any

import attrs
import numpy as np
import torch
from common import geometric_mean, stamp
from race_field import LAYERS, Field, measured
from race_layer import Race

from rampwrap.errors import RampwrapError
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import MEMBER
from rampwrap.kernel.shape import SHAPES, MoEShape

TOKENS = (64, 256, 16, 512, 1, 4, 1024, 128, 32, 8, 2, 96, 384)
"In an order of which any beginning is a fair sample."
ROUTINGS = ("uniform", "dirichlet:0.1", "zipf:1.2", "dirichlet:0.3")
BANDS = {(1, 1): "1", (2, 4): "2-4", (6, 96): "6-96", (128, 384): "128-384", (512, 1024): "512-1024"}
AIMS = {
    "fp8": ((1.30, 1.30), (1.18, 1.18), (1.06, 1.10), (1.07, 1.12), (1.15, 1.25)),
    "bf16": ((1.15, 1.15), (1.10, 1.10), (1.03, 1.05), (1.05, 1.08), (1.10, 1.15)),
}
"Time over the floor, even and skewed, by band."
PEAK_TFLOPS = {"fp8": 1500.0, "bf16": 750.0}
LAUNCH_US = 2.0
OURS = ("default", "oracle", "static", "ragged")


def floor_us(shape: MoEShape, counts: Any, device: Device) -> float:
    """What no layer beats."""
    active = np.count_nonzero(counts) / shape.num_local_experts
    reading = active * shape.weight_bytes / (device.copy_gbps or 3000.0) * 1e-3 + LAUNCH_US
    flop = 6.0 * float(np.sum(counts)) * shape.hidden_size * shape.intermediate_size
    return float(max(reading, flop / PEAK_TFLOPS[shape.dtype] * 1e-6))


def line(row: dict[str, Any], shape: MoEShape, device: Device) -> dict[str, Any]:
    """One workload with its floor and, for each contender, microseconds, spread and config."""
    ours, table = row["ours"], row["cells"]
    found: dict[str, Any] = {name: row[name] for name in ("label", "tokens", "even")}
    found |= {"active_experts": int(np.count_nonzero(row["counts"])), "slots": int(np.sum(row["counts"]))}
    found["floor_us"] = floor_us(shape, row["counts"], device)
    best: dict[str, dict[str, Any]] = {}
    for cell in sorted(table, key=lambda its: float(its["us"])):
        ragged = cell["config"].get("form") == "ragged"
        name = cell["kernel"] if cell["kernel"] != ours else "ragged" if ragged else "oracle"
        best.setdefault(name, cell)
    for name in ("default", "static"):
        picked = [cell for cell in table if {MEMBER: cell["kernel"], **cell["config"]} == row[name]]
        best |= {name: picked[0]} if picked else {}
    return found | {"best": best, "finalists": len(table)}


def bands(rows: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """Geometric means of the rows of each band and of all, even and skewed apart."""
    spans = [(*span, name, aims) for (span, name), aims in zip(BANDS.items(), AIMS[dtype], strict=True)]
    found = []
    for least, most, name, aims in [*spans, (1, 1 << 62, "all", (None, None))]:
        for even, aim in zip((True, False), aims, strict=True):
            mine = [row for row in rows if least <= row["tokens"] <= most and row["even"] is even]
            if mine:
                found.append({"tokens": name, "even": even, "workloads": len(mine), "aim": aim} | means(mine))
    return found


def means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of our contenders over the floor, and of contenders over each other."""

    def over(upper: str, lower: str) -> list[float]:
        both = [row["best"] for row in rows if {upper, lower} <= set(row["best"])]
        return [its[upper]["us"] / its[lower]["us"] for its in both]

    def mean(values: list[float]) -> float | None:
        return geometric_mean(values) if values else None

    found: dict[str, Any] = {
        name: mean([row["best"][name]["us"] / row["floor_us"] for row in rows if name in row["best"]]) for name in OURS
    }
    for key, pair in (("d/o", ("default", "oracle")), ("o:static", ("static", "oracle")), ("d:static", ("static", "default"))):  # fmt: skip
        found[key] = mean(over(*pair))
    found["worst"] = max(over("default", "oracle"), default=None)
    names = sorted({name for row in rows for name in row["best"]} - set(OURS))
    ratios = {name: over(name, "default") for name in names}
    found["others"] = {name: {"mean": mean(its), "worst": min(its)} for name, its in ratios.items() if its}
    return found


def show(title: str, found: list[dict[str, Any]]) -> None:
    def text(value: float | None, width: int = 7) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>{width}s}"

    keys = ("default", "aim", "oracle", "static", "ragged", "d/o", "worst", "o:static", "d:static")
    others = sorted({name for band in found for name in band["others"]})
    print(f"{title}\n  {'tokens':8s} {'':6s} {'n':>3s}" + "".join(f"{key:>9s}" for key in keys) + "".join(f"{name[:16]:>18s}" for name in others))  # fmt: skip
    for band in found:
        its = [band["others"].get(name) for name in others]
        cells = [" " * 18 if one is None else f"{one['mean']:8.3f} (>{one['worst']:.3f})" for one in its]
        print(
            f"  {band['tokens']:8s} {'even' if band['even'] else 'skewed':6s} {band['workloads']:3d}"
            + "".join(text(band[key], 9) for key in keys)
            + "".join(f"{cell:>18s}" for cell in cells),
            flush=True,
        )


def of_layer(name: str, dtype: str, a: argparse.Namespace, keep: Any) -> dict[str, Any]:
    """One layer; `keep` is called with what is there after every token count."""
    began, shape = time.monotonic(), attrs.evolve(LAYERS.get(name) or SHAPES[name], dtype=dtype)
    it = Field.of(shape, a)
    found: dict[str, Any] = {
        "shape": str(shape),
        "left_out": it.left_out,
        "wrong": {},
        "nodes": {},
        "rows": [],
        "changing": [],
    }
    if not it.kernels:
        return found
    device, race = measured(it.device), Race(it)
    found |= {"copy_gbps": device.copy_gbps, "versions": it.versions}
    for done, tokens in enumerate(a.tokens):
        elapsed = time.monotonic() - began
        if a.budget_seconds is not None and done and elapsed * (1 + 1 / done) > a.budget_seconds:
            found["gave_up"] = (
                f"{len(a.tokens) - done} of {len(a.tokens)} token counts: {a.budget_seconds:g} s were over."
            )
            print(f"  {found['gave_up']}")
            break
        try:
            rows, changing = race.at(tokens)
        except (KeyboardInterrupt, Exception) as error:
            traceback.print_exc()
            found["failed"] = (
                f"{type(error).__name__} at {tokens} tokens, {len(a.tokens) - done} of {len(a.tokens)} token counts are left out"
            )
            print(f"  {found['failed']}")
            break
        for key, some in (("rows", rows), ("changing", changing)):
            found[key] += [line(row, shape, device) for row in some]
        found |= {"wrong": it.wrong, "nodes": it.nodes, "seconds": round(time.monotonic() - began, 1)}
        keep(found)
    found |= {key: bands(found[rows], dtype) for key, rows in (("summary", "rows"), ("summary_changing", "changing"))}
    return found


def report(title: str, found: dict[str, Any]) -> None:
    """Prints the tables of one layer."""
    print(f"{title}: {found['shape']}, {found.get('copy_gbps') or 0:.0f} GB/s in a copy, {found.get('seconds', 0)} s")
    for name, why in found["left_out"].items():
        print(f"  without {name}: {why}"[:200])
    for config, why in [*found["wrong"].items()][:6]:
        print(f"  wrong: {config}: {why}"[:200])
    nodes = [f"{name} {len(its['kernels'])}+{len(its['others'])}" for name, its in found["nodes"].items()]
    print(f"  kernels + other nodes of one layer in a graph: {', '.join(nodes)}")
    show("  fixed routing", found["summary"])
    show("  changing", found["summary_changing"])
    if found["rows"]:
        spreads = [cell["spread"] for row in found["rows"] for cell in row["best"].values()]
        slots = [row["slots"] / row["tokens"] for row in found["rows"]]
        print(
            f"  spread of a cell: median {np.median(spreads):.2%}, p95 {np.quantile(spreads, 0.95):.2%}; {np.mean(slots):.2f} slots a token here"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["cute_moe"], metavar="NAME", help="the first is ours")
    parser.add_argument(
        "--as-served", nargs="+", default=[], metavar="NAME", help="those that race with their default alone"
    )
    parser.add_argument("--layers", nargs="+", default=["qwen3-30b:fp8"], metavar="NAME:DTYPE", help=f"of {', '.join(sorted({*LAYERS, *SHAPES}))}")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--recorded", metavar="FILE", help="recorded loads, raced too by layers with as many experts")
    parser.add_argument("--finalists", type=int, default=8, help="of each kernel, after the survey")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each finalist")
    parser.add_argument("--draws", type=int, default=2, help="of each routing, replayed changing")
    parser.add_argument("--budget-seconds", type=float, help="of a layer; no further token count is begun after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="JSON", help="layers that stand there complete are not raced again"
    )
    a = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs in the background without it
    there = json.loads(a.out.read_text(encoding="utf-8")) if a.out and a.out.exists() else {}
    races: dict[str, Any] = there.get("races", {})
    for layer in a.layers:
        name, _, dtype = layer.partition(":")
        if "summary" in races.get(layer, {}) and "failed" not in races[layer]:
            continue

        def keep(found: dict[str, Any], layer: str = layer) -> None:
            races[layer] = found
            if a.out:
                a.out.write_text(json.dumps(stamp() | {"races": races}, indent=1) + "\n", encoding="utf-8")

        found = of_layer(name, dtype or "bf16", a, keep)
        keep(found)
        if "summary" in found:
            report(layer, found)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0 if all(races[layer].get("rows") and "failed" not in races[layer] for layer in a.layers) else 1


if __name__ == "__main__":
    with torch.inference_mode():
        try:
            sys.exit(main())
        except RampwrapError as error:
            sys.exit(f"race.py: {error}")
