"""The vLLM plugin with plans of the CuTe kernels: which plan serves, where they cannot run, what is compiled when.

On a CPU, with the stand-ins of vLLM and of the compiled kernels that the tests of the plugin and of the adapter have.
"""

import contextlib
import importlib.util
import json
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import attrs
import numpy as np

from rampwrap.adapters import cute_moe
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.engines import prepare as warming
from rampwrap.engines import profile as profiling
from rampwrap.engines import vllm as plugin
from rampwrap.engines import vllm_layer
from rampwrap.errors import InputError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build import library
from rampwrap.kernels.cute.configs import Variant, all_configs
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe import warm
from rampwrap.measure.join import join
from rampwrap.plan import folder as places
from rampwrap.plan.make import make_plan
from rampwrap.policy.graph_lists import in_graph, token_spans
from rampwrap.routing.counts import expert_counts

if not INTERPRETED.value:
    pytest.skip("the stand-ins run on a CPU; tests/gpu has the engine itself", allow_module_level=True)


def load(name):
    """Another test module."""
    path = pathlib.Path(__file__).parents[1] / f"{name}.py"
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, made)
    spec.loader.exec_module(made)
    return made


base, cute = load("engines/test_vllm"), load("adapters/test_cute_moe")
world, plan = base.world, base.plan

FP8 = MoEShape(8, 2, 256, 256, "fp8")
BF16 = MoEShape(8, 2, 256, 128)
CUTE_VERSION = cute_moe.CuteFusedMoE.version


def cute_timings(shape):
    """By which few active experts favour another config than many do, and the uniform-tuned one loses over skews."""
    kernel = cute.kernel_of(shape)
    configs = tuple(c for c in kernel.configs if c["block_m"] in (8, 16) and c["group_m"] == 1)[:2]
    table = base.timings_of(shape)
    return attrs.evolve(
        table,
        kernel="cute_moe",
        kernel_version=kernel.version,
        configs=configs,
        grids=tuple(kernel.grid(config, shape) for config in configs),
    )


@pytest.fixture(scope="module")
def cute_plans():
    return {shape: make_plan(cute_timings(shape)) for shape in (FP8, BF16)}


@pytest.fixture(scope="module")
def triton_plans():
    return {shape: make_plan(base.timings_of(shape)) for shape in (FP8, BF16)}


@pytest.fixture
def built(monkeypatch):
    """A machine with a library of CuTe kernels."""
    made = cute.StandIns()
    monkeypatch.setattr(cute_moe, "load", lambda path=None: made)
    return made


def absent(path=None):
    raise InputError(library.ABSENT)


def engine_layer(world, shape, its, name=None):
    """A layer of the stand-in engine, and its arguments."""
    sizes = {"hidden_dim": shape.hidden_size, "intermediate_size_per_partition": shape.intermediate_size}
    quant = base.Quant()
    if shape.dtype == "fp8":
        scales = {"w1_scale": its["w13_scale"], "w2_scale": its["w2_scale"]}
        quant = base.Quant(**base.FP8, block_shape=[128, 128], **scales)
    sizes["num_local_experts"] = shape.num_local_experts
    return world.kernel(base.Config(**sizes), quant, name=name)


def apply(layer, its, **more):
    names = ("hidden_states", "w2", "topk_weights", "topk_ids")
    # vLLM hands over its parameters as they are.
    return layer.impl.apply(w1=torch.nn.Parameter(its["w13"], False), **{name: its[name] for name in names}, **more)


def inputs(shape, tokens=12, seed=0):
    return cute.kernel_of(shape).inputs(shape, cute.routing(shape, tokens, seed))


@pytest.mark.parametrize("shape", [FP8, BF16], ids=["fp8", "bf16"])
def test_a_layer_runs_the_cute_kernels(world, built, cute_plans, shape):
    """Both dtypes: vLLM's scales, weights and routing weights as they come, scratch memory and output from vLLM."""
    cute_plans[shape].save(world.folder / "cute.plan.json")
    plugin.register()
    its = inputs(shape)
    layer = engine_layer(world, shape, its, "model.layers.0.mlp.experts")
    out = apply(layer, its)
    assert world.calls == [] and layer.impl.in_place
    assert cute.error(out, cute.kernel_of(shape).reference(shape, its)) < 5e-3
    assert [symbol.split("_")[0] for symbol, _ in built.calls] == ["up", "down"]
    memory = {t.dtype for t in (torch.empty(0, dtype=dtype) for _, dtype in world.manager.asked)}
    assert (torch.float8_e4m3fn in memory) == (shape.dtype == "fp8")
    (engine,) = plugin.engines()
    assert engine["kernels"] == ["cute_moe"] and engine["layers"] == 1


@pytest.mark.parametrize(("shape", "kernel"), [(FP8, "cute_moe"), (BF16, "triton_fused_moe")], ids=["fp8", "bf16"])
def test_preference_by_dtype(world, built, cute_plans, triton_plans, caplog, shape, kernel):
    """Of plans for both kernels: CuTe in FP8, Triton in bf16; neither is worth a warning."""
    cute_plans[shape].save(world.folder / "a.plan.json")
    triton_plans[shape].save(world.folder / "b.plan.json")
    plugin.register()
    engine_layer(world, shape, inputs(shape))
    assert plugin.engines()[0]["kernels"] == [kernel] and not base.messages(caplog)
    assert set(vllm_layer.KERNELS) == set(vllm_layer.FP8_KERNELS)


def both_timings(shape, first="triton_fused_moe"):
    """Our Triton kernel is the faster one up to 8 tokens, the CuTe kernels are from 9 on."""
    tables = [base.timings_of(shape), cute_timings(shape)]
    few = tables[0].num_tokens <= 8
    tables = [
        attrs.evolve(table, us=table.us * np.where(few == mine, 1.0, 3.0)[:, None])
        for table, mine in zip(tables, (True, False), strict=True)
    ]
    return join(sorted(tables, key=lambda table: table.kernel != first))


@pytest.mark.parametrize("first", ["triton_fused_moe", "cute_moe"])
@pytest.mark.parametrize("shape", [FP8, BF16], ids=["fp8", "bf16"])
def test_a_plan_for_both_crosses_kernels(world, built, triton_plans, caplog, shape, first):
    """Each token count runs the kernel that is faster there, on vLLM's weights and in vLLM's memory."""
    make_plan(both_timings(shape, first)).save(world.folder / "both.plan.json")
    triton_plans[shape].save(world.folder / "triton.plan.json")
    plugin.register()
    layer = engine_layer(world, shape, inputs(shape), "model.layers.0.mlp.experts")
    ran = {}
    for tokens in (4, 32):
        its, before = inputs(shape, tokens), len(built.calls)
        out = apply(layer, its)
        assert cute.error(out, cute.kernel_of(shape).reference(shape, its)) < 2e-2
        ran[tokens] = len(built.calls) - before
    assert ran == {4: 0, 32: 2} and world.calls == [] and layer.impl.in_place and world.manager.asked
    (engine,) = plugin.engines()
    assert sorted(engine["kernels"][0].removeprefix("portfolio:").split("+")) == ["cute_moe", "triton_fused_moe"]
    assert not base.messages(caplog)


def test_a_plan_for_both_needs_both(world, monkeypatch, triton_plans, caplog):
    """Where the library is missing it is passed over for the next, with the command that builds it."""
    monkeypatch.setattr(cute_moe, "load", absent)
    make_plan(both_timings(BF16)).save(world.folder / "both.plan.json")
    triton_plans[BF16].save(world.folder / "triton.plan.json")
    plugin.register()
    engine_layer(world, BF16, inputs(BF16))
    assert plugin.engines()[0]["kernels"] == ["triton_fused_moe"]
    (said,) = base.messages(caplog)
    assert "both.plan.json" in said and "rampwrap build-kernels" in said


def test_without_the_library_the_next_plan_serves(world, monkeypatch, cute_plans, triton_plans, caplog):
    """One warning for all layers, which holds the command; the Triton kernel serves."""
    monkeypatch.setattr(cute_moe, "load", absent)
    cute_plans[FP8].save(world.folder / "cute.plan.json")
    triton_plans[FP8].save(world.folder / "triton.plan.json")
    plugin.register()
    its = inputs(FP8)
    layers = [engine_layer(world, FP8, its, f"layer {i}") for i in range(3)]
    out = apply(layers[0], its)
    assert cute.error(out, cute.kernel_of(FP8).reference(FP8, its)) < 2e-2 and world.calls == []
    assert plugin.engines()[0]["kernels"] == ["triton_fused_moe"]
    (said,) = base.messages(caplog)
    assert "cute.plan.json" in said and "rampwrap build-kernels" in said and "triton.plan.json" in said


def test_an_older_plan_of_the_preferred_kernel_is_named(world, built, cute_plans, triton_plans, caplog):
    """It is passed over with a word, but not where a newer one of that kernel serves."""
    old = attrs.evolve(cute_plans[FP8], kernel_version="0")
    old.save(world.folder / "old.plan.json")
    triton_plans[FP8].save(world.folder / "triton.plan.json")
    plugin.register()
    engine_layer(world, FP8, inputs(FP8))
    (said,) = base.messages(caplog)
    assert "old.plan.json" in said and f"kernel version 0 but this is {CUTE_VERSION}" in said
    cute_plans[FP8].save(world.folder / "new.plan.json")
    fit = places.Plans.read(world.folder).find(FP8, SIMULATED, vllm_layer.preference(FP8))
    assert fit.kernel.name == "cute_moe" and fit.passed_over == ()


def test_only_a_plan_that_cannot_run(world, monkeypatch, cute_plans, caplog):
    """vLLM stays as it is, with one warning that says how to build the kernels."""
    monkeypatch.setattr(cute_moe, "load", absent)
    cute_plans[FP8].save(world.folder / "cute.plan.json")
    plugin.register()
    its = inputs(FP8)
    for _ in range(2):
        assert "_fused_experts" not in vars(engine_layer(world, FP8, its).impl)
    (said,) = base.messages(caplog)
    assert "rampwrap build-kernels" in said and ".;" not in said


def test_one_config_a_bucket_and_the_best_over_skews(cute_plans):
    """No choice inside a graph, so eager step and capture agree; but not the uniform-tuned config either."""
    kernel = cute.kernel_of(FP8)
    plan = cute_plans[FP8]
    assert all(len(its.candidates) == 1 for its in plan.in_graph), "the kernel cannot choose in a graph"
    graph_dispatcher = GraphDispatcher(kernel, plan, max_tokens=32, device=SIMULATED, strict=True, where="cpu")
    for tokens in (1, 4, 8, 12, 16, 31, 32):
        bucket = graph_dispatcher.prepared(tokens)
        assert (
            bucket.shortlist.mode == "single"
            and len(bucket.configs) == 1
            and bucket is graph_dispatcher.prepared(tokens)
        )
    better = 0
    for span in token_spans(FP8, plan.static, plan.buckets):
        best = in_graph(plan.model, FP8, span, {})
        if 0 < span.first <= 32:
            assert graph_dispatcher.prepared(span.first).shortlist == best
            better += best.static != plan.static.index(span.first)
    assert better


def test_eager_engines_choose_by_the_step_before(world, built, cute_plans):
    """Without graphs to be frozen in, the host chooses: two routings, two configs."""
    cute_plans[FP8].save(world.folder / "cute.plan.json")
    plugin.register()
    world.config = world.new_config(cudagraphs="NONE")
    its = inputs(FP8)
    layer = engine_layer(world, FP8, its, "layer")
    seen = set()
    for ids in ([[0, 1]] * 12, [[i % 8, (i + 1) % 8] for i in range(12)]):
        its["topk_ids"] = torch.tensor(ids, dtype=torch.int32)
        for _ in range(2):
            out = apply(layer, its)
        assert cute.error(out, cute.kernel_of(FP8).reference(FP8, its)) < 5e-3
        chosen = cute_plans[FP8].policy().index(expert_counts(its["topk_ids"], 8), 12)
        up = cute_moe.from_keys(cute_plans[FP8].configs[chosen], "fp8").variants[0]
        assert built.calls[-2][0] == up.symbol
        seen.add(chosen)
    assert len(seen) == 2 and world.calls == []


def test_experts_of_other_ranks(world, built):
    shape = attrs.evolve(FP8, num_local_experts=4)
    make_plan(cute_timings(shape)).save(world.folder / "ep.plan.json")
    plugin.register()
    its = cute.kernel_of(shape).inputs(shape, cute.routing(shape, 12))
    layer = engine_layer(world, shape, its)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1], dtype=torch.int32)
    out = apply(layer, its, expert_map=expert_map)
    want = cute.kernel_of(shape).reference(shape, its | {"expert_map": expert_map})
    assert cute.error(out, want) < 5e-3 and world.calls == []


@pytest.mark.parametrize("what", ["scales", "weights"])
def test_a_layout_that_the_kernels_do_not_take_is_vllms(world, built, cute_plans, caplog, what):
    """Said once, with the tensor's name; vLLM serves on."""
    cute_plans[FP8].save(world.folder / "cute.plan.json")
    plugin.register()
    its = inputs(FP8)
    odd = dict(its)
    if what == "scales":
        odd["w13_scale"] = torch.cat([its["w13_scale"]] * 2, dim=-1)  # padded
    else:
        room = torch.empty(its["w13"].numel() + 1, dtype=torch.uint8)
        room[1:] = its["w13"].view(torch.uint8).view(-1)
        odd["w13"] = room[1:].view(torch.float8_e4m3fn).view(its["w13"].shape)
    layer = engine_layer(world, FP8, odd)
    for _ in range(2):
        with contextlib.suppress(RuntimeError):  # the stand-in multiplies no FP8
            apply(layer, odd)
    assert world.calls == [12, 12] and not built.calls
    (said,) = base.messages(caplog)
    assert ("w13_scale" if what == "scales" else "w13 does not start at a multiple of 16") in said


class Compiling:
    """A kernel whose library lacks something; what was asked of it, in order."""

    name = "cute_moe"

    def __init__(self, asked, must=True):
        self.asked, self.must = asked, must

    def must_compile(self, configs):
        self.asked.append(("must", len(configs)))
        return self.must

    def precompile(self, configs):
        self.asked.append(("load", len(configs)))
        return [None] * len(configs)


@pytest.mark.parametrize(("must", "works"), [(True, True), (True, False), (False, True)])
def test_what_the_library_lacks_is_compiled_in_another_process(monkeypatch, tmp_path, cute_plans, must, works):
    """All configs of the plan, under one lock; a failure leaves it to the first launches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(warming, "_run", lambda path, tokens: (asked.append((path, tokens)), works)[1])
    plan = cute_plans[FP8]
    graph_dispatcher = type("Asked", (), {"kernel": Compiling(asked, must), "plan": plan, "max_tokens": 64})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert warming.ensure_compiled(graph_dispatcher, "x.plan.json") is must
    count = len(plan.configs)
    ran = [("x.plan.json", 64)] if must else []
    assert asked == [("must", count), *ran, *([("load", count)] if works else [])]
    asked.clear()
    assert warming.compile_plan(graph_dispatcher) == [] and asked == [("load", count)]


def test_both_kernels_of_a_plan_are_compiled_ahead(monkeypatch, tmp_path, built):
    """The Triton kernel's configs in processes of their own, the CuTe kernels' from the library, or compiled where it lacks them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = make_plan(both_timings(BF16))
    plan.save(tmp_path / "both.plan.json")
    graph_dispatcher = GraphDispatcher(
        make_kernel(plan.kernel, BF16), plan, max_tokens=64, device=SIMULATED, where="cpu"
    )
    asked, ran, compiled = [], [], []
    graph_dispatcher.kernel.members["cute_moe"].must_compile = lambda configs: False
    graph_dispatcher.kernel.members["cute_moe"].precompile = lambda configs: (
        asked.append(list(configs)),
        [None] * len(configs),
    )[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(warming, "_run", lambda path, tokens: (ran.append(path), True)[1])
    path = str(tmp_path / "both.plan.json")
    assert warming.ensure_compiled(graph_dispatcher, path) and ran == [path], "Triton's part, once"
    assert not warming.ensure_compiled(graph_dispatcher, path) and ran == [path]
    cute_configs = [
        {k: v for k, v in config.items() if k != "kernel"} for config in plan.configs if config["kernel"] == "cute_moe"
    ]
    assert asked == [cute_configs] * 2 and cute_configs
    monkeypatch.setattr(warm, "warm", lambda shape, configs, **_: (compiled.extend(configs), ["one failed"])[1])
    assert warming.compile_plan(graph_dispatcher) == ["one failed"]
    assert len(compiled) == len(plan.configs) - len(cute_configs) and not any("kernel" in config for config in compiled)
    # Other members have their own way.
    compiled.clear()
    graph_dispatcher.kernel.members["triton_fused_moe"].name = "another"
    assert warming.compile_plan(graph_dispatcher) == [] and not compiled


def test_first_use_is_kept_for_the_next_process(monkeypatch, tmp_path):
    """What was compiled for some variants is loaded by a process that asks for the same, in whatever order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "dsl_version", lambda: "4")
    monkeypatch.setattr(library, "_load", lambda path: path)
    made = []

    def build(variants, folder):
        made.append([variant.symbol for variant in variants])
        folder.mkdir(parents=True)
        path = folder / library.LIBRARY
        path.write_bytes(b"kernels")
        kernels = {symbol: {} for symbol in made[-1]}
        manifest = {"source": library.source_digest(), "kernels": kernels, "refused": {}, "num_bytes": 7}
        (folder / library.MANIFEST).write_text(json.dumps(manifest))
        return type("Built", (), {"library": path})()

    monkeypatch.setattr(library, "build", build)
    variants = [Variant("up", config) for config in all_configs("two", "fp8")[:3]]
    first, second = library.Library(None), library.Library(None)
    assert first.must_compile(variants)
    first.ensure(variants)
    assert not first.must_compile(variants) and not second.must_compile(variants[::-1])
    assert second.must_compile(variants[:2]), "a library of others"
    second.ensure(variants[::-1])
    assert len(made) == 1 and second.kernels == first.kernels
    (tmp_path / "rampwrap" / "cute").rename(tmp_path / "gone")
    assert library.Library(None).must_compile(variants)


@pytest.mark.parametrize(
    ("engine", "shape", "found", "kernel", "hint"),
    [
        ("vllm", FP8, True, "cute_moe", ""),
        ("vllm", FP8, False, "triton_fused_moe", "build-kernels"),
        ("vllm", BF16, True, vllm_layer.BOTH, ""),
        ("vllm", BF16, False, "triton_fused_moe", ""),
        ("sglang", FP8, True, "vllm_fused_moe", ""),
        (None, FP8, True, "triton_fused_moe", ""),
        ("vllm", attrs.evolve(FP8, hidden_size=192), True, "triton_fused_moe", "hidden_size=192"),
    ],
)
def test_what_is_profiled_by_default(monkeypatch, built, engine, shape, found, kernel, hint):
    """One command makes the plan of the best kernel; where that cannot run, it says what to do."""
    monkeypatch.setattr(profiling, "find", lambda: pathlib.Path("x.so") if found else None)
    name, said = profiling.default_kernel(engine, shape)
    assert name == kernel and hint in said and bool(hint) == bool(said)


def test_default_kernel_of_the_command_line(monkeypatch, built, tmp_path, capsys):
    """`rampwrap profile --engine vllm` of an FP8 model, dry: the CuTe kernels' configs; --kernel overrules."""
    from rampwrap.cli.main import main

    config = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "hidden_act": "silu",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(profiling, "find", lambda: pathlib.Path("x.so"))
    command = ["profile", "--engine", "vllm", "--model", str(tmp_path), "--dry-run", "--json"]

    def configs(*more):
        assert main([*command, *more]) == 0
        (shape,) = json.loads(capsys.readouterr().out)["shapes"]
        return shape["configs"], shape.get("sweep", {}).get("configs")

    every = len(cute_moe.CuteFusedMoE(FP8).configs)
    assert configs() == (24, every), "an engine's profile begins with a sweep"
    assert configs("--most-configs", "10000") == (every, None)
    assert configs("--kernel", "triton_fused_moe")[1] not in (None, every)


def test_plans_of_a_real_table(monkeypatch):
    """The sweep of the FP8 kernels on an H200 gives a plan whose configs the adapter has, every one in reach."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "h200-sweep-cute-qwen3-30b-fp8.npz"
    if not path.exists():
        pytest.skip("the wheel is tested without benchmarks")
    from rampwrap.measure.timings import Timings
    from rampwrap.policy.static import static_table

    table = Timings.load(path)
    assert table.kernel == "cute_moe" and not np.isnan(table.us).any()
    kernel = cute_moe.CuteFusedMoE(table.shape, library=cute.StandIns())
    assert all(kernel.supports(config, table.shape) is None for config in table.configs)
    assert set(static_table(table, "uniform").token_counts) == set(table.num_tokens)
