"""vLLM: its Triton fused-MoE layers run the config that is fastest for each step's routing, with no line of it changed.

vLLM finds `register` by the entry point group ``vllm.general_plugins``. It changes one function, the constructor of
`FusedMoEKernel`: a kernel that is made for a layer with a plan (`rampwrap.plan.folder` says where those lie) or defaults gets our
launch in place of its own `_fused_experts`; all others stay as they are. A layer is taken where

- vLLM itself runs it with `TritonExperts` or, in FP8, its CUTLASS (its choices on Hopper; else start it with ``--moe-backend triton``),
- it is gated by SiLU, with a limit or as SwiGLU-OAI or not, or by GELU-tanh, without biases and LoRA,
- in bf16, fp16 or FP8 with scales for blocks of 128, 64 or 32, channels or tensors and activations quantised as they come or, by tensors, with static scales,
- a plan names exactly this GPU, kernel version, shape and dtype, and `VLLM_BATCH_INVARIANT` is not set. Where plans of
  several kernels do, `preference` says which serves; one whose kernel cannot run here is passed over with a warning. Where
  none does, our kernels' defaults serve on sm_90 (`rampwrap.engines.defaults`).

With tensor parallelism the shape is that of a rank's slice, with expert parallelism the histogram is that of the local
experts. The choice is made on the GPU, so it lives in full and piecewise CUDA graphs as in eager mode: vLLM runs every
size once before it captures it, which is when kernels are compiled. Scratch memory comes from vLLM's own workspace.
Plans are read when an engine starts; one that is replaced later counts from the next start on.
"""

import functools
import importlib
import logging
import os
import pathlib
import time
import traceback
import weakref
from typing import Any

import torch

from rampwrap.dispatch.graph import GraphDispatcher, chooses_in_graph
from rampwrap.engines import vllm_contract, vllm_cutlass, vllm_gather
from rampwrap.engines.defaults import PLANS_ONLY, kernel_without_plan
from rampwrap.engines.prepare import ensure_compiled
from rampwrap.engines.vllm_experts import Experts
from rampwrap.engines.vllm_layer import Refusal, by_another, command, layer_shape, preference, unlike
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.observe.registry import start_log
from rampwrap.plan.folder import DISABLE, Fit, OneWarning, Plans, disabled, made_elsewhere

SAID = "RAMPWRAP_SAID_VLLM"
"Set for child processes, which load the plugin again, once a version was remarked on: the operator reads it once."

_PACKAGE = "vllm.model_executor.layers.fused_moe"

# Below vLLM's own logger, so that lines come in its format and by its settings.
logger = logging.getLogger("vllm.rampwrap")
_warn = OneWarning(logger)


def register() -> None:
    """The plugin: idempotent, in every process of vLLM, and without touching a GPU."""
    if disabled():
        logger.debug("rampwrap leaves vLLM as it is: %s is set.", DISABLE)
        return
    vllm = importlib.import_module("vllm")
    version = str(vllm.__version__)
    if faults := vllm_contract.faults(pathlib.Path(vllm.__path__[0])):
        said = "rampwrap leaves vLLM %s as it is: %s; install a newer rampwrap or an older vLLM."
        _once(version, said, "; ".join(faults), level=logging.WARNING)
        return
    if vllm_contract.beyond(version):
        said = "rampwrap serves vLLM %s, newer than the last one read, %s: its sources have all that it relies on, and no more."
        _once(version, said, vllm_contract.NEWEST)
    install(importlib.import_module(f"{_PACKAGE}.modular_kernel"))
    vllm_gather.register(pathlib.Path(vllm.__path__[0]))


def _once(version: str, text: str, more: str, level: int = logging.INFO) -> None:
    """Says a sentence on a version in one process of an engine."""
    if os.environ.get(SAID) != version:
        os.environ[SAID] = version
        _warn("version", text, version, more, level=level)


def install(module: Any) -> None:
    """Makes kernels of vLLM's module `modular_kernel` that are constructed from now on look for a plan; once."""
    made = module.FusedMoEKernel.__init__
    if hasattr(made, "rampwrap"):
        return

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        made(self, *args, **kwargs)
        try:
            _attach(self)
        except Exception as error:
            # An engine that would have started must start, and a model has 48 layers.
            said = "rampwrap leaves a layer of vLLM as it is, after an error of its own:\n%s"
            _warn(repr(error), said, traceback.format_exc(), level=logging.ERROR)

    __init__.rampwrap = True  # type: ignore[attr-defined]
    module.FusedMoEKernel.__init__ = __init__


class _Engine:
    """What the layers of one engine (one `VllmConfig`) share: its plans, as they were at its start, and graph dispatchers."""

    def __init__(self, config: Any) -> None:
        self.plans = Plans.read()
        self.model = str(getattr(getattr(config, "model_config", None), "model", "MODEL"))
        mode = getattr(getattr(config, "compilation_config", None), "cudagraph_mode", None)
        self.eager = getattr(mode, "name", "") == "NONE"
        parallel = getattr(config, "parallel_config", None)
        self.ubatches = bool(getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False))
        self.graph_dispatchers: dict[str, GraphDispatcher] = {}
        "By the plan's path."
        self.defaults: dict[MoEShape, GraphDispatcher] = {}
        "Of layers without a plan."
        self._kernels: dict[MoEShape, Kernel | str] = {}
        # Saying why takes 20 ms for each plan that is near, and models have 48 layers.
        self.told: set[tuple[MoEShape, str]] = set()
        self._fits: dict[tuple[MoEShape, Device], Fit | None] = {}
        self.layers = 0
        self.seconds = 0.0
        # Graphs know buffers by address: those that were captured must outlive a second engine's workspace.
        self.kept: dict[int, torch.Tensor] = {}
        for sentence in self.plans.broken:
            _warn(sentence, "rampwrap passes over a file: %s", sentence)

    def fit(self, shape: MoEShape, device: Device) -> Fit | None:
        """The plan that serves a shape: looked for once, as making its kernel takes 20 ms and models have 48 layers."""
        key = shape, device
        if key not in self._fits:
            self._fits[key] = self.plans.find(shape, device, preference(shape))
        return self._fits[key]

    @property
    def every(self) -> list[GraphDispatcher]:
        """Of layers with a plan and without."""
        return [*self.graph_dispatchers.values(), *self.defaults.values()]

    def kernel_without_plan(self, shape: MoEShape, device: Device) -> Kernel | str:
        """The kernel whose defaults serve a shape, or why none does; found out once."""
        if shape not in self._kernels:
            self._kernels[shape] = kernel_without_plan(shape, device)
        return self._kernels[shape]

    def without_plan(self, kernel: Kernel, shape: MoEShape, device: Device, most_tokens: int) -> GraphDispatcher:
        """The graph dispatcher of a kernel's defaults, made for the first layer of a shape."""
        found = self.defaults.get(shape)
        if found is None or found.max_tokens < most_tokens:
            found = GraphDispatcher(kernel, max_tokens=most_tokens, shape=shape, device=device)
            self.defaults[shape] = found
            start_log()
        return found

    def graph_dispatcher(self, fit: Fit, shape: MoEShape, device: Device, most_tokens: int) -> GraphDispatcher:
        """The graph dispatcher of a plan, made for the first layer that has it."""
        found = self.graph_dispatchers.get(fit.path)
        if found is None or found.max_tokens < most_tokens:
            mode = "graph" if chooses_in_graph(fit.kernel) or not self.eager else "lagged"
            found = GraphDispatcher(
                fit.kernel, fit.plan, max_tokens=most_tokens, mode=mode, shape=shape, device=device, strict=True
            )
            self.graph_dispatchers[fit.path] = found
            ensure_compiled(found, fit.path)
            start_log()
            logger.info(
                "rampwrap chooses configs of %s for layers of %s by %s%s.",
                *(fit.kernel.name, shape, fit.path, made_elsewhere(fit.plan, device)),
            )
        return found


_engines: dict[int, tuple[Any, _Engine]] = {}


def _engine() -> _Engine:
    """That of the engine which is being built; engines that are gone take theirs along."""
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    found = _engines.get(id(config))
    if found is not None and found[0]() is config:
        return found[1]
    key, made = id(config), _Engine(config)
    alive: Any = (lambda: None) if config is None else weakref.ref(config, lambda _: _engines.pop(key, None))
    _engines[key] = (alive, made)
    return made


def _attach(kernel: Any) -> None:
    """Gives a vLLM kernel our launch where there is a plan for its layer."""
    impl = kernel.impl
    experts = getattr(impl, "fused_experts", None)
    if (own := getattr(type(experts), "rampwrap", None)) is not None:
        # Elastic expert parallelism makes experts anew, of the class of those that it finds.
        experts.__class__ = own
    config, quant = getattr(experts, "moe_config", None), getattr(experts, "quant_config", None)
    if disabled() or config is None or quant is None:
        return
    start = time.perf_counter()
    if importlib.import_module("vllm.envs").VLLM_BATCH_INVARIANT:
        _warn("invariant", "rampwrap leaves vLLM as it is: VLLM_BATCH_INVARIANT is set.", level=logging.INFO)
        return
    shape = layer_shape(config, quant)
    if isinstance(shape, Refusal):
        _warn(shape.reason, "rampwrap leaves a layer to vLLM: %s.", shape.reason, level=shape.level)
        return
    engine, device = _engine(), Device.current()
    tokens = config.max_num_tokens * max(1, config.dp_size)
    fit, refusal = engine.fit(shape, device), _refusal(impl, experts, shape, engine)
    if fit is None:
        found = _without_plan(engine, config, shape, device, refusal)
        if found is None:
            return
        graph_dispatcher = engine.without_plan(found, shape, device, tokens)
    else:
        if _is_first(config):
            for sentence in fit.passed_over:
                _warn(sentence, "rampwrap passes over a plan: %s; it chooses by %s instead.", sentence, fit.path)
        why = getattr(fit.kernel, "nondeterministic", None)
        if refusal is None and why is not None and torch.are_deterministic_algorithms_enabled():
            refusal = Refusal(f"torch is told to be deterministic, and {why}")
        if refusal is not None:
            said = "rampwrap leaves a layer with a plan to vLLM: %s."
            _warn(refusal.reason, said, refusal.reason, level=refusal.level)
            return
        graph_dispatcher = engine.graph_dispatcher(fit, shape, device, tokens)
    kind: Any = type(experts)
    if shape.dtype == "fp8":
        experts.__class__ = _deferring(kind)
    cutlass = kind.__name__ == vllm_cutlass.NAME
    impl._fused_experts = Experts(impl, graph_dispatcher, engine.kept, _warn, cutlass=cutlass)
    engine.layers += 1
    engine.seconds += time.perf_counter() - start


def _is_first(config: Any) -> bool:
    """Whether this rank speaks for all."""
    return bool(config.tp_rank == config.ep_rank == config.dp_rank == 0)


def _without_plan(
    engine: _Engine, config: Any, shape: MoEShape, device: Device, refusal: Refusal | None
) -> Kernel | None:
    """The kernel whose defaults serve a layer without a plan; None leaves it to vLLM. A line says which."""
    kernel = engine.kernel_without_plan(shape, device) if refusal is None else refusal.reason
    told = shape, kernel if isinstance(kernel, str) else ""
    if _is_first(config) and told not in engine.told:
        engine.told.add(told)
        why_not = engine.plans.why_not(shape, device, preference(shape))
        remedy = engine.plans.remedy(command(engine.model, config, shape))
        if isinstance(kernel, str):
            said = "rampwrap leaves vLLM's MoE layers (%s) as they are: %s, nor do defaults serve (%s); %s."
            _warn(remedy, said, shape, why_not, kernel, remedy)
        else:
            said = (
                "rampwrap runs the default configs of %s for layers of %s: %s; %s, or set %s=1 to leave them to vLLM."
            )
            # Whoever has made plans wants to know that they do not serve.
            level = logging.WARNING if engine.plans.found else logging.INFO
            _warn(f"{remedy} {shape}", said, kernel.name, shape, why_not, remedy, PLANS_ONLY, level=level)
    return None if isinstance(kernel, str) else kernel


def _refusal(impl: Any, experts: Any, shape: MoEShape, engine: _Engine) -> Refusal | None:
    """What stands against our launch in a layer."""
    triton = importlib.import_module(f"{_PACKAGE}.experts.triton_moe").TritonExperts
    name = type(experts).__name__
    cutlass = vllm_cutlass.SERVED and name == vllm_cutlass.NAME
    if cutlass:
        if (reason := vllm_cutlass.refusal(experts, shape)) is not None:
            return Refusal(reason, logging.WARNING)
    elif type(experts) is not triton:
        return by_another(name)
    if engine.ubatches:
        return Refusal("micro-batches (DBO) share scratch memory between streams", logging.WARNING)
    plain = type(impl.prepare_finalize).__name__ == "MoEPrepareAndFinalizeNoDPEPModular"
    if shape.dtype == "fp8" and not plain:
        return Refusal("FP8 activations of other ranks arrive quantised", logging.WARNING)
    both = (experts, experts.experts) if cutlass else (experts,)
    return next((found for its in both if (found := unlike(its, shape)) is not None), None)


@functools.cache
def _deferring(experts: Any) -> type:
    """vLLM's experts, told to leave the quantisation of activations to the launch, as ours does it itself."""
    members = {"expects_unquantized_inputs": property(lambda self: True), "rampwrap": experts}
    return type(experts.__name__, (experts,), members)


def engines() -> list[dict[str, Any]]:
    """What was attached in this process, one entry for each engine: layers, plans, shapes without one that defaults serve,
    kernels and seconds spent at start."""
    return [
        {
            "model": its.model,
            "layers": its.layers,
            "plans": sorted(its.graph_dispatchers),
            "defaults": sorted(map(str, its.defaults)),
            "kernels": sorted({graph_dispatcher.kernel.name for graph_dispatcher in its.every}),
            "seconds": its.seconds,
        }
        for _, its in _engines.values()
    ]


def graph_dispatchers() -> list[GraphDispatcher]:
    """Those of all engines in this process, for `GraphDispatcher.explain` and `GraphDispatcher.telemetry`."""
    return [graph_dispatcher for _, its in _engines.values() for graph_dispatcher in its.every]
