"""FlashInfer's one-sided dispatch and combine, called without FlashInfer's Python. Part of `ep_rivals.py`.

Its workspace is one mapping of every rank's memory, at equal distances, made with fabric handles or descriptors taken from
other processes, which containers forbid. But its launchers take a pointer for each rank, so torch's symmetric memory serves
as well. They are C++ functions of a library made from the sources in FlashInfer's wheel (0.7.2.post1), D its `flashinfer/data`:

    nvcc -O3 -std=c++17 -arch=sm_90a -shared -Xcompiler -fPIC -DENABLE_BF16 -I D/include -I D/csrc -I D/csrc/nv_internal \\
        -I D/csrc/nv_internal/include -o libflashinfer_a2a.so \\
        D/csrc/nv_internal/tensorrt_llm/kernels/communicationKernels/moeAlltoAllKernels.cu \\
        D/csrc/nv_internal/cpp/common/{envUtils,tllmException,logger,stringUtils}.cpp

The structures below are what its header of that version declares. Other versions have others: results are checked.
"""

import ctypes
import pathlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from ep_mapped import ALIGNED, Mapped

MOST_RANKS, MOST_PAYLOADS = 64, 6
BF16, LINEAR = 7, 2
"Of its enumerations: the type of sums, and how scales of a quantised output would lie."
_SPACE = "_ZN12tensorrt_llm7kernels12moe_alltoall"
_P = ctypes.c_void_p


class _Payload(ctypes.Structure):
    _fields_ = (("source", _P), ("element_bytes", ctypes.c_int), ("elements", ctypes.c_int))


class _Dispatch(ctypes.Structure):
    _fields_ = (
        ("overlaps", ctypes.c_bool),
        *((name, ctypes.c_int) for name in ("ranks", "rank", "num_experts", "tokens", "most_tokens", "top_k")),
        ("workspace", _P),
        ("stride", ctypes.c_uint64),
        ("topk_ids", _P),
        ("num_payloads", ctypes.c_int),
        ("payloads", _Payload * MOST_PAYLOADS),
        *((name, _P) for name in ("epoch", "done", "sent", "targets", "places")),
        ("received", _P * MOST_RANKS),
        ("flags", _P * MOST_RANKS),
        ("rows", _P * MOST_PAYLOADS * MOST_RANKS),
        ("balances", ctypes.c_bool),
        ("num_balanced", ctypes.c_int),
        ("balanced", _P),
        ("gathered", _P * MOST_RANKS),
        ("masks", ctypes.c_bool),
        ("mask", ctypes.c_uint64),
        ("stream", _P),
    )


class _Combine(ctypes.Structure):
    _fields_ = (
        ("overlaps", ctypes.c_bool),
        *((name, ctypes.c_int) for name in ("ranks", "rank", "tokens", "most_tokens", "top_k")),
        ("workspace", _P),
        ("stride", ctypes.c_uint64),
        ("low_precision", ctypes.c_bool),
        ("copied", _P),
        ("quantises", ctypes.c_uint32),
        ("swizzles", ctypes.c_uint32),
        *((name, _P) for name in ("out", "partial", "scales")),
        ("scale", ctypes.c_float),
        ("columns", ctypes.c_int),
        ("dtype", ctypes.c_int32),
        *((name, _P) for name in ("epoch", "targets", "places", "received")),
        ("flags", _P * MOST_RANKS),
        ("rows", _P * MOST_RANKS),
        ("masks", ctypes.c_bool),
        ("mask", ctypes.c_uint64),
        ("stream", _P),
    )


class OneSided:
    """Rows of one size among the ranks of a group, in memory of its own.

    Args:
        library: made as above.
        group: of the ranks.
        most_tokens: of a rank.
        num_experts, top_k: of the layer; each rank owns an equal run of experts.
        row_bytes, sum_bytes: most of all fields of a token together, and of its sum.
        device: of this rank.
    """

    def __init__(
        self,
        library: pathlib.Path,
        group: dist.ProcessGroup,
        most_tokens: int,
        num_experts: int,
        top_k: int,
        row_bytes: int,
        sum_bytes: int,
        device: torch.device,
    ) -> None:
        loaded = ctypes.CDLL(str(library))
        self._calls = {}
        for phase, kind in (("dispatch", "Dispatch"), ("combine", "Combine")):
            names = [f"moe_a2a_prepare_{phase}_launch", f"moe_a2a_{phase}_launch"]
            for name in names:
                call = getattr(loaded, f"{_SPACE}{len(name)}{name}ERKNS1_{len(kind) + 12}MoeA2A{kind}ParamsE")
                call.restype = None
                self._calls[name] = call
        self.num_experts, self.top_k = num_experts, top_k
        ranks = dist.get_world_size(group)
        slots = ranks * most_tokens
        sizes = {
            **dict.fromkeys(("sent", "received", "dispatch_flags", "combine_flags"), 4 * ranks),
            **dict.fromkeys(("epoch", "done"), 4),
            **dict.fromkeys(("targets", "places"), 4 * most_tokens * top_k),
            "rows": slots * row_bytes + MOST_PAYLOADS * ALIGNED,
            "y": slots * sum_bytes,
        }
        self.mapped = Mapped(group, sizes, device)
        self.rank, self.ranks = self.mapped.rank, ranks

    def _everywhere(self, name: str) -> "ctypes.Array[_P]":
        return (_P * MOST_RANKS)(*self.mapped.everywhere(name))

    def rows(self, fields: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What was received of each field: [ranks, T, ...]; of a source only as many rows as "received" says."""
        tokens = len(fields[0])
        its = zip(fields, self._offsets(fields), strict=True)
        return [self.mapped.view("rows", x.dtype, self.ranks, tokens, *x.shape[1:], offset=offset) for x, offset in its]

    def _offsets(self, fields: Sequence[torch.Tensor]) -> list[int]:
        found, end = [], 0
        for its in fields:
            found.append(end)
            end += -(-self.ranks * its.nbytes // ALIGNED) * ALIGNED
        return found

    def dispatch(self, topk_ids: torch.Tensor, fields: Sequence[torch.Tensor]) -> None:
        """Two launches. Fields are [T, n], contiguous; the order of rows from a source differs from call to call."""
        tokens = len(topk_ids)
        its = _Dispatch(
            overlaps=True,
            ranks=self.ranks,
            rank=self.rank,
            num_experts=self.num_experts,
            tokens=tokens,
            most_tokens=tokens,
            top_k=self.top_k,
            topk_ids=topk_ids.data_ptr(),
            num_payloads=len(fields),
            received=self._everywhere("received"),
            flags=self._everywhere("dispatch_flags"),
            mask=(1 << 64) - 1,
            stream=torch.cuda.current_stream().cuda_stream,
            **{name: self.mapped.here(name) for name in ("epoch", "done", "sent", "targets", "places")},
        )
        for place, (field, offset) in enumerate(zip(fields, self._offsets(fields), strict=True)):
            its.payloads[place] = _Payload(field.data_ptr(), field.dtype.itemsize, field[0].numel())
            for rank, base in enumerate(self.mapped.everywhere("rows")):
                its.rows[rank][place] = base + offset
        self._launch("dispatch", its)

    def combine(self, out: torch.Tensor) -> None:
        """Two launches; the sums of this rank's experts stand in `y` already: bf16 [ranks, T, H]."""
        tokens = len(out)
        its = _Combine(
            overlaps=True,
            ranks=self.ranks,
            rank=self.rank,
            tokens=tokens,
            most_tokens=tokens,
            top_k=self.top_k,
            swizzles=LINEAR,
            out=out.data_ptr(),
            scale=1.0,
            columns=out.shape[1],
            dtype=BF16,
            flags=self._everywhere("combine_flags"),
            rows=self._everywhere("y"),
            mask=(1 << 64) - 1,
            stream=torch.cuda.current_stream().cuda_stream,
            **{name: self.mapped.here(name) for name in ("epoch", "targets", "places", "received")},
        )
        self._launch("combine", its)

    def _launch(self, phase: str, its: ctypes.Structure) -> None:
        for name in (f"moe_a2a_prepare_{phase}_launch", f"moe_a2a_{phase}_launch"):
            self._calls[name](ctypes.byref(its))
