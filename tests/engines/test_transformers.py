"""transformers' experts layers on our kernel: same results as the built-in ones, or the built-in ones with the reason."""

import copy
import importlib.metadata
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")
pytest.importorskip("triton")

from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import rampwrap
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.engines import transformers as engine
from rampwrap.engines import transformers_layer
from rampwrap.errors import InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import OneWarning
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid

DEVICE = "cpu" if INTERPRETED.value else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 and there is no GPU", allow_module_level=True)

SHAPE = MoEShape(8, 2, 64, 32)
TINY = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
TINY |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
DEEPSEEK = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {**MOE, "intermediate_size": 48, "num_experts": 8, "head_dim": 16},
    "Mixtral": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    "DeepseekV3": {**MOE, **DEEPSEEK, "intermediate_size": 48},
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "GptOss": ({"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}, "biases"),
    "Olmoe": ({**FAMILIES["Olmoe"], "hidden_act": "gelu"}, "GELU"),
}


def model_of(family: str, sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY, **sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(DEVICE, dtype).eval()


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate"))


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def inputs(num_tokens: int = 9, experts: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 64, generator=generator).to(torch.bfloat16)
    weights, ids = torch.rand(num_tokens, experts, generator=generator).topk(2)
    return x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE, dtype)


def save_plan(folder: pathlib.Path, shape: MoEShape = SHAPE, name: str = "tiny") -> pathlib.Path:
    """A plan of a config for each block_m: high blocks are faster where few experts have many tokens."""
    kernel = TritonFusedMoE(shape)
    configs, seen = [], set()
    for config in kernel.configs:
        if config["block_m"] not in seen and config.get("split_k", 1) == 1:
            seen.add(config["block_m"])
            configs.append(config)
    names = ("uniform", "dirichlet:0.3", "dirichlet:0.1", "hot:1")
    rows = workload_grid([1, 4, 16, 64, 256], [Routing.parse(routing) for routing in names])
    counts = np.stack([expert_counts(w.topk_ids(shape.num_experts, shape.top_k), shape.num_experts) for w in rows])
    grids = tuple(kernel.grid(config, shape) for config in configs)
    heights = [config["block_m"] for config in configs]
    us = np.array([[100 + 2 * height + 100 * np.ceil(row / height).sum() for height in heights] for row in counts])
    split, label = tuple(w.split for w in rows), tuple(w.label for w in rows)
    table = Timings(
        us, counts, split, label, kernel.name, Device.current(), shape, tuple(configs), grids, kernel.version
    )
    path = folder / f"{name}.plan.json"
    make_plan(table).save(path)
    return path


def forget() -> None:
    """What was found out about the installed transformers."""
    transformers_layer._installation.cache_clear()
    transformers_layer.mismatch.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """No plans but those of the test, and warnings not yet said."""
    monkeypatch.setenv("RAMPWRAP_PLANS", str(tmp_path / "plans"))
    monkeypatch.delenv("RAMPWRAP_DISABLE", raising=False)
    (tmp_path / "plans").mkdir()
    monkeypatch.setattr(engine, "_serving", None)
    forget()
    monkeypatch.setattr(engine, "_warn", OneWarning(logging.getLogger("rampwrap")))
    torch._dynamo.reset()
    ExpertsInterface.register("rampwrap", engine.experts_forward)
    yield


def ran() -> int:
    """Launches so far, by host counters and by tallies."""
    total = 0
    for service in engine.serving().services.values():
        total += sum(service.dispatcher.launch_counts)
        total += (
            0 if service.graph_dispatcher is None else sum(row.steps for row in service.graph_dispatcher.telemetry())
        )
    return total


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """bf16 keeps 8 bits; sums of a few roundings of different order differ by a few of the last."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    off = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert off < 0.01, off


@pytest.mark.parametrize(("family", "planned"), [*((family, False) for family in FAMILIES), ("Olmoe", True)])
def test_a_model_gives_the_logits_of_the_built_in_experts(family: str, planned: bool, tmp_path: pathlib.Path) -> None:
    if planned:
        save_plan(tmp_path / "plans")
    model, ids = model_of(family, FAMILIES[family]), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_experts_implementation("rampwrap")
        close(model(ids).logits, expected)
        layers = sum(hasattr(module, "gate_up_proj") and hasattr(module, "has_gate") for module in model.modules())
        assert ran() == layers
        # Greedy decoding: one step of prefill, then batches of one token a sequence.
        made = model.generate(ids, max_new_tokens=2, do_sample=False)
        assert made.shape == (2, 9) and ran() == 3 * layers
    (service,) = engine.serving().services.values()
    assert service.shape == SHAPE and (service.graph_dispatcher is not None) == planned


def test_the_plan_chooses_by_the_routing(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    model = model_of("Olmoe", FAMILIES["Olmoe"])
    engine.register(tmp_path / "plans", model=model)
    module, theirs = experts_of(model), ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    x, _, weights = inputs(64)
    with torch.no_grad():
        for ids in (inputs(64)[1], torch.zeros_like(inputs(64)[1]) + torch.tensor([3, 5], device=DEVICE)):
            close(engine.experts_forward(module, x, ids, weights), theirs(module, x, ids, weights))
    (service,) = engine.serving().services.values()
    assert service.graph_dispatcher is not None
    (row,) = service.graph_dispatcher.telemetry()
    assert row.layer == "model.layers.0.mlp.experts" and row.steps == 2
    assert len([count for count in row.counts.values() if count]) == 2, row
    (source,) = [s for s in rampwrap.stats()["sources"] if row.layer in {entry["layer"] for entry in s["layers"]}]
    (entry,) = source["layers"]
    assert entry["drift"] == 0 and entry["chosen_us"] < entry["static_us"] and len(entry["configs"]) == 2


def test_layers_keep_records_of_their_own(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    model = model_of("Qwen3Moe", FAMILIES["Qwen3Moe"])
    model.set_experts_implementation("rampwrap")
    with torch.no_grad():
        model(tokens())
    (service,) = engine.serving().services.values()
    assert service.graph_dispatcher is not None
    assert {row.layer for row in service.graph_dispatcher.telemetry()} == {"experts.0", "experts.1"}


@pytest.mark.parametrize(
    ("dtype", "planned"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float64, True)]
)
def test_remote_experts_are_dropped_and_any_weights_serve(
    dtype: torch.dtype, planned: bool, tmp_path: pathlib.Path
) -> None:
    if planned:
        save_plan(tmp_path / "plans")
    module, theirs = experts_of(model_of("Olmoe", FAMILIES["Olmoe"])), ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    x, ids, weights = inputs(21, dtype=dtype)
    ids[::2, 0] = 8  # the number of experts of this rank: an expert of another rank
    ids[3] = 8  # a token with nothing to do here
    module._is_expert_parallel = True  # without which transformers takes ids for its own, from 5.18 on
    with torch.no_grad():
        out = engine.experts_forward(module, x, ids, weights)
        close(out, theirs(module, x, ids, weights.float()))
        assert not out[3].any()
        close(engine.experts_forward(module, x, ids.int(), weights), out)
        close(engine.experts_forward(module, x, ids.t().contiguous().t(), weights), out)
        assert engine.experts_forward(module, x[:0], ids[:0], weights[:0]).shape == (0, 64)
    assert ran() >= 3


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_fall_back_with_the_reason(family: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes, said = OTHERS[family]
    model, ids = model_of(family, sizes), tokens()
    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        expected = model(ids).logits
        model.set_experts_implementation("rampwrap")
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert len(caplog.records) == 1 and said in caplog.text and "grouped_mm" in caplog.text
    assert not engine.serving().services


class Layer(torch.nn.Module):
    """An experts layer as transformers decorates it."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, **differently: Any) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(8, 64, 64, dtype=torch.bfloat16), requires_grad=False)
        self.down_proj = torch.nn.Parameter(torch.zeros(8, 64, 32, dtype=torch.bfloat16), requires_grad=False)
        if "act_fn" not in differently:  # a module's place cannot take a function
            self.act_fn = torch.nn.SiLU()
        for name, value in differently.items():
            setattr(self, name, value)


def parameter(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=grad)


@pytest.mark.parametrize(
    ("differently", "said"),
    [
        ({}, None),
        ({"act_fn": torch.nn.functional.silu}, None),
        ({"act_fn": torch.nn.functional.gelu}, "gelu, not SiLU"),
        ({"has_post_expert_norm": True}, "norm after each expert"),
        ({"has_gate": False}, "no gate"),
        ({"has_bias": True}, "biases"),
        ({"is_transposed": True}, "transposed"),
        ({"is_concatenated": False}, "interleaved"),
        ({"has_router_scale": False}, "flag has_router_scale=False is not known"),
        ({"is_sparse": 3}, "flag is_sparse=3 is not known"),
        ({"is_ready": lambda: True}, None),
        ({"down_proj_scale": parameter(8)}, "part down_proj_scale is not known"),
        ({"out_norm": torch.nn.LayerNorm(64)}, "part out_norm is not known"),
        ({"act_fn": torch.nn.GELU()}, "GELU"),
        ({"down_proj": parameter(8, 32, 64)}, "not contiguous"),
        ({"down_proj": parameter(8, 64, 32, dtype=torch.float16)}, "float16"),
        ({"gate_up_proj": parameter(8, 64, 64, grad=True)}, "gradients"),
        ({"gate_up_proj": parameter(1, 64, 64), "down_proj": parameter(1, 64, 32)}, "top_k=2"),
    ],
)
def test_a_refusal_names_what_is_different(differently: dict[str, Any], said: str | None) -> None:
    layer = Layer(**differently).to(DEVICE)
    x, ids, _ = inputs(3)
    found = transformers_layer.refusal(layer, x, ids)
    assert found is None if said is None else said in str(found)


def test_a_buffer_and_a_flag_of_the_class_are_refused() -> None:
    class Flagged(Layer):
        has_shared_scale = True

    layer = Layer()
    layer.register_buffer("limit", torch.zeros(1))
    for module, said in ((layer, "part limit"), (Flagged(), "flag has_shared_scale=True")):
        assert said in str(transformers_layer.refusal(module.to(DEVICE), *inputs(3)[:2]))


def test_a_gate_of_its_own_is_refused() -> None:
    class Clamped(Layer):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up

    assert "gate of its own" in str(transformers_layer.refusal(Clamped().to(DEVICE), *inputs(3)[:2]))


def test_float32_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("Olmoe", FAMILIES["Olmoe"], torch.float32)
    model.set_experts_implementation("rampwrap")
    with torch.no_grad():
        model(tokens())
    assert "torch.float32" in caplog.text


def test_training_falls_back_and_learns(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("Olmoe", FAMILIES["Olmoe"]).train()
    model.set_experts_implementation("rampwrap")
    model(tokens()).logits.float().square().mean().backward()
    assert experts_of(model).gate_up_proj.grad.abs().sum() > 0
    assert [record.args[-1][:9] for record in caplog.records] == ["gradients"]
    with torch.no_grad():
        model.eval()(tokens())
    assert ran() == 2


def test_compile_sees_one_operator(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    model = model_of("Qwen3Moe", FAMILIES["Qwen3Moe"])
    with torch.no_grad():
        expected = model(tokens()).logits, model(tokens(3, 5)).logits
        model.set_experts_implementation("rampwrap")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        close(compiled(tokens()).logits, expected[0])
        close(compiled(tokens(3, 5)).logits, expected[1])
    assert ran() == 4


def test_each_layer_is_asked_while_tracing_by_constants(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch 2.11, our floor, raises where a function of a constant result takes a module; 2.13 takes it. Held to the floor's rule here."""
    from torch._dynamo.variables import functions

    asked, invoke = [], functions.invoke_and_store_as_constant

    def strictly(tx: Any, function: Any, name: str, given: Any, named: Any) -> Any:
        asked.append(function.__name__)
        for argument in (*given, *named.values()):
            assert argument.is_python_constant(), f"{function.__name__}({argument})"
        return invoke(tx, function, name, given, named)

    monkeypatch.setattr(functions, "invoke_and_store_as_constant", strictly)
    layers = [copy.deepcopy(experts_of(model_of("Olmoe", FAMILIES["Olmoe"]))) for _ in range(4)]
    layers[1].has_router_scale = False
    layers[3].register_buffer("limit", torch.zeros(1))
    x, ids, weights = inputs(3)
    with torch.no_grad():
        expected = [ALL_EXPERTS_FUNCTIONS["grouped_mm"](layer, x, ids, weights) for layer in layers]
        compiled = torch.compile(
            lambda: [engine.experts_forward(layer, x, ids, weights) for layer in layers],
            fullgraph=True,
            backend="eager",
        )
        for ours, theirs in zip(compiled(), expected, strict=True):
            close(ours, theirs)
    assert ran() == 2 and asked.count("_unknown_at") == 4 and {"_environment", "_say"} < set(asked)
    assert "flag has_router_scale=False is not known" in caplog.text and "part limit is not known" in caplog.text


def test_compile_with_gradients_trains_on_the_built_in() -> None:
    model = model_of("Olmoe", FAMILIES["Olmoe"])
    model.set_experts_implementation("rampwrap")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens()).logits.float().square().mean().backward()
    assert experts_of(model).down_proj.grad.abs().sum() > 0


def test_the_operator_is_sound() -> None:
    module = experts_of(model_of("Olmoe", FAMILIES["Olmoe"]))
    x, ids, weights = inputs(5)
    arguments = (x, module.gate_up_proj.detach(), module.down_proj.detach(), weights, ids)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rampwrap.experts.default, arguments, test_utils=checks)


def test_without_a_plan_one_warning_holds_the_command(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("Olmoe", FAMILIES["Olmoe"])
    model.set_experts_implementation("rampwrap")
    with torch.no_grad():
        for _ in range(3):
            model(tokens())
    (record,) = caplog.records
    command = "rampwrap profile --engine transformers --num-experts 8 --top-k 2 --hidden-size 64"
    assert command in record.getMessage() and "there is no plan" in record.getMessage()


@pytest.mark.parametrize("how", ["the warning", "the model", "the model by experts"])
def test_the_command_makes_plans_that_the_layers_take(
    how: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, obey: Callable[[str], int]
) -> None:
    model = model_of("Qwen3Moe", FAMILIES["Qwen3Moe"])
    module, given = experts_of(model), inputs()
    if how == "the model by experts":
        for name in ("gate_up_proj", "down_proj"):  # as on the first of two ranks
            setattr(module, name, torch.nn.Parameter(getattr(module, name)[:4].contiguous(), requires_grad=False))
    with torch.no_grad():
        engine.experts_forward(module, *given)
    (record,) = caplog.records
    command = record.getMessage()
    if how != "the warning":
        model.config.save_pretrained(tmp_path)
        command = f"'rampwrap profile --engine transformers --model {tmp_path} --dtype bf16"
        command += " --tp-size 2 --ep'" if how == "the model by experts" else "'"
    assert obey(command) == 0
    engine.register()
    with torch.no_grad():
        engine.experts_forward(module, *given)
    (service,) = engine.serving().services.values()
    assert service.graph_dispatcher is not None, command


def test_what_the_layers_never_run_is_not_profiled(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], obey: Callable[[str], int]
) -> None:
    transformers.MixtralConfig(dtype="float16").save_pretrained(tmp_path)
    profile = f"rampwrap profile --engine transformers --model {tmp_path} --dry-run"
    for options, said in (
        ("", "runs experts in bf16, and these are in fp16"),
        (" --dtype bf16 --kernel cute_moe", "takes no plans of kernel 'cute_moe'"),
        (" --dtype bf16 --tp-size 8 --ep", "than top_k=2"),
    ):
        assert obey(f"'{profile}{options}'") == 1
        assert said in capsys.readouterr().err


def test_a_foreign_plan_leaves_the_defaults_with_the_reason(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_plan(tmp_path / "plans", MoEShape(8, 2, 64, 64))
    (tmp_path / "plans" / "torn.plan.json").write_text("{")
    module = experts_of(model_of("Olmoe", FAMILIES["Olmoe"]))
    with torch.no_grad():
        engine.experts_forward(module, *inputs())
    (service,) = engine.serving().services.values()
    assert service.graph_dispatcher is None and ran() == 1
    assert "tiny.plan.json" in caplog.text and "I=64" in caplog.text and "torn.plan.json" in caplog.text


def test_a_plan_replaced_while_serving_counts_from_the_next_start(tmp_path: pathlib.Path) -> None:
    path = save_plan(tmp_path / "plans")
    module = experts_of(model_of("Olmoe", FAMILIES["Olmoe"]))
    with torch.no_grad():
        engine.experts_forward(module, *inputs())
        (service,) = engine.serving().services.values()
        path.write_text("{}")
        engine.experts_forward(module, *inputs(11))
        assert list(engine.serving().services.values()) == [service] and ran() == 2
        engine.register()
        engine.experts_forward(module, *inputs())
        (service,) = engine.serving().services.values()
        assert service.graph_dispatcher is None


def test_large_batches_run_the_plans_static_configs(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    engine.register(max_tokens=16)
    module, theirs = experts_of(model_of("Olmoe", FAMILIES["Olmoe"])), ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    with torch.no_grad():
        for num_tokens in (16, 17):
            given = inputs(num_tokens)
            close(engine.experts_forward(module, *given), theirs(module, *given))
    (service,) = engine.serving().services.values()
    assert service.graph_dispatcher is not None
    assert (
        sum(service.dispatcher.launch_counts) == 1
        and sum(row.steps for row in service.graph_dispatcher.telemetry()) == 1
    )


def test_two_models_in_one_process(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    save_plan(tmp_path / "plans", MoEShape(4, 2, 64, 32), "other")
    models = [
        model_of("Olmoe", FAMILIES["Olmoe"]),
        model_of("Mixtral", {**FAMILIES["Mixtral"], "num_local_experts": 4}),
    ]
    with torch.no_grad():
        expected = [model(tokens(1, 3)).logits for model in models]
        for model in models:
            model.set_experts_implementation("rampwrap")
        for _ in range(2):
            for model, logits in zip(models, expected, strict=True):
                close(model(tokens(1, 3)).logits, logits)
    assert {service.shape.num_experts for service in engine.serving().services.values()} == {4, 8}
    assert all(service.graph_dispatcher is not None for service in engine.serving().services.values())


GROUPED = ALL_EXPERTS_FUNCTIONS["grouped_mm"]


def up_first(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    kept = self.gate_up_proj.data
    self.gate_up_proj.data = torch.cat(kept.chunk(2, 1)[::-1], 1)
    out = GROUPED(self, hidden_states, top_k_index, top_k_weights)
    self.gate_up_proj.data = kept
    return out


def more_arguments(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any, scale: float = 1) -> Any:
    return GROUPED(self, hidden_states, top_k_index, top_k_weights)


def raises(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    return self.experts_config


def scaled(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    return 1.01 * GROUPED(self, hidden_states, top_k_index, top_k_weights)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (up_first, "computes something else"),
        (scaled, "computes something else"),
        (more_arguments, "take (self, hidden_states, top_k_index, top_k_weights, scale)"),
        (raises, "fails on a layer of plain SiLU experts with AttributeError"),
    ],
)
def test_a_release_that_computes_something_else_is_refused(
    changed: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", changed)
    with pytest.raises(InputError, match="is not what rampwrap was made for") as caught:
        engine.register()
    assert said in str(caught.value)
    monkeypatch.undo()
    forget()


def test_a_release_whose_layers_have_a_flag_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decorate = moe.use_experts_implementation

    def decorator(experts_class: Any) -> Any:
        class Flagged(experts_class):
            has_pre_norm = False

        return decorate(Flagged)

    monkeypatch.setattr(moe, "use_experts_implementation", decorator)
    assert "flag has_pre_norm=False is not known" in str(transformers_layer.mismatch(transformers.__version__))
    forget()


def test_a_model_with_a_norm_after_each_expert_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    """The real class of Muse Spark, from 5.20 on: SiLU, concatenated, no bias, and yet another function."""
    muse = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark", reason="from transformers 5.20 on")
    config = muse.MuseSparkTextConfig(**{**TINY, **MOE}, moe_hidden_size=64, num_local_experts=8, head_dim=16)
    torch.manual_seed(0)
    module, given = muse.MuseSparkExperts(config).to(DEVICE, torch.bfloat16).eval(), inputs()
    torch.nn.init.normal_(module.gate_up_proj)
    torch.nn.init.normal_(module.down_proj)
    with torch.no_grad():
        out = engine.experts_forward(module, *given)
        torch.testing.assert_close(out, GROUPED(module, *given), rtol=0, atol=0)
    assert "a norm after each expert" in caplog.text and out.any()


def test_a_release_after_the_last_checked_is_served_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert transformers_layer.mismatch(transformers.__version__) is None
    for version, said in (("6.0.1", "6.0.1 is newer"), ("6.0.0rc1", "6.0.0rc1 is newer"), ("5.24.3", ""), ("5.17", "")):
        caplog.clear()
        with caplog.at_level(logging.INFO, "rampwrap"):
            assert transformers_layer.mismatch(version) is None
        assert said in caplog.text and bool(caplog.records) == bool(said)


@pytest.mark.parametrize("how", ["switch", "version"])
def test_what_keeps_the_kernel_away(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = experts_of(model_of("Olmoe", FAMILIES["Olmoe"]))
    if how == "switch":
        monkeypatch.setenv("RAMPWRAP_DISABLE", "1")
    else:
        version: Callable[[str], str] = importlib.metadata.version
        other = {"transformers": "5.16.3"}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or version(name))
        forget()
        with pytest.raises(InputError, match=r"5\.16\.3 is older than 5\.17; install transformers 5\.17"):
            engine.register()
    given = inputs()
    with torch.no_grad():
        out = engine.experts_forward(module, *given)
        torch.testing.assert_close(out, ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *given), rtol=0, atol=0)
    assert ("RAMPWRAP_DISABLE is set" if how == "switch" else "5.16.3") in caplog.text
    forget()


def test_warm_prepares_sizes(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    model = model_of("Olmoe", FAMILIES["Olmoe"])
    engine.warm(model, [2, 14])
    (service,) = engine.serving().services.values()
    assert service._ready == {2, 14}


def test_the_example_runs(tmp_path: pathlib.Path) -> None:
    if DEVICE == "cuda":
        pytest.skip("with a GPU the example makes a larger model")
    root = pathlib.Path(__file__).parent.parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "examples" / "generate_transformers.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of the greedy tokens are the same" in done.stdout and "rampwrap profile" in done.stderr


def test_inference_mode_and_no_grad_may_take_turns(tmp_path: pathlib.Path) -> None:
    save_plan(tmp_path / "plans")
    module, given = experts_of(model_of("Olmoe", FAMILIES["Olmoe"])), inputs()
    with torch.inference_mode():
        first = engine.experts_forward(module, *given)
    with torch.no_grad():
        torch.testing.assert_close(engine.experts_forward(module, *given), first.clone(), rtol=0, atol=0)


def test_a_plans_dispatcher_is_made_for_the_layers_own_device(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strictly for this GPU, where the weights are, and for batches as large as are served."""
    save_plan(tmp_path / "plans")
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(
        engine, "GraphDispatcher", lambda kernel, plan, **options: made.append({"plan": plan} | options)
    )
    serving = engine.serving()
    weights = torch.zeros(8, 64, 64, dtype=torch.bfloat16, device=DEVICE)
    service = engine.Service(serving, weights, 2)
    (options,) = made
    assert options.pop("plan").shape == service.shape == SHAPE
    assert options == {
        **{"max_tokens": serving.max_tokens, "device": Device.current(), "strict": True, "where": weights.device}
    }


def test_layers_beyond_the_most_are_counted_together(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the first has a record of its own, found again by the address of its weights."""
    save_plan(tmp_path / "plans")
    made: list[str] = []
    dispatcher = SimpleNamespace(layer=lambda name: (made.append(name), name)[1])
    monkeypatch.setattr(engine, "GraphDispatcher", lambda kernel, plan, **options: dispatcher)
    monkeypatch.setattr(engine, "MAX_LAYERS", 3)
    layers = [torch.zeros(8, 64, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(5)]
    serving = engine.serving()
    serving.names[layers[1].data_ptr()] = "model.layers.7"
    service = engine.Service(serving, layers[0], 2)
    first = ["experts.0", "model.layers.7", "experts.2"]
    for _ in range(2):
        assert [service.layer(weights) for weights in layers] == [*first, "others", "others"]
    assert made == [*first, *["others"] * 4]
