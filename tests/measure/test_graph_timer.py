"""`GraphTimer` on a simulated GPU: a clock that launches move on, graphs that remember them, events that read it."""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rampwrap.errors import DeviceFault
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure import graph_timer
from rampwrap.measure.graph_timer import GraphTimer, default_timer
from rampwrap.measure.timer import HostTimer, Measurement, ReturnTimer

L2 = 60 << 20
FLUSH_US, IDLE_US = 30.0, 500.0
"Of the read that empties L2, and until the host has launched the first of several graphs."


class OutOfMemoryError(RuntimeError):
    """torch's."""


class Gpu:
    """What torch shows of it: work is done at once, or noted while a graph is captured."""

    def __init__(self) -> None:
        self.us = 0.0
        self.capturing: Graph | None = None
        self.graphs: list[Graph] = []
        self.log: list[str] = []
        self.pools = self.synchronized = 0
        self.idle = True
        self.events = self.known = 0
        "Events recorded, and those of them that the host has waited for."
        self.in_stream = False
        self.zeros: list[tuple[int, ...]] = []
        self.ones: Callable[[], float] = lambda: 1.0

    def work(self, name: str, us: float) -> None:
        """A launch."""
        assert self.in_stream, "everything runs on the timer's own stream"
        if self.capturing is not None:
            self.capturing.work.append((name, us))
        else:
            self.us += us
            self.log.append(name)

    def call(self, us: float, name: str = "call") -> Callable[[], None]:
        return lambda: self.work(name, us)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.in_stream = True
        try:
            yield
        finally:
            self.in_stream = False

    def synchronize(self, event: int | None = None) -> None:
        assert self.capturing is None, "the host waits in a capture"
        self.known = max(self.known, self.events if event is None else event)
        self.idle = True
        self.synchronized += 1

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def torch(self) -> Any:
        cuda = types.SimpleNamespace(
            Stream=lambda: types.SimpleNamespace(synchronize=self.synchronize),
            stream=self.stream,
            synchronize=self.synchronize,
            Event=lambda enable_timing: Event(self, enable_timing),
            CUDAGraph=lambda: Graph(self),
            graph_pool_handle=self.new_pool,
            reset_peak_memory_stats=lambda: self.log.append("peak reset"),
            max_memory_allocated=lambda: 12345,
            empty_cache=lambda: self.log.append("cache emptied"),
            current_device=lambda: 0,
            is_available=lambda: True,
        )
        private = types.SimpleNamespace(
            _cuda_endAllocateToPool=lambda device, pool: self.log.append(f"pool {pool} ended"),
            _cuda_releasePool=lambda device, pool: self.log.append(f"pool {pool} released"),
        )

        def zeros(*shape: int, device: str) -> str:
            self.zeros.append(shape)
            return f"zeros{shape}"

        def total(buffer: str, dim: int, out: str) -> None:
            assert (buffer, dim, out) == (f"zeros{self.zeros[0]}", 1, "zeros(512,)")
            self.work("flush", FLUSH_US)

        return types.SimpleNamespace(
            cuda=cuda,
            _C=private,
            zeros=zeros,
            sum=total,
            ones=lambda size, device: types.SimpleNamespace(item=self.ones if size == 1 else None),
            OutOfMemoryError=OutOfMemoryError,
        )


class Event:
    """Reads the clock."""

    def __init__(self, gpu: Gpu, timing: bool) -> None:
        self.gpu, self.timing = gpu, timing

    def record(self) -> None:
        assert self.gpu.in_stream
        self.gpu.events += 1
        self.at, self.number = self.gpu.us, self.gpu.events

    def synchronize(self) -> None:
        self.gpu.synchronize(self.number)

    def elapsed_time(self, later: "Event") -> float:
        assert self.timing and later.timing and max(self.number, later.number) <= self.gpu.known
        return (later.at - self.at) / 1e3


class Graph:
    """Work, done anew at each replay."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work, self.is_whole, self.is_reset, self.replays = gpu, [], False, False, 0
        gpu.graphs.append(self)

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert self.gpu.in_stream and self.gpu.capturing is None and capture_error_mode == "thread_local"
        alive = [graph for graph in self.gpu.graphs if graph.is_whole and not graph.is_reset]
        # torch refuses a pool whose last graph is gone.
        assert pool == self.gpu.pools and (alive or pool not in {graph.pool for graph in self.gpu.graphs[:-1]})
        self.pool, self.gpu.capturing = pool, self

    def capture_end(self) -> None:
        assert self.gpu.capturing is self
        self.gpu.capturing, self.is_whole = None, True

    def reset(self) -> None:
        assert self.is_whole and not self.is_reset
        self.is_reset = True

    def replay(self) -> None:
        assert self.gpu.in_stream and self.is_whole and not self.is_reset
        self.gpu.us += IDLE_US if self.gpu.idle else 0.0
        self.gpu.idle = False
        self.replays += 1
        for name, us in self.work:
            self.gpu.work(name, us)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.work]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The one that torch has, and the host's clock goes with its own."""
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, "torch", gpu.torch())
    monkeypatch.setattr(graph_timer, "time", types.SimpleNamespace(monotonic=lambda: gpu.us / 1e6))
    return gpu


@pytest.fixture
def timer(gpu: Gpu) -> GraphTimer:
    """As for weights far beyond L2, without a warm-up that is worth the name."""
    return GraphTimer(L2, 4 * L2, warm_s=0.0)


@pytest.mark.parametrize(
    ("us", "repeats"),
    [
        (7.0, 57),  # 400 us
        (0.5, 200),  # not more than `MAX_REPEATS`
        (100.0, 4),
        (133.0, 2),  # three would be no more than half as many again
        (10_000.0, 2),
    ],
)
def test_a_graph_lasts_as_long_as_is_wanted(gpu: Gpu, timer: GraphTimer, us: float, repeats: int) -> None:
    """Its launches are counted off, and the wait for the host before the first replay is in no sample."""
    timed = timer.prepare([gpu.call(us)])
    assert timed.sample() == pytest.approx([us] * 3)
    (graph,) = [graph for graph in gpu.graphs[1:] if not graph.is_reset]
    assert graph.names == ["call"] * repeats and graph.replays == (4 if repeats > 2 else 7)


def test_the_length_is_an_argument(gpu: Gpu) -> None:
    timer = GraphTimer(L2, 4 * L2, target_us=40.0, replays=5, warm_s=0.0)
    assert timer.prepare([gpu.call(4.0)]).sample() == pytest.approx([4.0] * 5)
    assert len(gpu.graphs[-1].work) == 10
    assert timer.provenance()["replays"] == 5


def test_the_quicker_of_two_replays_decides(gpu: Gpu, timer: GraphTimer) -> None:
    """One that something else held up would make graphs too short."""
    timer.prepare([gpu.call(400.0)])
    real = Graph.replay

    def held_up(graph: Graph) -> None:
        real(graph)
        gpu.us += 4000.0 if graph.replays == 2 else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "replay", held_up)
        timer.prepare([gpu.call(4.0)])
    assert len(gpu.graphs[-1].work) == 100


def test_calls_take_turns_and_each_as_often_as_the_others(gpu: Gpu, timer: GraphTimer) -> None:
    calls = [gpu.call(us, name) for us, name in ((60.0, "a"), (90.0, "b"), (30.0, "c"))]
    timed = timer.prepare(calls)
    assert gpu.log[:4] == ["peak reset", "a", "b", "c"], "each once, eagerly"
    short, graph = gpu.graphs[1:]
    assert gpu.graphs[0].replays == 0 and (short.names, short.is_reset) == (["a", "b", "c"], True)
    assert graph.names == ["a", "b", "c"] * 3  # 400 us / 60 us = 7, made whole
    assert timed.sample() == pytest.approx([60.0] * 3)


def test_five_calls_and_one(gpu: Gpu, timer: GraphTimer) -> None:
    """At least two launches, and no fewer than there are calls."""
    timer.prepare([gpu.call(1000.0)])
    timer.prepare([gpu.call(1000.0)] * 5)
    assert [len(graph.work) for graph in gpu.graphs] == [2, 2, 5]


def test_eager_work_is_waited_for(gpu: Gpu, timer: GraphTimer) -> None:
    """Inputs come from another stream; what a call compiles or leaves behind is over before the capture."""
    waits: list[int] = []

    def call() -> None:
        waits.append(gpu.synchronized)
        gpu.work("call", 500.0)

    timer.prepare([call])
    assert waits[0] == 1 and min(waits[1:]) == 2


def test_clocks_are_warmed_up_once(gpu: Gpu) -> None:
    timer = GraphTimer(L2, 4 * L2, warm_s=0.1)
    timer.prepare([gpu.call(1000.0, "a"), gpu.call(1000.0, "b")])
    warming, graph = gpu.graphs
    assert warming.names == ["a", "b"] * 2 and graph.names == ["a", "b"]
    assert warming.replays == 33, "11 at a time, 4 ms each"
    timer.prepare([gpu.call(1000.0)])
    assert len(gpu.graphs) == 3 and timer.provenance()["flushed"] is False


def test_it_warms_up_for_a_second_unless_told(gpu: Gpu) -> None:
    GraphTimer(0, 1).prepare([gpu.call(1000.0)])
    assert 1e6 <= gpu.us < 1.1e6


def test_a_small_layer_is_timed_behind_a_flush_that_does_not_count(gpu: Gpu) -> None:
    """A buffer of twice the L2 in float32 is read before each launch."""
    timer = GraphTimer(L2, 4 * L2 - 1, warm_s=0.0)
    assert gpu.zeros == [(512, 2 * L2 // 4 // 512), (512,)]
    assert timer.prepare([gpu.call(7.0)]).sample() == pytest.approx([7.0] * 3)
    warming, flush, *_, graph = gpu.graphs
    assert warming.names == ["flush", "call"] * 2 and graph.names == ["flush", "call"] * 57
    assert flush.names == ["flush"] * 20 and flush.replays == 16
    assert timer.provenance()["flushed"] is True
    assert timer.time(gpu.call(0.001)).us == 0.01, "never nothing, nor less"


@pytest.mark.parametrize(("l2", "weights"), [(0, 0), (0, 4 * L2), (L2, 4 * L2)])
def test_without_an_l2_or_beyond_it_nothing_is_flushed(gpu: Gpu, l2: int, weights: int) -> None:
    timer = GraphTimer(l2, weights, warm_s=0.0)
    timer.prepare([gpu.call(7.0)])
    assert not gpu.zeros and {name for graph in gpu.graphs for name in graph.names} == {"call"}


def test_rotations_cycle_through_four_times_the_l2(gpu: Gpu, timer: GraphTimer) -> None:
    assert [timer.rotations(size) for size in (4 * L2, 4 * L2 - 1, L2, L2 - 1, 2 * L2)] == [1, 2, 4, 5, 2]
    assert timer.rotations(0) == 4 * L2
    assert GraphTimer(L2, 4 * L2 - 1).rotations(1) == 1


def test_graphs_share_a_pool_until_they_are_released(gpu: Gpu, timer: GraphTimer) -> None:
    for us in (7.0, 100.0, 900.0):
        timer.prepare([gpu.call(us)])
    assert {graph.pool for graph in gpu.graphs} == {1}
    # The first two are the warm-up's and 7 us's short one; nobody replays those that were too short again.
    assert [graph.is_reset for graph in gpu.graphs] == [False, True, False, True, False, False]
    timer.release()
    assert all(graph.is_reset for graph in gpu.graphs) and gpu.log[-1] == "cache emptied"
    timer.release()
    timer.prepare([gpu.call(900.0)])
    assert gpu.graphs[-1].pool == 2 and len(gpu.graphs) == 7


def test_time_takes_three_rounds_and_leaves_nothing(gpu: Gpu, timer: GraphTimer) -> None:
    assert timer.time(gpu.call(7.0)) == Measurement(pytest.approx(7.0), pytest.approx(0.0, abs=1e-6))
    assert all(graph.is_reset for graph in gpu.graphs) and gpu.graphs[-1].replays == 3 * 4
    gpu.log.clear()
    with pytest.raises(ZeroDivisionError):
        timer.time(lambda: 1 // 0)
    assert gpu.log == ["cache emptied"]


class TestFailures:
    def test_a_call_that_raises_in_the_capture(self, gpu: Gpu, timer: GraphTimer) -> None:
        """The capture is ended and freed; the pool is used on as long as another graph holds it."""

        def call() -> None:
            gpu.work("call", 1.0)
            if gpu.capturing is not None:
                raise ValueError("no")

        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                timer.prepare([call])
            assert gpu.capturing is None and gpu.graphs[-1].is_reset
        assert [graph.pool for graph in gpu.graphs] == [1, 2], "a pool without a graph is given up"
        timer.prepare([gpu.call(1000.0)])
        with pytest.raises(ValueError, match="no"):
            timer.prepare([call])
        timer.prepare([gpu.call(1000.0)])
        assert [graph.pool for graph in gpu.graphs] == [1, 2, 3, 3, 3, 3]
        timer.release()

    def test_a_broken_capture(self, gpu: Gpu, timer: GraphTimer, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch counts it as under way: its pool is let go of by hand, and the graph is kept."""

        def call() -> None:
            if gpu.capturing is not None:
                raise RuntimeError("operation not permitted when stream is capturing")

        def broken(graph: Graph) -> None:
            gpu.capturing = None
            raise RuntimeError("capture failed")

        with monkeypatch.context() as patch:
            patch.setattr(Graph, "capture_end", broken)
            with pytest.raises(RuntimeError, match="not permitted"):
                timer.prepare([call])
        assert gpu.log[-2:] == ["pool 1 ended", "pool 1 released"]
        assert timer._broken == gpu.graphs[:1]
        timer.prepare([gpu.call(1000.0)])
        assert gpu.graphs[-1].pool == 2

    def test_fault_is_what_lost_the_device(self, gpu: Gpu, timer: GraphTimer) -> None:
        """In a line; too little memory loses nothing."""

        def fails(error: Exception) -> Callable[[], float]:
            def item() -> float:
                raise error

            return item

        assert timer.fault() is None and gpu.synchronized == 1
        gpu.ones = fails(RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"))
        assert timer.fault() == "CUDA error: an illegal memory access"
        gpu.ones = fails(OutOfMemoryError("CUDA out of memory"))
        assert timer.fault() is None


def test_provenance_says_how_it_was_timed(gpu: Gpu, timer: GraphTimer) -> None:
    found = timer.provenance()
    assert (found["timer"], found["replays"], found["flushed"], found["peak_bytes"]) == ("cuda-graph", 3, False, 12345)
    assert found["torch"].split(".")[0].isdigit() and set(found) <= {
        *("timer", "replays", "flushed", "peak_bytes", "torch", "triton")
    }
    assert gpu.log == ["peak reset"] and timer.drifts


class TestDefault:
    SHAPE = MoEShape(42, 2, 2048, 512)
    DEVICE = Device("NVIDIA H200", 132, L2)

    def test_a_gpu_that_is_not_simulated(self, gpu: Gpu) -> None:
        """With its own L2 and the layer's weights: 252 MiB are more than four times 60."""
        found = default_timer(self.DEVICE, self.SHAPE)
        assert isinstance(found, GraphTimer) and found.rotations(L2) == 4
        assert default_timer(Device("NVIDIA H200", 132, 64 << 20), self.SHAPE).rotations(L2) == 1
        assert type(default_timer(Device("simulated", 132, L2), self.SHAPE)) is ReturnTimer

    def test_none(self, gpu: Gpu) -> None:
        sys.modules["torch"].cuda.is_available = lambda: False
        assert type(default_timer(self.DEVICE, self.SHAPE)) is ReturnTimer
        assert type(default_timer(self.DEVICE, self.SHAPE, simulated=False)) is HostTimer

    def test_one_that_cannot_be_used(self, gpu: Gpu) -> None:
        def busy() -> None:
            raise OutOfMemoryError("\nCUDA error: out of memory\nmore")

        sys.modules["torch"].cuda.reset_peak_memory_stats = busy
        with pytest.raises(DeviceFault, match=r"cannot be used \(CUDA error: out of memory\); end what else"):
            default_timer(self.DEVICE, self.SHAPE)
