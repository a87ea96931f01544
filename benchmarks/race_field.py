"""Who races on one layer, and with what: layers, contenders, routings and timers of `race.py`."""

import argparse
import sys
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch

from rampwrap.errors import InputError, RampwrapError
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device, device_of
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel, kernel_version
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.measure.graph_timer import GraphTimer, default_timer
from rampwrap.measure.inputs import turned
from rampwrap.measure.timer import Timer
from rampwrap.routing.counts import first_counts
from rampwrap.routing.recorded import read_trace
from rampwrap.routing.workloads import Routing, Workload

LAYERS = {
    **{name: SHAPES[name] for name in ("olmoe", "qwen3-30b", "deepseek-v3-tp8")},
    "deepseek-v3-ep8": MoEShape(256, 8, 7168, 2048, num_local_experts=32),
    "deepseek-v3-ep32": MoEShape(256, 8, 7168, 2048, num_local_experts=8),
}
DRAWN = 8
"Tokens drawn for each that a rank gets; a routing of which fewer arrive is drawn anew."


@attrs.frozen
class Arrived(Workload):
    """A batch of a rank that has the first experts alone: tokens that name at least one of them."""

    here: int = 0

    def topk_ids(self, num_experts: int, top_k: int) -> npt.NDArray[np.int32]:
        """Ids of all ranks, int32 [num_tokens, top_k]; the same at every call."""
        spec = f"{self.label} {self.split} E={num_experts} k={top_k} here={self.here}".encode()
        rng = np.random.default_rng([self.seed, *spec])
        kept = np.empty((0, top_k), dtype=np.int32)
        while len(kept) < self.num_tokens:
            ids = self.routing.sample(DRAWN * max(self.num_tokens, 8), num_experts, top_k, rng)
            kept = ids[(ids < self.here).any(axis=1)]
        return kept[: self.num_tokens]


def vllm(shape: MoEShape) -> Kernel:
    """vLLM's layer without the launches that replace padding ids, which are ours and which no batch here needs; `race_field:vllm`."""
    from rampwrap.adapters.vllm_fused_moe import VllmFusedMoE
    from rampwrap.kernels.triton import padding

    padding.redirected = lambda topk_ids, topk_weights, *_: (topk_ids, topk_weights)  # type: ignore[assignment]
    return VllmFusedMoE(shape)


def measured(device: Device) -> Device:
    """With the copy bandwidth of this GPU as it is now: read plus written by a copy of 2 GB, the best of twenty."""
    if device.name == "simulated" or not torch.cuda.is_available():
        return device
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return attrs.evolve(device, copy_gbps=2 * source.numel() / best / 1e6)


def contenders(names: Sequence[str], shape: MoEShape) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels that are here and can run the layer, and why the others are not."""
    made: list[Kernel] = []
    left_out: dict[str, str] = {}
    for name in names:
        try:
            kernel = make_kernel(name, shape)
            Portfolio([*made, kernel], extra_memory=True)
            made.append(kernel)
        except (RampwrapError, ImportError) as error:
            left_out[name] = str(error)
    return made, left_out


@attrs.frozen(eq=False)
class Batch:
    """One routing of a token count."""

    workload: Workload
    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    @property
    def even(self) -> bool:
        return self.workload.routing.kind == "uniform"


@attrs.define(eq=False)
class Field:
    """The contenders of one layer, and what was found wrong with their configs."""

    shape: MoEShape
    a: argparse.Namespace
    kernels: list[Kernel]
    left_out: dict[str, str]
    routings: list[Routing]
    both: Portfolio | None
    device: Device
    timer: Timer
    quick: Timer
    wrong: dict[str, str] = attrs.field(factory=dict)
    nodes: dict[str, dict[str, list[str]]] = attrs.field(factory=dict)

    @classmethod
    def of(cls, shape: MoEShape, a: argparse.Namespace) -> "Field":
        """Of the kernels that are here."""
        kernels, left_out = contenders(a.kernels, shape)
        routings = [Routing.parse(text) for text in a.routings]
        if a.recorded:
            try:
                read_trace(a.recorded, shape.num_experts)
                routings.append(Routing("trace", a.recorded))
            except InputError as error:
                left_out["recorded routing"] = str(error)
        routings.sort(key=lambda its: its.kind != "uniform")
        for name, why in left_out.items():
            print(f"  without {name}: {why}", file=sys.stderr)
        both = Portfolio(kernels, extra_memory=True) if kernels else None
        device = Device.current() if both is None else device_of(both)
        simulated = isinstance(getattr(both, "device", device), Device) if both is not None else True
        timer = quick = default_timer(device, shape, simulated=simulated)
        if isinstance(timer, GraphTimer):
            quick = GraphTimer(device.l2_bytes, shape.weight_bytes, target_us=1.0, replays=2, warm_s=0.2)
        return cls(shape, a, kernels, left_out, routings, both, device, timer, quick)

    @property
    def versions(self) -> dict[str, str]:
        return {kernel.name: kernel_version(kernel) for kernel in self.kernels}

    @property
    def where(self) -> str:
        return "cuda" if torch.cuda.is_available() and self.device.name != "simulated" else "cpu"

    def batch(self, tokens: int, routing: Routing, seed: int) -> Batch:
        """The ids of a rank, and their histogram."""
        shape, here = self.shape, self.shape.num_local_experts
        work = Workload(tokens, routing, seed=seed)
        if here < shape.num_experts:
            work = Arrived(tokens, routing, seed=seed, here=here)
        ids = work.topk_ids(shape.num_experts, shape.top_k)
        return Batch(work, ids, first_counts(ids, shape))

    def turned(self, batch: Batch, turn: int, turns: int) -> torch.Tensor:
        """The ids of one of several turns, where the layer runs."""
        return torch.from_numpy(turned(batch.ids, self.shape, turn, turns)).to(self.where)
