"""The launch that stands in for one of vLLM's layers, step by step, and the scratch memory that it shares with vLLM's own."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import attrs
import torch

from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.dispatch.lane import Layer
from rampwrap.dispatch.spans import capturing
from rampwrap.engines import vllm_cutlass
from rampwrap.errors import CaptureError, InputError, RampwrapError
from rampwrap.kernel.shape import MoEShape


class Experts:
    """In place of the bound method `_fused_experts` of one layer's kernel: same arguments by name, same result.

    Args:
        impl: vLLM's `FusedMoEKernelModularImpl`.
        graph_dispatcher: what serves the layer.
        kept: memory of captured graphs by address, to which the engine holds on.
        warn: called with a key, by which it speaks once, a format and its arguments.
        cutlass: whether vLLM's own experts are CUTLASS's, which take quantised rows alone.
    """

    def __init__(
        self,
        impl: Any,
        graph_dispatcher: GraphDispatcher,
        kept: MutableMapping[int, torch.Tensor],
        warn: Callable[..., None],
        *,
        cutlass: bool = False,
    ) -> None:
        self._impl, self._kept, self._warn, self.graph_dispatcher = impl, kept, warn, graph_dispatcher
        self._own, self._cutlass = impl._fused_experts, cutlass
        parameters = inspect.signature(graph_dispatcher.kernel.launch).parameters
        self._takes_out, self._takes_memory = "out" in parameters, "workspace" in parameters
        self._layer: Layer | None = None
        self._given_up = self._ran = False
        self._reserved = 0

    def __call__(self, **call: Any) -> Any:
        """One step of the layer; what we cannot run goes to vLLM's own launch."""
        if self._given_up or not self._runnable(call):
            return self._leave(call)
        try:
            self._reserve(call)
            if self._layer is None:
                self._layer = self.graph_dispatcher.layer(self._name())
            out = self._layer(**self._arguments(call))
            self._ran = True
            return out
        except CaptureError as error:
            self._warn("capture", "rampwrap leaves a captured step to vLLM: %s", error)
        except Exception as error:
            # What fails at the first step is an installation, a driver without our kernels say, and the engine must start.
            if self._ran and not isinstance(error, RampwrapError):
                raise
            self._given_up = True
            self._warn(repr(error), "rampwrap leaves a layer to vLLM from here on: %s", error)
        return self._leave(call)

    def _leave(self, call: dict[str, Any]) -> Any:
        """vLLM's own launch of a step."""
        return self._own(**(vllm_cutlass.quantised(self._impl, call) if self._cutlass else call))

    def _runnable(self, call: Mapping[str, Any]) -> bool:
        shape, hidden, ids = self.graph_dispatcher.shape, call["a1q"], call["topk_ids"]
        tokens, experts = ids.shape[0], self._impl.fused_experts
        return (
            0 < tokens <= self.graph_dispatcher.max_tokens
            and hidden.dim() == 2
            and hidden.dtype == call["in_dtype"]
            and hidden.is_contiguous()
            and ids.is_contiguous()
            and tuple(call["w1"].shape) == (shape.num_local_experts, 2 * shape.intermediate_size, shape.hidden_size)
            and call["w1"].is_contiguous()
            and call["w2"].is_contiguous()
            and not call["apply_router_weight_on_input"]
            # Both are set on experts that were made long before.
            and getattr(experts, "_lora_context", None) is None
            and getattr(experts, "post_gemm2_hook", None) is None
            and (call["expert_map"] is not None or shape.num_local_experts == shape.num_experts)
            # In host memory, where each block of rows reads them anew over the bus.
            and not any(getattr(call[name], "_vllm_is_uva_offloaded", False) for name in ("w1", "w2"))
        )

    def _arguments(self, call: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {
            "hidden_states": call["a1q"],
            "w13": call["w1"],
            "w2": call["w2"],
            "topk_weights": call["topk_weights"],
            "topk_ids": call["topk_ids"],
        }
        if self.graph_dispatcher.shape.dtype == "fp8":
            # Read at each step, as vLLM does: weights may have been loaded anew.
            quant = self._impl.fused_experts.quant_config
            out |= {"w13_scale": quant.w1_scale, "w2_scale": quant.w2_scale}
            if quant.a1_scale is not None:
                out |= {"w13_input_scale": quant.a1_scale, "w2_input_scale": quant.a2_scale}
        if call["expert_map"] is not None:
            out["expert_map"] = call["expert_map"]
        if self._takes_out:
            out["out"] = self._out(call)
        if self._takes_memory and (memory := self._memory(len(call["topk_ids"]))) is not None:
            out["workspace"] = memory
        return out

    def _out(self, call: Mapping[str, Any]) -> torch.Tensor:
        """Where the result is wanted: each but the last saves the copy that vLLM makes of what its experts return."""
        hidden, prepare = call["a1q"], self._impl.prepare_finalize
        if (allocate := getattr(prepare, "allocate_fused_expert_output", None)) is not None:  # from 0.33 on
            reduce = self._impl.fused_experts.finalize_weight_and_reduce_impl()
            buffer = allocate(tuple(hidden.shape), hidden.dtype, hidden.device, reduce)
            if isinstance(buffer, torch.Tensor):
                return buffer
        alias = call.get("output_alias")
        wanted = hidden.shape, hidden.dtype
        if alias is None or (alias.shape, alias.dtype) != wanted or not alias.is_contiguous():
            alias = torch.empty_like(hidden)
        return alias

    def _memory(self, num_tokens: int) -> Any:
        """A workspace in the memory that vLLM keeps for its own experts; None lets the graph dispatcher allocate one."""
        manager = _workspaces()
        if manager is None:
            return None
        from rampwrap.kernels.triton.moe.workspace import Workspace

        names, specs = _layout(self.graph_dispatcher.shape, num_tokens)
        try:
            tensors = manager.get_simultaneous(*specs)
        except AssertionError as error:  # it is locked: no step of ours was as large before
            raise InputError(f"vLLM's scratch memory has no room for {num_tokens} tokens ({error}).") from error
        if capturing():
            self._kept.setdefault(tensors[0].data_ptr(), tensors[0])
        slots = num_tokens * self.graph_dispatcher.shape.top_k
        return Workspace(slots, **dict(zip(names, tensors, strict=True)))

    def _reserve(self, call: Mapping[str, Any]) -> None:
        """Lets vLLM's memory grow to what its own launch of this step takes, at the largest step so far, which is the first.

        After warm-up vLLM locks that memory at its largest, and ours is 0.43 to 0.82 times what its own experts ask for: a
        large step that goes to its launch later (a hook that was set, a layer given up) would end the engine.
        """
        num_tokens = len(call["topk_ids"])
        if num_tokens <= self._reserved or capturing() or _workspaces() is None:
            return
        problem = self._impl.fused_experts.moe_problem_size(call["a1q"], call["w1"], call["w2"], call["topk_ids"])
        tokens, sizes = problem[1], dict(zip(("N", "K", "top_k"), problem[2:], strict=True))
        named = ("global_num_experts", "local_num_experts", "expert_tokens_meta", "activation")
        self._impl._allocate_buffers(
            out_dtype=call["in_dtype"],
            device=call["a1q"].device,
            M_chunk=tokens,
            M_full=tokens,
            **sizes,
            **{name: call[name] for name in named},
        )
        if self._cutlass:
            vllm_cutlass.reserve(self._impl.fused_experts, call["topk_ids"].numel())
        self._reserved = num_tokens

    def _name(self) -> str:
        """The layer's name in the model, by which its figures are reported."""
        context = importlib.import_module("vllm.forward_context")
        if context.is_forward_context_available():
            for name, layer in context.get_forward_context().no_compile_layers.items():
                method = getattr(getattr(layer, "routed_experts", None), "quant_method", None)
                kernel = getattr(method, "moe_kernel", None)
                if kernel is not None and kernel.impl is self._impl:
                    return str(name)
        return f"layer {id(self):x}"


def _workspaces() -> Any:
    """vLLM's manager of scratch memory; None outside an engine."""
    module = importlib.import_module("vllm.v1.worker.workspace")
    return module.current_workspace_manager() if module.is_workspace_manager_initialized() else None


@functools.lru_cache(maxsize=1024)
def _layout(
    shape: MoEShape, num_tokens: int
) -> tuple[tuple[str, ...], tuple[tuple[tuple[int, ...], torch.dtype], ...]]:
    """Names, shapes and types of a `Workspace` of a batch."""
    from rampwrap.kernels.triton.moe.workspace import workspace

    made = workspace(shape, num_tokens, "meta")
    fields = [(field.name, getattr(made, field.name)) for field in attrs.fields(type(made))]
    tensors = [(name, value) for name, value in fields if isinstance(value, torch.Tensor)]
    return tuple(name for name, _ in tensors), tuple((tuple(t.shape), t.dtype) for _, t in tensors)
