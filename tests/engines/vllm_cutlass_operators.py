"""The operators that vLLM's CUTLASS experts call, in plain torch: what each computes, so that vLLM's own code runs around them."""

import types

import torch

FP8 = torch.float8_e4m3fn


def scaled_fp8_quant(
    x, scale=None, num_token_padding=None, scale_ub=None, use_per_token_if_dynamic=False, output=None, **_
):
    """By the scale that is given, else by one a token or one for all: divided by where it is found, times its inverse else."""
    wide = x.float()
    if scale is not None:
        found, q = scale, wide * (1 / scale)
    elif use_per_token_if_dynamic:
        found = (wide.abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
        q = wide / found
    else:
        found = (wide.abs().max() / 448).reshape(1)
        q = wide * (1 / found)
    q = q.clamp(-448, 448).to(FP8)
    return (q if output is None else output.copy_(q)), found


def cutlass_moe_mm(
    out, a, b, a_scales, b_scales, offsets, sizes, a_strides, b_strides, c_strides, by_token, by_channel
):
    """Rows of each expert times its weights, [n, k] as they are stored, the scales on the sum, rounded once."""
    ends = [*offsets.tolist()[1:], len(a)]
    for expert, (start, end) in enumerate(zip(offsets.tolist(), ends, strict=True)):
        scale = a_scales[start:end].double() if by_token else a_scales.double().reshape(1, 1)
        weight = b_scales[expert].double().reshape(1, -1) if by_channel else b_scales[expert].double()
        out[start:end] = (a[start:end].double() @ b[expert].double().T * scale * weight).to(out.dtype)


def moe_permute(
    rows, scale, topk_ids, num_experts, num_local, expert_map=None, permuted_hidden_states=None, scratch=None
):
    """Rows once for each of their experts, in the order of experts, with where each expert begins and each slot went."""
    assert expert_map is None
    if hasattr(scratch, "reserve"):  # from 0.32 on: refused once vLLM's memory is locked
        scratch.reserve(topk_ids.numel())
    order = topk_ids.flatten().argsort(stable=True)
    starts = torch.searchsorted(topk_ids.flatten()[order].long().contiguous(), torch.arange(num_local + 1))
    permuted_hidden_states.view(torch.uint8).copy_(rows[order // topk_ids.shape[1]].view(torch.uint8))
    by_row = scale if scale.numel() == 1 else scale[order // topk_ids.shape[1]]
    return permuted_hidden_states, by_row, starts, order.argsort().view(topk_ids.shape), order


def moe_unpermute(out, permuted_hidden_states, topk_weights, inv_permuted_idx, expert_first_token_offset):
    """Each token's rows, weighted and added."""
    rows = permuted_hidden_states[inv_permuted_idx].double()
    out.copy_((rows * topk_weights.double()[..., None]).sum(1))


def apply_moe_activation(activation, out, gate_up, **_):
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_((torch.nn.functional.silu(gate) * up).to(out.dtype))


def install(module, utils):
    """Makes vLLM's modules `cutlass_moe` and `utils` call these."""
    operators = types.SimpleNamespace(
        scaled_fp8_quant=scaled_fp8_quant,
        cutlass_moe_mm=cutlass_moe_mm,
        get_cutlass_moe_mm_problem_sizes_from_expert_offsets=lambda *_: None,
    )
    module.ops = utils.ops = operators
    module.moe_permute, module.moe_unpermute = moe_permute, moe_unpermute
    module.apply_moe_activation = apply_moe_activation
