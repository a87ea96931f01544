"""Whole decode layers over several GPUs: ours as it serves without a plan, against all-gather, experts and reduce-scatter.

Part of `ep.py`. Three sides, replayed in turn:

ours        dispatch, the CuTe kernels with their default for a rank with some of the experts, combine; FP8 rows are quantised on the way
same        NCCL, and between its calls the same kernels with one static config, which quantise the rows themselves
triton      NCCL, and our Triton kernel with one static config; FP8 rows are quantised before, in a launch of its own

A static config is the one that is fastest under uniform routing at that many tokens: of a dozen (`ep_shard.candidates`), or of the Triton
kernel's defaults for a quarter, all and four times of them. Where the CuTe kernels are not compiled, our Triton kernel is on all sides.
From step to step of a graph ids turn among the experts of each rank, so that no weights are found in L2. Before anything is timed, each
side is compared with float64; one that is too far off is named and not timed.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from ep_ranks import WARM, Gathered, Timed, in_time, in_turn, slowest
from ep_shard import CUTE, candidates, served, unique

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.ep.group import ExpertParallel
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.common.reference import random_weights
from rampwrap.kernels.triton.quantise import quantise_rows
from rampwrap.routing.workloads import Routing

OURS, SAME, TRITON = SIDES = ("ours", "same", "triton")
HEADER = "layer dtype routing       tokens | ours us spread | NCCL, same kernel | NCCL, Triton | errors               | ours, static"
MOST_ERROR = {"bf16": 1e-2, "fp8": 2e-2}
"Of the norm of the output in float64; a sum of each rank is rounded to bf16 on its way."
TURNS = 4
"Ids of a graph's steps: so many times the experts of a batch lie between two readings of the same weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer-tokens", type=int, nargs="*", default=[8, 32, 128], help="a rank, of whole layers")
    parser.add_argument("--layer-shape", type=int, nargs=4, default=[128, 8, 2048, 768], help="E top_k H I; Qwen3-30B")
    parser.add_argument("--layer-dtype", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--layer-kernel", help=f"of ours and the first of NCCL: {CUTE} where it is compiled")
    parser.add_argument("--routing", nargs="+", default=["uniform", "dirichlet:0.1"])


def layers(
    group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float
) -> Iterator[dict[str, Any]]:
    """A row for each dtype, number of tokens and routing, the same on every rank; each dtype has its share of the time."""
    backend = "symmetric" if its.device == "cuda" else "collectives"
    name = its.layer_kernel or (served() if its.device == "cuda" else TritonFusedMoE.name)
    for left, dtype in zip(range(len(its.layer_dtype), 0, -1), its.layer_dtype, strict=True):
        now, shape, most = time.monotonic(), MoEShape(*its.layer_shape, dtype=dtype), max(its.layer_tokens)
        with ExpertParallel(group, shape, most, backend=backend, device=device) as ep:
            layer = Layer.made(ep, name, most)
            for row in rows(group, its, layer, min(until, now + (until - now) / left)):
                yield {"ranks": ep.num_ranks, "kernel": name, "dtype": dtype} | row


def rows(group: dist.ProcessGroup, its: argparse.Namespace, layer: "Layer", until: float) -> Iterator[dict[str, Any]]:
    """Of one dtype."""
    for tokens in its.layer_tokens:
        if not in_time(group, until):
            return
        even = Batch.drawn(layer.ep, tokens, "uniform")
        chosen = {each.name: fastest(group, layer, each, even) for each in layer.distinct}
        static = {side: chosen[each.name] for side, each in layer.kernels.items()}
        configs = {OURS: layer.default(len(even.every[0]))} | static
        for routing in its.routing:
            if not in_time(group, until):
                return
            named = {"routing": routing, "tokens": tokens}
            named |= {"configs": {side: dict(config) for side, config in configs.items()}}
            yield named | one(group, layer, static, Batch.drawn(layer.ep, tokens, routing), its.replays)


@attrs.frozen(eq=False)
class Layer:
    """The experts of a rank, and who computes them.

    Attributes:
        kernels: of the sides with NCCL.
        serve: what ours runs, without a plan.
        weights: and memory for the most tokens, of all kernels.
    """

    ep: ExpertParallel
    kernels: dict[str, Any]
    serve: GraphDispatcher
    weights: dict[str, Any]

    @classmethod
    def made(cls, ep: ExpertParallel, name: str, most: int) -> "Layer":
        triton, rows = TritonFusedMoE(ep.shape), ep.num_ranks * most
        kernel: Any = triton if name == triton.name else make_kernel(name, ep.shape)
        weights: dict[str, Any] = random_weights(ep.shape, ep.device, seed=ep.rank)
        weights["workspace"] = kernel.workspace(rows, ep.device)
        serve = GraphDispatcher(kernel, max_tokens=rows, where=ep.device)
        return cls(ep, {SAME: kernel, TRITON: triton}, serve, weights)

    @property
    def distinct(self) -> list[Any]:
        """Kernels, each once."""
        return list({its.name: its for its in self.kernels.values()}.values())

    def default(self, rows: int) -> Config:
        return self.serve.prepared(rows).configs[0]


@attrs.frozen(eq=False)
class Batch:
    """The tokens of one rank, and the ids of all in each of several turns."""

    hidden: torch.Tensor
    weights: torch.Tensor
    every: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...]

    @classmethod
    def drawn(cls, ep: ExpertParallel, tokens: int, routing: str) -> "Batch":
        """All ranks draw the same ids, so that the same experts are popular on each."""
        shape, device, here = ep.shape, ep.device, ep.shape.num_local_experts
        rng = np.random.default_rng(tokens)
        drawn = Routing.parse(routing).sample(tokens * ep.num_ranks, shape.num_experts, shape.top_k, rng)
        moved = [drawn // here * here + (drawn + turn * here // TURNS) % here for turn in range(TURNS)]
        every = [torch.from_numpy(ids).int().to(device) for ids in moved]
        generator = torch.Generator().manual_seed(ep.rank)
        hidden = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16().to(device)
        weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(1).to(device)
        own = [ids[ep.rank * tokens : (ep.rank + 1) * tokens].contiguous() for ids in every]
        return cls(hidden, weights, tuple(every), tuple(own))


def fastest(group: dist.ProcessGroup, layer: Layer, kernel: Any, batch: Batch) -> Config:
    """Of some configs of a kernel, on the experts of rank 0; rank 0 times them and all take its word."""
    ep, rows = layer.ep, len(batch.every[0])
    if kernel.name == TritonFusedMoE.name:
        configs = unique([kernel.default_config(max(1, int(rows * factor))) for factor in (0.25, 1, 4)])
    else:
        configs = list(candidates(kernel, ep.shape))
    hidden = torch.randn(rows, ep.shape.hidden_size, device=ep.device).bfloat16()
    given = layer.weights | {"hidden_states": hidden, "expert_map": ep.owners.expert_map}
    given["topk_weights"] = torch.ones(rows, ep.shape.top_k, device=ep.device)
    times = []
    for config in configs:
        run = functools.partial(kernel.launch, config, **given)
        timed = Timed(group, in_turns([functools.partial(run, topk_ids=ids) for ids in batch.every]), hidden.is_cuda)
        times.append(statistics.median(timed.us() for _ in range(WARM if hidden.is_cuda else 1)))
    said: list[Any] = [configs[times.index(min(times))]]
    dist.broadcast_object_list(said, src=0, group=group)
    found: Config = said[0]
    return found


def in_turns(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The next of several at each call."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def sides(
    group: dist.ProcessGroup, layer: Layer, static: dict[str, Config], batch: Batch
) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Of each side a call for each turn; it returns the outputs of this rank's tokens."""
    ep, weights, tokens = layer.ep, layer.weights, len(batch.hidden)
    out = {side: torch.empty_like(batch.hidden) for side in SIDES}
    scales = torch.empty(tokens, ep.shape.hidden_size // 128, device=ep.device)
    quantised = [torch.empty_like(batch.hidden, dtype=FP8), scales] if ep.shape.dtype == "fp8" else []

    def ours(ids: torch.Tensor) -> torch.Tensor:
        counts = [tokens] * ep.num_ranks
        return ep.layer(layer.serve, batch.hidden, ids, batch.weights, tokens_per_rank=counts, out=out[OURS], **weights)

    def theirs(side: str, rival: Gathered, names: Sequence[str]) -> torch.Tensor:
        if "hidden_scale" in names:
            quantise_rows(batch.hidden, *quantised)
        rival.gather()
        given = weights | dict(zip(names, rival.all, strict=True))
        y = layer.kernels[side].launch(static[side], expert_map=ep.owners.expert_map, **given)
        rival.scatter(y, out[side])
        return out[side]

    found: dict[str, list[Callable[[], torch.Tensor]]] = {OURS: [functools.partial(ours, ids) for ids in batch.own]}
    for side, rows in ((SAME, []), (TRITON, quantised)):
        names = ("hidden_states", *(["hidden_scale"] if rows else []), "topk_ids", "topk_weights")
        rivals = [Gathered(group, [*(rows or [batch.hidden]), ids, batch.weights]) for ids in batch.own]
        found[side] = [functools.partial(theirs, side, rival, names) for rival in rivals]
    return found


def errors(
    group: dist.ProcessGroup, layer: Layer, batch: Batch, calls: dict[str, list[Callable[[], torch.Tensor]]]
) -> dict[str, float]:
    """How far the first turn of each side is from its kernel's sum in float64, of the worst rank."""
    ep, found, tokens = layer.ep, {}, len(batch.hidden)
    rival = Gathered(group, [batch.hidden, batch.own[0], batch.weights])
    rival.gather()
    given = dict(zip(("hidden_states", "topk_ids", "topk_weights"), rival.all, strict=True))
    assert torch.equal(given["topk_ids"], batch.every[0])
    expected: dict[str, torch.Tensor] = {}
    for kernel in layer.distinct:
        total = kernel.reference(ep.shape, layer.weights | given | {"expert_map": ep.owners.expert_map})
        dist.all_reduce(total, group=group)
        expected[kernel.name] = total[ep.rank * tokens : (ep.rank + 1) * tokens]
    for side, turns in calls.items():
        want = expected[layer.kernels[TRITON if side == TRITON else SAME].name]
        off = float((turns[0]().double() - want).norm() / want.norm().clamp(min=1e-30))
        found[side] = off if off == off else float("inf")
    ep.check()
    return slowest(group, found)


def one(
    group: dist.ProcessGroup, layer: Layer, static: dict[str, Config], batch: Batch, replays: int
) -> dict[str, Any]:
    """Times of the sides that are right, and how far from float64 each is."""
    calls = sides(group, layer, static, batch)
    error = errors(group, layer, batch, calls)
    wrong = [side for side in calls if error[side] >= MOST_ERROR[layer.ep.shape.dtype]]
    if wrong and not layer.ep.rank:
        print(f"wrong: {wrong}, {error} off at {len(batch.hidden)} tokens", file=sys.stderr, flush=True)
    on_gpu = layer.ep.device.type == "cuda"
    timed = {side: Timed(group, in_turns(turns), on_gpu) for side, turns in calls.items() if side not in wrong}
    found: dict[str, Any] = in_turn(group, timed, replays) if timed else {}
    layer.ep.check()
    return found | {"errors": error}


def line(row: dict[str, Any]) -> str:
    """A row of `layers` under `HEADER`."""
    ours = row.get("ours_us", float("nan"))
    parts = [f"      {row['dtype']:5s} {row['routing']:13s}{row['tokens']:7d} |{ours:8.1f}"]
    parts.append(f"{row.get('ours_spread', float('nan')):7.0%}")
    for side, width in ((SAME, 10), (TRITON, 5)):
        us = row.get(f"{side}_us", float("nan"))
        parts.append(f" |{us:{width}.1f}{us / ours:7.2f}x")
    parts.append(" | " + " ".join(f"{row['errors'][side]:.4f}" for side in SIDES))
    tiles = (row["configs"][side] for side in (OURS, SAME))
    return "".join(parts) + " | " + ", ".join(f"{its.get('form', '')} {its['block_m']}".strip() for its in tiles)
