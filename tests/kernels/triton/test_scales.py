"""FP8 scales by smaller blocks, by channel, by tensor and of all activations: our Triton kernel against float64 and against an engine's own steps."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import attrs

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.activation import SWIGLU_OAI
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import layer
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe import configs
from rampwrap.kernels.triton.moe.warm import run_once
from rampwrap.kernels.triton.quantise import quantise_rows

needs_kernels = pytest.mark.skipif(
    not INTERPRETED.value and not torch.cuda.is_available(),
    reason="Triton was imported before TRITON_INTERPRET=1 and there is no GPU",
)
DEVICE = "cpu" if INTERPRETED.value else "cuda"
HALF = MoEShape(4, 2, 128, 192, "fp8", scales="block-64")
QUARTER = MoEShape(4, 2, 64, 96, "fp8", scales="block-32")
CHANNEL = MoEShape(4, 2, 96, 80, "fp8", scales="channel")
TENSOR = MoEShape(4, 2, 64, 48, "fp8", scales="tensor")
STATIC = MoEShape(4, 2, 96, 80, "fp8", scales="static")
LAYERS = [
    (HALF, (16, 64, 64, 1, 4, 3, False)),
    (HALF, (16, 128, 64, 1, 4, 3, True)),  # one group of h a tile: quantised in the epilogue
    (HALF, (16, 256, 64, 8, 8, 3, False)),  # the last tile is half empty
    (QUARTER, (16, 64, 32, 1, 4, 3, False)),
    (QUARTER, (16, 128, 32, 1, 4, 3, True)),
    (CHANNEL, (16, 64, 64, 1, 4, 3, False)),
    (CHANNEL, (16, 128, 32, 1, 4, 3, True)),
    (TENSOR, (16, 32, 32, 1, 4, 3, False)),
    (TENSOR, (16, 64, 32, 1, 4, 3, True)),
    (STATIC, (16, 32, 32, 1, 4, 3, False)),
    (STATIC, (16, 64, 32, 1, 4, 3, True)),
]


def config(row, **more):
    return {**dict(zip(configs.KEYS, row, strict=True)), **more}


def inputs_of(kernel, num_tokens=5):
    shape, generator = kernel.shape, torch.Generator().manual_seed(2)
    rows = [torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(num_tokens)]
    return kernel.inputs(shape, torch.stack(rows).to(DEVICE))


def error(out, wanted):
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def launch(kernel, row, inputs):
    """On memory that held NaN."""
    scratch = kernel.workspace(8, DEVICE)
    for name in ("h", "y", "x_fp8", "x_scale", "h_fp8", "h_scale"):
        getattr(scratch, name).view(torch.uint8).fill_(0xFF)
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    return kernel.launch(row, **inputs, out=out, workspace=scratch)


@needs_kernels
@pytest.mark.parametrize(("shape", "row"), LAYERS, ids=str)
def test_layer(shape, row):
    """Every kind of tile gives the float64 layer with the same quantisation steps."""
    kernel = TritonFusedMoE(shape)
    inputs = inputs_of(kernel)
    assert error(launch(kernel, config(row), inputs), kernel.reference(shape, inputs)) < 1.2e-2


@needs_kernels
@pytest.mark.parametrize("shape", [HALF, CHANNEL, STATIC], ids=str)
def test_parts_of_the_depth(shape):
    """Each part of the down GEMM is scaled by its own blocks, or all of them by the channel."""
    kernel = TritonFusedMoE(shape)
    inputs, row = inputs_of(kernel), config((16, 64, shape.scale_group or 32, 1, 4, 3, True), split_k=2)
    assert error(launch(kernel, row, inputs), kernel.reference(shape, inputs)) < 1.2e-2


@needs_kernels
def test_slices_with_refined_scales_add_up():
    """Tensor parallelism cuts 384 into 192: vLLM repeats the scales of blocks of 128 for blocks of 64, and so do the ranks here."""
    whole = MoEShape(4, 2, 128, 384, "fp8")
    inputs = inputs_of(TritonFusedMoE(whole))
    total = torch.zeros(5, 128, dtype=torch.float64, device=DEVICE)
    kernel = TritonFusedMoE(HALF)
    fine = {name: inputs[f"{name}_scale"].repeat_interleave(2, 1).repeat_interleave(2, 2) for name in ("w13", "w2")}
    for rank in range(2):
        rows, blocks = slice(192 * rank, 192 * (rank + 1)), slice(3 * rank, 3 * (rank + 1))
        both = ((inputs["w13"], 384, rows), (fine["w13"], 6, blocks))
        w13, w13_scale = (torch.cat([its[:, :half][:, part], its[:, half:][:, part]], 1) for its, half, part in both)
        part = {"w13": w13, "w13_scale": w13_scale, "w2": inputs["w2"][:, :, rows].contiguous()}
        part["w2_scale"] = fine["w2"][:, :, blocks].contiguous()
        total += launch(kernel, config(LAYERS[1][1]), {**inputs, **part}).double()
    refined = inputs | {f"{name}_scale": scale for name, scale in fine.items()}
    assert error(total, layer(attrs.evolve(whole, scales="block-64"), refined)) < 1.2e-2
    # Groups of 64 activations in place of 128 round otherwise, x and h by 0.03 each, as e4m3 does.
    assert 0.01 < error(total, layer(whole, inputs)) < 0.08


def engine(inputs, w13_scale, w2_scale, activation):
    """The layer in the steps of vLLM's Triton and CUTLASS experts: FP8, bf16, SiLU or SwiGLU-OAI, bf16, FP8, bf16.

    Written from its sources (`scaled_fp8_quant` by token or by what is given, scales applied to the finished sum), with nothing of
    our reference.
    """

    def rounded(row, given):
        if given is not None:
            return (row.float() * (1 / given)).clamp(-448, 448).to(torch.float8_e4m3fn).float(), given
        scale = row.float().abs().max() / 448
        return (row.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scale

    out = torch.zeros(inputs["hidden_states"].shape, device=DEVICE)
    for token, experts in enumerate(inputs["topk_ids"].tolist()):
        x, x_scale = rounded(inputs["hidden_states"][token], inputs.get("w13_input_scale"))
        for slot, expert in enumerate(experts):
            both = ((inputs["w13"][expert].float() @ x) * w13_scale[expert] * x_scale).bfloat16().float()
            gate, up = both.chunk(2)
            if activation == SWIGLU_OAI:
                gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
                gate = gate * torch.sigmoid(1.702 * gate)
            else:
                gate = gate * torch.sigmoid(gate)
            h, h_scale = rounded((gate * up).bfloat16(), inputs.get("w2_input_scale"))
            row = (inputs["w2"][expert].float() @ h) * w2_scale[expert] * h_scale
            out[token] += (row * inputs["topk_weights"][token, slot]).bfloat16().float()
    return out


@needs_kernels
@pytest.mark.parametrize("shape", [CHANNEL, TENSOR, STATIC, attrs.evolve(CHANNEL, activation=SWIGLU_OAI)], ids=str)
def test_as_an_engine_computes_it(shape):
    """Scales in the layout of compressed-tensors checkpoints: [E, n, 1] by channel, [E] by tensor."""
    kernel = TritonFusedMoE(shape)
    inputs = inputs_of(kernel)
    scales = [
        inputs[name].flatten(1) if shape.scales == "channel" else inputs[name] for name in ("w13_scale", "w2_scale")
    ]
    row = config((16, 64, 32, 1, 4, 3, True))
    assert error(launch(kernel, row, inputs), engine(inputs, *scales, shape.activation)) < 2e-2


@needs_kernels
@pytest.mark.parametrize(("columns", "group"), [(96, 0), (1500, 0), (192, 64), (96, 32)])
def test_quantised_rows(columns, group):
    """The largest of each group becomes 448, an all-zero row stays finite, and nothing is written where that is asked for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, columns, generator=generator).bfloat16().to(DEVICE)
    x[1] = 0
    q = torch.empty(3, columns, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.full((3, columns // group if group else 1), float("nan"), device=DEVICE)
    quantise_rows(x, q, scale, group=group, unless_zero=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    assert scale.isnan().all()
    quantise_rows(x, q, scale, group=group)
    groups = x.float().view(3, scale.shape[1], -1)
    assert torch.allclose(scale, groups.abs().amax(-1).clamp_min(1e-10) / 448)
    found = q.float().view(groups.shape) * scale[..., None]
    assert (found - groups).abs().amax() <= groups.abs().amax() / 16 and not found[1].any()


@needs_kernels
@pytest.mark.parametrize("shape", [(), (1,)])
def test_rows_quantised_by_a_given_scale(shape):
    """vLLM's numbers bit for bit: times the inverse, cut off at 448, nearest even; infinities and halfway cases among them."""
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, :6] = torch.tensor([float("inf"), -float("inf"), 0.0, 3.0, 1e-7, -900.0])
    scale = torch.tensor(0.0071).reshape(shape)
    x[1] = (torch.arange(300) * 0.5 * float(scale)).bfloat16()
    wanted = (x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    q = torch.empty(5, 300, dtype=torch.float8_e4m3fn, device=DEVICE)
    quantise_rows(x.to(DEVICE), q, scale.to(DEVICE), group=0, given=True)
    assert torch.equal(q.cpu().view(torch.uint8), wanted.view(torch.uint8))


def test_configs():
    """Lists of each form: legal, deep as the blocks are, with the default of every batch in them."""
    for group in (128, 64, 32, 0):
        rows = configs.listed("fp8", group)
        assert 30 < len(rows) < 130 and len({tuple(its.values()) for its in rows}) == len(rows)
        assert all(configs.refusal(its, "fp8", group) is None and its["block_k"] == (group or 128) for its in rows)
        for tokens in (1, 64, 1024, 100_000):
            assert configs.default_config(tokens, 64, 8, "fp8", group) in rows
    wide = config((128, 256, 128, 8, 8, 3, False))
    assert wide in configs.listed("fp8", 0) and wide not in configs.listed("fp8")
    assert configs.listed("bf16", 64) == configs.listed("bf16") == configs.CONFIGS["bf16"]
    assert "32-wide scale blocks of FP8 weights; use 32" in configs.refusal(wide, "fp8", 32)


@needs_kernels
@pytest.mark.parametrize(("shape", "row"), [LAYERS[0], LAYERS[5], LAYERS[7], LAYERS[9]], ids=str)
def test_warming(shape, row):
    """What compiles ahead gives the kernel what a layer of this form has."""
    assert run_once(shape, [config(row)], torch.int32, DEVICE) == [None]


def test_refused():
    """Scales of the wrong form, sizes that blocks do not divide, kernels that have blocks of 128 alone."""
    kernel = TritonFusedMoE(CHANNEL)
    inputs = inputs_of(kernel)
    with pytest.raises(
        InputError, match=r"w13_scale is float32 of shape \(4, 160\); give contiguous float32 \(4, 160, 1\)"
    ):
        kernel.launch(kernel.configs[0], **(inputs | {"w13_scale": inputs["w13_scale"][..., 0]}))
    with pytest.raises(ConfigError, match="intermediate_size=96 is no multiple of the 64-wide scale blocks"):
        TritonFusedMoE(MoEShape(4, 2, 64, 96, "fp8", scales="block-64"))
    for shape in (HALF, CHANNEL, MoEShape(8, 2, 128, 128, activation=SWIGLU_OAI)):
        with pytest.raises(ConfigError, match=f"cute_moe has no {shape.form[0]}.*; use triton_fused_moe"):
            make_kernel("cute_moe", shape)
    with pytest.raises(ConfigError, match="torch_grouped_mm has no scales=channel"):
        make_kernel("torch_grouped_mm", CHANNEL)
    kernel = TritonFusedMoE(STATIC)
    inputs, row = inputs_of(kernel), kernel.configs[0]
    for wrong, says in (
        (None, "is missing; give one"),
        (torch.ones(4, device=DEVICE), r"is float32 of shape \(4,\); give one"),
    ):
        with pytest.raises(InputError, match=f"w2_input_scale {says} float32 number"):
            kernel.launch(row, **(inputs | {"w2_input_scale": wrong}))
    other = inputs_of(TritonFusedMoE(TENSOR)) | {"w13_input_scale": torch.ones((), device=DEVICE)}
    with pytest.raises(InputError, match="w13_input_scale was given for a layer of"):
        TritonFusedMoE(TENSOR).launch(row, **other)
    with pytest.raises(InputError, match="scales 'block-16' are unknown"):
        MoEShape(4, 2, 64, 96, "fp8", scales="block-16")
    with pytest.raises(InputError, match="A bf16 layer has no scales"):
        MoEShape(4, 2, 64, 96, scales="channel")
