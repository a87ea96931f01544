"""What `test_vllm_wheels` runs in a process of its own: vLLM's classes of one release around our launch, on a CPU.

python vllm_classes.py FOLDER VERSION PLANS
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "adapters"))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import vllm_alone

vllm_alone.install(pathlib.Path(sys.argv[1]), sys.argv[2])

import test_cute_moe as cute
import test_vllm as tests
import torch
import vllm.model_executor.layers.fused_moe.experts.cutlass_moe as cutlass_moe
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
import vllm.model_executor.layers.fused_moe.utils as utils
import vllm_cutlass_operators
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.triton_cutlass_moe import TritonOrCutlassExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.v1.worker import workspace

import rampwrap.dispatch.lane
from rampwrap.adapters import cute_moe
from rampwrap.engines import vllm as plugin
from rampwrap.engines import vllm_experts, vllm_layer
from rampwrap.kernel.activation import SWIGLU_OAI
from rampwrap.kernel.device import Device
from rampwrap.plan.make import make_plan

FP8 = tests.MoEShape(8, 2, 128, 128, "fp8")
OAI = tests.MoEShape(8, 2, 64, 32, activation=SWIGLU_OAI)
MOST = 1024
"Tokens at which vLLM's own scratch memory is larger than ours, as it is at real sizes."


def kernel(quant, change=None, kind=TritonExperts, **sizes):
    """A layer's kernel as loading its weights makes it."""
    sizes = {"num_experts": 8, "experts_per_token": 2, "hidden_dim": 64, "intermediate_size": 32} | sizes
    config = FusedMoEConfig(
        **sizes,
        num_local_experts=8,
        num_logical_experts=8,
        max_num_tokens=MOST,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        in_dtype=torch.bfloat16,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    )
    if change is not None:
        change(config)
    experts = kind(config, quant)
    if kind is TritonExperts:  # its kernels need a GPU; all around them is vLLM's
        experts.apply = lambda **its: its["output"].copy_(by_hand(its))
    return mk.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)


def by_hand(its):
    """The layer in float32, expert by expert."""
    x, out = its["hidden_states"].float(), torch.zeros(its["hidden_states"].shape)
    for expert, (w13, w2) in enumerate(zip(its["w1"].float(), its["w2"].float(), strict=True)):
        gate, up = (x @ w13.T).chunk(2, dim=1)
        weight = (its["topk_weights"] * (its["topk_ids"] == expert)).sum(1, keepdim=True)
        out += weight * ((torch.nn.functional.silu(gate) * up) @ w2.T)
    return out


def near(out, its):
    want = by_hand(its)
    return float((out.float() - want).norm() / want.norm()) < 1e-2


def apply(layer, its):
    return layer.apply(
        *(its[name] for name in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")),
        activation=layer.impl.fused_experts.moe_config.activation,
        global_num_experts=8,
        expert_map=None,
        apply_router_weight_on_input=False,
    )


def ours(layer):
    return isinstance(vars(layer.impl).get("_fused_experts"), vllm_experts.Experts)


def plain():
    return FusedMoEQuantConfig.make()


def fp8_layer(its):
    quant = fp8_w8a8_moe_quant_config(w1_scale=its["w13_scale"], w2_scale=its["w2_scale"], block_shape=[128, 128])
    return kernel(quant, hidden_dim=128, intermediate_size=128)


def check_results(fp8_inputs):
    """Both dtypes, into vLLM's own output; the first registration is the only one."""
    its = tests.inputs()
    layer = kernel(plain())
    assert near(apply(layer, its), its) and ours(layer)
    layer = fp8_layer(fp8_inputs)
    out = apply(layer, fp8_inputs)
    want = tests.TritonFusedMoE(FP8).reference(FP8, fp8_inputs)
    assert float((out.double() - want).norm() / want.norm()) < 2e-2
    assert ours(layer) and layer.impl.fused_experts.expects_unquantized_inputs


def check_padding(fp8_inputs):
    """Passes in which every token is padding, before a capture and in it: zeros, and nothing is counted; some padding too."""
    bf16_inputs, in_fp8 = tests.inputs(8), tests.TritonFusedMoE(FP8).reference(FP8, fp8_inputs)
    bf16_layer = (kernel(plain()), bf16_inputs, by_hand(bf16_inputs))
    for layer, its, want in (bf16_layer, (fp8_layer(fp8_inputs), fp8_inputs, in_fp8)):
        empty = its | {"topk_ids": torch.full_like(its["topk_ids"], -1)}
        for under in (False, True):
            vllm_experts.capturing = rampwrap.dispatch.lane.capturing = lambda: under  # noqa: B023
            out = apply(layer, empty)
            assert torch.equal(out, torch.zeros_like(out)), under
        vllm_experts.capturing = rampwrap.dispatch.lane.capturing = lambda: False
        assert not layer.impl._fused_experts._layer.telemetry()
        half = its | {"topk_ids": its["topk_ids"].clone()}
        half["topk_ids"][2:] = -1
        out = apply(layer, half)
        (row,) = layer.impl._fused_experts._layer.telemetry()
        assert ours(layer) and row.steps == 1 and not row.outside
        assert torch.equal(out[2:], torch.zeros_like(out[2:]))
        assert float((out[:2].double() - want[:2].double()).norm() / want[:2].double().norm()) < 2e-2


def check_memory():
    """vLLM's manager locked after our steps: without its own size in it a large step of its launch would end the engine."""
    its = tests.inputs(MOST)
    for reserves in (False, True):
        workspace.reset_workspace_manager()
        workspace.init_workspace_manager(torch.device("cpu"))
        layer = kernel(plain())
        experts = layer.impl._fused_experts
        experts._layer = lambda **launch: launch["out"]  # so many tokens take the interpreter too long
        if not reserves:
            experts._reserve = lambda call: None
        apply(layer, its)
        workspace.lock_workspace()
        experts._given_up = True
        try:
            assert near(apply(layer, its), its)
            assert reserves, "vLLM's own launch had room without having asked"
        except AssertionError as error:
            assert not reserves and "Workspace is locked" in str(error), error


def check_settings():
    """What we do not know keeps a layer, or a step, with vLLM."""
    changes = {"swiglu_limit": 7.0, "swiglu_alpha": 1.7, "_defer_moe_finalize": True, "activation_situ_beta": 1.0}
    for name, value in changes.items():
        if name in FusedMoEConfig.__dataclass_fields__:
            assert not ours(kernel(plain(), lambda config: setattr(config, name, value))), name  # noqa: B023
    quant = plain()
    quant.mx_alignment = 32
    assert not ours(kernel(quant))
    layer, its, served = kernel(plain()), tests.inputs(), []
    layer.impl.fused_experts.apply = lambda **its: served.append(its["output"].copy_(by_hand(its)))
    layer.impl.fused_experts.post_gemm2_hook = print
    assert near(apply(layer, its), its) and len(served) == 1
    layer.impl.fused_experts.post_gemm2_hook = None
    its["w1"]._vllm_is_uva_offloaded = True
    assert near(apply(layer, its), its) and len(served) == 2


def check_forms():
    """Activations and scales, from vLLM's own settings to the layer that a plan must be for, and one of each run."""
    given = {"gemm1_clamp_limit": 7.0, "gemm1_alpha": 1.702, "gemm1_beta": 1.0}
    scaled = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}

    def oai(config):
        config.activation = MoEActivation.SWIGLUOAI_UNINTERLEAVE
        vars(config).update(scaled)

    layer, its = kernel(FusedMoEQuantConfig.make(**given), oai), tests.inputs(4)
    shape = layer.impl._fused_experts.graph_dispatcher.shape
    want = tests.TritonFusedMoE(shape).reference(shape, its | {"w13": its["w1"]})
    assert shape == OAI and float((apply(layer, its).double() - want).norm() / want.norm()) < 1e-2
    for scales, form in {
        "block-64": {"block_shape": [64, 64]},
        "block-32": {"block_shape": [32, 32]},
        "channel": {"per_act_token_quant": True, "per_out_ch_quant": True},
        "tensor": {},
    }.items():
        shape = tests.MoEShape(8, 2, 64, 64, "fp8", scales=scales)
        ours = tests.TritonFusedMoE(shape)
        its = ours.inputs(shape, tests.inputs(4)["topk_ids"])
        quant = fp8_w8a8_moe_quant_config(w1_scale=its["w13_scale"], w2_scale=its["w2_scale"], **form)
        layer = kernel(quant, hidden_dim=64, intermediate_size=64)
        assert vllm_layer.layer_shape(layer.impl.fused_experts.moe_config, quant) == shape


def check_cutlass():
    """Layers of vLLM's CUTLASS experts: ours against vLLM's own steps in plain torch, which run where we do not, its memory locked."""
    vllm_cutlass_operators.install(cutlass_moe, utils)
    cutlass_moe.moe_permute_unpermute_supported = lambda: True
    torch.ops._moe_C.moe_permute_sort_workspace_size = lambda rows, experts: rows + experts
    for scales in ("channel", "static"):
        shape = tests.MoEShape(8, 2, 64, 64, "fp8", scales=scales)
        wanted = tests.TritonFusedMoE(shape)
        its = wanted.inputs(shape, tests.inputs(12)["topk_ids"])
        form = {"per_act_token_quant": True, "per_out_ch_quant": True}
        if scales == "static":
            form = {"a1_scale": its["w13_input_scale"], "a2_scale": its["w2_input_scale"]}
        quant = fp8_w8a8_moe_quant_config(w1_scale=its["w13_scale"], w2_scale=its["w2_scale"], **form)
        its["w1"], want = its["w13"], wanted.reference(shape, its)
        workspace.reset_workspace_manager()
        workspace.init_workspace_manager(torch.device("cpu"))
        layer = kernel(quant, kind=TritonOrCutlassExperts, hidden_dim=64, intermediate_size=64)
        assert ours(layer) and layer.impl._fused_experts.graph_dispatcher.shape == shape
        out, asked = apply(layer, its), []
        assert not apply(layer, its | {"topk_ids": torch.full_like(its["topk_ids"], -1)}).any()
        workspace.lock_workspace()
        own = layer.impl._fused_experts._own
        layer.impl._fused_experts._own = lambda **call: asked.append(call["a1q"].dtype) or own(**call)  # noqa: B023
        layer.impl._fused_experts._given_up = True
        theirs = apply(layer, its)
        assert asked == [torch.float8_e4m3fn]
        for found, against in ((out, want), (theirs, want), (out, theirs.double())):
            assert float((found.double() - against).norm() / against.norm()) < 2e-2, scales


def check_defaults():
    """Layers without a plan on a Hopper: the CuTe kernels' defaults, on stand-ins of the compiled ones, in vLLM's own memory."""
    library, ids = cute.StandIns(), tests.inputs(8)["topk_ids"]
    cute_moe.load = lambda path=None: library
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cpu"))
    Device.current = classmethod(lambda cls: Device("NVIDIA H200", 132, capability="9.0"))
    for dtype in ("bf16", "fp8"):
        shape = tests.MoEShape(8, 2, 256, 256, dtype)
        its = cute.kernel_of(shape).inputs(shape, ids)
        its["w1"], quant = its["w13"], plain()
        if dtype == "fp8":
            scales = {"w1_scale": its["w13_scale"], "w2_scale": its["w2_scale"]}
            quant = fp8_w8a8_moe_quant_config(**scales, block_shape=[128, 128])
        layer = kernel(quant, hidden_dim=256, intermediate_size=256)
        out, want = apply(layer, its), cute.kernel_of(shape).reference(shape, its)
        assert ours(layer) and library.calls and float((out.double() - want).norm() / want.norm()) < 1e-2, dtype
        library.calls.clear()
    assert len(plugin.engines()[0]["defaults"]) == 2


def main():
    make_plan(tests.timings_of(tests.SHAPE)).save(pathlib.Path(sys.argv[3]) / "tiny.plan.json")
    make_plan(tests.timings_of(FP8)).save(pathlib.Path(sys.argv[3]) / "fp8.plan.json")
    fp8 = [tests.MoEShape(8, 2, 64, 64, "fp8", scales=scales) for scales in ("channel", "static")]
    for name, shape in zip(("oai", "channel", "static"), (OAI, *fp8), strict=True):
        make_plan(tests.timings_of(shape)).save(pathlib.Path(sys.argv[3]) / f"{name}.plan.json")
    plugin.register()
    plugin.register()
    workspace.init_workspace_manager(torch.device("cpu"))
    torch.accelerator.empty_cache = lambda: None
    its = tests.TritonFusedMoE(FP8).inputs(FP8, tests.inputs(8)["topk_ids"])
    its["w1"] = its["w13"]
    check_results(its)
    check_padding(its)
    check_memory()
    check_settings()
    check_forms()
    check_cutlass()
    check_defaults()
    print("ran in vLLM", sys.argv[2])


if __name__ == "__main__":
    main()
