"""One engine of `serve_vllm.py`: starts vLLM on dummy weights, then measures what it is told to, a JSON line each.

Runs in a process of its own and is not called by hand. Commands on stdin, answers on the original stdout; what vLLM
prints goes to stderr.

Routing is simulated by vLLM's own hook for that: a pool of expert choices per layer, drawn with that layer's own
popularities, of which each step takes a window that moves on from step to step. That is one small kernel a layer in
every arm, in place of vLLM's top-k kernel, and the pool is replaced between measurements without a new capture.
"""

import gc
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

STRATEGY = "rampwrap_pool"
POOL = 32768  # choices a layer; 64 windows of 512 tokens before one repeats
STRIDE = 7919
# Kernels between the router and the sum over experts: vLLM's, and ours.
MOE_KERNELS = re.compile(
    r"fused_moe|moe_align|count_and_sort_expert|act_and_mul|moe_sum|up_kernel|down_kernel|up_merged|down_merged"
    r"|^sum_kernel|align_by_expert|count_chunks|scan_chunks|place_chunks|select_by_expert|select_chunks|quantise_rows"
)
ROUTER_KERNELS = re.compile(r"take_choices")


@triton.jit
def take_choices(pool_ptr, step_ptr, out_ptr, total, ROWS: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, B: tl.constexpr):  # noqa: N803  # fmt: skip
    slot = tl.program_id(0) * B + tl.arange(0, B)
    row = (slot // K + tl.load(step_ptr) * STEP) % ROWS
    ids = tl.load(pool_ptr + row * K + slot % K, mask=slot < total)
    tl.store(out_ptr + slot, ids, mask=slot < total)


class Pools:
    """The routing strategy: expert ids out of a pool for each layer, by a step counter on the GPU."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int, max_tokens: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.pool = torch.zeros(num_layers, POOL, top_k, dtype=torch.int32, device="cuda")
        self.step = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.weights = torch.full((max_tokens, top_k), 1 / top_k, device="cuda")
        self.layers: dict[int, int] = {}
        self.caller: Any = None
        self._drawn: dict[str, torch.Tensor] = {}

    def route_tokens(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, top_k: int, indices_type: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers.setdefault(id(self.caller), len(self.layers))
        if layer == 0:
            self.step.add_(1)
        tokens = hidden_states.shape[0]
        out = torch.empty(tokens, top_k, dtype=torch.int32, device=hidden_states.device)
        total = out.numel()
        take_choices[(triton.cdiv(total, 1024),)](
            self.pool[layer], self.step, out, total, ROWS=POOL, K=top_k, STEP=STRIDE, B=1024
        )
        return self.weights[:tokens], out if indices_type is None else out.to(indices_type)

    def use(self, routing: str) -> None:
        """From the next step on; the same draws in every arm."""
        from rampwrap.routing import Routing

        if routing not in self._drawn:
            layers = []
            for layer in range(len(self.pool)):
                rng = np.random.default_rng([layer, *routing.encode()])
                parsed = Routing.parse(routing)
                if parsed.kind == "hot":
                    ids = torch.from_numpy(parsed.sample(POOL, self.num_experts, self.top_k, rng)).cuda()
                else:
                    popularity = torch.from_numpy(parsed.popularity(self.num_experts, rng)).cuda().float()
                    generator = torch.Generator("cuda").manual_seed(layer)
                    noise = torch.rand(POOL, self.num_experts, generator=generator, device="cuda")
                    score = (popularity / popularity.sum()).log().clamp_min(-80) - (-noise.log()).log()
                    ids = score.topk(self.top_k).indices
                layers.append(ids.int())
            self._drawn[routing] = torch.stack(layers)
        self.pool.copy_(self._drawn[routing])
        torch.cuda.synchronize()


class Engine:
    """vLLM in this process, driven step by step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        start = time.perf_counter()
        import vllm
        from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

        self.pools = Pools(settings["layers"], settings["experts"], settings["top_k"], settings["max_tokens"])
        simulator.RoutingSimulator.register_strategy(STRATEGY, self.pools)
        inner = simulator.RoutingSimulatorRouter._compute_routing

        def remember(router: Any, *args: Any, **kwargs: Any) -> Any:
            self.pools.caller = router
            return inner(router, *args, **kwargs)

        simulator.RoutingSimulatorRouter._compute_routing = remember
        self.pools.use("uniform")
        imported = time.perf_counter()
        self.llm = vllm.LLM(
            model=settings["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_seqs"],
            max_num_batched_tokens=settings["max_tokens"],
            gpu_memory_utilization=settings["share"],
            kv_cache_memory_bytes=settings["kv_bytes"],
            enable_prefix_caching=False,
            **settings["options"],
        )
        self.engine = self.llm.llm_engine
        self.vocabulary = settings["vocabulary"]
        self.params = vllm.SamplingParams
        self.delta = __import__("vllm.sampling_params", fromlist=["x"]).RequestOutputKind.DELTA
        self.requests = 0
        now = time.perf_counter()
        self.started = {"import_s": imported - start, "engine_s": now - imported, **self.memory()}

    @staticmethod
    def memory() -> dict[str, float]:
        return {
            "allocated_gb": torch.cuda.memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.memory_reserved() / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }

    def add(self, prompt: int, output: int, rng: np.random.Generator) -> str:
        name = f"r{self.requests}"
        self.requests += 1
        ids = rng.integers(10, self.vocabulary - 10, prompt).tolist()
        params = self.params(
            max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=self.delta
        )
        self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def steps(self) -> Iterator[tuple[float, list[Any]]]:
        """Time and outputs of each step that has any."""
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if outputs:
                yield time.perf_counter(), outputs

    def decode(self, batch: int, routing: str, steps: int, warm: int, profile: bool = False) -> dict[str, Any]:
        """`steps` decode steps of a full batch, after `warm` of them; with `profile`, under torch's profiler."""
        self.pools.use(routing)
        rng = np.random.default_rng(batch)
        names = [self.add(16, warm + 2 * steps + 64, rng) for _ in range(batch)]
        seen: dict[str, int] = dict.fromkeys(names, 0)
        walk = self.steps()
        for _, outputs in walk:
            for output in outputs:
                seen[output.request_id] = seen.get(output.request_id, 0) + len(output.outputs[0].token_ids)
            if min(seen.values()) >= warm:
                break
        gc.collect()
        gc.disable()
        times, tokens = [time.perf_counter()], 0
        kernels: Any = None
        if profile:
            kernels = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            kernels.__enter__()
        for now, outputs in walk:
            times.append(now)
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            if len(times) > steps:
                break
        torch.cuda.synchronize()
        if profile:
            kernels.__exit__(None, None, None)
        gc.enable()
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        latency = np.diff(times) * 1e3
        found = {"tokens_per_s": tokens / (times[-1] - times[0]), "ms": latency.round(4).tolist()}
        return found if not profile else shares(kernels, len(latency)) | found

    def mixed(self, routing: str, requests: int, concurrency: int) -> dict[str, Any]:
        """A stream of requests, prompts of 64-1024 and outputs of 16-128 tokens, a new one whenever one ends."""
        self.pools.use(routing)
        rng = np.random.default_rng(1)
        sizes = list(zip(rng.integers(64, 1025, requests), rng.integers(16, 129, requests), strict=True))
        waiting = iter(sizes)
        last: dict[str, float] = {}
        gaps: list[float] = []
        tokens = 0
        for prompt, output in [next(waiting) for _ in range(min(concurrency, requests))]:
            self.add(int(prompt), int(output), rng)
        start = now = time.perf_counter()
        for now, outputs in self.steps():
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                tokens += count
                if count and output.request_id in last:
                    gaps.append((now - last[output.request_id]) / count)
                last[output.request_id] = now
                if output.finished and (new := next(waiting, None)) is not None:
                    self.add(int(new[0]), int(new[1]), rng)
        return {
            "tokens_per_s": tokens / (now - start),
            "ms": (1e3 * np.percentile(gaps, np.arange(0.5, 100))).round(4).tolist(),
        }

    def choices(self) -> dict[str, Any]:
        """What the plugin attached and chose so far; empty in the other arms."""
        try:
            from rampwrap.engines import vllm as plugin
        except ImportError:
            return {}
        rows = []
        for selector in plugin.selectors():
            for row in selector.telemetry():
                rows.append((row.num_tokens, row.mode, row.steps, row.counts, row.static_us, row.chosen_us))
        buckets: dict[int, dict[str, Any]] = {}
        for tokens, mode, steps, counts, static_us, chosen_us in rows:
            its = buckets.setdefault(
                tokens, {"mode": mode, "steps": 0, "counts": {}, "static_us": 0.0, "chosen_us": 0.0}
            )
            its["steps"] += steps
            its["static_us"] += static_us
            its["chosen_us"] += chosen_us
            for index, count in counts.items():
                its["counts"][index] = its["counts"].get(index, 0) + count
        return {"engines": plugin.engines(), "buckets": buckets}


def shares(kernels: Any, steps: int) -> dict[str, Any]:
    """Microseconds of GPU time a step, of all kernels and of the MoE layers' own, and the longest names of both."""
    total: dict[str, float] = {}
    for event in kernels.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] = total.get(event.name, 0.0) + event.time_range.elapsed_us()
    moe = {name: us for name, us in total.items() if MOE_KERNELS.search(name)}
    ranked = sorted(total.items(), key=lambda item: -item[1])[:12]
    everything = sum(us for name, us in total.items() if not ROUTER_KERNELS.search(name))
    return {
        "gpu_us": everything / steps,
        "moe_us": sum(moe.values()) / steps,
        "moe_share": sum(moe.values()) / everything if everything else float("nan"),
        "kernels": {name[:80]: us / steps for name, us in ranked},
    }


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    engine = Engine(settings)
    print(json.dumps(engine.started), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quit":
            break
        with torch.inference_mode():
            print(json.dumps(getattr(engine, name)(**command)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
