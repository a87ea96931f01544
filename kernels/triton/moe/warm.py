"""Compiles configs in parallel: each takes half a second, a list of 160 with both GEMMs minutes in one process."""

import contextlib
import multiprocessing
import multiprocessing.pool
import os
from collections.abc import Iterator, Sequence

import torch

from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import INPUT_SCALES, TORCH_DTYPES, WEIGHT_DTYPES, Operands, scale_shapes
from rampwrap.kernels.common.workers import main_hidden
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.moe.host import DIRECT_FACTOR, fused_moe


def warm(
    shape: MoEShape,
    configs: Sequence[Config],
    *,
    ids_dtype: torch.dtype = torch.int32,
    persistent: bool = False,
    processes: int | None = None,
) -> list[str | None]:
    """Puts the compiled kernels of `configs` into Triton's disk cache, where later calls find them.

    Runs each config once on one expert's worth of zeros, in processes of their own, so that a config that
    breaks the GPU context breaks only its process.

    Args:
        shape: the layer; kernels are compiled for its sizes.
        configs: what to compile.
        ids_dtype: type of the `topk_ids` that will come.
        persistent: compile what candidates in a graph run too.
        processes: at most this many; the machine's cores where absent, at most 16.

    Returns:
        For each config None, or why it failed.
    """
    count = min(processes or os.cpu_count() or 1, 16, max(1, len(configs)))
    parts = [(shape, list(configs[i::count]), ids_dtype, "cuda", persistent) for i in range(count)]
    with workers(count) as pool:
        found = pool.starmap(run_once, parts)
    reasons: list[str | None] = [None] * len(configs)
    for i, part in enumerate(found):
        reasons[i::count] = part
    return reasons


@contextlib.contextmanager
def workers(count: int) -> Iterator[multiprocessing.pool.Pool]:
    """Processes that compile as this one would, for `run_once`."""
    # Fork servers start from a process without a CUDA context and pay for importing torch once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rampwrap.kernels.triton.moe.warm"])
    # The setting of this process, not the environment's that the server may have seen: it is part of what is compiled.
    # All the while: a pool starts processes anew, from a thread, where one has died.
    with main_hidden(), context.Pool(count, pdl.use, (pdl.setting(),)) as pool:
        yield pool


def run_once(
    shape: MoEShape, configs: Sequence[Config], ids_dtype: torch.dtype, device: str = "cuda", persistent: bool = False
) -> list[str | None]:
    """Runs each config with and without alignment; for each None, or the first line of the error."""
    batches = [_zeros(shape, num_tokens, ids_dtype, device) for num_tokens in _batches(shape)]
    ways: list[tuple[str, int | None]] = [(pdl.setting(), None)]
    if persistent:
        # Candidates are launched as those of several.
        several = pdl.setting() if pdl.setting() == pdl.EVERYWHERE else pdl.NOWHERE
        ways = list(dict.fromkeys([*ways, (several, None), (several, 1)]))
    reasons: list[str | None] = []
    for config in configs:
        with _reason(reasons, device):
            for operands in batches:
                for setting, most_ctas in ways:
                    with pdl.using(setting):
                        fused_moe(config, operands, shape, most_ctas=most_ctas)
    return reasons


@contextlib.contextmanager
def _reason(reasons: list[str | None], device: str) -> Iterator[None]:
    """Adds why the body failed, None where it ran to the end, also on the GPU."""
    try:
        yield
        if device == "cuda":
            torch.cuda.synchronize()
        reasons.append(None)
    except Exception as error:
        reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])


def _batches(shape: MoEShape) -> list[int]:
    # One batch on each side of the bound under which slots are blocks of their own.
    aligned = shape.num_experts // (DIRECT_FACTOR * shape.top_k) + 1
    return [aligned] if aligned == 1 else [1, aligned]


def _zeros(shape: MoEShape, num_tokens: int, ids_dtype: torch.dtype, device: str) -> Operands:
    """Operands whose weights are one expert, seen as many; every token goes to the first."""
    hidden, inter, experts = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    weight = WEIGHT_DTYPES[shape.dtype]

    def expert(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, *sizes, dtype=dtype, device=device).zero_().expand(experts, *sizes)

    scales = scale_shapes(shape) if shape.dtype == "fp8" else {}
    given = {name: torch.ones((), device=device) for name in INPUT_SCALES if shape.scales == "static"}
    return Operands(
        hidden_states=torch.zeros(num_tokens, hidden, dtype=TORCH_DTYPES[shape.dtype], device=device),
        w13=expert(2 * inter, hidden, dtype=weight),
        w2=expert(hidden, inter, dtype=weight),
        topk_weights=torch.zeros(num_tokens, shape.top_k, device=device),
        topk_ids=torch.zeros(num_tokens, shape.top_k, dtype=ids_dtype, device=device),
        **{name: expert(*its[1:]) for name, its in scales.items()},
        **given,
    )
