"""Tokens/s of transformers' `generate` with rampwrap's experts against its own, on one GPU with dummy weights.

    python benchmarks/generate_transformers.py --model olmoe --plans plans/ --out h200-generate-olmoe.json
    python benchmarks/generate_transformers.py --model qwen3 --layers 8 --plans plans/

Four implementations of the experts on the same weights:

    grouped_mm    torch's grouped GEMM in prefill and in decode
    batched_mm    the weights of every visited expert gathered for each slot; left out where they need more than
                  --gather-gb
    transformers  what `generate` does by default: grouped_mm in prefill, batched_mm in decode
    rampwrap      ours

Each round times all of them in a shuffled order; the medians of the rounds are compared. A generation is a prefill of
batch x prompt tokens and then --new-tokens - 1 steps of decode. Execution is eager, as `generate` does it: the host is
a part of what is measured. --static-cache compiles decode with CUDA graphs, for all of them. Routers of random weights
route almost evenly; --routing replaces what they choose by draws from a distribution, others at each call.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from rampwrap.engines import transformers as engine
from rampwrap.routing.workloads import Routing

DEVICE = "cuda"
POOL = 32_768
"Tokens whose experts are drawn for --routing."
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": (
        "Olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304, "num_hidden_layers": 16},
    ),
    "qwen3": (
        "Qwen3Moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
        | {"vocab_size": 151936, "num_hidden_layers": 48},
    ),
}


class Drawn:
    """A forward hook by which a router chooses experts from a distribution that is drawn once for each layer."""

    drawn = 0

    def __init__(self, routing: str, num_experts: int, top_k: int) -> None:
        Drawn.drawn += 1
        ids = Routing.parse(routing).sample(POOL, num_experts, top_k, np.random.default_rng(Drawn.drawn))
        self._pool = torch.from_numpy(ids).to(DEVICE, torch.int64)
        self._at = 0

    def __call__(self, module: Any, args: Any, out: Any) -> Any:
        """The router's logits and weights with other ids."""
        count = len(out[2])
        self._at = (self._at + count) % POOL if self._at + 2 * count <= POOL else 0
        return (*out[:2], self._pool[self._at : self._at + count])


def random_model(family: str, sizes: dict[str, Any], device: str) -> Any:
    """An architecture with random bf16 weights, made on a device."""
    config = getattr(transformers, f"{family}Config")(
        **sizes, pad_token_id=0, bos_token_id=None, eos_token_id=None, max_position_embeddings=4096
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def make_model(name: str, layers: int | None, routing: str | None) -> Any:
    """One of `MODELS`, its routers' choices drawn where a routing is named."""
    family, sizes = MODELS[name]
    model = random_model(family, {**sizes, **({} if layers is None else {"num_hidden_layers": layers})}, DEVICE)
    for path, module in model.named_modules():
        if routing is not None and path.endswith("mlp.gate"):
            module.register_forward_hook(Drawn(routing, sizes["num_experts"], sizes["num_experts_per_tok"]))
    return model


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="olmoe")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--plans", help="a plan or a folder of plans; the kernel's default configs without one")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16, 64, 128])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no further batch size is begun")
    parser.add_argument(
        "--gather-gb", type=float, default=60, help="largest gather of weights that batched_mm may make"
    )
    parser.add_argument("--routing", help="uniform, dirichlet:0.3, ...: replaces what the routers choose")
    parser.add_argument("--static-cache", action="store_true", help="decode compiled by torch.compile, CUDA graphs")
    parser.add_argument("--out", help="JSON file")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a GPU.")
    started = time.monotonic()
    model = make_model(a.model, a.layers, a.routing)
    engine.register(a.plans, model=model)
    # Under another name `generate` does not replace it by batched_mm.
    ExpertsInterface.register("grouped_only", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    names = {
        "grouped_mm": "grouped_only",
        "batched_mm": "batched_mm",
        "transformers": "grouped_mm",
        "rampwrap": "rampwrap",
    }
    config = model.config
    inter = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    slot_gb = 3 * config.hidden_size * inter * 2 / 1e9
    print(f"{a.model}, {config.num_hidden_layers} layers, made in {time.monotonic() - started:.0f} s", flush=True)
    options = {"max_new_tokens": a.new_tokens, "min_new_tokens": a.new_tokens, "do_sample": False}
    options |= {"cache_implementation": "static"} if a.static_cache else {}
    rng, results = np.random.default_rng(0), []
    for batch in a.batch_size:
        if time.monotonic() - started > a.budget:
            print(f"left out from batch {batch} on: {a.budget:g} s were over", flush=True)
            break
        ids = torch.randint(1, config.vocab_size, (batch, a.prompt), device=DEVICE)
        top_k = config.num_experts_per_tok
        prefill_gb, decode_gb = (slot_gb * top_k * count for count in (batch * a.prompt, batch))
        left_out = {"batched_mm"} if prefill_gb > a.gather_gb else set()
        left_out |= {"transformers"} if decode_gb > a.gather_gb else set()
        runs: dict[str, list[float]] = {name: [] for name in names if name not in left_out}
        firsts: dict[str, list[float]] = {name: [] for name in runs}
        same: dict[str, Any] = {}
        if a.static_cache:
            engine.warm(model, [batch])

        def generate(name: str, ids: torch.Tensor = ids) -> tuple[float, float, torch.Tensor]:
            """Seconds of a generation, seconds of its prefill, and its tokens."""
            model.set_experts_implementation(names[name])
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                model(ids, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            torch.cuda.synchronize()
            return time.perf_counter() - start, first, out

        for name in list(runs):
            try:
                same[name] = generate(name)[2][:, a.prompt]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"  batch {batch}: {name} runs out of memory", flush=True)
                del runs[name]
        for _ in range(a.rounds):
            for name in rng.permutation(list(runs)).tolist():
                total, first, _ = generate(name)
                runs[name].append(total)
                firsts[name].append(first)
        row: dict[str, Any] = {"batch": batch, "tokens_per_s": {}, "prefill_ms": {}, "decode_step_ms": {}, "spread": {}}
        for name, seconds in runs.items():
            middle, first = statistics.median(seconds), statistics.median(firsts[name])
            row["tokens_per_s"][name] = round(batch * a.new_tokens / middle, 1)
            row["prefill_ms"][name] = round(1e3 * first, 3)
            row["decode_step_ms"][name] = round(1e3 * (middle - first) / (a.new_tokens - 1), 3)
            row["spread"][name] = round((max(seconds) - min(seconds)) / middle, 4)
        agree = {name: float((same[name] == same["grouped_mm"]).float().mean()) for name in same}
        row["first_tokens_as_grouped_mm"] = agree
        results.append(row)
        speeds = row["tokens_per_s"]
        print(
            f"batch {batch:4d}  "
            + "  ".join(f"{name} {speed:9.1f}/s" for name, speed in speeds.items())
            + "  ours over "
            + ", ".join(
                f"{name} {speeds['rampwrap'] / speed:.3f}x" for name, speed in speeds.items() if name != "rampwrap"
            ),
            flush=True,
        )
    planned = [
        str(service.shape) for service in engine.serving().services.values() if service.graph_dispatcher is not None
    ]
    report = {
        "benchmark": "generate_transformers",
        "model": a.model,
        "layers": config.num_hidden_layers,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(sys.argv),
        "prompt": a.prompt,
        "new_tokens": a.new_tokens,
        "rounds": a.rounds,
        "routing": a.routing,
        "static_cache": a.static_cache,
        "planned_shapes": planned,
        "seconds": round(time.monotonic() - started, 1),
        "results": results,
    }
    for service in engine.serving().services.values():
        if service.graph_dispatcher is not None:
            print(service.graph_dispatcher.explain(), flush=True)
    if a.out:
        pathlib.Path(a.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
