"""vLLM with the plugin against vLLM without it, end to end: output tokens/s and time per token, one or more GPUs.

    python benchmarks/serve_vllm.py --models olmoe --batch-size 8 32 64 128 256 512 --routing uniform dirichlet:0.1 --out OUT.json

Dummy weights behind a config.json that this script writes, routing by vLLM's own simulation hook, default CUDA graphs.
Arms, each an engine in a process of its own:

    installed   vLLM as it comes, with the table it ships for the shape where there is one
    static      vLLM with a table tuned under uniform routing and exported for it (VLLM_TUNED_CONFIG_FOLDER)
    plugin      vLLM with rampwrap and a plan, and nothing else changed

As many engines of a model as fit live on one GPU at the same time and are measured in turn, so that all see the same
clocks; only one runs at a time. `--cpus` drives all engines of a turn from the quietest of some CPUs: on a shared host
the same engine takes 12 or 20 ms a step at 512 sequences, depending on its CPU. `--restart` starts the plugin's engine
and the installed one once more at the end, each alone on the GPU, for the start-up cost with warm caches and the memory
that the driver sees. Needs vLLM 0.26 importable; models are spread over the GPUs given with `--gpus`. The FP8 model
needs the CuTe kernels (`rampwrap build-kernels`, $RAMPWRAP_CUTE_LIBRARY).
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from serve_vllm_setup import ARMS, MODELS, environment_of, free_gb, needed_gb, prepare, settings_of

PROFILED = 6
"Steps of a cell that run under torch's profiler."


class Arm:
    """An engine in a process of its own."""

    def __init__(self, name: str, settings: dict[str, Any], environment: dict[str, str], log: pathlib.Path) -> None:
        self.name, self.log = name, log
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).parent / "serve_vllm_arm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self._send(settings)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the engine of arm {self.name!r} ended with {self._process.returncode}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def started(self) -> dict[str, Any]:
        """Waits for the engine; how long it took, and its memory."""
        return self._receive() | {"wall_s": time.monotonic() - self._start}

    def __call__(self, do: str, **more: Any) -> dict[str, Any]:
        self._send({"do": do, **more})
        return self._receive()

    def stop(self) -> None:
        if self._process.poll() is None:
            try:
                self._send({"do": "quit"})
                self._process.wait(20)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()


def say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:4.0f}s] {text}", flush=True)


def measure_group(
    name: str, arms: dict[str, Arm], arguments: argparse.Namespace, deadline: float, start: float, rows: list[Any]
) -> None:
    """All measurements of engines that live at the same time, in turn."""
    order = list(arms)
    longest = 0.0
    for number in range(arguments.rounds):
        began = time.monotonic()
        if number and began + longest > deadline:
            say(start, f"{name}: the time allows {number} rounds of {arguments.rounds}")
            break
        for routing, batch in itertools.product(arguments.routing, arguments.batch_size):
            rows += [{"round": number, **row} for row in decode(arms, order, routing, batch, arguments)]
        for routing in arguments.routing if arguments.mixed else ():
            settle(arms, arguments.cpus)
            for arm in order:
                found = arms[arm]("mixed", routing=routing, requests=arguments.mixed, concurrency=128)
                rows.append({"what": "mixed", "arm": arm, "routing": routing, "round": number, **found})
        longest = max(longest, time.monotonic() - began)
        order = order[1:] + order[:1]
        say(start, f"{name}: round {number + 1} of {', '.join(arms)}")


def quietest(cpus: list[int]) -> int:
    """The CPU on which a loop of Python runs fastest right now: on shared hosts some take twice as long for minutes."""
    took = {}
    before = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, [cpu])
            samples = []
            for _ in range(3):
                start = time.perf_counter()
                sum(range(30_000))
                samples.append(time.perf_counter() - start)
            took[cpu] = min(samples)
    finally:
        os.sched_setaffinity(0, before)
    return min(took, key=lambda cpu: took[cpu])


def settle(arms: dict[str, Arm], cpus: list[int]) -> None:
    """Puts the driving threads of all engines, of which one runs at a time, on the quietest of some CPUs."""
    try:
        cpu = [quietest(cpus)] if cpus else []
    except OSError:  # a sandbox may know no affinities, or not these CPUs
        return
    for engine in arms.values() if cpu else ():
        engine("pin", cpus=cpu)


def decode(
    arms: dict[str, Arm], order: list[str], routing: str, batch: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One cell: every engine holds the batch, and a few steps of each are timed in turn, so that a slow moment of the
    host meets all of them; then the GPU time of a step, which does not depend on the host."""
    total = (arguments.steps + 1) * arguments.turns + (PROFILED + 1)
    for arm in order:
        arms[arm]("begin", batch=batch, routing=routing, steps=total)
    where = {"routing": routing, "batch": batch}
    for turn in range(arguments.turns):
        settle(arms, arguments.cpus)
        for arm in order:
            yield {"what": "decode", "arm": arm, "turn": turn, **where} | arms[arm]("go", steps=arguments.steps)
        order = order[1:] + order[:1]
    for arm in order:
        yield {"what": "share", "arm": arm, **where} | arms[arm]("go", steps=PROFILED, profile=True)
        arms[arm]("end")


def run_model(name: str, gpu: str, arguments: argparse.Namespace, start: float, results: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        made = prepare(name, folder, arguments, gpu)
        settings = settings_of(name, made, folder, arguments)
        fit = max(1, int(0.95 * free_gb(gpu) // needed_gb(made, settings)))
        fit = min(fit, arguments.concurrent or fit)
        # The pair that matters most shares the clocks, if only two fit.
        wanted = [arm for arm in ("plugin", "static", "installed") if arm in arguments.arms]
        groups = [wanted[i : i + fit] for i in range(0, len(wanted), fit)]
        say(
            start, f"{name} on GPU {gpu}: {made['shape']}, vLLM ships {made['shipped'] or 'no table'}; engines {groups}"
        )
        rows: list[dict[str, Any]] = []
        starts: dict[str, Any] = {}
        choices: dict[str, Any] = {}
        memory: dict[str, Any] = {}
        results[name] = {
            "rows": rows,
            "starts": starts,
            "memory": memory,
            "choices": choices,
            "shipped": made["shipped"],
        }
        logs = arguments.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        share = (arguments.budget_s - (time.monotonic() - start)) / len(groups)
        for group in groups:
            deadline = time.monotonic() + share
            arms = {a: Arm(a, settings, environment_of(a, folder, gpu), logs / f"{name}-{a}.log") for a in group}
            try:
                for arm, engine in arms.items():
                    starts[arm] = engine.started()
                    say(start, f"{name}: {arm} is up after {starts[arm]['wall_s']:.0f} s")
                if "plugin" in arms and not any(its["layers"] for its in arms["plugin"]("choices")["engines"]):
                    log = (logs / f"{name}-plugin.log").read_text(errors="replace")
                    said = [line for line in log.splitlines() if "rampwrap" in line]
                    raise RuntimeError(
                        "the plugin attached to no layer: " + "; ".join(said[-3:] or ["it says nothing"])
                    )
                measure_group(name, arms, arguments, deadline, start, rows)
                memory |= {arm: engine("memory") for arm, engine in arms.items()}
                if "plugin" in arms:
                    choices |= arms["plugin"]("choices")
            finally:
                for engine in arms.values():
                    engine.stop()
        for number, arm in itertools.product(range(arguments.restart), ("installed", "plugin")):
            free = free_gb(gpu)
            again = Arm(arm, settings, environment_of(arm, folder, gpu), logs / f"{name}-{arm}-again.log")
            try:
                found = again.started()
                starts[f"{arm} again{number or ''}"] = found | {"device_gb": free - free_gb(gpu)}
            finally:
                again.stop()


def costs(result: dict[str, Any]) -> dict[str, float]:
    """What the plugin adds to the installed engine: GPU memory, and seconds of a start with warm caches.

    Memory of torch's allocator after all measurements, of the driver after a start; medians over restarts.
    """
    out: dict[str, float] = {}
    memory, starts = result["memory"], result["starts"]
    if {"plugin", "installed"} <= set(memory):
        for field in ("reserved_gb", "allocated_gb", "peak_gb"):
            out[field] = memory["plugin"][field] - memory["installed"][field]
        out["reserved_share"] = out["reserved_gb"] / memory["plugin"]["card_gb"]
    again = {
        arm: [its for name, its in starts.items() if name.startswith(f"{arm} again")] for arm in ("plugin", "installed")
    }
    if all(again.values()):
        for field in ("wall_s", "engine_s", "device_gb"):
            ours, theirs = (statistics.median(its[field] for its in again[arm]) for arm in ("plugin", "installed"))
            out[field] = ours - theirs
        out["plugin_s"] = statistics.median(its["plugin_s"] for its in again["plugin"])
        out["device_share"] = out["device_gb"] / again["plugin"][0]["card_gb"]
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
    print(f"\n{name}: medians over rounds; tok/s, p50 / p99 ms per token")
    gains: dict[str, Any] = {}
    cells = [("decode", batch) for batch in arguments.batch_size] + ([("mixed", None)] if arguments.mixed else [])
    for routing in arguments.routing:
        print(
            f"  {routing:16s}"
            + "".join(f"{arm:>30s}" for arm in arms)
            + "   tok/s over installed, static    GPU time over installed, static    MoE share, MoE time over installed"
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
            for arm in ("installed", "static"):
                line += f"{ratios.get(arm, {}).get(batch or what, float('nan')):15.3f}x"
            if batch:
                at = {"what": "share", "routing": routing, "batch": batch}
                us, moe = ({a: median_of(rows, f, arm=a, **at) for a in arms} for f in ("gpu_us", "moe_us"))
                for arm in arms:
                    on_gpu[arm][batch] = us[arm] / us.get("plugin", math.nan)
                line += "".join(f"{on_gpu.get(arm, {}).get(batch, math.nan):15.3f}x" for arm in ("installed", "static"))
                if {"plugin", "installed"} <= set(arms):
                    line += f"{moe['installed'] / us['installed']:14.1%}{moe['installed'] / moe['plugin']:10.3f}x"
            print(line)
        gains[routing] = {}
        for arm in ("installed", "static"):
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
    for arm, its in result["starts"].items():
        print(f"  start {arm}: " + ", ".join(f"{key} {value:.2f}" for key, value in its.items()))
    extra = result["costs"] = costs(result)
    if "reserved_gb" in extra:
        print(
            f"  memory, plugin - installed: reserved {extra['reserved_gb']:+.2f} GB ({extra['reserved_share']:+.2%} of the "
            f"card), allocated {extra['allocated_gb']:+.2f} GB, peak {extra['peak_gb']:+.2f} GB"
        )
    if "wall_s" in extra:
        print(
            f"  start-up cost of the plugin, warm caches: wall {extra['wall_s']:+.1f} s, engine {extra['engine_s']:+.1f} s, "
            f"its own {extra['plugin_s']:.1f} s; of the whole device {extra['device_gb']:+.2f} GB "
            f"({extra['device_share']:+.2%} of the card)"
        )
    return gains


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["olmoe"], choices=sorted(MODELS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[8, 32, 64, 128, 256, 512])
    parser.add_argument(
        "--routing", nargs="+", default=["uniform", "dirichlet:0.1"], help="also trace:FILE, lognormal:1.0"
    )
    parser.add_argument("--rounds", type=int, default=2, help="at most; fewer where the time is over")
    parser.add_argument("--turns", type=int, default=8, help="of each engine at a batch, in each round")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a turn")
    parser.add_argument("--mixed", type=int, default=0, metavar="N", help="also a mixed load of so many requests")
    parser.add_argument("--mode", default="default", choices=["default", "piecewise", "eager"])
    parser.add_argument("--capture-sizes", nargs="+", type=int, help="instead of vLLM's own list: starts sooner")
    parser.add_argument("--layers", type=int, help="instead of the model's: more engines fit at the same time")
    parser.add_argument("--concurrent", type=int, help="at most so many engines on a GPU")
    parser.add_argument("--timings", nargs="+", type=pathlib.Path, help="tables for the plan, instead of the model's")
    parser.add_argument("--profile-budget", type=float, default=0.0, metavar="S", help="profile for so long instead")
    parser.add_argument(
        "--cpus",
        type=int,
        nargs="*",
        default=[],
        help="the thread that drives an engine stays on these, in each turn of all engines on the quietest of them",
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    parser.add_argument("--gpus", default=visible, help="0,1: models are spread over them, a model stays on its GPU")
    parser.add_argument("--budget-s", type=float, default=230.0, help="no further round is begun after this time")
    parser.add_argument(
        "--restart", nargs="?", type=int, const=1, default=0, metavar="N", help="start both N times more, caches warm"
    )
    parser.add_argument("--logs", type=pathlib.Path, help="keep vLLM's logs in this folder")
    parser.add_argument("--out", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    start = time.monotonic()
    results: dict[str, Any] = {}
    gpus = arguments.gpus.split(",")
    failures: list[str] = []

    def work(place: int) -> None:
        # Engines of two GPUs run at the same time, on CPUs of their own.
        own = argparse.Namespace(**vars(arguments) | {"cpus": arguments.cpus[place :: len(gpus)]})
        for name in arguments.models[place :: len(gpus)]:
            try:
                run_model(name, gpus[place], own, start, results)
            except Exception as error:
                failures.append(f"{name}: {error}")
                print(f"{name}: {error}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, result in results.items():
        if result["rows"]:
            result["gains"] = report(name, result, arguments)
    if arguments.out is not None:
        import torch
        import triton

        raw = {
            "command": " ".join(sys.argv),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
            "seconds": time.monotonic() - start,
            "failures": failures,
            "models": results,
        }
        arguments.out.write_text(json.dumps(raw, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
