"""Where the ragged form goes wrong, if it does: h and the rows before the sum, width by width, for every config.

    python tests/gpu/kernels/ragged_probe.py [--dtype fp8]

A line a case: the relative error of h, of the rows, of the output, and the worst expert. One expert with n tokens is one width; one
tile and few steps are the least that runs. The first line that is wrong says what to look at. A process of its own, to be run
under `timeout`: it prints before each launch.
"""

import argparse
import sys

import torch

from rampwrap.adapters.cute_moe import CuteFusedMoE
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.reference import activate, dequantise, quantise, weights_of
from rampwrap.kernels.cute.configs import CuteConfig, all_configs

BOUND = {"bf16": 5e-3, "fp8": 1.2e-2}


def expected(shape, inputs):
    """float64 h and rows of every slot."""
    fp8 = shape.dtype == "fp8"
    x = dequantise(*quantise(inputs["hidden_states"])) if fp8 else inputs["hidden_states"].double()
    ids, routing = inputs["topk_ids"].flatten().long(), inputs["topk_weights"].double().flatten()
    h = torch.zeros(len(ids), shape.intermediate_size, dtype=torch.float64, device=x.device)
    rows = torch.zeros(len(ids), shape.hidden_size, dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        slots = (ids == expert).nonzero().flatten()
        w13, w2 = (
            weights_of(inputs[name][expert], inputs[f"{name}_scale"][expert] if fp8 else None) for name in ("w13", "w2")
        )
        its = activate(x[slots // shape.top_k], w13)
        h[slots] = dequantise(*quantise(its)) if fp8 else its.bfloat16().double()
        rows[slots] = (h[slots] @ w2.T) * routing[slots, None]
    return h, rows


def off(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def probe(kernel, config, counts, device):
    """Errors of (h, rows, output), and the expert whose rows are worst."""
    shape = kernel.shape
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].view(-1, shape.top_k).to(device)
    inputs, memory = kernel.inputs(shape, ids), kernel.workspace(len(ids), device)
    for tensor in (memory.h, memory.y, memory.h_fp8, memory.h_scale):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xFF)
    out = torch.full_like(inputs["hidden_states"], torch.nan)
    kernel.launch(config, **inputs, out=out, workspace=memory)
    h, rows = expected(shape, inputs)
    slots = ids.numel()
    found = memory.h[:slots].double()
    if memory.h_fp8 is not None:
        found = dequantise(memory.h_fp8[:slots], memory.h_scale[:slots])
    each = {expert: off(memory.y[:slots][ids.flatten() == expert], rows[ids.flatten() == expert]) for expert in set(ids.flatten().tolist())}  # fmt: skip
    errors = (
        off(found, h),
        off(memory.y[:slots], rows),
        off(out, rows.view(len(ids), shape.top_k, -1).sum(1)),
    )
    return errors, max(each, key=lambda expert: (each[expert] != each[expert], each[expert]))


def cases(config: CuteConfig):
    """(what, shape, counts), the least first."""
    dtype, most = config.dtype, config.block_m
    least, long = MoEShape(4, 1, 256, 128, dtype), MoEShape(4, 1, 1024, 512, dtype)
    for width in config.widths:
        yield f"one expert, width {width}", least, [width, 0, 0, 0]
    for width in config.widths:
        yield f"a row short of width {width}, and one over", long, [width - 1, 0, width + 1, 0]
    yield "three blocks of an expert", long, [0, 2 * most + 9, 0, 3]
    yield "everything", MoEShape(32, 4, 1024, 512, dtype), [1, 0, 8, 9, 97, 0, 200, 5] * 4


def main(arguments=None, device="cuda", make=CuteFusedMoE):
    """Returns 0, or 1 where a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp8"], nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--only", help="cases whose name holds it")
    a = parser.parse_args(arguments)
    wrong = 0
    for config in (config for dtype in a.dtype for config in all_configs("ragged", dtype)):
        for what, shape, counts in cases(config):
            if a.only and a.only not in what:
                continue
            print(f"{config.name:20s} {what:40s}", end=" ", flush=True)
            (h, rows, out), worst = probe(make(shape, "ragged"), config.keys(1), counts, device)
            bad = not max(h, rows, out) < BOUND[config.dtype]
            wrong += bad
            print(
                f"h {h:.4f} rows {rows:.4f} out {out:.4f}" + (f"  WRONG, expert {worst} most" if bad else ""),
                flush=True,
            )
    print(f"{wrong} cases are wrong" if wrong else "all cases are right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
