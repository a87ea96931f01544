"""Checks the one-launch kernels of a library against float32 on a GPU, then times those that are right.

    python benchmarks/cute_check_mega.py LIBRARY.so [--two TWO.so] [--only REGEX] [--time-only] [--no-time] [--json OUT]

Needs torch and apache-tvm-ffi there, nothing else. Cases and reference are those of `cute_check.py`: routings with
empty, single, full and overfull blocks, absent and remote experts, any top-k, more than 2^31 weights. The rows before and
behind the output are NaN and must stay as they are, rows of tokens whose experts are all remote must stay zero, other
tile orders and grids must give the same but for the order of float32 additions. With --two, up and down of that library
are timed in the same run. Exits 1 if anything failed.
"""

import argparse
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import cute_check
from cute_check import (
    LIMIT,
    ROTATIONS,
    SHAPES,
    Batch,
    Cases,
    Layer,
    check_all,
    check_in_turn,
    copy_bandwidth,
    errors,
    graph_us,
    parse,
    symbols,
    watch,
    where_off,
)

# The children that its `watch` starts are of this script.
cute_check.__file__ = __file__

ROW_LIMIT = 5e-2
"Relative error of the worst row; a value next to a rounding border of FP8 may fall on its other side."
ORDER_LIMIT = 2e-6
"Between two launches: float32 additions in another order."
TOKENS = (1, 4, 16, 64)
TIMED = (("fp8", tuple(SHAPES)), ("bf16", ("olmoe",)))
ORDERS = ((1, 1 << 30), (1, 1 << 30), (8, 7), (3, 132), (1, 264))
GUARDS = 2
"Rows of NaN before and behind the output."


# ---- the child: everything that touches the GPU


def mega(batch: Batch, out, kernel, group_m: int = 1, max_ctas: int = 1 << 30) -> None:
    """Adds the layer's output to float32 `out` [T, H]."""
    layer, (ids, experts, padded, blocks) = batch.layer, batch.routing
    if layer.fp8:
        tensors = (batch.x, batch.x_scale, layer.w13, layer.w13_scale, layer.w2, layer.w2_scale)
    else:
        tensors = (batch.x, layer.w13, layer.w2)
    kernel(*tensors, ids, experts, padded, batch.topk_weights, out, batch.top_k, group_m, blocks, max_ctas)


def check_batch(batch: Batch, kernel) -> dict[str, tuple[float, float, str]]:
    """Errors in float32, after the cast to bf16, and between launches; AssertionError where something else is wrong."""
    torch, tokens = batch.layer.torch, batch.num_tokens
    shape = (tokens, batch.top_k, batch.layer.hidden)
    want = batch.y_ref.masked_fill(~batch.live[:, None], 0).view(shape).sum(1)
    keep = batch.live.view(shape[:2]).any(1)
    found: dict[str, tuple[float, float, str]] = {}
    first = None
    for group_m, max_ctas in ORDERS:
        memory = torch.full((tokens + 2 * GUARDS, shape[2]), float("nan"), device="cuda")
        out = memory[GUARDS : GUARDS + tokens]
        out.zero_()
        mega(batch, out, kernel, group_m, max_ctas)
        torch.cuda.synchronize()
        order = f"group_m={group_m} max_ctas={max_ctas}"
        guards = torch.cat([memory[:GUARDS], memory[-GUARDS:]])
        assert bool(guards.isnan().all()), f"rows outside the output were written, {order}"
        assert bool((out[~keep] == 0).all()), f"rows of tokens without local experts were written, {order}"
        if first is None:
            first = out.clone()
            for what, got in (("fp32", out), ("bf16", out.to(torch.bfloat16).float())):
                overall, row = errors(got[keep], want[keep])
                bad = not (overall <= LIMIT and row <= ROW_LIMIT)
                found[what] = (overall, row, where_off(got[keep], want[keep]) if bad else "")
        else:
            overall, row = errors(out[keep], first[keep])
            where = where_off(out[keep], first[keep]) + f", {order}" if not overall <= ORDER_LIMIT else ""
            if where or overall >= found.get("order", (0.0,))[0]:
                found["order"] = (overall, row, where)
    return found


def check_empty(batch: Batch, kernel) -> None:
    """With no blocks nothing may be written, and nothing else read."""
    torch = batch.layer.torch
    routing = ids, experts, padded, blocks = batch.routing
    batch.routing = ids, torch.full_like(experts, 99_999_999), torch.zeros_like(padded), blocks
    out = torch.zeros(batch.num_tokens, batch.layer.hidden, device="cuda")
    mega(batch, out, kernel)
    torch.cuda.synchronize()
    batch.routing = routing
    assert bool((out == 0).all()), "something was written without blocks"


def check_config(cases: Cases, name: str, kernel, block_m: int, say) -> dict:
    worst: dict[str, float] = {}
    failures = []
    for case, batch in cases.batches(block_m):
        say({"alive": f"{name}: {case}"})
        try:
            for what, (overall, row, where) in check_batch(batch, kernel).items():
                worst[what] = max(worst.get(what, 0.0), overall)
                if where:
                    failures.append(f"{case}: {what} off by {overall:.2g}, worst row {row:.2g}: {where}")
        except AssertionError as error:
            failures.append(f"{case}: {error}")
        except (RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{case}: {type(error).__name__} {str(error)[:300]}")
            if "cuda" in str(error).lower():
                return {"config": name, "failures": failures, "worst": worst, "fatal": True}
    try:
        check_empty(cases.batches(block_m)[3][1], kernel)
    except AssertionError as error:
        failures.append(f"no blocks: {error}")
    return {"config": name, "failures": failures, "worst": worst}


def time_shape(torch, layer: Layer, shape_name: str, tokens: int, functions, names: list[str], say) -> None:
    """Times one shape and token count, each time over other experts' weights than the last."""
    num_experts, top_k, hidden, intermediate = SHAPES[shape_name]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    ids = [
        torch.rand(tokens, num_experts, device="cuda", generator=layer.rng).topk(top_k, 1).indices.int()
        for _ in range(ROTATIONS)
    ]
    active = sum(one.unique().numel() for one in ids) / len(ids)
    bytes_read = active * 3 * hidden * intermediate * layer.w13.element_size()
    sums = torch.zeros(tokens, hidden, device="cuda")
    rows = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    by_block: dict[int, list[Batch]] = {}

    def whole(batch: Batch, kernel, ctas: int) -> None:
        sums.zero_()
        mega(batch, sums, kernel, 1, ctas)
        rows.copy_(sums)

    for name in names:
        role, _, block_m, num_rows = parse(name)
        if hidden % max(256, num_rows) or 2 * intermediate % num_rows or tokens * top_k / num_experts > 8 * block_m:
            continue
        if block_m not in by_block:
            by_block[block_m] = [Batch(layer, one, block_m, reference=False) for one in ids]
        batches, result = by_block[block_m], {}
        for mode, ctas in (("each", 1 << 30), ("132", multiprocessors), ("264", 2 * multiprocessors)):
            if role == "up":
                if mode == "264":
                    continue
                launches = []
                for batch in batches:
                    launches.append(partial(batch.up, functions[name], 1, ctas))
                    launches.append(partial(batch.down, functions["down" + name.removeprefix("up")], 1, ctas))
            else:
                launches = [partial(mega, batch, sums, functions[name], 1, ctas) for batch in batches]
            result[mode] = graph_us(torch, launches) / len(batches)
            if role == "mega" and mode == "each":
                launches = [partial(whole, batch, functions[name], ctas) for batch in batches]
                result["whole"] = graph_us(torch, launches) / len(batches)
        best = min(us for mode, us in result.items() if mode != "whole")
        say(
            {
                "timed": name,
                "shape": shape_name,
                "tokens": tokens,
                "us": result,
                "best": best,
                "tb_s": bytes_read / best / 1e6,
            }
        )


def time_configs(torch, functions, names: list[str], say) -> None:
    say({"copy_tb_s": copy_bandwidth(torch)})
    for dtype, shapes in TIMED:
        wanted = [name for name in names if parse(name)[1] == dtype]
        for shape_name in shapes if wanted else ():
            layer = Layer(torch, dtype, SHAPES[shape_name])
            for tokens in TOKENS:
                time_shape(torch, layer, shape_name, tokens, functions, wanted, say)
            del layer
            torch.cuda.empty_cache()


def child(library: str, two: str, names: list[str], mode: str) -> None:
    """Works through configs and prints one JSON object a line."""
    import torch
    import tvm_ffi

    def say(what: dict) -> None:
        print(json.dumps(what), flush=True)

    torch.backends.cuda.matmul.allow_tf32 = False
    module = tvm_ffi.load_module(library)
    functions = {"mega_" + name: module.get_function("mega_" + name) for name in names}
    say({"alive": "loaded"})
    if mode == "time":
        timed = list(functions)
        if two:
            module = tvm_ffi.load_module(two)
            found = symbols(Path(two))
            functions |= {symbol: module.get_function(symbol) for symbol in found}
            timed += [name for name in found if name.startswith("up") and "down" + name.removeprefix("up") in found]
        time_configs(torch, functions, timed, say)
        return

    def check(cases, name, block_m):
        return check_config(cases, name, functions["mega_" + name], block_m, say)

    check_in_turn(torch, Cases, names, check, say)


# ---- the parent: watches


def time_all(library: Path, two: str, names: list[str], patience: float) -> list[dict]:
    copied, rows = 0.0, []
    for said in watch(library, names, "time", patience, ("--two", two) if two else ()):
        copied = said.get("copy_tb_s", copied)
        if "timed" in said:
            rows.append(said)
        elif "silent" in said or "died" in said:
            print("FAILED while timing:", said, flush=True)
    print(f"\ncopy bandwidth {copied:.2f} TB/s; TB/s over the weights of active experts; best of grids;")
    print("whole: with the zeroing and the cast of torch, without PDL; up: up + down without their sum")
    cells = list(dict.fromkeys((parse(row["timed"])[1], row["shape"], row["tokens"]) for row in rows))
    for dtype, shape, tokens in cells:
        here = [r for r in rows if (parse(r["timed"])[1], r["shape"], r["tokens"]) == (dtype, shape, tokens)]
        print(f"\n{dtype} {shape} {tokens} tokens")
        for role, most in (("mega", 7), ("up", 2)):
            for row in sorted((r for r in here if parse(r["timed"])[0] == role), key=lambda r: r["best"])[:most]:
                each = "  ".join(f"{mode} {us:.1f}" for mode, us in row["us"].items())
                print(
                    f"  {row['timed']:26s} {row['best']:8.1f} us {row['tb_s']:5.2f} TB/s "
                    f"{100 * row['tb_s'] / max(copied, 1e-9):4.0f} %   {each}"
                )
    return [{"copy_tb_s": copied}, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--two", default="", help="library whose up and down are timed beside")
    parser.add_argument("--only", default="", help="regular expression on names such as fp8_m16_n64_w4_s4")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds of silence after which a child is killed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("check", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--configs", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(str(args.library), args.two, args.configs.split(","), args.child)
        return
    found = [symbol.removeprefix("mega_") for symbol in symbols(args.library) if symbol.startswith("mega_")]
    # Configs of one block size after another: they share batches.
    names = [name for name in found if re.search(args.only, name)]
    names.sort(key=lambda name: (parse("mega_" + name)[1], parse("mega_" + name)[2], name))
    print(f"{len(found)} one-launch kernels in {args.library}, {len(names)} to look at", flush=True)
    began, results = time.monotonic(), []
    if not args.time_only:
        results = check_all(args.library, names, args.patience)
        kinds = ("fp32", "bf16", "order")
        print(f"\n{'config':26s} " + " ".join(f"{kind:>9s}" for kind in kinds))
        for result in results:
            worst = [f"{result['worst'][kind]:9.2g}" if kind in result["worst"] else " " * 9 for kind in kinds]
            print(f"{result['config']:26s} {' '.join(worst)}  {'FAILED' if result['failures'] else 'ok'}")
        names = [result["config"] for result in results if not result["failures"]]
        print(f"{len(names)} of {len(results)} configs right, {time.monotonic() - began:.0f} s", flush=True)
    timed = time_all(args.library, args.two, names, args.patience) if names and not args.no_time else []
    print(f"{time.monotonic() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps({"checked": results, "timed": timed}))
    sys.exit(bool(not names or any(result["failures"] for result in results)))


if __name__ == "__main__":
    main()
