"""Random launches of the CuTe kernels, checked; a process of its own, so that a kernel that hangs can be killed.

    python tests/gpu/kernels/cute_stress.py --launches 10000
    compute-sanitizer --tool memcheck  python tests/gpu/kernels/cute_stress.py --launches 40 --each
    compute-sanitizer --tool racecheck python tests/gpu/kernels/cute_stress.py --launches 40 --each

Every launch draws a layer, a batch, a config, group_m and waves; memory is poisoned, and the result is compared with
float64. Before each chunk the chunk is printed, with --each every launch: the last line names what hung.
"""

import argparse
import random
import sys
import time

import attrs
import torch

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.configs import FORMS, WIDTHS
from rampwrap.routing.workloads import Routing, Workload

SHAPES = (MoEShape(8, 2, 512, 256), MoEShape(32, 4, 256, 384), MoEShape(64, 8, 768, 128), MoEShape(512, 10, 256, 128))
TOKENS = (1, 2, 3, 7, 8, 9, 17, 33, 64, 100, 257, 600)
ROUTINGS = ("uniform", "zipf:1.2", "hot:1", "dirichlet:0.1")
CHUNK = 100
EDGES = 24
"Batches of `COUNTS` for each layer of the ragged form."
COUNTS = sorted({0, 1, *(width + more for width in (*WIDTHS, 40, 56, 72, 112, 144) for more in (-1, 0, 1)), 260})
"Tokens of an expert at which the ragged form takes another width, or another block."


# In FP8 the tensor cores add 128 products in fewer bits than float32: values of h near the middle of two FP8 numbers
# fall to the other side, 6 % of such a value. Layers of models are at 0.0033-0.0049, small ones reach 0.0091.
BOUND = {"bf16": 5e-3, "fp8": 1.2e-2}
"Largest relative error (Frobenius norm) against float64 with the same quantisation steps; rounding to bf16 is 1.7e-3."


def poison(memory):
    """Fills a workspace with NaN."""
    for tensor in attrs.asdict(memory, recurse=False).values():
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(0xFF)
    return memory


def edges(rng, shape, most):
    """int32 [T, top_k]: each expert has one of `COUNTS`, or one has all, or all have one; a token may name an expert twice."""
    kind = rng.choice(["any", "any", "few", "hot", "ones"])
    experts = rng.sample(range(shape.num_experts), min(shape.num_experts, 5 if kind == "few" else 64))
    if kind in ("hot", "ones"):
        counts = [1] * shape.num_experts if kind == "ones" else [0] * shape.num_experts
        counts[rng.randrange(shape.num_experts)] += 0 if kind == "ones" else rng.choice(COUNTS[1:]) * shape.top_k
        pairs = list(enumerate(counts))
    else:
        pairs = [(expert, rng.choice(COUNTS)) for expert in experts]
    ids = [expert for expert, count in pairs for _ in range(count)]
    rng.shuffle(ids)
    ids += [-1] * (-len(ids) % shape.top_k) or ([-1] * shape.top_k if not ids else [])
    return torch.tensor(ids, dtype=torch.int32).view(-1, shape.top_k)[:most]


def batches(rng, kernels, most, device):
    """(kernel, inputs, float64 result, workspace) of every kernel and number of tokens."""
    made = []
    for kernel in kernels:
        shape = kernel.shape
        drawn = []
        for tokens in (tokens for tokens in TOKENS if tokens <= most):
            workload = Workload(tokens, Routing.parse(rng.choice(ROUTINGS)), seed=rng.randrange(1000))
            drawn.append(torch.from_numpy(workload.topk_ids(shape.num_experts, shape.top_k)))
        if "ragged" in kernel.forms:
            drawn += [edges(rng, shape, most) for _ in range(EDGES)]
        for ids in (ids.to(device) for ids in drawn):
            tokens = len(ids)
            if rng.random() < 0.3:
                ids[rng.randrange(tokens), rng.randrange(shape.top_k)] = rng.choice([-1, shape.num_experts])
            inputs = kernel.inputs(shape, ids)
            made.append((kernel, inputs, kernel.reference(shape, inputs), poison(kernel.workspace(tokens, device))))
    return made


def main(arguments=None, device="cuda", make=CuteFusedMoE):
    """Returns 0, or 1 for a wrong result; `device` and `make` are for the test of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--form", choices=[*FORMS, "both"], default="both")
    parser.add_argument("--dtype", choices=["bf16", "fp8"], nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-tokens", type=int, default=max(TOKENS))
    parser.add_argument("--each", action="store_true", help="print, launch and wait, one at a time")
    a = parser.parse_args(arguments)
    rng, start = random.Random(a.seed), time.monotonic()
    kernels = [make(attrs.evolve(shape, dtype=dtype), a.form) for dtype in a.dtype for shape in SHAPES]
    made = batches(rng, kernels, a.most_tokens, device)
    chunk = 1 if a.each else CHUNK
    worst = 0.0
    for first in range(0, a.launches, chunk):
        drawn = []
        for _ in range(min(chunk, a.launches - first)):
            kernel, *rest = rng.choice(made)
            drawn.append((kernel, {**rng.choice(kernel.configs), "group_m": rng.choice([1, 2, 8, 64])}, rest, rng.choice([0, 1, 2])))  # fmt: skip
        if a.each:
            kernel, config, (inputs, _, _), waves = drawn[0]
            print(f"{kernel.shape} T={len(inputs['topk_ids'])} {format_config(config)} waves={waves}", flush=True)
        errors = []
        for kernel, config, (inputs, expected, memory), waves in drawn:
            out = torch.full_like(inputs["hidden_states"], torch.nan)
            kernel.launch(config, **inputs, out=out, workspace=memory, waves=waves)
            errors.append((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
        errors = torch.stack(errors).tolist()
        for (kernel, config, (inputs, _, _), waves), error in zip(drawn, errors, strict=True):
            allowed = BOUND[kernel.shape.dtype]
            worst = max(worst, error / allowed)
            if not error < allowed:
                print(
                    f"{kernel.shape} T={len(inputs['topk_ids'])} {format_config(config)} waves={waves}: off by {error}"
                )
                return 1
        if not a.each and first % 1000 == 0:
            print(f"{first + len(drawn)} launches, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{a.launches} launches are right: worst error {worst:.2f} of what is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
