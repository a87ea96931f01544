"""What placing experts by predicted time is worth over balancing tokens, and how far predictions are from measured times.

    python benchmarks/place.py --hindsight --out results/cpu-place.json
    python benchmarks/place.py --dtype fp8 bf16 --redundant 0 --steps 60 --measured 12 --seconds 60 --out FILE.json
    python benchmarks/place.py --loads LOADS.npz --dtype fp8 --redundant 0 --steps 60 --measured 12 --out FILE.json

128 experts of Qwen3-30B on 4 ranks. The CuTe kernels serve where a library of them is found, our Triton kernel on other GPUs,
and a simulated one elsewhere. A table of one rank's part is profiled here, over a dozen configs, and a plan made of it. Recordings
are drawn: every layer draws its popularities once (dirichlet), every step its tokens and a lognormal factor a expert. With --loads
popularities are those of a model on several texts, arrays [layers, experts] of a file: steps that placements see are of all texts
but the last, steps held out of the last. Placements see the first half of the steps and are judged on the second. "hindsight" are
placements judged on the steps they saw, which tells how much of a gain would be noise.

Measured: in some of the steps held out every rank's part is timed alone, with the config that the plan chooses, one rank after the
other on the one GPU, weights not in L2. A step takes as long as its slowest rank. Rows come in all ranks' number, as our dispatch
leaves them. The error is that of the predicted against the measured time: of single ranks, mean and 95th percentile of its size; and
of the mean slowest rank, signed.
"""

import argparse
import functools
import json
import math
import pathlib
import tempfile
import time
from typing import Any

import attrs
import numpy as np
import torch
from common import stamp
from ep_shard import Shard, served, shard

from rampwrap.ep.expert_maps import ExpertMaps
from rampwrap.ep.forecast import Forecast
from rampwrap.ep.study import CONTIGUOUS, TIME, TOKENS, Study, study
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.routing.recorded import Recording, read_recording
from rampwrap.routing.workloads import RecordedWorkload, Routing

SHAPE = SHAPES["qwen3-30b"]
RANKS, LAYERS, STEPS, NOISE = 4, 4, 400, 0.3
CASES = ((0.1, (64,)), (0.3, (256,)), (0.3, (2048,)), (0.3, (64, 256, 2048)))
"Concentration of the popularities, and the token counts that steps draw from."
LOADS = 0.0
"Stands for the concentration where popularities are those of a file."
PROFILED = (1, 8, 64, 256, 1024, 2048, 4096)
HEADER = """\
                                     | gain over contiguous            | by time over   | error of predictions
                                     | predicted:     measured:        | by tokens:     | ranks:        slowest
dtype dirichlet tokens         repl. | tokens   time  tokens   time us | pred.    meas. | mean    p95   rank"""


def rank_shape(dtype: str, redundant: int) -> MoEShape:
    """Of one rank, whose replicas are experts of their own."""
    slots = SHAPE.num_experts + redundant
    return attrs.evolve(SHAPE, num_experts=slots, num_local_experts=slots // RANKS, dtype=dtype)


def loads_in(path: pathlib.Path) -> FloatArray:
    """Shares [texts, layers, experts] of all texts of this model in a file, by name; layers from its first to its last."""
    with np.load(path) as file:
        its = [
            file[name].astype(np.float64)
            for name in sorted(file.files)
            if file[name].shape[-1:] == (SHAPE.num_experts,)
        ]
    its = [each[np.linspace(0, len(each) - 1, LAYERS).round().astype(np.int64)] for each in its]
    return np.stack([each / each.sum(1, keepdims=True) for each in its])


def recorded(
    concentration: float, tokens: tuple[int, ...], steps: int, seed: int, loads: FloatArray | None = None
) -> IntArray:
    """Counts [steps, layers, experts]; the second half of the steps are of the last text."""
    rng = np.random.default_rng(seed)
    out = np.zeros((steps, LAYERS, SHAPE.num_experts), dtype=np.int64)
    for layer in range(LAYERS):
        texts = rng.dirichlet(np.full(SHAPE.num_experts, concentration), 1) if loads is None else loads[:, layer]
        for step in range(steps):
            text = step % max(1, len(texts) - 1) if step < steps // 2 else -1
            now = np.log(texts[text] + 1e-12) + rng.normal(0, NOISE, SHAPE.num_experts)
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


def some(recording: Recording, most: int) -> list[tuple[int, IntArray]]:
    """Layers and counts of some of the steps held out, spread over both."""
    rows = np.flatnonzero(recording.step >= recording.steps // 2)
    chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]
    return [(int(recording.layer[row]), recording.counts[row].astype(np.int64)) for row in chosen]


def launch(its: Shard, slots: IntArray, rank: int, tokens: int) -> Any:
    """A rank's part of a step: slots [ranks, slots of a rank]; its own come first."""
    counts = np.roll(slots, -rank, axis=0).ravel()
    workload = RecordedWorkload(tokens, Routing("trace", "drawn"), counts=tuple(counts.tolist()))
    ids = workload.topk_ids(its.shape.num_experts, its.shape.top_k)
    config = its.plan.configs[its.plan.policy().index(slots[rank], tokens)]
    return functools.partial(its.kernel.launch, config, **its.inputs(ids))


def measured(its: Shard, maps: dict[str, ExpertMaps], steps: list[tuple[int, IntArray]], rounds: int) -> dict[str, Any]:
    """Predicted and measured microseconds by placement, [steps, ranks]."""
    forecast = Forecast.by(its.plan)
    found: dict[str, Any] = {name: {"predicted_us": [], "measured_us": []} for name in maps}
    for layer, counts in steps:
        tokens = int(counts.sum()) // its.shape.top_k
        slots = {name: each.counts(layer, counts) for name, each in maps.items()}
        calls = {(name, rank): launch(its, slots[name], rank, tokens) for name in maps for rank in range(RANKS)}
        us = its.us(calls, rounds)
        for name in maps:
            found[name]["predicted_us"].append([forecast.us(each, tokens) for each in slots[name]])
            found[name]["measured_us"].append([us[name, rank] for rank in range(RANKS)])
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Gains and errors of `measured`."""
    slowest = {
        kind: {name: float(np.max(its[f"{kind}_us"], axis=1).mean()) for name, its in found.items()}
        for kind in ("predicted", "measured")
    }
    ratio = np.concatenate([np.divide(its["predicted_us"], its["measured_us"]).ravel() for its in found.values()]) - 1
    return {
        "slowest_us": slowest,
        "gain": {kind: {name: us[CONTIGUOUS] / its for name, its in us.items()} for kind, us in slowest.items()},
        "time_over_tokens": {kind: us[TOKENS] / us[TIME] for kind, us in slowest.items()},
        "rank_error": {"mean": float(np.abs(ratio).mean()), "p95": float(np.quantile(np.abs(ratio), 0.95))},
        "slowest_error": slowest["predicted"][TIME] / slowest["measured"][TIME] - 1,
    }


def gains(judged: Study) -> dict[str, float]:
    """Of all held-out steps, predicted, over contiguous."""
    us = {name: its.slowest_us for name, its in judged.judged.items()}
    return {name: us[CONTIGUOUS] / its for name, its in us.items()}


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`."""
    its, tokens = row["measured"], ",".join(map(str, row["tokens"]))
    gain, over = its["gain"], its["time_over_tokens"]
    return (
        f"{row['dtype']:6s}{row['dirichlet'] or 'loads':>9} {tokens:15s}{row['redundant']:5d} |"
        f"{gain['predicted'][TOKENS]:6.3f}x{gain['predicted'][TIME]:6.3f}x {gain['measured'][TOKENS]:6.3f}x"
        f"{gain['measured'][TIME]:6.3f}x{its['slowest_us']['measured'][TIME]:5.0f} |{over['predicted']:6.3f}x"
        f"{over['measured']:7.3f}x |{its['rank_error']['mean']:5.1%}{its['rank_error']['p95']:7.1%}{its['slowest_error']:+7.1%}"
    )


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default=served())
    parser.add_argument("--dtype", nargs="+", choices=["fp8", "bf16"], default=["fp8"])
    parser.add_argument("--redundant", nargs="+", type=int, default=[0, 8])
    parser.add_argument(
        "--loads", type=pathlib.Path, metavar="NPZ", help="popularities on several texts [layers, experts]"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of a recording")
    parser.add_argument("--measured", type=int, default=24, help="steps of single layers that are measured")
    parser.add_argument("--hindsight", action="store_true", help="judges placements by the steps they saw, too")
    parser.add_argument("--rounds", type=int, default=2, help="of samples")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further case is begun")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    args.shares = None if args.loads is None else loads_in(args.loads)
    cases = CASES if args.loads is None else tuple((LOADS, tokens) for _, tokens in CASES)
    found: list[dict[str, Any]] = []
    print(f"{args.kernel}\n{HEADER}", flush=True)
    for redundant in args.redundant:
        shards: dict[str, Shard] = {}
        for concentration, tokens in cases:  # types in turn: a run that is cut short has some of each
            for dtype in args.dtype:
                if found and time.monotonic() > until:
                    return
                if dtype not in shards:
                    shape = rank_shape(dtype, redundant)
                    shards[dtype] = shard(args.kernel, shape, PROFILED, rounds=args.rounds)
                row: dict[str, Any] = {"dtype": dtype, "dirichlet": concentration, "tokens": tokens}
                found.append(row | case(shards[dtype], concentration, tokens, redundant, args))
                print(line(found[-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps({**stamp(), "kernel": args.kernel, "cases": found}, indent=1) + "\n")


def case(its: Shard, concentration: float, tokens: tuple[int, ...], redundant: int, args: argparse.Namespace) -> Any:
    """One recording, placed, judged and measured."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/recorded.npy", recorded(concentration, tokens, args.steps, args.seed, args.shares))
        recording = read_recording(f"{folder}/recorded.npy", SHAPE.num_experts)
    judged = study(its.plan, recording, RANKS, redundant, most_steps=args.steps)
    taken = measured(its, judged.maps, some(recording, args.measured), args.rounds)
    found = {"redundant": redundant, "profiled_configs": len(its.configs), "held_out": gains(judged)}
    if args.hindsight:
        found["hindsight"] = gains(study(its.plan, twice(recording), RANKS, redundant, most_steps=args.steps))
    return found | {"measured": summary(taken)}


if __name__ == "__main__":
    with torch.inference_mode():
        main()
