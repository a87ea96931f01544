"""How a comparison is shown: text for people, CSV and JSON for machines, a picture where matplotlib is installed."""

import csv
import io
import os
import pathlib
from typing import Any

import numpy as np

from rampwrap.compare.evaluate import ORACLE, Comparison
from rampwrap.errors import InputError, RampwrapError
from rampwrap.files import replacing
from rampwrap.kernel.protocol import format_config
from rampwrap.measure.timings import Timings
from rampwrap.model.base import CostModel


def text(comparison: Comparison) -> str:
    """A table of policies, then the A/B of the routing-aware policy by token count."""
    t, wide = comparison.timings, max(16, *map(len, comparison.picks))
    lines = [
        f"{t.kernel} on {t.device.name}, {t.shape}: {len(t.us)} workloads x {len(t.configs)} configs",
        f"{'policy':<{wide}} {'mean us':>9} {'speedup':>8} {'regret mean':>12} {'p95':>7} {'max':>7} {'captured':>9} {'>1% slower':>11}",
    ]
    for s in comparison.summaries():
        lines.append(
            f"{s.policy:<{wide}} {s.mean_us:9.1f} {s.speedup:7.3f}x {s.regret_mean:12.2%} {s.regret_p95:7.1%} "
            f"{s.regret_max:7.1%} {s.captured_headroom:9.0%} {s.slower_than_static_share:11.1%}"
        )
    said = [f"{name}: {note}" for name, file in comparison.files.items() for note in file.notes]
    lines += [f"note: {sentence}." for sentence in (*comparison.notes, *said)]
    ours = subject(comparison)
    lines.append(
        f"\nA/B by tokens: {comparison.baseline} -> {ours} (us, mean over routings; spread of one measurement)"
    )
    spread = comparison.spread(ours)
    pairs = zip(comparison.by_tokens(comparison.baseline), comparison.by_tokens(ours), strict=True)
    for (tokens, static, _), (_, us, speedup) in pairs:
        here = spread[t.num_tokens == tokens]
        noise = f"+-{np.nanmean(here) / 2:.1%}" if not np.isnan(here).all() else ""
        lines.append(f"{tokens:>8} {static:>10.1f} -> {us:<10.1f} {speedup:6.3f}x {noise}")
    return "\n".join(lines)


def subject(comparison: Comparison) -> str:
    """The policy a reader came for: the last one that is neither a baseline nor the oracle."""
    candidates = [name for name in comparison.picks if name != ORACLE and not name.startswith("static")]
    return candidates[-1] if candidates else comparison.baseline


def csv_text(comparison: Comparison) -> str:
    """One line a workload and policy: label, tokens, policy, config, us, spread, regret, speedup over the baseline."""
    t, stream = comparison.timings, io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["label", "num_tokens", "policy", "config", "us", "spread", "regret", "speedup"])
    oracle, static = np.nanmin(t.us, axis=1), comparison.us(comparison.baseline)
    for policy, picks in comparison.picks.items():
        us, spread = comparison.us(policy), comparison.spread(policy)
        for row, label in enumerate(t.label):
            writer.writerow(
                [
                    label,
                    t.num_tokens[row],
                    policy,
                    format_config(t.configs[picks[row]]),
                    f"{us[row]:.3f}",
                    "" if np.isnan(spread[row]) else f"{spread[row]:.4f}",
                    f"{us[row] / oracle[row] - 1:.5f}",
                    f"{static[row] / us[row]:.5f}",
                ]
            )
    return stream.getvalue()


def save_text(content: str, path: str | os.PathLike[str]) -> None:
    """Writes text whole or not at all."""
    with replacing(path) as stream:
        stream.write(content.encode())


def pyplot() -> Any:
    """matplotlib.pyplot without a screen.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("a picture needs matplotlib; install it with 'pip install rampwrap[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def picture_type(path: str | os.PathLike[str]) -> str:
    """What a picture is written as: as its name ends, PNG where that says nothing.

    Asked before the work, so that no name is refused after it.

    Raises:
        InputError: matplotlib is not installed or writes no such type.
    """
    plt, ending = pyplot(), pathlib.Path(path).suffix[1:].lower()
    figure = plt.figure()
    known = figure.canvas.get_supported_filetypes()
    plt.close(figure)
    if ending and ending not in known:
        raise InputError(
            f"{os.fspath(path)} is no picture: matplotlib writes no {ending!r}; end it in .png, .svg or .pdf."
        )
    return ending or "png"


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a matplotlib figure whole or not at all, as `picture_type` says, and closes it."""
    kind = picture_type(path)
    try:
        with replacing(path) as stream:
            figure.savefig(stream, dpi=130, format=kind)
    except RampwrapError:
        raise
    except Exception as error:
        # Some types need programs or packages besides: pgf LaTeX, webp Pillow with its codec.
        raise InputError(f"{os.fspath(path)} cannot be drawn ({error}); end it in .png, .svg or .pdf.") from error
    finally:
        pyplot().close(figure)


def model_picture(model: CostModel, timings: Timings, path: str | os.PathLike[str]) -> None:
    """Predicted against measured time, a dot a cell; the configs near the best of their workload stand out."""
    plt = pyplot()
    predicted, us = model.predict(timings.counts), timings.us
    seen = ~np.isnan(us) & np.isfinite(predicted)
    near = seen & (us < 1.1 * np.nanmin(us, axis=1, keepdims=True))
    off = predicted[near] / us[near] - 1.0
    figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    axes.scatter(us[seen & ~near], predicted[seen & ~near], s=3, color="0.8", label="other configs")
    axes.scatter(us[near], predicted[near], s=4, color="C0", label="within 10 % of the best")
    ends = [us[seen].min(), us[seen].max()]
    axes.plot(ends, ends, color="0.3", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured us")
    axes.set_ylabel("predicted us")
    axes.set_title(
        f"{model.name}, {timings.kernel}, held out: {np.abs(off).mean():.1%} mean error near the best", fontsize=10
    )
    axes.legend(frameon=False)
    save_figure(figure, path)


def picture(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Speedup over the baseline, a dot a workload, with the oracle's as the ceiling; PNG or any type matplotlib knows."""
    plt = pyplot()
    t, ours = comparison.timings, subject(comparison)
    static, oracle = comparison.us(comparison.baseline), np.nanmin(t.us, axis=1)
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.axhline(1.0, color="0.6", lw=1)
    axes.scatter(
        t.num_tokens * 0.97, static / oracle, s=26, facecolors="none", edgecolors="0.45", label="oracle (measured best)"
    )
    axes.scatter(t.num_tokens * 1.03, static / comparison.us(ours), s=18, color="C0", label=f"{ours} (held out)")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in the batch")
    axes.set_ylabel(f"speedup over {comparison.baseline}")
    s = comparison.summary(ours)
    axes.set_title(
        f"{t.kernel}, {t.shape}, {t.device.name}: {s.speedup:.3f}x, captured {s.captured_headroom:.0%}", fontsize=10
    )
    axes.legend(frameon=False)
    save_figure(figure, path)
