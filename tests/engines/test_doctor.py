"""`rampwrap doctor`: what it says would serve is what the hooks' own code takes, and its commands make what it misses."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

pytest.importorskip("triton")

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.cli.main import main
from rampwrap.engines import installed as installing
from rampwrap.engines import vllm_contract
from rampwrap.engines.backends import _ROWS, backend_of
from rampwrap.engines.defaults import PLANS_ONLY
from rampwrap.engines.installed import Installed
from rampwrap.kernel.device import SIMULATED, Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.plan import folder
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid

H100, H200 = Device("NVIDIA H100 80GB HBM3", 132), Device("NVIDIA H200", 132)
TINY = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2},
    **{"num_hidden_layers": 4, "first_k_dense_replace": 1, "hidden_act": "silu", "dtype": "bfloat16"},
}
SHAPE = MoEShape(8, 2, 128, 256)
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def plan_for(shape: MoEShape, device: Device = H100) -> Plan:
    kernel = TritonFusedMoE(shape)
    configs = tuple(config for config in kernel.configs if config["block_m"] == 16)[:2]
    rows = workload_grid([1, 4, 16], [Routing.parse(name) for name in ("uniform", "dirichlet:0.3", "hot:1")])
    counts = np.stack([expert_counts(row.topk_ids(shape.num_experts, shape.top_k), shape.num_experts) for row in rows])
    return make_plan(
        Timings(
            us=np.stack([100 + counts.max(axis=1), 90 + 2.0 * counts.max(axis=1)], axis=1),
            counts=counts[:, : shape.num_local_experts],
            split=("train",) * len(rows),
            label=tuple(row.label for row in rows),
            kernel=kernel.name,
            kernel_version=kernel.version,
            device=device,
            shape=shape,
            configs=configs,
            grids=tuple(kernel.grid(config, shape) for config in configs),
        )
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(SHAPE)


@pytest.fixture
def model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder for a config; beside it one for plans, and one for those of rampwrap."""
    for name in ("model", "plans", "shipped"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(folder.PLANS, str(tmp_path / "plans"))
    monkeypatch.setattr(folder, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr("rampwrap.engines.doctor.SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(installing, "_version", lambda engine: "")
    monkeypatch.delenv(folder.DISABLE, raising=False)
    monkeypatch.setenv(PLANS_ONLY, "1")
    monkeypatch.setenv("RAMPWRAP_CUTE_LIBRARY", str(tmp_path / "nowhere"))
    return tmp_path / "model"


@pytest.fixture
def ask(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """``ask(config, *options)``: the exit code, the JSON object, and the text."""

    def run(config: dict[str, Any], *options: str) -> tuple[int, dict[str, Any], str]:
        (model / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        status = main(["doctor", str(model), *options, "--json"])
        said = capsys.readouterr()
        assert main(["doctor", str(model), *options]) == status, said
        return status, json.loads(said.out), capsys.readouterr().out

    return run


def test_every_layer_is_served(model: pathlib.Path, ask: Any, plan: Plan) -> None:
    path = model.parent / "plans" / "a.plan.json"
    plan.save(path)
    status, found, text = ask(TINY)
    (alike,) = found["layers"]
    (served,) = alike["served"]
    assert status == 0 and found["served"] and alike["layers"] == [1, 2, 3] and alike["backend"]["name"] == "Triton"
    assert (served["gpu"], served["kernel"], served["plan"]) == (H100.label, "triton_fused_moe", str(path))
    assert served["source"] == "own" and "every layer is served" in text and "3 layers, E=8" in text
    assert "; on Hopper vLLM itself runs them with Triton" in text
    assert ask(TINY, "--gpu", "H100")[0] == ask(TINY, "--gpu", "nvidia h100 80gb hbm3")[0] == 0


def test_the_command_it_names_makes_what_is_missing(model: pathlib.Path, ask: Any, obey: Callable[[str], int]) -> None:
    status, found, text = ask(TINY, "--tp-size", "2")
    assert status == 1 and not found["served"] and "there is no plan" in text and "--tp-size 2" in text
    assert obey(text.splitlines()[2]) == 0
    status, found, _ = ask(TINY, "--tp-size", "2")
    assert status == 0 and found["layers"][0]["served"][0]["gpu"] == SIMULATED.label


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_defaults_serve_without_a_plan(
    model: pathlib.Path, ask: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """On a Hopper whose CuTe kernels are built, unless the switch is set; a plan goes first. transformers' layers have Triton's."""
    status, found, text = ask(TINY, "--engine", engine, "--gpu", "H200")
    assert status == (engine == "vllm") and ("nor do defaults serve" in text) == (engine == "vllm")
    assert found["layers"][0]["served"][0]["kernel"] == {"vllm": "", "transformers": "triton_fused_moe"}[engine]

    class Built:
        name = "cute_moe"

    asked: list[tuple[MoEShape, str]] = []
    monkeypatch.setattr(
        "rampwrap.engines.doctor.kernel_without_plan",
        lambda shape, device, kernels: (asked.append((shape, device.name)), Built)[1],
    )
    status, found, text = ask(TINY, "--engine", engine, "--gpu", "H200")
    (served,) = found["layers"][0]["served"]
    assert status == 0 and found["served"] and asked[0] == (SHAPE, "NVIDIA H200")
    assert (served["kernel"], served["plan"], served["source"]) == ("cute_moe", "", "defaults")
    assert "there is no plan" in served["reason"] and f"rampwrap profile --engine {engine}" in served["remedy"]
    assert "cute_moe by its defaults: there is no plan in" in text and "every layer is served on NVIDIA H200" in text
    attrs.evolve(plan, device=H200).save(model.parent / "plans" / "a.plan.json")
    assert ask(TINY, "--engine", engine, "--gpu", "H200")[1]["layers"][0]["served"][0]["source"] == "own"


def test_the_triton_kernels_defaults_need_nothing_built(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM on a Hopper."""
    monkeypatch.delenv(PLANS_ONLY)
    status, found, _ = ask(TINY, "--gpu", "H200")
    (served,) = found["layers"][0]["served"]
    assert status == 0 and (served["kernel"], served["source"]) == ("triton_fused_moe", "defaults")
    assert ask(TINY, "--gpu", "A100")[0] == 1


def test_without_a_gpu_or_a_plan_hoppers_are_looked_at(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines whose layers defaults serve, so that a model without a plan is not called unserved."""
    monkeypatch.delenv(PLANS_ONLY)
    for engine in ("vllm", "transformers"):
        status, found, _ = ask(TINY, "--engine", engine)
        served = found["layers"][0]["served"]
        assert status == 0 and [its["gpu"] for its in served] == [H100.label, H200.label], engine
        assert {its["source"] for its in served} == {"defaults"}


def test_one_gpu_of_several(model: pathlib.Path, ask: Any, plan: Plan) -> None:
    """Without a name all that there are plans of these layers for are looked at."""
    plan.save(model.parent / "shipped" / "a.plan.json")
    other = attrs.evolve(plan, device=H200, kernel_version="0")
    other.save(model.parent / "plans" / "b.plan.json")
    plan_for(attrs.evolve(SHAPE, hidden_size=256), Device("of other layers", 1)).save(
        model.parent / "plans" / "c.plan.json"
    )
    status, found, text = ask(TINY)
    by_gpu = {its["gpu"]: its for its in found["layers"][0]["served"]}
    assert status == 1 and set(by_gpu) == {H100.label, H200.label}
    assert by_gpu[H100.label]["source"] == "rampwrap" and "came with rampwrap" in text
    assert not by_gpu[H200.label]["kernel"] and "kernel version 0" in by_gpu[H200.label]["reason"]
    assert ask(TINY, "--gpu", "h200")[0] == 1
    status, found, text = ask(TINY, "--gpu", "h100")
    assert status == 0 and text.endswith("every layer is served on NVIDIA H100 80GB HBM3 (132 SMs)\n")


def test_a_gpu_that_nobody_knows(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_text(json.dumps(TINY))
    assert main(["doctor", str(model), "--gpu", "H300"]) == 1
    assert "device 'H300' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "options", "backend", "says"),
    [
        (BLOCKS, ("--tp-size", "2", "--ep"), "FlashInfer CUTLASS", "start it with --moe-backend triton"),
        (BLOCKS, ("--engine", "transformers"), None, "runs experts in bf16"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, (), "Humming", "quant_method='gptq'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ("--engine", "sglang"), "Marlin", "'awq'"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, (), "triton_kernels", "biases"),
        ({"hidden_act": "relu2"}, (), "Triton", "relu2"),
        ({}, ("--tp-size", "3"), "Triton", "do not divide"),
    ],
)
def test_layers_that_stay_with_the_engine(
    more: dict[str, Any], options: tuple[str, ...], backend: str | None, says: str, model: pathlib.Path, ask: Any
) -> None:
    plan_for(attrs.evolve(SHAPE, dtype="fp8")).save(model.parent / "plans" / "a.plan.json")
    status, found, text = ask(TINY | more, *options)
    (alike,) = found["layers"]
    assert status == 1 and says in alike["reason"] and says in text
    assert (alike["backend"] or {"name": None})["name"] == backend or alike["backend"]["name"].startswith(backend)


def test_vllm_told_to_run_its_own_triton(model: pathlib.Path, ask: Any) -> None:
    shape = attrs.evolve(SHAPE, dtype="fp8", num_local_experts=4)
    plan_for(shape).save(model.parent / "plans" / "a.plan.json")
    assert ask(TINY | BLOCKS, "--tp-size", "2", "--ep")[0] == 1
    assert ask(TINY | BLOCKS, "--tp-size", "2", "--ep", "--moe-backend", "triton")[0] == 0


CHANNELS = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "a": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
            "input_activations": {"type": "float", "num_bits": 8, "strategy": "token"},
        }
    },
}


@pytest.mark.parametrize(
    ("stored", "options", "backend", "status"),
    [
        (CHANNELS, (), "vLLM's CUTLASS", 0),
        ({"quant_method": "fp8"}, (), "Triton", 0),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (), "FlashInfer CUTLASS", 1),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ("--moe-backend", "triton"), "Triton", 0),
    ],
)
def test_fp8_by_channel_and_by_tensor(
    stored: dict[str, Any],
    options: tuple[str, ...],
    backend: str,
    status: int,
    model: pathlib.Path,
    ask: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an H100 our Triton kernel's defaults serve what vLLM runs with its CUTLASS or Triton; not what FlashInfer's runs."""
    monkeypatch.delenv(PLANS_ONLY)
    found = ask(TINY | {"quantization_config": stored}, "--gpu", "h100", *options)
    (alike,) = found[1]["layers"]
    assert found[0] == status and alike["backend"]["name"] == backend
    assert ("--moe-backend triton" in alike["reason"]) == bool(status)
    if not status:
        assert {(its["kernel"], its["source"]) for its in alike["served"]} == {("triton_fused_moe", "defaults")}


def test_only_some_layers(model: pathlib.Path, ask: Any, plan: Plan) -> None:
    """A layer of another size lacks its plan; all others are served, and that is not enough."""
    plan.save(model.parent / "plans" / "a.plan.json")
    status, found, _ = ask(TINY | {"moe_intermediate_size": [512, 256, 256, 512]})
    served = {tuple(its["layers"]): bool(its["served"][0]["kernel"]) for its in found["layers"]}
    assert status == 1 and served == {(1, 2): True, (3,): False}


def test_hooks_that_know_local_experts_alone(model: pathlib.Path, ask: Any) -> None:
    """transformers' and SGLang's see a layer of few experts; a plan made by hand for one serves, one of all does too."""
    here = attrs.evolve(SHAPE, num_experts=4, num_local_experts=4)
    plan_for(here).save(model.parent / "plans" / "a.plan.json")
    assert ask(TINY, "--engine", "transformers", "--tp-size", "2", "--ep")[0] == 0
    assert ask(TINY, "--engine", "vllm", "--tp-size", "2", "--ep")[0] == 1
    assert ask(TINY, "--engine", "sglang", "--tp-size", "2", "--ep")[0] == 1  # of another kernel


@pytest.mark.parametrize(("engine", "version"), [("vllm", "0.25.1"), ("sglang", "0.5.16"), ("transformers", "4.57.1")])
def test_an_engine_whose_hook_stands_aside(
    engine: str, version: str, model: pathlib.Path, ask: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.save(model.parent / "plans" / "a.plan.json")
    monkeypatch.setattr(installing, "_version", lambda engine: version)
    monkeypatch.setattr(vllm_contract, "sources", lambda: model)  # a release by its number alone
    (model / "_version.py").write_text(f"__version__ = '{version}'")
    status, found, text = ask(TINY, "--engine", engine)
    assert status == 1 and found["engine"]["faults"] and f"{version} as it is" in text


def test_the_kill_switch_is_a_fault(model: pathlib.Path, ask: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan.save(model.parent / "plans" / "a.plan.json")
    monkeypatch.setenv(folder.DISABLE, "1")
    status, found, _ = ask(TINY)
    assert status == 1 and found["engine"]["faults"] == ["RAMPWRAP_DISABLE is set"]


def test_backends_by_release() -> None:
    for version, name in (
        ("0.26.0", "Marlin"),
        ("0.31.2", "Marlin"),
        ("0.32.0", "Humming"),
        ("1.0", "Humming"),
        ("", "Humming"),
    ):
        found = backend_of("vllm", "int4", version=version)
        assert found is not None and found.name == name
    assert backend_of("sglang", "mxfp4", kinds=("deepseek_v4",)).name == "FlashInfer MXFP4"  # type: ignore[union-attr]
    assert backend_of("sglang", "mxfp4") is None and backend_of("transformers", "fp8_block") is None
    # What stands in no form's name would never be found.
    from rampwrap.checkpoint.quantisation import FORMS

    assert {form for row in _ROWS for form in row.forms} <= set(FORMS)


def test_what_is_installed() -> None:
    assert str(Installed("vllm")) == "vLLM, which is not installed here"
    Installed("vllm", "", ("x",)).check()
    Installed("vllm", "0.33.0").check()
