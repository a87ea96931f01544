"""Checks the compiled CuTe kernels of a library against float32 on a GPU, then times those that are right.

    python benchmarks/cute_check.py LIBRARY.so [--only REGEX] [--time-only] [--no-time] [--json OUT]
        [--timing-tokens 16 256 2048 8192] [--timing-shapes qwen3-30b olmoe]

Needs torch and apache-tvm-ffi there, nothing else. For every config with an `up` and a `down` in the library: `up`,
`down` and both, one behind the other, against a reference with the same quantisation steps, over routings with empty,
single, full and overfull blocks, absent and remote experts, any top-k; outputs start as NaN; rows of remote slots must stay
untouched; other tile orders and grids must give the same bits. Each config runs in a child that is killed when it
is silent for `--patience` seconds, so that a hang costs one config. Exits 1 if anything failed.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

LIMIT = 5e-3
"Relative error over all values; bf16 rounding alone is 1.7e-3."
ROW_LIMIT = 3e-2
"Of the worst row."
H_LIMITS = 8e-3, 8e-2
"""The same two for h in FP8: where the product lies on a border between two FP8 values, another order of additions rounds
it to the other one, 6 % away. Two such values in 8 rows of 256 were 5.2e-3, one in a row 3.7e-2."""
SHAPES = {  # E, top_k, H, I
    "olmoe": (64, 8, 2048, 1024),
    "qwen3-30b": (128, 8, 2048, 768),
    "deepseek-v3-tp8": (256, 8, 7168, 256),
}
TOKENS = (1, 16, 64, 256, 2048)
SYMBOL = re.compile(rb"__tvm_ffi_((?:up|down|mega)_(?:fp8|bf16)_m\d+_n\d+_w\d+_s\d+)\0")


def symbols(library: Path) -> list[str]:
    """The kernels in a library, from its symbol table."""
    return sorted({found.decode() for found in SYMBOL.findall(library.read_bytes())})


def parse(symbol: str) -> tuple[str, str, int, int]:
    """(role, dtype, block_m, rows) of a symbol."""
    role, dtype, m, n, w, _ = symbol.split("_")
    return role, dtype, int(m[1:]), int(n[1:]) * int(w[1:])


# ---- the child: everything that touches the GPU


class Layer:
    """Random weights of one layer and, for FP8, their scales."""

    def __init__(self, torch, dtype: str, shape: tuple[int, int, int, int], seed: int = 0) -> None:
        self.torch, self.fp8 = torch, dtype == "fp8"
        self.num_experts, self.top_k, self.hidden, self.intermediate = shape
        self.rng = torch.Generator("cuda").manual_seed(seed)
        experts, hidden, columns = self.num_experts, self.hidden, self.intermediate
        self.w13 = self.random(experts, 2 * columns, hidden)
        self.w2 = self.random(experts, hidden, columns)
        if self.fp8:
            self.w13_scale = self.scales(experts, 2 * columns // 128, hidden // 128)
            self.w2_scale = self.scales(experts, hidden // 128, columns // 128)

    def random(self, *shape: int):
        """Normal values of the layer's dtype, made in pieces: whole layers in float32 would not fit."""
        torch = self.torch
        out = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn if self.fp8 else torch.bfloat16)
        for part in out.view(shape[0], -1).split(max(1, (1 << 28) // out[0].numel())):
            part.copy_(torch.randn(part.shape, device="cuda", generator=self.rng) * (1.0 if self.fp8 else 0.05))
        return out

    def scales(self, *shape: int):
        return self.torch.rand(shape, device="cuda", generator=self.rng) * 0.06 + 0.02

    def float_of(self, name: str, expert: int):
        """One expert's weights in float32."""
        weights = getattr(self, name)[expert].float()
        if self.fp8:
            scale = getattr(self, name + "_scale")[expert]
            weights = weights * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weights


def align(torch, topk_ids, num_experts: int, block_m: int, remote: tuple[int, ...] = (), spare_blocks: int = 3):
    """(sorted_token_ids, expert_ids, num_tokens_post_padded, capacity in blocks); ids of `remote` experts become -1.

    Behind the blocks lie the sentinel and, where nothing may be read, an expert id that would crash.
    """
    flat = topk_ids.reshape(-1).long().cpu()
    count = flat.numel()
    by_expert = flat.argsort(stable=True).split(torch.bincount(flat, minlength=num_experts).tolist())
    ids, experts = [], []
    for expert in range(num_experts):
        slots = by_expert[expert].tolist()
        for first in range(0, len(slots), block_m):
            block = slots[first : first + block_m]
            ids += block + [count] * (block_m - len(block))
            experts.append(-1 if expert in remote else expert)
    blocks = len(experts)
    ids += [count] * (spare_blocks * block_m)
    experts += [99_999_999] * spare_blocks
    as_int = {"dtype": torch.int32, "device": "cuda"}
    return (
        torch.tensor(ids, **as_int),
        torch.tensor(experts, **as_int),
        torch.tensor([blocks * block_m], **as_int),
        blocks + spare_blocks,
    )


def quantise(torch, x):
    """(e4m3, scales of 128 columns)."""
    groups = x.float().view(x.shape[0], -1, 128)
    scale = groups.abs().amax(2).clamp_min(1e-10) / 448.0
    return (groups / scale[:, :, None]).view_as(x).to(torch.float8_e4m3fn), scale


def dequantise(q, scale):
    return q.float() * scale.repeat_interleave(128, 1)


class Batch:
    """Tokens, routing and the reference results of one case."""

    def __init__(
        self, layer: Layer, topk_ids, block_m: int, remote: tuple[int, ...] = (), reference: bool = True
    ) -> None:
        torch = layer.torch
        self.layer, self.topk_ids = layer, topk_ids
        self.num_tokens, self.top_k = topk_ids.shape
        self.num_slots = topk_ids.numel()
        self.routing = align(torch, topk_ids, layer.num_experts, block_m, remote)
        x = torch.randn(self.num_tokens, layer.hidden, device="cuda", generator=layer.rng)
        self.topk_weights = torch.rand(self.num_slots, device="cuda", generator=layer.rng) + 0.1
        if layer.fp8:
            self.x, self.x_scale = quantise(torch, x)
            x = dequantise(self.x, self.x_scale)
        else:
            self.x = x.to(torch.bfloat16)
            x = self.x.float()
        slots, columns, hidden = self.num_slots, layer.intermediate, layer.hidden
        dtype = torch.float8_e4m3fn if layer.fp8 else torch.bfloat16
        self.h = torch.empty(slots, columns, device="cuda", dtype=dtype)
        self.h_scale = torch.empty(slots, columns // 128, device="cuda") if layer.fp8 else None
        self.slots = torch.empty(slots, hidden, device="cuda", dtype=torch.bfloat16)
        flat = topk_ids.reshape(-1)
        self.live = ~torch.isin(flat, torch.tensor(remote, device="cuda", dtype=flat.dtype)) if remote else flat >= 0
        if not reference:
            return
        self.h_ref = torch.zeros(slots, columns, device="cuda")
        self.y_ref = torch.zeros(slots, hidden, device="cuda")
        used = [expert for expert in flat.unique().tolist() if expert not in remote]
        for expert in used:
            at = (flat == expert).nonzero().flatten()
            both = x[at // self.top_k] @ layer.float_of("w13", expert).T
            self.h_ref[at] = torch.nn.functional.silu(both[:, :columns]) * both[:, columns:]
        if layer.fp8:
            self.h_q, self.h_q_scale = quantise(torch, self.h_ref)
            self.h_ref = dequantise(self.h_q, self.h_q_scale)
        else:
            self.h_q, self.h_q_scale = self.h_ref.to(torch.bfloat16), None
            self.h_ref = self.h_q.float()
        for expert in used:
            at = (flat == expert).nonzero().flatten()
            self.y_ref[at] = (self.h_ref[at] @ layer.float_of("w2", expert).T) * self.topk_weights[at, None]

    def poison(self) -> None:
        """NaN in everything that a kernel writes."""
        for tensor in (self.h, self.h_scale, self.slots):
            if tensor is not None:
                tensor.view(self.layer.torch.uint8).fill_(0x7F if tensor.element_size() == 1 else 0xFF)

    def up(self, kernel, group_m: int = 1, max_ctas: int = 1 << 30) -> None:
        layer, (ids, experts, padded, blocks) = self.layer, self.routing
        x = (self.x, self.x_scale, layer.w13, layer.w13_scale) if layer.fp8 else (self.x, layer.w13)
        h = (self.h, self.h_scale) if layer.fp8 else (self.h,)
        kernel(*x, ids, experts, padded, *h, self.top_k, group_m, blocks, max_ctas)

    def down(self, kernel, group_m: int = 1, max_ctas: int = 1 << 30, h=None, h_scale=None) -> None:
        layer, (ids, experts, padded, blocks) = self.layer, self.routing
        h, h_scale = (self.h, self.h_scale) if h is None else (h, h_scale)
        x = (h, h_scale, layer.w2, layer.w2_scale) if layer.fp8 else (h, layer.w2)
        kernel(*x, ids, experts, padded, self.topk_weights, self.slots, self.top_k, group_m, blocks, max_ctas)


def errors(got, want) -> tuple[float, float]:
    """(relative error over all values, that of the worst row); infinite where something is not finite."""
    if not got.numel():
        return 0.0, 0.0
    if not got.isfinite().all():
        return float("inf"), float("inf")
    apart, norm = (got - want).norm(dim=1), want.norm(dim=1)
    return (apart.norm() / norm.norm()).item(), (apart / norm.clamp_min(1e-20)).max().item()


def where_off(got, want) -> str:
    """Which rows and columns are off, for the reader who has to find out why."""
    off = ~((got - want).abs() <= 0.1 * want.abs().mean().clamp_min(1e-20) + 0.1 * want.abs())
    rows, columns = off.any(1).nonzero().flatten().tolist(), off.any(0).nonzero().flatten().tolist()
    lost = (~got.isfinite()).float().mean().item()
    return (
        f"{off.float().mean().item():.3f} of values off, {lost:.3f} not finite; {len(rows)} of {got.shape[0]} rows {rows[:6]}, "
        f"{len(columns)} of {got.shape[1]} columns {columns[:12]}"
    )


def untouched(torch, tensor, dead) -> bool:
    """Whether the rows `dead` are still poison, all bytes."""
    poison = 0x7F if tensor.element_size() == 1 else 0xFF
    return bool((tensor[dead].contiguous().view(torch.uint8) == poison).all())


def check_batch(batch: Batch, up, down, orders) -> dict[str, tuple[float, float, str]]:
    """The errors of up, down and both; raises AssertionError where something else is wrong."""
    torch, live, fp8 = batch.layer.torch, batch.live, batch.layer.fp8
    found: dict[str, tuple[float, float, str]] = {}

    def compare(what: str, got, want) -> None:
        overall, row = errors(got, want)
        limit, row_limit = H_LIMITS if fp8 and what == "up" else (LIMIT, ROW_LIMIT)
        bad = not (overall <= limit and row <= row_limit)
        found[what] = (overall, row, where_off(got, want) if bad else "")

    first = None
    for group_m, max_ctas in orders:
        batch.poison()
        batch.up(up, group_m, max_ctas)
        torch.cuda.synchronize()
        bits = (batch.h.view(torch.uint8).clone(), None if batch.h_scale is None else batch.h_scale.clone())
        assert untouched(torch, batch.h, ~live), f"up wrote rows of remote slots, group_m={group_m} max_ctas={max_ctas}"
        if first is None:
            first = bits
            h = dequantise(batch.h, batch.h_scale) if fp8 else batch.h.float()
            compare("up", h[live], batch.h_ref[live])
            if fp8:
                compare("h_scale", batch.h_scale[live], batch.h_q_scale[live])
        assert torch.equal(first[0], bits[0]), f"up: other bits with group_m={group_m} max_ctas={max_ctas}"
        assert not fp8 or torch.equal(first[1][live], bits[1][live]), f"up: other scales with {group_m=} {max_ctas=}"
    first = None
    for group_m, max_ctas in orders:
        batch.poison()
        batch.down(down, group_m, max_ctas, batch.h_q, batch.h_q_scale)
        torch.cuda.synchronize()
        bits = batch.slots.view(torch.int16).clone()
        assert untouched(torch, batch.slots, ~live), f"down wrote rows of remote slots, {group_m=} {max_ctas=}"
        if first is None:
            first = bits
            compare("down", batch.slots[live].float(), batch.y_ref[live])
        assert torch.equal(first, bits), f"down: other bits with group_m={group_m} max_ctas={max_ctas}"
    first = None
    for repeat in range(3):  # Back to back, so that the second launch starts before the first has ended.
        batch.poison()
        batch.up(up)
        batch.down(down)
        torch.cuda.synchronize()
        bits = batch.slots.view(torch.int16).clone()
        if first is None:
            first = bits
            shape = (batch.num_tokens, batch.top_k, batch.layer.hidden)
            got, want = (
                y.masked_fill(~live[:, None], 0).view(shape).sum(1) for y in (batch.slots.float(), batch.y_ref)
            )
            keep = live.view(shape[:2]).any(1)
            compare("layer", got[keep], want[keep])
        assert torch.equal(first, bits), f"layer: other bits in repetition {repeat}"
    return found


class Cases:
    """Batches for a dtype and a block size; layers are made once."""

    def __init__(self, torch, dtype: str) -> None:
        self.torch = torch
        small = {
            "main": (8, 2, 512, 384),
            "wide": (16, 4, 768, 256),
            "many": (512, 16, 512, 256),
            "tall": (8, 2, 256, 1024),
        }
        self.layers = {name: Layer(torch, dtype, shape, seed) for seed, (name, shape) in enumerate(small.items())}
        # More than 2^31 weights: 134 x 2 x 2048 x 4096. Its last experts lie past 2^31.
        self.huge = Layer(torch, dtype, (134, 2, 4096, 2048), 9)
        assert self.huge.w13.numel() > 1 << 31
        self.made: dict = {}

    def random_ids(self, layer: Layer, tokens: int, top_k: int, experts: int | None = None):
        scores = self.torch.rand(tokens, experts or layer.num_experts, device="cuda", generator=layer.rng)
        return scores.topk(top_k, 1).indices.int()

    def batches(self, block_m: int):
        """(name, batch) of every case, kept for the next config of the same block size."""
        if block_m not in self.made:
            self.made.clear()
            self.made[block_m] = list(self.make(block_m))
        return self.made[block_m]

    def make(self, block_m: int):
        torch, layers = self.torch, self.layers
        counts = [0, 1, block_m - 1, block_m, block_m + 1, 2 * block_m + 3, 0, 5]
        ids = torch.repeat_interleave(torch.arange(8, device="cuda"), torch.tensor(counts, device="cuda")).int()
        ids = ids[torch.randperm(ids.numel(), device="cuda", generator=layers["main"].rng)]
        yield "block edges, top-1", Batch(layers["main"], ids[:, None].contiguous(), block_m)
        yield (
            "top-2, remote 1 3 6",
            Batch(layers["main"], self.random_ids(layers["main"], 3 * block_m + 1, 2), block_m, (1, 3, 6)),
        )
        yield "all remote", Batch(layers["main"], self.random_ids(layers["main"], 5, 2), block_m, tuple(range(8)))
        yield "top-4", Batch(layers["wide"], self.random_ids(layers["wide"], 97, 4), block_m)
        hot = torch.zeros(200, 1, device="cuda", dtype=torch.int32) + 5
        rest = 6 + self.random_ids(layers["wide"], 200, 2, 10)
        yield "hot expert", Batch(layers["wide"], torch.cat([hot, rest], 1).contiguous(), block_m)
        yield "512 experts, top-16", Batch(layers["many"], self.random_ids(layers["many"], 9, 16), block_m)
        yield "1 token", Batch(layers["many"], self.random_ids(layers["many"], 1, 8), block_m)
        yield "I > H", Batch(layers["tall"], self.random_ids(layers["tall"], 33, 2), block_m)
        last = 134 - 1 - self.random_ids(self.huge, 7, 2, 6)
        yield "2^31 weights", Batch(self.huge, last.int().contiguous(), block_m)


def check_empty(batch: Batch, up, down) -> None:
    """With no blocks nothing may be written."""
    torch = batch.layer.torch
    ids, experts, padded, blocks = batch.routing
    batch.routing = ids, torch.full_like(experts, 99_999_999), torch.zeros_like(padded), blocks
    batch.poison()
    batch.up(up)
    batch.down(down)
    torch.cuda.synchronize()
    everything = torch.ones(batch.num_slots, device="cuda", dtype=torch.bool)
    assert untouched(torch, batch.h, everything) and untouched(torch, batch.slots, everything), (
        "something was written without blocks"
    )
    batch.routing = ids, experts, padded, blocks


def check_config(cases: Cases, name: str, up, down, block_m: int, say) -> dict:
    worst: dict[str, float] = {}
    failures = []
    for case, batch in cases.batches(block_m):
        say({"alive": f"{name}: {case}"})
        try:
            found = check_batch(batch, up, down, ((1, 1 << 30), (8, 7), (3, 132)))
            for what, (overall, row, where) in found.items():
                worst[what] = max(worst.get(what, 0.0), overall)
                if where:
                    failures.append(f"{case}: {what} off by {overall:.2g}, worst row {row:.2g}: {where}")
        except AssertionError as error:
            failures.append(f"{case}: {error}")
        except (RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{case}: {type(error).__name__} {str(error)[:300]}")
            if "CUDA" in str(error) or "cuda" in str(error):
                return {"config": name, "failures": failures, "worst": worst, "fatal": True}
    try:
        check_empty(cases.batches(block_m)[3][1], up, down)
    except AssertionError as error:
        failures.append(f"no blocks: {error}")
    return {"config": name, "failures": failures, "worst": worst}


def copy_bandwidth(torch) -> float:
    """TB/s of reading and writing in a 2 GB copy."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    b.copy_(a)
    start, end = torch.cuda.Event(True), torch.cuda.Event(True)
    best = 1e9
    for _ in range(5):
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return 2 * a.numel() / best / 1e9


def graph_us(torch, launches, repeats: int = 7) -> float:
    """Median us of a captured list of launches, one replay each time."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    start, end = torch.cuda.Event(True), torch.cuda.Event(True)
    graph.replay()
    times = []
    for _ in range(repeats):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


ROTATIONS = 6
MANY_TOKENS = 2048
SHOWN = 10


def time_configs(torch, functions, configs, shapes, all_tokens, say) -> None:
    """Times up + down of every config at every shape and token count, each time over other experts' weights."""
    say({"copy_tb_s": copy_bandwidth(torch)})
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for dtype in ("fp8", "bf16"):
        wanted = [name for name in configs if name.startswith(dtype)]
        for shape_name in shapes if wanted else ():
            shape = SHAPES[shape_name]
            if dtype == "bf16" and shape_name == "deepseek-v3-tp8":
                continue
            layer = Layer(torch, dtype, shape)
            num_experts, top_k, hidden, intermediate = shape
            for tokens in all_tokens:
                # Few tokens leave L2 room for the same experts' weights the next time: other routings in turn.
                ids = [
                    torch.rand(tokens, num_experts, device="cuda", generator=layer.rng).topk(top_k, 1).indices.int()
                    for _ in range(ROTATIONS if tokens <= 64 else 2)
                ]
                active = sum(one.unique().numel() for one in ids) / len(ids)
                bytes_read = active * 3 * hidden * intermediate * layer.w13.element_size()
                made: dict = {}
                for name in wanted:
                    _, _, block_m, rows = parse("up_" + name)
                    if hidden % rows or 2 * intermediate % rows or tokens * top_k / num_experts > 12 * block_m:
                        continue
                    if block_m not in made:
                        made = {block_m: [Batch(layer, one, block_m, reference=False) for one in ids]}
                    batches, result = made[block_m], {}
                    up, down = functions["up_" + name], functions["down_" + name]
                    modes = [("each", 1 << 30, 1), ("persistent", multiprocessors, 1)]
                    if tokens >= MANY_TOKENS:
                        modes.append(("group8", multiprocessors, 8))
                    for mode, ctas, group_m in modes:
                        for part in ("up", "down", "both"):
                            # Parts alone as they would run: one a tile where that is fast enough, persistent for many.
                            if part != "both" and mode != ("each" if tokens < MANY_TOKENS else "persistent"):
                                continue
                            launches = []
                            for batch in batches:
                                if part != "down":
                                    launches.append(partial(batch.up, up, group_m, ctas))
                                if part != "up":
                                    launches.append(partial(batch.down, down, group_m, ctas))
                            result[f"{part}_{mode}"] = graph_us(torch, launches) / len(batches)
                    best = min(us for part, us in result.items() if part.startswith("both"))
                    say(
                        {
                            "timed": name,
                            "shape": shape_name,
                            "tokens": tokens,
                            "us": result,
                            "best_us": best,
                            "tb_s": bytes_read / best / 1e6,
                            "tflop_s": 6 * tokens * top_k * hidden * intermediate / best / 1e6,
                        }
                    )
            del layer, made
            torch.cuda.empty_cache()


def child(library: str, configs: list[str], mode: str, shapes: list[str], tokens: list[int]) -> None:
    """Works through configs and prints one JSON object a line."""
    import torch
    import tvm_ffi

    def say(what: dict) -> None:
        print(json.dumps(what), flush=True)

    torch.backends.cuda.matmul.allow_tf32 = False
    module = tvm_ffi.load_module(library)
    functions = {role + name: module.get_function(role + name) for name in configs for role in ("up_", "down_")}
    say({"alive": "loaded"})
    if mode == "time":
        time_configs(torch, functions, configs, shapes, tokens, say)
        return

    def check(cases, name, block_m):
        return check_config(cases, name, functions["up_" + name], functions["down_" + name], block_m, say)

    check_in_turn(torch, Cases, configs, check, say)


def check_in_turn(torch, cases_of, configs: list[str], check, say) -> None:
    """Says what `check(cases, config, block_m)` finds, config by config; the cases of one dtype at a time fit the GPU."""
    cases: dict = {}
    for name in configs:
        _, dtype, block_m, _ = parse("up_" + name)
        if dtype not in cases:
            cases.clear()
            torch.cuda.empty_cache()
            cases[dtype] = cases_of(torch, dtype)
        result = check(cases[dtype], name, block_m)
        say(result)
        if result.get("fatal"):
            return  # the CUDA context is gone; the parent starts another child


# ---- the parent: watches


def watch(library: Path, configs: list[str], mode: str, patience: float, more: tuple[str, ...] = ()):
    """Yields what a child says; ends with {"silent": last sign of life} where it had to be killed."""
    command = [sys.executable, __file__, str(library), "--child", mode, "--configs", ",".join(configs), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    errors_of: list[str] = []
    assert process.stdout and process.stderr
    threading.Thread(target=lambda: errors_of.extend(process.stderr), daemon=True).start()
    last, spoke = "start", [time.monotonic() + 60]  # torch and its context take a while
    killed = threading.Event()

    def guard() -> None:
        while process.poll() is None:
            if time.monotonic() - spoke[0] > patience:
                killed.set()
                process.kill()
                return
            time.sleep(0.2)

    threading.Thread(target=guard, daemon=True).start()
    for line in process.stdout:
        spoke[0] = time.monotonic()
        if not line.startswith("{"):
            continue
        said = json.loads(line)
        last = said.get("alive", last)
        yield said
    process.wait()
    if killed.is_set():
        yield {"silent": last}
    elif process.returncode:
        yield {"died": last, "stderr": "".join(errors_of)[-1500:]}


def check_all(library: Path, configs: list[str], patience: float) -> list[dict]:
    """Results of all configs; a child that hangs or dies costs the config it was at."""
    results, left = [], list(configs)
    while left:
        before = len(left)
        for said in watch(library, left, "check", patience):
            if "config" in said:
                results.append(said)
                left.remove(said["config"])
                for failure in said["failures"]:
                    print(f"FAILED {said['config']}: {failure}", flush=True)
            elif "silent" in said or "died" in said:
                what = (
                    f"hung at {said['silent']}"
                    if "silent" in said
                    else f"child died at {said['died']}: {said['stderr']}"
                )
                print(f"FAILED {left[0]}: {what}", flush=True)
                results.append({"config": left.pop(0), "failures": [what], "worst": {}})
        if len(left) == before:
            print(f"FAILED {left[0]}: no result", flush=True)
            results.append({"config": left.pop(0), "failures": ["no result"], "worst": {}})
    return results


def time_all(library: Path, configs: list[str], patience: float, shapes: list[str], tokens: list[int]) -> list[dict]:
    copied, rows = 0.0, []
    more = ("--timing-shapes", *shapes, "--timing-tokens", *map(str, tokens))
    for said in watch(library, configs, "time", patience, more):
        copied = said.get("copy_tb_s", copied)
        if "timed" in said:
            rows.append(said)
        elif "silent" in said or "died" in said:
            print("FAILED while timing:", said, flush=True)
    print(f"\ncopy bandwidth {copied:.2f} TB/s; TB/s below are over the weights of active experts, up + down only")
    cells = sorted({(row["timed"].split("_")[0], row["shape"], row["tokens"]) for row in rows})
    for dtype, shape, tokens in cells:
        here = [
            row for row in rows if (row["timed"].split("_")[0], row["shape"], row["tokens"]) == (dtype, shape, tokens)
        ]
        here.sort(key=lambda row: -row["tb_s"])
        print(f"\n{dtype} {shape} {tokens} tokens")
        for row in here[:SHOWN]:
            us = row["us"]
            print(
                f"  {row['timed']:24s} {row['best_us']:8.1f} us {row['tb_s']:5.2f} TB/s "
                f"{100 * row['tb_s'] / max(copied, 1e-9):4.0f} % {row['tflop_s']:5.0f} TFLOP/s   "
                + ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in us.items())
            )
    return [{"copy_tb_s": copied}, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--only", default="", help="regular expression on names such as fp8_m16_n64_w4_s4")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds of silence after which a child is killed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timing-tokens", type=int, nargs="+", default=TOKENS, help="token counts to time")
    parser.add_argument("--timing-shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="layers to time")
    parser.add_argument("--child", choices=("check", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--configs", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(str(args.library), args.configs.split(","), args.child, args.timing_shapes, args.timing_tokens)
        return
    found = symbols(args.library)
    names = [name.removeprefix("up_") for name in found if name.startswith("up_")]
    # Configs of one block size after another: they share batches.
    names = [name for name in names if f"down_{name}" in found and re.search(args.only, name)]
    names.sort(key=lambda name: (parse("up_" + name)[1], parse("up_" + name)[2], name))
    print(f"{len(found)} kernels in {args.library}, {len(names)} configs to look at", flush=True)
    began, results = time.monotonic(), []
    if not args.time_only:
        results = check_all(args.library, names, args.patience)
        print(f"\n{'config':26s} {'up':>9s} {'h_scale':>9s} {'down':>9s} {'layer':>9s}")
        for result in results:
            worst = [
                f"{result['worst'][key]:9.2g}" if key in result["worst"] else " " * 9
                for key in ("up", "h_scale", "down", "layer")
            ]
            print(f"{result['config']:26s} {' '.join(worst)}  {'FAILED' if result['failures'] else 'ok'}")
        good = [result["config"] for result in results if not result["failures"]]
        print(f"{len(good)} of {len(results)} configs right, {time.monotonic() - began:.0f} s", flush=True)
        names = good
    timed = (
        time_all(args.library, names, args.patience, args.timing_shapes, args.timing_tokens)
        if names and not args.no_time
        else []
    )
    print(f"{time.monotonic() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps({"checked": results, "timed": timed}))
    sys.exit(any(result["failures"] for result in results))


if __name__ == "__main__":
    main()
