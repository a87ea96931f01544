"""transformers' `generate` with rampwrap's experts: OLMoE's architecture with random weights.

    python examples/generate_transformers.py [PLAN.json or a folder of plans]

On a GPU: 4 layers of OLMoE's size. Elsewhere a tiny model in Triton's interpreter, to see that it runs. Without a plan
the kernel's default configs serve, and a warning says how to make one.
"""

import json
import logging
import os
import sys
import time

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from transformers import OlmoeConfig, OlmoeForCausalLM

import rampwrap
from rampwrap.engines.transformers import register

logging.basicConfig(format="%(message)s")
full = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}
full |= {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16}
tiny = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
tiny |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
config = OlmoeConfig(**(full if GPU else tiny), vocab_size=1000, pad_token_id=0, bos_token_id=None, eos_token_id=None)
device, batch, new_tokens = ("cuda", 64, 32) if GPU else ("cpu", 2, 3)
torch.manual_seed(0)
model = OlmoeForCausalLM(config).to(device, torch.bfloat16).eval()
prompt = torch.randint(1, 1000, (batch, 16), device=device)

# The integration: two calls.
register(sys.argv[1] if len(sys.argv) > 1 else None, model=model)
model.set_experts_implementation("rampwrap")

made = {}
for name in ("rampwrap", "grouped_mm") * 2:
    model.set_experts_implementation(name)
    start = time.perf_counter()
    made[name] = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)  # waits for the GPU at its end
    seconds = time.perf_counter() - start
    print(f"{name:<10} {batch * new_tokens / seconds:9.1f} tokens/s")
same = (made["rampwrap"] == made["grouped_mm"])[:, 16:].float().mean().item()
print(f"{same:.0%} of the greedy tokens are the same (bf16 sums in another order part ways at near ties)")
print(json.dumps(rampwrap.stats()["sources"], indent=1)[:1500])
