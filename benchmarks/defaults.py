"""What the CuTe kernels' defaults lose where no plan chooses, judged on the measured tables here; no GPU.

    python benchmarks/defaults.py

For each table and span of token counts, the time of the default config of `rampwrap.kernels.cute.defaults` over the best config of
each workload, geometric mean and worst, beside that of the rule which served until 2026-11-27 (`before`) and of the best config
for each token count in hindsight. The rule's constants come from the tables called *fit*; *held out* took no part. No table holds the ragged
form, so this is the rule for a library without it. The whole rule is judged by a race of five layers, in which of each form's configs the
fastest was timed: the default of then, the best ragged config and that of the form which the rule takes (the default where it takes no
ragged one), over the best config of all forms but the ragged, by `race.BANDS` of token counts; *exact* is the share of workloads whose
best ragged config, or default, is the very one that the rule takes. Then the best config of another kernel on the same workloads over
the default: above 1 the default is ahead even of that. Then our Triton kernel's default over it. Last, the same of our Triton kernel: its default over its best config, and vLLM's best config over its
default. Its rule was made of these tables; *again* is another run of the same layers, by the kernel's first version.
"""

import argparse
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
from race import BANDS
from race_field import LAYERS

from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.configs import FORMS, GROUP_MS, all_configs, why_illegal
from rampwrap.kernels.cute.defaults import default
from rampwrap.kernels.triton.moe.configs import default_config
from rampwrap.measure.timings import Timings
from rampwrap.policy.static import default_table

RESULTS = pathlib.Path(__file__).parent / "results"
RACE = RESULTS / "h100-race-issue16.json"
FIT = ("h200-v2-cute-olmoe-bf16", "h200-v2-cute-qwen3-30b-bf16", "h200-v2-cute-qwen3-30b-fp8")
HELD_OUT = (
    *("h200-portfolio-cute-olmoe-bf16", "h200-portfolio-cute-olmoe-fp8", "h200-sweep-cute-qwen3-30b-fp8"),
    "h100-portfolio-deepgemm-qwen3-30b-fp8-cute_moe",
)
OTHERS = (
    ("h200-sweep-cute-qwen3-30b-fp8", "h200-sweep-vllm-qwen3-30b-fp8"),
    ("h200-portfolio-cute-olmoe-fp8", "h200-portfolio-vllm-olmoe-fp8"),
    ("h200-v2-cute-qwen3-30b-bf16", "h200-vllm_fused_moe-qwen3-30b-bf16"),
    ("h200-v2-cute-olmoe-bf16", "h200-vllm_fused_moe-olmoe-bf16"),
    ("h200-v2-cute-qwen3-30b-fp8", "h200-v2-triton-qwen3-30b-fp8"),
    ("h200-v2-cute-qwen3-30b-bf16", "h200-v2-triton-qwen3-30b-bf16"),
    ("h200-v2-cute-olmoe-bf16", "h200-v2-triton-olmoe-bf16"),
)
"Tables of the CuTe kernels and of another kernel, with workloads in common; bf16 ones of vLLM are of another run."
OF_TRITON = (
    ("h200-v2-triton-olmoe-bf16", "h200-vllm_fused_moe-olmoe-bf16"),
    ("h200-v2-triton-qwen3-30b-bf16", "h200-vllm_fused_moe-qwen3-30b-bf16"),
    ("h200-v2-triton-qwen3-30b-fp8", "h200-sweep-vllm-qwen3-30b-fp8"),
    ("h200-portfolio-triton-olmoe-fp8", "h200-portfolio-vllm-olmoe-fp8"),
)
AGAIN = (
    *("h200-triton_fused_moe-olmoe-bf16-run1", "h200-triton_fused_moe-olmoe-bf16-run2"),
    *("h200-triton_fused_moe-qwen3-30b-bf16", "h200-sweep-triton-qwen3-30b-fp8"),
)
SPANS = ((1, 8), (9, 64), (65, 512), (513, 1 << 62))
Rule = Callable[[Sequence[Config], MoEShape, int], int]


def before(configs: Sequence[Config], shape: MoEShape, num_tokens: int) -> int:
    """The rule until 2026-11-27, into which nothing measured went."""
    mean = num_tokens * shape.top_k / shape.num_experts
    want = {
        "block_m": min(64, 8 * max(1, -(-int(mean) // 8))),
        "block_n": 32,
        "warp_n": 8,
        "stages": 4,
        "group_m": 1 if mean < 16 else 8,
    }
    return min(range(len(configs)), key=lambda i: tuple(abs(configs[i][key] - value) for key, value in want.items()))


def regret(table: Timings, rule: Rule = default) -> np.ndarray:
    """Time over the best config of each workload, NaN where the chosen one did not run."""
    chosen = np.array([rule(table.configs, table.shape, int(tokens)) for tokens in table.num_tokens])
    return np.asarray(table.us[np.arange(len(table.us)), chosen] / np.nanmin(table.us, axis=1))


def hindsight(table: Timings) -> np.ndarray:
    """The same of the best config for each token count."""
    over = table.us / np.nanmin(table.us, axis=1, keepdims=True)
    out = np.empty(len(over))
    for tokens in np.unique(table.num_tokens):
        rows = table.num_tokens == tokens
        out[rows] = over[rows][:, np.nanargmin(np.log(over[rows]).mean(axis=0))]
    return out


def of_triton(configs: Sequence[Config], shape: MoEShape, num_tokens: int) -> int:
    """The rule of our Triton kernel, all of whose configs these tables have."""
    return list(configs).index(default_config(num_tokens, shape.num_experts, shape.top_k, shape.dtype))


def ahead(table: Timings, other: Timings, rule: Rule = default) -> tuple[np.ndarray, np.ndarray]:
    """Token counts of the workloads in common, and the best of the other table over the default of the first."""
    place = {counts.tobytes(): row for row, counts in enumerate(other.counts)}
    pairs = [(row, place[key]) for row, its in enumerate(table.counts) if (key := its.tobytes()) in place]
    rows, theirs = np.array(pairs).T
    us = regret(table, rule)[rows] * np.nanmin(table.us[rows], axis=1)
    return table.num_tokens[rows], np.nanmin(other.us[theirs], axis=1) / us


@functools.cache
def listed(shape: MoEShape) -> list[Config]:
    """The CuTe kernels' own configs for a layer."""
    legal = (its for form in FORMS for its in all_configs(form, shape.dtype) if why_illegal(its, shape) is None)
    return [config.keys(group_m) for config in legal for group_m in GROUP_MS]


def of_all_ranks(shape: MoEShape, num_tokens: int) -> int:
    """Tokens of which so many name an expert of one rank, in the mean and with uniform routing: the race counts those alone."""
    elsewhere = math.comb(shape.num_experts - shape.num_local_experts, shape.top_k)
    return round(num_tokens / (1 - elsewhere / math.comb(shape.num_experts, shape.top_k)))


def raced(layer: str, race: dict[str, Any]) -> list[dict[str, Any]]:
    """Each workload of a layer's race: tokens, ratios over the best config of all forms but the ragged, and whether `rule` is exact."""
    name, _, dtype = layer.partition(":")
    shape, found = attrs.evolve(LAYERS[name], dtype=dtype), []
    for row in race["rows"] + race["changing"]:
        best = {who: (race["configs"][its[0]], its[1]) for who, its in row["best"].items()}
        chosen = listed(shape)[default(listed(shape), shape, of_all_ranks(shape, row["tokens"]))]
        who = "ragged" if chosen["form"] == "ragged" else "default"
        over = {key: best[key][1] / best["oracle"][1] for key in ("default", "ragged")}
        exact = {key: value for key, value in best[who][0].items() if key != "kernel"} == chosen
        # Else the race has no time of what the rule takes: tokens that it counted fewer had another default.
        rule = over[who] if exact or who == "ragged" else math.nan
        found.append({"tokens": row["tokens"], **over, "rule": rule, "form": chosen["form"], "exact": exact})
    return found


def show_race(races: dict[str, Any]) -> None:
    """The race's table, layer by layer, and all of a dtype."""
    rows = {layer: raced(layer, race) for layer, race in sorted(races.items())}
    for dtype in ("bf16", "fp8"):
        rows[f"all {dtype}"] = [row for layer in races if layer.endswith(dtype) for row in rows[layer]]
    print(f"\n| race | over the best but the ragged form | {' | '.join(BANDS.values())} |")
    for layer, its in rows.items():
        bands = [[row for row in its if low <= row["tokens"] <= high] for low, high in BANDS]
        for key, what in (
            ("default", "default of then"),
            ("ragged", "best ragged config"),
            ("rule", "form of the rule"),
        ):
            print(f"| {layer} | {what} | {' | '.join(cell(np.array([row[key] for row in band])) for band in bands)} |")
        shares = [f"{np.mean([row['exact'] for row in band]):.0%}" if band else "" for band in bands]
        print(f"| {layer} | exact | {' | '.join(shares)} |")


def triton_defaults(table: Timings) -> Timings:
    """A table of our Triton kernel with one column: its default for each workload."""

    class Asked:
        configs = table.configs

        def default_config(self, num_tokens: int) -> Config:
            shape = table.shape
            return default_config(num_tokens, shape.num_experts, shape.top_k, shape.dtype)

    kernel: Any = Asked()
    chosen = [default_table(kernel).index(int(tokens)) for tokens in table.num_tokens]
    us = np.full_like(table.us, np.nan)
    us[:, 0] = table.us[np.arange(len(us)), chosen]
    return attrs.evolve(table, us=us)


def load(name: str) -> Timings:
    """A table, without workloads on which nothing ran."""
    table = Timings.load(RESULTS / f"{name}.npz")
    return table.take(np.flatnonzero(np.isfinite(table.us).any(axis=1)))


def cell(values: np.ndarray, worst: Callable[..., float] = np.nanmax) -> str:
    """Geometric mean and worst of the ratios that are known."""
    values = values[~np.isnan(values)]
    return f"{np.exp(np.log(values).mean()):.3f} ({worst(values):.2f})" if len(values) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    head = " | ".join(f"{low}-{high}" if high < 1 << 62 else f"from {low}" for low, high in SPANS)
    print(f"| table | time over the best of each workload | {head} |")
    for part, names in (("fit", FIT), ("held out", HELD_OUT)):
        for name in names:
            table = load(name)
            for what, over in (
                ("before", regret(table, before)),
                ("default", regret(table)),
                ("hindsight", hindsight(table)),
            ):
                spans = [over[(table.num_tokens >= low) & (table.num_tokens <= high)] for low, high in SPANS]
                print(f"| {name}, {part} | {what} | {' | '.join(map(cell, spans))} |")
    show_race(json.loads(RACE.read_text(encoding="utf-8"))["races"])
    print(f"\n| table | best of another kernel over the default | {head} |")
    for name, other in OTHERS:
        tokens, ratios = ahead(load(name), load(other))
        spans = [ratios[(tokens >= low) & (tokens <= high)] for low, high in SPANS]
        print(f"| {name} | {other} | {' | '.join(cell(its, np.nanmin) for its in spans)} |")
    print(f"\n| table | default of our Triton kernel over the default | {head} |")
    for name, other in OTHERS:
        if "triton" in other:
            tokens, ratios = ahead(load(name), triton_defaults(load(other)))
            spans = [ratios[(tokens >= low) & (tokens <= high)] for low, high in SPANS]
            print(f"| {name} | {other} | {' | '.join(cell(its, np.nanmin) for its in spans)} |")
    print(f"\n| our Triton kernel's table | | {head} |")
    for name, other in (*OF_TRITON, *((name, "") for name in AGAIN)):
        table = load(name)
        over = regret(table, of_triton)
        spans = [over[(table.num_tokens >= low) & (table.num_tokens <= high)] for low, high in SPANS]
        print(f"| {name} | its best | {' | '.join(map(cell, spans))} |")
        if other:
            tokens, ratios = ahead(table, load(other), of_triton)
            spans = [ratios[(tokens >= low) & (tokens <= high)] for low, high in SPANS]
            print(f"| {name} | {other}, its best | {' | '.join(cell(its, np.nanmin) for its in spans)} |")


if __name__ == "__main__":
    main()
