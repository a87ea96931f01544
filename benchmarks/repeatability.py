"""How well a cell repeats, by how long one replay lasts: the noise that regret at large batches is made of.

    python benchmarks/repeatability.py [--model olmoe] [--batch-size 768 3072] [--out FILE.json]

Measures the leading configs of one workload several times over, as the profiler does (survey, then interleaved
rounds), with replays of 0.4 ms, 2 ms and 8 ms. Prints the standard deviation between two such measurements of a
cell after what all cells share is taken out, and what the best config of one loses in the other.
"""

import argparse
import functools
import json

import numpy as np

from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import SHAPES
from rampwrap.measure.graph_timer import GraphTimer
from rampwrap.measure.rounds import summarise
from rampwrap.routing.workloads import Routing, Workload

LEADERS, ROUNDS, REPEATS = 32, 4, 3


def main() -> None:
    """One line for each batch and length of replay."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="olmoe")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[768, 3072])
    parser.add_argument("--out")
    a = parser.parse_args()
    shape, device = SHAPES[a.model], Device.current()
    kernel = make_kernel("triton_fused_moe", shape)
    rng = np.random.default_rng(0)
    result = []
    for tokens in a.batch_size:
        ids = Workload(tokens, Routing.parse("dirichlet:0.2"), "eval").topk_ids(shape.num_experts, shape.top_k)
        inputs = kernel.inputs(shape, torch.from_numpy(ids).cuda())  # type: ignore[attr-defined]
        wide = [config for config in kernel.configs if config["block_m"] >= 64 and config["block_n"] >= 128][:LEADERS]
        kernel.precompile(wide, **inputs)  # type: ignore[attr-defined]
        for target_us in (400.0, 2000.0, 8000.0):
            timer = GraphTimer(device.l2_bytes, shape.weight_bytes, target_us=target_us)
            ready = [timer.prepare([functools.partial(kernel.launch, config, **inputs)]) for config in wide]
            runs = []
            for _ in range(REPEATS):
                samples: dict[int, list[list[float]]] = {index: [] for index in range(len(wide))}
                for _ in range(ROUNDS):
                    for index in rng.permutation(len(wide)).tolist():
                        samples[index].append(ready[index].sample())
                found = summarise(samples)
                runs.append(np.log([found[index].us for index in range(len(wide))]))
            ready.clear()
            timer.release()
            pairs = [(runs[i], runs[j]) for i in range(REPEATS) for j in range(REPEATS) if i < j]
            apart = [(one - two) - np.median(one - two) for one, two in pairs]
            deviation = float(np.std(np.concatenate(apart)))
            lost = float(np.mean([np.exp(two[one.argmin()] - two.min()) - 1 for one, two in pairs]))
            result.append({"num_tokens": tokens, "target_us": target_us, "deviation": deviation, "oracle_loses": lost})
            print(
                f"{tokens:>5} tokens, {target_us / 1e3:3.1f} ms: cells repeat within {deviation:.2%}, the oracle loses {lost:.2%}"
            )
    if a.out:
        with open(a.out, "w") as stream:  # noqa: PTH123
            json.dump(result, stream, indent=1)


if __name__ == "__main__":
    main()
