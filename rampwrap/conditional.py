"""A conditional SWITCH node in the CUDA graph under capture: one of several captured bodies runs, chosen on the GPU.

About 9 us a node whatever the number of bodies (measured on an H200), and any code that can be captured may be a
body. Needs CUDA 12.8 or later, driver and `cuda-bindings` both.
"""

import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampwrap.errors import CaptureError, InputError

LEAST = 12080
"Driver version that knows SWITCH nodes."

# The declaration is left out of NVRTC's built-in header, the function is not.
_SOURCE = rb"""
extern "C" __device__ __cudart_builtin__ void CUDARTAPI cudaGraphSetConditional(
    cudaGraphConditionalHandle handle, unsigned int value);
extern "C" __global__ void set_choice(cudaGraphConditionalHandle handle, const int* choice) {
    cudaGraphSetConditional(handle, (unsigned int)*choice);
}
"""


def require() -> None:
    """Whether SWITCH nodes can be made here.

    Raises:
        InputError: no GPU, no `cuda-bindings`, or either too old.
    """
    if not torch.cuda.is_available():
        raise InputError("mode 'switch' needs a GPU; use 'eager' without one.")
    try:
        driver = _driver()
    except ImportError as error:
        raise InputError(
            f"mode 'switch' needs cuda-bindings 12.8 or later ({error}); install it or use early-exit."
        ) from error
    found = _checked(driver.cuDriverGetVersion())
    if found < LEAST or not hasattr(driver.CUgraphConditionalNodeType, "CU_GRAPH_COND_TYPE_SWITCH"):
        raise InputError(
            f"mode 'switch' needs CUDA 12.8, the driver has {found // 1000}.{found % 1000 // 10} and cuda-bindings may be "
            "older; update both or use early-exit."
        )


def switch(choice: torch.Tensor, bodies: Sequence[Callable[[], Any]], pools: list[Any]) -> Any:
    """Adds a node to the graph under capture on the current stream, which runs ``bodies[choice]`` at every replay.

    Args:
        choice: int32 [1] on the device, below len(bodies); above it nothing runs.
        bodies: each captured once; what the first returns is returned, so all must write to the same tensors.
        pools: keeps the memory that bodies allocate; it must live as long as the graph.

    Raises:
        CaptureError: nothing is being captured on the current stream.
    """
    driver = _driver()
    stream = torch.cuda.current_stream()
    status, _, graph, *_ = _checked(driver.cuStreamGetCaptureInfo(stream.cuda_stream))
    if status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:
        raise CaptureError("a SWITCH node was asked for outside a capture; launch the chosen body instead.")
    context = _checked(driver.cuCtxGetCurrent())
    handle = _checked(driver.cuGraphConditionalHandleCreate(graph, context, 0, driver.CU_GRAPH_COND_ASSIGN_DEFAULT))
    arguments = ((int(handle), choice.data_ptr()), (ctypes.c_uint64, ctypes.c_void_p))
    _checked(driver.cuLaunchKernel(prepare(choice.device.index), 1, 1, 1, 1, 1, 1, 0, stream.cuda_stream, arguments, 0))

    params = driver.CUgraphNodeParams()
    params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    params.conditional.handle = handle
    params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
    params.conditional.size = len(bodies)
    params.conditional.ctx = context
    # The dependencies come with or without edge data, by version; both go back as they came.
    _, _, graph, *dependencies, count = _checked(driver.cuStreamGetCaptureInfo(stream.cuda_stream))
    node = _checked(driver.cuGraphAddNode(graph, *dependencies, count, params))
    replaced = [[node], *[None] * (len(dependencies) - 1)]
    flag = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
    _checked(driver.cuStreamUpdateCaptureDependencies(stream.cuda_stream, *replaced, 1, flag))

    result = None
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    for place, body in enumerate(bodies):
        pool, side = torch.cuda.MemPool(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        pools.append(pool)
        into = params.conditional.phGraph_out[place]
        with torch.cuda.stream(side), torch.cuda.use_mem_pool(pool):
            _checked(driver.cuStreamBeginCaptureToGraph(side.cuda_stream, into, None, None, 0, mode))
            try:
                returned = body()
            finally:
                _checked(driver.cuStreamEndCapture(side.cuda_stream))
        result = returned if place == 0 else result
    return result


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


@functools.cache
def prepare(device: int) -> Any:
    """The kernel that hands a choice to a node; compiled and loaded once for each device, not under capture."""
    driver, nvrtc = _driver(), importlib.import_module("cuda.bindings.nvrtc")
    major, minor = torch.cuda.get_device_capability(device)
    program = _checked(nvrtc.nvrtcCreateProgram(_SOURCE, b"set_choice.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
    (compiled,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(compiled):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise InputError(
            f"mode 'switch' cannot compile its kernel ({log.decode().strip()[:300]}); update CUDA's NVRTC."
        )
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    module = _checked(driver.cuModuleLoadData(cubin))
    return _checked(driver.cuModuleGetFunction(module, b"set_choice"))


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a CUDA call returns besides its error code."""
    error, *values = answer
    if int(error):
        raise RuntimeError(f"{error.__class__.__name__}: {error.name} in a SWITCH node; use early-exit instead.")
    return values[0] if len(values) == 1 else tuple(values)
