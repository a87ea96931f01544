"""Whole layers over several GPUs: dispatch, experts and combine of ours, against all-gather, experts and reduce-scatter.

Part of `ep.py`. The experts are our Triton kernel with one config, the same on both sides: of its default configs the fastest
with uniform routing. What differs is how rows travel, and that FP8 rows are quantised on the way; the other side quantises in a
launch of its own. Both outputs are compared.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from ep_ranks import WARM, Gathered, Timed, in_time, in_turn

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.ep.group import ExpertParallel
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8
from rampwrap.kernels.common.reference import random_weights
from rampwrap.kernels.triton.quantise import quantise_rows
from rampwrap.routing.workloads import Routing

HEADER = "layer dtype routing       tokens block_m | ours us spread  NCCL us  faster | error"
MOST_ERROR = 0.03
"Of the largest output: sums of two ranks in bf16 are rounded at other places."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer-tokens", type=int, nargs="*", default=[8, 32, 128], help="a rank, of whole layers")
    parser.add_argument("--layer-shape", type=int, nargs=4, default=[128, 8, 2048, 768], help="E top_k H I; Qwen3-30B")
    parser.add_argument("--layer-dtype", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--routing", nargs="+", default=["uniform", "dirichlet:0.1"])


def layers(
    group: dist.ProcessGroup, its: argparse.Namespace, device: torch.device, until: float
) -> Iterator[dict[str, Any]]:
    """A row for each dtype, number of tokens and routing; the same on every rank."""
    backend = "symmetric" if its.device == "cuda" else "collectives"
    for dtype in its.layer_dtype:
        shape = MoEShape(*its.layer_shape, dtype=dtype)
        with ExpertParallel(group, shape, max(its.layer_tokens), backend=backend, device=device) as ep:
            kernel = TritonFusedMoE(ep.shape)
            weights: dict[str, Any] = random_weights(ep.shape, device, seed=ep.rank)
            weights["workspace"] = kernel.workspace(ep.num_ranks * max(its.layer_tokens), device)
            for tokens in its.layer_tokens:
                if not in_time(group, until):
                    return
                batch = Batch.drawn(ep, tokens, "uniform")
                config = fastest(group, kernel, batch, weights, ep.num_ranks * tokens)
                for routing in its.routing:
                    if not in_time(group, until):
                        return
                    run = functools.partial(kernel.launch, config)
                    found = one(group, ep, run, Batch.drawn(ep, tokens, routing), weights, its.replays)
                    yield {
                        "ranks": ep.num_ranks,
                        "dtype": dtype,
                        "routing": routing,
                        "tokens": tokens,
                        "config": dict(config),
                    } | found


@attrs.frozen(eq=False)
class Batch:
    """The tokens of one rank, and the ids of all."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    all_ids: torch.Tensor
    expert_map: torch.Tensor

    @classmethod
    def drawn(cls, ep: ExpertParallel, tokens: int, routing: str) -> "Batch":
        """All ranks draw the same ids, so that the same experts are popular on each."""
        shape, device = ep.shape, ep.device
        rng = np.random.default_rng(tokens)
        drawn = Routing.parse(routing).sample(tokens * ep.num_ranks, shape.num_experts, shape.top_k, rng)
        all_ids = torch.from_numpy(drawn).int().to(device)
        generator = torch.Generator().manual_seed(ep.rank)
        hidden = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16().to(device)
        weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(1).to(device)
        own = all_ids[ep.rank * tokens : (ep.rank + 1) * tokens].contiguous()
        return cls(hidden, own, weights, all_ids, ep.owners.expert_map)


def fastest(
    group: dist.ProcessGroup, kernel: TritonFusedMoE, batch: Batch, weights: dict[str, Any], rows: int
) -> Config:
    """Of the default configs of several batches, on the experts of rank 0; rank 0 times them and all take its word."""
    configs: list[Config] = []
    for factor in (0.25, 1, 4):
        config = kernel.default_config(max(1, int(rows * factor)))
        configs += [config] if config not in configs else []
    hidden = torch.randn(rows, kernel.shape.hidden_size, device=batch.hidden.device).bfloat16()
    scores = torch.ones(rows, kernel.shape.top_k, device=hidden.device)
    times = []
    for config in configs:
        call = functools.partial(
            kernel.launch,
            config,
            hidden_states=hidden,
            topk_ids=batch.all_ids,
            topk_weights=scores,
            expert_map=batch.expert_map,
            **weights,
        )
        timed = Timed(group, call, hidden.is_cuda)
        times.append(statistics.median(timed.us() for _ in range(WARM)))
    said: list[Any] = [configs[times.index(min(times))]]
    dist.broadcast_object_list(said, src=0, group=group)
    found: Config = said[0]
    return found


def one(
    group: dist.ProcessGroup,
    ep: ExpertParallel,
    run: Callable[..., torch.Tensor],
    batch: Batch,
    weights: dict[str, Any],
    replays: int,
) -> dict[str, Any]:
    """Times of both sides, and how far their outputs are apart, as a share of the largest.

    Raises:
        AssertionError: too far.
    """
    tokens, device, on_gpu = len(batch.ids), ep.device, ep.device.type == "cuda"
    out, their_out = torch.empty_like(batch.hidden), torch.empty_like(batch.hidden)
    counts = [tokens] * ep.num_ranks

    def ours() -> None:
        ep.layer(run, batch.hidden, batch.ids, batch.weights, tokens_per_rank=counts, out=out, **weights)

    quantises = ep.layout.payload == "fp8"
    rows = [batch.hidden]
    if quantises:
        scales = torch.empty(tokens, ep.shape.hidden_size // 128, device=device)
        rows = [torch.empty_like(batch.hidden, dtype=FP8), scales]
    rival = Gathered(group, [*rows, batch.ids, batch.weights])
    names = ["hidden_states", *(["hidden_scale"] if quantises else []), "topk_ids", "topk_weights"]
    gathered = dict(zip(names, rival.all, strict=True))

    def theirs() -> None:
        if quantises:
            quantise_rows(batch.hidden, *rows)
        rival.gather()
        rival.scatter(run(**gathered, expert_map=batch.expert_map, **weights), their_out)

    calls = {"ours": ours, "rival": theirs}
    timed = {name: Timed(group, call, on_gpu) for name, call in calls.items()}
    found: dict[str, Any] = in_turn(group, timed, replays)
    ep.check()
    error = float((out.float() - their_out.float()).abs().max() / their_out.float().abs().max())
    assert error < MOST_ERROR, f"outputs of {tokens} tokens are {error:.3f} apart"
    return found | {"error": error}


def line(row: dict[str, Any]) -> str:
    """A row of `layers` under `HEADER`."""
    return (
        f"      {row['dtype']:5s} {row['routing']:13s}{row['tokens']:7d}{row['config']['block_m']:8d} |{row['ours_us']:8.1f}"
        f"{row['ours_spread']:7.0%}{row['rival_us']:9.1f}{row['rival_us'] / row['ours_us']:7.2f}x | {row['error']:.4f}"
    )
