"""transformers' experts on a GPU: results, CUDA graphs of torch.compile, and generate with a compiled decode."""

import pathlib
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

import numpy as np
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.engines import transformers as engine
from rampwrap.engines.defaults import PLANS_ONLY
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid

pytestmark = pytest.mark.gpu
SHAPE = MoEShape(16, 4, 512, 256)


def plan_in(folder: pathlib.Path) -> pathlib.Path:
    """A plan whose made-up times favour low blocks for even routing and high ones for skewed routing, by far."""
    kernel = TritonFusedMoE(SHAPE)
    configs = list({config["block_m"]: config for config in kernel.configs if "split_k" not in config}.values())
    names = ("uniform", "dirichlet:0.3", "dirichlet:0.1", "hot:2")
    rows = workload_grid([1, 4, 16, 64, 256], [Routing.parse(name) for name in names])
    counts = np.stack([expert_counts(row.topk_ids(16, 4), 16) for row in rows])
    heights = [config["block_m"] for config in configs]
    us = np.array([[100 + 2 * height + 100 * np.ceil(row / height).sum() for height in heights] for row in counts])
    grids = tuple(kernel.grid(config, SHAPE) for config in configs)
    split, label = tuple(row.split for row in rows), tuple(row.label for row in rows)
    table = Timings(
        us, counts, split, label, kernel.name, Device.current(), SHAPE, tuple(configs), grids, kernel.version
    )
    path = folder / "small.plan.json"
    make_plan(table).save(path)
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.OlmoeForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.fixture(params=["defaults", "plans only", "plan"])
def planned(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """A plan, or none: then defaults, of the CuTe kernels where they are built and of the Triton kernel where those may not serve."""
    if request.param == "plan":
        plan_in(tmp_path)
    monkeypatch.setenv(PLANS_ONLY, "1" if request.param == "plans only" else "")
    engine.register(tmp_path, model=model)
    torch._dynamo.reset()
    return bool(request.param == "plan")


def tokens(rows: int, length: int = 1) -> torch.Tensor:
    return torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(rows)).cuda()


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_layers_give_what_grouped_mm_gives(model: Any, planned: bool) -> None:
    module = model.model.layers[0].mlp.experts
    for num_tokens in (1, 2, 17, 64, 300, 5000):
        x = torch.randn(num_tokens, 512, device="cuda", dtype=torch.bfloat16)
        weights, ids = torch.rand(num_tokens, 16, device="cuda").topk(4)
        ids[::3, 1] = 16  # an expert of another rank
        with torch.no_grad():
            expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, ids, weights)
            assert off(engine.experts_forward(module, x, ids, weights), expected) < 0.01, num_tokens
    (service,) = engine.serving().services.values()
    assert (service.graph_dispatcher is not None) == planned


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_replays_its_graphs(model: Any, planned: bool, mode: str) -> None:
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        expected = [model(tokens(rows)).logits.clone() for rows in (4, 64)]
        model.set_experts_implementation("rampwrap")
        compiled = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
        for _ in range(5):
            for rows, logits in zip((4, 64), expected, strict=True):
                assert off(compiled(tokens(rows)).logits, logits) < 0.02
    if planned:
        (service,) = engine.serving().services.values()
        assert service.graph_dispatcher is not None
        steps = sum(row.steps for row in service.graph_dispatcher.telemetry())
        assert steps > 0, "replays count where something is chosen"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model: Any, planned: bool, cache: str) -> None:
    options = {"max_new_tokens": 8, "do_sample": False} | (
        {} if cache == "dynamic" else {"cache_implementation": cache}
    )
    model.set_experts_implementation("rampwrap")
    if cache == "static":
        engine.warm(model, [8])
    out = model.generate(tokens(8, 12), **options)
    model.set_experts_implementation("grouped_mm")
    expected = model.generate(tokens(8, 12), max_new_tokens=8, do_sample=False)
    # Greedy tokens part ways at near ties, and stay apart from there on.
    assert out.shape == (8, 20) and (out == expected).float().mean() > 0.7


@pytest.mark.parametrize("plans_only", ["", "1"])
def test_a_layer_on_another_gpu_than_the_current_one(
    plans_only: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``device_map="auto"`` spreads a model: nobody makes the second GPU current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setenv(PLANS_ONLY, plans_only)
    engine.register(tmp_path)
    kernel = TritonFusedMoE(SHAPE)
    ids = torch.rand(24, SHAPE.num_experts, generator=torch.Generator().manual_seed(0)).topk(SHAPE.top_k).indices
    its = kernel.inputs(SHAPE, ids.to("cuda:1"))
    want = kernel.reference(SHAPE, its)
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
    out = engine.experts(*(its[name] for name in names))
    assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert float((out.double() - want).norm() / want.norm()) < 1e-2
