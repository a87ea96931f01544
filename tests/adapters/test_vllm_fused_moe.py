"""The vLLM adapter against a stand-in for vLLM that records which config was in force; the real one is in tests/gpu."""

# vLLM's own names of parameters.
# ruff: noqa: N803

import contextlib
import importlib.machinery
import json
import sys
import threading
import types

import pytest

torch = pytest.importorskip("torch")

from rampwrap.adapters import vllm_fused_moe as adapter
from rampwrap.adapters.vllm_fused_moe import CONFIGS, KEYS, VllmFusedMoE, config_file, config_file_name, refusal
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.activation import Activation
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.operands import Operands
from rampwrap.policy.policies import Pinned
from rampwrap.policy.static import StaticTable, engine_table, read_static, write_static

SHAPE = MoEShape(64, 8, 2048, 1024)
FP8 = MoEShape(256, 8, 7168, 256, "fp8")
BATCH_INVARIANT = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}


def config(*row):
    return dict(zip(KEYS, row, strict=True))


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """A package of vLLM's names: a global config, a lookup that asks `get_config`, a layer that asks the lookup."""
    root, package = types.ModuleType("vllm"), types.ModuleType(adapter.PACKAGE)
    impl, quant, envs = (types.ModuleType(name) for name in ("fused_moe", "config", "envs"))
    (tmp_path / "vllm" / "model_executor/layers/fused_moe/configs").mkdir(parents=True)
    root.__spec__ = importlib.machinery.ModuleSpec("vllm", None, is_package=True)
    root.__spec__.submodule_search_locations.append(str(tmp_path / "vllm"))
    root.folder = tmp_path / "vllm/model_executor/layers/fused_moe/configs"
    envs.VLLM_BATCH_INVARIANT = False
    package._config = None
    package.get_config = lambda: package._config
    package.inside = lambda config: None

    @contextlib.contextmanager
    def override_config(new):
        old, package._config = package._config, new
        yield
        package._config = old

    def try_get_optimal_moe_config(w13, w2, top_k, dtype, num_tokens, block_shape=None):
        if found := package.get_config():
            return found
        if envs.VLLM_BATCH_INVARIANT:
            return BATCH_INVARIANT
        impl.lookups.append((w13, w2, top_k, dtype, block_shape))
        return config(16 if num_tokens <= 64 else 64, 64, 128, 1, 4, 3) | {"SPLIT_K": 1}

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, quant_config=None, **options):
        used = impl.try_get_optimal_moe_config(w1, w2, 8, None, len(topk_ids))
        package.inside(used)
        root.calls.append((used, quant_config, options))
        root.routing = topk_weights, topk_ids
        return hidden_states + 1

    package.override_config, package.fused_experts = override_config, fused_experts
    impl.try_get_optimal_moe_config, impl.lookups = try_get_optimal_moe_config, []
    quant.fp8_w8a8_moe_quant_config = lambda w1, w2, block_shape=None, **its: ("quant", w1, w2, block_shape, *its)
    root.package, root.impl, root.envs, root.calls = package, impl, envs, []
    for name, module in [
        ("vllm", root),
        ("vllm.envs", envs),
        ("vllm.model_executor", types.ModuleType("vllm.model_executor")),
        ("vllm.model_executor.layers", types.ModuleType("vllm.model_executor.layers")),
        (adapter.PACKAGE, package),
        (f"{adapter.PACKAGE}.fused_moe", impl),
        (f"{adapter.PACKAGE}.config", quant),
    ]:
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: "0.26.0")
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    return root


def arguments(num_tokens=3, shape=SHAPE):
    ids = torch.zeros(num_tokens, shape.top_k, dtype=torch.int32)
    return torch.zeros(num_tokens, 4), "w13", "w2", torch.ones(ids.shape), ids


def test_launch_injects_and_restores(vllm):
    """The config is in force inside the call and nowhere else; what a user has overridden stays."""
    kernel = VllmFusedMoE(SHAPE)
    assert isinstance(kernel, Kernel) and kernel.version == "0.26.0"
    kernel.launch(kernel.configs[5], *arguments())
    assert vllm.calls[-1][0] == kernel.configs[5]
    assert vllm.package.get_config() is None
    with vllm.package.override_config({"mine": 1}):
        kernel.launch(kernel.configs[7], *arguments())
        assert vllm.calls[-1][0] == kernel.configs[7]
        assert vllm.package.get_config() == {"mine": 1}
    assert vllm.package.get_config() is None


def test_restored_after_an_exception(vllm):
    """Also when launches are nested: each puts back what it found."""
    kernel = VllmFusedMoE(SHAPE)

    def fail(used):
        raise RuntimeError("out of memory")

    def nested(used):
        if used == kernel.configs[1]:
            with contextlib.suppress(RuntimeError):
                kernel.launch(kernel.configs[2], *arguments())
            assert vllm.package.get_config() == kernel.configs[1]
        else:
            fail(used)

    vllm.package.inside = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        kernel.launch(kernel.configs[0], *arguments())
    assert vllm.package.get_config() is None
    vllm.package.inside = nested
    kernel.launch(kernel.configs[1], *arguments())
    assert vllm.package.get_config() is None


def test_threads_do_not_see_each_other(vllm):
    """Two launches at the same moment run with their own configs, and a third thread with none."""
    kernel = VllmFusedMoE(SHAPE)
    together, seen = threading.Barrier(3, timeout=20), {}

    def inside(used):
        together.wait()  # all are inside now
        seen[threading.get_ident()] = vllm.package.get_config()
        together.wait()

    vllm.package.inside = inside
    used = kernel.configs[:2]
    threads = [threading.Thread(target=kernel.launch, args=(c, *arguments())) for c in used]
    for thread in threads:
        thread.start()
    together.wait()
    assert vllm.package.get_config() is None
    together.wait()
    for thread in threads:
        thread.join()
    assert [seen[thread.ident] for thread in threads] == list(used)


def test_listens_once(vllm):
    """A second adapter does not wrap vLLM's function again."""
    VllmFusedMoE(SHAPE)
    wrapped = vllm.package.get_config
    VllmFusedMoE(FP8)
    assert vllm.package.get_config is wrapped


def test_a_vllm_that_does_not_ask_is_refused(vllm):
    """The adapter finds out before it times one config under many names."""
    vllm.impl.try_get_optimal_moe_config = lambda *args, **kwargs: config(16, 64, 128, 1, 4, 3)
    with pytest.raises(InputError, match=r"vLLM 0.26.0 does not take its config from get_config\(\)"):
        VllmFusedMoE(SHAPE)


def test_absent_vllm(monkeypatch):
    """One sentence."""
    monkeypatch.setitem(sys.modules, adapter.PACKAGE, None)
    with pytest.raises(InputError, match=r"^vLLM cannot be imported .*; install vllm 0\.26 or later\.$"):
        VllmFusedMoE(SHAPE)


def test_batch_invariant(vllm):
    """vLLM pins a config: the list is that one, others are refused, and nothing is injected."""
    free = VllmFusedMoE(SHAPE)
    vllm.envs.VLLM_BATCH_INVARIANT = True
    with pytest.raises(ConfigError, match="VLLM_BATCH_INVARIANT pins BLOCK_SIZE_M=64 BLOCK_SIZE_N=64"):
        free.launch(free.configs[0], *arguments())
    kernel = VllmFusedMoE(SHAPE)
    assert list(kernel.configs) == [config(64, 64, 32, 8, 4, 3)]
    assert "unset it" in kernel.supports(config(16, 64, 128, 1, 4, 3), SHAPE)
    kernel.launch(kernel.configs[0], *arguments())
    assert vllm.calls[-1][0] is BATCH_INVARIANT
    assert engine_table(kernel).index(100) == 0
    assert kernel.grid(kernel.configs[0], SHAPE).block_m == 64
    dispatcher = Dispatcher(kernel)
    dispatcher(*arguments())
    assert len(vllm.calls) == 2


def test_dispatches(vllm):
    """Behind a Dispatcher: the pinned config reaches vLLM."""
    kernel = VllmFusedMoE(SHAPE)
    dispatcher = Dispatcher(kernel, Pinned(kernel.configs, 11))
    dispatcher(*arguments())
    assert vllm.calls[-1][0] == kernel.configs[11]


def test_quantised_layers(vllm):
    """FP8 by block and by tensor: what vLLM is given, what its lookup is asked, what is missing."""
    block, tensor = VllmFusedMoE(FP8), VllmFusedMoE(FP8, per_tensor=True)
    assert vllm.impl.lookups[-1][3:] == ("fp8_w8a8", None)
    assert vllm.impl.lookups[0] == ((256, 512, 7168), (256, 7168, 256), 8, "fp8_w8a8", [128, 128])
    block.launch(block.configs[0], *arguments(), w13_scale=1, w2_scale=2)
    assert vllm.calls[-1][1] == ("quant", 1, 2, [128, 128])
    tensor.launch(tensor.configs[0], *arguments(), w13_scale=1, w2_scale=2)
    assert vllm.calls[-1][1] == ("quant", 1, 2, None)
    tensor.launch(tensor.configs[0], *arguments(), quant_config="own", activation="gelu")
    assert vllm.calls[-1][1:] == ("own", {"activation": "gelu"})
    assert (block.name, block.weight_layout) != (tensor.name, tensor.weight_layout)
    with pytest.raises(InputError, match="FP8 weights come with scales"):
        block.launch(block.configs[0], *arguments())
    with pytest.raises(InputError, match="per_tensor scales were asked for a bf16 layer"):
        VllmFusedMoE(SHAPE, per_tensor=True)
    with pytest.raises(ConfigError, match="hidden_size=2000"):
        VllmFusedMoE(MoEShape(8, 2, 2000, 256, "fp8"))


def inner_parts(impl, launched):
    """The functions that `fused_experts` is made of, on the CPU, with vLLM's own parameter names."""

    def dispatch_fused_moe_kernel(
        A, B, C, A_scale, B_scale, B_zp, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded,
        mul_routed_weight, top_k, config, compute_type, use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16,
        per_channel_quant, block_shape=None, B_bias=None,
    ):  # fmt: skip
        block_m, flat = config["BLOCK_SIZE_M"], C.view(-1, C.shape[-1])
        launched.append((block_m, mul_routed_weight, top_k, compute_type))
        for block in range(int(num_tokens_post_padded) // block_m):
            for slot in sorted_token_ids[block * block_m : (block + 1) * block_m].tolist():
                if slot < len(flat):
                    row = B[int(expert_ids[block])].float() @ A[slot // top_k].float()
                    flat[slot] = row * topk_weights.view(-1)[slot] if mul_routed_weight else row

    def apply_moe_activation(activation, output, input):
        gate, up = input.float().chunk(2, dim=-1)
        output.copy_(torch.nn.functional.silu(gate) * up)

    none = dict.fromkeys(("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "block_shape"))
    none |= dict.fromkeys(("w1_bias", "w2_bias", "ocp_mx_scheme"))
    flags = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_act_token_quant")
    impl.dispatch_fused_moe_kernel, impl.apply_moe_activation = dispatch_fused_moe_kernel, apply_moe_activation
    impl.FUSED_MOE_UNQUANTIZED_CONFIG = types.SimpleNamespace(**none, **dict.fromkeys(flags, False))
    impl.MoEActivation = types.SimpleNamespace(SILU="silu")
    impl._get_config_quant_dtype = lambda use_fp8_w8a8, use_int8_w8a8: None
    impl.moe_kernel_quantize_input = lambda A, A_scale, quant_dtype, per_act_token_quant, block_shape: (A, None)
    impl.mk = types.SimpleNamespace(
        FusedMoEExpertsModular=types.SimpleNamespace(adjust_N_for_activation=lambda n, activation: n // 2)
    )
    impl.ops = types.SimpleNamespace(moe_sum=lambda rows, out: out.copy_(rows.sum(dim=1)))
    impl.tl = types.SimpleNamespace(bfloat16="bf16", float16="fp16", float32="fp32")


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_candidates(vllm, chosen, expert_parallel):
    """Both GEMMs are launched for each candidate, everything else once; the one with rows gives the layer."""
    pytest.importorskip("triton")
    from rampwrap.kernels.triton.align.host import align_tokens

    assert not VllmFusedMoE(SHAPE).chooses_in_graph
    launched = []
    inner_parts(vllm.impl, launched)
    shape = MoEShape(8, 2, 64, 32, num_local_experts=4 if expert_parallel else 8)
    kernel = VllmFusedMoE(shape)
    assert kernel.chooses_in_graph
    generator = torch.Generator().manual_seed(chosen)
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(11)]).int()
    ids[3], ids[4, 1], ids[5] = -1, 8, ids[5, 0]  # padding, and an expert twice
    inputs = kernel.inputs(shape, ids)
    expert_map = None
    if expert_parallel:
        expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1], dtype=torch.int32)
        inputs["expert_map"] = expert_map
    configs = [config(16, 64, 64, 1, 4, 3), config(64, 64, 64, 1, 4, 3), config(32, 128, 64, 1, 4, 3)]
    blocks = [align_tokens(ids, c["BLOCK_SIZE_M"], len(inputs["w13"]), expert_map=expert_map) for c in configs]
    for place, its in enumerate(blocks):
        if place != chosen:
            its.num_tokens_post_padded.zero_()
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is not a number
    try:
        out = kernel.launch_candidates(configs, blocks, torch.tensor([chosen]), **inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    reference = kernel.reference(shape, inputs)
    assert (out.double() - reference).norm() < 0.02 * reference.norm()
    assert launched == [(m, False, 2, "bf16") for m in (16, 64, 32)] + [(m, True, 1, "bf16") for m in (16, 64, 32)]
    launched.clear()
    assert kernel.launch_candidates(configs, blocks, torch.tensor([0]), *arguments(0, shape)).shape == (0, 4)
    with pytest.raises(ConfigError, match="BLOCK_SIZE_M=24"):
        kernel.launch_candidates([config(24, 64, 64, 1, 4, 3)], blocks, torch.tensor([0]), **inputs)
    weight_only = types.SimpleNamespace(**{**vars(vllm.impl.FUSED_MOE_UNQUANTIZED_CONFIG), "use_int4_w4a16": True})
    with pytest.raises(InputError, match="weight-only"):
        kernel.launch_candidates(configs, blocks, torch.tensor([0]), **inputs, quant_config=weight_only)
    assert not launched


def test_expert_parallel_and_empty_batch(vllm):
    """With a map vLLM is told the global number of experts; no tokens, no launch."""
    kernel = VllmFusedMoE(MoEShape(64, 8, 2048, 1024, num_local_experts=32))
    its = torch.where(torch.arange(64) < 32, torch.arange(64), -1).int()
    kernel.launch(kernel.configs[0], *arguments(), expert_map=its)
    assert vllm.calls[-1][2] == {"expert_map": its, "global_num_experts": 64}
    assert kernel.launch(kernel.configs[0], *arguments(0)).shape == (0, 4)
    assert len(vllm.calls) == 1


def test_vllm_never_sees_padding(vllm):
    """Its alignment would read beyond its tables: such a slot goes to an expert in range with weight zero."""
    kernel, (x, w13, w2, weights, ids) = VllmFusedMoE(SHAPE), arguments()
    ids[0], ids[1, 3], ids[2, 7] = -1, 64, 63
    kernel.launch(kernel.configs[0], x, w13, w2, weights, ids)
    seen_weights, seen = vllm.routing
    assert seen.max() == 63 and seen.min() == 0 and not seen_weights[0].any()
    assert seen_weights[1, 3] == 0 and seen_weights[2].all() and int(seen_weights.sum()) == 15


def test_refused_before_launch(vllm):
    """An illegal config never reaches vLLM; one outside the list but legal does."""
    kernel = VllmFusedMoE(SHAPE)
    with pytest.raises(ConfigError, match="BLOCK_SIZE_M=24"):
        kernel.launch(config(24, 64, 64, 1, 4, 3), *arguments())
    with pytest.raises(ConfigError, match="The config has block_m"):
        kernel.launch({"block_m": 16}, *arguments())
    assert not vllm.calls
    other = config(16, 16, 32, 4, 4, 1)
    assert other not in kernel.configs
    kernel.launch(other, *arguments())
    assert vllm.calls[-1][0] == other


def test_static_baseline(vllm, tmp_path, monkeypatch):
    """The folder of the user comes first, then the package; without a file vLLM's rule; exports are found again."""
    kernel = VllmFusedMoE(SHAPE, device_name="NVIDIA H200")
    assert kernel.config_file() is None
    table = engine_table(kernel)
    assert table.source == "default" and kernel.configs[table.index(64)]["BLOCK_SIZE_M"] == 16
    name = config_file_name(SHAPE, "NVIDIA H200")
    shipped = config(32, 16, 64, 4, 4, 2)  # not in the list: a tuned file's configs join it
    (vllm.folder / name).write_text(json.dumps({"triton_version": "3.6", "64": shipped}))
    assert kernel.config_file() == vllm.folder / name
    kernel = VllmFusedMoE(SHAPE, device_name="NVIDIA H200")
    assert kernel.configs[engine_table(kernel).index(1)] == shipped
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert kernel.config_file() == vllm.folder / name
    path = tmp_path / name
    path.write_text(write_static(StaticTable("uniform", (1, 256), (3, 40)), kernel.configs))
    assert kernel.tuned_file() == path
    assert set(json.loads(path.read_text())["256"]) == set(KEYS)
    assert read_static(path, kernel.configs).indices == (3, 40)


def test_file_names():
    """vLLM's spelling: any H200 is NVIDIA_H200, N is the rank's intermediate size, no spaces in the block shape."""
    assert config_file_name(SHAPE, "NVIDIA H200 NVL") == "E=64,N=1024,device_name=NVIDIA_H200.json"
    assert (
        config_file_name(FP8, "NVIDIA H100 80GB HBM3")
        == "E=256,N=256,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    assert config_file_name(FP8, "A/B", per_tensor=True) == "E=256,N=256,device_name=A_B,dtype=fp8_w8a8.json"
    local = MoEShape(64, 8, 2048, 1024, num_local_experts=16)
    assert config_file_name(local, "x").startswith("E=16,")
    assert config_file(MoEShape(3, 1, 8, 8), "nowhere") is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_config_list(dtype):
    """At least 60 legal configs, none twice; every one within an SM's shared memory."""
    rows = [tuple(c[key] for key in KEYS) for c in CONFIGS[dtype]]
    assert len(rows) >= 60
    assert rows == sorted(set(rows))
    assert all(refusal(c, dtype) is None for c in CONFIGS[dtype])


@pytest.mark.parametrize(
    ("row", "dtype", "message"),
    [
        ((128, 256, 64, 1, 8, 8), "bf16", "shared memory"),
        ((256, 256, 64, 1, 4, 2), "bf16", "registers"),
        ((8, 64, 64, 1, 4, 3), "bf16", "BLOCK_SIZE_M=8 is known to run in FP8 only"),
        ((16, 64, 16, 1, 4, 3), "fp8", "BLOCK_SIZE_K=16"),
        ((16, 64, 64, 0, 4, 3), "bf16", "GROUP_SIZE_M=0"),
        ((16, 64, 64, 1, 3, 3), "bf16", "num_warps=3"),
        ((16, 64, 64, 1, 4, 0), "bf16", "num_stages=0"),
    ],
)
def test_illegal_configs(row, dtype, message):
    """The legality function says what is wrong."""
    assert message in refusal(config(*row), dtype)


def test_grid(vllm):
    """One config for both GEMMs: 2I / BN and H / BN CTAs for each M block."""
    grid = VllmFusedMoE(SHAPE).grid(config(16, 64, 128, 1, 4, 3), SHAPE)
    assert (grid.block_m, grid.launches, grid.ctas_per_block) == (16, (32, 32), 64)
    assert 1 <= grid.ctas_per_sm <= 16
    deep = VllmFusedMoE(FP8)
    assert deep.grid(config(16, 128, 256, 1, 4, 3), FP8) == deep.grid(config(16, 128, 128, 1, 4, 3), FP8)


def test_other_forms_of_scales(vllm):
    """What vLLM refined for tensor parallelism, and scales by channel; another activation than SiLU it does not get."""
    half = MoEShape(8, 2, 128, 192, "fp8", scales="block-64")
    kernel = VllmFusedMoE(half)
    assert config_file_name(half, "x").endswith("dtype=fp8_w8a8,block_shape=[64,64].json")
    assert kernel._cut({"BLOCK_SIZE_K": 128}) == {"BLOCK_SIZE_K": 64} and vllm.impl.lookups[-1][-1] == [64, 64]
    scales = {name: torch.ones(1) for name in ("w13_scale", "w2_scale")}
    x = torch.zeros(1, 128)
    operands = Operands(x, x, x, x, x, **scales)
    assert kernel._quantised(None, operands)[3:] == ([64, 64],)
    channel = VllmFusedMoE(MoEShape(8, 2, 96, 80, "fp8", scales="channel"))
    assert channel._quantised(None, operands)[3:] == (None, "per_act_token_quant", "per_out_ch_quant")
    assert config_file_name(channel.shape, "x").endswith("dtype=fp8_w8a8.json")
    with pytest.raises(InputError, match="pass per_tensor=True"):
        VllmFusedMoE(MoEShape(8, 2, 128, 128, "fp8", scales="tensor"))
    with pytest.raises(ConfigError, match="vllm_fused_moe has no silu:limit=7"):
        VllmFusedMoE(MoEShape(8, 2, 128, 128, activation=Activation(limit=7.0)))


def test_per_tensor_reference():
    """Scales [E] spread over their expert; close to the same layer by block with constant scales."""
    pytest.importorskip("triton")
    shape = MoEShape(4, 2, 256, 128, "fp8")
    kernel = VllmFusedMoE.__new__(VllmFusedMoE)
    kernel.shape, kernel.per_tensor = shape, True
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(7)]).int()
    inputs = kernel.inputs(shape, ids)
    assert inputs["w13_scale"].shape == (4,)
    blocks = {
        name: inputs[name][:, None, None].expand(-1, rows, columns)
        for name, rows, columns in (("w13_scale", 2, 2), ("w2_scale", 2, 1))
    }
    by_block = reference.layer(shape, inputs | blocks)
    by_tensor = kernel.reference(shape, inputs)
    assert (by_tensor - by_block).norm() < 0.06 * by_block.norm()


def test_where_vllm_swaps_the_operands():
    """On sm_90 it multiplies W X^T in FP8 for fewer than 64 token rows and at least 64 weight rows."""
    asked = [(32, 64, "fp8"), (64, 64, "fp8"), (32, 32, "fp8"), (32, 128, "fp8"), (32, 64, "bf16")]
    found = [adapter.swaps_ab({"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n}, dtype) for m, n, dtype in asked]
    assert found == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("key", "legal", "illegal"),
    [
        ("BLOCK_SIZE_M", (8, 16, 32, 64, 128), (0, 4, 24, 512)),
        ("BLOCK_SIZE_N", (16, 32, 64, 128), (0, 8, 96, 512)),
        ("BLOCK_SIZE_K", (32, 64, 128), (0, 16, 96, 512)),
        ("num_warps", (4, 8), (0, 2, 5, 16)),
        ("num_stages", (1, 2, 3, 4), (0, 9)),
        ("GROUP_SIZE_M", (1, 2, 64), (0, -1)),
    ],
)
def test_each_parameter_alone(key, legal, illegal):
    plain = config(64, 64, 64, 1, 4, 2)
    for value in legal:
        assert refusal(plain | {key: value}, "fp8") is None
    for value in illegal:
        assert refusal(plain | {key: value}, "fp8").startswith(f"{key}={value} is not supported; use ")
