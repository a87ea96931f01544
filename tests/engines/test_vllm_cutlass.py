"""Layers that vLLM runs with its CUTLASS experts: the contract, and steps with the stand-ins of `test_vllm`."""

import importlib.util
import logging
import pathlib
import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import attrs

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.engines import backends, defaults, vllm_cutlass
from rampwrap.engines import vllm as plugin
from rampwrap.kernel.activation import Activation
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.plan import folder as places
from rampwrap.plan.make import make_plan

if not INTERPRETED.value:
    pytest.skip("the stand-ins run on a CPU; tests/gpu has the engine itself", allow_module_level=True)

spec = importlib.util.spec_from_file_location("test_vllm", pathlib.Path(__file__).with_name("test_vllm.py"))
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)
plan = base.plan
SHAPE = MoEShape(8, 2, 64, 48, "fp8", scales="channel")
STATIC = attrs.evolve(SHAPE, scales="static")


@pytest.fixture
def world(monkeypatch, tmp_path, plan):
    """The stand-in of vLLM with its CUTLASS classes."""
    made = base.world.__wrapped__(monkeypatch, tmp_path, plan)
    made.permuted = []

    def reserve(expanded_rows):
        made.permuted.append((expanded_rows, made.manager.locked))

    class CutlassExpertsFp8(made.experts):
        def _get_permute_scratch(self):
            return types.SimpleNamespace(reserve=reserve)

    class TritonOrCutlassExperts(made.experts):
        def __init__(self, moe_config, quant_config):
            super().__init__(moe_config, quant_config)
            self.experts = CutlassExpertsFp8(moe_config, quant_config)

    for name, kind in (("triton_cutlass_moe", TritonOrCutlassExperts), ("cutlass_moe", CutlassExpertsFp8)):
        made.module(monkeypatch, f"{base.PACKAGE}.experts.{name}", **{kind.__name__: kind})
    made.either = TritonOrCutlassExperts
    monkeypatch.setattr(vllm_cutlass, "faults", lambda root=None: ())
    plugin.register()
    return made


def layer(world, shape=SHAPE, **given):
    """A layer, and what its steps are called with."""
    its = TritonFusedMoE(shape).inputs(shape, base.inputs(4)["topk_ids"])
    scales = {"w1_scale": its["w13_scale"], "w2_scale": its["w2_scale"]}
    if shape.scales == "static":
        scales |= {"a1_scale": its["w13_input_scale"], "a2_scale": its["w2_input_scale"]}
    by = (shape.scales == "channel",) * 2
    config = base.Config(hidden_dim=64, intermediate_size_per_partition=48, **given.pop("config", {}))
    made = world.kernel(config, base.Quant(**base.FP8, by=by, **scales, **given), experts=world.either)
    return made, its


def apply(made, its):
    return made.impl.apply(
        w1=its["w13"], **{name: its[name] for name in ("hidden_states", "w2", "topk_weights", "topk_ids")}
    )


def near(out, shape, its):
    want = TritonFusedMoE(shape).reference(shape, its)
    return float((out.double() - want).norm() / want.norm()) < 2e-2


@pytest.mark.parametrize("shape", [SHAPE, STATIC], ids=str)
def test_a_plan_serves(world, shape):
    """Activations come as they are; vLLM's own memory, and what its CUTLASS permutes by, is there before it is locked."""
    make_plan(base.timings_of(shape)).save(world.folder / "fp8.plan.json")
    made, its = layer(world, shape)
    assert made.impl.fused_experts.expects_unquantized_inputs
    assert near(apply(made, its), shape, its)
    rows = its["topk_ids"].numel()
    assert world.calls == [] and world.permuted == [(rows, False)]


def test_experts_made_anew_from_the_class_of_served_ones(world, monkeypatch):
    """As vLLM's elastic expert parallelism does: served again, or in full what they were."""
    make_plan(base.timings_of(SHAPE)).save(world.folder / "fp8.plan.json")
    made, its = layer(world)
    world.either = type(made.impl.fused_experts)
    again, its = layer(world)
    assert near(apply(again, its), SHAPE, its) and world.calls == []
    monkeypatch.setenv(places.DISABLE, "1")
    left = layer(world)[0].impl
    assert "_fused_experts" not in vars(left) and not left.fused_experts.expects_unquantized_inputs


def test_a_reserve_that_fails_at_the_first_step_leaves_the_layer(world, monkeypatch, caplog):
    make_plan(base.timings_of(SHAPE)).save(world.folder / "fp8.plan.json")
    made, its = layer(world)
    monkeypatch.setattr(vllm_cutlass, "reserve", lambda *_: [][0])
    apply(made, its)
    assert world.calls == [len(its["topk_ids"])]
    assert any("leaves a layer to vLLM from here on" in line for line in base.messages(caplog))


def test_defaults_serve(world, monkeypatch, caplog):
    """On a Hopper, those of the Triton kernel, with one line; and not where scales are none of those."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Device, "current", classmethod(lambda cls: Device("NVIDIA H100 80GB HBM3", 132)))
    monkeypatch.setenv(places.OWN_PLANS, "1")
    monkeypatch.delenv(defaults.PLANS_ONLY, raising=False)
    made, its = layer(world)
    assert near(apply(made, its), SHAPE, its) and world.calls == []
    assert plugin.engines()[0]["defaults"] == [str(SHAPE)]
    assert any("default configs of triton_fused_moe" in line for line in base.messages(caplog, logging.INFO))
    monkeypatch.setattr(defaults, "SCALES", ("block-128",))
    world.config = world.new_config()
    assert "_fused_experts" not in vars(layer(world)[0].impl)


@pytest.mark.parametrize("what", ["weighted input", "given up", "many tokens"])
def test_steps_that_go_to_vllm_arrive_quantised(world, what):
    """Its CUTLASS takes e4m3 alone: rows are quantised by vLLM's own prepare step first, and not weighted twice."""
    make_plan(base.timings_of(SHAPE)).save(world.folder / "fp8.plan.json")
    made, its = layer(world)
    seen, prepare = [], base.MoEPrepareAndFinalizeNoDPEPModular.prepare

    def watched(self, a1, *rest, **more):
        seen.append((rest[4], more["defer_input_quant"]))
        return prepare(self, a1, *rest, **more)

    made.impl.prepare_finalize.prepare = types.MethodType(watched, made.impl.prepare_finalize)
    ours = made.impl._fused_experts
    own, got = ours._own, []
    ours._own = lambda **call: got.append((call["a1q"].dtype, call["a1q_scale"])) or own(**call)
    weighted = what == "weighted input"
    if what == "given up":
        ours._given_up = True
    elif what == "many tokens":
        its = {name: torch.cat([its[name]] * 10) if len(its[name]) == 4 else its[name] for name in its}
    names = ("hidden_states", "w2", "topk_weights", "topk_ids")
    made.impl.apply(w1=its["w13"], **{name: its[name] for name in names}, weighted=weighted)
    assert seen == [(weighted, True), (False, False)] and world.calls == [len(its["topk_ids"])]
    assert got[0][0] == torch.float8_e4m3fn and got[0][1] is not None


def test_layers_that_stay_with_vllm(world, monkeypatch, caplog):
    """The switch, a class that is another, a release that breaks the contract, a limit that its CUTLASS passes over."""
    make_plan(base.timings_of(SHAPE)).save(world.folder / "fp8.plan.json")
    clamped = attrs.evolve(SHAPE, activation=Activation(limit=7.0))
    make_plan(base.timings_of(clamped)).save(world.folder / "clamped.plan.json")

    def says(text, **given):
        caplog.clear()
        world.config = world.new_config()
        assert "_fused_experts" not in vars(layer(world, **given)[0].impl)
        return text in "".join(base.messages(caplog))

    with monkeypatch.context() as patch:
        patch.setattr(vllm_cutlass, "SERVED", False)
        assert says("TritonOrCutlassExperts; start it with --moe-backend triton")
    with monkeypatch.context() as patch:
        patch.setattr(vllm_cutlass, "faults", lambda root=None: ("CutlassExpertsFp8 has _scale_rows",))
        assert says("CutlassExpertsFp8 has _scale_rows")
    init = world.either.__init__

    def other(self, *its):
        init(self, *its)
        self.experts = world.experts(*its)

    with monkeypatch.context() as patch:
        patch.setattr(world.either, "__init__", other)
        assert says("vLLM runs it with TritonExperts, which rampwrap does not know")

    def older(self, *its):
        init(self, *its)
        del self.activation_config

    with monkeypatch.context() as patch:
        patch.setattr(world.either, "__init__", older)
        assert says("of which vLLM's CUTLASS passes over the numbers", gemm1_clamp_limit=7.0)
    assert "_fused_experts" in vars(layer(world, gemm1_clamp_limit=7.0)[0].impl)


FOLDER = "model_executor/layers/fused_moe"
TREE = {
    f"{FOLDER}/experts/triton_cutlass_moe.py": """
class TritonOrCutlassExperts(FallbackExperts):
    def __init__(self, moe_config): self.is_sm100 = False
""",
    f"{FOLDER}/experts/fallback.py": """
class FallbackExperts(mk.FusedMoEExpertsModular, ABC):
    def __init__(self, experts): self.experts = self.fallback_experts = experts
""",
    f"{FOLDER}/experts/cutlass_moe.py": """
def run_cutlass_moe_fp8(output, hidden_states, w1, w2, topk_ids, *, activation_config=None): ...
class CutlassExpertsFp8Base(mk.FusedMoEExpertsModular):
    def _get_permute_scratch(self): ...
    def _supports_anything(self): ...
class CutlassExpertsFp8(CutlassExpertsFp8Base):
    def apply(self): ...
""",
    f"{FOLDER}/moe_permute_unpermute.py": """
class MoEPermuteScratch:
    def reserve(self, expanded_rows): ...
""",
    f"{FOLDER}/prepare_finalize/no_dp_ep.py": """
class MoEPrepareAndFinalizeNoDPEPModular:
    def prepare(self, a1, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input, quant_config,
                defer_input_quant=False): ...
""",
}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "", ""),
        ("def apply", "def _scale_rows", "CutlassExpertsFp8 has _scale_rows, which rampwrap does not know"),
        ("(CutlassExpertsFp8Base)", "(Mixin)", "CutlassExpertsFp8 inherits from Mixin"),
        ("self.is_sm100", "self.norm", "TritonOrCutlassExperts has norm"),
        ("_get_permute_scratch(self)", "_get_permute_scratch(self, lane)", "_get_permute_scratch takes lane"),
        (
            "expanded_rows",
            "slots",
            "MoEPermuteScratch.reserve takes slots, which rampwrap does not know and takes no expanded_rows",
        ),
        ("w2, topk_ids", "w2, row_scale", "run_cutlass_moe_fp8 takes row_scale"),
        ("run_cutlass_moe_fp8", "run_moe", "run_cutlass_moe_fp8 is not in"),
        ("class FallbackExperts", "class Fallback", "FallbackExperts is not in"),
        ("expert_map, apply", "expert_map, lane, apply", "prepare takes lane"),
        ("def prepare", "def ready", "MoEPrepareAndFinalizeNoDPEPModular.prepare is not in"),
    ],
)
def test_the_contract(tmp_path, old, new, says):
    """What is new is a fault, said by name, and nothing else is."""
    for file, text in TREE.items():
        path = tmp_path / "vllm" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new) if old else text)
    found = vllm_cutlass.faults(tmp_path / "vllm")
    assert len(found) == (1 if says else 0) and all(says in one for one in found)


def test_what_vllm_runs_channels_with(monkeypatch):
    """Our table says that the hook sees it."""
    found = backends.backend_of("vllm", "fp8_channel")
    assert found is not None and found.hooked and found.name == backends.CUTLASS
