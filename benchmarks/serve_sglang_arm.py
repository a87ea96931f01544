"""One SGLang of `serve_sglang.py`: starts it on dummy weights, then measures what it is told to, a JSON line each.

Runs in a process of its own and is not called by hand. Commands on stdin, answers on the original stdout; what SGLang
prints goes to stderr. It is driven by the functions of SGLang's own one-batch benchmark: its model runner with its plugins, its batches
and its CUDA graphs, without its server around them.
"""

import argparse
import gc
import importlib
import importlib.metadata
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from serve_arm import asked, opened, say
from serve_vllm_arm import shares

from rampwrap.adapters.layer import LayerKernel
from rampwrap.adapters.vllm_fused_moe import VllmFusedMoE, refusal
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import Operands

PACKAGE = "sglang.srt.layers.moe.moe_runner.triton_utils"
WARM = 4
"Steps before any is counted."


class SglangKernel(LayerKernel):
    """SGLang's own Triton layer, for a profile in a process where SGLang has started; its plans are those of vLLM's kernel."""

    name = "vllm_fused_moe"
    without = ("out", "expert_map")
    capturable = True
    tolerance = 1e-2
    launch_names = VllmFusedMoE.launch_names
    _blocks = None
    _cut = VllmFusedMoE._cut
    grid = VllmFusedMoE.grid

    def __init__(self, shape: MoEShape, configs: list[dict[str, Any]]) -> None:
        self._package = importlib.import_module(PACKAGE)
        self._run = importlib.import_module(f"{PACKAGE}.fused_moe").fused_experts_impl
        self.version = f"sglang {importlib.metadata.version('sglang')}"
        super().__init__(shape, configs, None)

    def supports(self, config: Any, shape: MoEShape) -> str | None:
        return refusal(config, shape.dtype)

    def run(self, config: Any, operands: Operands, /) -> torch.Tensor:
        before, self._package._config = self._package._config, dict(config)
        try:
            its = operands
            out: torch.Tensor = self._run(
                its.hidden_states, its.w13, its.w2, its.topk_weights.float(), its.topk_ids.int(), filter_expert=False
            )
        finally:
            self._package._config = before
        return out


@torch.inference_mode()
def fill(model: torch.nn.Module) -> None:
    """Weights as of a trained model in size, the same in every arm: SGLang's dummy ones are within 0.001, so that layers add nothing."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1)
        else:
            for part in parameter.data.flatten().split(1 << 28):
                part.normal_(0, 0.02, generator=generator)


class Engine:
    """SGLang's model runner in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        start = time.perf_counter()
        importlib.import_module("sglang.srt.plugins").load_plugins()  # as each process of a serving SGLang begins
        self.sgl = importlib.import_module("sglang.benchmark.one_batch")
        arguments = importlib.import_module("sglang.srt.server_args")
        # Dummy weights have no tokenizer.
        self.sgl.get_tokenizer = lambda *args, **kwargs: None
        its = arguments.ServerArgs(**settings["server"])
        self.sgl.configure_logger(its)
        self.sgl._set_envs_and_config(its)
        for part in ("initialize_moe_config", "initialize_fp8_gemm_config", "initialize_fp4_gemm_config"):
            getattr(self.sgl, part)(its)
        imported = time.perf_counter()
        self.runner, _ = self.sgl.load_model(its, arguments.PortArgs.init_new(its), 0, 0)
        self.runner.clear()
        fill(self.runner.torch_runner.model)
        self.vocabulary = settings["vocabulary"]
        self.shape = MoEShape(**settings["shape"])
        self.batch: Any = None
        graphs = its.cuda_graph_config
        self.started = {
            "sglang": importlib.metadata.version("sglang"),
            "import_s": imported - start,
            "engine_s": time.perf_counter() - imported,
            "decode_graphs": str(graphs.decode.backend),
            "prefill_graphs": str(graphs.prefill.backend),
            "hooked": self.hooked(),
        }

    @staticmethod
    def hooked() -> bool:
        """Whether SGLang's function is behind rampwrap's hook."""
        registry = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
        return any("_prepare_fused_moe_run" in target for target in registry._patched)

    def _prompts(self, requests: int, length: int) -> list[Any]:
        self.runner.clear()
        rng = np.random.default_rng([requests, length])
        ids = rng.integers(10, self.vocabulary - 10, (requests, length)).tolist()
        made: list[Any] = self.sgl.prepare_synthetic_inputs_for_latency_test(requests, length, ids)
        return made

    def outputs(self, requests: int, length: int, steps: int) -> dict[str, Any]:
        """Greedy tokens [steps, requests], and the logits of the prefill and of the first decode step, on prompts of this seed."""
        ids, logits, batch = self.runner.extend(self._prompts(requests, length))
        tokens, kept = [ids.tolist()], [logits.float().cpu()]
        for step in range(steps - 1):
            ids, logits = self.runner.decode(ids, batch)
            tokens.append(ids.tolist())
            if not step:
                kept.append(logits.float().cpu())
        return {"tokens": tokens, "logits": [its[:, ::61].tolist() for its in kept]}

    def _timed(self, steps: int, call: Callable[[], Any], profile: bool) -> dict[str, Any]:
        """Milliseconds of each call to its end on the GPU; with `profile` its GPU time by kernel."""
        gc.collect()
        gc.disable()
        kernels: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if profile else None
        if profile:
            kernels.__enter__()
        times = []
        for _ in range(steps):
            self.runner.synchronize()
            start = time.perf_counter()
            call()
            self.runner.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        if profile:
            kernels.__exit__(None, None, None)
        gc.enable()
        return (shares(kernels, steps) if profile else {}) | {"ms": np.round(times, 4).tolist()}

    def prefill(self, requests: int, length: int, steps: int, profile: bool = False) -> dict[str, Any]:
        """`requests` prompts in one step, `steps` times; the clock runs while SGLang prepares the batch, too."""
        return self._timed(steps, lambda: self.runner.extend(self._prompts(requests, length)), profile)

    def begin(self, requests: int, length: int) -> dict[str, Any]:
        """A batch that decodes."""
        self.ids, _, self.batch = self.runner.extend(self._prompts(requests, length))
        for _ in range(WARM):
            self._step()
        return {}

    def _step(self) -> None:
        self.ids, _ = self.runner.decode(self.ids, self.batch)

    def decode(self, steps: int, profile: bool = False) -> dict[str, Any]:
        """`steps` more steps of the batch."""
        return self._timed(steps, self._step, profile)

    def profile(self, out: str, configs: list[dict[str, Any]], tokens: list[int], budget_s: float) -> dict[str, Any]:
        """A plan for SGLang's kernel in this SGLang, into the file `out`; how much was measured, or why none was made."""
        import rampwrap

        start = time.perf_counter()
        kernel = SglangKernel(self.shape, configs)
        workloads = rampwrap.workload_grid(
            tokens, [rampwrap.Routing.parse(its) for its in ("uniform", "dirichlet:0.3")]
        )
        try:
            table = rampwrap.profile(kernel, self.shape, workloads, budget_s=budget_s, quiet=True)
            rampwrap.make_plan(table, source="this run, SGLang's own kernel").save(out)
        except Exception as error:  # the table's plan serves on
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        return {
            "configs": len(configs),
            "workloads": len(table.num_tokens),
            "seconds": time.perf_counter() - start,
            "failed": list(table.reasons.values()),
        }

    @staticmethod
    def stats() -> dict[str, Any]:
        """What rampwrap counted in this process: host launches, by layer, bucket and mode."""
        import rampwrap

        return rampwrap.stats()


def served(settings: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a whole `sglang.Engine`, whose scheduler is a process of its own, twice; what it does goes to its log."""
    start = time.perf_counter()
    engine = importlib.import_module("sglang").Engine(**settings["server"])
    up = time.perf_counter()
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, settings["vocabulary"] - 10, (settings["requests"], settings["length"])).tolist()
    params = {"temperature": 0.0, "max_new_tokens": settings["steps"], "ignore_eos": True}
    answers, seconds = [], []
    for _ in range(2):  # the first time Triton compiles what is not in a graph
        begun = time.perf_counter()
        answers.append([its["output_ids"] for its in engine.generate(input_ids=prompts, sampling_params=params)])
        seconds.append(time.perf_counter() - begun)
    engine.shutdown()
    return {"up_s": up - start, "seconds": seconds, "tokens": answers[-1], "repeats": answers[0] == answers[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="a whole engine instead, once")
    whole = parser.parse_args().whole
    settings, answers = opened()
    if whole:
        say(answers, served(settings))
        return 0
    engine = Engine(settings)
    say(answers, engine.started)
    for name, arguments in asked():
        say(answers, getattr(engine, name)(**arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
