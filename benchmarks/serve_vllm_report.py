"""What `serve_vllm.py` prints and keeps of its measurements: medians, ratios of turns, the plugin's own cost."""

import argparse
import math
import statistics
from typing import Any

import numpy as np
from serve_vllm_setup import ARMS, PLUGINS, requests_of

OTHERS = ARMS[:-1]
"What the plugin is compared with."


def costs(result: dict[str, Any], arm: str) -> dict[str, float]:
    """What the plugin adds to the installed engine: GPU memory, seconds of a first start and of one with warm caches.

    Memory of torch's allocator after all measurements, of the driver after a start; medians over restarts. Of a first start
    what the plugin does by itself, and what Triton compiles for the experts more than in the installed engine.
    """
    out: dict[str, float] = {}
    memory, starts = result["memory"], result["starts"]
    if {arm, "installed"} <= set(memory):
        for field in ("reserved_gb", "allocated_gb", "peak_gb"):
            out[field] = memory[arm][field] - memory["installed"][field]
        out["reserved_share"] = out["reserved_gb"] / memory[arm]["card_gb"]
    if {arm, "installed"} <= set(starts):
        out["first_s"] = starts[arm]["plugin_s"] + starts[arm]["moe_compile_s"] - starts["installed"]["moe_compile_s"]
        out["first_wall_s"] = starts[arm]["wall_s"] - starts["installed"]["wall_s"]
    again = {
        each: [its for name, its in starts.items() if name.startswith(f"{each} again")] for each in (arm, "installed")
    }
    if all(again.values()):
        for field in ("wall_s", "engine_s", "device_gb"):
            ours, theirs = (statistics.median(its[field] for its in again[each]) for each in (arm, "installed"))
            out[field] = ours - theirs
        out["plugin_s"] = statistics.median(its["plugin_s"] + its["moe_compile_s"] for its in again[arm])
        out["device_share"] = out["device_gb"] / again[arm][0]["card_gb"]
    return out


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else float("nan")


def pooled(rows: list[dict[str, Any]], percent: float, **where: Any) -> float:
    """A percentile of the time per token over all rounds, milliseconds."""
    found = [ms for row in rows if all(row.get(key) == value for key, value in where.items()) for ms in row["ms"]]
    return float(np.percentile(found, percent)) if found else float("nan")


def ratio(rows: list[dict[str, Any]], arm: str, **where: Any) -> float:
    """How much more tokens per second than an arm: the median over turns, each of which compares like with like."""
    speed = {
        (row["arm"], row["round"], row.get("turn")): row["tokens_per_s"]
        for row in rows
        if all(row.get(key) == value for key, value in where.items())
    }
    found = [
        speed["plugin", *turn] / value
        for (name, *turn), value in speed.items()
        if name == arm and ("plugin", *turn) in speed
    ]
    return statistics.median(found) if found else float("nan")


def median_of(rows: list[dict[str, Any]], field: str, **where: Any) -> float:
    found = [row[field] for row in rows if all(row.get(key) == value for key, value in where.items())]
    return statistics.median(found) if found else float("nan")


def report(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; gains by routing, as geometric means over batches of 64 and more and over all."""
    rows = result["rows"]
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    others = [arm for arm in OTHERS if arm in arms]
    for arm, plans in result["served"].items():
        print(f"  {arm} serves by {'; '.join(plans)}")
    print(f"\n{name}: medians over rounds; tok/s, p50 / p99 ms per token")
    gains: dict[str, Any] = {}
    cells = [("decode", batch) for batch in arguments.batch_size] + ([("mixed", None)] if arguments.mixed else [])
    for routing in arguments.routing:
        print(
            f"  {routing:16s}"
            + "".join(f"{arm:>30s}" for arm in arms)
            + f"   plugin's tok/s over {', '.join(others)}    GPU time over the same    MoE share, MoE time over installed"
        )
        ratios: dict[str, dict[Any, float]] = {arm: {} for arm in arms}
        on_gpu: dict[str, dict[Any, float]] = {arm: {} for arm in arms}
        for what, batch in cells:
            where = {"what": what, "routing": routing, **({"batch": batch} if batch else {})}
            line = f"  {what if batch is None else batch:>16}"
            speed = {arm: median_of(rows, "tokens_per_s", arm=arm, **where) for arm in arms}
            for arm in arms:
                p50, p99 = (pooled(rows, percent, arm=arm, **where) for percent in (50, 99))
                line += f"{speed[arm]:14.0f} {p50:7.2f}/{p99:7.2f}"
                ratios[arm][batch or what] = ratio(rows, arm, **where)
            for arm in others:
                line += f"{ratios.get(arm, {}).get(batch or what, float('nan')):15.3f}x"
            if batch:
                at = {"what": "share", "routing": routing, "batch": batch}
                us, moe = ({a: median_of(rows, f, arm=a, **at) for a in arms} for f in ("gpu_us", "moe_us"))
                for arm in arms:
                    on_gpu[arm][batch] = us[arm] / us.get("plugin", math.nan)
                line += "".join(f"{on_gpu.get(arm, {}).get(batch, math.nan):15.3f}x" for arm in others)
                if {"plugin", "installed"} <= set(arms):
                    line += f"{moe['installed'] / us['installed']:14.1%}{moe['installed'] / moe['plugin']:10.3f}x"
            print(line)
        gains[routing] = {}
        for arm in others:
            its = {key: value for key, value in ratios.get(arm, {}).items() if not math.isnan(value)}
            large = [value for key, value in its.items() if isinstance(key, int) and key >= 64]
            gains[routing][arm] = {
                "all": geometric_mean([value for key, value in its.items() if isinstance(key, int)]),
                "batch>=64": geometric_mean(large),
                "worst": min(its.values(), default=float("nan")),
                "GPU time": geometric_mean(list(on_gpu.get(arm, {}).values())),
                "GPU time, batch>=64": geometric_mean([x for size, x in on_gpu.get(arm, {}).items() if size >= 64]),
            }
            if its:
                print(
                    f"  over {arm}: " + ", ".join(f"{key} {value:.3f}x" for key, value in gains[routing][arm].items())
                )
    result["prefill_gains"] = report_prefill(rows, arms, arguments)
    for arm, its in result["starts"].items():
        print(f"  start {arm}: " + ", ".join(f"{key} {value:.2f}" for key, value in its.items()))
    result["costs"] = {arm: report_costs(arm, costs(result, arm)) for arm in PLUGINS if arm in result["starts"]}
    return gains


def report_costs(arm: str, extra: dict[str, float]) -> dict[str, float]:
    """Prints what the plugin costs in memory and in time to start, and returns it."""
    if "reserved_gb" in extra:
        print(
            f"  memory, {arm} - installed: reserved {extra['reserved_gb']:+.2f} GB ({extra['reserved_share']:+.2%} of the "
            f"card), allocated {extra['allocated_gb']:+.2f} GB, peak {extra['peak_gb']:+.2f} GB"
        )
    if "first_s" in extra:
        print(
            f"  first start of {arm}: its own and its kernels' {extra['first_s']:.1f} s, wall {extra['first_wall_s']:+.1f} s"
        )
    if "wall_s" in extra:
        print(
            f"  start of {arm} with warm caches: its own {extra['plugin_s']:.1f} s, wall {extra['wall_s']:+.1f} s, engine "
            f"{extra['engine_s']:+.1f} s; of the whole device {extra['device_gb']:+.2f} GB ({extra['device_share']:+.2%} of the card)"
        )
    return extra


def report_prefill(rows: list[dict[str, Any]], arms: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompt tokens/s and milliseconds to the first token of each cell; the plugin's gain over each other arm."""
    gains: dict[str, Any] = {}
    for routing in arguments.routing if arguments.prompts else ():
        print(
            f"  prefill, {routing}: prompt tokens/s, ms to the last first token; tokens/s and GPU time over {arms[:-1]}"
        )
        on_host: dict[str, list[float]] = {arm: [] for arm in arms}
        on_gpu: dict[str, list[float]] = {arm: [] for arm in arms}
        for prompt in arguments.prompts:
            for requests in requests_of(prompt):
                where = {"routing": routing, "prompt": prompt, "requests": requests}
                us = {a: median_of(rows, "gpu_us", arm=a, what="prefill share", **where) for a in arms}
                line = f"  {requests:>4} x {prompt:<6}"
                for arm in arms:
                    its = [row for row in rows if row["arm"] == arm and row["what"] == "prefill"]
                    speed = median_of(its, "tokens_per_s", **where)
                    line += f"{speed:12.0f} {1e3 * prompt * requests / speed:8.2f}"
                    on_host[arm].append(ratio(rows, arm, what="prefill", **where))
                    on_gpu[arm].append(us[arm] / us.get("plugin", math.nan))
                print(line + "".join(f"  {on_host[arm][-1]:6.3f}x {on_gpu[arm][-1]:6.3f}x" for arm in arms[:-1]))
        gains[routing] = {
            arm: {
                "tokens/s": geometric_mean(on_host[arm]),
                "worst": min(on_host[arm]),
                "GPU time": geometric_mean(on_gpu[arm]),
            }
            for arm in arms[:-1]
        }
        print(f"  geometric means: {gains[routing]}")
    return gains
