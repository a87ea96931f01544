"""One MoE layer whose experts are spread over processes: each brings its own tokens and gets their outputs back.

    torchrun --nproc-per-node 2 examples/expert_parallel.py

With a GPU for each process rows travel over NCCL, else over gloo between CPU processes. Add --symmetric on GPUs of one host
that NVLink connects: then they go through shared memory by our own kernels.
"""

import os
import sys

import torch
import torch.distributed as dist

on_gpu = torch.cuda.device_count() >= int(os.environ.get("WORLD_SIZE", "0")) > 0
if "RANK" not in os.environ:
    sys.exit(__doc__)
if not on_gpu:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from rampwrap import ExpertParallel, MoEShape
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE

if on_gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if on_gpu else "gloo")
group, rank, num_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
assert group is not None
device = torch.device("cuda" if on_gpu else "cpu")
backend = "symmetric" if on_gpu and "--symmetric" in sys.argv else "collectives"

shape = MoEShape(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)
with ExpertParallel(group, shape, max_tokens_per_rank=16, backend=backend) as ep:
    kernel = TritonFusedMoE(ep.shape)  # of the experts of this rank
    config = kernel.default_config(16)
    torch.manual_seed(0)  # the same weights everywhere, of which each rank keeps its own
    w13, w2 = torch.randn(8, 128, 128) / 12, torch.randn(8, 128, 64) / 8
    mine = torch.from_numpy(ep.placement.experts)
    weights = {"w13": w13[mine].bfloat16().to(device), "w2": w2[mine].bfloat16().to(device)}

    torch.manual_seed(1 + rank)
    tokens = 3 + rank  # ranks need not bring as many
    hidden_states = torch.randn(tokens, 128).bfloat16().to(device)
    topk_ids = torch.rand(tokens, 8).argsort(1)[:, :2].int().to(device)
    topk_weights = torch.rand(tokens, 2).softmax(1).to(device)

    def run(**operands: torch.Tensor) -> torch.Tensor:
        return kernel.launch(config, **operands)

    out = ep.layer(run, hidden_states, topk_ids, topk_weights, **weights)
    if on_gpu:
        ep.check()

# The same layer where all experts are here.
expected = torch.zeros(tokens, 128)
for token in range(tokens):
    for k in range(2):
        expert = int(topk_ids[token, k])
        x = hidden_states[token].float().cpu()
        gate, up = (w13[expert].bfloat16().float() @ x).chunk(2)
        y = w2[expert].bfloat16().float() @ (torch.nn.functional.silu(gate) * up)
        expected[token] += float(topk_weights[token, k]) * y
error = float((out.float().cpu() - expected).abs().max() / expected.abs().max())
print(f"rank {rank} of {num_ranks}: {tokens} tokens, {len(mine)} experts, largest error {error:.4f}", flush=True)
assert error < 0.03
dist.destroy_process_group()
