"""Which one config to put into a graph, judged on held-out rows of the measured tables here; no GPU.

    python benchmarks/single_config.py --most-tokens 1024

For every held-out token count each rule names one config from the train rows: the uniform-tuned table, the model's best
over drawn skews, the least measured mean of the neighbouring token counts, the last two mixed, and what a plan would put
there. A config is judged by the geometric mean of its times over the best config of each row; `hindsight` is the least
that one config can get. Last, how often a plan's config is more than 0.5 % slower than the uniform-tuned one.
"""

import argparse
import pathlib
from collections import defaultdict

import numpy as np

from rampwrap.kernel.protocol import config_key
from rampwrap.measure.join import join
from rampwrap.measure.timings import Timings
from rampwrap.model.fit import fit
from rampwrap.plan.make import make_plan
from rampwrap.policy.buckets import draw
from rampwrap.policy.graph_lists import serving
from rampwrap.policy.static import static_table

RESULTS = pathlib.Path(__file__).parent / "results"
JOINED = ("olmoe-bf16", "qwen3-30b-bf16", "qwen3-30b-fp8")
ALONE = (
    *("alpha_moe-deepseek-v3-tp8-fp8", "alpha_moe-olmoe-fp8", "alpha_moe-qwen3-30b-fp8"),
    *("vllm_fused_moe-olmoe-bf16", "vllm_fused_moe-qwen3-30b-bf16"),
    *("triton_fused_moe-olmoe-bf16-run1", "triton_fused_moe-qwen3-30b-bf16"),
)


def tables() -> dict[str, Timings]:
    """Both kernels of ours together and alone, and other people's."""
    found = {}
    for name in JOINED:
        pair = [Timings.load(RESULTS / f"h200-v2-{kernel}-{name}.npz") for kernel in ("triton", "cute")]
        found |= {f"both {name}": join(pair), f"triton {name}": pair[0], f"cute {name}": pair[1]}
    return found | {name: Timings.load(RESULTS / f"h200-{name}.npz") for name in ALONE}


def measured(train: Timings, tokens: int) -> np.ndarray:
    """Log of each config's mean time over the best, at the neighbouring token counts, weighted by their distance."""
    known = np.unique(train.num_tokens)
    low, high = known[known <= tokens].max(initial=known[0]), known[known >= tokens].min(initial=known[-1])
    weight = 0.5 if low == high else np.log(tokens / low) / np.log(high / low)

    def mean(at: int) -> np.ndarray:
        rows = train.us[train.num_tokens == at]
        return np.asarray(np.log(rows / np.nanmin(rows, axis=1, keepdims=True)).mean(axis=0))

    return mean(low) * (1 - weight) + mean(high) * weight


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    everywhere: dict[str, list[float]] = defaultdict(list)
    for name, timings in tables().items():
        train, held_out = (timings.take(timings.rows(split)) for split in ("train", "eval"))
        model, static, plan = fit(train, "wave"), static_table(train, "uniform"), make_plan(timings)
        place = {config_key(config): index for index, config in enumerate(timings.configs)}
        complete = np.isfinite(train.us).all(axis=0)
        here: dict[str, list[float]] = defaultdict(list)
        for tokens in np.unique(held_out.num_tokens[held_out.num_tokens <= arguments.most_tokens]).tolist():
            rows = held_out.us[held_out.num_tokens == tokens]
            over = np.exp(np.log(rows / np.nanmin(rows, axis=1, keepdims=True)).mean(axis=0))
            over[np.isnan(over)] = np.inf
            predicted = np.log(np.maximum(model.predict(draw(timings.shape, [tokens])), 1e-9)).mean(axis=0)
            predicted[~complete] = np.inf
            near = measured(train, tokens)
            chosen = {
                "static": static.index(tokens),
                "model": predicted.argmin(),
                "measured": np.nanargmin(near),
                "plan": place[config_key(plan.configs[plan.in_graph[serving(plan.in_graph, tokens)].static])],
                "mixed": np.nanargmin(predicted - predicted.min() + near),
                "hindsight": over.argmin(),
            }
            for rule, index in chosen.items():
                here[rule].append(float(over[index]))
                everywhere[rule].append(float(over[index]))
        print(f"{name:36s}" + text(here))
    print(f"{'all':36s}" + text(everywhere))
    ratios = np.array(everywhere["plan"]) / np.array(everywhere["static"])
    print(f"slower than static by over 0.5 %: {(ratios > 1.005).sum()} of {len(ratios)}, worst {ratios.max():.3f}x")


def text(found: dict[str, list[float]]) -> str:
    return "".join(
        f"  {rule} {np.exp(np.log(its).mean()) - 1:.2%} (p95 {np.quantile(its, 0.95) - 1:.1%})"
        for rule, its in found.items()
    )


if __name__ == "__main__":
    main()
