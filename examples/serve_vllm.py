"""vLLM with routing-aware MoE kernels: dummy weights, any GPU, two commands.

    rampwrap profile --engine vllm --model examples/build/olmoe --budget 3m
    python examples/serve_vllm.py

The first run without a plan writes the model's config.json and says the command; after it, the same script serves with
the plugin. Nothing in this file names rampwrap before the last lines: vLLM finds it by its entry point, so a server
started with `vllm serve MODEL` is served the same way. RAMPWRAP_DISABLE=1 switches it off.
"""

import json
import os
import pathlib
import sys
import time

MODEL = pathlib.Path(__file__).parent / "build" / "olmoe"
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "vocab_size": 50304,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODEL.mkdir(parents=True, exist_ok=True)
(MODEL / "config.json").write_text(json.dumps(CONFIG, indent=1))
# The engine in this process, so that the choices can be shown at the end.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

try:
    from vllm import LLM, SamplingParams
except ImportError as error:
    sys.exit(f"This example needs vLLM, 0.26 or later, and a GPU ({error}).")

llm = LLM(model=str(MODEL), load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=256)
params = SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True, detokenize=False)
for batch in (8, 64, 256):
    prompts = [{"prompt_token_ids": [100 + i, 200, 300 + i]} for i in range(batch)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"batch {batch:4d}: {tokens / (time.perf_counter() - start):8.0f} output tokens/s")

from rampwrap.engines import vllm as plugin

for engine in plugin.engines():
    by = ", ".join([*engine["plans"], *(f"the defaults for {shape}" for shape in engine["defaults"])])
    print(f"rampwrap serves {engine['layers']} layers of {engine['model']} by {by or 'no plan'}")
for graph_dispatcher in plugin.graph_dispatchers():
    print(graph_dispatcher.explain())
