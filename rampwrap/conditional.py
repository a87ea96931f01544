"""A conditional SWITCH node in the CUDA graph under capture: one of several captured bodies runs, chosen on the GPU.

Any code that can be captured may be a body. Needs CUDA 12.8 or later, of the driver and of `cuda-bindings`.

The node is added by hand to the graph that torch is capturing, behind a kernel of one thread that hands the choice to
it; each body is captured into the node's own graphs through a stream of its own. That stream must not be one that is
under capture itself: torch hands out 32 streams in turn, so one that is asked for anew for each body sooner or later is
the outer one, and CUDA answers CUDA_ERROR_ILLEGAL_STATE. Hence one stream for all bodies, compared with the outer one.
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
        importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise InputError(
            f"mode 'switch' needs cuda-bindings 12.8 or later ({error}); install it or use early-exit."
        ) from error
    failed, found = driver.cuDriverGetVersion()
    if int(failed) or found < LEAST or not hasattr(driver.CUgraphConditionalNodeType, "CU_GRAPH_COND_TYPE_SWITCH"):
        raise InputError(
            f"mode 'switch' needs CUDA 12.8, the driver has {found // 1000}.{found % 1000 // 10} and cuda-bindings may be "
            "older; update both or use early-exit."
        )


class Switch:
    """Adds SWITCH nodes to graphs that are captured one after the other; owns what their bodies run on.

    Made outside any capture. It keeps the memory that bodies allocate, so it must live as long as the graphs. Bodies of
    one `Switch` share that memory, so graphs with its nodes must not run at the same time.

    Args:
        device: index of the GPU.

    Raises:
        InputError: as `require`, or NVRTC cannot compile the kernel.
    """

    def __init__(self, device: int) -> None:
        require()
        self._kernel = _set_choice(device)
        # Two, so that at least one is not the stream under capture.
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.MemPool()

    def add(self, choice: torch.Tensor, bodies: Sequence[Callable[[], Any]]) -> None:
        """Adds a node to the graph under capture on the current stream; it runs ``bodies[choice]`` at every replay.

        Args:
            choice: int32 [1] on the device; at len(bodies) and above nothing runs.
            bodies: each called once, under capture. All must write their result to the same tensors.

        Raises:
            CaptureError: nothing is being captured on the current stream, or CUDA refused; the message says which call.
        """
        driver, outer = _driver(), torch.cuda.current_stream().cuda_stream
        status, _, graph, *_ = _checked("cuStreamGetCaptureInfo", driver.cuStreamGetCaptureInfo(outer))
        if status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:
            raise CaptureError("a SWITCH node was asked for outside a capture; launch the chosen body instead.")
        context = _checked("cuCtxGetCurrent", driver.cuCtxGetCurrent())
        handle = _checked(
            "cuGraphConditionalHandleCreate",
            driver.cuGraphConditionalHandleCreate(graph, context, 0, driver.CU_GRAPH_COND_ASSIGN_DEFAULT),
        )
        arguments = ((int(handle), choice.data_ptr()), (ctypes.c_uint64, ctypes.c_void_p))
        _checked("cuLaunchKernel", driver.cuLaunchKernel(self._kernel, 1, 1, 1, 1, 1, 1, 0, outer, arguments, 0))
        into = self._add_node(driver, outer, handle, context, len(bodies))
        side = next(stream for stream in self._streams if stream.cuda_stream != outer)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        for graph, body in zip(into, bodies, strict=True):
            # Torch gives a stream under another capture memory that it would hand to others: hence the pool.
            with torch.cuda.stream(side), torch.cuda.use_mem_pool(self._pool):
                started = driver.cuStreamBeginCaptureToGraph(side.cuda_stream, graph, None, None, 0, mode)
                _checked("cuStreamBeginCaptureToGraph", started)
                try:
                    body()
                finally:
                    ended = driver.cuStreamEndCapture(side.cuda_stream)
                _checked("cuStreamEndCapture", ended)

    def _add_node(self, driver: Any, outer: int, handle: Any, context: Any, size: int) -> list[Any]:
        """The empty graphs of a new node, which comes after all that the outer stream has captured."""
        params = driver.CUgraphNodeParams()
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle
        params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        params.conditional.size = size
        params.conditional.ctx = context
        # The dependencies come with or without edge data, by version; both go back as they came.
        info = _checked("cuStreamGetCaptureInfo", driver.cuStreamGetCaptureInfo(outer))
        _, _, graph, *dependencies, count = info
        node = _checked("cuGraphAddNode", driver.cuGraphAddNode(graph, *dependencies, count, params))
        replaced = [[node], *[None] * (len(dependencies) - 1)]
        flag = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        updated = driver.cuStreamUpdateCaptureDependencies(outer, *replaced, 1, flag)
        _checked("cuStreamUpdateCaptureDependencies", updated)
        return [params.conditional.phGraph_out[place] for place in range(size)]


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


@functools.cache
def _set_choice(device: int) -> Any:
    """The kernel that hands a choice to a node; compiled and loaded once for each device, not under capture."""
    driver, nvrtc = _driver(), importlib.import_module("cuda.bindings.nvrtc")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    major, minor = torch.cuda.get_device_capability(device)
    program = _checked("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(_SOURCE, b"set_choice.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
    (compiled,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(compiled):
        log = b" " * _checked("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise InputError(
            f"mode 'switch' cannot compile its kernel ({log.decode().strip()[:300]}); update CUDA's NVRTC."
        )
    cubin = b" " * _checked("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
    _checked("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, cubin))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the context is current from here on
        module = _checked("cuModuleLoadData", driver.cuModuleLoadData(cubin))
        return _checked("cuModuleGetFunction", driver.cuModuleGetFunction(module, b"set_choice"))


def _checked(call: str, answer: tuple[Any, ...]) -> Any:
    """What a CUDA call returns besides its error code."""
    error, *values = answer
    if int(error):
        raise CaptureError(f"{call} answered {error.name} while a SWITCH node was made; use mode early-exit instead.")
    return values[0] if len(values) == 1 else tuple(values)
