"""Selection inside a CUDA graph: one captured layer, routing that changes between replays.

    python examples/in_graph.py PLAN.json [tokens]

PLAN.json is a plan of triton_fused_moe for this GPU (`rampwrap profile`, then `rampwrap fit`).
"""

import sys

import numpy as np
import torch

from rampwrap import GraphDispatcher, Plan, Routing
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE

if len(sys.argv) < 2 or not torch.cuda.is_available():
    sys.exit(__doc__ if torch.cuda.is_available() else "This example captures a CUDA graph; run it on a GPU.")
plan, tokens = Plan.load(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 64

kernel = TritonFusedMoE(plan.shape)
moe = GraphDispatcher(kernel, plan, max_tokens=tokens)
rng = np.random.default_rng(0)


def routing(name: str) -> torch.Tensor:
    """int32 [tokens, top_k] on the GPU."""
    ids = Routing.parse(name).sample(tokens, plan.shape.num_experts, plan.shape.top_k, rng)
    return torch.from_numpy(ids).cuda()


inputs = kernel.inputs(plan.shape, routing("uniform"))
moe(**inputs)  # one eager step compiles and allocates

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = moe(**inputs)

for name in ("uniform", "lognormal:1.0", "dirichlet:0.3", "dirichlet:0.1", "hot:2"):
    for _ in range(20):
        inputs["topk_ids"].copy_(routing(name))
        graph.replay()
    print(f"after 20 steps of {name}:")
    print(moe.explain())
