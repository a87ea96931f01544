"""SGLang's hook, on a stand-in with the signature that 0.5.23 has, and on the functions of released wheels (marked slow)."""

import importlib.metadata
import json
import logging
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import rampwrap
from rampwrap.adapters.vllm_fused_moe import CONFIGS, KEYS
from rampwrap.engines import sglang as engine
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.observe import registry as observe
from rampwrap.plan.folder import OneWarning
from rampwrap.plan.make import make_plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, Workload, workload_grid

SHAPE = MoEShape(8, 2, 64, 32)
OWN = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
ROOT = pathlib.Path(__file__).parents[2]
RECORDED = "0.5.23"
"The release that `POSITIONAL` and `KEYWORDS` of the hook were read from."
FLAGS: dict[str, Any] = dict.fromkeys(engine.KEYWORDS, False) | {"block_shape": None}


def stand_in() -> tuple[types.ModuleType, list[dict[str, Any]]]:
    """A package with SGLang's override and function; the configs that it resolved."""
    package = types.ModuleType(engine.PACKAGE)
    fused = types.ModuleType(f"{engine.PACKAGE}.fused_moe")
    tables = types.ModuleType(f"{engine.PACKAGE}.fused_moe_triton_config")
    resolved: list[dict[str, Any]] = []
    package._config = None
    package.get_config = lambda: package._config

    def _prepare_fused_moe_run(
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_ids: Any,
        *,
        use_fp8_w8a8: bool,
        use_int8_w8a8: bool,
        use_int8_w8a16: bool,
        use_int4_w4a16: bool,
        per_channel_quant: bool,
        block_shape: Any,
    ) -> Any:
        config = dict(package.get_config() or OWN)
        resolved.append(config)
        if len(topk_ids) == 13:
            raise RuntimeError("of its own")
        return config, None, False, False, None, None, None

    fused._prepare_fused_moe_run = _prepare_fused_moe_run
    tables.get_exec = lambda: types.SimpleNamespace(deterministic=tables.flags)
    tables.flags = types.SimpleNamespace(enable_deterministic_inference=False)
    tables.get_moe_configs = (  # with the released parameters
        lambda E, N, dtype, block_n=0, block_k=0, per_channel_quant=False, down_moe=False: (  # noqa: N803
            tables.tuned if down_moe else None
        )
    )
    tables.tuned = None
    package.fused_moe, package.tables = fused, tables
    return package, resolved


def registry_of() -> types.ModuleType:
    """A registry with the contract of SGLang's: an AROUND hook is called with the function it stands around."""
    module = types.ModuleType("sglang.srt.plugins.hook_registry")
    module.HookType = types.SimpleNamespace(AROUND="around")

    class HookRegistry:
        _hooks: dict[str, list[Any]] = {}

        @classmethod
        def register(cls, target: str, hook: Callable[..., Any], hook_type: Any) -> None:
            cls._hooks.setdefault(target, []).append((hook_type, hook, None))

    module.HookRegistry = HookRegistry
    return module


class Engine:
    """A process of the stand-in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package, self.resolved = stand_in()
        self.registry = registry_of()
        modules = {
            engine.PACKAGE: self.package,
            f"{engine.PACKAGE}.fused_moe": self.package.fused_moe,
            f"{engine.PACKAGE}.fused_moe_triton_config": self.package.tables,
            "sglang.srt.plugins.hook_registry": self.registry,
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    @property
    def hooks(self) -> list[Any]:
        return self.registry.HookRegistry._hooks.get(engine.TARGET, [])

    def step(self, routing: str | None = "uniform", num_tokens: int = 64, layer: int = 0, **differently: Any) -> Any:
        """What the function resolves for a batch, through the hook."""
        ids = np.tile(np.array([3, 5], dtype=np.int32), (num_tokens, 1))
        if routing is not None:
            ids = Workload(num_tokens, Routing.parse(routing)).topk_ids(8, 2)
        dtype = differently.pop("dtype", torch.bfloat16)
        w1, w2 = WEIGHTS[layer]
        x = torch.zeros(num_tokens, 64, dtype=dtype)
        function = self.package.fused_moe._prepare_fused_moe_run
        for _, hook, _ in self.hooks:
            function = _around(hook, function)
        return function(x, w1, w2, torch.from_numpy(ids), **{**FLAGS, **differently})[0]


def _around(hook: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: hook(function, *args, **kwargs)


ROUTINGS = ("uniform", "dirichlet:0.3", "dirichlet:0.1", "hot:1", "hot:2")
WEIGHTS = [(torch.zeros(8, 64, 64), torch.zeros(8, 64, 32)) for _ in range(2)]


def save_plan(
    folder: pathlib.Path, shape: MoEShape = SHAPE, kernel: str = "vllm_fused_moe", names: tuple[str, ...] = ROUTINGS
) -> pathlib.Path:
    """A plan by which even routing favours low blocks and skewed routing high ones."""
    seen: set[int] = set()
    configs = [c for c in CONFIGS[shape.dtype] if not (c["BLOCK_SIZE_M"] in seen or seen.add(c["BLOCK_SIZE_M"]))]  # type: ignore[func-returns-value]
    rows = workload_grid([4, 16, 64, 256], [Routing.parse(routing) for routing in names])
    counts = np.stack([expert_counts(w.topk_ids(shape.num_experts, shape.top_k), shape.num_experts) for w in rows])
    heights = [config["BLOCK_SIZE_M"] for config in configs]
    us = np.array([[100 + 2 * height + 100 * np.ceil(row / height).sum() for height in heights] for row in counts])
    grids = tuple(CtaGrid(height, 4) for height in heights)
    split, label = tuple(w.split for w in rows), tuple(w.label for w in rows)
    table = Timings(us, counts, split, label, kernel, Device.current(), shape, tuple(configs), grids, "0.26.0")
    path = folder / f"{kernel}-{shape.num_experts}.plan.json"
    make_plan(table).save(path)
    return path


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty folder of plans."""
    monkeypatch.setenv("RAMPWRAP_PLANS", str(tmp_path))
    monkeypatch.delenv("RAMPWRAP_DISABLE", raising=False)
    monkeypatch.setattr(engine, "_warn", OneWarning(logging.getLogger("rampwrap")))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: RECORDED if name == "sglang" else version(name))
    return tmp_path


@pytest.fixture
def served(plans: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A process with a plan and the hook."""
    save_plan(plans)
    process = Engine(monkeypatch)
    engine.register()
    yield process


def test_the_recorded_signature_is_of_a_tested_release() -> None:
    package, _ = stand_in()
    assert engine.CHECKED[-1] == RECORDED and engine.mismatch(package, package.fused_moe, package.tables) is None


def test_the_routing_of_the_step_before_chooses(served: Engine) -> None:
    static = served.step()
    assert set(static) == set(KEYS)
    assert served.step(None) == static  # chosen by the even routing before
    skewed = served.step(None)
    assert skewed["BLOCK_SIZE_M"] > static["BLOCK_SIZE_M"]
    assert served.step("uniform", layer=1) == static  # another layer, another history
    assert served.step("uniform") == skewed and served.step("uniform") == static
    assert served.package.get_config() is None


def test_choices_count_by_layer(served: Engine) -> None:
    for layer in (0, 0, 1):
        served.step(layer=layer)
    (source,) = [s for s in rampwrap.stats()["sources"] if s["kernel"] == "vllm_fused_moe" and "E=8" in s["shape"]][-1:]
    assert {entry["layer"]: entry["steps"] for entry in source["layers"]} == {"experts.0": 2, "experts.1": 1}


def test_drift_is_reported(
    plans: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What reached the host is compared with what was profiled, and beyond it the command is named, once."""
    save_plan(plans, names=("uniform", "dirichlet:1"))
    served = Engine(monkeypatch)
    engine.register()
    for _ in range(observe.ENOUGH_STEPS + 1):
        served.step("uniform")
        served.step(None, layer=1)
    (source,) = [s for s in rampwrap.stats()["sources"] if s["kernel"] == "vllm_fused_moe" and "E=8" in s["shape"]][-1:]
    even, two = sorted(source["layers"], key=lambda entry: entry["layer"])
    assert even["observed"] == two["observed"] == observe.ENOUGH_STEPS
    assert even["drift"] == 0 and even["active_experts"] == 8 and even["chosen_us"] is None
    assert two["drift"] > observe.DRIFTED and (two["active_experts"], two["concentration"]) == (2, 0.5)
    rampwrap.stats()
    said = [record.getMessage() for record in caplog.records if "drift" in record.getMessage()]
    assert len(said) == 1 and "experts.1 at 64 tokens" in said[0] and "profile --kernel vllm_fused_moe" in said[0]


def test_under_capture_the_static_config_stands(served: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    static = served.step()
    served.step(None)
    assert served.step(None) != static
    monkeypatch.setattr(engine, "capturing", lambda: True)
    assert served.step(None) == static


def test_the_override_is_taken_back_after_an_error(served: Engine) -> None:
    with pytest.raises(RuntimeError, match="of its own"):
        served.step(num_tokens=13)
    assert served.package.get_config() is None and len(served.resolved) == 1


def test_somebody_elses_override_stands(served: Engine) -> None:
    served.package._config = {**OWN, "BLOCK_SIZE_M": 128}
    assert served.step()["BLOCK_SIZE_M"] == 128
    assert served.package._config["BLOCK_SIZE_M"] == 128


@pytest.mark.parametrize(
    "differently",
    [
        {"use_int8_w8a8": True},
        {"use_int4_w4a16": True},
        {"use_fp8_w8a8": True},
        {"use_fp8_w8a8": True, "block_shape": [64, 128]},
        {"dtype": torch.float32},
        {"num_tokens": 0},
    ],
)
def test_other_layers_stay_as_they_are(served: Engine, differently: dict[str, Any]) -> None:
    assert served.step(**differently) == OWN


@pytest.mark.parametrize("how", ["deterministic", "tma", "shape", "torn", "fused"])
def test_a_layer_that_no_plan_may_serve_stays_and_it_is_said_once(
    how: str, plans: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_plan(plans, MoEShape(4, 2, 64, 32) if how == "shape" else SHAPE)
    process = Engine(monkeypatch)
    said = {"shape": "rampwrap profile --engine sglang --num-experts 8", "tma": "TMA"}.get(how, how)
    if how == "fused":
        monkeypatch.setenv(engine.FUSED_SWIGLU, "True")
        said = "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED is set"
    process.package.tables.flags.enable_deterministic_inference = how == "deterministic"
    if how == "tma":
        process.package.tables.tuned = {64: {**OWN, "USE_TMA": True}}
    engine.register()
    if how == "torn":
        del process.package.tables.get_exec
        said = "get_exec"
    searched = []
    find = engine.Around._find
    monkeypatch.setattr(engine.Around, "_find", lambda *args: searched.append(1) or find(*args))
    assert [process.step() for _ in range(3)] == [OWN] * 3 and len(searched) == 1
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and said in warned[0].getMessage()


MODEL = {"hidden_act": "silu", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
MODEL |= {"n_routed_experts": 7, "n_shared_experts": 1, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_command_of_the_warning_makes_a_plan_that_the_hook_takes(
    dtype: torch.dtype,
    plans: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obey: Callable[[str], int],
) -> None:
    save_plan(plans, MoEShape(4, 2, 64, 32))  # of another layer, or the hook is not there
    process = Engine(monkeypatch)
    engine.register()
    assert process.step(dtype=dtype) == OWN
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert obey(said) == 0
    process = Engine(monkeypatch)
    engine.register()
    assert set(process.step(dtype=dtype)) == set(KEYS)


@pytest.mark.parametrize(
    ("how", "more", "layer", "top_k"),
    [
        ("--model {} --out {}", {}, (7, 64, 64), 2),
        ("--model {} --out {} --tp-size 2", {}, (7, 32, 64), 2),
        ("--model {} --out {} --tp-size 2 --ep --num-redundant-experts 1", {}, (4, 64, 64), 2),
        # The shared expert is one expert more, which every token visits.
        ("--model {} --out {}", {"architectures": ["Glm4MoeForCausalLM"]}, (8, 64, 64), 3),
        # Not by experts, where SGLang keeps it apart.
        (
            "--model {} --out {} --tp-size 2 --ep --num-redundant-experts 1",
            {"architectures": ["Glm4MoeForCausalLM"]},
            (4, 64, 64),
            2,
        ),
        ("--model {} --out {}", {"torch_dtype": "float32"}, (7, 64, 64), 2),  # which SGLang serves in fp16
    ],
)
def test_plans_of_a_model_are_taken(
    how: str,
    more: dict[str, Any],
    layer: tuple[int, int, int],
    top_k: int,
    plans: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    obey: Callable[[str], int],
) -> None:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(MODEL | more))
    assert obey(f"'rampwrap profile --engine sglang {how.format(model, plans)}'") == 0
    process = Engine(monkeypatch)
    engine.register()
    experts, rows, hidden = layer
    weights = (torch.zeros(layer), torch.zeros(experts, hidden, rows // 2))
    ids = torch.from_numpy(Workload(64, Routing.parse("uniform")).topk_ids(experts, top_k))
    function = _around(process.hooks[0][1], process.package.fused_moe._prepare_fused_moe_run)
    x = torch.zeros(64, hidden, dtype=torch.float16 if "torch_dtype" in more else torch.bfloat16)
    assert set(function(x, *weights, ids, **FLAGS)[0]) == set(KEYS)


def test_a_kernel_that_the_hook_never_runs_is_not_profiled(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], obey: Callable[[str], int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    assert obey(f"'rampwrap profile --engine sglang --model {tmp_path} --kernel triton_fused_moe --dry-run'") == 1
    assert "takes no plans of kernel 'triton_fused_moe'" in capsys.readouterr().err
    assert obey(f"'rampwrap profile --engine sglang --model {tmp_path} --dry-run'") == 0
    assert "vllm_fused_moe" in capsys.readouterr().out
    assert obey(f"'rampwrap profile --engine sglang --model {tmp_path} --tp-size 7 --ep --dry-run'") == 1
    assert "fewer experts on a rank (1) than top_k=2" in capsys.readouterr().err


def test_an_engine_that_runs_something_else_is_left_alone(served: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """SGLang might come to decide elsewhere; the hook would count choices that nobody runs."""
    assert served.step(None) != OWN and not caplog.records
    theirs, served.package.get_config = served.package.get_config, lambda: None
    assert [served.step(None) for _ in range(3)] == [OWN] * 3
    (record,) = caplog.records
    assert "'BLOCK_SIZE_M': 16" in record.getMessage() and "is from here on" in record.getMessage()
    served.package.get_config = theirs
    assert served.step(None) == OWN


def test_a_release_after_the_last_checked_is_served_and_it_is_said(
    plans: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_plan(plans)
    for version, said in (
        ("0.5.24rc1", "0.5.24rc1 is newer than 0.5.23"),
        ("0.6", "0.6 is newer"),
        ("0.5.23.post1", ""),
    ):
        process = Engine(monkeypatch)
        caplog.clear()
        with caplog.at_level(logging.INFO, "rampwrap"):
            monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
            engine.register()
        assert len(process.hooks) == 1 and said in caplog.text and bool(caplog.records) == bool(said)


def test_registering_twice_is_registering_once(served: Engine) -> None:
    engine.register()
    assert len(served.hooks) == 1


@pytest.mark.parametrize(
    "how",
    [
        "switch",
        "version",
        "no plans",
        "other kernel",
        "broken plan",
        "signature",
        "override",
        "tables",
        "exec",
        "registry",
    ],
)
def test_what_keeps_the_hook_away(
    how: str, plans: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = Engine(monkeypatch)
    if how == "broken plan":
        (plans / "torn.plan.json").write_text("{")
    elif how != "no plans":
        save_plan(plans, kernel="triton_fused_moe" if how == "other kernel" else "vllm_fused_moe")
    if how == "switch":
        monkeypatch.setenv("RAMPWRAP_DISABLE", "1")
    if how == "version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.16.post2")
    if how == "signature":
        process.package.fused_moe._prepare_fused_moe_run = lambda hidden_states, w13, w2, topk_ids: None
    if how == "override":
        del process.package._config
    if how == "tables":
        process.package.tables.get_moe_configs = lambda shape, down_moe: None
    if how == "exec":
        del process.package.tables.get_exec
    if how == "registry":
        del process.registry.HookType.AROUND
    engine.register()
    assert not process.hooks
    said = {
        "switch": "",
        "version": "SGLang 0.5.16.post2 as it is: it is older than 0.5.17",
        "no plans": "rampwrap profile --engine sglang",
        "other kernel": "no plan of kernel vllm_fused_moe",
        "broken plan": "torn.plan.json",
        "signature": "w13",
        "override": "no config to override",
        "tables": "get_moe_configs has parameters (shape, down_moe)",
        "exec": "fused_moe_triton_config has no get_exec",
        "registry": "AROUND",
    }
    assert said[how] in caplog.text and bool(caplog.records) == bool(said[how])


def test_the_entry_point_is_this_function() -> None:
    text = pathlib.Path(__file__).parent.parent.parent.joinpath("pyproject.toml").read_text()
    assert '[project.entry-points."sglang.srt.plugins"]\nrampwrap = "rampwrap.engines.sglang:register"' in text


NEEDED = ("moe/moe_runner/triton_utils/fused_moe.py", "moe/moe_runner/triton_utils/fused_moe_triton_config.py")
NEEDED += ("moe/moe_runner/triton_utils/moe_align_block_size.py", "moe/moe_runner/triton_utils/__init__.py")
WANTED = tuple(f"sglang/srt/layers/{name}" for name in NEEDED)
WANTED += ("sglang/srt/plugins/hook_registry.py", "sglang/kernels/ops/moe/fused_moe_triton_kernels.py")


@pytest.mark.parametrize(
    "version",
    [
        pytest.param(engine.CHECKED[0], marks=pytest.mark.release),
        pytest.param(engine.CHECKED[-1], marks=pytest.mark.slow),
    ],
)
def test_a_releases_own_functions_run_what_the_hook_chooses(
    version: str, released: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Its registry, its override, its alignment and its kernels in Triton's interpreter; see `sglang_alone`."""
    environment = os.environ | {"RAMPWRAP_PLANS": str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("RAMPWRAP_DISABLE", None)
    script = pathlib.Path(__file__).parent / "sglang_alone.py"
    command = [sys.executable, str(script), str(released("sglang", version, WANTED)), version, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"ran in SGLang {version}" in done.stdout
