"""One engine of `serve_vllm.py`: starts vLLM on dummy weights, then measures what it is told to, a JSON line each.

Runs in a process of its own and is not called by hand. Commands on stdin, answers on the original stdout; what vLLM
prints goes to stderr.

Routing is simulated by vLLM's own hook for that: a pool of expert choices per layer, drawn with that layer's own
popularities, of which each step takes a window that moves on from step to step. That is one small kernel a layer in
every arm, in place of vLLM's top-k kernel, and the pool is replaced between measurements without a new capture.
"""

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from serve_arm import asked, opened, say

STRATEGY = "rampwrap_pool"
POOL = 32768  # choices a layer; 64 windows of 512 tokens before one repeats
STRIDE = 7919
WARM = 8  # tokens of each request before a batch is measured
# Kernels between the router and the sum over experts: vLLM's, our Triton kernels, and our CuTe kernels, whose names
# begin with the function of the DSL and the module of their class. vLLM's own CUTLASS is cutlass::device_kernel, of experts
# with a group GEMM in it, around which are a sort, two permutations and the sizes of the problems.
MOE_KERNELS = re.compile(
    r"fused_moe|moe_align|count_and_sort_expert|act_and_mul|silu_and_mul_per_block_quant|moe_sum"
    r"|up_kernel|down_kernel|up_merged|down_merged|^sum_kernel|^prepare_kernel|^sum_after_kernel|^narrow_after_kernel"
    r"|align_by_expert|count_chunks|scan_chunks|place_chunks|select_by_expert|select_chunks|quantise_rows"
    r"|^kernel_cutlass_\w*rampwrap"
    r"|cutlass_3x_group_gemm|preprocessTopkId|RadixSort|ExpertFirstTokenOffset|expandInputRows|finalizeMoeRouting"
    r"|compute_problem_sizes|compute_expert_offsets"
)
# Of dense layers too: they are the experts' where the next kernel is, as the quantisation of their input is in vLLM.
SHARED_KERNELS = re.compile(r"per_token_group_quant|per_token_scaled_fp8_quant|FillFunctor|^Memset")
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
        from rampwrap.routing.workloads import Routing

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


class Compiled:
    """Seconds that this process spends on compiling the MoE layers' own Triton kernels, ours or vLLM's, and how many those are."""

    def __init__(self) -> None:
        self.seconds, self.kernels = 0.0, 0
        triton.knobs.compilation.listener = self

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit and MOE_KERNELS.search(str(getattr(src, "name", ""))):
            self.seconds += times.total / 1e6
            self.kernels += 1


@torch.inference_mode()
def fill_fp8(model: torch.nn.Module) -> int:
    """Random values for the weights of FP8 layers; how many tensors.

    vLLM's dummy weights are within 0.001, of which FP8 keeps zeros alone but for 2 %: they would draw less power than
    weights do, and long steps would run at higher clocks. With the dummy scales these are of standard deviation 0.04.
    """
    drawn = (64 * torch.randn(1 << 22, device="cuda")).to(torch.float8_e4m3fn).view(torch.uint8)
    filled = 0
    for parameter in model.parameters():
        if parameter.dtype == torch.float8_e4m3fn and parameter.is_contiguous():
            for part in parameter.data.view(torch.uint8).view(-1).split(len(drawn)):
                part.copy_(drawn[: len(part)])
            filled += 1
    return filled


class Engine:
    """vLLM in this process, driven step by step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        start, compiled = time.perf_counter(), Compiled()
        import vllm
        from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

        # What releases ask of a strategy besides its choices is in vLLM's own base class.
        strategy = type("PoolStrategy", (Pools, simulator.RoutingStrategy), {})
        self.pools = strategy(settings["layers"], settings["experts"], settings["top_k"], settings["max_tokens"])
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
        self.started |= {"moe_compile_s": compiled.seconds, "moe_compiled": compiled.kernels}
        self.started["plugin_s"] = sum(its["seconds"] for its in self.choices().get("engines", ()))
        if settings["fp8"]:
            self.llm.apply_model(fill_fp8)
        # Drawing the pools and the weights is no part of an engine.
        torch.cuda.empty_cache()

    @staticmethod
    def memory() -> dict[str, float]:
        """Of torch's allocator in this process, graphs included; what the driver keeps besides is not in it."""
        return {
            "allocated_gb": torch.cuda.memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.memory_reserved() / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "card_gb": torch.cuda.mem_get_info()[1] / 1e9,
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

    def begin(self, batch: int, routing: str, steps: int) -> dict[str, Any]:
        """Starts a full batch that decodes for `steps` steps at least; returns when every request has 8 tokens."""
        self.pools.use(routing)
        rng = np.random.default_rng(batch)
        self.batch = [self.add(16, steps + 128, rng) for _ in range(batch)]
        seen: dict[str, int] = dict.fromkeys(self.batch, 0)
        self.walk = self.steps()
        for _, outputs in self.walk:
            for output in outputs:
                seen[output.request_id] += len(output.outputs[0].token_ids)
            if min(seen.values()) >= WARM:
                break
        gc.collect()
        return {}

    def go(self, steps: int, profile: bool = False) -> dict[str, Any]:
        """`steps` steps of the batch after one that is not counted; with `profile`, under torch's profiler."""
        gc.disable()
        kernels: Any = None
        next(self.walk)
        if profile:
            kernels = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            kernels.__enter__()
        times, tokens = [time.perf_counter()], 0
        for now, outputs in self.walk:
            times.append(now)
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            if len(times) > steps:
                break
        torch.cuda.synchronize()
        if profile:
            kernels.__exit__(None, None, None)
        gc.enable()
        latency = np.diff(times) * 1e3
        found = {"tokens_per_s": tokens / (times[-1] - times[0]), "ms": latency.round(4).tolist()}
        return found if not profile else shares(kernels, len(latency)) | found

    def end(self) -> dict[str, Any]:
        """Drops the batch."""
        self.engine.abort_request(self.batch)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {}

    def prefill(self, routing: str, prompt: int, requests: int, profile: bool = False) -> dict[str, Any]:
        """`requests` prompts at once, one token of output each: prompt tokens/s, and milliseconds to each first token."""
        self.pools.use(routing)
        rng = np.random.default_rng(prompt)
        gc.collect()
        gc.disable()
        kernels: Any = None
        if profile:
            kernels = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            kernels.__enter__()
        for _ in range(requests):
            self.add(prompt, 1, rng)
        torch.cuda.synchronize()
        start = time.perf_counter()
        first = [now - start for now, outputs in self.steps() for _ in outputs]
        if profile:
            torch.cuda.synchronize()
            kernels.__exit__(None, None, None)
        gc.enable()
        found = {"tokens_per_s": prompt * requests / first[-1], "ms": (1e3 * np.array(first)).round(4).tolist()}
        return found if not profile else shares(kernels, 1) | found

    @staticmethod
    def pin(cpus: list[int]) -> dict[str, Any]:
        """Keeps the thread that drives the engine on some CPUs: it is what a step waits for at large batches."""
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:  # a sandbox may know no affinities
            return {"pinned": False}
        return {"pinned": True}

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
            from rampwrap.kernel.protocol import format_config
        except ImportError:
            return {}
        rows = []
        for graph_dispatcher in plugin.graph_dispatchers():
            for row in graph_dispatcher.telemetry():
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
        configs = {
            graph_dispatcher.kernel.name: dict(enumerate(map(format_config, graph_dispatcher.policy.configs)))
            for graph_dispatcher in plugin.graph_dispatchers()
        }
        return {"engines": plugin.engines(), "configs": configs, "buckets": buckets}


def of_experts(names: Sequence[str]) -> list[bool]:
    """Which kernels of a stream, in the order of their starts, are the MoE layers' own."""
    found, following = [], False
    for name in reversed(names):
        own = bool(MOE_KERNELS.search(name)) or (following and bool(SHARED_KERNELS.search(name)))
        found.append(own)
        following = own
    return found[::-1]


def shares(kernels: Any, steps: int) -> dict[str, Any]:
    """Microseconds of GPU time a step, of all kernels and of the MoE layers' own, and the longest names of both.

    Of kernels that overlap, as ours launched by programmatic dependent launch do, the later one counts from the end of
    the earlier: it has waited until then. So all add up to the time in which the GPU was busy.
    """
    events = [its for its in kernels.events() if its.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted(
        (its for its in events if not ROUTER_KERNELS.search(its.name)), key=lambda its: its.time_range.start
    )
    total: dict[str, float] = {}
    experts: dict[str, float] = {}
    until = float("-inf")
    for event, own in zip(events, of_experts([its.name for its in events]), strict=True):
        us = max(0.0, event.time_range.end - max(event.time_range.start, until))
        until = max(until, event.time_range.end)
        for sums in (total, experts) if own else (total,):
            sums[event.name] = sums.get(event.name, 0.0) + us

    def ranked(sums: dict[str, float]) -> dict[str, float]:
        return {name[:80]: us / steps for name, us in sorted(sums.items(), key=lambda item: -item[1])[:12]}

    everything, moe = sum(total.values()), sum(experts.values())
    return {
        "gpu_us": everything / steps,
        "moe_us": moe / steps,
        "moe_share": moe / everything if everything else float("nan"),
        "kernels": ranked(total),
        "moe_kernels": ranked(experts),
    }


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    settings, answers = opened()
    engine = Engine(settings)
    say(answers, engine.started)
    for name, arguments in asked():
        with torch.inference_mode():
            say(answers, getattr(engine, name)(**arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
