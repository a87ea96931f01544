"""The vLLM plugin without a plan: where the CuTe kernels' defaults serve, and why a layer stays with vLLM elsewhere.

On a CPU, with the stand-ins of `test_vllm` and `test_vllm_cute`.
"""

import importlib.util
import logging
import math
import pathlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import attrs
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.adapters import cute_moe
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.engines import defaults, vllm_experts
from rampwrap.engines import vllm as plugin
from rampwrap.errors import InputError
from rampwrap.kernel.activation import Activation
from rampwrap.kernel.device import DEVICES, SIMULATED, Device
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernel.shape import SHAPES
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe.workspace import workspace
from rampwrap.plan import folder as places

if not INTERPRETED.value:
    pytest.skip("the stand-ins run on a CPU; tests/gpu has the engine itself", allow_module_level=True)

spec = importlib.util.spec_from_file_location("test_vllm_cute", pathlib.Path(__file__).with_name("test_vllm_cute.py"))
its_plans = importlib.util.module_from_spec(spec)
spec.loader.exec_module(its_plans)
base, cute = its_plans.base, its_plans.cute
plan, built, cute_plans, triton_plans = base.plan, its_plans.built, its_plans.cute_plans, its_plans.triton_plans
FP8, BF16, apply, inputs, engine_layer = (
    *(its_plans.FP8, its_plans.BF16, its_plans.apply),
    *(its_plans.inputs, its_plans.engine_layer),
)
HOPPER = Device("NVIDIA H200", 132, capability="9.0")


@pytest.fixture
def world(monkeypatch, tmp_path, plan):
    """The stand-in of vLLM on a Hopper, without a plan."""
    made = base.world.__wrapped__(monkeypatch, tmp_path, plan)
    (made.folder / "tiny.plan.json").unlink()
    monkeypatch.setenv(places.OWN_PLANS, "1")
    monkeypatch.delenv(defaults.PLANS_ONLY, raising=False)
    monkeypatch.setattr(Device, "current", classmethod(lambda cls: HOPPER))
    monkeypatch.setattr(defaults, "_warn", places.OneWarning(plugin.logger))
    plugin.register()
    return made


def said(caplog, level=logging.INFO):
    return [its for its in base.messages(caplog, level) if its.startswith("rampwrap")]


@pytest.mark.parametrize("shape", [FP8, BF16], ids=["fp8", "bf16"])
def test_the_defaults_serve_without_a_plan(world, built, caplog, shape):
    """Each token count its default, in vLLM's memory; one line for all layers, which says how to have it otherwise."""
    caplog.set_level(logging.INFO)
    layers = [engine_layer(world, shape, inputs(shape), f"layer {i}") for i in range(2)]
    kernel = cute.kernel_of(shape, "both")
    for tokens in (1, 12, 32):
        its = inputs(shape, tokens)
        assert cute.error(apply(layers[0], its), kernel.reference(shape, its)) < 5e-3
        first = cute_moe.from_keys(kernel.default_config(tokens), shape.dtype).variants[0].symbol
        assert first in {symbol for symbol, _ in built.calls}, tokens
        built.calls.clear()
    assert world.calls == [] and layers[0].impl.in_place and world.manager.asked
    (engine,) = plugin.engines()
    assert (engine["layers"], engine["plans"], engine["defaults"]) == (2, [], [str(shape)])
    assert engine["kernels"] == ["cute_moe"]
    (graph_dispatcher,) = plugin.graph_dispatchers()
    assert {row.layer for row in graph_dispatcher.telemetry()} == {"layer 0"}
    (line,) = said(caplog)
    assert f"default configs of cute_moe for layers of {shape}: there is no plan in" in line
    assert "rampwrap profile --engine vllm" in line and "RAMPWRAP_PLANS_ONLY=1 to leave them to vLLM" in line
    assert not base.messages(caplog)


def stays(world, caplog, shape=FP8, **more):
    """Makes a layer that stays with vLLM; the warning."""
    layer = engine_layer(world, shape, inputs(FP8)) if not more else world.kernel(**more)
    assert "_fused_experts" not in vars(layer.impl) and plugin.engines()[0]["defaults"] == []
    (line,) = base.messages(caplog)
    assert "as they are: there is no plan in" in line and "rampwrap profile --engine vllm" in line
    return line


def test_the_switch_keeps_layers_without_a_plan_with_vllm(world, built, caplog, monkeypatch):
    monkeypatch.setenv(defaults.PLANS_ONLY, "1")
    assert "nor do defaults serve (RAMPWRAP_PLANS_ONLY is set)" in stays(world, caplog)


@pytest.mark.parametrize("shape", [FP8, BF16], ids=["fp8", "bf16"])
def test_without_the_library_the_triton_kernels_defaults_serve(world, monkeypatch, caplog, shape):
    """Each token count its default; nothing is built and no plan is made."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cute_moe, "load", its_plans.absent)
    layer, kernel = engine_layer(world, shape, inputs(shape)), TritonFusedMoE(shape)
    for tokens in (1, 12, 32):
        its = inputs(shape, tokens)
        assert torch.equal(apply(layer, its), kernel.launch(kernel.default_config(tokens), **its)), tokens
    (engine,) = plugin.engines()
    assert (engine["layers"], engine["defaults"], engine["kernels"]) == (1, [str(shape)], ["triton_fused_moe"])
    assert world.calls == [] and "default configs of triton_fused_moe" in said(caplog)[-1]


def test_nothing_is_compiled_that_nobody_asked_for(world, built, caplog, monkeypatch):
    """Minutes of a start are for a plan, or for 'rampwrap build-kernels'."""
    monkeypatch.setattr(built, "must_compile", lambda variants: True)
    monkeypatch.setattr(built, "ensure", lambda variants: pytest.fail("compiles"))
    engine_layer(world, FP8, inputs(FP8))
    assert plugin.engines()[0]["kernels"] == ["triton_fused_moe"]
    found = defaults.kernel_without_plan(FP8, HOPPER, [defaults.CUTE])
    assert found == "the CuTe kernels are not built; run 'rampwrap build-kernels'"


def test_a_library_of_one_form_does_not_serve_what_it_is_slow_at(world, built, caplog, monkeypatch):
    """One launch alone has 0.31 of vLLM's speed in prefill, and the defaults would have run it at every token count."""
    monkeypatch.setattr(built, "why_absent", lambda config: None if config.form == "one" else "it is not built.")
    engine_layer(world, FP8, inputs(FP8))
    assert plugin.engines()[0]["kernels"] == ["triton_fused_moe"]
    assert "default for 16 tokens, form=one" in defaults.kernel_without_plan(FP8, HOPPER, [defaults.CUTE])


@pytest.mark.parametrize("what", ["load", "precompile"])
@pytest.mark.parametrize("error", [InputError("the library is of another machine."), PermissionError(13, "denied")])
def test_a_broken_installation_is_passed_over(world, built, caplog, monkeypatch, what, error):
    """One line, and no traceback for each layer: these kernels were not asked for."""

    def fails(*_):
        raise error

    monkeypatch.setattr(*((cute_moe, "load") if what == "load" else (built, "ensure")), fails)
    for shape in (FP8, attrs.evolve(FP8, hidden_size=512), FP8):
        engine_layer(world, shape, inputs(shape))
    (line,) = base.messages(caplog)
    assert plugin.engines()[0]["kernels"] == ["triton_fused_moe"] and "Traceback" not in caplog.text
    assert ("another machine" if isinstance(error, InputError) else "PermissionError: [Errno 13] denied") in line


@pytest.mark.parametrize("kind", ["without", "cute", "triton"])
def test_determinism_keeps_layers_whose_sums_have_no_order(world, built, cute_plans, triton_plans, monkeypatch, kind):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if kind != "without":
        plans = cute_plans if kind == "cute" else triton_plans
        attrs.evolve(plans[BF16], device=HOPPER).save(world.folder / "a.plan.json")
    engine_layer(world, BF16, inputs(BF16))
    assert plugin.engines()[0]["kernels"] == ([] if kind == "cute" else ["triton_fused_moe"])


def test_scales_that_were_loaded_anew_are_read(world, built):
    """As vLLM's own experts do, which ask their quantisation at each step."""
    its = inputs(FP8)
    anew = its | {name: 2 * its[name] for name in ("w13_scale", "w2_scale")}
    layer = engine_layer(world, FP8, its)
    apply(layer, its)
    quant = layer.impl.fused_experts.quant_config
    quant._w1.scale, quant._w2.scale = anew["w13_scale"], anew["w2_scale"]
    want = cute.kernel_of(FP8).reference(FP8, anew)
    assert cute.error(apply(layer, anew), want) < 5e-3 and world.calls == []


def test_a_first_launch_that_fails_leaves_the_layer_to_vllm(world, built, caplog, monkeypatch):
    """A driver without our kernels says so when they are launched, and the engine must start; what fails later is told."""

    def no_image(*_, **__):
        raise RuntimeError("no kernel image is available for execution on the device")

    its = inputs(BF16)
    served = engine_layer(world, BF16, its)
    apply(served, its)
    monkeypatch.setattr(served.impl._fused_experts, "_layer", no_image)
    with pytest.raises(RuntimeError, match="no kernel image"):
        apply(served, its)
    monkeypatch.setattr(GraphDispatcher, "layer", lambda *_: no_image)
    for _ in range(2):
        layer = engine_layer(world, BF16, its)
        apply(layer, its), apply(layer, its)
    (line,) = base.messages(caplog)
    assert world.calls == [12] * 4 and "no kernel image" in line


def test_memory_that_was_locked_too_small_ends_no_engine(world, built, caplog):
    """The largest step went to vLLM's own launch, and ours asks for more at a few tokens: up to 45 times as much."""
    layer = engine_layer(world, BF16, inputs(BF16))
    world.manager.locked, world.manager.most = True, 1
    layer.impl._fused_experts._reserved = 12
    own = []
    layer.impl._fused_experts._own = lambda **call: own.append(len(call["topk_ids"])) or call["output_alias"]
    for _ in range(2):
        apply(layer, inputs(BF16))
    (line,) = base.messages(caplog)
    assert own == [12, 12] and "no room for 12 tokens (Workspace is locked" in line


def test_another_gpu_stays_with_vllm(world, built, caplog, monkeypatch):
    monkeypatch.setattr(Device, "current", classmethod(lambda cls: SIMULATED))
    assert "sm_90 alone, and this is simulated" in stays(world, caplog)


def test_sizes_that_no_config_runs(world, built, caplog):
    assert "hidden_size=192 is no multiple" in stays(world, caplog, attrs.evolve(FP8, hidden_size=192))


def test_another_back_end_of_vllms_stays(world, built, caplog):
    """Nobody asked for a change of it, and the line says how to ask."""
    config = base.Config(hidden_dim=256, intermediate_size_per_partition=128)
    assert "FlashInferExperts; start it with --moe-backend triton" in stays(
        world, caplog, config=config, experts=world.other
    )


@pytest.mark.parametrize("where", ["own", "shipped"])
def test_a_plan_goes_first(world, built, triton_plans, tmp_path, monkeypatch, caplog, where):
    caplog.set_level(logging.INFO)
    target = world.folder
    if where == "shipped":
        target = tmp_path / "shipped"
        target.mkdir()
        monkeypatch.delenv(places.OWN_PLANS)
        monkeypatch.setattr(places, "SHIPPED", target)
    attrs.evolve(triton_plans[BF16], device=HOPPER).save(target / "a.plan.json")
    engine_layer(world, BF16, inputs(BF16))
    (engine,) = plugin.engines()
    assert engine["plans"] == [str(target / "a.plan.json")] and engine["defaults"] == []
    assert engine["kernels"] == ["triton_fused_moe"] and not any("default configs" in line for line in said(caplog))


def test_a_plan_that_does_not_fit_is_named_as_a_warning(world, built, cute_plans, caplog):
    """The defaults serve, and whoever made the plan hears why it does not."""
    old = attrs.evolve(cute_plans[FP8], device=HOPPER, kernel_version="0")
    old.save(world.folder / "old.plan.json")
    engine_layer(world, FP8, inputs(FP8))
    (line,) = base.messages(caplog)
    assert "old.plan.json" in line and "kernel version 0" in line and "default configs of cute_moe" in line
    assert plugin.engines()[0]["defaults"] == [str(FP8)]


def test_experts_of_other_ranks(world, built):
    shape = attrs.evolve(FP8, num_local_experts=4)
    its = cute.kernel_of(shape).inputs(shape, cute.routing(shape, 12))
    layer = engine_layer(world, shape, its)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1], dtype=torch.int32)
    out = apply(layer, its, expert_map=expert_map)
    want = cute.kernel_of(shape).reference(shape, its | {"expert_map": expert_map})
    assert cute.error(out, want) < 5e-3 and world.calls == []


def test_which_layers_and_devices(built, monkeypatch):
    """By capability where it is stated, by name in plans that say nothing of it; only what the kernels compute."""
    monkeypatch.delenv(defaults.PLANS_ONLY, raising=False)
    its = defaults.kernel_without_plan
    for device in (
        HOPPER,
        DEVICES["nvidia-h200"],
        Device("NVIDIA H100 80GB HBM3", 132),
        Device("X", 78, capability="9.0"),
    ):
        assert its(FP8, device).name == "cute_moe", device
    for device in (DEVICES["nvidia-b200"], DEVICES["nvidia-a100-sxm4-80gb"], attrs.evolve(HOPPER, capability="10.0")):
        assert "sm_90 alone" in its(FP8, device)
    assert "silu:limit=10" in its(attrs.evolve(FP8, activation=Activation("silu", limit=10.0)), HOPPER)
    assert "scales=block-64" in its(attrs.evolve(FP8, scales="block-64"), HOPPER)
    for scales in ("channel", "tensor", "static"):
        assert its(attrs.evolve(FP8, scales=scales), HOPPER).name == "triton_fused_moe"
    assert "silu:limit=10" in its(
        attrs.evolve(FP8, scales="channel", activation=Activation("silu", limit=10.0)), HOPPER
    )
    assert its(attrs.evolve(BF16, dtype="fp16"), HOPPER) == "no defaults serve layers with fp16"
    assert its(attrs.evolve(BF16, intermediate_size=96), HOPPER).name == "triton_fused_moe"  # what CuTe cannot
    kernel = its(FP8, HOPPER)
    assert {kernel.default_config(tokens)["form"] for tokens in (1, 16, 64, 4096)} == {
        "one",
        "two",
        "ragged",
        "prefill",
    }
    served = defaults.default_configs(kernel)
    assert all(kernel.default_config(2**power) in served for power in range(17)) and len(served) < 10


@given(
    st.sampled_from(sorted(SHAPES.values(), key=str)),
    st.sampled_from(["bf16", "fp8"]),
    st.sampled_from([1, 8]),
    *[st.one_of(st.integers(1, 1024), st.integers(1, 1 << 17))] * 2,
)
def test_memory_of_a_step_holds_every_smaller_one(shape, dtype, ranks, first, second):
    """vLLM locks its memory at the largest step: none of ours may ask for more later, tensor by tensor, nor any default's form."""
    shape = attrs.evolve(shape, dtype=dtype, num_local_experts=max(1, shape.num_experts // ranks))
    few, many = sorted((first, second))
    less, more = (vllm_experts._layout(shape, tokens)[1] for tokens in (few, many))
    for (small, of), (large, _) in zip(less, more, strict=True):
        assert math.prod(small) * of.itemsize <= math.prod(large) * of.itemsize
    memory, slots = workspace(shape, few, "meta"), few * shape.top_k
    for block_m in (8, 56, 112, 144):
        assert memory.token_blocks(few, shape.top_k, shape.num_local_experts, block_m) is not None
    memory.ordered_h(128 * max_blocks(slots, shape.num_local_experts, 128), dtype == "fp8")
