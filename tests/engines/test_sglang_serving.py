"""What SGLang's serving benchmark starts its arms from, and how it compares them; SGLang itself is not needed."""

import importlib
import importlib.metadata
import json
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.adapters.vllm_fused_moe import KEYS, VllmFusedMoE
from rampwrap.engines import sglang as engine
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.folder import Plans

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
if not (FOLDER / "serve_sglang.py").exists():
    pytest.skip("the wheel is tested without benchmarks", allow_module_level=True)


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in ("serve_sglang", "serve_sglang_arm")}
    finally:
        sys.path.remove(str(FOLDER))


def test_arms_find_a_plan_that_the_hook_takes(scripts, tmp_path, monkeypatch):
    serve = scripts["serve_sglang"]
    monkeypatch.setattr(serve, "device_on", lambda gpu: SIMULATED)
    settings, plan = serve.prepare(serve.arguments_of(["--layers", "2", "--batch-size", "8", "300"]), tmp_path)
    shape = MoEShape(**settings["shape"])
    found = engine.plan_for(Plans.read(tmp_path / "plans"), shape, SIMULATED)
    assert found is not None and found[1].configs == plan.configs
    server, config = settings["server"], json.loads((tmp_path / "model/config.json").read_text())
    assert (config["num_hidden_layers"], server["max_running_requests"]) == (2, 300)
    assert server["chunked_prefill_size"] >= 300 * serve.LENGTH
    (point,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert [its.load() for its in point.entry_points if its.group == "sglang.srt.plugins"] == [engine.register]
    environments = [serve.environment_of(arm, tmp_path) for arm in serve.ARMS]
    assert [its.get("RAMPWRAP_DISABLE") for its in environments] == ["1", None]


def test_differences(scripts):
    one = {"tokens": [[1, 2], [3, 4]], "logits": [[[3.0, 4.0]]]}
    other = {"tokens": [[1, 2], [3, 5]], "logits": [[[3.0, 3.0]]]}
    assert scripts["serve_sglang"].differences(one, other) == {"first_tokens": 1.0, "tokens": 0.75, "logits": [0.2]}


def test_the_profiled_kernel_has_vllms_grid(scripts):
    kernel, shape = scripts["serve_sglang_arm"].SglangKernel, MoEShape(64, 8, 2048, 1024)
    config = dict(zip(KEYS, (64, 128, 64, 1, 4, 3), strict=True))
    bare = kernel.__new__(kernel)
    assert bare.grid(config, shape).launches == (16, 16) and bare.supports(config, shape) is None
    assert (bare.name, bare.launch_names) == ("vllm_fused_moe", VllmFusedMoE.launch_names)
