"""The plugin in the installed vLLM on a GPU. Run with `pytest -m gpu tests/gpu/engines/test_vllm_gpu.py` where vLLM imports.

The first tests call vLLM's own layer around our launch, the later ones start small engines with dummy weights in
processes of their own (about 30 s each).
"""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM", allow_module_level=True)

import attrs

from rampwrap.engines import vllm as plugin
from rampwrap.engines.defaults import PLANS_ONLY, default_configs
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.activation import SWIGLU_OAI, Activation
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.timings import Timings
from rampwrap.plan import folder as places
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
SHAPE = MoEShape(16, 4, 512, 256)
TOKENS = 48
ROOT = pathlib.Path(plugin.__file__).parents[2]


def need_cute(shape):
    """Skips where the CuTe kernels are not built."""
    try:
        return make_kernel("cute_moe", shape)
    except (InputError, ConfigError) as error:
        pytest.skip(str(error))


def synthetic_plan(shape, kernel_name="triton_fused_moe"):
    """A plan by which few active experts favour one config and many another, whatever the GPU thinks of them."""
    kernel = make_kernel(kernel_name, shape)
    key = "block_m" if "block_m" in kernel.configs[0] else "BLOCK_SIZE_M"
    configs = tuple(c for c in kernel.configs if c[key] == 16)[:2]
    names = ("uniform", "dirichlet:0.3", "dirichlet:0.1", "hot:1")
    rows = workload_grid([1, 4, 16, 64, 256], [Routing.parse(name) for name in names])
    counts = np.stack([expert_counts(row.topk_ids(shape.num_experts, shape.top_k), shape.num_experts) for row in rows])
    counts = counts[:, : shape.num_local_experts]
    active = (counts > 0).sum(axis=1).astype(float)
    timings = Timings(
        us=np.stack([460 + 0.5 * active, 60 + 30 * active], axis=1),
        counts=counts,
        split=("train",) * len(rows),
        label=tuple(row.label for row in rows),
        kernel=kernel.name,
        kernel_version=kernel.version,
        device=Device.current(),
        shape=shape,
        configs=configs,
        grids=tuple(kernel.grid(config, shape) for config in configs),
    )
    return make_plan(timings)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A folder for plans, and a plugin that knows of no engine."""
    monkeypatch.delenv(places.DISABLE, raising=False)
    monkeypatch.setenv(places.PLANS, str(tmp_path))
    monkeypatch.setattr(plugin, "_engines", {})
    monkeypatch.setattr(plugin, "_warn", places.OneWarning(plugin.logger))
    monkeypatch.setattr(plugin, "ensure_compiled", lambda graph_dispatcher, path: False)
    from vllm.v1.worker import workspace

    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cuda"))
    plugin.register()
    return tmp_path


def quantised(shape, scales):
    """vLLM's description of a layer's weights and activation."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, fp8_w8a8_moe_quant_config

    its, group = shape.activation, shape.scale_group
    scaled = {"gemm1_clamp_limit": its.limit}
    if (its.alpha, its.beta) != (1.0, 0.0):
        scaled |= {"gemm1_alpha": its.alpha, "gemm1_beta": its.beta}
    if not scales:
        return FusedMoEQuantConfig.make(**scaled)
    by_channel = shape.scales == "channel"
    scaled |= {"per_act_token_quant": by_channel, "per_out_ch_quant": by_channel}
    scaled |= dict(zip(("a1_scale", "a2_scale"), scales[2:], strict=False))
    return fp8_w8a8_moe_quant_config(*scales[:2], block_shape=[group, group] if group else None, **scaled)


def layer(shape, scales=(), cutlass=False):
    """vLLM's kernel of a layer, as loading its weights makes it."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    kind = TritonExperts
    if cutlass:
        name = "vllm.model_executor.layers.fused_moe.experts.triton_cutlass_moe"
        kind = importlib.import_module(name).TritonOrCutlassExperts
    activation = MoEActivation.SILU
    if shape.activation.name == "gelu_tanh":
        activation = MoEActivation.GELU_TANH
    elif shape.activation == SWIGLU_OAI:
        activation = MoEActivation.SWIGLUOAI_UNINTERLEAVE
    config = FusedMoEConfig(
        num_experts=shape.num_experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_local_experts,
        num_logical_experts=shape.num_experts,
        activation=activation,
        device="cuda",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        max_num_tokens=256,
    )
    made = mk.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), kind(config, quantised(shape, scales)))

    def apply(its):
        return made.apply(
            its["hidden_states"],
            its["w13"],
            its["w2"],
            its["topk_weights"],
            its["topk_ids"],
            activation=activation,
            global_num_experts=shape.num_experts,
            expert_map=its.get("expert_map"),
            apply_router_weight_on_input=False,
        )

    return made, apply


def ids_over(active, shape=SHAPE, tokens=TOKENS, seed=0):
    """int32 [tokens, top_k] over `active` experts."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(rng.random((tokens, active)), axis=1)[:, : shape.top_k]
    return torch.from_numpy(np.ascontiguousarray(rows)).int().cuda()


def error_of(out, want):
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("case", ["bf16", "fp8", "experts elsewhere", "vllm's kernel", "cute bf16", "cute fp8"])
def test_same_result_as_vllm(place, monkeypatch, case):
    """Our launch inside vLLM's layer against vLLM's own launch of the same layer."""
    fp8 = case.endswith("fp8")
    shape = attrs.evolve(SHAPE, dtype="fp8") if fp8 else SHAPE
    shape = attrs.evolve(shape, num_local_experts=8) if case == "experts elsewhere" else shape
    name = "vllm_fused_moe" if case == "vllm's kernel" else "triton_fused_moe"
    if case.startswith("cute"):
        name = need_cute(shape).name
    synthetic_plan(shape, name).save(place / "x.plan.json")
    its = make_kernel("triton_fused_moe", shape).inputs(shape, ids_over(16))
    scales = (its["w13_scale"], its["w2_scale"]) if fp8 else ()
    made, apply = layer(shape, scales)
    assert isinstance(made.impl._fused_experts, plugin.Experts)
    ours = apply(its)
    monkeypatch.setenv(places.DISABLE, "1")
    plain, theirs = layer(shape, scales)
    assert "_fused_experts" not in vars(plain.impl)
    assert made.impl._fused_experts.graph_dispatcher.kernel.name == name
    assert error_of(ours, theirs(its)) < (3e-2 if fp8 else 1e-2)
    assert sum(row.steps for row in made.impl._fused_experts.graph_dispatcher.telemetry()) == 1


OTHERS = {
    "clamped": attrs.evolve(SHAPE, activation=Activation(limit=1.0)),
    "oai": attrs.evolve(SHAPE, activation=SWIGLU_OAI),
    "gelu": attrs.evolve(SHAPE, activation=Activation("gelu_tanh")),
    "fp8 clamped": attrs.evolve(SHAPE, dtype="fp8", activation=Activation(limit=1.0)),
    "blocks of 64": attrs.evolve(SHAPE, dtype="fp8", intermediate_size=192, scales="block-64"),
    "blocks of 32": attrs.evolve(SHAPE, dtype="fp8", intermediate_size=96, scales="block-32"),
    "channels": attrs.evolve(SHAPE, dtype="fp8", scales="channel"),
    "channels, oai": attrs.evolve(SHAPE, dtype="fp8", scales="channel", activation=SWIGLU_OAI),
    "tensors": attrs.evolve(SHAPE, dtype="fp8", scales="tensor"),
    "static": attrs.evolve(SHAPE, dtype="fp8", scales="static"),
}
SCALES = ("w13_scale", "w2_scale", "w13_input_scale", "w2_input_scale")


def scales_of(its):
    return tuple(its[name] for name in SCALES if name in its)


@pytest.mark.parametrize("case", OTHERS)
def test_same_result_as_vllm_in_other_forms(place, monkeypatch, case):
    """Each activation and form of scales against vLLM's own Triton experts.

    By tensors they have a scale a batch and we one a token: two roundings of h and x that lose 4.5 and 4.3 % each, 6.2 % apart.
    """
    shape = OTHERS[case]
    synthetic_plan(shape).save(place / "x.plan.json")
    its = make_kernel("triton_fused_moe", shape).inputs(shape, ids_over(16))
    if shape.activation == SWIGLU_OAI:
        its["hidden_states"] *= 4  # so that 7 cuts something off
    scales = scales_of(its)
    made, apply = layer(shape, scales)
    assert isinstance(made.impl._fused_experts, plugin.Experts)
    ours = apply(its)
    monkeypatch.setenv(places.DISABLE, "1")
    theirs = layer(shape, scales)[1](its)
    tolerance = 8e-2 if case == "tensors" else 3e-2 if scales else 1e-2
    assert error_of(ours, theirs) < tolerance
    assert error_of(ours, make_kernel("triton_fused_moe", shape).reference(shape, its)) < (2e-2 if scales else 1e-2)


@pytest.mark.parametrize("case", ["channels", "static"])
@pytest.mark.parametrize("tokens", [1, TOKENS, 256])
def test_against_vllms_own_cutlass(place, monkeypatch, tokens, case):
    """Where vLLM runs its CUTLASS by default our launch gives what that does; what goes there after all is quantised first, with
    vLLM's memory locked as after warm-up."""
    from vllm.v1.worker import workspace

    shape = OTHERS[case]
    synthetic_plan(shape).save(place / "x.plan.json")
    kernel = make_kernel("triton_fused_moe", shape)
    its = kernel.inputs(shape, ids_over(16, tokens=tokens))
    made, apply = layer(shape, scales_of(its), cutlass=True)
    assert isinstance(made.impl._fused_experts, plugin.Experts)
    ours = apply(its).clone()
    workspace.lock_workspace()
    made.impl._fused_experts._given_up = True
    left = apply(its).clone()
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cuda"))
    monkeypatch.setenv(places.DISABLE, "1")
    theirs = layer(shape, scales_of(its), cutlass=True)[1](its)
    assert error_of(left, theirs) < 1e-3
    assert error_of(ours, theirs) < 3e-2
    assert error_of(ours, kernel.reference(shape, its)) < 2e-2


@pytest.mark.parametrize("case", ["clamped", "blocks of 64", "channels", "static"])
def test_other_forms_in_a_graph(place, case):
    """Captured once, replays follow the routing with the bits of the config that the host would choose."""
    shape = OTHERS[case]
    plan = synthetic_plan(shape)
    plan.save(place / "x.plan.json")
    kernel = make_kernel("triton_fused_moe", shape)
    its = kernel.inputs(shape, ids_over(16))
    _, apply = layer(shape, scales_of(its))
    apply(its)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(its)
    for active in (4, 10, 16):
        its["topk_ids"].copy_(ids_over(active, seed=active))
        graph.replay()
        torch.cuda.synchronize()
        chosen = plan.policy().index(expert_counts(its["topk_ids"], 16), TOKENS)
        assert torch.equal(out, kernel.launch(plan.configs[chosen], **its))


def test_one_graph_follows_the_routing(place):
    """Captured once; each replay runs the config that the host would choose for that step's routing."""
    plan = synthetic_plan(SHAPE)
    plan.save(place / "x.plan.json")
    kernel = make_kernel("triton_fused_moe", SHAPE)
    its = kernel.inputs(SHAPE, ids_over(16))
    made, apply = layer(SHAPE)
    assert len(made.impl._fused_experts.graph_dispatcher.prepared(TOKENS).configs) == 2
    apply(its)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(its)
    seen = set()
    for active in (4, 6, 10, 16, 4, 16):
        its["topk_ids"].copy_(ids_over(active, seed=active))
        graph.replay()
        torch.cuda.synchronize()
        chosen = plan.policy().index(expert_counts(its["topk_ids"], 16), TOKENS)
        assert torch.equal(out, kernel.launch(plan.configs[chosen], **its))
        seen.add(chosen)
    assert len(seen) == 2
    counted = [row for row in made.impl._fused_experts.graph_dispatcher.telemetry() if row.on_device]
    assert sum(row.steps for row in counted) == 7


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_passes_of_padding_alone(place, dtype):
    """As vLLM runs them from 0.27 on, before a capture and in it: zeros, uncounted; a replay with routing is as ever."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    synthetic_plan(shape).save(place / "x.plan.json")
    its = make_kernel("triton_fused_moe", shape).inputs(shape, ids_over(16))
    made, apply = layer(shape, (its["w13_scale"], its["w2_scale"]) if dtype == "fp8" else ())
    want = apply(its).clone()
    real = its["topk_ids"].clone()
    its["topk_ids"].fill_(-1)
    assert not apply(its).any()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(its)
    graph.replay()
    torch.cuda.synchronize()
    assert not out.any()
    its["topk_ids"].copy_(real)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
    counted = [row for row in made.impl._fused_experts.graph_dispatcher.telemetry() if row.on_device]
    assert sum(row.steps for row in counted) == 2 and not any(row.outside for row in counted)


def test_a_step_of_vllms_own_after_its_memory_was_locked(place, monkeypatch):
    """Its launch finds the room that it would have asked for, and none where we had not reserved it."""
    from vllm.v1.worker import workspace

    shape = MoEShape(4, 4, 256, 1024)  # few experts and wide ones: ours is the smaller memory
    synthetic_plan(shape).save(place / "x.plan.json")
    its = make_kernel("triton_fused_moe", shape).inputs(shape, ids_over(4, shape, tokens=256))
    for reserves in (False, True):
        workspace.reset_workspace_manager()
        workspace.init_workspace_manager(torch.device("cuda"))
        made, apply = layer(shape)
        experts = made.impl._fused_experts
        if not reserves:
            monkeypatch.setattr(experts, "_reserve", lambda call: None)
        ours = apply(its).clone()
        workspace.lock_workspace()
        experts._given_up = True
        if reserves:
            assert error_of(ours, apply(its)) < 1e-2
        else:
            with pytest.raises(AssertionError, match="Workspace is locked"):
                apply(its)


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_cute_kernels_in_a_graph(place, caplog, dtype):
    """One config a bucket, launched once eagerly and then captured: replays have the bits of the config alone."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = need_cute(shape)
    plan = synthetic_plan(shape, "cute_moe")
    plan.save(place / "x.plan.json")
    its = kernel.inputs(shape, ids_over(16))
    made, apply = layer(shape, (its["w13_scale"], its["w2_scale"]) if dtype == "fp8" else ())
    (config,) = made.impl._fused_experts.graph_dispatcher.prepared(TOKENS).configs
    apply(its)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(its)
    for active in (4, 10, 16):
        its["topk_ids"].copy_(ids_over(active, seed=active))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, kernel.launch(config, **its))
    assert not [record for record in caplog.records if "leaves" in record.getMessage()]


def test_an_unprepared_size_is_captured_by_vllm(place, caplog):
    synthetic_plan(SHAPE).save(place / "x.plan.json")
    kernel = make_kernel("triton_fused_moe", SHAPE)
    its = kernel.inputs(SHAPE, ids_over(16))
    _, apply = layer(SHAPE)
    want = apply(its).clone()
    small = {name: value[:32] if name in ("hidden_states", "topk_weights", "topk_ids") else value for name, value in its.items()}  # fmt: skip
    os.environ[places.DISABLE] = "1"
    try:
        layer(SHAPE)[1](small)  # vLLM's own kernels are compiled
    finally:
        del os.environ[places.DISABLE]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(small)
    graph.replay()
    torch.cuda.synchronize()
    assert error_of(out, want[:32]) < 1e-2
    assert any("leaves a captured step to vLLM" in record.getMessage() for record in caplog.records)


ENGINE = """
import json, os, sys
import torch
from vllm import LLM, SamplingParams

options = json.loads(sys.argv[2])
llm = LLM(model=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=512, max_num_seqs=64,
          max_num_batched_tokens=1024, gpu_memory_utilization=0.3, kv_cache_memory_bytes=1 << 30, **options)
params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": [7 + i, 11, 13 + i]} for i in range(40)] + [{"prompt_token_ids": list(range(5, 400))}]
outputs = llm.generate(prompts, params, use_tqdm=False)
assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)
from rampwrap.engines import vllm as plugin
rows = [row for _, its in plugin._engines.values() for s in its.every for row in s.telemetry()]
print("FOUND", json.dumps({
    "engines": plugin.engines(),
    "names": sorted({row.layer for row in rows}),
    "on_device": sum(row.steps for row in rows if row.on_device),
    "on_host": sum(row.steps for row in rows if not row.on_device),
    "modes": sorted({row.mode for row in rows}),
}))
"""
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "vocab_size": 1024,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "norm_topk_prob": False,
}


BLOCK_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
}


CHANNEL_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
}


def run_engine(tmp_path, plans, shape=SHAPE, options=None, kernel="triton_fused_moe", **environment):
    """Starts vLLM as a user would, the plugin found by its entry point; what it said and found."""
    model, site = tmp_path / "model", tmp_path / "site" / "rampwrap-0.dist-info"
    model.mkdir()
    site.mkdir(parents=True)
    static = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": CHANNEL_FP8["ignore"]}
    stored = {"quantization_config": {"channel": CHANNEL_FP8, "static": static}.get(shape.scales, BLOCK_FP8)}
    (model / "config.json").write_text(json.dumps(CONFIG | (stored if shape.dtype == "fp8" else {})))
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: rampwrap\nVersion: 0\n")
    (site / "entry_points.txt").write_text("[vllm.general_plugins]\nrampwrap = rampwrap.engines.vllm:register\n")
    (tmp_path / "plans").mkdir()
    if plans:
        synthetic_plan(shape, kernel).save(tmp_path / "plans" / "x.plan.json")
    path = os.pathsep.join([str(ROOT), str(site.parent), os.environ.get("PYTHONPATH", "")])
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
    more |= {"VLLM_USE_DEEP_GEMM": "0"}  # which would compile dense FP8 layers with nvcc
    more |= {"HF_HUB_OFFLINE": "1", places.PLANS: str(tmp_path / "plans"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(model), json.dumps(options or {})],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | more | environment,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    (found,) = [json.loads(line.removeprefix("FOUND ")) for line in text.splitlines() if line.startswith("FOUND ")]
    return found, text


@pytest.mark.parametrize("mode", ["default", "piecewise", "eager"])
def test_engine(tmp_path, mode):
    """Both layers are served, under their names in the model, by choices made on the GPU, in every graph mode."""
    options = {"default": {}, "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}}
    found, text = run_engine(tmp_path, True, options=options.get(mode, {"enforce_eager": True}))
    (engine,) = found["engines"]
    assert engine["layers"] == 2 and engine["seconds"] < 60
    assert [name.split(".")[2] for name in found["names"]] == ["0", "1"]
    # 23 decode steps of 41 requests are replays that only the GPU's own counters see.
    assert found["on_device"] >= 2 * 23
    assert "leaves" not in "".join(line for line in text.splitlines() if "rampwrap" in line)


@pytest.mark.parametrize("mode", ["default", "piecewise", "eager"])
def test_engine_with_the_cute_kernels(tmp_path, mode):
    """An FP8 model from vLLM's own loader: both layers run the CuTe kernels in every mode, and vLLM's run nowhere."""
    shape = attrs.evolve(SHAPE, dtype="fp8")
    need_cute(shape)
    options = {"default": {}, "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}}
    options = options.get(mode, {"enforce_eager": True})
    found, text = run_engine(tmp_path, True, shape=shape, options=options, kernel="cute_moe")
    (engine,) = found["engines"]
    assert engine["layers"] == 2 and engine["kernels"] == ["cute_moe"] and engine["seconds"] < 60
    assert [name.split(".")[2] for name in found["names"]] == ["0", "1"]
    assert found["modes"] == (["lagged"] if mode == "eager" else ["single"]) and found["on_host"] > 0
    said = [line for line in text.splitlines() if "rampwrap" in line]
    assert not [line for line in said if "leaves" in line or "passes over" in line]


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_engine_with_scales_by_channel(tmp_path, backend):
    """From vLLM's own loader: served where vLLM is asked for Triton, and where it takes its CUTLASS."""
    shape = attrs.evolve(SHAPE, dtype="fp8", scales="channel")
    found, text = run_engine(tmp_path, True, shape=shape, options={"moe_backend": backend})
    assert sum(engine["layers"] for engine in found["engines"]) == 2
    assert "--moe-backend triton" not in text


def test_engine_with_static_activations(tmp_path):
    """From vLLM's own loader, where it is asked for Triton: FlashInfer's CUTLASS would be its choice."""
    shape = attrs.evolve(SHAPE, dtype="fp8", scales="static")
    found, _ = run_engine(tmp_path, True, shape=shape, options={"moe_backend": "triton"})
    assert sum(engine["layers"] for engine in found["engines"]) == 2


@pytest.mark.parametrize("name", ["triton_fused_moe", "cute_moe"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_engine_without_a_plan(tmp_path, dtype, name):
    """A kernel's defaults serve both layers, in graphs, with one line that holds the command; Triton's where no CuTe kernels are."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    environment = {places.OWN_PLANS: "1"}
    if name == "cute_moe":
        kernel = need_cute(shape)
        if kernel.must_compile(default_configs(kernel)):
            pytest.skip("these defaults serve where 'rampwrap build-kernels' ran")
    else:
        environment["RAMPWRAP_CUTE_LIBRARY"] = str(tmp_path / "nowhere")
    found, text = run_engine(tmp_path, False, shape=shape, **environment)
    (engine,) = found["engines"]
    assert (engine["layers"], engine["plans"], engine["defaults"]) == (2, [], [str(shape)])
    assert engine["kernels"] == [name] and found["modes"] == ["single"] and found["on_host"] > 0
    said = [line for line in text.splitlines() if "rampwrap" in line]
    assert sum(f"default configs of {name}" in line for line in said) == 1
    assert not any("rampwrap leaves" in line for line in said)


@pytest.mark.parametrize("case", ["no plan", "kill switch", "batch invariant"])
def test_engine_without_us(tmp_path, case):
    """vLLM as it was; without a plan one warning that holds the command."""
    environments = {"kill switch": {places.DISABLE: "1"}, "batch invariant": {"VLLM_BATCH_INVARIANT": "1"}}
    environment = environments.get(case, {PLANS_ONLY: "1"})
    found, text = run_engine(tmp_path, case != "no plan", options={"enforce_eager": True}, **environment)
    assert not any(engine["layers"] for engine in found["engines"])
    said = [line for line in text.splitlines() if "make a plan" in line]
    assert len(said) == (case == "no plan")
    if said:
        assert f"rampwrap profile --engine vllm --model {tmp_path / 'model'}" in said[0]


@pytest.mark.parametrize("parallel", ["tensor", "expert", "refined scales"])
def test_engine_on_two_gpus(tmp_path, monkeypatch, parallel):
    """Each rank has the plan of its slice, or of its experts; a slice of 64 has blocks of 64 (vLLM 0.29 and later)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    experts = parallel == "expert"
    shape = attrs.evolve(SHAPE, num_local_experts=8) if experts else attrs.evolve(SHAPE, intermediate_size=128)
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": experts}
    if parallel == "refined scales":
        monkeypatch.setitem(CONFIG, "intermediate_size", 128)
        shape = attrs.evolve(SHAPE, intermediate_size=64, dtype="fp8", scales="block-64")
    _, text = run_engine(tmp_path, True, shape=shape, options=options)
    assert text.count("rampwrap chooses configs of triton_fused_moe") == 2
