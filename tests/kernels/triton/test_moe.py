"""The Triton fused MoE layer against float64 (GPU or interpreter), its configs, and what it compiles to for sm_90."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import rampwrap
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.triton.align.host import align_tokens
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe import configs as tuning
from rampwrap.kernels.triton.moe.warm import run_once
from rampwrap.kernels.triton.moe.workspace import allocate, ordered_rows, workspace

needs_kernels = pytest.mark.skipif(
    not INTERPRETED.value and not torch.cuda.is_available(),
    reason="Triton was imported before TRITON_INTERPRET=1 and there is no GPU",
)
DEVICE = "cpu" if INTERPRETED.value else "cuda"

BF16 = MoEShape(8, 2, 128, 64)
FP16_ODD = MoEShape(8, 2, 96, 80, "fp16")
FP8 = MoEShape(4, 2, 256, 256, "fp8")
# The float64 reference quantises as the layer does, so FP8 has no larger error than bf16.
TOLERANCE = {"bf16": 6e-3, "fp16": 1e-3, "fp8": 1.2e-2}


def config(*row):
    return dict(zip(tuning.KEYS, row, strict=True))


def routing(shape, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(num_tokens)]
    return torch.stack(rows).to(DEVICE)


def split(k, *row):
    return {**config(*row), "split_k": k}


def error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


def poison(workspace):
    """Fills a workspace with NaN (the FP8 one too: 0x7f is NaN in e4m3)."""
    for tensor in (workspace.h, workspace.y, workspace.x_fp8, workspace.x_scale, workspace.h_fp8, workspace.h_scale):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xFF)
    workspace.alignment.fill_(-1)
    return workspace


LAYERS = [
    (BF16, config(16, 64, 64, 1, 4, 3, False)),
    (BF16, config(16, 64, 64, 1, 4, 3, True)),
    (BF16, config(32, 128, 128, 8, 4, 2, False)),
    (BF16, config(128, 256, 64, 8, 8, 3, False)),
    (FP16_ODD, config(16, 64, 64, 1, 4, 3, False)),
    (FP16_ODD, config(16, 128, 64, 1, 4, 3, True)),
    (FP8, config(16, 64, 128, 1, 4, 3, False)),
    (FP8, config(16, 128, 128, 1, 4, 3, True)),
    (FP8, config(32, 256, 128, 8, 8, 3, False)),
    (FP8, config(16, 256, 128, 1, 8, 3, True)),
    (BF16, split(2, 16, 64, 32, 1, 4, 3, False)),
    (FP16_ODD, split(2, 16, 64, 32, 1, 4, 3, True)),
    (FP8, split(2, 16, 64, 128, 1, 4, 3, True)),
]


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "row"),
    LAYERS,
    ids=lambda value: str(value) if isinstance(value, MoEShape) else tuple(value.values()).__repr__(),
)
def test_layer(shape, row):
    """Every kind of tile gives the float64 layer, on memory that held NaN before."""
    kernel = TritonFusedMoE(shape)
    inputs = kernel.inputs(shape, routing(shape, 19))
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    scratch = poison(kernel.workspace(24, DEVICE))
    returned = kernel.launch(row, **inputs, out=out, workspace=scratch)
    assert returned is out
    assert error(out, kernel.reference(shape, inputs)) < TOLERANCE[shape.dtype]


@needs_kernels
def test_all_configs_of_fp8_agree():
    """h is rounded to bf16 and quantised by group in every config, wherever that happens."""
    kernel = TritonFusedMoE(FP8)
    inputs = kernel.inputs(FP8, routing(FP8, 5))
    outs = [kernel.launch(row, **inputs).double() for shape, row in LAYERS if shape is FP8]
    for out in outs[1:]:
        assert error(out, outs[0]) < 4e-3


@needs_kernels
@pytest.mark.parametrize("row", [LAYERS[0][1], LAYERS[1][1]])
def test_few_slots_need_no_alignment(row):
    """One token of 64 experts: each slot is a block, and ids out of range leave their slot out."""
    shape = MoEShape(64, 2, 64, 32)
    kernel = TritonFusedMoE(shape)
    for ids in ([[5, 63]], [[64, 7]], [[-1, 1 << 20]]):
        inputs = kernel.inputs(shape, torch.tensor(ids, device=DEVICE))
        out = kernel.launch(row, **inputs, workspace=poison(kernel.workspace(1, DEVICE)))
        reference = kernel.reference(shape, inputs)
        assert torch.allclose(out.double(), reference, atol=0.03, rtol=0.03)


@needs_kernels
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_remote_experts_contribute_zero(num_tokens):
    """Under expert parallelism the two ranks' outputs add up to the layer; unwritten rows are never read."""
    whole = MoEShape(32, 2, 64, 32)
    kernel = TritonFusedMoE(whole)
    inputs = kernel.inputs(whole, routing(whole, num_tokens))
    total = torch.zeros(num_tokens, 64, dtype=torch.float64, device=DEVICE)
    for rank in range(2):
        here = torch.arange(32, device=DEVICE) // 16 == rank
        part = MoEShape(32, 2, 64, 32, num_local_experts=16)
        expert_map = torch.where(here, torch.arange(32, device=DEVICE) % 16, -1).int()
        local = inputs | {"w13": inputs["w13"][here], "w2": inputs["w2"][here], "expert_map": expert_map}
        adapter = TritonFusedMoE(part)
        out = adapter.launch(LAYERS[0][1], **local, workspace=poison(adapter.workspace(num_tokens, DEVICE))).double()
        assert error(out, adapter.reference(part, local)) < 6e-3
        total += out
    assert error(total, kernel.reference(whole, inputs)) < 8e-3


@needs_kernels
def test_given_alignment():
    """An alignment made before (by the graph dispatcher) is used as it is, and gives the same bits."""
    kernel = TritonFusedMoE(BF16)
    inputs = kernel.inputs(BF16, routing(BF16, 9))
    row = LAYERS[0][1]
    blocks = align_tokens(inputs["topk_ids"], 16, 8)
    assert torch.equal(kernel.launch(row, **inputs, blocks=blocks), kernel.launch(row, **inputs))
    with pytest.raises(InputError, match="block_m=16"):
        kernel.launch(LAYERS[2][1], **inputs, blocks=blocks)


@needs_kernels
def test_empty_batch():
    """No tokens: an empty result and no launch."""
    kernel = TritonFusedMoE(BF16)
    inputs = kernel.inputs(BF16, torch.empty(0, 2, dtype=torch.int32, device=DEVICE))
    assert kernel.launch(kernel.configs[0], **inputs).shape == (0, 128)


@needs_kernels
def test_bad_tensors():
    """One sentence that names the tensor, what it is and what it must be."""
    kernel = TritonFusedMoE(BF16)
    inputs = kernel.inputs(BF16, routing(BF16, 3))
    row = LAYERS[0][1]
    for changed, message in [
        ({"hidden_states": inputs["hidden_states"][:, :64]}, r"hidden_states is bfloat16 of shape \(3, 64\)"),
        ({"hidden_states": inputs["hidden_states"].float()}, "hidden_states is float32"),
        ({"w13": inputs["w13"].transpose(1, 2)}, "w13 is"),
        ({"topk_ids": inputs["topk_ids"].float()}, "topk_ids is float32"),
        ({"topk_weights": inputs["topk_weights"][:2]}, "topk_weights is"),
        ({"w13_scale": torch.ones(1)}, "Scales were given for a bf16 layer"),
        ({"workspace": kernel.workspace(1, DEVICE)}, "holds 2 slots, this batch has 6"),
    ]:
        with pytest.raises(InputError, match=message):
            kernel.launch(row, **(inputs | changed))
    with pytest.raises(ConfigError, match="block_m=24"):
        kernel.launch(row | {"block_m": 24}, **inputs)


@needs_kernels
def test_bad_scales_and_maps():
    """Every optional tensor is checked too, by shape and by dtype, and nothing is launched."""
    kernel = TritonFusedMoE(FP8)
    inputs, row = kernel.inputs(FP8, routing(FP8, 3)), next(row for shape, row in LAYERS if shape.dtype == "fp8")
    wide = inputs["w13_scale"]
    for changed, message in [
        ({"w13_scale": wide[:, :-1]}, "w13_scale is float32 of shape"),
        ({"w13_scale": wide.double()}, "w13_scale is float64"),
        ({"w2_scale": inputs["w2_scale"][:-1]}, "w2_scale is float32 of shape"),
        ({"w2_scale": inputs["w2_scale"].half()}, "w2_scale is float16"),
        ({"w2_scale": None}, "give w13_scale and w2_scale"),
        ({"w13_scale": None}, "give w13_scale and w2_scale"),
        ({"w2": inputs["w2"][:, :-1]}, "w2 is"),
        ({"hidden_states": inputs["hidden_states"][0]}, "hidden_states has shape"),
        ({"expert_map": torch.zeros(FP8.num_experts + 1, dtype=torch.int32)}, "expert_map is int32 of shape"),
        ({"expert_map": torch.zeros(FP8.num_experts)}, "expert_map is float32"),
        ({"out": torch.empty_like(inputs["hidden_states"])[:2]}, "out is"),
        ({"out": torch.empty_like(inputs["hidden_states"]).float()}, "out is float32"),
    ]:
        with pytest.raises(InputError, match=message):
            kernel.launch(row, **(inputs | changed))


@needs_kernels
@pytest.mark.parametrize("shape", [MoEShape(16, 2, 64, 32), FP8])
def test_warming_runs_both_ways(shape):
    """What the warming processes run: each config with and without alignment; a failure is told, not raised."""
    rows = [next(row for known, row in LAYERS if known.dtype == shape.dtype)]
    assert run_once(shape, rows, torch.int32, DEVICE) == [None]
    assert run_once(shape, rows, torch.int32, DEVICE, True) == [None]
    assert "KeyError" in str(run_once(shape, [{"block_m": 16}], torch.int32, DEVICE)[0])


def test_protocol():
    """The adapter is a Kernel; grids count the CTAs that `launch` starts for each block."""
    shape = MoEShape(64, 8, 2048, 1024)
    kernel = TritonFusedMoE(shape)
    assert isinstance(kernel, Kernel)
    grid = kernel.grid(config(16, 128, 64, 1, 4, 4, False), shape)
    assert (grid.block_m, grid.launches, grid.ctas_per_block) == (16, (16, 16), 32)
    assert all(1 <= kernel.grid(c, shape).ctas_per_sm <= 32 for c in kernel.configs)
    for num_tokens in (1, 64, 300, 1024, 100_000):
        assert kernel.default_config(num_tokens) in kernel.configs
    assert workspace(shape, 64, "meta").num_bytes >= 64 * 8 * 2 * (2048 + 1024)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("most", [1, 5, 300])
def test_a_workspace_holds_h_in_the_order_of_blocks(dtype, most):
    """For every batch up to its own: 128 rows for each expert that may be active, in memory that nothing else of a layer uses."""
    shape = MoEShape(16, 4, 256, 384, dtype)
    memory = workspace(shape, most, "cpu")
    for tokens in range(1, most + 1):
        counts = [tokens * 4] if tokens * 4 < 16 else [1] * 15 + [tokens * 4 - 15]
        rows = ordered_rows(tokens * 4, 16)
        assert rows % 128 == 0 and rows >= sum(-(-count // 128) * 128 for count in counts)
        h, *scale = memory.ordered_h(rows, dtype == "fp8")
        assert h.shape == (rows, 384) and h.is_contiguous() and h.element_size() == (1 if dtype == "fp8" else 2)
        assert [s.shape for s in scale] == ([(3, rows)] if dtype == "fp8" else [])
    with pytest.raises(InputError, match="allocate a larger one"):
        memory.ordered_h(rows + 256, dtype == "fp8")
    small = allocate(most, 4, 256, 384, memory.h.dtype, fp8=dtype == "fp8", device="cpu")
    with pytest.raises(InputError, match="this batch needs"):
        small.ordered_h(rows + 128 * most, dtype == "fp8")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_config_list(dtype):
    """Legal, sorted, none twice; those that split come after all others."""
    plain = [c for c in tuning.CONFIGS[dtype] if "split_k" not in c]
    rows = [tuple(c[key] for key in tuning.KEYS) for c in plain]
    assert len(rows) == {"bf16": 79, "fp16": 79, "fp8": 49}[dtype]
    assert rows == sorted(set(rows))
    split = tuning.CONFIGS[dtype][len(plain) :]
    assert len(split) == 1 and all(c["split_k"] in (2, 4) for c in split)
    for c in tuning.CONFIGS[dtype]:
        assert tuning.refusal(c, dtype) is None
        assert tuning.shared_bytes(c, dtype) <= 227 * 1024


@pytest.mark.parametrize(
    ("row", "dtype", "message"),
    [
        ((128, 256, 64, 1, 8, 5, False), "bf16", "shared memory"),
        ((128, 256, 64, 1, 4, 2, False), "bf16", "registers"),
        ((16, 64, 64, 1, 4, 3, False), "fp8", "block_k=64"),
        ((16, 64, 64, 1, 8, 3, True), "bf16", "swap_ab"),
        ((16, 32, 64, 1, 8, 3, False), "bf16", "without work"),
    ],
)
def test_illegal_configs(row, dtype, message):
    """The legality function says what is wrong."""
    assert message in tuning.refusal(config(*row), dtype)


LEGAL = {"block_m": 64, "block_n": 128, "block_k": 128, "group_m": 1, "num_warps": 4, "num_stages": 2, "swap_ab": False}


@pytest.mark.parametrize(
    ("key", "legal", "illegal"),
    [
        ("block_m", (16, 32, 64), (0, 8, 17, 24, 256)),
        ("block_n", (32, 64, 128), (0, 16, 31, 512)),
        ("block_k", (32, 64, 128), (0, 16, 96, 512)),
        ("num_warps", (4, 8), (0, 1, 2, 5, 16)),
        ("num_stages", (1, 2, 3, 4), (0, 9)),
        ("group_m", (1, 2, 64), (0, -1)),
        ("split_k", (1, 2, 4), (0, 3, 8)),
    ],
)
def test_each_parameter_alone(key, legal, illegal):
    """What is within its range runs; the next value outside is refused by its name."""
    for value in legal:
        assert tuning.refusal(LEGAL | {key: value}, "bf16") is None
    for value in illegal:
        assert tuning.refusal(LEGAL | {key: value}, "bf16").startswith(f"{key}={value} is not supported; use ")


def test_what_a_config_occupies_by_hand():
    """128x256 at 8 warps holds 128 accumulators a thread; wgmma needs every buffer, mma.sync one less; 227 KB is the most."""
    wide = {
        "block_m": 128,
        "block_n": 256,
        "block_k": 64,
        "group_m": 1,
        "num_warps": 8,
        "num_stages": 4,
        "swap_ab": False,
    }
    assert tuning.accumulators(wide, "bf16") == 128 and tuning.accumulators(wide, "fp8") == 256
    assert tuning.refusal(wide, "bf16") is None and "registers" in tuning.refusal(wide | {"block_k": 128}, "fp8")
    assert tuning.shared_bytes(wide, "bf16") == 4 * (128 + 256) * 64 * 2
    narrow = {"block_m": 16, "block_n": 64, "block_k": 128, "group_m": 1, "num_warps": 4, "num_stages": 4}
    assert tuning.shared_bytes(narrow | {"swap_ab": False}, "bf16") == 3 * (16 + 64) * 128 * 2
    assert tuning.shared_bytes(narrow | {"swap_ab": True}, "bf16") == 4 * (16 + 64) * 128 * 2
    assert tuning.shared_bytes(narrow | {"swap_ab": True}, "fp8") == 4 * (16 + 64) * 128
    # One stage of mma.sync still has a buffer; a tile on its way out takes 4 bytes a value.
    assert tuning.shared_bytes(narrow | {"num_stages": 1, "swap_ab": False}, "bf16") == (16 + 64) * 128 * 2
    assert tuning.shared_bytes(wide | {"num_stages": 1}, "bf16") == 128 * 256 * 4
    assert [tuning.uses_wgmma({"block_m": m, "swap_ab": s}) for m, s in ((32, False), (64, False), (16, True))] == [
        False,
        True,
        True,
    ]
    assert [tuning.quantises_h({"block_n": n}) for n in (128, 256)] == [False, True]


def test_small_batches_split_and_have_room_for_it():
    """Up to 512 slots a config splits as it says; any config's partial rows fit the memory of the batch."""
    split = {"split_k": 4}
    assert [tuning.splits(split, slots) for slots in (1, 512, 513)] == [4, 4, 1] and tuning.splits({}, 1) == 1
    assert [tuning.partial_rows(slots) for slots in (0, 8, 512, 513, 2048, 2049)] == [0, 32, 2048, 2048, 2048, 2049]


def test_fp8_needs_whole_scale_blocks():
    """A shape whose rows do not divide into 128-blocks is refused when the adapter is made."""
    with pytest.raises(ConfigError, match="intermediate_size=192"):
        TritonFusedMoE(MoEShape(8, 2, 256, 192, "fp8"))


@needs_kernels
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_hidden_states_that_are_quantised_already(num_tokens):
    """Read as they are: the bits of a layer that quantises them itself, without its memory for that."""
    kernel = TritonFusedMoE(FP8)
    ids = routing(FP8, num_tokens) if num_tokens else torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    inputs = kernel.inputs(FP8, ids)
    tile = kernel.default_config(9)
    want = kernel.launch(tile, **inputs)
    rows, scales = reference.quantise(inputs["hidden_states"])
    scratch = poison(kernel.workspace(16, DEVICE))
    out = kernel.launch(tile, **inputs | {"hidden_states": rows}, hidden_scale=scales, workspace=scratch)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    if num_tokens:
        with pytest.raises(InputError, match="hidden_states is bfloat16"):
            kernel.launch(tile, **inputs, hidden_scale=scales)
        with pytest.raises(InputError, match="hidden_states is float8_e4m3fn"):
            kernel.launch(tile, **inputs | {"hidden_states": rows})
        with pytest.raises(InputError, match=r"hidden_scale is float32 of shape .*give contiguous float32"):
            kernel.launch(tile, **inputs | {"hidden_states": rows}, hidden_scale=scales[:, :1])
        plain = TritonFusedMoE(BF16)
        with pytest.raises(InputError, match="hidden_scale was given for a layer of E=8"):
            plain.launch(plain.default_config(1), **plain.inputs(BF16, routing(BF16, 1)), hidden_scale=scales)


COMPILE = r"""
import json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton import quantise
from rampwrap.kernels.triton.align import host as align
from rampwrap.kernels.triton.moe import configs, gemm, host as fused_moe

form_arguments = fused_moe.form_arguments
INTS = {"num_slots", "num_experts", "num_local_experts", "num_chunks", "block_m", "capacity", "most_rows", "pieces"}

def build(kernel, pointers, constants, **options):
    signature, constexprs, attrs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if pointers.get(name):
            signature[name] = "*" + pointers[name]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif name in INTS:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constexprs[name] = constants.get(name)
    if "PDL" in constexprs:
        constexprs["PDL"] = options["launch_pdl"] = True
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

def registers(built):
    # Only a GPU that has loaded a kernel says how many; the tool that Triton brings reads it off the binary.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(built.asm["cubin"])
        stream.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        run = [tool, "--dump-resource-usage", stream.name]
        return int(re.search(r"REG:(\d+)", subprocess.run(run, capture_output=True, text=True, check=True).stdout)[1])

def report(name, built, **more):
    ptx = built.asm["ptx"]
    if "row" in more:
        more["registers"] = registers(built)
    print(json.dumps(dict(
        name=name, shared=built.metadata.shared, spills=getattr(built, "n_spills", None),
        wgmma="wgmma.mma_async" in ptx, mma="mma.sync" in ptx, converts=ptx.count("cvt.rn.f16x2.e4m3x2"),
        wide="cp.async.cg.shared.global" in ptx, local=len(re.findall(r"(?:ld|st)\.local", ptx)), **more)))

for row, dtype, scales, persistent in json.loads(sys.argv[1]):
    layer = MoEShape(64, 8, 2048, 768, dtype, scales=scales)
    config = dict(zip(configs.KEYS, row))
    fp8 = dtype == "fp8"
    act, quant = ("fp8e4nv" if fp8 else "bf16"), fp8 and (scales == "static" or configs.quantises_h(config, layer.scale_group))
    tuning = fused_moe.tuning_arguments(config)
    options = {key: tuning.pop(key) for key in ("num_warps", "num_stages")}
    constants = dict(tuning, **form_arguments(layer), TOP_K=8, HIDDEN=2048, INTERMEDIATE=768, SPLIT_K=1, PERSISTENT=persistent)
    blocks = dict(sorted_token_ids_ptr="i32", expert_ids_ptr="i32", num_tokens_post_padded_ptr="i32", w_ptr=act)
    if fp8:
        blocks |= dict(x_scale_ptr="fp32", w_scale_ptr="fp32")
    shared = configs.shared_bytes(config, dtype, layer.scale_group)
    said = dict(formula=shared, row=row, dtype=dtype, group=layer.scale_group)
    up = blocks | dict(x_ptr=act, h_ptr=act if quant else "bf16", h_scale_ptr="fp32" if quant else None)
    report("up", build(gemm.up_kernel, up, constants, **options), **said)
    down = blocks | dict(h_ptr=act, y_ptr="bf16", topk_weights_ptr="fp32", h_scale_ptr="fp32" if fp8 else None)
    report("down", build(gemm.down_kernel, down, constants, **options), **said)

ids = dict(topk_ids_ptr="i32", sorted_token_ids_ptr="i32", expert_ids_ptr="i32", num_tokens_post_padded_ptr="i32",
           expert_counts_ptr="i32", scratch_ptr="i32")
report("align", build(align.align_by_expert_kernel, ids, dict(CHUNK=1024, BINS=128), num_warps=4))
report("count", build(align.count_and_fill_kernel, ids, dict(PIECE=256, BINS=512)))
report("place", build(align.place_kernel, ids, dict(PIECE=256, BINS=512, ROWS=8, IDS=32, TILE=64), num_warps=8))
for given in (False, True):
    sizes = dict(COLUMNS=2048, GROUPS=8, GROUP=128, GIVEN=given)
    report("quantise", build(quantise.quantise_rows_kernel, dict(q_ptr="fp8e4nv", scale_ptr="fp32", x_ptr="bf16"), sizes))
report("sum", build(gemm.sum_kernel, dict(out_ptr="bf16", y_ptr="bf16", topk_ids_ptr="i32"), dict(TOP_K=8, HIDDEN=2048, SPLIT_K=1, SPLIT_OF=0, BLOCK_H=1024)))
"""


def test_compiles_for_hopper(tmp_path):
    """Without a GPU: wgmma where it should be, 16-byte cp.async, no spills, shared memory and residency as the formulas say."""
    rows = [
        ((128, 128, 64, 1, 8, 3, False), "bf16", "block-128"),
        ((16, 128, 64, 1, 4, 4, False), "bf16", "block-128"),
        ((16, 128, 128, 1, 4, 3, True), "bf16", "block-128"),
        ((128, 256, 64, 8, 8, 4, False), "bf16", "block-128"),
        ((16, 128, 128, 1, 4, 4, True), "fp8", "block-128"),
        ((64, 256, 128, 8, 8, 3, False), "fp8", "block-128"),
    ]
    forms = [
        ((16, 128, 64, 1, 4, 6, True), "fp8", "block-64"),
        ((64, 128, 32, 1, 4, 6, False), "fp8", "block-32"),
        ((128, 256, 128, 8, 8, 4, False), "fp8", "channel"),
        ((32, 256, 128, 8, 4, 3, True), "fp8", "static"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(pathlib.Path(rampwrap.__file__).parent.parent)
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            COMPILE,
            json.dumps([(*row, way) for row in rows for way in (False, True)] + [(*row, False) for row in forms]),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 4 * len(rows) + 2 * len(forms) + 6
    for built in reports:
        # n_spills is only known once a GPU has loaded the kernel.
        assert not built["spills"] and built["local"] == 0, built
        if built["name"] in ("up", "down"):
            row = dict(zip(tuning.KEYS, built["row"], strict=True))
            assert built["shared"] <= built["formula"]
            # Too few would leave half an SM idle under candidates, whose grids are sized by it.
            threads = 32 * row["num_warps"]
            by_registers = tuning.SM_REGISTERS // (threads * (-(-built["registers"] // 8) * 8))
            by_shared = tuning.SM_SHARED // (built["formula"] + 1024)
            resident = min(by_registers, by_shared, tuning.SM_THREADS // threads)
            assert resident <= tuning.ctas_per_sm(row, built["dtype"], built["group"]) <= resident + 1, built
            assert built["wide"]
            assert built["wgmma"] == tuning.uses_wgmma(row) and built["mma"] != built["wgmma"]
            assert built["converts"] == 0
