"""How performance regions are shown: a table, JSON, a picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rampwrap import schema
from rampwrap.compare.report import pyplot, save_figure
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.bounds import HELD_OUT, Bound, Region, regions


def table(found: Mapping[str, Sequence[Region]]) -> str:
    """The regions of named shapes, a line a batch; predictions as ``yes`` or ``-``, each beside the published one."""
    lines = [
        f"{'layer':<16} {'tokens':>6} {'tile':>8} {'rho':>6} {'lambda':>6} {'omega':>6} {'kappa':>5}"
        f" {'swizzle':>15} {'split-K':>15} {'wide N':>15}   (derived rule / published rule)"
    ]
    for name, rows in found.items():
        for r in rows:
            line = f"{name + '*' * (name in HELD_OUT):<16} {r.num_tokens:>6} {f'{r.tile.block_m}x{r.tile.block_n}':>8}"
            line += f" {r.up.rho:>6.0f} {r.up.n_tiles:>6} {r.up.omega:>6.1f} {r.up.kappa:>5}"
            for v in (r.swizzle, r.split_k, r.wide_n):
                ours, theirs = f"yes +{v.gain:.0%}" if v.helps else "-", "yes" if v.published else "-"
                line += f" {f'{ours} / {theirs}':>15}"
            lines.append(line)
    return "\n".join([*lines, "rho to kappa of the up launch; uniform routing; * not looked at while deriving"])


def run(
    shapes: Mapping[str, MoEShape], device: Device, token_counts: Sequence[int], plot: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """The command ``rampwrap regions``: JSON of every region by name, the table as ``text``, a picture if asked for."""
    found = {name: [regions(shape, device, tokens) for tokens in token_counts] for name, shape in shapes.items()}
    if plot:
        picture(found, device, plot)
    raw = {name: [region.to_dict() for region in rows] for name, rows in found.items()}
    return {"device": schema.dump(device), "regions": raw, "held_out": list(HELD_OUT), "text": table(found)}


def picture(found: Mapping[str, Sequence[Region]], device: Device, path: str | os.PathLike[str]) -> None:
    """Weight bytes of an expert's up launch against wave use, with the regions shaded; PNG or any type matplotlib knows."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    points = [(name, r) for name, rows in found.items() for r in rows]
    megabytes = [r.up.n * r.up.k * Bound(device, r.shape, 1).element / 1e6 for _, r in points]
    half, limit = device.l2_bytes / 2e6, points[0][1].split_k.threshold
    axes.axvspan(half, 2 * max(half, *megabytes), color="C0", alpha=0.1, label="swizzle can help: over half of L2")
    axes.axvline(1440 * 128 * 128 / 1e6, color="C0", ls=":", label="published: lambda kappa > 1440")
    axes.axhspan(0.05, limit, color="C1", alpha=0.1, label="split-K can help: HBM not saturated")
    for omega, color, rule in ((0.2, "C1", "split-K below"), (1.0, "C2", "wide N above")):
        axes.axhline(omega, color=color, ls=":", label=f"published: {rule} {omega}")
    for (name, r), x in zip(points, megabytes, strict=True):
        kind, color = "s" if r.swizzle.helps else "o", "C2" if r.wide_n.helps else "0.4"
        axes.plot(x, r.up.omega, kind, color=color, mfc="none" if name in HELD_OUT else color)
        axes.annotate(f"{name} {r.num_tokens}", (x, r.up.omega), xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="weights of an expert, up launch [MB]", ylabel="omega = CTAs / SMs")
    axes.set_title(f"{device.name}; green: wide N predicted to help, square: swizzle, hollow: held out", fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)
