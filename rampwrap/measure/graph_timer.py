"""`GraphTimer`: microseconds of a call on the GPU as serving runs it, by replays of CUDA graphs."""

import contextlib
import itertools
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import DeviceFault
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timer import MAX_REPEATS, Call, HostTimer, Measurement, ReturnTimer, Timed, Timer

# Repeated launches that cycle through this many times the L2 find next to nothing of their weights in it: with
# random replacement 2 % of the reads hit at 4x the L2, but 20 % at 2x.
COLD = 4


class GraphTimer:
    """Times calls on the GPU as serving runs them: captured in a CUDA graph, weights not in L2.

    A call runs once eagerly (it may compile), then `n` repeats are captured so that one replay lasts about
    `target_us`: the launch of the graph and the clock of the events vanish in it. All graphs share one memory
    pool, so that the activations of a hundred configs take the room of the largest; this is sound because
    replays never overlap and nobody reads their results.

    In serving, other layers pass through L2 between two runs of this one, so each launch has to find its weights
    in HBM. Three cases, by bytes of weights against the L2:
      * a launch reads much more than L2 holds: nothing to do.
      * the layer is large but few experts are active: the launches of a graph take turns over cyclically shifted
        expert ids (`rotations`). It costs no memory and no time, and every shift has the same sorted histogram.
      * the whole layer is small: a buffer of twice the L2 is read between launches, and the time of the reading,
        measured alone, is subtracted. Read, not written: dirty lines would be written back on the launch's time.

    Args:
        l2_bytes: size of the L2 cache, 0 to leave it alone.
        weight_bytes: weights of the layer.
        target_us: duration of one replay.
        replays: samples of one round.
        warm_s: seconds of replays before the first sample, so that clocks are steady.
    """

    name = "cuda-graph"
    drifts = True

    def __init__(
        self, l2_bytes: int, weight_bytes: int, *, target_us: float = 400.0, replays: int = 3, warm_s: float = 1.0
    ) -> None:
        import torch

        self._torch = torch
        torch.cuda.reset_peak_memory_stats()
        self._cold_bytes = COLD * l2_bytes
        self._large = weight_bytes >= self._cold_bytes
        self._target_us = target_us
        self._replays = replays
        self._warm_s = warm_s
        self._warm = False
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._graphs: list[Any] = []
        self._broken: list[Any] = []
        self._buffer: Any = None
        self._flush_us = 0.0
        if l2_bytes and not self._large:
            self._buffer = torch.zeros(512, 2 * l2_bytes // 2048, device="cuda")
            self._sums = torch.zeros(512, device="cuda")

    def rotations(self, active_bytes: int) -> int:
        """Enough to cycle through `COLD` times the L2; one where nothing is gained or the buffer does it."""
        if not self._large or active_bytes >= self._cold_bytes:
            return 1
        return -(-self._cold_bytes // max(active_bytes, 1))

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Runs each call once eagerly, then captures them.

        Raises:
            Exception: whatever a call raises, also under capture (a host sync, for example).
        """
        cuda = self._torch.cuda
        cuda.synchronize()  # inputs were made on another stream
        with cuda.stream(self._stream):
            for call in calls:
                call()
            self._stream.synchronize()
        if not self._warm:
            self._warm_up(calls)
        once = -(-2 // len(calls)) * len(calls)
        graph = self._capture(calls, once)
        us = min(self._replay(graph, once, 2))
        wanted = min(max(2, round(self._target_us / us)), MAX_REPEATS)
        repeats = -(-wanted // len(calls)) * len(calls)
        if repeats > 1.5 * once:
            short, graph, once = graph, self._capture(calls, repeats), repeats
            # Only now: a pool whose last graph is gone cannot be captured into again.
            self._graphs.remove(short)
            short.reset()
        return _Captured(self, graph, once)

    def release(self) -> None:
        """Drops every graph and the pool; the next `prepare` starts a new one."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None
        self._torch.cuda.empty_cache()

    def time(self, call: Call) -> Measurement:
        """Three rounds of one call."""
        try:
            timed = self.prepare([call])
            return Measurement.of([us for _ in range(3) for us in timed.sample()])
        finally:
            self.release()

    def fault(self) -> str | None:
        """Asks the device to do a little work; a lost context answers with the error that lost it."""
        try:
            self._torch.cuda.synchronize()
            self._torch.ones(1, device="cuda").item()
        except self._torch.OutOfMemoryError:  # too little memory is no lost context
            return None
        except Exception as error:
            return str(error).splitlines()[0]
        return None

    def provenance(self) -> dict[str, Any]:
        """Name, settings, versions, and the most memory that torch has held since the timer was made."""
        found: dict[str, Any] = {"timer": self.name, "replays": self._replays, "flushed": self._buffer is not None}
        for package in ("torch", "triton"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(package)
        found["peak_bytes"] = self._torch.cuda.max_memory_allocated()
        return found

    def _warm_up(self, calls: Sequence[Call]) -> None:
        """Once: raises the clocks, by replays of the first thing to be timed, and times the flush."""
        graph = self._capture(calls, 2 * len(calls))
        end = time.monotonic() + self._warm_s
        while time.monotonic() < end:
            self._replay(graph, 1, 10)
        if self._buffer is not None:
            flush = self._capture([lambda: None], 20)
            self._flush_us = float(np.median(self._replay(flush, 20, 15)))
        self._warm = True

    def _capture(self, calls: Sequence[Call], repeats: int) -> Any:
        """A graph of `repeats` launches in turn over `calls`, each behind a flush where there is a buffer."""
        torch = self._torch
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it empties the allocator's cache each time, which costs more than the capture.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                for i in range(repeats):
                    if self._buffer is not None:
                        torch.sum(self._buffer, dim=1, out=self._sums)
                    calls[i % len(calls)]()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        self._graphs.append(graph)
        return graph

    def _abandon(self, graph: Any) -> None:
        """Takes the stream out of capture mode after a call has raised, and frees what was captured."""
        try:
            graph.capture_end()
            graph.reset()
        except Exception:
            # A forbidden call has broken the capture. torch still counts it as under way, and the next
            # `empty_cache` would fail on it; its host allocator goes on referring to the graph, so that is kept.
            device = self._torch.cuda.current_device()
            with contextlib.suppress(Exception):
                self._torch._C._cuda_endAllocateToPool(device, self._pool)
                self._torch._C._cuda_releasePool(device, self._pool)
            self._broken.append(graph)
        if not self._graphs:  # see `prepare`
            self._pool = None

    def _replay(self, graph: Any, repeats: int, samples: int) -> list[float]:
        """Microseconds of one launch, one value a replay."""
        cuda = self._torch.cuda
        marks = [cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        with cuda.stream(self._stream):
            for mark in marks:
                graph.replay()
                mark.record()
            marks[-1].synchronize()
        # The first replay is left out: the GPU idles in it until the host has launched the graph.
        spans = [a.elapsed_time(b) * 1e3 / repeats for a, b in itertools.pairwise(marks)]
        return [max(span - self._flush_us, 0.01) for span in spans]


@attrs.frozen
class _Captured:
    timer: GraphTimer
    graph: Any
    repeats: int

    def sample(self) -> list[float]:
        return self.timer._replay(self.graph, self.repeats, self.timer._replays)


def default_timer(device: Device, shape: MoEShape, *, simulated: bool = True) -> Timer:
    """A `GraphTimer` where torch has a GPU and `device` is not the simulated one.

    Args:
        simulated: whether the kernel says itself that it is simulated, and so gets a `ReturnTimer`; without a GPU one
            that does not gets a `HostTimer`.

    Raises:
        DeviceFault: the GPU cannot be used.
    """
    if device.name != "simulated":
        import torch

        if torch.cuda.is_available():
            try:
                return GraphTimer(device.l2_bytes, shape.weight_bytes)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                text = str(error).strip().splitlines()[0]
                raise DeviceFault(
                    f"the GPU cannot be used ({text}); end what else runs on it, or choose another."
                ) from error
    return ReturnTimer() if simulated else HostTimer()
