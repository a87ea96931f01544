"""What placing experts by predicted time is worth over balancing tokens, on recordings that are drawn, no GPU.

    python benchmarks/place.py --out results/cpu-place.json

A simulated kernel's rank of 128 experts on 4 ranks, FP8. Every layer draws its popularities once (dirichlet), every step its
tokens and a lognormal factor a expert. Placements see the first half of 400 steps and are judged on the second; "hindsight"
are placements judged on the steps they saw, which tells how much of a gain would be noise. Gains over contiguous.
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

import attrs
import numpy as np
from common import stamp

from rampwrap.ep.study import CONTIGUOUS, study
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import profile
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.recorded import Recording, read_recording
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(128, 8, 2048, 768, "fp8")
RANKS, LAYERS, STEPS, NOISE = 4, 4, 400, 0.3
CASES = ((0.1, (64,)), (0.3, (2048,)), (0.3, (64, 256, 2048)))
"Concentration of the popularities, and the token counts that steps draw from."
ROUTINGS = ("uniform", "dirichlet:1.0", "dirichlet:0.3", "zipf:1.2")


def rank_plan(redundant: int) -> Plan:
    """Of one rank, from a full table of the simulated kernel."""
    shape = attrs.evolve(SHAPE, num_local_experts=(SHAPE.num_experts + redundant) // RANKS)
    rows = workload_grid([1, 4, 16, 64, 128, 256, 1024, 4096], [Routing.parse(name) for name in ROUTINGS])
    return make_plan(profile(SimKernel(shape), shape, rows))


def recorded(concentration: float, tokens: tuple[int, ...], steps: int, seed: int) -> IntArray:
    """Counts [steps, layers, experts]."""
    rng = np.random.default_rng(seed)
    out = np.zeros((steps, LAYERS, SHAPE.num_experts), dtype=np.int64)
    for layer in range(LAYERS):
        popularity = rng.dirichlet(np.full(SHAPE.num_experts, concentration))
        for step in range(steps):
            now = np.log(popularity + 1e-12) + rng.normal(0, NOISE, SHAPE.num_experts)
            score = rng.gumbel(size=(int(rng.choice(tokens)), SHAPE.num_experts)) + now
            ids = np.argpartition(-score, SHAPE.top_k - 1, axis=1)[:, : SHAPE.top_k]
            out[step, layer] = np.bincount(ids.ravel(), minlength=SHAPE.num_experts)
    return out


def twice(recording: Recording) -> Recording:
    """The first half of the steps, and the same as the second half."""
    first = recording.step < recording.steps // 2
    halves = [np.concatenate([its[first], its[first]]) for its in (recording.counts, recording.layer)]
    step = np.concatenate([recording.step[first], recording.step[first] + recording.steps // 2])
    return attrs.evolve(recording, counts=halves[0], step=step, layer=halves[1])


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for redundant in (0, 8):
        plan = rank_plan(redundant)
        for concentration, tokens in CASES:
            with tempfile.TemporaryDirectory() as folder:
                np.save(f"{folder}/recorded.npy", recorded(concentration, tokens, args.steps, args.seed))
                recording = read_recording(f"{folder}/recorded.npy", SHAPE.num_experts)
            row: dict[str, Any] = {"redundant": redundant, "dirichlet": concentration, "tokens": tokens}
            for name, its in (("held_out", recording), ("hindsight", twice(recording))):
                judged = study(plan, its, RANKS, redundant, most_steps=args.steps).judged
                row[name] = {key: judged[CONTIGUOUS].slowest_us / each.slowest_us for key, each in judged.items()}
            found.append(row)
            gains = "; ".join(
                f"{name}: tokens {row[name]['token-balanced']:.3f}x, time {row[name]['predicted time']:.3f}x"
                for name in ("held_out", "hindsight")
            )
            print(f"dirichlet {concentration} {tokens} tokens, {redundant} replicas: {gains}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({**stamp(), "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
