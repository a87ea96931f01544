"""The serving benchmark's own arithmetic: whose kernels are whose, what the plugin costs, what its models start from."""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.checkpoint.model import read_layers
from rampwrap.engines import vllm_layer
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.join import join
from rampwrap.measure.timings import Timings
from rampwrap.plan import folder

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
if not (FOLDER / "serve_vllm.py").exists():
    pytest.skip("the wheel is tested without benchmarks", allow_module_level=True)


@pytest.fixture(scope="module")
def scripts():
    """The four modules by name, as they find each other when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {
            name: importlib.import_module(name)
            for name in ("serve_vllm", "serve_vllm_arm", "serve_vllm_report", "serve_vllm_setup")
        }
    finally:
        sys.path.remove(str(FOLDER))


# One layer of an FP8 model in the installed arm, and with the plugin; names as the profiler gives them.
QUANTISE = "void per_token_group_quant_8bit_kernel<c10::BFloat16, c10::Float8_e4m3fn, true, false, float>(void const*)"
CUTLASS = "void cutlass::device_kernel<vllm::cutlass_3x_gemm_fp8_blockwise<cutlass::bfloat16_t, 1, 128, 128>>"
DENSE = [(QUANTISE, False), (CUTLASS, False), ("void vllm::rms_norm_kernel<c10::BFloat16>", False)]
INSTALLED = [
    *DENSE,
    ("nvjet_sm90_tst_64x8", False),
    (QUANTISE, True),
    ("void vllm::moe::moe_align_block_size_kernel<int>", True),
    ("void vllm::moe::count_and_sort_expert_tokens_kernel<int>", True),
    ("fused_moe_kernel", True),
    ("void vllm::silu_and_mul_per_block_quant_kernel<c10::BFloat16>", True),
    ("fused_moe_kernel", True),
    ("void vllm::moe::moe_sum_vec_kernel<c10::BFloat16, int, 8, false>", True),
    *DENSE,
]
NAME = "kernel_cutlass_kernel_rampwrapkernelscute"
PLUGIN = [
    *DENSE,
    ("prepare_kernel", True),
    (f"{NAME}upUpFp8_object_at__TiledMMA_ThrLayoutVMNK", True),
    (f"{NAME}downDownFp8_object_at__TiledMMA", True),
    ("sum_after_kernel", True),
    *DENSE,
    ("kernel_cutlass_kernel_flash_attncuteflash_fwd", False),
]


@pytest.mark.parametrize("launches", [INSTALLED, PLUGIN], ids=["installed", "plugin"])
def test_whose_kernel_is_whose(scripts, launches):
    """Quantisation of the experts' input is theirs, that of dense layers is not; no CUTLASS but ours is."""
    names = [name for name, _ in launches]
    assert scripts["serve_vllm_arm"].of_experts(names) == [own for _, own in launches]


def test_small_batches_of_vllm(scripts):
    """The fill in place of the alignment is the experts' where their kernel follows, and so is what comes before it."""
    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>"
    names = [fill, CUTLASS, QUANTISE, fill, "fused_moe_kernel"]
    assert scripts["serve_vllm_arm"].of_experts(names) == [False, False, True, True, True]


class Event:
    def __init__(self, name, start, us):
        self.name, self.device_type = name, torch.autograd.DeviceType.CUDA
        self.time_range = type("Range", (), {"start": start, "end": start + us})()


def test_shares_by_start(scripts):
    """Sorted by start, the router's stand-in left out, whatever order the profiler reports."""
    events = [Event("fused_moe_kernel", 30, 6.0), Event(QUANTISE, 10, 1.0), Event(CUTLASS, 40, 3.0)]
    events.append(Event("take_choices", 20, 99.0))
    kernels = type("Profile", (), {"events": lambda self: events})()
    found = scripts["serve_vllm_arm"].shares(kernels, 2)
    assert found["gpu_us"] == 5.0 and found["moe_us"] == 3.5 and found["moe_share"] == 0.7
    assert set(found["moe_kernels"]) == {"fused_moe_kernel", QUANTISE[:80]}


def test_shares_count_overlapping_kernels_once(scripts):
    """A kernel that was launched early counts from the end of the one that it waited for."""
    events = [
        Event("up_kernel", 10, 6.0),
        Event("down_kernel", 11, 9.0),
        Event("sum_kernel", 12, 3.0),
        Event(CUTLASS, 21, 1.0),
    ]
    kernels = type("Profile", (), {"events": lambda self: events})()
    found = scripts["serve_vllm_arm"].shares(kernels, 1)
    assert found["gpu_us"] == 11.0 and found["moe_us"] == 10.0


def test_costs_of_the_plugin(scripts):
    """Differences to the installed engine; medians over restarts; nothing where an arm is missing."""

    def memory(reserved):
        return {"reserved_gb": reserved, "allocated_gb": reserved - 1, "peak_gb": reserved, "card_gb": 150.0}

    def started(wall, device, own=0.0, compiling=0.0):
        its = {"wall_s": wall, "engine_s": wall - 10, "device_gb": device}
        return memory(20.0) | its | {"plugin_s": own, "moe_compile_s": compiling}

    result = {
        "memory": {"installed": memory(30.0), "plugin": memory(31.5)},
        "starts": {
            "installed": started(95, 0, 0.0, 3.0),
            "plugin": started(99, 0, 2.0, 4.5),
            "installed again": started(50, 33.0),
            "plugin again": started(53, 33.3, 0.4),
            "installed again1": started(52, 33.0),
            "plugin again1": started(54, 33.3, 0.5, 0.1),
        },
    }
    costs = scripts["serve_vllm_report"].costs
    found = costs(result, "plugin")
    assert found["reserved_gb"] == 1.5 and found["reserved_share"] == pytest.approx(0.01)
    assert found["wall_s"] == found["engine_s"] == 2.5 and found["plugin_s"] == pytest.approx(0.5)
    assert found["first_s"] == 3.5 and found["first_wall_s"] == 4
    assert found["device_gb"] == pytest.approx(0.3) and found["device_share"] == pytest.approx(0.002)
    assert costs({"memory": {"plugin": memory(1.0)}, "starts": {"plugin": started(9, 0)}}, "plugin") == {}


def test_cold_caches_are_of_one_arm(scripts, tmp_path):
    """Each that an engine's start fills, and none of another arm's."""
    setup = scripts["serve_vllm_setup"]
    arms = [setup.environment_of(arm, tmp_path, "0", cold=True) for arm in setup.ARMS]
    found = {its[name] for its in arms for name in setup.CACHES}
    assert len(found) == len(setup.ARMS) * len(setup.CACHES)
    assert setup.environment_of("plugin", tmp_path, "0").get("VLLM_CACHE_ROOT") == os.environ.get("VLLM_CACHE_ROOT")


def test_compiled_kernels_are_told_from_cached_ones(scripts, monkeypatch):
    """Of Triton's own listener: what compiling took, of the experts' kernels alone."""
    triton = scripts["serve_vllm_arm"].triton
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    compiled, took = scripts["serve_vllm_arm"].Compiled(), types.SimpleNamespace(total=500_000)
    for name, hit in (("up_kernel", False), ("fused_moe_kernel", True), ("triton_poi_fused_add", False)):
        triton.knobs.compilation.listener(src=types.SimpleNamespace(name=name), times=took, cache_hit=hit, metadata={})
    assert (compiled.seconds, compiled.kernels) == (0.5, 1)


def test_the_fp8_model(scripts, tmp_path, monkeypatch):
    """Its config is one that the plugin serves, its tables are of its shape, and vLLM finds the static table."""
    setup = scripts["serve_vllm_setup"]
    model = setup.MODELS["qwen3-30b-fp8"]
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    (shape,) = read_layers(tmp_path).shapes
    assert shape == MoEShape(128, 8, 2048, 768, "fp8")
    for table, kernel in ((model.timings[0], "cute_moe"), (model.static, "vllm_fused_moe")):
        timings = Timings.load(setup.ROOT / table)
        assert (timings.shape, timings.kernel) == (shape, kernel)
    static = json.loads(setup.static_file(setup.ROOT / model.static, "qwen3-30b-fp8"))
    assert static["64"]["BLOCK_SIZE_K"] == 128
    assert setup.config_file_name(shape, "NVIDIA H200").endswith("dtype=fp8_w8a8,block_shape=[128,128].json")
    monkeypatch.delenv("VLLM_USE_DEEP_GEMM", raising=False)
    arms = [setup.environment_of(arm, tmp_path, "0") for arm in setup.ARMS]
    assert {its["VLLM_USE_DEEP_GEMM"] for its in arms} == {"0"}
    arms = [setup.environment_of(arm, tmp_path, "0", deep_gemm=True) for arm in setup.ARMS]
    assert {(its.get("VLLM_USE_DEEP_GEMM"), its["VLLM_DEEP_GEMM_WARMUP"]) for its in arms} == {(None, "skip")}
    arguments = argparse.Namespace(mode="default", capture_sizes=None, batch_size=[8], layers=None, prompts=[8192])
    made = {"config": model.config, "shape": shape}
    settings = {arm: setup.settings_of("qwen3-30b-fp8", made, tmp_path, arguments, arm) for arm in setup.ARMS}
    assert all(its["fp8"] and its["max_model_len"] == 8200 for its in settings.values())
    assert {arm for arm, its in settings.items() if its["options"].get("moe_backend") == "deep_gemm"} == {"deep_gemm"}
    # Routers stay in bf16, as in the published checkpoint.
    left = model.config["quantization_config"]["modules_to_not_convert"]
    assert len([name for name in left if name.endswith("mlp.gate")]) == model.config["num_hidden_layers"]


@pytest.mark.parametrize("name", ["olmoe", "qwen3-30b"])
def test_the_bf16_models_cross_kernels(scripts, name):
    """Tables of both kernels, of this version, over the same workloads."""
    setup = scripts["serve_vllm_setup"]
    timings = join([Timings.load(setup.ROOT / table) for table in setup.MODELS[name].timings])
    assert timings.kernel == vllm_layer.BOTH and len(timings.us) == 130 and not np.isnan(timings.us).any()
    current = "+".join((TritonFusedMoE.version, CuteFusedMoE.version))
    assert timings.kernel_version == current


def test_a_quiet_cpu_is_found_and_left_again(scripts):
    """One of those asked for; the thread that looks stays where it was."""
    serve = scripts["serve_vllm"]
    before = os.sched_getaffinity(0)
    assert serve.quietest(sorted(before)) in before and os.sched_getaffinity(0) == before
    asked = []
    serve.settle({name: lambda do, **more: asked.append((do, more)) for name in "ab"}, sorted(before)[:1])
    serve.settle({"c": None}, [])
    assert asked == [("pin", {"cpus": sorted(before)[:1]})] * 2


def test_dummy_weights_of_fp8_layers(scripts, monkeypatch):
    """Finite, hardly a zero, and only FP8 tensors."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(3, 64, 128).to(torch.float8_e4m3fn), requires_grad=False)
    layer.scale = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: randn(1 << 12))
    assert scripts["serve_vllm_arm"].fill_fp8(layer) == 1
    filled = layer.weight.float()
    assert filled.isfinite().all() and (filled != 0).float().mean() > 0.99 and not layer.scale.any()
    assert float(filled.std()) == pytest.approx(64, rel=0.05)


def test_gains_of_prefill_compare_turns(scripts, capsys):
    """Each turn with the other arm's of the same turn; GPU time apart."""
    rows = []
    for turn, slow in enumerate((1.0, 3.0)):  # the host of the second turn is three times as slow, for both arms
        for arm, ms in (("installed", 50.0), ("plugin", 40.0)):
            row = {"arm": arm, "round": 0, "turn": turn, "routing": "uniform", "prompt": 8192, "requests": 1}
            rows.append(row | {"what": "prefill", "tokens_per_s": 8192e3 / (ms * slow), "ms": [ms * slow]})
    rows += [
        {"arm": arm, "what": "prefill share", "routing": "uniform", "prompt": 8192, "requests": 1, "gpu_us": us}
        for arm, us in (("installed", 33000.0), ("plugin", 30000.0))
    ]
    arguments = argparse.Namespace(routing=["uniform"], prompts=[8192])
    gains = scripts["serve_vllm_report"].report_prefill(rows, ["installed", "plugin"], arguments)
    assert gains["uniform"]["installed"] == pytest.approx({"tokens/s": 1.25, "worst": 1.25, "GPU time": 1.1})
    assert "1.250x" in capsys.readouterr().out


class FakeArm:
    """An engine that answers at once, the plugin's 10 % faster; one name does not start."""

    def __init__(self, name, settings, environment, log):
        self.name, self.log = name, log
        log.write_text("rampwrap leaves vLLM's MoE layers as they are\n")
        self._plans = environment.get(folder.PLANS)
        self._speed = 1100.0 if self._plans else 1000.0

    def started(self):
        if self.name == "deep_gemm":
            raise RuntimeError("the engine of arm 'deep_gemm' ended with 1")
        return {"wall_s": 40.0, "engine_s": 30.0, "plugin_s": 1.0, "moe_compile_s": 0.0, "card_gb": 80.0}

    def __call__(self, do, **more):
        if do == "choices":
            plans = [path for path, _ in folder.Plans.read(self._plans).found] if self._plans else []
            defaults = ["E=64 top_k=8"] if self.name in ("plugin_triton", "plugin_defaults") else []
            its = {"layers": 16, "plans": plans[:1], "defaults": defaults, "kernels": ["cute_moe"]}
            return {"engines": [its] if plans or defaults else []}
        if do == "memory":
            return {"reserved_gb": 1.0, "allocated_gb": 1.0, "peak_gb": 1.0, "card_gb": 80.0}
        us = 1e6 / self._speed
        return {"tokens_per_s": self._speed, "ms": [1.0], "gpu_us": us, "moe_us": us / 2}

    def stop(self):
        pass


def test_a_run_says_which_plan_serves_and_goes_on_without_an_engine(scripts, monkeypatch, tmp_path, capsys):
    """On a GPU that no plan of rampwrap is for, others stand in under its name, and the run says so."""
    serve, setup = scripts["serve_vllm"], scripts["serve_vllm_setup"]
    here = Device("A GPU", 132)
    monkeypatch.setattr(serve, "Arm", FakeArm)
    for module in (serve, setup):
        monkeypatch.setattr(module, "device_on", lambda gpu: here)
    monkeypatch.setattr(serve, "free_gb", lambda gpu: 900.0)
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", "--shipped-plans", "--stand-in", "--models", "olmoe"])
    sys.argv += [
        "--batch-size",
        "64",
        "--arms",
        *setup.ARMS,
        "--routing",
        "uniform",
        "--rounds",
        "1",
        "--turns",
        "2",
        "--prompts",
        "512",
    ]
    sys.argv += ["--logs", str(tmp_path / "logs"), "--out", str(tmp_path / "out.json")]
    assert serve.main() == 1  # an engine did not start
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["failures"] == ["olmoe: the engine of arm 'deep_gemm' ended with 1"]
    served = found["models"]["olmoe"]["served"]
    assert (
        set(served) == {"plugin", "plugin_triton", "plugin_defaults"}
        and "matched by the GPU's name (A GPU (132 SMs))" in served["plugin"][0]
    )
    assert served["plugin_triton"][1:] == ["defaults of cute_moe for E=64 top_k=8 on A GPU (132 SMs), without a plan"]
    assert served["plugin_defaults"] == served["plugin_triton"][1:]
    gains = found["models"]["olmoe"]["gains"]["uniform"]
    assert gains["installed"]["all"] == pytest.approx(1.1) and gains["plugin_triton"]["GPU time"] == pytest.approx(1.0)
    said = capsys.readouterr().out
    assert "rampwrap brings no plan for A GPU (132 SMs); portfolio-triton_fused_moe+cute_moe-NVIDIA_H200" in said
    assert "16 layers, " in said and "prefill, uniform" in said
    environment = setup.environment_of("plugin_triton", tmp_path, "0")
    assert environment[setup.VARIABLE] != os.environ.get(setup.VARIABLE) and setup.PLANS in environment


def test_plans_that_rampwrap_brings_need_no_stand_in(scripts, tmp_path):
    setup = scripts["serve_vllm_setup"]
    h200, shape = Device("NVIDIA H200", 132), MoEShape(64, 8, 2048, 1024)
    setup.stand_in(shape, tmp_path, h200)
    assert not list(tmp_path.iterdir())
    fit = folder.Plans.read(folder.SHIPPED).find(shape, h200, ("triton_fused_moe",))
    assert "comes with rampwrap, matched by the GPU's name" in setup.match(fit.path, h200)


@pytest.mark.parametrize("scales", ["channel", "static"])
def test_the_models_with_other_scales(scripts, monkeypatch, tmp_path, scales):
    """By channel vLLM runs CUTLASS as installed, and the plugin stands in for that; a plan is profiled in the run, or defaults serve."""
    setup, name = scripts["serve_vllm_setup"], f"qwen3-30b-fp8-{scales}"
    made, called = {}, []
    monkeypatch.setattr(setup, "device_on", lambda gpu: Device("NVIDIA H200", 132))
    monkeypatch.setattr(setup, "profiled", lambda *its: called.append(its[-1]))
    arguments = {
        "mode": "default",
        "capture_sizes": None,
        "batch_size": [8],
        "layers": 4,
        "prompts": [],
        "timings": None,
    }
    arguments = argparse.Namespace(**arguments, profile_budget=60.0, shipped_plans=False)
    made = setup.prepare(name, tmp_path, arguments, "0")
    assert made["shape"] == MoEShape(128, 8, 2048, 768, "fp8", scales=scales) and called == ["triton_fused_moe"]
    without = argparse.Namespace(**vars(arguments) | {"profile_budget": None, "shipped_plans": True, "stand_in": False})
    assert setup.prepare(name, tmp_path / "2", without, "0")["shape"] == made["shape"]
    assert len(called) == 1
    options = {
        arm: setup.settings_of(name, made, tmp_path, arguments, arm)["options"].get("moe_backend")
        for arm in ("installed", "vllm_triton", "plugin")
    }
    assert options == {"installed": None, "vllm_triton": "triton", "plugin": None}
    names = ["cub::detail::radix_sort::DeviceRadixSortSingleTileKernel", "void expandInputRowsKernel<bf16>"]
    names += ["void cutlass::device_kernel<(anonymous namespace)::cutlass_3x_group_gemm<cutlass::float_e4m3_t>>"]
    names += ["void vllm::dynamic_per_token_scaled_fp8_quant_kernel_strided<c10::BFloat16>", "compute_expert_offsets"]
    assert scripts["serve_vllm_arm"].of_experts(names) == [True] * 5
    assert (
        scripts["serve_vllm_arm"].of_experts([names[3], "void cutlass::device_kernel<vllm::cutlass_3x_gemm<>>"])
        == [False] * 2
    )
