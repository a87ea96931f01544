"""How many configs a profile must keep after its sweep: plans of fewer, judged by complete tables; no GPU.

    python benchmarks/kept_configs.py --out OUT.json

Of each table the rows of a sweep (its token counts, uniform and skewed) say which configs stay, as `measure.sweep` keeps them.
A plan is made of these alone, on the train rows, and chooses for the held-out rows; regret is against the best of all configs
there, in geometric mean. `rounds` are plans of one layer measured twice, in two rounds and in four, judged by both runs.
"""

import argparse
import json
import pathlib
from typing import Any

import attrs
import numpy as np

from rampwrap.kernel.protocol import config_key
from rampwrap.measure.sweep import TOKENS, worth_keeping
from rampwrap.measure.timings import Timings
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan

RESULTS = pathlib.Path(__file__).parent / "results"
TABLES = (
    *("h200-triton_fused_moe-olmoe-bf16-run1", "h200-triton_fused_moe-olmoe-bf16-run2"),
    *("h200-triton_fused_moe-qwen3-30b-bf16", "h200-vllm_fused_moe-olmoe-bf16", "h200-vllm_fused_moe-qwen3-30b-bf16"),
    *("h200-alpha_moe-olmoe-fp8", "h200-alpha_moe-qwen3-30b-fp8", "h200-alpha_moe-deepseek-v3-tp8-fp8"),
)
"Of every config that their kernel had, with held-out rows."
TWICE = TABLES[:2]
"One layer in two rounds, and in four."
KEPT = (12, 16, 20, 24, 32, 40)
ROUTINGS = ("uniform", "dir0.1")


def sweep_of(timings: Timings) -> Timings:
    """The rows that a sweep would have measured."""
    rows = [
        row
        for row, label in enumerate(timings.label)
        if timings.split[row] == "train" and timings.num_tokens[row] in TOKENS and label.split(" ", 1)[1] in ROUTINGS
    ]
    return timings.take(np.array(rows))


def of_configs(timings: Timings, kept: list[int]) -> Timings:
    """A table of some of its configs."""
    return attrs.evolve(
        timings,
        us=timings.us[:, kept],
        spread=None if timings.spread is None else timings.spread[:, kept],
        configs=tuple(timings.configs[index] for index in kept),
        grids=tuple(timings.grids[index] for index in kept),
    )


def regret(plan: Plan, timings: Timings) -> dict[str, float]:
    """What the plan's choices for the held-out rows take, by those of the best config."""
    held_out = timings.take(timings.rows("eval"))
    number = {config_key(config): index for index, config in enumerate(timings.configs)}
    where, policy = [number[config_key(config)] for config in plan.configs], plan.policy()
    chosen = [
        where[policy.index(counts, int(tokens))]
        for counts, tokens in zip(held_out.counts, held_out.num_tokens, strict=True)
    ]
    ratios = held_out.us[np.arange(len(chosen)), chosen] / held_out.us.min(axis=1)
    return {"mean": float(np.exp(np.log(ratios).mean())), "worst": float(ratios.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(TABLES))
    parser.add_argument("--out", type=pathlib.Path)
    a = parser.parse_args()
    found: dict[str, Any] = {}
    for table in a.tables:
        timings = Timings.load(RESULTS / f"{table}.npz")
        number = {config_key(config): index for index, config in enumerate(timings.configs)}
        found[table] = {}
        for most in KEPT:
            kept = [number[config_key(config)] for config in worth_keeping(sweep_of(timings), most)]
            found[table][str(most)] = {"kept": len(kept), **regret(make_plan(of_configs(timings, kept)), timings)}
        print(f"{table}: " + ", ".join(f"{most} {its['mean']:.4f}" for most, its in found[table].items()), flush=True)
    means = {str(most): float(np.mean([its[str(most)]["mean"] for its in found.values()])) for most in KEPT}
    print("mean: " + ", ".join(f"{most} {mean:.4f}" for most, mean in means.items()))
    rounds = {}
    if set(TWICE) <= set(a.tables):
        runs = [Timings.load(RESULTS / f"{table}.npz") for table in TWICE]
        for its, name in zip(runs, ("two", "four"), strict=True):
            plan = make_plan(its)
            rounds[name] = [regret(plan, judge) for judge in runs]
        print("rounds: " + ", ".join(f"{name} {[one['mean'] for one in its]}" for name, its in rounds.items()))
    if a.out:
        a.out.write_text(json.dumps({"kept": found, "mean": means, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
