"""The pictures of the documentation, drawn from measured tables: python docs/pictures.py

Every number in them is read from a timing table of this repository, or replayed from it: fitted on the rows ``train``,
judged on the rows ``eval``. The SVGs lie in docs/pictures/ and are committed, so that building the pages needs no table.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np

from rampwrap import Timings
from rampwrap.compare.evaluate import Comparison, replay

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
MODEL = "wave"
"The fitted model by its name in tables and plans."
OUT = ROOT / "docs" / "pictures"
EXAMPLE = "examples/data/h200-triton_fused_moe-olmoe-bf16.npz"
RESULTS = "benchmarks/results/h200-"
TABLES = {
    "our Triton, bf16, OLMoE": EXAMPLE,
    "our CuTe, bf16, OLMoE": RESULTS + "v2-cute-olmoe-bf16.npz",
    "our CuTe, bf16, Qwen3-30B": RESULTS + "v2-cute-qwen3-30b-bf16.npz",
    "vLLM Triton, bf16, OLMoE": RESULTS + "vllm_fused_moe-olmoe-bf16.npz",
    "vLLM Triton, bf16, Qwen3-30B": RESULTS + "vllm_fused_moe-qwen3-30b-bf16.npz",
    "Alpha-MoE, FP8, OLMoE": RESULTS + "alpha_moe-olmoe-fp8.npz",
    "Alpha-MoE, FP8, Qwen3-30B": RESULTS + "alpha_moe-qwen3-30b-fp8.npz",
    "Alpha-MoE, FP8, DeepSeek-V3 TP8": RESULTS + "alpha_moe-deepseek-v3-tp8-fp8.npz",
}
ROUTINGS = {
    "uniform": "uniform",
    "zipf0.8": "zipf 0.8",
    "zipf1.2": "zipf 1.2",
    "logn1.05": "log normal",
    "dir0.3": "dirichlet 0.3",
    "dir0.1": "dirichlet 0.1",
}
GREY, LIGHT, BLUE, ORANGE, INK = "#9aa3ad", "#dfe3e8", "#3056d3", "#e8710a", "#2b2f36"
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: small files, and the reader can search them
    "svg.hashsalt": "rampwrap",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def replayed(table: str, models: tuple[str, ...] = (MODEL,)) -> Comparison:
    """The table's held-out rows, dispatched by what was fitted to its other rows."""
    return replay(Timings.load(ROOT / table), models=models)


def times(comparison: Comparison) -> tuple[Any, Any, Any]:
    """Microseconds of the static table's config, of ours and of the best one, each [workloads]."""
    best = np.nanmin(comparison.timings.us, axis=1)
    return comparison.us("static-uniform"), comparison.us(MODEL), best


def result() -> Any:
    """What a newcomer should see: one batch size under six routings, and the gain on eight tables."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.1), layout="constrained", width_ratios=(1.15, 1))
    comparison = replayed(EXAMPLE)
    table = comparison.timings
    static, ours, _ = times(comparison)
    rows = [list(table.label).index(f"M=192 {routing}") for routing in ROUTINGS]
    places = np.arange(len(rows))
    left.bar(places - 0.2, static[rows], 0.38, color=GREY, label="config by token count")
    left.bar(places + 0.2, ours[rows], 0.38, color=BLUE, label="config by routing (rampwrap)")
    for place, row in zip(places, rows, strict=True):
        gain = static[row] / ours[row] - 1
        if gain > 0.005:
            left.text(place, static[row] + 4, f"+{gain:.0%}", ha="center", color=BLUE, weight="bold")
    left.set_xticks(places, [name.replace(" ", "\n") for name in ROUTINGS.values()], fontsize=9)
    left.set_ylabel("time of one layer, µs")
    left.set_ylim(0, 300)
    left.set_title("192 tokens of OLMoE, six routings, one kernel")
    left.legend(loc="upper left", ncols=1)

    gains = {name: times(replayed(path)) for name, path in TABLES.items()}
    for place, (static, ours, best) in enumerate(reversed(gains.values())):
        possible, reached = (100 * (np.exp(np.log(static / us).mean()) - 1) for us in (best, ours))
        right.barh(place, possible, 0.62, color="none", edgecolor=GREY)
        right.barh(place, reached, 0.62, color=BLUE)
        right.text(possible + 0.1, place, f"{reached:.1f} of {possible:.1f} %", va="center")
    right.set_yticks(range(len(gains)), list(reversed(gains)))
    right.set_xlim(0, 8)
    right.set_xlabel("faster than by token count, %")
    right.set_title("Gain reached (blue) of gain possible")
    return figure


def _blocks(axes: Any, counts: Any, block_m: int, color: str) -> int:
    """Experts as columns of M blocks: the rows that tokens fill, and the rest that is computed for nothing."""
    total = 0
    for place, count in enumerate(counts):
        blocks = -(-int(count) // block_m)
        total += blocks
        for block in range(blocks):
            axes.bar(place, block_m, 0.82, block * block_m, color=LIGHT, edgecolor="white", linewidth=0.6)
        axes.bar(place, count, 0.82, color=color, alpha=0.85)
        for block in range(1, blocks):
            axes.plot((place - 0.41, place + 0.41), (block * block_m,) * 2, color="white", lw=0.8)
    return total


def waves() -> Any:
    """The same tokens cut into blocks by two configs, and the rounds that the GPU needs for them."""
    comparison = replayed(EXAMPLE)
    table = comparison.timings
    row = list(table.label).index("M=96 dir0.1")
    counts = np.sort(table.counts[row][table.counts[row] > 0])[::-1]
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 5.6), layout="constrained", height_ratios=(1.25, 1))
    picks = [
        ("the table's config for 96 tokens", "static-uniform", GREY),
        ("rampwrap's config for this routing", MODEL, BLUE),
    ]
    for column, (title, policy, color) in enumerate(picks):
        index = int(comparison.picks[policy][row])
        grid, us = table.grids[index], float(comparison.us(policy)[row])
        top, bottom = axes[0][column], axes[1][column]
        blocks = _blocks(top, counts, grid.block_m, color)
        top.set_title(f"{title}: blocks of {grid.block_m} rows")
        top.set_xlabel(f"the {len(counts)} experts that got tokens")
        top.set_ylabel("rows")
        top.set_ylim(0, 135)
        top.set_xticks([])
        wasted = 1 - counts.sum() / (blocks * grid.block_m)
        said = f"{blocks} blocks, {wasted:.0%} of their rows empty\n{blocks} x {grid.ctas_per_block} = {grid.num_ctas(counts)} thread blocks"
        top.text(0.97, 0.95, said, transform=top.transAxes, ha="right", va="top")
        slots = table.device.num_sms * grid.ctas_per_sm
        ctas = grid.num_ctas(counts)
        for wave in range(-(-ctas // slots)):
            share = min(1.0, ctas / slots - wave)
            bottom.bar(wave + 1, 100, 0.9, color=LIGHT)
            bottom.bar(wave + 1, 100 * share, 0.9, color=color)
        bottom.set_xlim(0.4, 10.6)
        bottom.set_ylim(0, 118)
        bottom.set_yticks([0, 50, 100])
        bottom.set_ylabel("GPU filled, %")
        bottom.set_xlabel(f"waves: {slots} thread blocks run at a time")
        bottom.set_title(f"measured: {us:.0f} µs")
    return figure


def predicted() -> Any:
    """Predicted against measured time on rows that the fit never saw."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    for axes, name in zip(panels, ("our Triton, bf16, OLMoE", "Alpha-MoE, FP8, OLMoE"), strict=True):
        comparison = replayed(TABLES[name])
        us, model = comparison.timings.us, comparison.models[MODEL]
        predicted_us = model.predict(comparison.timings.counts)
        seen = ~np.isnan(us) & np.isfinite(predicted_us)
        near = seen & (us < 1.1 * np.nanmin(us, axis=1, keepdims=True))
        error = np.abs(predicted_us[near] / us[near] - 1).mean()
        kwargs = {"linewidths": 0, "rasterized": True}  # thousands of dots: as pixels they are a tenth of the file
        axes.scatter(
            us[seen & ~near], predicted_us[seen & ~near], s=5, color=GREY, alpha=0.6, label="other configs", **kwargs
        )
        axes.scatter(us[near], predicted_us[near], s=7, color=BLUE, label="within 10 % of the best", **kwargs)
        ends = [us[seen].min(), us[seen].max()]
        axes.plot(ends, ends, color=INK, lw=0.8)
        axes.set(xscale="log", yscale="log", xlabel="measured, µs", ylabel="predicted, µs")
        axes.set_title(f"{name}: {error:.1%} off near the best")
        axes.legend(loc="upper left", markerscale=2)
    return figure


def regret() -> Any:
    """How much time each policy loses against the best config of each workload."""
    names = {
        "static-uniform": ("by token count, tuned under uniform routing", GREY, "-"),
        "static-averaged": ("by token count, tuned over all routings", ORANGE, "-"),
        "ramp4": ("by routing, published 4-parameter model", "#3d9a6a", "-"),
        MODEL: ("by routing, rampwrap", BLUE, "-"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 4.0), layout="constrained", sharey=True)
    shown = ("our CuTe, bf16, OLMoE", "vLLM Triton, bf16, OLMoE", "Alpha-MoE, FP8, OLMoE")
    for axes, name in zip(panels, shown, strict=True):
        comparison = replayed(TABLES[name], ("ramp4", MODEL))
        best = np.nanmin(comparison.timings.us, axis=1)
        share = 100 * (np.arange(len(best)) + 1) / len(best)
        for policy, (label, color, line) in names.items():
            lost = np.sort(100 * (comparison.us(policy) / best - 1))
            axes.step(share, lost, where="pre", color=color, ls=line, lw=2.2 if policy == MODEL else 1.4, label=label)
        axes.set_title(name)
        axes.set_xlabel("share of held-out workloads, %")
        axes.set_ylim(0, 30)
    panels[0].set_ylabel("slower than the best config, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def ranks() -> Any:
    """Two ranks, the rows of each in the memory of both: no number here is measured."""
    figure, axes = plt.subplots(figsize=(7.4, 3.3))
    axes.set(xlim=(0, 100), ylim=(0, 50))
    axes.axis("off")
    colors = (BLUE, ORANGE)
    for rank, left in enumerate((2, 54)):
        axes.add_patch(plt.Rectangle((left, 2), 44, 46, fill=False, edgecolor=GREY))
        axes.text(left + 22, 44.5, f"rank {rank}, experts {4 * rank} to {4 * rank + 3}", ha="center", weight="bold")
        axes.text(left + 2, 39, "tokens")
        axes.text(left + 2, 25, "rows, by rank")
        axes.text(left + 2, 10, "sums")
        for token in range(3):
            box = {"edgecolor": "white", "linewidth": 1.5}
            axes.add_patch(plt.Rectangle((left + 19 + 4 * token, 37.5), 4, 5, facecolor=colors[rank], **box))
        for source, color in enumerate(colors):
            for token in range(3):
                at = left + 19 + 12 * source + 4 * token
                # The row that nobody here needs is not sent where rows are masked.
                faint = (rank, source, token) in {(0, 1, 1), (1, 0, 0)}
                shade = {"facecolor": LIGHT if faint else color, "edgecolor": "white", "linewidth": 1.5}
                axes.add_patch(plt.Rectangle((at, 23.5), 4, 5, **shade))
                axes.add_patch(
                    plt.Rectangle(
                        (left + 19 + 12 * source + 4 * token, 8.5),
                        4,
                        5,
                        facecolor=colors[rank],
                        alpha=0.45,
                        edgecolor="white",
                    )
                )
            axes.text(left + 25 + 12 * source, 5, f"from rank {source}", ha="center", fontsize=8)
            start, end = (27 + 52 * source, 37), (left + 25 + 12 * source, 29.5)
            arrow = {"arrowstyle": "-|>", "linewidth": 1.4, "edgecolor": color, "facecolor": color}
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
        axes.text(left + 42, 32.5, "dispatch", ha="right", fontsize=8, color=INK)
        axes.text(left + 42, 18.5, "local layer, then combine", ha="right", fontsize=8, color=INK)
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    "result": result,
    "waves": waves,
    "predicted": predicted,
    "regret": regret,
    "ranks": ranks,
}


def main() -> None:
    """Draws all of them."""
    OUT.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = draw()
            figure.savefig(OUT / f"{name}.svg", dpi=110, facecolor="white", metadata={"Date": None})
            plt.close(figure)
            print(f"docs/pictures/{name}.svg: {(OUT / f'{name}.svg').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
