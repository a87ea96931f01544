"""Several configs of vLLM's fused MoE behind one alignment, of which the GPU lets one run; vLLM's kernels unmodified.

The steps are those of vLLM's `fused_experts_impl` (0.26), in its order and with its own functions: quantise, first
GEMM, activation, quantise, second GEMM, sum. Only the two GEMMs are launched once for each candidate. A CTA of vLLM's
kernel leaves when its block starts at or past ``num_tokens_post_padded``, which is zero for all but the chosen one,
so all candidates share the intermediate tensors and one of them writes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rampwrap.errors import InputError
from rampwrap.kernels.common.branches import run_beside
from rampwrap.kernels.common.operands import Operands

NAMES = (
    *("dispatch_fused_moe_kernel", "moe_kernel_quantize_input", "apply_moe_activation", "_get_config_quant_dtype"),
    *("MoEActivation", "FUSED_MOE_UNQUANTIZED_CONFIG", "mk", "ops", "tl"),
)
"What is used of vLLM's module."
COMPUTE = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def available(module: Any) -> bool:
    """Whether a vLLM's `fused_moe` module has all that is used here."""
    return all(hasattr(module, name) for name in NAMES)


def launch_candidates(
    module: Any,
    configs: Sequence[Mapping[str, Any]],
    blocks: Sequence[Any],
    operands: Operands,
    *,
    quant_config: Any = None,
    activation: Any = None,
    apply_router_weight_on_input: bool = False,
    streams: Sequence[Any] = (),
) -> torch.Tensor:
    """Runs the layer with the candidate whose blocks have rows; the bits are those of `fused_experts` with its config.

    Args:
        module: vLLM's ``fused_moe``.
        configs: candidates, in vLLM's words.
        blocks: `TokenBlocks` of each, from `select.align_and_select`.
        operands: of the layer. Its expert_map is not read, the blocks say it: rows of experts elsewhere, and of padding,
            are zero.
        quant_config: vLLM's; None for bf16 and fp16.
        activation: vLLM's `MoEActivation`; SiLU where absent.
        streams: for the candidates after the first, to run beside it; none runs them one after the other.

    The other arguments are those of `fused_experts`.

    Raises:
        InputError: weights of four or eight bits with wider activations, which run other kernels.
    """
    quant = module.FUSED_MOE_UNQUANTIZED_CONFIG if quant_config is None else quant_config
    if quant.use_int8_w8a16 or quant.use_int4_w4a16 or quant.ocp_mx_scheme is not None:
        raise InputError("vLLM's weight-only and MX layers run other kernels; launch one config instead of candidates.")
    activation = module.MoEActivation.SILU if activation is None else activation
    hidden_states, w13, w2 = operands.hidden_states, operands.w13, operands.w2
    num_tokens, top_k, slots, wide, hidden = (*operands.topk_ids.shape, operands.num_slots, w13.shape[1], w2.shape[1])
    # As in vLLM: the first GEMM's output is dead when the second writes.
    shared = hidden_states.new_empty(slots * max(wide, hidden))
    up, rows = shared[: slots * wide].view(num_tokens, top_k, wide), shared[: slots * hidden].view(-1, top_k, hidden)
    narrow = module.mk.FusedMoEExpertsModular.adjust_N_for_activation(wide, activation)
    h = hidden_states.new_empty(slots, narrow)
    kinds = {"use_fp8_w8a8": quant.use_fp8_w8a8, "use_int8_w8a8": quant.use_int8_w8a8}
    quantised = {
        "quant_dtype": module._get_config_quant_dtype(**kinds),
        "per_act_token_quant": quant.per_act_token_quant,
        "block_shape": quant.block_shape,
    }
    common = {
        **kinds,
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
        "per_channel_quant": quant.per_act_token_quant,
        "block_shape": quant.block_shape,
        "compute_type": getattr(module.tl, COMPUTE[hidden_states.dtype]),
    }

    def gemm(x: Any, w: Any, out: Any, scales: Any, bias: Any, weighted: bool, each: int) -> None:
        def one(config: Mapping[str, Any], its: Any) -> None:
            alignment = (its.sorted_token_ids, its.expert_ids, its.num_tokens_post_padded)
            arguments = (x, w, out, *scales, operands.topk_weights, *alignment, weighted, each, dict(config))
            module.dispatch_fused_moe_kernel(*arguments, **common, B_bias=bias)

        run_beside(streams, [functools.partial(one, *its) for its in zip(configs, blocks, strict=True)])

    x, x_scale = module.moe_kernel_quantize_input(A=hidden_states, A_scale=quant.a1_scale, **quantised)
    scales = (x_scale, quant.w1_scale, quant.w1_zp)
    gemm(x, w13, up, scales, quant.w1_bias, apply_router_weight_on_input, top_k)
    module.apply_moe_activation(activation, h, up.view(-1, wide))
    x, x_scale = module.moe_kernel_quantize_input(A=h, A_scale=quant.a2_scale, **quantised)
    rows.zero_()  # those of padding and of other ranks' experts are never written
    scales = (x_scale, quant.w2_scale, quant.w2_zp)
    gemm(x, w2, rows, scales, quant.w2_bias, not apply_router_weight_on_input, 1)
    out = torch.empty_like(hidden_states)
    module.ops.moe_sum(rows, out)
    return out
