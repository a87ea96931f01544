"""What the benchmarks of one rank's experts share: a plan made on the spot, and launches timed with weights not in L2."""

import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from race_check import poisoned

import rampwrap
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import device_of
from rampwrap.kernel.protocol import Config, Kernel, format_config, why_not_launched
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build import library
from rampwrap.measure.full import profile
from rampwrap.measure.graph_timer import GraphTimer, default_timer
from rampwrap.measure.timer import Measurement, Timer
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.workloads import Routing, Workload, workload_grid
from rampwrap.testing.conformance import TOLERANCE

ROUTINGS = ("uniform", "dirichlet:1.0", "dirichlet:0.3", "zipf:1.2")
"That plans are made from."
CHECK_TOKENS = (1, 64)
MOST_TOKENS = 1 << 14
MOST = 12
"""Configs that are profiled. Compiled libraries need seconds for a dozen; with the full lists, or what all shipped plans hold (300 of
our Triton kernel), the time of a run was over before anything was timed."""
CUTE = "cute_moe"
CHOSEN = {
    "fp8": "one 8 16 4 6, one 8 32 4 4, one 16 32 4 4, two 16 64 4 3, two 24 64 4 4, two 40 64 4 4, two 16 32 4 4, "
    "ragged 40 64 4 4, ragged 56 64 4 4, ragged 64 32 8 4, ragged 96 32 8 4, prefill 128 256 8 4",
    "bf16": "one 8 16 4 6, one 16 32 4 6, two 16 16 4 10, two 40 16 4 10, two 64 16 4 10, two 48 32 4 6, two 80 32 8 4, "
    "ragged 64 32 4 6, ragged 96 32 4 6, ragged 112 32 8 4, ragged 144 32 8 4, prefill 128 256 8 4",
}
"""Of the CuTe kernels: form, block_m, block_n, warp_n, stages. What was the best most often from 16 tokens on in a race on ranks with 32
and 8 of 256 experts and on all of Qwen3-30B (`results/h100-race-issue16.json`), and neighbours in block_m; all defaults are among them."""


def served() -> str:
    """The name of the kernel that is timed where none is asked for: the CuTe kernels where they are compiled, since nothing is then."""
    if not torch.cuda.is_available():
        return "sim"
    return CUTE if library.find() is not None else "triton_fused_moe"


@attrs.frozen(eq=False)
class Shard:
    """The experts of one rank: a kernel, and a plan from a table of it.

    Attributes:
        kernel: of the rank's shape; tokens are those of all ranks.
        configs: that were profiled; the plan holds some of them.
        plan: fitted to the table.
        timer: behind which nothing of the weights is left in L2.
    """

    kernel: Kernel
    configs: tuple[Config, ...]
    plan: Plan
    timer: Timer

    @property
    def shape(self) -> MoEShape:
        return self.plan.shape

    def inputs(self, topk_ids: Any, seed: int = 0) -> dict[str, Any]:
        """Arguments of a launch, on the GPU where there is one."""
        return inputs_of(self.kernel, self.shape, topk_ids, seed)

    def us(self, calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
        """Median microseconds of each, sampled in turn."""
        try:
            ready = {name: self.timer.prepare([call]) for name, call in calls.items()}
            samples: dict[Any, list[float]] = {name: [] for name in ready}
            for _ in range(rounds):
                for name, its in ready.items():
                    samples[name] += its.sample()
        finally:
            self.timer.release()
        return {name: Measurement.of(its).us for name, its in samples.items()}


def inputs_of(kernel: Kernel, shape: MoEShape, topk_ids: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments of a launch on the GPU where the kernel needs one."""
    if hasattr(kernel, "reference") and torch.cuda.is_available():
        topk_ids = torch.from_numpy(topk_ids).cuda()
    elif hasattr(kernel, "reference"):
        topk_ids = torch.from_numpy(topk_ids)
    found: dict[str, Any] = kernel.inputs(shape, topk_ids, seed=seed)  # type: ignore[attr-defined]
    return found


def candidates(kernel: Kernel, shape: MoEShape, most: int = MOST) -> tuple[Config, ...]:
    """The kernel's defaults, then `CHOSEN` and, evenly, what shipped plans of its type hold, whatever their GPU: those for experts of
    this size, else all. All configs of a kernel without defaults."""
    if not hasattr(kernel, "default_config"):
        return tuple(kernel.configs)
    found = unique([kernel.default_config(1 << power) for power in range(MOST_TOKENS.bit_length())])
    more = [_of_text(text) for text in CHOSEN[shape.dtype].split(", ")] if kernel.name == CUTE else []
    found = unique([*found, *more])[:most]
    plans = [Plan.load(path) for path in sorted(pathlib.Path(rampwrap.__file__).parent.glob("plans/*.plan.json"))]
    plans = [its for its in plans if its.kernel == kernel.name and _same(its.shape, shape, "dtype", "scales")]
    plans = [its for its in plans if _same(its.shape, shape, "hidden_size", "intermediate_size")] or plans
    rest = [its for its in unique([config for plan in plans for config in plan.configs]) if its not in found]
    count = min(most - len(found), len(rest))
    found += [rest[place * len(rest) // count] for place in range(count)]
    return tuple(its for its in found if why_not_launched(kernel, its, shape) is None)


def unique(configs: Sequence[Config]) -> list[Config]:
    return [its for place, its in enumerate(configs) if its not in configs[:place]]


def _of_text(text: str) -> Config:
    form, *numbers = text.split()
    return (
        {"form": form}
        | dict(zip(("block_m", "block_n", "warp_n", "stages"), map(int, numbers), strict=True))
        | {"group_m": 1}
    )


def _same(one: MoEShape, other: MoEShape, *names: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def right(kernel: Kernel, shape: MoEShape, configs: Sequence[Config]) -> tuple[Config, ...]:
    """Those whose results, written over poisoned memory, are within the tolerance of float64; others are named."""
    if not hasattr(kernel, "reference"):
        return tuple(configs)
    for tokens in CHECK_TOKENS:
        ids = Workload(tokens, Routing.parse("zipf:1.2")).topk_ids(shape.num_experts, shape.top_k)
        given = inputs_of(kernel, shape, ids)
        expected = kernel.reference(shape, given)
        if hasattr(kernel, "precompile") and tokens == CHECK_TOKENS[0]:  # its processes take seconds to start
            kernel.precompile(configs, **given)
        found = []
        for config in configs:
            why = _why_wrong(kernel, config, tokens, given, expected)
            if why is None:
                found.append(config)
            else:
                print(f"left out: {format_config(config)}, {why} at {tokens} tokens", file=sys.stderr)
        configs = found
    return tuple(configs)


def _why_wrong(kernel: Any, config: Config, tokens: int, given: dict[str, Any], expected: torch.Tensor) -> str | None:
    try:
        out = kernel.launch(config, **given, **poisoned(kernel, tokens, given["hidden_states"]))
        off = float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    except Exception as error:
        return f"{error!r:.200}"
    most = getattr(kernel, "tolerance", TOLERANCE[kernel.shape.dtype])
    return None if off < most else f"{off:.3g} off"


def timer_of(kernel: Kernel, shape: MoEShape) -> Timer:
    """Reads other memory between launches whatever the layer's size: a rank with few active experts would find them in L2."""
    its = default_timer(device_of(kernel), shape, simulated=not hasattr(kernel, "reference"))
    return GraphTimer(device_of(kernel).l2_bytes, 0) if isinstance(its, GraphTimer) else its


def shard(name: str, shape: MoEShape, tokens: Sequence[int], *, rounds: int = 2, most: int = MOST) -> Shard:
    """A kernel by its name, checked, profiled and fitted; says on stderr what took how long.

    Args:
        tokens: of all ranks together.
        rounds: of each cell of the table.
        most: configs.
    """
    began = [time.monotonic()]
    kernel = make_kernel(name, shape)
    configs = right(kernel, shape, candidates(kernel, shape, most))
    began.append(time.monotonic())
    timer = timer_of(kernel, shape)
    rows = workload_grid(tokens, [Routing.parse(its) for its in ROUTINGS])
    table = profile(kernel, shape, rows, configs=configs, rounds=rounds, timer=timer, quiet=True)
    began.append(time.monotonic())
    found = Shard(kernel, configs, make_plan(table), timer)
    began.append(time.monotonic())
    took = ", ".join(
        f"{what} {after - before:.1f} s"
        for what, before, after in zip(("checked", "profiled", "planned"), began, began[1:], strict=False)
    )
    print(f"{name} {shape}: {len(configs)} configs {took}", file=sys.stderr, flush=True)
    return found
