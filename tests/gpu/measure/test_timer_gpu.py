"""`GraphTimer` and the profiler on a real GPU."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import profile
from rampwrap.measure.graph_timer import GraphTimer, default_timer
from rampwrap.routing.workloads import Routing, workload_grid

pytestmark = pytest.mark.gpu

MIB = 2**20
SHAPE = MoEShape(64, 8, 1024, 512)  # 201 MB of weights


def eager_us(call: Any, repeats: int = 50) -> float:
    """Back-to-back launches of something long enough to hide the host."""
    call()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3 / repeats


class Copying:
    """Copies as many bytes as its config says, through a temporary; stands for a kernel with activations."""

    name = "copying"
    configs = ({"mib": 64}, {"mib": 128}, {"mib": 256}, {"mib": -1}, {"mib": 0})

    def __init__(self) -> None:
        self.source = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        return CtaGrid(16, 1)

    def launch(self, config: Config, /, topk_ids: torch.Tensor) -> torch.Tensor:
        if config["mib"] < 0:
            raise RuntimeError("does not compile")
        if config["mib"] == 0:
            return torch.zeros(int(topk_ids.sum().item()) % 7 + 1, device="cuda")  # waits for the GPU: no graph
        return self.source[: config["mib"] * MIB].clone()

    def inputs(self, shape: MoEShape, topk_ids: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
        assert topk_ids.is_cuda and topk_ids.dtype == torch.int32
        return {"topk_ids": topk_ids}


@pytest.fixture
def timer() -> GraphTimer:
    """As for weights far beyond L2."""
    return GraphTimer(Device.current().l2_bytes, 10**10, warm_s=0.2)


def test_agrees_with_eager_timing(timer: GraphTimer) -> None:
    """On a copy that takes long enough for both; a product of matrices draws so much power that an H100 lowers its clock."""
    source = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    found = timer.time(source.clone)
    assert found.us == pytest.approx(eager_us(source.clone), rel=0.15)
    assert found.spread < 0.1


def test_short_calls(timer: GraphTimer) -> None:
    """A call of a few microseconds is not drowned by the launch of its graph."""
    x = torch.zeros(1024, device="cuda")
    assert 0.5 < timer.time(lambda: x.add_(1.0)).us < 5.0


def test_flush_makes_small_weights_cold() -> None:
    """Reading what fits in L2 takes longer behind a flush, and about what HBM needs; the flush is not counted."""
    l2 = Device.current().l2_bytes
    weights = torch.ones(l2 // 4 // 4, device="cuda")
    out = torch.zeros((), device="cuda")

    def read() -> None:
        torch.sum(weights, dim=0, out=out)

    warm = GraphTimer(0, weights.nbytes, warm_s=0.2).time(read).us
    cold = GraphTimer(l2, weights.nbytes, warm_s=0.2).time(read).us
    assert warm < cold < 5 * warm


def test_rotations(timer: GraphTimer) -> None:
    """As many as it takes to cycle through four times the L2."""
    l2 = Device.current().l2_bytes
    assert timer.rotations(5 * l2) == 1 and timer.rotations(l2) == 4
    assert GraphTimer(l2, l2).rotations(l2 // 8) == 1


def test_configs_share_memory(timer: GraphTimer) -> None:
    """Ten prepared calls with 64 MiB of activations each need the room of about one; releasing gives it back."""
    source = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    timed = [timer.prepare([source.clone]) for _ in range(10)]
    assert all(min(each.sample()) > 0 for each in timed)
    assert torch.cuda.memory_reserved() - before <= 4 * 64 * MIB
    timer.release()
    assert torch.cuda.memory_reserved() <= before + 64 * MIB
    assert timer.time(source.clone).us > 0


def test_a_broken_capture_leaves_no_trace(timer: GraphTimer) -> None:
    """A call that waits for the host cannot be captured; the next one can."""
    x = torch.ones(8, device="cuda")
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)captur"):
            timer.time(lambda: x.sum().item())
        assert timer.fault() is None
        assert timer.time(lambda: x + 1).us > 0


def test_profile(tmp_path: pathlib.Path) -> None:
    """Live: more bytes take longer, failing configs have their reasons, the memory is recorded."""
    kernel = Copying()
    workloads = workload_grid([1, 64], [Routing.parse("uniform")])
    table = profile(kernel, SHAPE, workloads, out=tmp_path / "t.npz", quiet=True)
    assert (np.diff(table.us[:, :3], axis=1) > 0).all()
    assert table.reasons[3] == "RuntimeError: does not compile" and 4 in table.reasons
    assert table.device == Device.current() and table.notes["timer"] == "cuda-graph"
    # The source, plus the activations of an eager launch and of a captured one.
    assert table.notes["peak_bytes"] <= 3 * 256 * MIB + 8 * MIB
    assert isinstance(default_timer(table.device, SHAPE), GraphTimer)
