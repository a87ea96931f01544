"""Host microseconds that the Dispatcher adds to a launch, on the simulated kernel whose launch does nothing.

    python benchmarks/overhead.py [--out FILE.json]

Ways to call, interleaved: the kernel directly, pinned, and eager host selection from topk_ids in numpy (no GPU,
hence no synchronisation), by the C extension (native) and without it (numpy). The plan is fitted to a table of 24
configs and holds the shortlists that `rampwrap fit` makes; "all" is the same without shortlists, 24 candidates.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import attrs
import numpy as np

from rampwrap import Dispatcher, MoEShape, Routing, Workload
from rampwrap.measure.full import profile
from rampwrap.model import compiled as native
from rampwrap.plan.make import make_plan
from rampwrap.routing.workloads import workload_grid
from rampwrap.testing.sim import NullKernel, SimKernel

SHAPE = MoEShape(64, 8, 2048, 1024)
TOKENS = (1, 64, 256, 512, 1024, 4096)
CALLS, ROUNDS = 200, 40


def per_call_us(call: Callable[[], object], score: object) -> float:
    """Mean of `CALLS` calls, with this extension or, for None, without any."""
    built, native.score = native.score, score
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    took = time.perf_counter_ns() - start
    native.score = built
    return took / CALLS / 1e3


def main() -> None:
    """Prints the medians over rounds, with quartiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    out = parser.parse_args().out
    routings = [
        Routing.parse(name) for name in ("uniform", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2")
    ]
    table = profile(SimKernel(SHAPE), SHAPE, workload_grid([2**p for p in range(13)], routings), quiet=True)
    plan = make_plan(table)
    object.__setattr__(plan, "kernel", NullKernel.name)
    kernel = NullKernel(SHAPE)
    config, fast = kernel.configs[0], native.score
    if fast is None:
        print(
            "rampwrap.model._score is not built ('pip install -e .' builds it where there is a C compiler): numpy only"
        )
    result: dict[str, dict[str, float]] = {}
    for tokens in TOKENS:
        ids = Workload(tokens, Routing.parse("zipf:1.2")).topk_ids(64, 8)
        some, pins = Dispatcher(kernel, plan), Dispatcher(kernel, plan).pin(0)
        every = Dispatcher(kernel, attrs.evolve(plan, buckets=()))
        calls: dict[str, tuple[Callable[[], object], object]] = {
            "direct": (lambda ids=ids: kernel.launch(config, ids), None),
            "pinned": (lambda ids=ids, pins=pins: pins(ids), None),
            "numpy": (lambda ids=ids, some=some: some(ids), None),
            "numpy, all": (lambda ids=ids, every=every: every(ids), None),
        }
        if fast is not None:
            calls["native"] = (calls["numpy"][0], fast)
            calls["native, all"] = (calls["numpy, all"][0], fast)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, (call, score) in calls.items():
                samples[name].append(per_call_us(call, score))
        base = statistics.median(samples.pop("direct"))
        for name, taken in samples.items():
            low, middle, high = np.quantile(np.array(taken) - base, (0.25, 0.5, 0.75))
            result.setdefault(name, {})[str(tokens)] = float(middle)
            print(f"{tokens:>5} tokens  {name:<11} +{middle:6.2f} us  (quartiles {low:.2f} .. {high:.2f})")
    if out:
        with open(out, "w") as stream:  # noqa: PTH123
            json.dump(result, stream, indent=1)


if __name__ == "__main__":
    main()
