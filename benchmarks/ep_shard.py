"""What the benchmarks of one rank's experts share: a plan made on the spot, and launches timed with weights not in L2."""

import pathlib
import sys
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
REAL = "triton_fused_moe"


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


def candidates(kernel: Kernel, shape: MoEShape) -> tuple[Config, ...]:
    """The kernel's defaults and what shipped plans of its type hold, whatever their GPU: those for experts of this size,
    else all. All configs of a kernel without defaults. The full lists would take minutes."""
    if not hasattr(kernel, "default_config"):
        return tuple(kernel.configs)
    found = [kernel.default_config(1 << power) for power in range(MOST_TOKENS.bit_length())]
    plans = [Plan.load(path) for path in sorted(pathlib.Path(rampwrap.__file__).parent.glob("plans/*.plan.json"))]
    plans = [its for its in plans if its.kernel == kernel.name and _same(its.shape, shape, "dtype", "scales")]
    for its in [its for its in plans if _same(its.shape, shape, "hidden_size", "intermediate_size")] or plans:
        found += its.configs
    return tuple(its for place, its in enumerate(found) if its not in found[:place] and _runs(kernel, its, shape))


def _same(one: MoEShape, other: MoEShape, *names: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _runs(kernel: Kernel, config: Config, shape: MoEShape) -> bool:
    return why_not_launched(kernel, config, shape) is None


def right(kernel: Kernel, shape: MoEShape, configs: Sequence[Config]) -> tuple[Config, ...]:
    """Those whose results, written over poisoned memory, are within the tolerance of float64; others are named."""
    if not hasattr(kernel, "reference"):
        return tuple(configs)
    for tokens in CHECK_TOKENS:
        ids = Workload(tokens, Routing.parse("zipf:1.2")).topk_ids(shape.num_experts, shape.top_k)
        given = inputs_of(kernel, shape, ids)
        expected = kernel.reference(shape, given)
        if hasattr(kernel, "precompile"):
            kernel.precompile(configs, **given)
        off: list[float] = []
        for config in configs:
            out = kernel.launch(config, **given, **poisoned(kernel, tokens, given["hidden_states"]))
            off.append(float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30)))
        most = getattr(kernel, "tolerance", TOLERANCE[shape.dtype])
        for config, error in zip(configs, off, strict=True):
            if not error < most:
                print(f"left out: {format_config(config)}, {error:.3g} off at {tokens} tokens", file=sys.stderr)
        configs = [config for config, error in zip(configs, off, strict=True) if error < most]
    return tuple(configs)


def timer_of(kernel: Kernel, shape: MoEShape) -> Timer:
    """Reads other memory between launches whatever the layer's size: a rank with few active experts would find them in L2."""
    its = default_timer(device_of(kernel), shape, simulated=not hasattr(kernel, "reference"))
    return GraphTimer(device_of(kernel).l2_bytes, 0) if isinstance(its, GraphTimer) else its


def shard(name: str, shape: MoEShape, tokens: Sequence[int], *, rounds: int = 2, timer: Timer | None = None) -> Shard:
    """A kernel by its name, checked, profiled and fitted.

    Args:
        tokens: of all ranks together.
        rounds: of each cell of the table.
        timer: `timer_of` by default.
    """
    kernel = make_kernel(name, shape)
    configs = right(kernel, shape, candidates(kernel, shape))
    timer = timer or timer_of(kernel, shape)
    rows = workload_grid(tokens, [Routing.parse(its) for its in ROUTINGS])
    table = profile(kernel, shape, rows, configs=configs, rounds=rounds, timer=timer, quiet=True)
    return Shard(kernel, configs, make_plan(table), timer)
