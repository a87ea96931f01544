"""The emulated tensor core of benchmarks/fp8_error.py, against a scalar one in exact fractions."""

import importlib.util
import math
import pathlib
import sys
from fractions import Fraction

import pytest
import torch

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "fp8_error.py"
if not SCRIPT.exists():
    pytest.skip("the wheel is tested without benchmarks", allow_module_level=True)
spec = importlib.util.spec_from_file_location("fp8_error", SCRIPT)
fp8_error = importlib.util.module_from_spec(spec)
sys.modules["fp8_error"] = fp8_error  # attrs looks there
spec.loader.exec_module(fp8_error)

from fp8_error import Accumulator, Case, Exact, add_products, multiply_add, study

SHAPE = MoEShape(4, 2, 256, 128, "fp8")


def e4m3(*shape, seed=0, every=False):
    """Random e4m3 numbers in float32: normal, or every encoding equally often, zeros and subnormals among them."""
    rng = torch.Generator().manual_seed(seed)
    if not every:
        return (torch.randn(shape, generator=rng) * 64).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    bits = torch.randint(0, 254, shape, generator=rng)
    return (bits + (bits >= 127)).to(torch.uint8).view(torch.float8_e4m3fn).float()


def floor_log2(x):
    """Of a positive fraction."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def cut(x, unit, toward_zero):
    return (math.trunc if toward_zero else math.floor)(x / unit) * unit


def scalar(a, b, c, bits, toward_zero):
    """One instruction for one sum, in fractions."""

    def exponent(x):
        return max(-6, floor_log2(abs(Fraction(x)))) if x else -6

    most = max(exponent(x) + exponent(y) for x, y in zip(a, b, strict=True))
    if c:
        most = max(most, floor_log2(abs(Fraction(c))))
    unit = Fraction(2) ** (most - bits)
    total = cut(Fraction(c), unit, toward_zero)
    total += sum(cut(Fraction(x) * Fraction(y), unit, toward_zero) for x, y in zip(a, b, strict=True))
    if total:
        total = cut(total, max(unit, Fraction(2) ** (floor_log2(abs(total)) - bits)), toward_zero)
    return float(total)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("toward_zero", [True, False])
@pytest.mark.parametrize("bits", [23, 14, 13, 12])
def test_an_instruction_is_that_of_the_scalar_model(bits, toward_zero, every):
    how = Accumulator(bits, toward_zero=toward_zero)
    a, b = e4m3(4, 64, every=every), e4m3(64, 5, seed=1, every=every)
    total = torch.zeros(4, 5)
    for k in (0, 32):
        wanted = [
            [scalar(a[i, k : k + 32].tolist(), b[k : k + 32, j].tolist(), total[i, j].item(), bits, toward_zero) for j in range(5)]
            for i in range(4)
        ]  # fmt: skip
        total = multiply_add(a[:, k : k + 32], b[k : k + 32], total, how)
        assert total.tolist() == wanted


@pytest.mark.parametrize(
    ("small", "bits", "toward_zero", "left"),
    [
        (7.5, 13, True, 0.0),  # the unit behind 448 x 448, of exponent 16, is 2^3
        (-7.5, 13, True, 0.0),
        (-7.5, 13, False, -8.0),
        (7.5, 14, True, 4.0),
        (-7.5, 15, True, -6.0),
        (15.0, 13, True, 8.0),
        (7.5, 23, True, 7.5),
    ],
)
def test_bits_behind_the_largest_exponent_are_cut(small, bits, toward_zero, left):
    """448 x 448 - 448 x 448 + small x 1."""
    a, b = torch.tensor([[448.0, -448.0, small]]), torch.tensor([[448.0], [448.0], [1.0]])
    how = Accumulator(bits, toward_zero=toward_zero)
    assert multiply_add(a, b, torch.zeros(1, 1), how).item() == left
    # The sum so far is one of the terms: it is cut, and the others are cut behind it.
    assert multiply_add(a[:, 2:], b[2:], torch.tensor([[1.75 * 2**16]]), how).item() == 1.75 * 2**16 + left


def test_23_bits_are_float32_and_every_bit_less_costs_a_factor_of_two_or_three():
    a, b = e4m3(64, 128), e4m3(128, 64, seed=1)
    want = a.double() @ b.double()
    errors = {}
    for bits in (23, 15, 14, 13, 12, 11):
        (got,) = add_products(a, b, Accumulator(bits))
        errors[bits] = fp8_error.off(got, want)
    assert errors[23] < 3e-7
    assert all(1.7 * errors[bits] < errors[bits - 1] < 3 * errors[bits] for bits in (15, 14, 13, 12))
    assert 5e-5 < errors[13] < 2.5e-4


def test_sooner_promotion_is_more_exact():
    a, b = e4m3(64, 128), e4m3(128, 64, seed=1)
    want = a.double() @ b.double()
    errors = []
    for promote in (128, 64, 32):
        parts = list(add_products(a, b, Accumulator(13, promote=promote)))
        assert len(parts) == 128 // promote
        errors.append(fp8_error.off(sum(parts), want))
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_float64_problem_is_the_reference_of_the_kernels():
    case = Case("", SHAPE, 9)
    ids = torch.rand(9, 4, generator=torch.Generator().manual_seed(1000)).topk(2, 1).indices.int()
    kernel = CuteFusedMoE.__new__(CuteFusedMoE)  # without its compiled kernels
    inputs = fp8_error.TritonFusedMoE(SHAPE).inputs(SHAPE, ids)
    wanted = CuteFusedMoE.reference(kernel, SHAPE, inputs)
    _, _, found = Exact(case.problem(0)).after(False)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(reference.layer(SHAPE, inputs), wanted)


@pytest.mark.parametrize("of_check", [False, True])
def test_a_layer_in_float32_moves_hardly_any_value_and_13_bits_do(of_check):
    exact = Exact(Case("", SHAPE, 40, of_check=of_check).problem(0))
    float32, short = (study(exact, Accumulator(bits)) for bits in (23, 13))
    assert float32["moved"] < 1e-3
    assert float32["h"] < 1e-6
    assert 1e-3 < float32["layer"] < 2.6e-3  # two roundings to bf16
    assert 1e-4 < short["h"] < 4e-4
    assert 2e-3 < short["moved"] < 2e-2
    assert short["layer"] > 1.3 * float32["layer"]
    assert short["own_h"] < 1.1 * float32["own_h"]  # all of it comes through h


def test_what_contradicts_the_explanation_is_named():
    sums = {"13 bits": {"normal": 1.0, "any": 0.995}, "14 bits": {"normal": 0.5, "any": 0.1}}
    row = {
        "kernel": "cute_moe", "shape": "olmoe", "tokens": 1, "own_h": 2.4e-3, "moved": 8e-3,
        "moved_from": {"13 bits": 2e-6, "14 bits": 8e-3},
    }  # fmt: skip
    assert fp8_error.refutations(sums, [row]) == []
    assert "no model" in fp8_error.refutations({"13 bits": {"normal": 0.98}}, [row])[0]
    assert "given its own h" in fp8_error.refutations(sums, [row | {"own_h": 4e-3}])[0]
    assert "nearest model" in fp8_error.refutations(sums, [row | {"moved_from": {"13 bits": 1e-3}}])[0]
