"""Whole layers of many tokens, and their parts. Part of `ep_bulk.py`."""

import argparse
import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ep_layer import MOST_ERROR
from ep_ranks import Gathered, in_time, slowest
from ep_shard import candidates, served, unique

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.mover import groups
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.protocol import format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.common.reference import random_weights

Row = dict[str, Any]
SHAPES = {
    "qwen3-30b": (32, 8, 2048, 768),
    "deepseek-v3 shard": (32, 8, 7168, 2048),
    "deepseek-v3 few": (8, 8, 7168, 2048),
}
"""Experts of a rank (of four; on two of them twice as many), top-k, H, I. DeepSeek-V3 has 256 experts, 64 on each of four: with 32 and
with 8 a token computes and travels as much, and each expert gets two and eight times as many."""
STEPS = 5
SLEEP = 70_000_000
"Cycles, about 40 ms: longer than the host takes to launch so many steps by source; a twentieth of it for graphs."


WAYS = {"launch": False, "source": True}
"Of a layer, and whether it goes by source."
MODES = ("graph", "eager")
FIELDS = ("hidden_states", "hidden_scale", "topk_ids", "topk_weights")
MOST_RACED, WIDE, RACED = 24, 88, 6
"Candidates of `Served.race`, the least block_m of those that are timed, and how often each runs."
CHECKED = 64
"Tokens of each rank that are compared with float64."


Stages = Sequence[Callable[[], Any]]


def timed(
    group: dist.ProcessGroup, ways: dict[str, Stages], rounds: int, on_gpu: bool, sleep: int = SLEEP
) -> dict[str, Row]:
    """Of each way the microseconds of its stages, of a whole step, its spread, and the host's."""
    samples: dict[str, list[list[float]]] = {name: [] for name in ways}
    host: dict[str, list[float]] = {name: [] for name in ways}
    warm = int(on_gpu)  # a round that is not counted
    steps = STEPS if on_gpu else 3
    for number in range(rounds + warm):
        for name, stages in ways.items():
            dist.barrier(group)
            marks: list[Any] = []

            def mark(marks: list[Any] = marks) -> None:
                if on_gpu:
                    marks.append(torch.cuda.Event(enable_timing=True))
                    marks[-1].record()
                else:
                    marks.append(time.perf_counter())

            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda._sleep(sleep)
            begun = time.perf_counter()
            mark()
            for _ in range(steps):
                for stage in stages:
                    stage()
                    mark()
            host[name].append((time.perf_counter() - begun) * 1e6 / steps)
            if on_gpu:
                torch.cuda.synchronize()
            pairs = itertools.pairwise(marks)
            us = [a.elapsed_time(b) * 1e3 if on_gpu else (b - a) * 1e6 for a, b in pairs]
            every = [us[at : at + len(stages)] for at in range(0, len(us), len(stages))]
            samples[name] += every[1:] if number >= warm else []
    found: dict[str, Row] = {}
    for name, its in samples.items():
        totals = [sum(one) for one in its]
        low, median, high = statistics.quantiles(totals, n=4)
        row = {"us": median, "spread": (high - low) / median, "host_us": statistics.median(host[name])}
        row |= {f"stage_{at}_us": statistics.median(column) for at, column in enumerate(zip(*its, strict=True))}
        found[name] = slowest(group, row)
    return found


def batch(ep: ExpertParallel, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights of this rank, uniform routing."""
    shape, device = ep.shape, ep.device
    generator = torch.Generator(device).manual_seed(ep.rank)
    scores = torch.rand(tokens, shape.num_experts, generator=generator, device=device)
    ids = scores.topk(shape.top_k, 1).indices.int()
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator, device=device).bfloat16()
    weights = torch.rand(tokens, shape.top_k, generator=generator, device=device).softmax(1)
    return hidden, ids, weights


def layers(group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float) -> Iterator[Row]:
    """A row for each number of tokens, layer, dtype and mode; the same on every rank."""
    ranks, on_gpu = dist.get_world_size(group), its.device == "cuda"
    kernel_name = its.kernel or (served() if on_gpu else TritonFusedMoE.name)
    options: Row = {"backend": "symmetric" if on_gpu else "collectives", "by_source": True, "by_source_tokens": 0}

    with contextlib.ExitStack() as opened:

        @functools.cache
        def made(name: str, dtype: str) -> tuple[ExpertParallel, Any, Row]:
            local, *sizes = SHAPES[name]
            shape = MoEShape(local * max(4, ranks), *sizes, dtype=dtype)
            ep = opened.enter_context(ExpertParallel(group, shape, max(its.tokens), device=device, **options))
            kernel: Any = make_kernel(kernel_name, ep.shape)
            weights: Row = random_weights(ep.shape, device, seed=ep.rank)
            return ep, kernel, weights | {"workspace": kernel.workspace(ranks * max(its.tokens), device)}

        for tokens, name, dtype in itertools.product(its.tokens, its.layers, its.dtype):
            if not in_time(group, until):
                return
            row = {"ranks": ranks, "layer": name, "dtype": dtype, "kernel": kernel_name, "tokens": tokens}
            for found in layer(group, *made(name, dtype), tokens, its.rounds, its.modes, its.race):
                yield row | found


class Served:
    """Called as a dispatcher is: a kernel with the config for the tokens that come, its default unless another is set.

    Args:
        kernel: with ``launch`` and ``default_config``, as our kernels have them.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.configs: dict[int, Any] = {}

    def __call__(self, **operands: Any) -> torch.Tensor:
        rows = len(operands["topk_ids"])
        if rows not in self.configs:
            self.configs[rows] = self.kernel.default_config(rows)
        found: torch.Tensor = self.kernel.launch(self.configs[rows], **operands)
        return found

    def race(self, group: dist.ProcessGroup, operands: Row, sizes: Sequence[int], on_gpu: bool) -> Row:
        """Sets for each number of rows the fastest config of `candidates` with wide tiles; rank 0 times them and all take its word.

        Returns:
            Microseconds of each config, by the number of rows.
        """
        found: Row = {}
        shape = self.kernel.shape
        for rows in sizes:
            some = unique([self.kernel.default_config(rows), *candidates(self.kernel, shape, MOST_RACED)])
            some = [config for place, config in enumerate(some) if not place or config["block_m"] >= WIDE]
            its = {name: x[:rows] if name in FIELDS else x for name, x in operands.items()}
            us = []
            for config in some:
                call = functools.partial(self.kernel.launch, config, **its)
                call()
                again = captured(call) if on_gpu else call
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
                begun = time.perf_counter()
                for number in range(1 + RACED):
                    if number == 1 and on_gpu:
                        marks[0].record()
                    again()
                if on_gpu:
                    marks[1].record()
                    torch.cuda.synchronize()
                spent = marks[0].elapsed_time(marks[1]) * 1e3 if on_gpu else (time.perf_counter() - begun) * 1e6
                us.append(spent / RACED)
            said: list[Any] = [some[us.index(min(us))]]
            dist.broadcast_object_list(said, src=0, group=group)
            self.configs[rows] = said[0]
            found[str(rows)] = {format_config(config): its for config, its in zip(some, us, strict=True)}
        return found


class Layer:
    """The ways of one layer with one batch, and what they wrote.

    Args:
        kernel: with ``launch``, ``default_config`` and ``reference``, as our kernels have them.
        weights: of the experts of this rank, and what else the kernel takes.
        tokens: of each rank.
    """

    def __init__(self, group: dist.ProcessGroup, ep: ExpertParallel, kernel: Any, weights: Row, tokens: int) -> None:
        self.group, self.ep, self.run, self.weights, self.tokens = group, ep, Served(kernel), weights, tokens
        self.batch = hidden, ids, scores = batch(ep, tokens)
        self.quantised = []
        if ep.layout.payload == "fp8":
            scales = torch.empty(tokens, hidden.shape[1] // 128, device=ep.device)
            self.quantised = [torch.empty_like(hidden, dtype=FP8), scales]
        self.rival = Gathered(group, [*(self.quantised or [hidden]), ids, scores])
        names = ["hidden_states", *(["hidden_scale"] if self.quantised else []), "topk_ids", "topk_weights"]
        self.gathered = dict(zip(names, self.rival.all, strict=True))
        self.given = weights | {"expert_map": ep.owners.expert_map}
        self.outs = {name: torch.zeros_like(hidden) for name in (*WAYS, "nccl")}
        self.room, self.y = torch.empty_like(hidden), hidden.new_zeros(ep.num_ranks * tokens, hidden.shape[1])

    def ours(self, by_source: bool, run: Callable[..., Any], out: torch.Tensor) -> None:
        self.ep.by_source = by_source
        self.ep.layer(run, *self.batch, tokens_per_rank=[self.tokens] * self.ep.num_ranks, out=out, **self.weights)

    def gather(self) -> None:
        if self.quantised:
            from rampwrap.kernels.triton.quantise import quantise_rows

            quantise_rows(self.batch[0], *self.quantised)
        self.rival.gather()

    def theirs(self) -> None:
        self.gather()
        self.rival.scatter(self.run(**self.gathered, **self.given), self.outs["nccl"])

    def moved_by_nccl(self) -> None:
        self.gather()
        self.rival.scatter(self.y, self.room)

    def nothing(
        self, *, topk_ids: torch.Tensor, hidden_scale: Any = None, out: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """In place of a kernel; it takes scales, so that no rows are copied for it. Sums of a single source are copied: nobody stores them."""
        return self.y[: len(topk_ids)] if out is None else out

    def pieces(self) -> None:
        at = 0
        for sources in groups(self.ep.rank, self.ep.num_ranks):
            after = at + len(sources) * self.tokens
            self.run(**{name: tensor[at:after] for name, tensor in self.gathered.items()}, **self.given)
            at = after

    @property
    def ways(self) -> dict[str, Callable[[], Any]]:
        """Whole layers; the kernel alone, on all rows that NCCL gathered and piece by piece; what moves, alone."""
        call = functools.partial
        return (
            {name: call(self.ours, way, self.run, self.outs[name]) for name, way in WAYS.items()}
            | {"nccl": self.theirs, "alone": call(self.run, **self.gathered, **self.given), "pieces": self.pieces}
            | {f"{name}_moves": call(self.ours, way, self.nothing, self.room) for name, way in WAYS.items()}
            | {"nccl_moves": self.moved_by_nccl}
        )

    def errors(self) -> dict[str, float]:
        """How far each whole way is from float64 on the first tokens of each rank, on the worst rank."""
        ep, few = self.ep, min(CHECKED, self.tokens)
        some = Gathered(self.group, [its[:few].contiguous() for its in self.batch])
        some.gather()
        given = self.given | dict(zip(("hidden_states", "topk_ids", "topk_weights"), some.all, strict=True))
        total = self.run.kernel.reference(ep.shape, given)
        dist.all_reduce(total, group=self.group)
        return self.apart(total[ep.rank * few : (ep.rank + 1) * few], few)

    def apart(self, wanted: torch.Tensor, few: int) -> dict[str, float]:
        """How far outputs are from others, of the norm, on the worst rank; infinity where one is no number."""
        norm = wanted.double().norm().clamp(min=1e-30)
        found = {name: float((its[:few].double() - wanted.double()).norm() / norm) for name, its in self.outs.items()}
        return slowest(self.group, {name: off if off == off else math.inf for name, off in found.items()})


def layer(
    group: dist.ProcessGroup,
    ep: ExpertParallel,
    kernel: Any,
    weights: Row,
    tokens: int,
    rounds: int,
    modes: Sequence[str] = ("eager",),
    race: bool = False,
) -> Iterator[Row]:
    """Times of the ways of `Layer` that are right, for each mode, and how far off they are."""
    its, raced = Layer(group, ep, kernel, weights, tokens), {}
    if race:
        its.gather()
        sizes = [pieces * tokens for pieces in range(1, ep.num_ranks + 1)]
        raced = its.run.race(group, its.gathered | its.given, sizes, ep.device.type == "cuda")
    ways, most = its.ways, MOST_ERROR[ep.shape.dtype]
    for way in ways.values():  # compiles; what takes parts reads what the rival gathered
        way()
    ep.check()
    errors = its.errors()
    wrong = [name for name, off in errors.items() if not off < most]
    ways = {name: way for name, way in ways.items() if name not in wrong}
    for mode in modes:
        calls = ways
        if mode == "graph":
            dist.barrier(group)
            calls = {name: captured(way) for name, way in ways.items()}
            ep.check()
        stages: dict[str, Stages] = {name: [call] for name, call in calls.items()}
        found: Row = timed(group, stages, rounds, ep.device.type == "cuda", SLEEP // 20 if mode == "graph" else SLEEP)
        ep.check()
        after = {} if "nccl" in wrong else its.apart(its.outs["nccl"], tokens)
        worst = {name: max(off, after.get(name, 0.0)) for name, off in errors.items()}
        configs = {str(rows): format_config(config) for rows, config in sorted(its.run.configs.items())}
        yield (
            {"mode": mode, "configs": configs, "raced": raced}
            | found
            | {"errors": worst, "wrong": [name for name in worst if not worst[name] < most]}
        )


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that ran before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


LAYER_HEADER = (
    "whole layers, us, spread; NCCL over ours; the kernel alone, on all rows and piece by piece; what moves, alone; how much of what moves by\n"
    "source is hidden, and NCCL over ours if all were; us of the host to launch a step\n"
    "layer             dtype tokens mode  | one launch by source       NCCL       | launch source | alone pieces |"
    " moves: launch source  NCCL | hidden at most | host: launch source  NCCL | error"
)


def layer_line(row: Row) -> str:
    """A row of `layers` under `LAYER_HEADER`."""

    def of(name: str, key: str = "us") -> float:
        return float(row.get(name, {}).get(key, math.nan))

    parts = [f"{row['layer']:18s}{row['dtype']:5s}{row['tokens']:7d} {row['mode']:6s}|"]
    parts += [f"{of(name):7.0f}{of(name, 'spread'):4.0%}" for name in (*WAYS, "nccl")]
    parts.append("    |" + "".join(f"{of('nccl') / of(name):6.2f}x" for name in WAYS))
    parts.append(f" |{of('alone'):6.0f}{of('pieces'):7.0f} |")
    parts += [f"{of(f'{name}_moves'):{width}.0f}" for name, width in zip((*WAYS, "nccl"), (14, 7, 6), strict=True)]
    hidden = 1 - (of("source") - of("pieces")) / of("source_moves")
    parts.append(f" |{hidden:7.0%}{of('nccl') / of('pieces'):7.2f}x |")
    parts += [f"{of(name, 'host_us'):{width}.0f}" for name, width in zip((*WAYS, "nccl"), (13, 7, 6), strict=True)]
    return "".join(parts) + f" |{max(row['errors'].values()):7.4f}"
