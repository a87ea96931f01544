"""The vLLM plugin against a stand-in with vLLM's names and signatures; `test_vllm_wheels` has vLLM's own classes.

All on a CPU: our kernel in Triton's interpreter, vLLM's in a plain loop.
"""

import contextlib
import dataclasses
import enum
import inspect
import json
import logging
import math
import os
import pathlib
import sys
import types

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import attrs
import numpy as np

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.engines import vllm as plugin
from rampwrap.engines import vllm_contract, vllm_experts, vllm_layer
from rampwrap.errors import CaptureError
from rampwrap.kernel.activation import SWIGLU_OAI
from rampwrap.kernel.activation import Activation as Ours
from rampwrap.kernel.device import SIMULATED, Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.timings import Timings
from rampwrap.plan import folder as places
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import workload_grid

if not INTERPRETED.value:
    pytest.skip("the stand-in runs on a CPU; tests/gpu has the engine itself", allow_module_level=True)

SHAPE = MoEShape(8, 2, 64, 32)
PACKAGE = "vllm.model_executor.layers.fused_moe"
IMPL = "FusedMoEKernelModularImpl"


class Activation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    OAI = "swigluoai_uninterleave"


@dataclasses.dataclass
class Parallel:
    """Of vLLM's FusedMoEParallelConfig."""

    tp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    tp_rank: int = 0
    ep_rank: int = 0
    dp_rank: int = 0
    use_ep: bool = False


@dataclasses.dataclass
class Config:
    """Of vLLM's FusedMoEConfig."""

    num_experts: int = 8
    experts_per_token: int = 2
    hidden_dim: int = 64
    intermediate_size_per_partition: int = 32
    num_local_experts: int = 8
    activation: Activation = Activation.SILU
    in_dtype: torch.dtype = torch.bfloat16
    max_num_tokens: int = 32
    has_bias: bool = False
    is_lora_enabled: bool = False
    num_logical_experts: int | None = None
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    moe_backend: str = "auto"
    new_setting: float = 0.0
    moe_parallel_config: Parallel = dataclasses.field(default_factory=Parallel)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.moe_parallel_config, name)


@dataclasses.dataclass
class Description:
    """Of vLLM's FusedMoEQuantDesc."""

    dtype: object = None
    shape: object = None
    scale: torch.Tensor | None = None
    zp: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclasses.dataclass(init=False)
class Quant:
    """Of vLLM's FusedMoEQuantConfig."""

    _a1: Description
    _a2: Description
    _w1: Description
    _w2: Description
    gemm1_clamp_limit: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None

    def __init__(self, quant_dtype=None, weight_quant_dtype=None, block_shape=None, by=(False, False), **its):
        for name, dtype in (
            ("a1", quant_dtype),
            ("a2", quant_dtype),
            ("w1", weight_quant_dtype),
            ("w2", weight_quant_dtype),
        ):
            scale, zp, bias = (its.get(f"{name}_{what}") for what in ("scale", "zp", "bias"))
            setattr(self, f"_{name}", Description(dtype, block_shape, scale, zp, bias))
        self.per_act_token_quant, self.per_out_ch_quant = by
        for name in ("clamp_limit", "alpha", "beta"):
            setattr(self, f"gemm1_{name}", its.get(f"gemm1_{name}"))

    quant_dtype = property(lambda self: self._a1.dtype)
    weight_quant_dtype = property(lambda self: self._w1.dtype)
    block_shape = property(lambda self: self._w1.shape)
    a1_scale = property(lambda self: self._a1.scale)
    a2_scale = property(lambda self: self._a2.scale)
    w1_scale = property(lambda self: self._w1.scale)
    w2_scale = property(lambda self: self._w2.scale)
    w1_bias = property(lambda self: self._w1.bias)
    w2_bias = property(lambda self: self._w2.bias)


@dataclasses.dataclass
class ActivationConfig:
    """Of vLLM's ApplyMoEActivationConfig."""

    clamp_limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    situ: float | None = None

    @classmethod
    def of(cls, config, quant):
        """The quantisation's, else the layer's, else these defaults."""
        names = (("clamp_limit", "limit"), ("alpha", "alpha"), ("beta", "beta"))
        both = {name: (getattr(quant, f"gemm1_{name}"), getattr(config, f"swiglu_{of}")) for name, of in names}
        found = {name: next((its for its in pair if its is not None), None) for name, pair in both.items()}
        return cls(**{name: its for name, its in found.items() if its is not None})


class MoEPrepareAndFinalizeNoDPEPModular:
    """Quantises unless it is deferred; copies the result unless it is in place."""

    def prepare(
        self, a1, topk_weights, topk_ids, num_experts, expert_map, weighted, quant_config, defer_input_quant=False
    ):
        its = (a1, None) if defer_input_quant else (a1.to(torch.float8_e4m3fn), torch.ones(1))
        return (*its, None, None, None)


class NaiveDPEP(MoEPrepareAndFinalizeNoDPEPModular):
    pass


def layer_by_hand(x, w1, w2, weights, ids, expert_map=None):
    """The layer in float32, token by token."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(len(x)):
        for k in range(ids.shape[1]):
            expert = int(ids[token, k])
            expert = expert if expert_map is None else int(expert_map[expert])
            if expert >= 0:
                gate, up = (w1[expert].float() @ x[token].float()).chunk(2)
                out[token] += weights[token, k] * (w2[expert].float() @ (torch.nn.functional.silu(gate) * up))
    return out


class StandIn:
    """vLLM 0.26 as far as the plugin sees it; `calls` records what its own launch served."""

    def __init__(self, monkeypatch):
        self.calls = []
        calls = self.calls

        class TritonExperts:
            _lora_context = None
            post_gemm2_hook = None
            quantization_emulation = False
            expects_unquantized_inputs = False

            def __init__(self, moe_config, quant_config):
                self.moe_config, self.quant_config = moe_config, quant_config
                self.activation_config = ActivationConfig.of(moe_config, quant_config)

            @staticmethod
            def moe_problem_size(a1, w1, w2, topk_ids):
                return len(w1), len(a1), w1.shape[1], a1.shape[1], topk_ids.shape[1]

            def output_hidden_dim(self, hidden_dim):
                return hidden_dim

            def finalize_weight_and_reduce_impl(self):
                return None

        class FlashInferExperts(TritonExperts):
            pass

        class FusedMoEKernelModularImpl:
            def __init__(self, prepare_finalize, fused_experts):
                self.prepare_finalize, self.fused_experts = prepare_finalize, fused_experts

            def _allocate_buffers(self, out_dtype, **its):
                # Far more than vLLM's, which is the larger only at real sizes: ours begins with 128 rows an expert.
                shape = (64 * its["M_full"], its["top_k"], max(its["N"], its["K"]))
                manager = sys.modules["vllm.v1.worker.workspace"].current_workspace_manager()
                manager.get_simultaneous((shape, out_dtype), (shape, out_dtype))

            def _fused_experts(
                self,
                in_dtype,
                a1q,
                a1q_scale,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                global_num_experts,
                local_num_experts,
                expert_map,
                apply_router_weight_on_input,
                expert_tokens_meta,
                output_alias=None,
            ):
                self._allocate_buffers(
                    out_dtype=in_dtype,
                    device=a1q.device,
                    M_chunk=len(a1q),
                    M_full=len(a1q),
                    N=w1.shape[1],
                    K=a1q.shape[1],
                    top_k=topk_ids.shape[1],
                    global_num_experts=global_num_experts,
                    local_num_experts=local_num_experts,
                    expert_tokens_meta=expert_tokens_meta,
                    activation=activation,
                )
                calls.append(len(topk_ids))
                return layer_by_hand(a1q, w1, w2, topk_weights, topk_ids, expert_map).to(in_dtype)

            def apply(self, hidden_states, w1, w2, topk_ids, topk_weights, expert_map=None, weighted=False):
                output = torch.empty_like(hidden_states)
                quantised = self.fused_experts.quant_config.quant_dtype is not None
                defer = self.fused_experts.expects_unquantized_inputs or not quantised
                a1q, scale, *_ = self.prepare_finalize.prepare(
                    *(hidden_states, topk_weights, topk_ids, 8, expert_map, weighted, self.fused_experts.quant_config),
                    defer_input_quant=defer,
                )
                found = self._fused_experts(
                    in_dtype=hidden_states.dtype,
                    a1q=a1q,
                    a1q_scale=scale,
                    w1=w1,
                    w2=w2,
                    topk_weights=topk_weights,
                    topk_ids=topk_ids,
                    activation=self.fused_experts.moe_config.activation,
                    global_num_experts=8,
                    local_num_experts=len(w1),
                    expert_map=expert_map,
                    apply_router_weight_on_input=weighted,
                    expert_tokens_meta=None,
                    output_alias=output,
                )
                self.in_place = found is output
                return output if found is output else output.copy_(found)

        class FusedMoEKernel:
            def __init__(self, prepare_finalize, fused_experts):
                self.impl = FusedMoEKernelModularImpl(prepare_finalize, fused_experts)

        class Manager:
            asked, most, locked = (), 0, False

            def get_simultaneous(self, *specs):
                self.asked = specs
                wanted = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
                assert wanted <= self.most or not self.locked, "Workspace is locked"
                self.most = max(self.most, wanted)
                return [torch.full(shape, 7, dtype=torch.uint8).to(dtype) for shape, dtype in specs]

        self.manager = Manager()
        self.config = self.new_config()
        self.envs = self.module(monkeypatch, "vllm.envs", VLLM_BATCH_INVARIANT=False)
        self.root = self.module(monkeypatch, "vllm", __version__="0.26.0", __path__=["/site/vllm"])
        self.faults = []
        monkeypatch.setattr(plugin.vllm_contract, "faults", lambda root: list(self.faults))
        self.module(monkeypatch, "vllm.config", get_current_vllm_config_or_none=lambda: self.config)
        for name in ("vllm.model_executor", "vllm.model_executor.layers", PACKAGE, f"{PACKAGE}.experts", "vllm.v1"):
            self.module(monkeypatch, name)
        self.module(monkeypatch, "vllm.v1.worker")
        self.module(
            monkeypatch,
            "vllm.v1.worker.workspace",
            is_workspace_manager_initialized=lambda: True,
            current_workspace_manager=lambda: self.manager,
        )
        self.layers = {}
        context = types.SimpleNamespace(no_compile_layers=self.layers)
        self.module(
            monkeypatch,
            "vllm.forward_context",
            is_forward_context_available=lambda: bool(self.layers),
            get_forward_context=lambda: context,
        )
        self.module(monkeypatch, f"{PACKAGE}.experts.triton_moe", TritonExperts=TritonExperts)
        self.mk = self.module(
            monkeypatch,
            f"{PACKAGE}.modular_kernel",
            FusedMoEKernel=FusedMoEKernel,
            FusedMoEKernelModularImpl=FusedMoEKernelModularImpl,
        )
        self.experts, self.other = TritonExperts, FlashInferExperts

    @staticmethod
    def module(monkeypatch, name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    @staticmethod
    def new_config(cudagraphs="FULL_AND_PIECEWISE", dbo=False):
        class VllmConfig:
            model_config = types.SimpleNamespace(model="/models/tiny")
            compilation_config = types.SimpleNamespace(cudagraph_mode=types.SimpleNamespace(name=cudagraphs))
            parallel_config = types.SimpleNamespace(enable_dbo=dbo, use_ubatching=dbo)

        return VllmConfig()

    def kernel(self, config=None, quant=None, experts=None, prepare=MoEPrepareAndFinalizeNoDPEPModular, name=None):
        """A layer's kernel, as loading its weights makes it."""
        made = self.mk.FusedMoEKernel(prepare(), (experts or self.experts)(config or Config(), quant or Quant()))
        if name:
            method = types.SimpleNamespace(moe_kernel=made)
            self.layers[name] = types.SimpleNamespace(routed_experts=types.SimpleNamespace(quant_method=method))
        return made


def timings_of(shape, kernel_name="triton_fused_moe", device=SIMULATED):
    """A table by which few active experts favour another config than many do."""
    kernel = TritonFusedMoE(shape)
    configs = tuple(c for c in kernel.configs if c["block_m"] == 16 and not c.get("swap_ab"))[:2]
    tokens = [1, 4, 8, 16, 32]
    rows = workload_grid(tokens, [plugin_routing(n) for n in ("uniform", "dirichlet:0.3", "dirichlet:0.1", "hot:1")])
    counts = np.stack([expert_counts(row.topk_ids(shape.num_experts, shape.top_k), shape.num_experts) for row in rows])
    counts = counts[:, : shape.num_local_experts]
    active = (counts > 0).sum(axis=1).astype(float)
    us = np.stack([460 + 0.5 * active, 60 + 60 * active], axis=1)
    return Timings(
        us=us,
        counts=counts,
        split=("train",) * len(rows),
        label=tuple(row.label for row in rows),
        kernel=kernel_name,
        kernel_version=kernel.version,
        device=device,
        shape=shape,
        configs=configs,
        grids=tuple(kernel.grid(config, shape) for config in configs),
    )


def plugin_routing(name):
    from rampwrap.routing.workloads import Routing

    return Routing.parse(name)


@pytest.fixture(scope="module")
def plan():
    return make_plan(timings_of(SHAPE))


@pytest.fixture
def world(monkeypatch, tmp_path, plan):
    """The stand-in, a folder with one plan, and a plugin that knows of nothing yet."""
    monkeypatch.delenv(places.DISABLE, raising=False)
    monkeypatch.delenv(plugin.SAID, raising=False)
    monkeypatch.setenv(places.PLANS, str(tmp_path / "plans"))
    monkeypatch.setattr(plugin, "_engines", {})
    monkeypatch.setattr(plugin, "_warn", places.OneWarning(plugin.logger))
    monkeypatch.setattr(plugin.logger, "propagate", True)
    (tmp_path / "plans").mkdir()
    plan.save(tmp_path / "plans" / "tiny.plan.json")
    stand_in = StandIn(monkeypatch)
    stand_in.folder = tmp_path / "plans"
    return stand_in


def inputs(num_tokens=12, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_tokens, shape.num_experts)), axis=1)[:, : shape.top_k]
    random = {"generator": generator, "dtype": torch.float32}
    local, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    return {
        "hidden_states": torch.randn(num_tokens, hidden, **random).bfloat16(),
        "w1": (torch.randn(local, 2 * inter, hidden, **random) / 8).bfloat16(),
        "w2": (torch.randn(local, hidden, inter, **random) / 6).bfloat16(),
        "topk_weights": torch.rand(num_tokens, shape.top_k, **random),
        "topk_ids": torch.from_numpy(ids).int(),
    }


def near(out, its, **more):
    want = layer_by_hand(*(its[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")), **more)
    return float((out.float() - want).norm() / want.norm()) < 1e-2


def messages(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_a_layer_with_a_plan_runs_our_kernel(world):
    """Into the caller's own output, in vLLM's memory, under the layer's name, and counted."""
    plugin.register()
    kernel = world.kernel(name="model.layers.3.mlp.experts")
    its = inputs()
    assert near(kernel.impl.apply(**its), its)
    assert kernel.impl.in_place and world.calls == []
    assert world.manager.asked[0][0] == (8 * 128, SHAPE.intermediate_size), "h in blocks of 128 rows, one an expert"
    graph_dispatcher = kernel.impl._fused_experts.graph_dispatcher
    assert {row.layer for row in graph_dispatcher.telemetry()} == {"model.layers.3.mlp.experts"}
    (engine,) = plugin.engines()
    assert engine["layers"] == 1 and engine["plans"] == [str(world.folder / "tiny.plan.json")]


def test_the_choice_follows_the_routing_and_is_made_on_the_device(world, plan):
    """One kernel, two routings, two configs, each with the bits of the config launched alone."""
    plugin.register()
    kernel = world.kernel(name="layer")
    seen = {}
    for ids in ([[0, 1]] * 8, [[i, (i + 1) % 8] for i in range(8)]):
        its = inputs(8) | {"topk_ids": torch.tensor(ids, dtype=torch.int32)}
        out = kernel.impl.apply(**its)
        chosen = plan.policy().index(expert_counts(its["topk_ids"], 8), 8)
        renamed = {"w13" if k == "w1" else k: v for k, v in its.items()}
        assert torch.equal(out, TritonFusedMoE(SHAPE).launch(plan.configs[chosen], **renamed))
        seen[chosen] = out
    assert len(seen) == 2
    (row,) = kernel.impl._fused_experts.graph_dispatcher.telemetry()
    assert row.on_device and sorted(row.counts.values()) == [1, 1]


def test_all_layers_of_an_engine_share_a_graph_dispatcher(world):
    plugin.register()
    layers = [world.kernel(name=f"layer {i}") for i in range(3)]
    for layer in layers:
        layer.impl.apply(**inputs())
    assert len({id(layer.impl._fused_experts.graph_dispatcher) for layer in layers}) == 1
    assert len(layers[0].impl._fused_experts.graph_dispatcher.telemetry()) == 3


def test_two_engines_and_a_restarted_worker(world):
    """Each engine has plans and memory of its own; the plans are those of its start; a dead engine leaves nothing."""
    plugin.register()
    first = world.kernel()
    (world.folder / "tiny.plan.json").unlink()
    assert hasattr(world.kernel().impl._fused_experts, "graph_dispatcher"), "a plan is read at the engine's start only"
    config, world.config = world.config, world.new_config()
    assert not hasattr(world.kernel().impl._fused_experts, "graph_dispatcher"), "the second engine finds no plan"
    assert first.impl._fused_experts.graph_dispatcher is not None and len(plugin.engines()) == 2
    del config
    import gc

    gc.collect()
    assert len(plugin.engines()) == 1
    plugin.register()
    its = inputs()
    assert near(first.impl.apply(**its), its) and world.calls == []


def test_plans_of_several_gpus_in_one_folder(world, plan, caplog):
    """Each GPU finds its own by what the file says, whatever it is called; the others are worth no word."""
    (world.folder / "tiny.plan.json").rename(world.folder / "zzz.plan.json")
    for name, sms in (("NVIDIA H100", 132), ("NVIDIA B200", 148), (SIMULATED.name, 66)):
        device = attrs.evolve(SIMULATED, name=name, num_sms=sms)
        geometry = attrs.evolve(plan.model.geometry, num_sms=sms)
        model = attrs.evolve(plan.model, geometry=geometry)
        attrs.evolve(plan, device=device, model=model).save(world.folder / f"{name} {sms}.plan.json")
    plugin.register()
    its = inputs()
    kernel = world.kernel()
    assert near(kernel.impl.apply(**its), its) and world.calls == []
    (engine,) = plugin.engines()
    assert [pathlib.Path(path).name for path in engine["plans"]] == ["zzz.plan.json"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_installed_once(world):
    plugin.register()
    made = world.mk.FusedMoEKernel.__init__
    plugin.register()
    assert world.mk.FusedMoEKernel.__init__ is made
    kernel = world.kernel()
    assert isinstance(kernel.impl._fused_experts, plugin.Experts)
    assert not isinstance(kernel.impl._fused_experts._own, plugin.Experts)


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_kill_switch(world, monkeypatch, value):
    """Before the start nothing is touched, and a later engine in the same process is left alone."""
    made = world.mk.FusedMoEKernel.__init__
    with monkeypatch.context() as off:
        off.setenv(places.DISABLE, value)
        plugin.register()
        assert world.mk.FusedMoEKernel.__init__ is made
    plugin.register()
    monkeypatch.setenv(places.DISABLE, value)
    assert "_fused_experts" not in vars(world.kernel().impl)
    monkeypatch.setenv(places.DISABLE, "0")
    assert "_fused_experts" in vars(world.kernel().impl)


def test_batch_invariance_is_honoured(world):
    plugin.register()
    world.envs.VLLM_BATCH_INVARIANT = True
    assert "_fused_experts" not in vars(world.kernel().impl)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": attrs.evolve(SIMULATED, name="NVIDIA H100")}, "GPU NVIDIA H100"),
        ({"shape": attrs.evolve(SHAPE, top_k=4)}, "shape E=8 top_k=4"),
        ({"shape": attrs.evolve(SHAPE, dtype="fp16")}, "dtype fp16"),
        ({"kernel_version": "0"}, "kernel version 0"),
        ({"kernel": "alpha_moe"}, "kernel alpha_moe"),
        (None, "no plan in"),
        ("{", "not a readable plan"),
    ],
)
def test_a_missing_or_foreign_plan(world, caplog, plan, change, says):
    """vLLM stays as it is, with one warning for all layers, which holds the reason and the command."""
    path = world.folder / "tiny.plan.json"
    path.unlink()
    if isinstance(change, dict):
        attrs.evolve(plan, **change).save(path)
    elif change is not None:
        path.write_text(change)
    plugin.register()
    for rank in (0, 1):
        parallel = Parallel(tp_size=2, tp_rank=rank)
        for _ in range(3):
            kernel = world.kernel(Config(moe_parallel_config=parallel))
            assert "_fused_experts" not in vars(kernel.impl)
            kernel.impl.apply(**inputs())
    said = [text for text in messages(caplog) if "make a plan" in text]
    assert len(said) == 1 and len(world.calls) == 6
    assert says in said[0]
    # /models/tiny is not here: the command names the layer itself.
    sizes = "--num-experts 8 --top-k 2 --hidden-size 64 --intermediate-size 32 --dtype bf16"
    assert f"'rampwrap profile --engine vllm {sizes} --out {world.folder}'" in said[0]


TINY = {"hidden_act": "silu", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "dtype": "bfloat16"}
TINY |= {"num_experts_per_tok": 2}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@attrs.define
class Served:
    """How vLLM serves the tiny model: its layers' configs, and what the command must name."""

    layers: list
    names: str
    model: dict = attrs.Factory(dict)
    quant: object = None


def ep(ranks, **sizes):
    return Config(moe_parallel_config=Parallel(ep_size=ranks, use_ep=True), **sizes)


SERVED = {
    "as it is": Served([Config()], "--model"),
    "slices": Served(
        [Config(intermediate_size_per_partition=16, moe_parallel_config=Parallel(tp_size=2))], "--tp-size 2"
    ),
    "whole experts": Served([ep(2, num_local_experts=4)], "--tp-size 2 --ep"),
    "uneven experts": Served([ep(3, num_local_experts=n) for n in (3, 2)], "--tp-size 3 --ep"),
    "redundant experts": Served(
        [ep(4, num_experts=12, num_local_experts=3, num_logical_experts=8)], "--ep --num-redundant-experts 4"
    ),
    "another dtype than its own": Served([Config(in_dtype=torch.float16)], "--dtype fp16"),
    "in FP8": Served(
        [Config(hidden_dim=128, intermediate_size_per_partition=128)],
        "--model",
        {"hidden_size": 128, "moe_intermediate_size": 128, "quantization_config": BLOCKS},
        {"block_shape": [128, 128]},
    ),
    "in FP8, by experts": Served(
        [ep(2, hidden_dim=128, intermediate_size_per_partition=128, num_local_experts=4)],
        "--ep",
        {"hidden_size": 128, "moe_intermediate_size": 128, "quantization_config": BLOCKS},
        {"block_shape": [128, 128]},
    ),
    "with experts that its config has not": Served([Config(num_experts=6, num_local_experts=6)], "--num-experts 6"),
    "by a name that is nowhere here": Served([Config()], "--num-experts 8", {"gone": True}),
    "of two sizes": Served(
        [Config(), Config(intermediate_size_per_partition=64)], "--model", {"moe_intermediate_size": [32, 64]}
    ),
}


@pytest.mark.parametrize("how", SERVED)
def test_the_command_makes_plans_that_the_hook_takes(world, caplog, obey, monkeypatch, tmp_path, how):
    """The warning's own command, run on simulated kernels; a restarted engine then serves every layer of the model."""
    served, folder = SERVED[how], tmp_path / "a model"
    folder.mkdir()
    if "gone" not in served.model:
        (folder / "config.json").write_text(json.dumps(TINY | served.model))
    (world.folder / "tiny.plan.json").unlink()
    monkeypatch.setattr(type(world.config), "model_config", types.SimpleNamespace(model=str(folder)))
    plugin.register()

    def attached():
        world.config = world.new_config()
        world.config.__class__.model_config = types.SimpleNamespace(model=str(folder))
        quant = Quant(**FP8, **served.quant) if served.quant else None
        kernels = [world.kernel(layer, quant, prepare=MoEPrepareAndFinalizeNoDPEPModular) for layer in served.layers]
        return ["_fused_experts" in vars(kernel.impl) for kernel in kernels]

    assert not any(attached())
    (said,) = messages(caplog)
    assert served.names in said
    assert obey(said) == 0
    assert all(attached()), said


def test_the_command_where_the_place_of_plans_is_one_file(world, caplog, obey, monkeypatch):
    """One file cannot hold the plans of a model: the message says what to set besides."""
    path = world.folder / "tiny.plan.json"
    path.write_text("{")
    monkeypatch.setenv(places.PLANS, str(path))
    plugin.register()
    world.kernel()
    said = messages(caplog)[-1]
    assert f"--out {world.folder}' and let $RAMPWRAP_PLANS name that folder" in said
    assert obey(said) == 0
    monkeypatch.setenv(places.PLANS, str(world.folder))
    world.config = world.new_config()
    assert hasattr(world.kernel().impl._fused_experts, "graph_dispatcher")


def test_plans_of_several_gpus_and_shapes_in_one_folder(world, plan):
    """The file's content decides; of two that fit, the newer."""
    attrs.evolve(plan, device=attrs.evolve(SIMULATED, name="NVIDIA B200")).save(world.folder / "a.plan.json")
    attrs.evolve(plan, shape=attrs.evolve(SHAPE, num_experts=16)).save(world.folder / "b.plan.json")
    newer = attrs.evolve(plan, provenance={**plan.provenance, "made": "2999-01-01"})
    newer.save(world.folder / "c.plan.json")
    (world.folder / "notes.json").write_text("not a plan")
    plugin.register()
    world.kernel()
    assert plugin.engines()[0]["plans"] == [str(world.folder / "c.plan.json")]


def starts_twice():
    """The plugin in an engine's process and in one of its children."""
    plugin.register()
    plugin._warn = places.OneWarning(plugin.logger)
    plugin.register()


def test_another_contract_is_refused(world, caplog):
    """Whatever its number, with all that is new, once."""
    made = world.mk.FusedMoEKernel.__init__
    world.faults = ["TritonExperts has _scale_rows, which rampwrap does not know", "no a1q"]
    starts_twice()
    assert world.mk.FusedMoEKernel.__init__ is made
    (said,) = messages(caplog)
    assert "vLLM 0.26.0 as it is: TritonExperts has _scale_rows" in said and "no a1q" in said


@pytest.mark.parametrize("version", ["0.34.0", "1.0.0", "0.1.dev3+gabc"])
def test_a_release_above_the_newest_that_was_read(world, caplog, version):
    """Served where its sources keep the contract, which is said once."""
    caplog.set_level(logging.INFO, plugin.logger.name)
    world.root.__version__ = version
    starts_twice()
    assert hasattr(world.mk.FusedMoEKernel.__init__, "rampwrap")
    (said,) = messages(caplog, logging.INFO)
    assert f"vLLM {version}, newer than the last one read, 0.33" in said


@pytest.mark.parametrize("version", ["0.26.1", "0.30.0", "0.33.0"])
def test_releases_that_were_read_are_served_without_a_word(world, caplog, version):
    caplog.set_level(logging.INFO, plugin.logger.name)
    world.root.__version__ = version
    plugin.register()
    assert hasattr(world.mk.FusedMoEKernel.__init__, "rampwrap") and not messages(caplog, logging.INFO)


def broken(**changes):
    return {"config": Config(**changes)}


FP8 = {"quant_dtype": torch.float8_e4m3fn, "weight_quant_dtype": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (broken(activation=Activation.GELU), "activation is gelu"),
        (broken(has_bias=True), "biases"),
        (broken(is_lora_enabled=True), "LoRA"),
        (broken(in_dtype=torch.float32), "torch.float32"),
        (broken(swiglu_limit=7.0), "its gemm1_clamp_limit is None and its swiglu_limit 7.0"),
        ({"quant": Quant(gemm1_alpha=1.7)}, "its activation is silu with alpha, which vLLM passes over"),
        ({"quant": Quant(gemm1_clamp_limit=0.0)}, "limit of an activation is 0.0"),
        (
            {**broken(activation=Activation.GELU_TANH), "quant": Quant(gemm1_clamp_limit=7.0)},
            "its activation is gelu_tanh with limit",
        ),
        (broken(new_setting=0.5), "FusedMoEConfig.new_setting is 0.5, which rampwrap does not know"),
        ({"quant": Quant(w1_zp=torch.ones(1))}, "FusedMoEQuantDesc.zp is tensor"),
        ({"quant": Quant(weight_quant_dtype="int4")}, "int4"),
        ({"quant": Quant(**FP8, block_shape=None)}, "float8"),
        ({"quant": Quant(**FP8, block_shape=[1, 32])}, "float8"),
        ({"quant": Quant(**FP8, block_shape=[64, 128])}, "float8"),
        (
            {"quant": Quant(**FP8, by=(False, True), w1_scale=torch.ones(8, 64, 1), w2_scale=torch.ones(8, 64, 1))},
            "float8",
        ),
        ({"quant": Quant(**FP8, w1_scale=torch.ones(8, 2), w2_scale=torch.ones(8))}, "float8"),
        (
            {"quant": Quant(**FP8, w1_scale=torch.ones(8), w2_scale=torch.ones(8), a2_scale=torch.ones(1))},
            "static scales",
        ),
        ({"quant": Quant(**FP8, block_shape=[128, 128], a1_scale=torch.ones(1))}, "static scales"),
    ],
)
def test_layers_that_we_do_not_compute_stay_with_vllm(world, caplog, what, says):
    """Said to those who debug, once for all layers."""
    caplog.set_level(logging.DEBUG, plugin.logger.name)
    plugin.register()
    for _ in range(3):
        assert "_fused_experts" not in vars(world.kernel(**what).impl)
    said = [text for text in messages(caplog, logging.DEBUG) if "rampwrap leaves a layer" in text]
    assert len(said) == 1 and says in said[0] and not messages(caplog)


@pytest.mark.parametrize("case", ["backend", "micro-batches"])
def test_a_plan_that_cannot_be_used_says_why(world, caplog, case):
    plugin.register()
    world.config = world.new_config(dbo=case == "micro-batches")
    kernel = world.kernel(experts=world.other if case == "backend" else None)
    assert "_fused_experts" not in vars(kernel.impl)
    (said,) = messages(caplog)
    assert ("--moe-backend triton" if case == "backend" else "DBO") in said


def test_expert_parallel_layers_count_local_experts(world):
    """A rank with 4 of 8 experts: a plan of its own, the histogram of its experts, zeros for the others' slots."""
    local = attrs.evolve(SHAPE, num_local_experts=4)
    make_plan(timings_of(local)).save(world.folder / "ep.plan.json")
    plugin.register()
    parallel = Parallel(tp_size=1, ep_size=2, use_ep=True)
    kernel = world.kernel(Config(num_local_experts=4, moe_parallel_config=parallel), prepare=NaiveDPEP)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1], dtype=torch.int32)
    its = inputs(shape=local)
    out = kernel.impl.apply(**its, expert_map=expert_map)
    assert near(out, its, expert_map=expert_map) and world.calls == []
    assert kernel.impl._fused_experts.graph_dispatcher.shape.num_local_experts == 4
    # Without a map nobody can say which experts these are.
    with contextlib.suppress(IndexError):
        kernel.impl.apply(**its)
    assert world.calls == [12]


def test_fp8_layers_quantise_their_own_activations(world):
    """vLLM hands the activations over as they are, and its own launch would still be right."""
    shape = MoEShape(8, 2, 128, 128, "fp8")
    plan = make_plan(timings_of(shape))
    plan.save(world.folder / "fp8.plan.json")
    kernel = TritonFusedMoE(shape)
    its = kernel.inputs(shape, inputs()["topk_ids"])
    quant = Quant(**FP8, block_shape=[128, 128], w1_scale=its["w13_scale"], w2_scale=its["w2_scale"])
    plugin.register()
    layer = world.kernel(Config(hidden_dim=128, intermediate_size_per_partition=128), quant)
    assert layer.impl.fused_experts.expects_unquantized_inputs
    assert isinstance(layer.impl.fused_experts, world.experts) and not world.experts.expects_unquantized_inputs
    names = ("hidden_states", "w2", "topk_weights", "topk_ids")
    out = layer.impl.apply(w1=its["w13"], **{name: its[name] for name in names})
    want = kernel.reference(shape, its)
    assert world.calls == [] and float((out.double() - want).norm() / want.norm()) < 2e-2


CLAMPED = {"gemm1_clamp_limit": 7.0}
OAI = {**CLAMPED, "gemm1_alpha": 1.702, "gemm1_beta": 1.0}


@pytest.mark.parametrize(
    ("activation", "scaled", "ours"),
    [
        (Activation.SILU, CLAMPED, Ours(limit=7.0)),
        (Activation.OAI, OAI, SWIGLU_OAI),
        (Activation.OAI, CLAMPED, Ours(limit=7.0)),
        (Activation.GELU_TANH, {}, Ours("gelu_tanh")),
    ],
)
def test_layers_of_other_activations(world, activation, scaled, ours):
    """As vLLM's settings name it; the same settings of the layer change nothing, and a plan for SiLU is not for them."""
    shape = attrs.evolve(SHAPE, activation=ours)
    plugin.register()
    names = {"gemm1_clamp_limit": "swiglu_limit", "gemm1_alpha": "swiglu_alpha", "gemm1_beta": "swiglu_beta"}
    config = Config(activation=activation, **{names[name]: its for name, its in scaled.items()})
    assert "_fused_experts" not in vars(world.kernel(config, Quant(**scaled)).impl)
    for its in (config, Config(activation=activation)):
        assert vllm_layer.layer_shape(its, Quant(**scaled)) == shape
    if ours != SWIGLU_OAI:
        return
    make_plan(timings_of(shape)).save(world.folder / "other.plan.json")
    world.config = world.new_config()
    layer, given = world.kernel(config, Quant(**scaled)), inputs(4)
    out = layer.impl.apply(**given)
    want = TritonFusedMoE(shape).reference(shape, given | {"w13": given["w1"]})
    assert world.calls == [] and float((out.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize(
    ("sizes", "scales", "quant"),
    [
        ((128, 192), "block-64", {"block_shape": [64, 64]}),
        ((64, 96), "block-32", {"block_shape": [32, 32]}),
        ((64, 48), "channel", {"by": (True, True)}),
        ((64, 48), "tensor", {"by": (False, False)}),
        ((64, 48), "tensor", {"by": (True, False)}),
    ],
)
def test_fp8_layers_of_other_scales(world, sizes, scales, quant):
    """Slices whose scales vLLM refined, and scales by channel and by tensor, where it runs them with its Triton experts."""
    shape = MoEShape(8, 2, *sizes, "fp8", scales=scales)
    kernel = TritonFusedMoE(shape)
    its = kernel.inputs(shape, inputs(4)["topk_ids"])
    made = Quant(**FP8, **quant, w1_scale=its["w13_scale"], w2_scale=its["w2_scale"])
    config = Config(hidden_dim=sizes[0], intermediate_size_per_partition=sizes[1])
    assert vllm_layer.layer_shape(config, made) == shape
    if scales != "channel":
        return
    make_plan(timings_of(shape)).save(world.folder / "fp8.plan.json")
    plugin.register()
    layer = world.kernel(config, made)
    assert layer.impl.fused_experts.expects_unquantized_inputs
    names = ("hidden_states", "w2", "topk_weights", "topk_ids")
    out = layer.impl.apply(w1=its["w13"], **{name: its[name] for name in names})
    want = kernel.reference(shape, its)
    assert world.calls == [] and float((out.double() - want).norm() / want.norm()) < 2e-2


@pytest.mark.parametrize(
    "what",
    [
        "too many tokens",
        "no tokens",
        "weighted input",
        "strided",
        "other weights",
        "lora",
        "hook",
        "weights on the host",
    ],
)
def test_single_steps_that_go_to_vllm(world, what):
    plugin.register()
    kernel = world.kernel()
    its, more = inputs(40 if what == "too many tokens" else 0 if what == "no tokens" else 12), {}
    if what == "weighted input":
        more["weighted"] = True
    elif what == "strided":
        its["hidden_states"] = torch.cat([its["hidden_states"]] * 2, dim=1)[:, :64]
    elif what == "other weights":
        its["w1"] = torch.cat([its["w1"]] * 2, dim=1)[:, ::2]
    elif what == "lora":
        kernel.impl.fused_experts._lora_context = object()
    elif what == "hook":
        kernel.impl.fused_experts.post_gemm2_hook = lambda rows, output: None
    elif what == "weights on the host":
        its["w2"]._vllm_is_uva_offloaded = True
    kernel.impl.apply(**its, **more)
    assert world.calls == [len(its["topk_ids"])]


def test_a_layer_that_our_kernel_refuses_is_given_up(world, caplog):
    """vLLM serves this step and all later ones, with one warning."""
    plugin.register()
    kernel = world.kernel()
    its = inputs()
    bad = its | {"topk_weights": its["topk_weights"].double()}
    assert near(kernel.impl.apply(**bad), its)
    kernel.impl.apply(**its)
    assert world.calls == [12, 12]
    (said,) = messages(caplog)
    assert "topk_weights" in said


def test_a_size_that_was_captured_unprepared_is_vllms(world, caplog, monkeypatch):
    """The engine goes on; the layer serves other sizes as before."""
    plugin.register()
    kernel = world.kernel(name="layer")
    its = inputs()
    kernel.impl.apply(**its)
    layer = kernel.impl._fused_experts
    inner = layer._layer

    def refuse(**kwargs):
        raise CaptureError("the kernels for 12 tokens were not compiled before this capture")

    layer._layer = refuse
    assert near(kernel.impl.apply(**its), its) and world.calls == [12]
    layer._layer = inner
    kernel.impl.apply(**its)
    assert world.calls == [12]
    (said,) = messages(caplog)
    assert "not compiled" in said


def test_an_error_of_ours_lets_the_engine_start(world, caplog, monkeypatch):
    plugin.register()
    monkeypatch.setattr(plugin, "layer_shape", lambda config, quant: 1 / 0)
    for _ in range(2):
        world.kernel().impl.apply(**inputs())
    (said,) = messages(caplog)
    assert world.calls == [12, 12] and "error of its own" in said and "ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation_config": ActivationConfig(clamp_limit=7.0)}, "its activation has clamp_limit=7.0, not None"),
        ({"activation_config": ActivationConfig(alpha=1.7)}, "its activation has alpha=1.7, not 1.0"),
        ({"activation_config": ActivationConfig(situ=1.0)}, "ApplyMoEActivationConfig.situ is 1.0"),
        ({"quantization_emulation": True}, "emulated"),
        ({"output_hidden_dim": lambda hidden_dim: hidden_dim // 2}, "its output is 32 wide, not 64"),
    ],
)
def test_experts_that_were_told_something_else(world, caplog, change, says):
    """A layer with a plan stays with vLLM, and the log says why."""
    caplog.set_level(logging.INFO, plugin.logger.name)
    plugin.register()
    kernel = world.kernel(experts=lambda config, quant: told(world.experts(config, quant), change))
    assert "_fused_experts" not in vars(kernel.impl)
    assert any(says in one for one in messages(caplog, logging.INFO))


def told(experts, change):
    vars(experts).update(change)
    return experts


def test_a_large_step_goes_to_vllm_after_its_memory_was_locked(world):
    """Ours is smaller than what its own launch takes; what a step of that size would take is there all the same."""
    plugin.register()
    kernel = world.kernel()
    its = inputs(32)
    assert near(kernel.impl.apply(**its), its) and world.calls == []
    theirs, ours = world.manager.most, sum(math.prod(shape) * dtype.itemsize for shape, dtype in world.manager.asked)
    world.manager.locked = True
    kernel.impl.fused_experts.post_gemm2_hook = lambda rows, output: None
    assert near(kernel.impl.apply(**its), its) and world.calls == [32]
    assert theirs == 2 * 64 * 32 * 2 * 64 * 2 > ours
    kernel.impl.fused_experts.post_gemm2_hook = None
    assert near(kernel.impl.apply(**inputs(5)), inputs(5)) and world.calls == [32]


def test_memory_is_reserved_outside_captures_only_and_once_a_size(world, monkeypatch):
    plugin.register()
    kernel = world.kernel()
    asked = []
    monkeypatch.setattr(kernel.impl, "_allocate_buffers", lambda **its: asked.append(its["M_full"]), raising=False)
    for tokens in (12, 12, 5, 20):
        kernel.impl.apply(**inputs(tokens))
    monkeypatch.setattr(vllm_experts, "capturing", lambda: True)
    kernel.impl.apply(**inputs(24))
    assert asked == [12, 20]


def test_the_result_goes_where_a_combine_wants_it(world):
    """From 0.33 on the step after the layer may bring its own buffer."""

    class Combine(MoEPrepareAndFinalizeNoDPEPModular):
        def allocate_fused_expert_output(self, shape, dtype, device, weight_and_reduce_impl):
            self.buffer = torch.empty(shape, dtype=dtype, device=device)
            return self.buffer

    plugin.register()
    kernel = world.kernel(prepare=Combine)
    its = inputs()
    assert near(kernel.impl.apply(**its), its) and world.calls == []
    assert near(kernel.impl.prepare_finalize.buffer, its) and not kernel.impl.in_place


def test_buffers_of_captured_graphs_are_kept(world, monkeypatch):
    """A second engine in the process replaces vLLM's workspace; the first one's graphs still point into the old."""
    plugin.register()
    kernel = world.kernel()
    kernel.impl.apply(**inputs())
    (_, engine) = next(iter(plugin._engines.values()))
    assert not engine.kept
    monkeypatch.setattr(vllm_experts, "capturing", lambda: True)
    kernel.impl.apply(**inputs())
    assert len(engine.kept) == 1


def test_plans_place(monkeypatch, tmp_path, plan):
    """A folder, a file, the default folder; what is not there is empty."""
    monkeypatch.delenv(places.PLANS, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert places.plans_path() == tmp_path / "rampwrap" / "plans"
    assert places.Plans.read().found == ()
    places.default_folder().mkdir(parents=True)
    plan.save(places.default_folder() / "x.plan.json")
    fit = places.Plans.read().find(SHAPE, SIMULATED, vllm_layer.KERNELS)
    assert fit is not None and fit.kernel.name == "triton_fused_moe"
    plan.save(tmp_path / "any-name.json")
    assert places.Plans.read(tmp_path / "any-name.json").find(SHAPE, SIMULATED, vllm_layer.KERNELS) is not None
    assert (
        places.Plans.read(tmp_path / "any-name.json").find(SHAPE, Device("NVIDIA H200", 132), vllm_layer.KERNELS)
        is None
    )


def test_the_stand_in_has_the_signatures_of_vllm(world):
    """Those that vLLM's releases are held to; `test_vllm_wheels` holds them to it."""
    kernel = vllm_contract.SIGNATURES[("model_executor/layers/fused_moe/modular_kernel.py", IMPL, "_fused_experts")]
    assert tuple(inspect.signature(world.kernel().impl._fused_experts).parameters) == kernel
