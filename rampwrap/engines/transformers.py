"""transformers: experts layers in bf16 run rampwrap's kernels, with the config that a plan picks for each batch.

    from transformers.integrations.moe import ExpertsInterface
    from rampwrap.engines.transformers import experts_forward

    ExpertsInterface.register("rampwrap", experts_forward)
    model.set_experts_implementation("rampwrap")

`register` does the same and says where the plans are; otherwise it is $RAMPWRAP_PLANS, a plan file or a folder of
them. Layers that no plan fits run default configs, of the CuTe kernels on sm_90 where they are built and of the Triton kernel
elsewhere, with one warning that holds the command which makes a plan. Layers that the kernel cannot run, and training, go to
transformers' own ``grouped_mm``, with the reason said once. One operator, `rampwrap::experts`, is all that `torch.compile` sees.
"""

import contextlib
import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.dispatch.host import Dispatcher
from rampwrap.dispatch.lane import Layer
from rampwrap.dispatch.spans import capturing
from rampwrap.engines.defaults import KERNELS as DEFAULTS
from rampwrap.engines.defaults import PLANS_ONLY, kernel_without_plan
from rampwrap.engines.transformers_layer import CHECKED, mismatch, refusal
from rampwrap.errors import CaptureError, InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.folder import HOOK_KERNELS, OneWarning, Plans, made_elsewhere
from rampwrap.plan.plan import shape_arguments
from rampwrap.policy.policies import Static

KERNELS = HOOK_KERNELS["transformers"]
"Whose plans serve."
MAX_TOKENS = 4096
"Tokens of a batch above which the plan's static configs serve: scratch memory grows with it, to 200 MB for OLMoE."
MANY_TOKENS = 1536
"""From which the Triton kernel's default serves in place of the CuTe kernels': on an H200 it is 2-11 % ahead of their two-launch form
there, level from 12 tokens on, within 4 %, and behind by 3-9 % at 3 to 8. Beside the prefill form it was not timed."""
# Layers that keep a record of their own; weights that move, as in offloading to the host, would make ever more of them.
MAX_LAYERS = 1024

T = TypeVar("T")
_warn = OneWarning(logging.getLogger("rampwrap"))


class Serving:
    """What serves the experts layers of this process: one `Service` for each shape and device.

    Attributes:
        plans: read when this is made; a plan that is replaced later counts from the next `register` or process on.
        max_tokens: as `MAX_TOKENS`.
        services: by shape of the first weight, top_k and device.
        names: of layers, by the address of their first weight.
    """

    def __init__(self, plans: Plans, max_tokens: int = MAX_TOKENS) -> None:
        # Under expert parallelism the weights of a call are those of the local experts, and so is the layer.
        self.plans, self.max_tokens = plans.with_local(), max_tokens
        for sentence in plans.broken:
            _warn(sentence, "rampwrap cannot read a plan: %s", sentence)
        self.services: dict[tuple[Any, ...], Service] = {}
        self.names: dict[int, str] = {}

    def of(self, gate_up_proj: torch.Tensor, top_k: int) -> "Service":
        """What serves layers of these weights; made at the first call."""
        key = (gate_up_proj.shape, top_k, gate_up_proj.device)
        found = self.services.get(key)
        if found is None:
            found = self.services[key] = Service(self, gate_up_proj, top_k)
        return found


class Service:
    """Layers of one shape on one device, and the plan that chooses for them.

    Attributes:
        shape: the layer's, from its weights.
        graph_dispatcher: chooses on the device; None where no plan fits.
        dispatcher: serves the kernel's defaults where no plan fits, the plan's static configs where a batch is large.
    """

    def __init__(self, serving: Serving, gate_up_proj: torch.Tensor, top_k: int) -> None:
        experts, rows, hidden = gate_up_proj.shape
        self._serving, self._where = serving, gate_up_proj.device
        # Under expert parallelism the ids are local and those of other ranks equal the number of experts here: the
        # layer is one of few experts, whose ids may be out of range, which the kernel skips.
        self.shape = MoEShape(experts, top_k, hidden, rows // 2)
        self.kernel: Kernel = TritonFusedMoE(self.shape)
        self.dispatcher = Dispatcher(self.kernel, None, shape=self.shape)
        # In place of the CuTe kernels': many tokens, determinism, and tensors that do not start at a multiple of 16 bytes.
        self._triton: Dispatcher | None = None
        self._ran = False
        self.graph_dispatcher: GraphDispatcher | None = None
        self._layers: dict[int, Layer] = {}
        self._warmed: set[int] = set()
        self._ready: set[int] = set()
        device = Device.current()
        fit = serving.plans.find(self.shape, device, KERNELS)
        if fit is None:
            more, found = "", kernel_without_plan(self.shape, device, DEFAULTS["transformers"])
            if not isinstance(found, str):
                self.kernel, self._triton = found, self.dispatcher
                self.dispatcher = Dispatcher(found, None, shape=self.shape)
                more = f", or set {PLANS_ONLY}=1 for those of {TritonFusedMoE.name}"
            _warn(
                f"no plan {self.shape}",
                "rampwrap runs the default configs of %s for %s: %s; %s%s.",
                self.kernel.name,
                self.shape,
                serving.plans.why_not(self.shape, device, KERNELS),
                serving.plans.remedy(f"rampwrap profile --engine transformers {shape_arguments(self.shape)}"),
                more,
            )
            return
        plan = fit.plan
        if elsewhere := made_elsewhere(plan, device):
            _warn(f"kind {fit.path}", "rampwrap serves by %s%s.", fit.path, elsewhere, level=logging.INFO)
        routed = plan.policy(kernel=self.kernel)
        self.dispatcher = Dispatcher(self.kernel, Static(routed.configs, routed.static), shape=self.shape)
        self.graph_dispatcher = apart(
            self._where,
            lambda: GraphDispatcher(
                self.kernel, plan, max_tokens=serving.max_tokens, device=device, strict=True, where=self._where
            ),
        )

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """[T, H] of the layer whose arguments, as of `TritonFusedMoE.launch`, are given."""
        num_tokens = len(inputs["topk_ids"])
        if self.graph_dispatcher is None or num_tokens > self._serving.max_tokens:
            dispatcher = self.dispatcher
            if self._triton is not None:
                other = any(inputs[name].data_ptr() & 15 for name in ("w13", "w2", "hidden_states"))
                # Asked for after this was made, too: their one-launch form adds in no fixed order.
                other |= num_tokens >= MANY_TOKENS or torch.are_deterministic_algorithms_enabled()
                dispatcher = self._triton if other else dispatcher
            out: torch.Tensor
            try:
                out = dispatcher(**inputs)
            except Exception as error:
                if self._triton in (None, dispatcher) or self._ran or isinstance(error, CaptureError):
                    raise
                # What fails at the first launch is an installation, a driver without our kernels say, and nobody asked for it.
                _warn(repr(error), "rampwrap runs %s in place of %s: %s", TritonFusedMoE.name, self.kernel.name, error)
                self.dispatcher, self._triton = self._triton, None
                self.kernel = self.dispatcher.kernel
                return self(**inputs)
            self._ran |= dispatcher is not self._triton
            return out
        layer = self.layer(inputs["w13"])
        if num_tokens not in self._ready and not capturing():
            apart(self._where, lambda: self._prepare(num_tokens, inputs))
        out = layer(**inputs)
        return out

    def layer(self, w13: torch.Tensor) -> Layer:
        """The record of a layer, found by the address of its weights."""
        assert self.graph_dispatcher is not None
        graph_dispatcher, address = self.graph_dispatcher, w13.data_ptr()
        found = self._layers.get(address)
        if found is None:
            few = len(self._layers) < MAX_LAYERS
            name = self._serving.names.get(address, f"experts.{len(self._layers)}") if few else "others"
            found = apart(self._where, lambda: graph_dispatcher.layer(name))
            if few:
                self._layers[address] = found
        return found

    def _prepare(self, num_tokens: int, inputs: dict[str, torch.Tensor]) -> None:
        """Makes what launches of this size need to find: tables, scratch memory and compiled kernels."""
        assert self.graph_dispatcher is not None
        span = self.graph_dispatcher.prepared(num_tokens)
        if span.position not in self._warmed and self._where.type == "cuda":
            self.graph_dispatcher(**inputs)
        self._warmed.add(span.position)
        self._ready.add(num_tokens)


def apart(where: torch.device, make: Callable[[], T]) -> T:
    """What `make` returns, run by a thread of its own on the device's default stream, waited for.

    Warming up a function that `torch.compile` captures gives all memory that its thread asks for to the graph; tables
    and scratch memory, which later calls find again, must come from elsewhere.
    """
    if where.type != "cuda" or capturing():
        # What is kept must not be an inference tensor, which later calls may not write to.
        with torch.inference_mode(False), torch.no_grad():
            return make()
    made: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.cuda.device(where), torch.no_grad():
                made.append(make())
                torch.cuda.synchronize()
        except BaseException as error:
            failed.append(error)

    torch.cuda.current_stream(where).synchronize()
    thread = threading.Thread(target=run, name="rampwrap")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


_serving: Serving | None = None


def serving() -> Serving:
    """What serves this process, with the plans of the environment where nobody called `register`."""
    global _serving
    if _serving is None:
        _serving = Serving(Plans.read())
    return _serving


@torch.library.custom_op("rampwrap::experts", mutates_args=())
def experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
) -> torch.Tensor:
    """[T, H] of an experts layer in bf16, as one operator.

    Args:
        hidden_states: bf16 [T, H].
        gate_up_proj: bf16 [E, 2I, H], gate rows first.
        down_proj: bf16 [E, H, I].
        top_k_weights: floating point [T, top_k].
        top_k_index: integers [T, top_k]; an expert that is not in 0 .. E - 1 contributes nothing.
    """
    if top_k_weights.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        top_k_weights = top_k_weights.float()
    with current(gate_up_proj.device):
        return serving().of(gate_up_proj, top_k_index.shape[1])(
            hidden_states=hidden_states.contiguous(),
            w13=gate_up_proj,
            w2=down_proj,
            topk_weights=top_k_weights.contiguous(),
            topk_ids=top_k_index.contiguous(),
        )


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, on which kernels are launched: layers of a model may lie on several (``device_map="auto"``)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@experts.register_fake
def _(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation for `transformers.integrations.moe.ExpertsInterface`.

    Args:
        module: the layer, with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].
        hidden_states: [T, H].
        top_k_index: int64 [T, top_k]; E stands for an expert on another rank.
        top_k_weights: [T, top_k], any floating type.

    Returns:
        [T, H], of the dtype of `hidden_states`.
    """
    reason = refusal(module, hidden_states, top_k_index)
    if reason is None:
        out: torch.Tensor = experts(hidden_states, module.gate_up_proj, module.down_proj, top_k_weights, top_k_index)
        return out
    _say(type(module).__name__, reason)
    return built_in(module)(module, hidden_states, top_k_index, top_k_weights)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _say(layer: str, reason: str) -> bool:
    """Warns once that a kind of layer is not run here."""
    _warn(
        f"refused {layer} {reason}",
        "rampwrap leaves %s to transformers' grouped_mm: %s. (With set_experts_implementation('grouped_mm') "
        "transformers itself may choose another implementation for decoding.)",
        layer,
        reason,
    )
    return True


def built_in(module: Any) -> Callable[..., torch.Tensor]:
    """Transformers' own implementation for a layer: ``grouped_mm``, or the eager loop where it has none."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found: Callable[..., torch.Tensor]
    if "grouped_mm" in ALL_EXPERTS_FUNCTIONS:
        found = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    else:
        found = type(module).forward.__wrapped__
    return found


def register(
    plans: Any = None, *, name: str = "rampwrap", max_tokens: int = MAX_TOKENS, model: torch.nn.Module | None = None
) -> None:
    """Registers the implementation, to be chosen with ``model.set_experts_implementation("rampwrap")``.

    Plans are read now. Called again, it starts anew: with other plans, and records at zero.

    Args:
        plans: a plan file or a folder of them; None takes $RAMPWRAP_PLANS, else the default folder.
        name: under which transformers finds it.
        max_tokens: as `MAX_TOKENS`.
        model: whose module names layers get in `rampwrap.stats`; "experts.0" and on without one.

    Raises:
        InputError: transformers is not installed, older than 5.17, or does not keep the contract.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise InputError(
            f"transformers has no ExpertsInterface here ({error}); install transformers 5.17 or later."
        ) from error
    if (reason := mismatch(importlib.metadata.version("transformers"))) is not None:
        raise InputError(f"{reason}; install transformers {CHECKED[0]} to {CHECKED[-1]}.")
    global _serving
    _serving = Serving(Plans.read(plans), max_tokens)
    for path, module in () if model is None else model.named_modules():
        weight = getattr(module, "gate_up_proj", None)
        if isinstance(weight, torch.Tensor):
            _serving.names[weight.data_ptr()] = path
    ExpertsInterface.register(name, experts_forward)


def warm(model: torch.nn.Module, token_counts: Iterable[int]) -> None:
    """Compiles and prepares what batches of some sizes need, for capture in CUDA graphs and for a fast first step.

    Args:
        model: whose experts layers are run, one of each shape.
        token_counts: tokens of a batch: sequences in decode, sequences times their length in prefill.
    """
    seen = set()
    for module in model.modules():
        w13, config = getattr(module, "gate_up_proj", None), getattr(module, "config", None)
        top_k = getattr(config, "num_experts_per_tok", None)
        if not isinstance(w13, torch.Tensor) or top_k is None or w13.dim() != 3:
            continue
        kind = (w13.shape, top_k, w13.device)
        for num_tokens in token_counts if kind not in seen else ():
            x = torch.zeros(num_tokens, w13.shape[2], dtype=w13.dtype, device=w13.device)
            ids = torch.arange(num_tokens * top_k, device=w13.device).view(num_tokens, top_k) % w13.shape[0]
            with torch.no_grad():
                if refusal(module, x, ids) is None:
                    # The routers of this family give float32 or the model's own type: both are compiled.
                    for dtype in (torch.float32, torch.bfloat16):
                        experts_forward(module, x, ids, torch.zeros(ids.shape, dtype=dtype, device=w13.device))
        seen.add(kind)
