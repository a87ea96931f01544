"""One model of `compiled_transformers.py`: compiles a cell, hands over its logits, then times it; a JSON line each.

Runs in a process of its own and is not called by hand. Commands on stdin, answers on the original stdout.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
import triton
from compiled_transformers import STEP, busy_us
from generate_transformers import MODELS, random_model
from serve_arm import asked, opened, say
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from rampwrap.engines import transformers as engine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM = 3
"Calls before one is timed: two record a CUDA graph, anew for each static cache, and the third replays it."
MOST_STEPS = 30
TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8}
TINY |= {"num_experts_per_tok": 2, "vocab_size": 512, "intermediate_size": 64, "moe_intermediate_size": 64}


def make_model(name: str, layers: int, tiny: bool) -> Any:
    """The architecture with random bf16 weights and a vocabulary that is cut down like the layers."""
    family, sizes = MODELS[name]
    sizes = dict(sizes)
    sizes["vocab_size"] = max(512, sizes["vocab_size"] * layers // sizes["num_hidden_layers"] // 64 * 64)
    sizes |= {"num_hidden_layers": layers} | ({key: TINY[key] for key in TINY if key in sizes} if tiny else {})
    return random_model(family, sizes, DEVICE)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Model:
    """A compiled model, and the cell that is under way."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings, self._arm = settings, settings["arm"]
        self._prompt, self._context = settings["prompt"], settings["context"]
        self.model = make_model(settings["model"], settings["layers"], settings["tiny"])
        engine.register(model=self.model)
        # Under another name `generate` does not replace it by batched_mm.
        ExpertsInterface.register("grouped_only", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
        names = {"grouped_mm": "grouped_only", "own": "grouped_mm"}
        self.model.set_experts_implementation(names.get(self._arm, "rampwrap"))
        self._watched = False
        self._calls, self._start = 0, 0.0
        self.step: Callable[[int], int] = lambda calls: 0
        "Runs so many steps; the tokens of one."

    @property
    def served(self) -> str:
        """What runs the experts: of our arms the kernel of each shape, once it is asked for."""
        if not self._arm.startswith("rampwrap"):
            return self._arm
        engine.warm(self.model, [1])
        kinds = {service.kernel.name for service in engine.serving().services.values()}
        if any(service.graph_dispatcher is not None for service in engine.serving().services.values()):
            kinds.add("a plan")
        return " and ".join(sorted(kinds)) or "nothing: every layer is left to transformers"

    def ready(self, what: str, batch: int) -> dict[str, Any]:
        """Compiles a cell and runs it until its graph is there; the file of its logits."""
        torch._dynamo.reset()
        if hasattr(self.model, "_compiled_call"):
            del self.model._compiled_call
        length = self._prompt if what == "prefill" else self._context
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(1, self.model.config.vocab_size, (batch, length), generator=generator).to(DEVICE)
        logits = self._prefill(ids) if what == "prefill" else self._decode(ids)
        path = pathlib.Path(self._settings["folder"]) / f"{self._settings['model']}-{self._arm}-{what}-{batch}.pt"
        torch.save(logits.float().cpu(), path)
        self._timed(1)
        return {"logits": str(path)}

    def _prefill(self, ids: torch.Tensor) -> torch.Tensor:
        if self._arm.startswith("rampwrap"):
            engine.warm(self.model, [ids.numel()])
        mode = "reduce-overhead" if DEVICE == "cuda" else "default"
        compiled = torch.compile(self.model, mode=mode, dynamic=False)

        def call() -> torch.Tensor:
            out: torch.Tensor = compiled(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return out

        def step(calls: int) -> int:
            for _ in range(calls):
                self._one(call)
            return ids.numel()

        self.step = step
        return call().clone()

    def _decode(self, ids: torch.Tensor) -> torch.Tensor:
        if self._arm.startswith("rampwrap"):
            engine.warm(self.model, [len(ids)])
        config = transformers.CompileConfig(dynamic=False)
        config._compile_all_devices = True
        options = {"do_sample": False, "cache_implementation": "static", "compile_config": config}
        compiled = type(self.model).get_compiled_call(self.model, config)
        # `generate` asks for the compiled model, and calls it for each token but the first.
        self.model.get_compiled_call = lambda config: lambda **inputs: self._one(lambda: compiled(**inputs))

        def generate(calls: int, **more: Any) -> Any:
            return self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=calls + 1,
                min_new_tokens=calls + 1,
                **options,
                **more,
            )

        def step(calls: int) -> int:
            generate(calls)
            return len(ids)

        self.step = step
        # The largest static cache first, whose size later calls take over.
        generate(MOST_STEPS)
        found = generate(WARM, output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits[:2])

    def _one(self, call: Callable[[], Any]) -> Any:
        """A step. The clock starts after the first ones; where kernels are counted, each of those after is waited for."""
        if self._calls == WARM:
            synchronize()
            self._start = time.perf_counter()
        self._calls += 1
        if not self._watched or self._calls <= WARM:
            return call()
        synchronize()
        with torch.profiler.record_function(STEP):
            out = call()
            synchronize()
        return out

    def _timed(self, steps: int) -> tuple[float, int]:
        """Seconds of so many steps, and the tokens of one."""
        self._calls = 0
        tokens = self.step(WARM + steps)
        synchronize()
        return time.perf_counter() - self._start, tokens

    def go(self, steps: int) -> dict[str, float]:
        """Microseconds of GPU time of a step, and tokens/s by the clock."""
        seconds, tokens = self._timed(steps)
        found = {"tokens_per_s": tokens * steps / seconds, "gpu_us": 1e6 * seconds / steps}
        if DEVICE != "cuda":
            return found
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self._watched = True
        try:
            with torch.profiler.profile(activities=kinds) as kernels:
                self._timed(max(2, steps // 2))
        finally:
            self._watched = False
        return found | {"gpu_us": busy_us(kernels.events())}


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    settings, answers = opened()
    model = Model(settings)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    say(answers, {"versions": versions, "served": model.served})
    for name, arguments in asked():
        with torch.no_grad():
            say(answers, getattr(model, name)(**arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
