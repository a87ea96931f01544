"""NCCL EP's dispatch and combine of low latency, called without its Python. Part of `ep_rivals.py`.

A row comes once to each rank that owns one of its experts, with ids and weights: the layout by ranks, the nearest to ours. It
needs NCCL 2.30, torch 2.11 brings 2.28.9, and of two in one process one is asked for the other's communicators. So processes
are begun with the newer one loaded first (`environment`), and torch takes it for its own. FOLDER is made by

    pip install --no-deps --target FOLDER nccl-extensions==0.1.0 nvidia-nccl-cu13==2.30.7

Its kernels are compiled where they run, by nvcc, 3 to 5 seconds for each row and dtype. The structures below are what the header
of that version declares, which calls itself 0.2.0; each begins with its size and a mark, and the library refuses others.
"""

import ctypes
import os
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

OLDEST = 23000
"The oldest NCCL that serves: 2.30."
SYMMETRIC, RANK_MAJOR, GLOBAL_IDS, FORWARDED_SCALES = 1, 2, 2, 1
"Of its enumerations. Its algorithm of low latency is 0."
DTYPES = {torch.int32: 2, torch.float32: 7, torch.bfloat16: 9, torch.float8_e4m3fn: 10}
WAIT_MS = 30_000
"A kernel that waits longer for a peer ends, and its process with it: compiling may keep peers apart."
_P, _U = ctypes.c_void_p, ctypes.c_uint


def environment(folder: pathlib.Path) -> dict[str, str]:
    """What processes must be begun with.

    Args:
        folder: as made above.
    """
    return {
        "LD_PRELOAD": str(folder / "nvidia/nccl/lib/libnccl.so.2"),
        "NCCL_HOME": str(folder / "nvidia/nccl"),
        "NCCL_EP_HOME": str(folder / "nccl/ep"),
        "NCCL_EP_TIMEOUT_MS": str(WAIT_MS),
        "NCCL_CUMEM_ENABLE": "1",
    }


class _Marked(ctypes.Structure):
    """Begins with its size and a mark."""

    MARK = 0xC00FFFEE

    def __init__(self, **given: Any) -> None:
        super().__init__(size=ctypes.sizeof(self), mark=self.MARK, **given)


class _Tensor(_Marked):
    MARK = 0xCAFECAFE
    _fields_ = (
        *((name, _U) for name in ("size", "mark", "dimensions", "dtype")),
        *((name, _P) for name in ("data", "window")),
        ("offset", ctypes.c_uint64),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
    )


_T = ctypes.POINTER(_Tensor)


class _Group(_Marked):
    _fields_ = (
        *((name, _U) for name in ("size", "mark", "version", "algorithm", "num_experts")),
        *((name, _U) for name in ("most_tokens", "most_received", "token_bytes")),
        ("buffer_bytes", ctypes.c_ulong),
        *((name, _U) for name in ("queues", "channels", "num_sms")),
        *((name, _P) for name in ("allocates", "frees", "context")),
        ("masks", _U),
        ("wait_ns", ctypes.c_uint64),
        *((name, _U) for name in ("in_place", "overflow", "top_k", "padding")),
    )


class _Layout(_Marked):
    _fields_ = (
        *((name, _U) for name in ("size", "mark")),
        *((name, _T) for name in ("by_expert", "by_rank", "offsets", "total")),
        *((name, _U) for name in ("ids", "padding")),
    )


class _Sent(_Marked):
    _fields_ = (*((name, _U) for name in ("size", "mark")), *((name, _T) for name in ("rows", "weights", "scales")))


class _Received(_Marked):
    _fields_ = (
        *((name, _U) for name in ("size", "mark")),
        *((name, _T) for name in ("rows", "weights", "scales", "ids")),
    )


class _Given(_Marked):
    _fields_ = (*((name, _U) for name in ("size", "mark")), *((name, _T) for name in ("rows", "weights", "scales")))


class _Sums(_Marked):
    _fields_ = (*((name, _U) for name in ("size", "mark")), *((name, _T) for name in ("rows", "weights")))


class _Dispatch(_Marked):
    _fields_ = tuple((name, _U) for name in ("size", "mark", "send_only", "rounds", "backward", "scales"))


class _Id(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_byte * 128),)


class LowLatency:
    """Rows among the ranks of a group, in memory and with a communicator of its own.

    Args:
        folder: made as above; this process was begun with its `environment`.
        group: of the ranks.
        device: of this rank.
        most_tokens: of a rank.
        num_experts, top_k: of the layer; each rank owns an equal run of experts.
        row_bytes: most of a row, with its scales, and of a sum.
        in_place: rows are written where they are wanted, in a window of memory that every rank knows; else copied there.

    Raises:
        RuntimeError: an older NCCL is loaded, or NCCL refuses.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        most_tokens: int,
        num_experts: int,
        top_k: int,
        row_bytes: int,
        in_place: bool,
    ) -> None:
        # What children of this process compile with has no use for it.
        os.environ.pop("LD_PRELOAD", None)
        self._nccl = ctypes.CDLL("libnccl.so.2")
        self._nccl.ncclGetErrorString.restype = self._nccl.ncclGetLastError.restype = ctypes.c_char_p
        version = ctypes.c_int()
        self._ask(self._nccl, "ncclGetVersion", ctypes.byref(version))
        if version.value < OLDEST:
            raise RuntimeError(f"NCCL {version.value} is loaded and not the one of {folder}: begin with `environment`")
        self._library = ctypes.CDLL(str(folder / "nccl/ep/lib/cu13/libnccl_ep.so"))
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.most_tokens, self.top_k, self.device = most_tokens, top_k, device
        self._communicator, self._group, self.handle = _P(), _P(), _P()
        self._join(group)
        its = _Group(
            version=2,
            num_experts=num_experts,
            most_tokens=most_tokens,
            token_bytes=row_bytes,
            wait_ns=WAIT_MS * 1_000_000,
        )
        self.call("CreateGroup", ctypes.byref(self._group), self._communicator, ctypes.byref(its))
        self.call("InitHandle", ctypes.byref(self.handle), self._group, RANK_MAJOR, None, top_k, None)
        self.window = _P()
        slots = self.ranks * most_tokens
        self.memory = self._mapped(slots * row_bytes, in_place)
        self.ids = torch.zeros(self.ranks, most_tokens, top_k, dtype=torch.int32, device=device)
        self.weights = torch.zeros(self.ids.shape, device=device)
        self.counts = torch.zeros(self.ranks, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)

    def of(self, topk_ids: torch.Tensor, fields: Sequence[torch.Tensor]) -> "Step":
        """A step of one size; fields are rows, scales where rows are e4m3, and weights."""
        return Step(self, topk_ids, fields)

    def call(self, name: str, *given: Any) -> None:
        """A function of its library; "stream" is the one of torch.

        Raises:
            RuntimeError: what NCCL says.
        """
        stream = _P(torch.cuda.current_stream().cuda_stream)
        self._ask(self._library, f"ncclEp{name}", *(stream if its == "stream" else its for its in given))

    def _ask(self, library: ctypes.CDLL, name: str, *given: Any) -> None:
        result = getattr(library, name)(*given)
        if result:
            said = [self._nccl.ncclGetErrorString(result), self._nccl.ncclGetLastError(None)]
            raise RuntimeError(f"{name}: {', '.join(its.decode() for its in said if its)}")

    def _join(self, group: dist.ProcessGroup) -> None:
        """A communicator of the ranks: the first one's mark goes to all."""
        its = _Id()
        if not self.rank:
            self._ask(self._nccl, "ncclGetUniqueId", ctypes.byref(its))
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, bytes(its), group=group)
        its = _Id.from_buffer_copy(every[0])
        self._ask(self._nccl, "ncclCommInitRank", ctypes.byref(self._communicator), self.ranks, its, self.rank)

    def _mapped(self, size: int, in_place: bool) -> torch.Tensor:
        """Bytes; in a window that every rank knows, or of this rank alone."""
        if not in_place:
            return torch.zeros(size, dtype=torch.uint8, device=self.device)
        pointer, size = _P(), -(-size // 4096) * 4096
        self._ask(self._nccl, "ncclMemAlloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        given = (self._communicator, pointer, ctypes.c_size_t(size), ctypes.byref(self.window), SYMMETRIC)
        self._ask(self._nccl, "ncclCommWindowRegister", *given)
        if not self.window:
            raise RuntimeError("ncclCommWindowRegister: this NCCL makes no window of memory here")

        class Memory:
            __cuda_array_interface__: ClassVar = {
                "shape": (size,),
                "typestr": "|u1",
                "data": (pointer.value, False),
                "version": 3,
            }

        return torch.as_tensor(Memory(), device=self.device).zero_()


class Step:
    """One dispatch and its combine.

    Attributes:
        rows, scales: of all sources, [ranks, most_tokens, ...]; of a source as many as `LowLatency.counts` says.
    """

    def __init__(self, its: LowLatency, topk_ids: torch.Tensor, fields: Sequence[torch.Tensor]) -> None:
        self._its, self._kept = its, [topk_ids, *fields]
        rows, *more, weights = fields
        self.rows = self._of_all(rows, 0)
        self.scales = [self._of_all(x, self.rows.nbytes) for x in more]
        self._ids = self._tensor(topk_ids)
        self._sent = _Sent(rows=self._at(rows), weights=self._at(weights))
        self._received = _Received(
            rows=self._at(self.rows, offset=0), weights=self._at(its.weights), ids=self._at(its.ids)
        )
        for sent, received in zip(more, self.scales, strict=True):
            self._sent.scales, self._received.scales = self._at(sent), self._at(received, offset=self.rows.nbytes)
        self._layout = _Layout(by_rank=self._at(its.counts), ids=GLOBAL_IDS)
        self._config = _Dispatch(scales=FORWARDED_SCALES if more else 0)

    def dispatch(self) -> None:
        """One launch. The order of rows from a source differs from call to call."""
        handle = self._its.handle
        self._its.call("UpdateHandle", handle, ctypes.byref(self._ids), None, "stream")
        given = [ctypes.byref(its) for its in (self._sent, self._received, self._layout, self._config)]
        self._its.call("Dispatch", handle, *given, "stream")

    def combine(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """One launch; y is bf16 [ranks, most_tokens, H], out [T, H]."""
        given, sums = _Given(rows=self._at(y)), _Sums(rows=self._at(out))
        self._its.call("Combine", self._its.handle, ctypes.byref(given), ctypes.byref(sums), None, "stream")

    def _of_all(self, x: torch.Tensor, offset: int) -> torch.Tensor:
        shape = (self._its.ranks, self._its.most_tokens, x.shape[1])
        size = int(torch.Size(shape).numel()) * x.itemsize
        return self._its.memory[offset : offset + size].view(x.dtype).view(shape)

    def _at(self, x: torch.Tensor, offset: int | None = None) -> Any:
        return ctypes.pointer(self._tensor(x, offset))

    def _tensor(self, x: torch.Tensor, offset: int | None = None) -> _Tensor:
        """Descriptions keep no tensor alive; with an offset it lies there in the window, where there is one."""
        window = None if offset is None else self._its.window.value
        return _Tensor(
            dimensions=x.dim(),
            dtype=DTYPES[x.dtype],
            data=x.data_ptr(),
            window=window,
            offset=(offset or 0) if window else 0,
            sizes=(ctypes.c_size_t * x.dim())(*x.shape),
        )
