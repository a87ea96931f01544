"""Where the error of the FP8 layer comes from: the layer again, with the tensor core's additions emulated.

    python benchmarks/fp8_error.py --out results/cpu-fp8_error.json     # CPU only, about 8 minutes on one core
    python benchmarks/fp8_error.py --gpu --out results/h200-fp8_error.json    # the kernels themselves, on a Hopper

The model of one wgmma of e4m3 operands, which adds 32 products to an accumulator: all 33 terms are aligned to the
largest of their exponents, each is cut off `fraction_bits` behind that exponent's bit, the rest is added exactly, and
the sum is cut to as many bits behind its own. The sums of 128 columns are then scaled and added in float32, as our kernels do.
With 23 bits this is float32.

For each case the layer runs with quantised tokens, SwiGLU, h quantised in groups of 128, and bf16 rows, once for each accumulator,
and is compared with the same steps in float64. Of every accumulator:

    h           relative error of h before it is quantised (Frobenius norm, as all errors here)
    scale       of the groups' scales
    moved       share of the values of h that became another FP8 number
    h_fp8       relative error of h after it was quantised: `up` in cute_check.py
    layer       of the layer's output: bf16 rows of every slot, summed and rounded to bf16 again
    rows        of the same before that second rounding: `layer` in cute_check.py
    layer_fp32  of the layer with nothing rounded to bf16
    down        of the bf16 rows, given the h that the emulated first GEMM left: the second GEMM and one rounding alone
    own_h       of the output, given that h

With --gpu the kernels are held against all of it: sums of one instruction bit by bit, then the FP8 numbers that the first
launch of our Triton and CuTe layers left in the workspace, then their outputs, given the reference's h and their own.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch
import triton
import triton.language as tl

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import RampwrapError
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.common.reference import FP8, dequantise, quantise, weights_of
from rampwrap.routing.workloads import Routing, Workload

GROUP = 128
"Columns that share a scale, and the most that the tensor core adds before our kernels go on in float32."
INSTRUCTION = 32
"Products that one wgmma of 8-bit operands adds."
MIN_EXPONENT = -6
"Of e4m3: smaller numbers have this exponent and leading zeros."
LARGEST = 1 << 21
"Products held at a time; 8 MB, so that they stay in a cache."
CHECK_SEEDS = 12
"Draws of the cases of cute_check.py, where there are as many block_m with a draw each."
LARGE_SEEDS = 4
"Of its largest case, which takes most of the time."
RESULTS = pathlib.Path(__file__).parent / "results"


@attrs.frozen
class Accumulator:
    """How sums of products are kept."""

    fraction_bits: int
    promote: int = GROUP
    "Columns after which the sum goes to float32 and the next one starts from zero."
    toward_zero: bool = True
    "Whether bits are cut off the magnitude; else off a two's complement number, which is toward minus infinity."
    through_bf16: bool = False
    "Whether h is rounded to bf16 before it is quantised, in the emulated layer and in its reference: our Triton kernel."

    @property
    def label(self) -> str:
        """Such as ``13 bits, promoted every 32``."""
        text = f"{self.fraction_bits} bits"
        if not self.toward_zero:
            text += ", cut downward"
        if self.promote != GROUP:
            text += f", promoted every {self.promote}"
        return text + (", h through bf16" if self.through_bf16 else "")

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Whole numbers: the bits that are left."""
        return x.trunc() if self.toward_zero else x.floor()


ACCUMULATORS = (
    *(Accumulator(bits) for bits in (23, 14, 13, 12)),
    Accumulator(13, toward_zero=False),
    Accumulator(13, promote=64),
    Accumulator(13, promote=32),
    Accumulator(13, through_bf16=True),
)


def exponent(x: torch.Tensor) -> torch.Tensor:
    """floor(log2 |x|) of float32 or float64 as int32; far below everything for zeros. Out of the encoding."""
    if x.dtype == torch.float32:
        return (x.view(torch.int32) >> 23 & 0xFF) - 127
    return (x.view(torch.int64) >> 52 & 0x7FF).int() - 1023


def power_of_two(n: torch.Tensor) -> torch.Tensor:
    """2^n in float64, exactly, for integers within +-1000."""
    return ((n.long() + 1023) << 52).view(torch.float64)


def multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, how: Accumulator) -> torch.Tensor:
    """One instruction: c + a @ b, with the additions of `how`.

    Args:
        a: float32 [M, K], e4m3 numbers; K is at most 32.
        b: float32 [K, N], e4m3 numbers.
        c: float32 [M, N], of no more bits than `how` keeps.

    Returns:
        float32 [M, N].
    """
    bits = how.fraction_bits
    # Zero has the exponent of the subnormal numbers, as its encoding has.
    of_a, of_b = (exponent(x).clamp_min(MIN_EXPONENT).float() for x in (a, b))
    most = (of_a[:, :, None] + of_b[None]).amax(1).int()
    most = torch.maximum(most, exponent(c))
    up = power_of_two(bits - most)
    # Products have 8 bits, so they and their scaling are exact in float32; their sums are below 2^(bits + 8).
    exact = torch.float32 if bits <= 16 else torch.float64
    terms = (a[:, :, None] * b[None]).mul_(up.float()[:, None])
    total = how.cut(terms).sum(1, dtype=exact) + how.cut(c.double() * up).to(exact)
    total = total.double()
    # Behind the sum's own leading bit; where that is below 2^bits nothing is cut.
    step = power_of_two((exponent(total) - bits).clamp_min(0))
    return (how.cut(total / step) * step / up).float()


def add_products(a: torch.Tensor, b: torch.Tensor, how: Accumulator) -> Iterator[torch.Tensor]:
    """Partial sums of a @ b in float32 [M, N], one for each `how.promote` columns of a [M, K] and rows of b [K, N]."""
    for first in range(0, a.shape[1], how.promote):
        total = a.new_zeros(a.shape[0], b.shape[1])
        for k in range(first, min(first + how.promote, a.shape[1]), INSTRUCTION):
            total = multiply_add(a[:, k : k + INSTRUCTION], b[k : k + INSTRUCTION], total, how)
        yield total


def gemm(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, how: Accumulator
) -> torch.Tensor:
    """x @ w^T with scales, float32 [M, N].

    Args:
        x: e4m3 [M, K].
        x_scale: float32 [M, K / 128].
        w: e4m3 [N, K].
        w_scale: float32 [N / 128, K / 128].
        how: what adds the products.
    """
    rows = max(1, LARGEST // (INSTRUCTION * w.shape[0]))
    b = w.float().T.contiguous()
    scales = w_scale.repeat_interleave(GROUP, 0)
    out = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    for first in range(0, x.shape[0], rows):
        part = slice(first, first + rows)
        for index, sums in enumerate(add_products(x[part].float(), b, how)):
            group = index * how.promote // GROUP
            out[part] += sums * (x_scale[part, group, None] * scales[None, :, group])
    return out


@attrs.frozen(eq=False)
class Problem:
    """An FP8 layer with tokens already quantised: e4m3 values and float32 scales."""

    x: torch.Tensor
    "e4m3 [T, H]"
    x_scale: torch.Tensor
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    topk_ids: torch.Tensor
    "[T, top_k], all of them experts that are here"
    topk_weights: torch.Tensor

    @classmethod
    def of_launch(cls, inputs: dict[str, Any]) -> "Problem":
        """From keyword arguments of `launch`."""
        names = ("w13", "w13_scale", "w2", "w2_scale", "topk_ids", "topk_weights")
        return cls(*quantise(inputs["hidden_states"]), **{name: inputs[name] for name in names})

    def by_expert(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(expert, its slots)."""
        flat = self.topk_ids.flatten().long()
        for expert in flat.unique().tolist():
            yield expert, (flat == expert).nonzero().flatten()

    def up(self, how: Accumulator | None) -> torch.Tensor:
        """h of every slot, [T * top_k, I]: float32, or float64 where `how` is None."""
        dtype = torch.float32 if how else torch.float64
        h = torch.empty(self.topk_ids.numel(), self.w2.shape[2], dtype=dtype, device=self.x.device)
        for expert, at in self.by_expert():
            token = at // self.topk_ids.shape[1]
            x, x_scale, w, w_scale = self.x[token], self.x_scale[token], self.w13[expert], self.w13_scale[expert]
            both = gemm(x, x_scale, w, w_scale, how) if how else dequantise(x, x_scale) @ weights_of(w, w_scale).T
            gate, up = both.chunk(2, dim=1)
            h[at] = torch.nn.functional.silu(gate) * up
        return h

    def down(self, h: torch.Tensor, h_scale: torch.Tensor, how: Accumulator | None) -> torch.Tensor:
        """Weighted rows of every slot from e4m3 h and its scales, [T * top_k, H]: float32, or float64 without `how`."""
        dtype = torch.float32 if how else torch.float64
        out = torch.empty(len(h), self.w2.shape[1], dtype=dtype, device=self.x.device)
        for expert, at in self.by_expert():
            w, w_scale = self.w2[expert], self.w2_scale[expert]
            out[at] = (
                gemm(h[at], h_scale[at], w, w_scale, how)
                if how
                else dequantise(h[at], h_scale[at]) @ weights_of(w, w_scale).T
            )
        return out * self.topk_weights.reshape(-1, 1).to(out.dtype)

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[T * top_k, H] -> [T, H]."""
        return rows.view(len(self.x), -1, rows.shape[1]).sum(1)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error, Frobenius norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def moved(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of e4m3 values that are other numbers."""
    return (got.float() != want.float()).double().mean().item()


def narrow(h: torch.Tensor, through_bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """h in e4m3 and its scales."""
    return quantise(h.to(torch.bfloat16) if through_bf16 else h)


class Exact:
    """A problem's float64 results, made once for all accumulators."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.h = problem, problem.up(None)
        self._made: dict[bool, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def after(self, through_bf16: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(h in e4m3, its scales, float64 output)."""
        if through_bf16 not in self._made:
            q, scale = narrow(self.h, through_bf16)
            self._made[through_bf16] = q, scale, self.problem.sum_rows(self.problem.down(q, scale, None))
        return self._made[through_bf16]


def study(exact: Exact, how: Accumulator) -> dict[str, float]:
    """The errors of one accumulator; see the top of this file."""
    problem, h = exact.problem, exact.problem.up(how)
    want_q, want_scale, want = exact.after(how.through_bf16)
    q, scale = narrow(h, how.through_bf16)
    rows = problem.down(q, scale, how)
    narrow_rows, own = rows.to(torch.bfloat16), problem.down(q, scale, None)
    summed = problem.sum_rows(narrow_rows.float())
    out = summed.to(torch.bfloat16)
    return {
        "h": off(h, exact.h),
        "scale": off(scale, want_scale),
        "moved": moved(q, want_q),
        "h_fp8": off(dequantise(q, scale), dequantise(want_q, want_scale)),
        "layer": off(out, want),
        "rows": off(summed, want),
        "layer_fp32": off(problem.sum_rows(rows), want),
        "down": off(narrow_rows, own),
        "own_h": off(out, problem.sum_rows(own)),
    }


# ---- cases


def check_problem(shape: MoEShape, topk_ids: torch.Tensor, seed: int) -> Problem:
    """Random data distributed as in cute_check.py: e4m3 normal weights of deviation 1, scales of 0.02 to 0.08."""
    rng = torch.Generator().manual_seed(seed)
    experts, hidden, columns = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def weights(rows: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
        w = torch.randn(experts, rows, of, generator=rng).to(FP8)
        return w, torch.rand(experts, rows // GROUP, of // GROUP, generator=rng) * 0.06 + 0.02

    w13, w2 = weights(2 * columns, hidden), weights(hidden, columns)
    x = quantise(torch.randn(len(topk_ids), hidden, generator=rng))
    return Problem(*x, *w13, *w2, topk_ids, torch.rand(topk_ids.shape, generator=rng) + 0.1)


@attrs.frozen
class Case:
    """A layer, cut to the experts that matter, and a batch."""

    name: str
    shape: MoEShape
    tokens: int
    seeds: int = 1
    of_check: bool = False
    "Whether data are those of cute_check.py; else of `CuteFusedMoE.inputs`."

    def problem(self, seed: int) -> Problem:
        rng = torch.Generator().manual_seed(1000 + seed)
        ids = torch.rand(self.tokens, self.shape.num_experts, generator=rng).topk(self.shape.top_k, 1).indices.int()
        if self.of_check:
            return check_problem(self.shape, ids, seed)
        return Problem.of_launch(TritonFusedMoE(self.shape).inputs(self.shape, ids, seed=seed))


def cases(model_tokens: int) -> list[Case]:
    """The cases of cute_check.py, then layers of models with 8 experts, then small layers of the GPU tests."""
    # Its blocks are of 16 rows here; experts without tokens are left out.
    found = [
        Case(f"check: {name}", MoEShape(*sizes, "fp8"), tokens, seeds, of_check=True)
        for name, sizes, tokens, seeds in (
            ("block edges, top-1", (8, 1, 512, 384), 104, CHECK_SEEDS),
            ("top-2", (8, 2, 512, 384), 49, CHECK_SEEDS),
            ("top-4", (16, 4, 768, 256), 97, CHECK_SEEDS),
            ("top-16", (32, 16, 512, 256), 9, CHECK_SEEDS),
            ("1 token", (8, 8, 512, 256), 1, CHECK_SEEDS),
            ("I > H", (8, 2, 256, 1024), 33, CHECK_SEEDS),
            ("2^31 weights", (6, 2, 4096, 2048), 7, LARGE_SEEDS),
        )
    ]
    for name in ("olmoe", "qwen3-30b", "deepseek-v3-tp8"):
        shape = attrs.evolve(SHAPES[name], num_experts=8, num_local_experts=8, dtype="fp8")
        found.append(Case(f"{name}, 1 token", shape, 1, 6))
        found.append(Case(f"{name}, {model_tokens} tokens", shape, model_tokens, 3))
    found.append(Case("small, 1 token", MoEShape(8, 1, 256, 256, "fp8"), 1, 64))
    found.append(Case("small, 130 tokens", MoEShape(8, 8, 256, 256, "fp8"), 130))
    return found


def run_cases(chosen: list[Case]) -> list[dict[str, Any]]:
    """Errors of every case and accumulator: of each seed, their mean, least and most."""
    rows = []
    for case in chosen:
        began = time.monotonic()
        shape = case.shape
        print(f"\n{case.name}: E={shape.num_experts} top_k={shape.top_k} H={shape.hidden_size} I={shape.intermediate_size}, "
              f"{case.tokens} tokens, {case.seeds} seeds")  # fmt: skip
        exact = [Exact(case.problem(seed)) for seed in range(case.seeds)]
        for how in ACCUMULATORS:
            found = [study(one, how) for one in exact]
            mean, least, most = (
                {key: float(of([one[key] for one in found])) for key in found[0]} for of in (np.mean, np.min, np.max)
            )
            row = {"case": case.name, "shape": attrs.asdict(shape), "tokens": case.tokens, "label": how.label,
                   "accumulator": attrs.asdict(how), "mean": mean, "least": least, "most": most}  # fmt: skip
            if case.of_check:
                row["each"] = [{key: one[key] for key in MEASURED.values()} for one in found]
            rows.append(row)
            print(f"  {how.label:30s} " + "  ".join(f"{key} {value:.2e}" for key, value in mean.items())
                  + f"  (layer {least['layer']:.2e} to {most['layer']:.2e})", flush=True)  # fmt: skip
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return rows


MEASURED = {"up": "h_fp8", "h_scale": "scale", "down": "down", "layer": "rows"}
"What cute_check.py calls them, and what they are here."


def beside_measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest errors over the cases of cute_check.py, next to what it found on the GPU in its FP8 configs.

    Ranges are over draws of all cases: on the GPU every block_m has its own, here every seed.
    """
    checked = json.loads((RESULTS / "h200-cute_check.json").read_text())["checked"]
    worst = [one["worst"] for one in checked if one["config"].startswith("fp8")]
    found: dict[str, Any] = {
        "measured on an H200": {
            name: tuple(float(of([one[name] for one in worst])) for of in (np.min, np.median, np.max))
            for name in MEASURED
        }
    }
    for how in ACCUMULATORS:
        mine = [row["each"] for row in rows if row["label"] == how.label and row["case"].startswith("check")]
        if mine:
            draws = [[case[seed % len(case)] for case in mine] for seed in range(max(map(len, mine)))]
            found[how.label] = {}
            for name, key in MEASURED.items():
                most = [max(case[key] for case in draw) for draw in draws]
                found[how.label][name] = tuple(float(x) for x in (np.min(most), np.median(most), np.max(most)))
    print("\nlargest over the cases of cute_check.py: least, median and most of the draws")
    print("  " + " " * 30 + "".join(f"{name:>30s}" for name in MEASURED))
    for label, ranges in found.items():
        print(f"  {label:30s}" + "".join(f"{' '.join(f'{x:.2e}' for x in those):>30s}" for those in ranges.values()))
    return found


# ---- the kernels themselves


@triton.jit
def one_product(x_ptr, w_ptr, out_ptr, K: tl.constexpr):  # noqa: N803
    """out = x @ w^T of 64 x 64 e4m3 values by wgmma, K / 32 instructions into one accumulator."""
    rows, k = tl.arange(0, 64), tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + k[None, :])
    w = tl.load(w_ptr + rows[None, :] * K + k[:, None])
    tl.store(out_ptr + rows[:, None] * 64 + rows[None, :], tl.dot(x, w))


def hold_instruction() -> dict[str, dict[str, float]]:
    """Share of sums of one wgmma, and of four in a row, that are bit by bit those of each model."""
    rng, found = torch.Generator("cuda").manual_seed(0), {}
    print("\nshare of sums with the bits of the model: 64 x 64, weights normal, then all e4m3 numbers equally often")
    models = [Accumulator(bits, toward_zero=cut) for bits in (23, 14, 13, 12) for cut in (True, False)]
    for how in models:
        shares = {}
        for k in (INSTRUCTION, GROUP):
            for name in ("normal", "any"):
                if name == "normal":
                    values = torch.randn(2, 64, k, device="cuda", generator=rng) * 64
                else:
                    bits = torch.randint(0, 254, (2, 64, k), device="cuda", generator=rng)
                    bits += (bits >= 127).long()  # 0x7f and 0xff are no numbers
                    values = bits.to(torch.uint8).view(FP8).float()
                x, w = values.clamp(-448, 448).to(FP8)
                got = torch.empty(64, 64, device="cuda")
                one_product[(1,)](x, w, got, K=k, num_warps=4)
                (want,) = add_products(x.float(), w.float().T.contiguous(), attrs.evolve(how, promote=GROUP))
                shares[f"{name}, k={k}"] = (got == want).double().mean().item()
        found[how.label] = shares
        print(f"  {how.label:30s} " + "  ".join(f"{name} {share:.4f}" for name, share in shares.items()), flush=True)
    return found


def hold_layers(names: list[str], all_tokens: list[int], seed: int) -> list[dict[str, Any]]:
    """Our Triton and CuTe layers against float64, given the reference's h and their own; h against every model."""
    rows = []
    for name in names:
        shape = attrs.evolve(SHAPES[name], dtype="fp8")
        kernels: list[Any] = []
        for make in (lambda: TritonFusedMoE(shape), lambda: CuteFusedMoE(shape, "two")):  # noqa: B023
            try:
                kernels.append(make())
            except RampwrapError as error:
                print(f"left out: {error}", file=sys.stderr)
        for tokens in all_tokens:
            load = Workload(tokens, Routing.parse("zipf:1.2"), seed=seed)
            ids = torch.from_numpy(load.topk_ids(shape.num_experts, shape.top_k)).cuda()
            inputs = kernels[0].inputs(shape, ids)
            problem = Problem.of_launch(inputs)
            exact = Exact(problem)
            emulated = [(bits, problem.up(Accumulator(bits))) for bits in (23, 14, 13, 12)]
            for kernel in kernels:
                through_bf16, memory = isinstance(kernel, TritonFusedMoE), kernel.workspace(tokens)
                out = kernel.launch(kernel.default_config(tokens), **inputs, workspace=memory)
                q, scale = memory.h_fp8[: ids.numel()], memory.h_scale[: ids.numel()]
                want_q, want_scale, want = exact.after(through_bf16)
                row: dict[str, Any] = {
                    "kernel": kernel.name,
                    "shape": name,
                    "tokens": tokens,
                    "layer": off(out, want),
                    "own_h": off(out, problem.sum_rows(problem.down(q, scale, None))),
                    "h_fp8": off(dequantise(q, scale), dequantise(want_q, want_scale)),
                    "scale": off(scale, want_scale),
                    "moved": moved(q, want_q),
                    "moved_from": {},
                }
                for bits, h in emulated:
                    row["moved_from"][f"{bits} bits"] = moved(q, narrow(h, through_bf16)[0])
                rows.append(row)
                print(
                    f"{name} {tokens} tokens, {kernel.name}: layer {row['layer']:.2e}, given its own h {row['own_h']:.2e}; "
                    f"h_fp8 {row['h_fp8']:.2e}, scale {row['scale']:.2e}; values of h with another FP8 number than float64 "
                    f"{row['moved']:.2e}, than the model of "
                    + ", ".join(f"{key} {share:.2e}" for key, share in row["moved_from"].items()),
                    flush=True,
                )
    return rows


def refutations(instruction: dict[str, dict[str, float]], layers: list[dict[str, Any]]) -> list[str]:
    """What contradicts the explanation; empty where it holds."""
    found = []
    label = max(instruction, key=lambda name: min(instruction[name].values()))
    share = min(instruction[label].values())
    if share < SAME_SUMS:
        found.append(f"no model gives the bits of the instruction: the best, {label}, {share:.2%}")
    for row in layers:
        where = f"{row['kernel']} {row['shape']} {row['tokens']} tokens"
        if row["own_h"] > OWN_H:
            found.append(f"{where}: {row['own_h']:.2e} off given its own h, more than two roundings to bf16")
        nearest = min(row["moved_from"].values())
        if nearest > row["moved"] / 10:
            found.append(
                f"{where}: {nearest:.2e} of h are other FP8 numbers than in the nearest model, float64 {row['moved']:.2e}"
            )
    return found


SAME_SUMS = 0.99
"Of an instruction, for a model to be right; what is left would be subnormal numbers or an order of terms."
OWN_H = 3e-3
"Relative error of the output given the kernel's own h: two roundings to bf16 are 2.4e-3."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="measure the kernels instead of emulated layers")
    parser.add_argument("--only", default="", help="part of the names of the cases to run, without --gpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64], help="with --gpu")
    parser.add_argument(
        "--shapes", nargs="+", default=["olmoe", "qwen3-30b"], choices=sorted(SHAPES), help="with --gpu"
    )
    parser.add_argument("--model-tokens", type=int, default=16, help="of the model layers, without --gpu")
    parser.add_argument("--seed", type=int, default=7, help="of the routing, with --gpu")
    parser.add_argument("--out", type=pathlib.Path, help="JSON")
    a = parser.parse_args()
    if a.gpu:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            parser.error("--gpu needs a Hopper GPU; leave it out to emulate one.")
        print(torch.cuda.get_device_name())
        instruction = hold_instruction()
        layers = hold_layers(a.shapes, a.tokens, a.seed)
        against = refutations(instruction, layers)
        print("\n" + ("\n".join(f"REFUTED: {text}" for text in against) or "the explanation holds"))
        result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "instruction": instruction, "layers": layers,
                                  "refuted": against}  # fmt: skip
    else:
        rows = run_cases([case for case in cases(a.model_tokens) if a.only in case.name])
        result = {"cases": rows, "beside": beside_measured(rows)}
        against = []
    if a.out:
        a.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if against else 0


if __name__ == "__main__":
    raise SystemExit(main())
