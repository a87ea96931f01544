"""The CuTe kernels on a GPU: every config, edge cases, graphs, random launches under a watchdog.

RAMPWRAP_CUTE_LIBRARY=DIR python -m pytest -m gpu tests/gpu/kernels/test_cute_gpu.py
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import attrs

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import CaptureError, InputError
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.cute.configs import FORMS, WIDTHS
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.quantise import quantise_rows
from rampwrap.testing.conformance import check

STRESS = pathlib.Path(__file__).with_name("cute_stress.py")
spec = importlib.util.spec_from_file_location("cute_stress", STRESS)
stress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stress)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED.value, reason="TRITON_INTERPRET is set, nothing would run on the GPU"),
]
DTYPES = ("bf16", "fp8")
SHAPE = MoEShape(32, 4, 512, 384)
LAUNCHES = int(os.environ.get("RAMPWRAP_STRESS_LAUNCHES", "10000"))


def make(shape, form, **options):
    """An adapter, or the skip that says what is absent."""
    try:
        return CuteFusedMoE(shape, form, **options)
    except InputError as error:
        pytest.skip(str(error))


def uniform(shape, num_tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator, device="cuda")
    return scores.topk(shape.top_k, dim=1).indices.int()


def launched(kernel, config, inputs, **options):
    """A launch on poisoned memory."""
    tokens = len(inputs["topk_ids"])
    out = torch.full_like(inputs["hidden_states"], torch.nan)
    return kernel.launch(config, **inputs, out=out, workspace=stress.poison(kernel.workspace(tokens)), **options)


def error(out, expected):
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def some(kernel, count=12):
    """Every n-th config: all tiles, small and large blocks, both orders."""
    step = max(1, len(kernel.configs) // count) | 1
    return kernel.configs[::step]


def assert_right(kernel, inputs, configs, **options):
    """Every config within the bound of float64 with the same quantisation steps; all that are not are listed."""
    expected = kernel.reference(kernel.shape, inputs)
    wrong = []
    for config in configs:
        off = error(launched(kernel, config, inputs, **options), expected)
        if not off < stress.BOUND[kernel.shape.dtype]:
            wrong.append(f"{format_config(config)}: {off:.4g}")
    assert not wrong, f"{len(wrong)} of {len(configs)}: " + "; ".join(wrong[:20])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config(form, dtype):
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, form)
    for num_tokens in (1, 200):
        assert_right(kernel, kernel.inputs(shape, uniform(shape, num_tokens)), kernel.configs)


@pytest.mark.parametrize("waves", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conformance(form, dtype, waves):
    """The suite; with a CTA for every tile the profiler counts them."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, form, waves=waves)
    report = check(kernel, num_tokens=(1, 36, 300))
    print(report)
    assert set(report.skipped) == ({"grid"} if waves else set())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_every_interesting_number_of_tokens(form, dtype):
    """0, 1, block_m - 1, block_m, block_m + 1 and many tokens, for each block_m."""
    shape = MoEShape(8, 1, 256, 256, dtype)
    kernel = make(shape, form)
    every = {c["block_m"] for c in kernel.configs}
    heights = {"prefill": {64, 128}, "ragged": every | set(WIDTHS)}.get(form, every)
    for block_m in sorted(heights):
        counts = [0, 1, block_m - 1, block_m, block_m + 1, 0, 3 * block_m + 5, 2]
        ids = torch.repeat_interleave(torch.arange(8), torch.tensor(counts)).int()
        ids = ids[torch.randperm(len(ids))].view(-1, 1).cuda()
        # The prefill form skips every other 64 rows.
        configs = [c for c in kernel.configs if form in ("prefill", "ragged") or c["block_m"] == block_m]
        assert_right(kernel, kernel.inputs(shape, ids), configs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 8), (16, 16), (64, 6), (256, 8), (512, 10)])
def test_numbers_of_experts(form, dtype, num_experts, top_k):
    shape = MoEShape(num_experts, top_k, 256, 256, dtype)
    kernel = make(shape, form)
    for num_tokens in (1, 3, 130):
        assert_right(kernel, kernel.inputs(shape, uniform(shape, num_tokens)), some(kernel))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_expert_and_no_expert_at_all(form, dtype):
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, form)
    ids = uniform(shape, 700)
    ids[:, 0] = 5
    ids[ids[:, 1:].eq(5).any(1), 1:] = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    assert_right(kernel, kernel.inputs(shape, ids), some(kernel))
    nobody = torch.full((40, shape.top_k), -1, dtype=torch.int32, device="cuda")
    for config in some(kernel):
        assert not launched(kernel, config, kernel.inputs(shape, nobody)).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_remote_experts_and_other_types(form, dtype):
    """Half of the experts on another rank; int64 ids, bf16 routing weights."""
    shape = attrs.evolve(SHAPE, dtype=dtype, num_local_experts=16)
    kernel = make(shape, form)
    expert_map = torch.full((32,), -1, dtype=torch.int32, device="cuda")
    expert_map[torch.randperm(32)[:16]] = torch.arange(16, dtype=torch.int32, device="cuda")
    inputs = kernel.inputs(shape, uniform(shape, 90).long()) | {"expert_map": expert_map}
    inputs["topk_weights"] = inputs["topk_weights"].bfloat16()
    assert_right(kernel, inputs, some(kernel))


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_quantised_already(form):
    """Read where they lie, with the bits of a layer that quantises them itself; NaN in rows of other ranks is never read."""
    shape = attrs.evolve(SHAPE, dtype="fp8", num_local_experts=8)
    kernel = make(shape, form)
    inputs = kernel.inputs(shape, uniform(shape, 70))
    rows, scales = torch.empty_like(inputs["hidden_states"], dtype=FP8), torch.empty(70, 4, device="cuda")
    quantise_rows(inputs["hidden_states"], rows, scales)
    scales[(inputs["expert_map"][inputs["topk_ids"].long()] < 0).all(1)] = torch.nan
    for config in some(kernel, 3):
        want = launched(kernel, config, inputs)
        out = kernel.launch(config, **inputs | {"hidden_states": rows}, hidden_scale=scales)
        assert error(out, want.double()) < 1e-3 if form == "one" else torch.equal(out, want), format_config(config)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["olmoe", "qwen3-30b", "deepseek-v3-tp8"])
def test_layers_of_models(name, dtype, form):
    """Real sizes, tokens from one to prefill."""
    from rampwrap.kernel.shape import SHAPES

    shape = attrs.evolve(SHAPES[name], dtype=dtype)
    kernel = make(shape, form)
    for num_tokens in (1, 33, 512):
        assert_right(kernel, kernel.inputs(shape, uniform(shape, num_tokens)), some(kernel, 6))


@pytest.mark.parametrize("form", FORMS)
def test_weights_beyond_32_bits(form):
    """DeepSeek-V3 without parallelism, 11 GB of FP8: the last experts lie 7.5e9 elements in."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    shape = MoEShape(256, 8, 7168, 2048, "fp8")
    kernel = make(shape, form)
    ids = torch.arange(248, 256, dtype=torch.int32, device="cuda").repeat(20, 1)
    ids[:, 0] = torch.arange(20, dtype=torch.int32, device="cuda")
    assert_right(kernel, kernel.inputs(shape, ids), some(kernel, 4))


def test_rows_beyond_32_bits():
    """150,000 tokens of Qwen3-30B: 2.4e9 values in the rows before the sum. A token's result is its own."""
    shape = MoEShape(128, 8, 2048, 768, "fp8")
    kernel = make(shape, "two")
    inputs = kernel.inputs(shape, uniform(shape, 150_000))
    config = next(c for c in kernel.configs if c["block_m"] == 64 and c["block_n"] * c["warp_n"] == 256)
    out = kernel.launch(config, **inputs)
    for rows in (slice(0, 64), slice(-64, None)):
        part = {k: v[rows] if k in ("hidden_states", "topk_weights", "topk_ids") else v for k, v in inputs.items()}
        assert error(out[rows], kernel.reference(shape, part)) < stress.BOUND["fp8"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_launches_give_the_same_bits_whatever_the_order(dtype):
    """group_m and waves only reorder tiles."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, "two")
    inputs = kernel.inputs(shape, uniform(shape, 300))
    for config in some(kernel):
        first = launched(kernel, config, inputs)
        for group_m in (1, 3, 8, 1024):
            for waves in (0, 1, 5):
                assert torch.equal(first, launched(kernel, {**config, "group_m": group_m}, inputs, waves=waves))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_follows_the_routing(form, dtype):
    """Captured once, replayed on other batches: what eager gives; and a cold config is refused, not hung."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, form)
    inputs = kernel.inputs(shape, uniform(shape, 64).clone())
    memory, out = kernel.workspace(64), torch.empty_like(inputs["hidden_states"])
    cold = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="launch it before"), torch.cuda.graph(cold):
        kernel.launch(kernel.configs[0], **inputs, workspace=memory, out=out)
    torch.cuda.synchronize()
    for config in some(kernel):
        kernel.launch(config, **inputs, workspace=memory, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel.launch(config, **inputs, workspace=memory, out=out)
        for seed in range(4):
            inputs["topk_ids"].copy_(uniform(shape, 64, seed) if seed else torch.zeros(64, shape.top_k))
            inputs["hidden_states"].normal_()
            stress.poison(memory)
            out.fill_(torch.nan)
            graph.replay()
            replayed = out.clone()
            eager = launched(kernel, config, inputs)
            if form != "one":
                assert torch.equal(replayed, eager)
            else:
                assert error(replayed, eager.double()) < stress.BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_without_a_plan(dtype):
    """The default of each size, captured after one eager step and replayed with other routing: every form that serves."""
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, "both")
    layer = GraphDispatcher(kernel, max_tokens=4096).layer("layer")
    forms = set()
    for tokens in (1, 2, 24, 48, 300, 4096):
        inputs = kernel.inputs(shape, uniform(shape, tokens).clone())
        forms.add(kernel.default_config(tokens)["form"])
        layer(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(**inputs)
        for seed in range(2):
            few = torch.arange(shape.top_k).expand(tokens, shape.top_k)
            inputs["topk_ids"].copy_(uniform(shape, tokens, seed) if seed else few)
            graph.replay()
            assert error(out, kernel.reference(shape, inputs)) < stress.BOUND[dtype], (tokens, seed)
    assert forms == {"one", "ragged", "prefill"} | ({"two"} if dtype == "fp8" else set())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ragged_form_gives_the_same_bits_every_time(dtype):
    shape = attrs.evolve(SHAPE, dtype=dtype)
    kernel = make(shape, "ragged")
    for num_tokens in (1, 7, 64, 300):
        inputs = kernel.inputs(shape, uniform(shape, num_tokens))
        for config in kernel.configs:
            first = launched(kernel, config, inputs)
            assert all(torch.equal(first, launched(kernel, config, inputs)) for _ in range(5)), config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts", [[400] + [0] * 31, [1] * 32, [0] * 31 + [1], [97] * 32, [1, 96] * 16, [8, 9, 300, 0] * 8]
)
def test_the_ragged_form_on_counts_of_all_kinds(dtype, counts):
    shape = attrs.evolve(SHAPE, dtype=dtype, top_k=1)
    kernel = make(shape, "ragged")
    ids = torch.repeat_interleave(torch.arange(32), torch.tensor(counts)).int()
    ids = ids[torch.randperm(len(ids))].view(-1, 1).cuda()
    assert_right(kernel, kernel.inputs(shape, ids), kernel.configs)


def test_nothing_is_allocated_with_a_workspace():
    kernel = make(attrs.evolve(SHAPE, dtype="fp8"), "two")
    inputs = kernel.inputs(kernel.shape, uniform(SHAPE, 100))
    memory, out = kernel.workspace(100), torch.empty_like(inputs["hidden_states"])
    config = kernel.configs[0]
    kernel.launch(config, **inputs, workspace=memory, out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kernel.launch(config, **inputs, workspace=memory, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_nothing_waits_for_the_gpu():
    """Launches queue up behind a kernel that takes long."""
    kernel = make(attrs.evolve(SHAPE, dtype="fp8"), "two")
    inputs = kernel.inputs(kernel.shape, uniform(SHAPE, 100))
    memory, out = kernel.workspace(100), torch.empty_like(inputs["hidden_states"])
    kernel.launch(kernel.configs[0], **inputs, workspace=memory, out=out)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done = torch.cuda.Event()
    kernel.launch(kernel.configs[0], **inputs, workspace=memory, out=out)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_shares_weights_with_triton_in_a_portfolio():
    shape = attrs.evolve(SHAPE, dtype="fp8")
    ours, triton = make(shape, "both"), TritonFusedMoE(shape)
    portfolio = Portfolio([triton, ours])
    dispatcher, inputs = Dispatcher(portfolio), triton.inputs(shape, uniform(shape, 50))
    expected = triton.reference(shape, inputs)
    for kernel in (triton, ours):
        out = dispatcher.pin(portfolio.tagged(kernel, kernel.default_config(50)))(**inputs)
        assert error(out, expected) < 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_random_launches_neither_hang_nor_err(form):
    """10,000 launches in a process that is killed if it takes too long."""
    make(SHAPE, form)
    command = [sys.executable, str(STRESS), "--launches", str(LAUNCHES), "--form", form]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120 + LAUNCHES / 50, check=False)
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"hung after: {(hung.stdout or b'').decode()[-300:]}; find the launch with --each")
    assert done.returncode == 0, done.stdout[-600:] + done.stderr[-600:]
    print(done.stdout)
