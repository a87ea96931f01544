"""What every figure is filed with, and how calls are timed beside each other."""

import ctypes
import datetime
import importlib.metadata
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rampwrap.kernel.device import Device
from rampwrap.measure.timer import Measurement, Timer


def stamp() -> dict[str, Any]:
    """Command, date, commit, GPU and versions of a run."""
    root = pathlib.Path(__file__).parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
        commit = said.stdout.strip()
    except OSError:
        commit = ""
    versions = {}
    for name in ("torch", "triton", "vllm", "sglang"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": Device.current().label,
        "versions": versions,
    }


def geometric_mean(values: Any) -> float:
    """Of positive numbers, at least one."""
    return float(np.exp(np.log(np.asarray(values, dtype=float)).mean()))


def interleaved(timer: Timer, calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int) -> dict[str, float]:
    """Median microseconds of each, sampled in turn."""
    try:
        ready = {name: timer.prepare(some) for name, some in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, timed in ready.items():
                samples[name] += timed.sample()
    finally:
        timer.release()
    return {name: Measurement.of(found).us for name, found in samples.items()}


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


NODES = {1: "memcpy", 2: "memset", 3: "host", 4: "graph", 5: "empty", 6: "wait", 7: "record", 13: "conditional"}


def graph_nodes(graph: Any) -> dict[str, list[str]]:
    """What a captured `torch.cuda.CUDAGraph(keep_graph=True)` holds: names of `kernels`, kinds of `others`."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def ask(name: str, *arguments: Any) -> None:
        if status := getattr(cuda, name)(*arguments):
            raise RuntimeError(f"{name} answered {status}")

    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    ask("cuGraphGetNodes", handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    ask("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
    found: dict[str, list[str]] = {"kernels": [], "others": []}
    for node in map(ctypes.c_void_p, nodes):
        kind, its, name = ctypes.c_int(), _KernelNode(), ctypes.c_char_p()
        ask("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value:
            found["others"].append(NODES.get(kind.value, f"kind {kind.value}"))
            continue
        ask("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(its))
        whose = ("cuFuncGetName", its.function) if its.function else ("cuKernelGetName", its.kernel)
        ask(whose[0], ctypes.byref(name), ctypes.c_void_p(whose[1]))
        found["kernels"].append((name.value or b"").decode())
    return found
