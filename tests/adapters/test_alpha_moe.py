"""The Alpha-MoE adapter on a CPU stand-in of its operator; the real one is in tests/gpu.

The stand-in follows the contract of the real operator (interleaved rows, padded slots, output added to), written
apart from the adapter, so that layout mistakes show.
"""

import json
import math
import os
import sys
import types

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from rampwrap.adapters import alpha_moe as adapter
from rampwrap.adapters.alpha_moe import CONFIGS, KEYS, AlphaMoE, deinterleave, interleave, refusal, shared_bytes
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import RandomInputs
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.model.features import Geometry, pass_over
from rampwrap.model.wave import Wave
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import Shortlist
from rampwrap.policy.policies import Bucket
from rampwrap.policy.static import StaticTable, default_table, engine_table

SHAPE = MoEShape(4, 2, 256, 256, "fp8")
needs_kernels = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")
SCHEMA = (
    "fused_moe_w8a8_up_down(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor w2, Tensor w2_scale, "
    "Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, Tensor topk_weights, Tensor(a!) out, "
    "int top_k, int block_m, int block_n, int warp_n, int stages, float scaling_factor) -> ()"
)
calls = []


def config(*row):
    return dict(zip(KEYS, row, strict=True))


def stand_in(x, x_scale, w, w_scale, w2, w2_scale, slots, experts, padded, weights, out, top_k, *rest):
    block_m, scaling = rest[0], rest[-1]
    calls.append(rest)
    tokens = len(x)
    x = x.float() * x_scale.repeat_interleave(128, 1)
    for block in range(int(padded) // block_m):
        e = int(experts[block])
        row = torch.arange(w.shape[1])
        part, gate_row = (row % 16) // 8, row // 16 * 8 + row % 8
        # Scale rows alternate gate, up; each covers 128 rows of its part.
        scale = w_scale[e][gate_row // 128 * 2 + part].repeat_interleave(128, 1)
        full = w[e].float() * scale
        for slot in slots[block * block_m : (block + 1) * block_m].tolist():
            token = slot // top_k
            if token >= tokens:
                continue
            y = full @ x[token]
            h = torch.nn.functional.silu(y[part == 0]) * y[part == 1]
            down = w2[e].float() * w2_scale[e].repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[token] += (down @ h * weights.flatten()[slot] * scaling).to(out.dtype)


@pytest.fixture(scope="module")
def library():
    if torch.cuda.is_available():
        pytest.skip("the real operator belongs to the GPU tests")
    made = torch.library.Library("alpha_moe", "DEF")
    made.define(SCHEMA)
    made.impl("fused_moe_w8a8_up_down", stand_in, "CPU")
    return made


@pytest.fixture
def alpha(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "alpha_moe", types.ModuleType("alpha_moe"))
    calls.clear()
    return AlphaMoE(SHAPE)


def routing(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(num_tokens)]).int()


def two_config_plan(kernel, configs):
    """The first config for four experts with tokens, the second for two."""
    grids = tuple(kernel.grid(c, SHAPE) for c in configs)
    geometry = Geometry.of(grids, 132)
    rows = np.array([[5, 5, 4, 4], [9, 9, 0, 0]])
    slots, active, heights = pass_over(rows, np.unique(geometry.block_m))
    support = np.concatenate([slots[:, None], active[:, None], heights], axis=1).astype(np.int64)
    coef = (np.array([[10.0, 0, 0, 1.0, 0], [4.0, 0, 0, 3.0, 0]]) / 2.0**-30).astype(np.int64)
    nothing = np.zeros((2, len(support)), dtype=np.int64)
    model = Wave(geometry, np.array([[1, 999]] * 2), 0.004, (), coef, nothing, support, np.unique(geometry.block_m))
    return Plan(
        kernel=kernel.name,
        kernel_version=kernel.version,
        device=Device.current(),
        shape=SHAPE,
        configs=configs,
        grids=grids,
        static=StaticTable("uniform", (1,), (0,)),
        model=model,
        buckets=(Bucket(8, (0, 1)),),
    )


@needs_kernels
@pytest.mark.parametrize("row", [(8, 64, 4, 2), (24, 32, 8, 5)])
def test_layer(alpha, row):
    """The operator gets what it expects: the layer of float64, whatever the output held before."""
    inputs = alpha.inputs(SHAPE, routing(5))
    reference = alpha.reference(SHAPE, inputs)
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    assert alpha.launch(config(*row), **inputs, out=out) is out
    assert (out.double() - reference).norm() < 0.05 * reference.norm()
    doubled = alpha.launch(config(*row), **inputs, scaling_factor=2.0)
    assert (doubled.double() - 2 * reference).norm() < 0.1 * reference.norm()
    assert calls[-1] == (*row, 2.0)


@needs_kernels
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_candidates(alpha, chosen):
    """All are launched, the blocks let one run: its bits, written over whatever the output held."""
    configs = [config(8, 64, 4, 2), config(24, 32, 8, 5), config(16, 64, 4, 3)]
    inputs = alpha.inputs(SHAPE, routing(5))
    blocks = [align_tokens(inputs["topk_ids"], c["block_m"], 4) for c in configs]
    for place, its in enumerate(blocks):
        if place != chosen:
            its.num_tokens_post_padded.zero_()
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    calls.clear()
    alpha.launch_candidates(configs, blocks, torch.tensor([chosen]), **inputs, out=out)
    assert [call[0] for call in calls] == [8, 24, 16]
    assert torch.equal(out, alpha.launch(configs[chosen], **inputs))
    with pytest.raises(ConfigError, match="stages=9"):
        alpha.launch_candidates([config(8, 64, 4, 9)], blocks[:1], torch.tensor([0]), **inputs)


@needs_kernels
def test_selected(alpha):
    """Behind a GraphDispatcher: the configs follow the routing, and only the chosen one has rows."""
    configs = (config(8, 64, 4, 2), config(32, 32, 8, 5))
    plan = two_config_plan(alpha, configs)
    both = Shortlist(0, 8, (0, 1), 0, None, None, "for the test")
    graph_dispatcher = GraphDispatcher(alpha, attrs.evolve(plan, in_graph=(both,)), max_tokens=16)
    seen = set()
    for ids in (routing(9), torch.tensor([[0, 1]] * 9, dtype=torch.int32)):
        inputs = alpha.inputs(SHAPE, ids)
        index = plan.policy().index(np.bincount(ids.numpy().ravel(), minlength=4), 9)
        assert torch.equal(graph_dispatcher(**inputs), alpha.launch(configs[index], **inputs))
        seen.add(index)
    assert seen == {0, 1} and graph_dispatcher.prepared(9).shortlist.mode == "graph"
    assert sum(graph_dispatcher.counts()[8].values()) == 2


@needs_kernels
def test_every_slot_on_one_expert_and_remote_experts(alpha):
    """One hot expert, three without tokens; a rank that holds half of the experts adds only its share."""
    inputs = alpha.inputs(SHAPE, torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.int32))
    whole = alpha.launch(config(8, 64, 4, 1), **inputs).double()
    assert (whole - alpha.reference(SHAPE, inputs)).norm() < 0.05 * whole.norm()
    part = AlphaMoE(MoEShape(4, 2, 256, 256, "fp8", num_local_experts=2))
    total = torch.zeros_like(whole)
    for first in (0, 2):
        mine = {name: inputs[name][first : first + 2] for name in ("w13", "w2", "w13_scale", "w2_scale")}
        expert_map = torch.full((4,), -1, dtype=torch.int32)
        expert_map[first : first + 2] = torch.arange(2, dtype=torch.int32)
        total += part.launch(config(8, 64, 4, 1), **(inputs | mine), expert_map=expert_map).double()
    assert (total - whole).norm() < 0.02 * whole.norm()


@needs_kernels
def test_refused_before_launch(alpha):
    """What would end the process, or make the kernel read garbage, raises before anything is launched."""
    inputs = alpha.inputs(SHAPE, routing(3))
    with pytest.raises(ConfigError, match=r"block_m=104 .* would end the process"):
        alpha.launch(config(104, 64, 4, 5), **inputs)
    with pytest.raises(ConfigError, match="The config has block_m"):
        alpha.launch({"block_m": 8}, **inputs)
    for changed, message in [
        ({"w13": inputs["w13"].float()}, "w13 is float32"),
        ({"topk_weights": inputs["topk_weights"].bfloat16()}, "topk_weights is bfloat16"),
        ({"w2_scale": inputs["w2_scale"][:2]}, r"w2_scale is float32 of shape \(2, 2, 2\)"),
        ({"hidden_states": inputs["hidden_states"].half()}, "hidden_states is float16"),
        ({"out": torch.zeros(3, 128)}, "out is float32"),
        ({"topk_ids": inputs["topk_ids"].T}, "topk_ids is int32"),
    ]:
        with pytest.raises(InputError, match=message):
            alpha.launch(config(8, 64, 4, 1), **(inputs | changed))
    assert not calls
    assert not alpha.launch(config(8, 64, 4, 1), **alpha.inputs(SHAPE, routing(1)[:0])).numel()
    assert not calls


@needs_kernels
def test_grid_limit(alpha, monkeypatch):
    """More M blocks than the grid's second axis has are refused."""
    monkeypatch.setattr(adapter, "MAX_GRID_Y", 1)
    with pytest.raises(InputError, match="5 tokens make more than 1 blocks of 8"):
        alpha.launch(config(8, 64, 4, 1), **alpha.inputs(SHAPE, routing(5)))


def test_shapes(alpha):
    """Shapes that it cannot run are refused when the adapter is made."""
    for shape, message in [
        (MoEShape(4, 2, 256, 256), "dtype bf16"),
        (MoEShape(4, 2, 384, 256, "fp8"), "hidden_size=384"),
        (MoEShape(4, 2, 256, 192, "fp8"), "intermediate_size=192"),
    ]:
        with pytest.raises(ConfigError, match=message):
            AlphaMoE(shape)


def test_absent(monkeypatch):
    """One sentence that says how to get it."""
    monkeypatch.setitem(sys.modules, "alpha_moe", None)
    with pytest.raises(InputError, match=r"^Alpha-MoE is not installed .*pip install .*Alpha-MoE' on a machine with"):
        AlphaMoE(SHAPE)


def test_config_list(alpha):
    """152 of 160 instances: those with 5 stages and more than 100 rows need more shared memory than there is."""
    assert isinstance(alpha, Kernel)
    assert len(CONFIGS) == len(alpha.configs) == 152
    bad = [
        (block_m, *pair, stages)
        for block_m in range(8, 129, 8)
        for pair in adapter.PAIRS
        for stages in range(1, 6)
        if refusal(config(block_m, *pair, stages)) is not None
    ]
    assert {(row[0], row[3]) for row in bad} == {(104, 5), (112, 5), (120, 5), (128, 5)}
    assert shared_bytes(config(96, 64, 4, 5)) <= 227 * 1024 < shared_bytes(config(104, 64, 4, 5))
    assert all(alpha.default_config(tokens) in alpha.configs for tokens in (1, 7, 64, 100_000))
    for row, message in [((12, 64, 4, 1), "block_m=12"), ((8, 64, 8, 1), "warp_n=8"), ((8, 64, 4, 6), "stages=6")]:
        assert message in refusal(config(*row))


def test_grid(alpha):
    """One launch, 2I / 256 CTAs a block."""
    grid = alpha.grid(config(16, 64, 4, 3), MoEShape(64, 8, 2048, 1024, "fp8"))
    assert (grid.block_m, grid.launches) == (16, (8,))
    assert grid.ctas_per_sm >= alpha.grid(config(128, 64, 4, 4), SHAPE).ctas_per_sm == 1


def test_interleaving():
    """8 gate rows, 8 up rows; scales one by one; undone exactly."""
    w = torch.arange(2 * 32 * 3).view(2, 32, 3)
    made = interleave(w)
    assert made[0, :, 0].tolist() == [3 * r for r in (*range(8), *range(16, 24), *range(8, 16), *range(24, 32))]
    assert torch.equal(deinterleave(made), w)
    assert interleave(w, 1)[1, :4].tolist() == [w[1, r].tolist() for r in (0, 16, 1, 17)]
    fp8 = torch.randn(2, 16, 128).to(adapter.FP8)
    assert torch.equal(deinterleave(interleave(fp8)).float(), fp8.float())
    with pytest.raises(InputError, match="multiple of 16"):
        interleave(torch.zeros(1, 24, 1))


def test_baseline(alpha, tmp_path, monkeypatch):
    """Alpha-MoE's tuned file, by its own variable."""
    monkeypatch.delenv("ALPHA_MOE_CONFIG", raising=False)
    assert alpha.tuned_file() is None and engine_table(alpha) == default_table(alpha)
    path = tmp_path / "moe_jit.json"
    path.write_text(json.dumps({"8": config(8, 32, 8, 5), "64": config(16, 64, 4, 3)}))
    monkeypatch.setenv("ALPHA_MOE_CONFIG", str(path))
    table = engine_table(alpha)
    assert alpha.configs[table.index(1)] == config(8, 32, 8, 5)
    assert alpha.configs[table.index(60)] == config(16, 64, 4, 3)


def test_conversion_size(alpha):
    """The bytes it announces are those it takes."""
    inputs = RandomInputs().make(SHAPE, routing(1))
    made = alpha.convert_weights(**inputs)
    assert alpha.converted_bytes(SHAPE) == sum(t.numel() * t.element_size() for t in made.values())


@pytest.mark.parametrize(
    ("block_m", "stages", "up", "down", "static"),
    [
        # 32 KB of weights a stage; up: 128 bytes and 8 of scales a row and stage; down: 128 and 528 bytes of output a row.
        (16, 1, 32_768 + 16 * 136 + 16, 32_768 + 16 * 656, 16 + 64 + 16),
        (8, 5, 5 * (32_768 + 8 * 136 + 16), 5 * 32_768 + 8 * 656, 80 + 32 + 80),
        (128, 4, 4 * (32_768 + 128 * 136 + 16), 4 * 32_768 + 128 * 656, 64 + 512 + 64),
    ],
)
def test_shared_memory_by_hand(block_m, stages, up, down, static):
    """The larger phase in whole KB, and what is static; the down phase is larger up to four stages."""
    assert shared_bytes(config(block_m, 64, 4, stages)) == math.ceil(max(up, down) / 1024) * 1024 + static
    assert (down > up) == (stages <= 4)
