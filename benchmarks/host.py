"""What rampwrap costs on the host, no GPU: a choice by the Dispatcher, and the first import.

    python benchmarks/host.py --out results/cpu-host.json

choice  microseconds on top of a launch that does nothing, by token count; ways to call in turn: pinned, and chosen from
        topk_ids by the compiled scorer (native) and without it (numpy). The plan is fitted to a simulated table of 24 configs
        and holds the shortlists that `rampwrap fit` makes; "all" is the same without shortlists. Medians, with quartiles.
import  milliseconds of a fresh process, one after the other, byte code there before; Python's own start in a row of its own.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from common import stamp

from rampwrap import Dispatcher, MoEShape, Routing, Workload
from rampwrap.measure.full import profile
from rampwrap.model import compiled
from rampwrap.plan.make import make_plan
from rampwrap.routing.workloads import workload_grid
from rampwrap.testing.sim import NullKernel, SimKernel

SHAPE = MoEShape(64, 8, 2048, 1024)
TOKENS = (1, 64, 256, 512, 1024, 4096)
ROUTINGS = ("uniform", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2")
PROFILED = [2**power for power in range(13)]
CALLS = 200
PROCESSES = {
    "python itself": ["-c", "pass"],
    "import rampwrap": ["-c", "import rampwrap"],
    "from rampwrap import Dispatcher": ["-c", "from rampwrap import Dispatcher"],
    "rampwrap --help": ["-m", "rampwrap", "--help"],
}


def per_call_us(call: Callable[[], object], score: object) -> float:
    """Mean of `CALLS` calls, with this scorer or, for None, without any."""
    built, compiled.score = compiled.score, score
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    took = time.perf_counter_ns() - start
    compiled.score = built
    return took / CALLS / 1e3


def choice(rounds: int) -> dict[str, dict[int, list[float]]]:
    """Quartiles of the microseconds that each way to call adds, by token count."""
    rows = workload_grid(PROFILED, [Routing.parse(name) for name in ROUTINGS])
    kernel = NullKernel(SHAPE)
    plan = attrs.evolve(make_plan(profile(SimKernel(SHAPE), SHAPE, rows, quiet=True)), kernel=kernel.name)
    some, pinned = Dispatcher(kernel, plan), Dispatcher(kernel, plan).pin(0)
    every = Dispatcher(kernel, attrs.evolve(plan, buckets=()))
    ways: dict[str, tuple[Callable[[Any], object], object]] = {
        "direct": (functools.partial(kernel.launch, kernel.configs[0]), None),
        "pinned": (pinned, None),
        "numpy": (some, None),
        "numpy, all": (every, None),
    }
    if compiled.score is not None:
        ways |= {"native": (some, compiled.score), "native, all": (every, compiled.score)}
    else:
        print("rampwrap.model._score is not built ('pip install -e .' builds it): numpy alone", file=sys.stderr)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in ways if name != "direct"}
    for tokens in TOKENS:
        ids = Workload(tokens, Routing.parse("zipf:1.2")).topk_ids(SHAPE.num_experts, SHAPE.top_k)
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (call, score) in ways.items():
                samples[name].append(per_call_us(functools.partial(call, ids), score))
        base = statistics.median(samples["direct"])
        for name, its in found.items():
            its[tokens] = low, middle, high = np.quantile(np.array(samples[name]) - base, (0.25, 0.5, 0.75)).tolist()
            print(f"{tokens:>5} tokens  {name:<11} +{middle:6.2f} us  (quartiles {low:.2f} .. {high:.2f})", flush=True)
    return found


def first_import(runs: int) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of whole processes."""
    found = {}
    for name, arguments in PROCESSES.items():
        took = []
        for _ in range(runs + 1):
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            took.append((time.perf_counter() - started) * 1e3)
        del took[0]
        found[name] = {"median": statistics.median(took), "least": min(took), "most": max(took)}
        print(f"{name:32} " + "  ".join(f"{key} {its:5.0f} ms" for key, its in found[name].items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["choice", "import"])
    parser.add_argument("--rounds", type=int, default=40, help=f"of {CALLS} calls, by each way")
    parser.add_argument("--runs", type=int, default=15, help="processes of a kind")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    found = stamp()
    if a.only != "import":
        found["choice_us"] = choice(a.rounds)
    if a.only != "choice":
        found["import_ms"] = first_import(a.runs)
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
