"""What `in_graph.py` measures with: captured graphs, interleaved replays, a clock, and compilation that ends in time."""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import third_party
import torch

from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape

DEVICE = "cuda"
Graph = torch.cuda.CUDAGraph


class Clock:
    """Seconds since the start, and how many may still be used."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def used(self) -> float:
        return time.monotonic() - self.start

    def left(self, share: float = 1.0) -> float:
        """Until this share of the whole time is over."""
        return share * self.seconds - self.used

    def mark(self, what: str) -> None:
        print(f"[{self.used:.0f} s] {what}", flush=True)


def capture(run: Callable[[], Any]) -> Graph:
    """A graph of what `run` launches; it runs eagerly first, which compiles."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`, which empties the allocator's cache each time.
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    return graph


def replay_us(graph: Graph) -> float:
    """Microseconds of one replay, behind one that is not counted so that the GPU is not waiting for the host."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3


def interleaved(graphs: dict[str, Graph], rounds: int) -> dict[str, float]:
    """Median microseconds of each graph, sampled in turn."""
    for graph in graphs.values():
        replay_us(graph)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(replay_us(graph))
    return {name: statistics.median(found) for name, found in samples.items()}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table."""
    text = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *text]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [list(header), *text]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


@functools.cache
def one_expert(name: str, shape: MoEShape) -> tuple[Any, dict[str, Any]]:
    """A kernel, and weights: of one expert seen as many where the adapter lets that pass, which ours does not."""
    kernel: Any = third_party.make(name, shape)
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    dtype = torch.float8_e4m3fn if shape.dtype == "fp8" else torch.bfloat16
    sizes = {"w13": (2 * i, h, dtype), "w2": (h, i, dtype)}
    if shape.dtype == "fp8":
        sizes |= {"w13_scale": (2 * i // 128, h // 128, torch.float32), "w2_scale": (h // 128, i // 128, torch.float32)}
    own = e if name == "triton" else 1
    return kernel, {
        n: torch.zeros(own, r, c, device=DEVICE, dtype=t).expand(e, -1, -1) for n, (r, c, t) in sizes.items()
    }


def compile_one(name: str, shape: MoEShape, configs: Sequence[Config], tokens: Sequence[int], merged: bool) -> Any:
    """Runs configs once at each batch size, in a process of its own; (configs, merged, None or why it failed)."""
    from rampwrap.kernels.triton.select.host import allocate_selected

    try:
        kernel, weights = one_expert(name, shape)
        for count in tokens:
            ids = torch.arange(count * shape.top_k, device=DEVICE, dtype=torch.int32) % shape.num_experts
            given = {
                "hidden_states": torch.zeros(count, shape.hidden_size, device=DEVICE, dtype=torch.bfloat16),
                "topk_weights": torch.zeros(count, shape.top_k, device=DEVICE),
                "topk_ids": ids.view(count, shape.top_k),
                **weights,
            }
            heights = [kernel.grid(config, shape).block_m for config in configs]
            selected = allocate_selected(count, shape.top_k, shape.num_local_experts, heights, DEVICE)
            selected.post_padded.zero_()
            selected.choice.zero_()
            more = {"merged": True} if merged else {}
            kernel.launch_candidates(configs, selected.blocks, selected.choice, **given, **more)
            if not merged:
                for config in configs:
                    kernel.launch(config, **given)
        torch.cuda.synchronize()
    except Exception as error:
        return configs, merged, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return configs, merged, None


def compile_in_time(
    name: str, shape: MoEShape, work: Sequence[tuple[Sequence[Config], bool]], tokens: Sequence[int], seconds: float
) -> tuple[list[Sequence[Config]], list[Sequence[Config]], list[str]]:
    """Puts kernels into Triton's disk cache by 16 processes, and stops when the time is over, whatever is missing.

    Returns:
        Single configs and merged lists that are ready, and what is not, with the reason.
    """
    if name == "alpha":  # compiled ahead
        return [configs for configs, merged in work if not merged], [], []
    count = min(16, os.cpu_count() or 1, len(work))
    context = multiprocessing.get_context("forkserver")
    preload = ["vllm.model_executor.layers.fused_moe"] if name == "vllm" else []
    context.set_forkserver_preload(["graph_tools", "rampwrap.adapters.triton_fused_moe", *preload])
    end = time.monotonic() + seconds
    ready: list[Sequence[Config]] = []
    merged_ready: list[Sequence[Config]] = []
    missing = []
    pool = context.Pool(count)
    waiting = [(pool.apply_async(compile_one, (name, shape, configs, tokens, merged)), configs, merged) for configs, merged in work]  # fmt: skip
    for result, configs, merged in waiting:
        try:
            reason = result.get(timeout=max(0.01, end - time.monotonic()))[2]
        except multiprocessing.TimeoutError:
            reason = f"not compiled in {seconds:.0f} s"
        if reason is None:
            (merged_ready if merged else ready).append(configs)
        else:
            missing.append(f"{'merged ' if merged else ''}{[tuple(c.values()) for c in configs]}: {reason}")
    pool.terminate()
    return ready, merged_ready, missing
