"""The CuTe adapter on a CPU stand-in of its compiled kernels; the real ones are in tests/gpu.

The stand-ins are written from the contract of the compiled functions (flat arguments, blocks of one expert, padded
slots, rows nobody owns left alone), apart from the adapter, so that a wrong argument or buffer shows.
"""

import importlib.util
import os
import pathlib

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import attrs

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import activate, dequantise, quantise, weights_of
from rampwrap.kernels.cute.build.library import Library
from rampwrap.kernels.cute.defaults import default
from rampwrap.kernels.cute.host.launch import l2_fetch
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.testing.conformance import check

FP8 = MoEShape(8, 2, 256, 256, "fp8")
BF16 = MoEShape(8, 2, 256, 128)
needs_kernels = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")


def blocks_of(variant, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots, num_blocks):
    """(expert, slots) of each block that a kernel works on."""
    block_m = variant.config.block_m
    count = min(int(num_tokens_post_padded) // block_m, num_blocks)
    for block in range(count):
        slots = sorted_token_ids[block * block_m : (block + 1) * block_m].long()
        if expert_ids[block] >= 0:
            yield int(expert_ids[block]), slots[slots < num_slots]


def pairs(variant, arguments):
    """The tensors of a call with each FP8 tensor and its scales as one float64 tensor, and the numbers."""
    *tensors, top_k, group_m, num_blocks, max_ctas, l2_fetch = arguments
    assert all(isinstance(n, int) for n in (top_k, group_m, num_blocks, max_ctas)) and top_k * group_m * max_ctas > 0
    assert l2_fetch in (128, 256)
    return tensors, (top_k, group_m, num_blocks, max_ctas)


def stand_in(variant, calls):
    """A compiled kernel's function."""
    fp8 = variant.config.dtype == "fp8"

    def take(tensors, weights=False):
        data, scale = tensors.pop(0), tensors.pop(0) if fp8 else None
        assert data.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
        if weights:
            return [weights_of(data[e], None if scale is None else scale[e]) for e in range(len(data))]
        return dequantise(data, scale) if fp8 else data.double()

    def put(tensors, rows, values):
        if fp8:
            tensors[0][rows], tensors[1][rows] = quantise(values)
        else:
            tensors[0][rows] = values.to(torch.bfloat16)

    def up(*arguments):
        tensors, (top_k, _, num_blocks, _) = pairs(variant, arguments)
        x, w13 = take(tensors), take(tensors, weights=True)
        *routing, h = tensors[:3], tensors[3:]
        assert len(x) * top_k == len(h[0])
        for expert, slots in blocks_of(variant, *routing[0], len(h[0]), num_blocks):
            put(h, slots, activate(x[slots // top_k], w13[expert]))

    def down(*arguments):
        tensors, (_, _, num_blocks, _) = pairs(variant, arguments)
        h, w2 = take(tensors), take(tensors, weights=True)
        *routing, weights, rows = tensors
        for expert, slots in blocks_of(variant, *routing, len(h), num_blocks):
            rows[slots] = ((h[slots] @ w2[expert].T) * weights[slots, None].double()).to(torch.bfloat16)

    def mega(*arguments):
        tensors, (top_k, _, num_blocks, _) = pairs(variant, arguments)
        x, w13, w2 = take(tensors), take(tensors, weights=True), take(tensors, weights=True)
        *routing, weights, out = tensors
        assert out.dtype == torch.float32 and not out.any()
        for expert, slots in blocks_of(variant, *routing, len(weights), num_blocks):
            h = activate(x[slots // top_k], w13[expert])
            h = dequantise(*quantise(h)) if fp8 else h
            out.index_add_(0, slots // top_k, ((h @ w2[expert].T) * weights[slots, None]).float())

    def ordered(h):
        """Every row of every block from here on is garbage unless written: h in the order of blocks."""
        assert h[0].shape[0] % 128 == 0
        return h

    def prefill_up(*arguments):
        tensors, (top_k, _, num_blocks, _) = pairs(variant, arguments)
        x, w13 = take(tensors), take(tensors, weights=True)
        *routing, h = tensors[:3], ordered(tensors[3:])
        assert len(h[0]) >= num_blocks * 128
        for row, (expert, slots) in enumerate(blocks_of(variant, *routing[0], len(x) * top_k, num_blocks)):
            rows = slice(row * 128, row * 128 + len(slots))
            values = activate(x[slots // top_k], w13[expert])
            if fp8:
                h[0][rows], scale = quantise(values)
                h[1][:, rows] = scale.T
            else:
                h[0][rows] = values.to(torch.bfloat16)

    def prefill_down(*arguments):
        tensors, (_, _, num_blocks, _) = pairs(variant, arguments)
        h, scale = tensors.pop(0), tensors.pop(0).T.contiguous() if fp8 else None
        w2 = take(tensors, weights=True)
        *routing, weights, rows = tensors
        for block, (expert, slots) in enumerate(blocks_of(variant, *routing, len(rows), num_blocks)):
            part = slice(block * 128, block * 128 + len(slots))
            values = dequantise(h[part], scale[part]) if fp8 else h[part].double()
            rows[slots] = ((values @ w2[expert].T) * weights[slots, None].double()).to(torch.bfloat16)

    run = {
        **{"up": up, "down": down, "mega": mega, "prefill_up": prefill_up, "prefill_down": prefill_down},
        **{"ragged_up": up, "ragged_down": down},
    }[variant.role]

    def function(*arguments):
        calls.append((variant.symbol, arguments))
        run(*arguments)

    return function


class StandIns(Library):
    """A library with every kernel, none of them compiled; `refused` ones are absent."""

    def __init__(self, refused=()):
        super().__init__(None)
        self.can_compile = False
        self.refused = dict.fromkeys(refused, "It spills.")
        self.calls = []

    def why_absent(self, config):
        return next((f"{v.symbol} was refused." for v in config.variants if v.symbol in self.refused), None)

    def _find(self, variant):
        return stand_in(variant, self.calls)


def kernel_of(shape, form="two", **options):
    return CuteFusedMoE(shape, form, StandIns(), **options)


def routing(shape, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, shape.num_experts, generator=generator).topk(shape.top_k, dim=1).indices.int()


def error(out, reference):
    return float((out.double() - reference).norm() / reference.norm().clamp_min(1e-30))


@needs_kernels
@pytest.mark.parametrize("shape", [FP8, BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("form", ["two", "one", "prefill", "ragged"])
def test_conformance(shape, form):
    """The suite, on the stand-ins: what is passed to them, and what is done around them."""
    kernel = kernel_of(shape, form)
    assert isinstance(kernel, Kernel)
    report = check(kernel, device="cpu", num_tokens=(9,), configs=kernel.configs[:: max(1, len(kernel.configs) - 1)])
    assert report.worst_error < 5e-3
    assert "persistent" in report.skipped["grid"]


def test_the_list_holds_every_form_once():
    kernel = CuteFusedMoE(FP8, library=StandIns())
    forms = {form: [c for c in kernel.configs if c["form"] == form] for form in ("two", "one", "prefill", "ragged")}
    assert [len(its) for its in forms.values()] == [2 * 48, 2 * 26, 2, 2 * 6]
    assert sum(map(len, forms.values())) == len(kernel.configs)
    assert {c["group_m"] for c in kernel.configs} == {1, 8}
    assert all(kernel.supports(config, FP8) is None for config in kernel.configs)
    assert kernel.nondeterministic and not hasattr(kernel_of(FP8), "nondeterministic")


def test_configs_whose_kernels_were_refused_are_left_out():
    kernel = CuteFusedMoE(FP8, "two", StandIns(["down_fp8_m8_n32_w4_s4"]))
    gone = [c for c in kernel_of(FP8).configs if c not in kernel.configs]
    # One down kernel serves all depths of its tile.
    assert {(c["block_m"], c["block_n"], c["warp_n"]) for c in gone} == {(8, 32, 4)} and len(gone) == 4
    assert "refused" in kernel.supports(gone[0], FP8)
    with pytest.raises(ConfigError, match="refused"):
        kernel.launch(gone[0], **kernel.inputs(FP8, routing(FP8, 2)))


def test_grid_counts_tiles():
    kernel = kernel_of(attrs.evolve(FP8, hidden_size=512))
    config = next(c for c in kernel.configs if (c["block_n"], c["warp_n"]) == (32, 8))
    grid = kernel.grid(config, kernel.shape)
    assert grid.launches == (2, 2) and grid.persistent and grid.ctas_per_sm == 1
    one = kernel_of(kernel.shape, "one", waves=0)
    grid = one.grid({**config, "form": "one"}, one.shape)
    assert grid.launches == (2,) and not grid.persistent
    with pytest.raises(ConfigError, match="give form, block_m"):
        kernel.grid({}, FP8)


@needs_kernels
def test_arguments_are_those_of_the_contract():
    """In order, with buffers of the right rows, capacity as num_blocks, and no limit of CTAs at waves=0."""
    kernel = kernel_of(FP8)
    ids = routing(FP8, 5)
    inputs = kernel.inputs(FP8, ids)
    config = next(c for c in kernel.configs if c["block_m"] == 16 and c["group_m"] == 8)
    kernel.launch(config, **inputs, waves=0)
    kernel.launch(config, **inputs)
    (up, ups), (down, downs), (_, again), _ = kernel.library.calls
    assert up.startswith("up_fp8_m16") and down.startswith("down_fp8_m16")
    capacity = max_blocks(10, 8, 16)
    assert ups[-5:] == (2, 8, capacity, 2**31 - 1, 256) == downs[-5:]
    assert again[-2] == 2  # one CTA for each of a CPU's two
    assert ups[2] is inputs["w13"] and ups[3] is inputs["w13_scale"] and downs[2] is inputs["w2"]
    assert [tuple(t.shape) for t in ups[:2]] == [(5, 256), (5, 2)]
    assert [tuple(t.shape) for t in ups[7:9]] == [(10, 256), (10, 2)]
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(ups[7:9], downs[:2], strict=True))
    assert tuple(downs[-6].shape) == (10, 256) and downs[-6].dtype == torch.bfloat16


@needs_kernels
@pytest.mark.parametrize("form", ["two", "one", "prefill", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_out_of_range_and_remote_experts_contribute_nothing(form, dtype):
    shape = attrs.evolve(BF16, num_local_experts=4)
    kernel = kernel_of(shape, form)
    ids = routing(shape, 20).long()
    ids[3], ids[4, 0] = -1, 99
    inputs = kernel.inputs(shape, ids)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1], dtype=torch.int32)
    inputs |= {"expert_map": expert_map, "topk_weights": inputs["topk_weights"].to(dtype)}
    out = torch.full((20, shape.hidden_size), float("nan"), dtype=torch.bfloat16)
    memory = kernel.workspace(32, "cpu")
    for tensor in attrs.asdict(memory, recurse=False).values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.fill_(float("nan"))  # marks are no scratch
    found = kernel.launch(kernel.configs[0], **inputs, out=out, workspace=memory)
    assert found is out and error(out, kernel.reference(shape, inputs)) < 5e-3
    assert not out[3].any()


@needs_kernels
@pytest.mark.parametrize("form", ["two", "one", "prefill", "ragged"])
def test_hidden_states_that_are_quantised_already(form):
    """As `ExpertParallel` receives them: read as they are, with the bits of a layer that quantises them itself."""
    kernel = kernel_of(FP8, form)
    inputs, config = kernel.inputs(FP8, routing(FP8, 9)), kernel.configs[0]
    want = kernel.launch(config, **inputs)
    rows, scales = quantise(inputs["hidden_states"])
    given = inputs | {"hidden_states": rows, "hidden_scale": scales}
    for memory in (None, kernel.workspace(9, "cpu")):
        out = kernel.launch(config, **given, workspace=memory)
        assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    _, arguments = kernel.library.calls[-1 if form == "one" else -2]
    assert arguments[0] is rows and arguments[1] is scales
    with pytest.raises(InputError, match="multiples of 16 bytes"):
        off = torch.empty(rows.numel() + 1, dtype=rows.dtype)[1:].view(rows.shape)
        kernel.launch(config, **given | {"hidden_states": off})
    plain = kernel_of(BF16)
    with pytest.raises(InputError, match="hidden_scale was given for a layer of"):
        plain.launch(plain.configs[0], **plain.inputs(BF16, routing(BF16, 9)), hidden_scale=scales)


@needs_kernels
def test_nothing_is_allocated_with_a_workspace():
    """What a CUDA graph must not see: memory from anywhere but the workspace."""
    kernel = kernel_of(FP8)
    inputs = kernel.inputs(FP8, routing(FP8, 6))
    memory, out = kernel.workspace(8, "cpu"), torch.empty(6, 256, dtype=torch.bfloat16)
    inside = [
        t.untyped_storage().data_ptr() for t in attrs.asdict(memory, recurse=False).values() if hasattr(t, "data_ptr")
    ]
    given = [t.untyped_storage().data_ptr() for t in (*inputs.values(), out)]
    kernel.launch(kernel.configs[0], **inputs, workspace=memory, out=out)
    for _, arguments in kernel.library.calls:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                assert tensor.untyped_storage().data_ptr() in (*inside, *given)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_a_workspace_holds_the_blocks_of_every_config(tokens):
    kernel = kernel_of(BF16, "both")
    memory = kernel.workspace(tokens, "cpu")
    for block_m in {config["block_m"] for config in kernel.configs}:
        assert memory.token_blocks(tokens, BF16.top_k, BF16.num_experts, block_m) is not None


def test_given_blocks_are_used_and_checked():
    kernel = kernel_of(BF16)
    inputs = kernel.inputs(BF16, routing(BF16, 12))
    config = next(c for c in kernel.configs if c["block_m"] == 24)
    blocks = align_tokens(inputs["topk_ids"], 24, 8)
    assert torch.equal(kernel.launch(config, **inputs, blocks=blocks), kernel.launch(config, **inputs))
    with pytest.raises(InputError, match="block_m=16"):
        kernel.launch(config, **inputs, blocks=align_tokens(inputs["topk_ids"], 16, 8))


@needs_kernels
def test_no_tokens():
    kernel = kernel_of(BF16)
    out = kernel.launch(kernel.configs[0], **kernel.inputs(BF16, torch.empty(0, 2, dtype=torch.int32)))
    assert out.shape == (0, 256) and not kernel.library.calls


@needs_kernels
def test_shares_a_portfolio_with_triton():
    """The same weights, and one workspace for both."""
    ours, triton = kernel_of(BF16), TritonFusedMoE(BF16)
    portfolio = Portfolio([triton, ours])
    assert portfolio.extra_bytes(ours) == 0
    inputs = triton.inputs(BF16, routing(BF16, 7))
    config = portfolio.tagged(ours, ours.default_config(7))
    out = Dispatcher(portfolio).pin(config)(**inputs, workspace=triton.workspace(8, "cpu"))
    assert error(out, triton.reference(BF16, inputs)) < 1e-2


def test_a_dispatcher_without_a_plan_serves_the_default():
    kernel = kernel_of(FP8)
    policy = Dispatcher(kernel).policy
    for tokens in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 96, 128, 4096):
        chosen = policy.configs[policy.table.index(tokens)]
        assert chosen == kernel.default_config(tokens) == kernel.configs[default(kernel.configs, FP8, tokens)]


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("w13", lambda t: t[:, :-1], "give contiguous float8_e4m3fn"),
        ("w2", lambda t: t.view(torch.uint8), "w2 is uint8"),
        ("w13_scale", lambda t: t.transpose(1, 2).contiguous(), r"\(8, 4, 2\)"),
        ("w2_scale", lambda t: None, "come with scales"),
        ("topk_ids", lambda t: t.float(), "int32 or int64"),
        ("topk_weights", lambda t: t.double(), "topk_weights is float64"),
        ("hidden_states", lambda t: t.half(), "hidden_states is float16"),
        ("out", lambda t: torch.empty(4, 512, dtype=torch.bfloat16)[:, ::2], "not contiguous"),
        ("w2", lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape), "16 bytes"),
    ],
)
def test_wrong_tensors_are_named(name, make, message):
    kernel = kernel_of(FP8)
    inputs = kernel.inputs(FP8, routing(FP8, 4))
    inputs[name] = make(inputs.get(name))
    with pytest.raises(InputError, match=message):
        kernel.launch(kernel.configs[0], **inputs)
    assert not kernel.library.calls


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="form 'three' is unknown"):
        kernel_of(FP8, "three")
    with pytest.raises(ConfigError, match="hidden_size=200 is no multiple"):
        kernel_of(attrs.evolve(FP8, hidden_size=200))
    with pytest.raises(ConfigError, match="dtype fp16 is not compiled"):
        kernel_of(attrs.evolve(FP8, dtype="fp16"))
    kernel = kernel_of(attrs.evolve(BF16, num_local_experts=4))
    with pytest.raises(InputError, match="give expert_map"):
        kernel.launch(kernel.configs[0], **kernel.inputs(kernel.shape, routing(BF16, 4)) | {"expert_map": None})
    with pytest.raises(InputError, match="holds 4 slots, this batch has 8"):
        kernel = kernel_of(BF16)
        kernel.launch(kernel.configs[0], **kernel.inputs(BF16, routing(BF16, 4)), workspace=kernel.workspace(2, "cpu"))


@needs_kernels
def test_the_stress_script_finds_a_wrong_kernel(capsys):
    """On the stand-ins: it passes, and with a kernel that leaves out a block it says which launch was wrong."""
    where = pathlib.Path(__file__).parent.parent / "gpu" / "kernels" / "cute_stress.py"
    spec = importlib.util.spec_from_file_location("cute_stress", where)
    stress = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stress)
    stress.SHAPES = (BF16,)
    few = ["--launches", "3", "--most-tokens", "3", "--each", "--dtype", "bf16"]
    make = lambda shape, form: CuteFusedMoE(shape, form, StandIns())  # noqa: E731
    assert stress.main(few, "cpu", make) == 0
    assert stress.main([*few, "--form", "ragged"], "cpu", make) == 0
    assert capsys.readouterr().out.count("3 launches are right") == 2

    class Lazy(StandIns):
        def _find(self, variant):
            found = super()._find(variant)
            return lambda *arguments: found(*arguments[:-3], 0, 1, 256) if variant.role == "up" else found(*arguments)

    assert stress.main([*few, "--form", "two"], "cpu", lambda shape, form: CuteFusedMoE(shape, form, Lazy())) == 1
    assert "off by nan" in capsys.readouterr().out


def test_equal_values_under_other_keys_are_another_config():
    kernel = kernel_of(BF16)
    inputs = kernel.inputs(BF16, torch.empty(0, 2, dtype=torch.int32))
    config = next(c for c in kernel.configs if c["stages"] == 6 and c["group_m"] == 8)
    kernel.launch(config, **inputs)
    moved = dict(zip(["form", "block_m", "block_n", "warp_n", "group_m", "stages"], config.values(), strict=True))
    kernel.launch(moved, **inputs)
    assert len(kernel._ready) == 2 and {ready.stages for ready, _ in kernel._ready.values()} == {6, 8}


# ---- the ragged form


def test_the_ragged_form_alone_and_among_all():
    """It serves every batch where it is alone; a block_m of it that is not compiled is none."""
    kernel, every = kernel_of(FP8, "ragged"), CuteFusedMoE(FP8, library=StandIns())
    assert {config["form"] for config in kernel.configs} == {"ragged"}
    assert all(config in every.configs for config in kernel.configs)
    assert all(kernel.default_config(tokens) in kernel.configs for tokens in (1, 64, 4096))
    config = kernel.configs[0]
    assert "m48_n64_w4_s4 is not compiled for form='ragged'" in every.supports({**config, "block_m": 48}, FP8)
    assert "hidden_size=384 is no multiple of the 256" in kernel.supports(config, attrs.evolve(FP8, hidden_size=384))
    assert kernel.grid(config, FP8).launches == (2, 1) and not hasattr(kernel, "nondeterministic")


@pytest.mark.parametrize(("num_slots", "num_experts", "fetched"), [(128, 8, 256), (129, 8, 128), (129, 16, 256)])
def test_l2_fetches_more_while_an_expert_has_one_block(num_slots, num_experts, fetched):
    assert l2_fetch(num_slots, num_experts, 16) == fetched


@needs_kernels
def test_ragged_kernels_take_what_those_of_two_launches_take():
    """A block is what the config says, whatever its tile is."""
    calls = {}
    for form in ("two", "ragged"):
        kernel = kernel_of(FP8, form)
        config = kernel.configs[0] | {"form": form, "block_m": 56, "block_n": 64, "warp_n": 4, "stages": 4}
        inputs = kernel.inputs(FP8, routing(FP8, 5))
        kernel.launch(config, **inputs, workspace=kernel.workspace(8, "cpu"))
        calls[form] = kernel.library.calls
    for (plain, its), (name, ours) in zip(calls["two"], calls["ragged"], strict=True):
        assert name == f"ragged_{plain}" and [*map(type, its)] == [*map(type, ours)] and its[-5:] == ours[-5:]
        assert [a.shape for a in its if hasattr(a, "shape")] == [a.shape for a in ours if hasattr(a, "shape")]


@needs_kernels
def test_the_probe_says_what_is_wrong(capsys):
    """On the stand-ins every case is right; a down that forgets every other row is wrong in rows, not in h."""
    where = pathlib.Path(__file__).parent.parent / "gpu" / "kernels" / "ragged_probe.py"
    spec = importlib.util.spec_from_file_location("ragged_probe", where)
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    make = lambda shape, form: CuteFusedMoE(shape, form, StandIns())  # noqa: E731
    few = ["--only", "width 8", "--dtype", "bf16"]
    assert probe.main(few, "cpu", make) == 0
    assert "all cases are right" in capsys.readouterr().out

    class Lazy(StandIns):
        def _find(self, variant):
            found = super()._find(variant)
            half = lambda *its: (found(*its), its[-6].view(-1)[::2].zero_())  # noqa: E731
            return half if variant.role == "ragged_down" else found

    lazy = lambda shape, form: CuteFusedMoE(shape, form, Lazy())  # noqa: E731
    assert probe.main(few, "cpu", lazy) == 1
    said = capsys.readouterr().out
    assert "WRONG" in said and "h 0.00" in said and "cases are wrong" in said
