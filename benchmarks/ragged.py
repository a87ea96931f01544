"""The ragged form of the CuTe kernels against the best config of every workload, and against the best static table.

    python benchmarks/ragged.py --out OUT.json                  # race: RAMPWRAP_CUTE_LIBRARY names kernels built by account.py --build
    python benchmarks/ragged.py --points --out OUT.json         # what a step takes, for `kernels/cute/costs.py`

Race: whole layers as in `race.py`, the ragged form beside all configs of the other kernels, one run. For each band of token counts,
even and skewed routing apart, geometric means of

    floor       time over max(bytes of active experts / copy bandwidth + 2 us, FLOPs / 1500 or 750 TFLOP/s), beside its aim
    oracle      the best config of the others for each workload, over the ragged form; worst case too
    static      the config that is best under uniform routing at that token count, over the ragged form

The layer is checked against float64 before; a form that is wrong is not timed. Exits 1 then, and where it is more than 2 % slower than the
oracle.

Points: gate+up by itself on eight CTAs and weights that stay in L2, all experts with as many tokens: what an SM takes for a step
of each width; the same with few steps a unit, which tells what a unit takes besides. `Points` are made of two widths and of both.

Predicted, H100, before any run: GEMMs of Qwen3-30B FP8, 256 tokens, dirichlet 0.1: 85 -> 72 us on an H200's bandwidth; OLMoE FP8 256 tokens
dirichlet 1.2x over the best config; up to 64 tokens 0.98-1.05x; even routing within 2 %. Points: 350 + 13 clocks a token in FP8, 490
+ 7 in bf16, which `costs.py` holds.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
from typing import Any

import attrs
import numpy as np
import race
import torch
from common import geometric_mean, interleaved, stamp

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.errors import RampwrapError
from rampwrap.kernel.device import Device
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import MEMBER, Config, format_config
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.common.operands import Operands
from rampwrap.kernels.cute.build.library import load
from rampwrap.kernels.cute.configs import RAGGED
from rampwrap.kernels.cute.costs import POINTS, Costs, known, works_of
from rampwrap.kernels.cute.host.ragged import run_ragged, with_fragments
from rampwrap.kernels.cute.schedule import WIDTHS
from rampwrap.kernels.triton.moe.workspace import Workspace
from rampwrap.measure.graph_timer import GraphTimer
from rampwrap.measure.timings import Timings

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 384, 512, 1024)
ROUTINGS = ("uniform", "zipf:1.2", "dirichlet:0.3", "dirichlet:0.1")
LAYERS = {
    **{name: SHAPES[name] for name in ("olmoe", "qwen3-30b", "deepseek-v3-tp8")},
    "deepseek-v3-ep8": MoEShape(256, 8, 7168, 2048, num_local_experts=32),
    "deepseek-v3-ep32": MoEShape(256, 8, 7168, 2048, num_local_experts=8),
}
BANDS = {(1, 1): "1", (2, 4): "2-4", (6, 96): "6-96", (128, 384): "128-384", (512, 1024): "512-1024"}
AIMS = {
    "fp8": ((1.30, 1.30), (1.18, 1.18), (1.06, 1.10), (1.07, 1.12), (1.15, 1.25)),
    "bf16": ((1.15, 1.15), (1.10, 1.10), (1.03, 1.05), (1.05, 1.08), (1.10, 1.15)),
}
"Time over the floor, even and skewed, by band."
PEAK_TFLOPS = {"fp8": 1500.0, "bf16": 750.0}
LAUNCH_US = 2.0
SLOWER = 1.02
"How much slower than the oracle the form may be anywhere."
FEW_CTAS = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ragged(CuteFusedMoE):
    """The ragged form as a kernel of its own name, to race with the others.

    It holds one workspace for all launches without one, as serving does: marks zeroed anew would be a launch of its own.
    """

    name = "cute_ragged"
    version = "0"

    def __init__(self, shape: MoEShape) -> None:
        super().__init__(shape, "ragged")
        self._held: Workspace | None = None

    def run(
        self, config: Config, operands: Operands, /, *, workspace: Workspace | None = None, waves: int | None = None
    ) -> torch.Tensor:
        if workspace is None and (self._held is None or self._held.num_slots < operands.num_slots):
            self._held = self.workspace(operands.num_tokens, operands.topk_ids.device)
        return super().run(config, operands, workspace=workspace or self._held, waves=waves)


def floor_us(shape: MoEShape, counts: Any, device: Device) -> float:
    """What no layer beats."""
    active = np.count_nonzero(counts) / shape.num_local_experts
    reading = active * shape.weight_bytes / (device.copy_gbps or 3000.0) * 1e-3 + LAUNCH_US
    flop = 6.0 * float(np.sum(counts)) * shape.hidden_size * shape.intermediate_size
    return float(max(reading, flop / PEAK_TFLOPS[shape.dtype] * 1e-6))


def rows(table: Timings, device: Device) -> list[dict[str, Any]]:
    """Each workload: the ragged form, the best and the static config of the others."""
    ours = [column for column, config in enumerate(table.configs) if config[MEMBER] == Ragged.name]
    others = [column for column in range(len(table.configs)) if column not in ours]
    tokens = [int(count) for count in table.num_tokens]
    even = [label.endswith("uniform") for label in table.label]
    static = {
        count: others[int(np.nanargmin(table.us[row, others]))]
        for row, count in enumerate(tokens)
        if even[row] and np.isfinite(table.us[row, others]).any()
    }
    found = []
    for row, label in enumerate(table.label):
        best = others[int(np.nanargmin(table.us[row, others]))]
        found.append(
            {
                "label": label,
                "tokens": tokens[row],
                "even": even[row],
                "active_experts": int(np.count_nonzero(table.counts[row])),
                "floor_us": floor_us(table.shape, table.counts[row], device),
                "ragged_us": float(np.nanmin(table.us[row, ours])),
                "oracle_us": float(table.us[row, best]),
                "oracle": format_config(table.configs[best]),
                "static_us": float(table.us[row, static[tokens[row]]]) if tokens[row] in static else None,
            }
        )
    return found


def summary(some: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """Bands of token counts, even and skewed."""
    found = []
    for ((least, most), name), aims in zip(BANDS.items(), AIMS[dtype], strict=True):
        for even, aim in zip((True, False), aims, strict=True):
            mine = [row for row in some if least <= row["tokens"] <= most and row["even"] is even]
            if not mine:
                continue
            over = [row["oracle_us"] / row["ragged_us"] for row in mine]
            static = [row["static_us"] / row["ragged_us"] for row in mine if row["static_us"]]
            found.append(
                {
                    "tokens": name,
                    "even": even,
                    "workloads": len(mine),
                    "floor": geometric_mean([row["ragged_us"] / row["floor_us"] for row in mine]),
                    "aim": aim,
                    "oracle_floor": geometric_mean([row["oracle_us"] / row["floor_us"] for row in mine]),
                    "oracle": geometric_mean(over),
                    "oracle_worst": min(over),
                    "static": geometric_mean(static) if static else None,
                }
            )
    return found


def show(title: str, found: list[dict[str, Any]]) -> None:
    print(
        f"{title}\n  {'tokens':9s} {'routing':7s} {'floor':>6s} {'aim':>5s} {'oracle at':>9s} {'oracle':>7s} {'worst':>6s} {'static':>7s}"
    )
    for band in found:
        static = "-" if band["static"] is None else f"{band['static']:.3f}x"
        print(
            f"  {band['tokens']:9s} {'even' if band['even'] else 'skewed':7s} {band['floor']:6.2f} {band['aim']:5.2f} "
            f"{band['oracle_floor']:9.2f} {band['oracle']:6.3f}x {band['oracle_worst']:5.2f}x {static:>7s}",
            flush=True,
        )


def against(name: str, dtype: str, a: argparse.Namespace) -> dict[str, Any] | None:
    """The race of one layer."""
    shape = attrs.evolve(LAYERS[name], dtype=dtype)
    given = argparse.Namespace(**vars(a) | {"kernels": [f"{__name__}:Ragged", *a.kernels]})
    if __name__ == "__main__":
        given.kernels[0] = "ragged:Ragged"  # the catalogue imports it by its own name
    raced = race.timed(shape, given)
    if raced is None:
        return None
    ragged = format_config(Portfolio.tagged(raced.kernels[0], RAGGED[dtype].keys(1)))
    here = {config[MEMBER] for config in raced.table.configs}
    found = {"shape": str(shape), "copy_gbps": raced.device.copy_gbps, "wrong": raced.wrong, "left_out": raced.left_out}
    if Ragged.name not in here or len(here) < 2:
        print(f"{name} {dtype}: not raced: {raced.wrong.get(ragged) or raced.left_out or 'no rival'}", file=sys.stderr)
        return found
    some = rows(raced.table, raced.device)
    found |= {"rows": some, "summary": summary(some, dtype)}
    show(f"{name} {dtype}", found["summary"])
    return found


def up_call(kernel: CuteFusedMoE, tokens: int, ctas: int) -> Any:
    """Gate+up of a layer in which every expert has so many tokens, on so many CTAs, once its inputs are there."""
    shape = kernel.shape
    ids = torch.arange(shape.num_experts, dtype=torch.int32, device=DEVICE).repeat(tokens).view(-1, shape.top_k)
    inputs, seen = kernel.inputs(shape, ids), []
    memory = with_fragments(kernel.workspace(len(ids), DEVICE), shape.dtype, ctas)
    config = RAGGED[shape.dtype]
    note = lambda *arguments: seen.append(arguments)  # noqa: E731
    run_ragged(shape, config, (note, note), kernel._line, ctas, Operands(**inputs), memory=memory)
    return functools.partial(kernel.library.function(config.variants[0]), *seen[0])


def points(dtype: str, a: argparse.Namespace) -> dict[str, Any]:
    """Clocks of a step at each width, and of a unit, beside what is predicted; weights of 15 MB stay in L2."""
    # As many steps in many short units and in few long ones.
    width = 1 if dtype == "fp8" else 2
    long, short = MoEShape(8, 1, 7168 // width, 128, dtype), MoEShape(56, 1, 1024 // width, 128, dtype)
    calls, steps = {}, {}
    for (name, shape), tokens in itertools.product((("long", long), ("short", short)), WIDTHS[dtype]):
        kernel = CuteFusedMoE(shape, "ragged", load(a.library))
        calls[f"{name} {tokens}"] = [up_call(kernel, tokens, FEW_CTAS)]
        work = works_of(shape, Costs.of(known(Device.current()), dtype))[0]
        steps[name] = shape.num_experts * work.units(1) * work.steps / FEW_CTAS
    us = interleaved(GraphTimer(0, 0), calls, a.rounds)
    clock = POINTS[dtype].clock_mhz
    each = {tokens: us[f"long {tokens}"] / steps["long"] * clock for tokens in WIDTHS[dtype]}
    units = {name: its.num_experts / FEW_CTAS for name, its in (("long", long), ("short", short))}
    unit = {
        tokens: (us[f"short {tokens}"] - us[f"long {tokens}"]) * clock / (units["short"] - units["long"])
        for tokens in WIDTHS[dtype]
    }
    its = POINTS[dtype]
    print(f"{dtype}: clocks of a step (predicted), of a unit (predicted {its.unit}), at {clock:.0f} MHz")
    for tokens in WIDTHS[dtype]:
        print(f"  {tokens:4d} tokens {each[tokens]:7.0f} ({its.base + its.slope * tokens:.0f}) {unit[tokens]:7.0f}")
    return {"us": us, "steps": steps, "step_clocks": each, "unit_clocks": unit, "clock_mhz": clock}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", action="store_true", help="measures what a step takes instead of racing")
    parser.add_argument("--kernels", nargs="+", default=["cute_moe"], metavar="NAME", help="the others")
    parser.add_argument("--library", type=pathlib.Path, metavar="DIR", help="of --points; the default one where absent")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=sorted(LAYERS))
    parser.add_argument("--dtype", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--most-configs", type=int, default=24, help="of each other kernel")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each config")
    parser.add_argument("--budget-seconds", type=float, help="of a layer's race, sweeps not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    found: dict[str, Any] = {}
    for name, dtype in itertools.product(["points"] if a.points else a.layers, a.dtype):
        found[f"{name} {dtype}"] = points(dtype, a) if a.points else against(name, dtype, a)
        if a.out:
            a.out.write_text(json.dumps(stamp() | {"found": found}, indent=1) + "\n", encoding="utf-8")
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    if a.points:
        return 0
    worst = [band["oracle_worst"] for its in found.values() for band in (its or {}).get("summary", [])]
    raced = all(its is not None and "rows" in its for its in found.values())
    return 0 if raced and min(worst) >= 1 / SLOWER else 1


if __name__ == "__main__":
    with torch.inference_mode():
        try:
            sys.exit(main())
        except RampwrapError as error:
            sys.exit(f"ragged.py: {error}")
