"""Host microseconds that the Dispatcher adds to a launch, on the simulated kernel whose launch does nothing.

    python benchmarks/overhead.py [--out FILE.json]

Three ways to call, interleaved: the kernel directly, pinned, and eager host selection from a numpy histogram of
topk_ids (no GPU, hence no synchronisation). The plan is fitted to a table of 24 configs and holds the shortlists
that `rampwrap fit` makes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from rampwrap import Dispatcher, MoEShape, Routing, Workload
from rampwrap.fitting import make_plan
from rampwrap.profiler import profile
from rampwrap.routing import workload_grid
from rampwrap.sim import NullKernel, SimKernel

SHAPE = MoEShape(64, 8, 2048, 1024)
CALLS, ROUNDS = 500, 40


def per_call_us(call: Callable[[], object]) -> float:
    """Mean of `CALLS` calls."""
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - start) / CALLS / 1e3


def main() -> None:
    """Prints the medians over rounds, with quartiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    out = parser.parse_args().out
    routings = [Routing.parse(name) for name in ("uniform", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2")]
    table = profile(SimKernel(SHAPE), SHAPE, workload_grid([2**p for p in range(13)], routings), quiet=True)
    plan = make_plan(table)
    object.__setattr__(plan, "kernel", NullKernel.name)
    kernel = NullKernel(SHAPE)
    result: dict[str, dict[str, float]] = {}
    for tokens in (1, 64, 512, 4096):
        ids = Workload(tokens, Routing.parse("zipf:1.2")).topk_ids(64, 8)
        chooses, pins = Dispatcher(kernel, plan), Dispatcher(kernel, plan).pin(0)
        config = kernel.configs[0]
        calls: dict[str, Callable[[], object]] = {
            "direct": lambda ids=ids: kernel.launch(config, ids),
            "pinned": lambda ids=ids, pins=pins: pins(ids),
            "eager": lambda ids=ids, chooses=chooses: chooses(ids),
        }
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                samples[name].append(per_call_us(call))
        base = statistics.median(samples["direct"])
        for name in ("pinned", "eager"):
            added = np.array(samples[name]) - base
            low, middle, high = np.quantile(added, (0.25, 0.5, 0.75))
            result.setdefault(name, {})[str(tokens)] = float(middle)
            print(f"{tokens:>5} tokens  {name:<7} +{middle:6.2f} us  (quartiles {low:.2f} .. {high:.2f})")
    if out:
        with open(out, "w") as stream:  # noqa: PTH123
            json.dump(result, stream, indent=1)


if __name__ == "__main__":
    main()
