"""vLLM's CUTLASS experts, which run FP8 by channels and by tensors on Hopper: what must hold for our launch to stand in for them.

Their weights lie as `TritonExperts`' do, [E, 2I, H] gate rows first and [E, H, I], with scales [E, n, 1] or [E]; no step of
loading moves them. Activations come quantised from vLLM's prepare step, a scale a token; `_deferring` of the plugin leaves
that to our launch, and what goes to vLLM's own after all is quantised by the same prepare step first (`quantised`).
"""

import functools
import importlib
import pathlib
from typing import Any

from rampwrap.engines import vllm_contract as contract
from rampwrap.kernel.activation import SILU, Activation
from rampwrap.kernel.shape import MoEShape

SERVED = True
"""Whether our launch stands in for them: it is 1.14-1.28x in GPU time of a step of Qwen3-30B, scales by channel, vLLM 0.33 on an
H100 (`benchmarks/README.md`). False leaves them to vLLM, and the log, doctor and profile say so."""
NAME = "TritonOrCutlassExperts"
"The class of a layer's experts: those of CUTLASS, but on sm_100, where it takes `TritonExperts` for up to 8 tokens."

_FOLDER = "model_executor/layers/fused_moe"
_CUTLASS = f"{_FOLDER}/experts/cutlass_moe.py"
_MEMBERS = contract.MEMBERS | {
    *("experts", "fallback_experts", "is_sm100", "get_clses", "_select_experts_impl", "out_dtype", "ab_strides1"),
    *("ab_strides2", "c_strides1", "c_strides2", "_get_permute_scratch", "_permute_scratch"),
}
_CLASSES: tuple[tuple[str, str, tuple[str, ...], dict[str, tuple[str, ...]]], ...] = (
    (f"{_FOLDER}/experts/triton_cutlass_moe.py", NAME, ("FallbackExperts",), {}),
    (f"{_FOLDER}/experts/fallback.py", "FallbackExperts", ("mk.FusedMoEExpertsModular", "ABC"), {}),
    (_CUTLASS, "CutlassExpertsFp8", ("CutlassExpertsFp8Base",), {}),
    (_CUTLASS, "CutlassExpertsFp8Base", ("mk.FusedMoEExpertsModular",), {"_get_permute_scratch": ()}),
)
_SCRATCH = f"{_FOLDER}/moe_permute_unpermute.py", "MoEPermuteScratch"
_PREPARE = f"{_FOLDER}/prepare_finalize/no_dp_ep.py", "MoEPrepareAndFinalizeNoDPEPModular"
_PREPARE_ARGUMENTS = (
    *("a1", "topk_weights", "topk_ids", "num_experts", "expert_map", "apply_router_weight_on_input"),
    *("quant_config", "defer_input_quant"),
)
_STEPS = frozenset(
    {
        *("output", "hidden_states", "w1", "w2", "topk_ids", "activation", "global_num_experts", "expert_map"),
        *("w1_scale", "w2_scale", "a1q_scale", "a2_scale", "ab_strides1", "ab_strides2", "c_strides1", "c_strides2"),
        *("workspace13", "workspace2", "expert_num_tokens", "out_dtype", "per_act_token", "per_out_ch"),
        *("use_batched_format", "topk_weights", "permute_scratch", "activation_config"),
    }
)
"What `run_cutlass_moe_fp8` may be told."


@functools.cache
def faults(root: pathlib.Path | None = None) -> tuple[str, ...]:
    """Why a release's CUTLASS layers cannot be served, as `vllm_contract.faults`; read once in a process."""
    root = contract.sources() if root is None else root
    if root is None:
        return ("vLLM is not installed",)
    found = [
        fault
        for file, owner, bases, signatures in _CLASSES
        for fault in contract.class_faults(root, file, owner, signatures, {}, _MEMBERS, bases)
    ]
    found += contract.new_arguments(root, _CUTLASS, "run_cutlass_moe_fp8", _STEPS)
    found += contract.class_faults(root, *_SCRATCH, {}, {"reserve": ("expanded_rows",)})
    return (*found, *contract.class_faults(root, *_PREPARE, {"prepare": _PREPARE_ARGUMENTS}, {}))


def refusal(experts: Any, shape: MoEShape) -> str | None:
    """Why a layer with these experts, of class `NAME`, is not served, in words; None where it may be."""
    package = "vllm.model_executor.layers.fused_moe.experts"
    wanted = importlib.import_module(f"{package}.triton_cutlass_moe"), importlib.import_module(f"{package}.cutlass_moe")
    if type(experts) is not getattr(wanted[0], NAME) or type(experts.experts) is not wanted[1].CutlassExpertsFp8:
        return f"vLLM runs it with {type(experts.experts).__name__}, which rampwrap does not know"
    if found := faults(pathlib.Path(importlib.import_module("vllm").__path__[0])):
        return "; ".join(found)
    if shape.activation not in (SILU, Activation("gelu_tanh")) and not hasattr(experts, "activation_config"):
        # Before 0.28 a limit reaches TritonExperts alone.
        return f"its activation is {shape.activation}, of which vLLM's CUTLASS passes over the numbers"
    return None


def quantised(impl: Any, call: dict[str, Any]) -> dict[str, Any]:
    """A step's arguments with hidden states as vLLM's prepare step quantises them, for its own launch."""
    experts = impl.fused_experts
    x, scale, *_ = impl.prepare_finalize.prepare(
        call["a1q"],
        call["topk_weights"],
        call["topk_ids"],
        call["global_num_experts"],
        call["expert_map"],
        False,  # they were multiplied when they came here
        experts.quant_config,
        defer_input_quant=False,
    )
    return call | {"a1q": x, "a1q_scale": scale}


def reserve(experts: Any, num_rows: int) -> None:
    """Lets vLLM make the memory by which its launch permutes so many rows, where layers share it and it is locked after warm-up.

    From 0.32 on it is made without room and grows with what is launched, which ours is instead.
    """
    # In older releases each layer has its own, for all tokens, made when it is needed.
    if hasattr(experts.experts, "_permute_scratch"):
        return
    scratch = experts.experts._get_permute_scratch()
    if scratch is not None:
        scratch.reserve(num_rows)
