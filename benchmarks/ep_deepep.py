"""DeepEP V1's intranode dispatch and combine, called without its Python. Part of `ep_rivals.py`.

Its normal kernels, made for prefill; those of low latency need NVSHMEM's headers. As engines capture them: `num_worst_tokens`, so
that no count is read on the host, and its recommended configs. Its buffers are mapped by CUDA IPC; torch's symmetric memory serves
as well. The library is made from commit 567632d, whose kernels need no torch:

    nvcc -O3 -std=c++17 -arch=sm_90 --expt-relaxed-constexpr -shared -Xcompiler -fPIC -DDISABLE_NVSHMEM \\
        -DDISABLE_AGGRESSIVE_PTX_INSTRS -I csrc -o libdeepep.so csrc/kernels/intranode.cu csrc/kernels/layout.cu
"""

import ctypes
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from ep_mapped import Mapped

NUM_SMS, RECEIVED_AT_ONCE = 20, 256
SENT_AT_ONCE = {2: (24, 10), 4: (6, 9), 8: (6, 4)}
"Rows of dispatch and of combine by ranks: its `get_dispatch_config` and `get_combine_config`."
CHANNELS = NUM_SMS // 2
BF16 = 14
"cudaDataType_t"
_CALLS = {
    "layout": "_ZN7deep_ep6layout19get_dispatch_layoutEPKlPiS3_S3_PbiiiiP11CUstream_st",
    "notify": "_ZN7deep_ep9intranode15notify_dispatchEPKiPiiS2_S3_iiPKbS3_S3_iiPPvPS3_iP11CUstream_sti",
    "dispatch": "_ZN7deep_ep9intranode8dispatchEPvPfPiPlS2_S3_S3_PKvPKfPKlS8_PKbPKiiiiiiiiiPS1_iiP11CUstream_stiii",
    "notify_combine": "_ZN7deep_ep9intranode21cached_notify_combineEPPvPiiiiPS3_iiP11CUstream_st",
    "combine": "_ZN7deep_ep9intranode7combineE14cudaDataType_tPvPfPKvPKfS5_S5_PKiS9_S9_PiiiiiPS2_iiP11CUstream_stiii",
}


class Intranode:
    """Rows among the ranks of a group, in memory of its own.

    Args:
        library: made as above.
        group: of the ranks.
        num_experts, top_k: of the layer; each rank owns an equal run of experts.
        row_bytes: most of a row, with its scales.
        device: of this rank.
    """

    def __init__(
        self,
        library: pathlib.Path,
        group: dist.ProcessGroup,
        num_experts: int,
        top_k: int,
        row_bytes: int,
        device: torch.device,
    ) -> None:
        loaded = ctypes.CDLL(str(library))
        self._calls = {name: getattr(loaded, its) for name, its in _CALLS.items()}
        for call in self._calls.values():
            call.restype = None
        self.num_experts, self.top_k, self.device = num_experts, top_k, device
        ranks = dist.get_world_size(group)
        slots = CHANNELS * ranks * RECEIVED_AT_ONCE
        size = slots * (row_bytes + 12 * top_k + 8) + 4 * ranks * (ranks + 8 * CHANNELS + num_experts)
        self._mapped = Mapped(group, {"buffer": size, "signals": 4 * ranks}, device)
        self.rank, self.ranks = self._mapped.rank, ranks
        self._pointers = torch.tensor(
            [self._mapped.everywhere("buffer"), self._mapped.everywhere("signals")], dtype=torch.int64, device=device
        )

    def of(self, topk_ids: torch.Tensor, fields: Sequence[torch.Tensor]) -> "Step":
        """Memory for steps of one size; fields are rows, scales where rows are e4m3, and weights."""
        return Step(self, topk_ids, fields)

    def call(self, name: str, *given: Any) -> None:
        """Numbers as int, tensors and None as pointers, the stream after "stream"."""
        arguments = []
        for its in given:
            if its is None or isinstance(its, torch.Tensor):
                arguments.append(ctypes.c_void_p(None if its is None else its.data_ptr()))
            elif its == "stream":
                arguments.append(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
            else:
                arguments.append(ctypes.c_int(its))  # type: ignore[arg-type]
        self._calls[name](*arguments)

    @property
    def buffers(self) -> torch.Tensor:
        return self._pointers[0]

    @property
    def signals(self) -> torch.Tensor:
        return self._pointers[1]


class Step:
    """One dispatch and its combine.

    Attributes:
        rows, scales: of all sources one after the other, [ranks * T, ...]; as many as `count` says are there.
        ids: int64 [ranks * T, top_k], local, -1 for experts of other ranks and behind the last row.
        weights: float32 like `ids`.
    """

    def __init__(self, its: Intranode, topk_ids: torch.Tensor, fields: Sequence[torch.Tensor]) -> None:
        self._its, self._sent = its, fields
        rows, *scales, _ = fields
        tokens, most = len(rows), its.ranks * len(rows)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=its.device)

        self._ids = topk_ids.long().contiguous()
        self._per_rank, self._per_expert = ints(its.ranks), ints(its.num_experts)
        self._reached = torch.zeros(tokens, its.ranks, dtype=torch.bool, device=its.device)
        self._count, self._counts = ints(1), ints(its.num_experts)
        self._by_rank, self._by_channel = ints(its.ranks, its.ranks), ints(its.ranks, CHANNELS)
        self._sources, self._received_by_channel = ints(most), ints(its.ranks, CHANNELS)
        self._head = ints(tokens, its.ranks)
        self.rows = rows.new_zeros(most, rows.shape[1])
        self.scales = [x.new_zeros(most, x.shape[1]) for x in scales]
        self.ids = self._ids.new_zeros(most, its.top_k)
        self.weights = torch.zeros(most, its.top_k, device=its.device)

    @property
    def count(self) -> int:
        """Rows received."""
        return int(self._count)

    def dispatch(self) -> None:
        """Three launches: who goes where, counts, rows."""
        its, (rows, *scales, weights) = self._its, self._sent
        tokens, columns = len(rows), scales[0].shape[1] if scales else 0
        # Behind the matrix of ranks: the counts of experts, and starts, ends, heads and tails of channels.
        cleared = CHANNELS * its.ranks * 4
        its.call(
            *("layout", self._ids, self._per_rank, None, self._per_expert, self._reached),
            *(tokens, its.top_k, its.ranks, its.num_experts, "stream"),
        )
        its.call(
            *(
                "notify",
                self._per_rank,
                self._count,
                its.ranks,
                self._per_expert,
                self._counts,
                its.num_experts,
                tokens,
            ),
            *(self._reached, self._by_channel, self._by_rank, cleared, 1, its.buffers, its.signals),
            *(its.rank, "stream", CHANNELS),
        )
        its.call(
            *("dispatch", self.rows, self.scales[0] if scales else None, self._sources, self.ids, self.weights),
            *(self._received_by_channel, self._head, rows, scales[0] if scales else None, self._ids, weights),
            *(self._reached, self._by_channel, tokens, its.ranks * tokens, rows[0].nbytes // 16, its.top_k),
            *(its.num_experts, columns, columns, 1 if scales else 0, its.buffers, its.rank, its.ranks, "stream"),
            *(NUM_SMS, SENT_AT_ONCE[its.ranks][0], RECEIVED_AT_ONCE),
        )

    def combine(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """Two launches; y is bf16 [ranks * T, H]."""
        its, tokens = self._its, len(out)
        its.call(
            *("notify_combine", its.buffers, self._head, CHANNELS, tokens, CHANNELS * its.ranks * 2, its.signals),
            *(its.rank, its.ranks, "stream"),
        )
        its.call(
            *("combine", BF16, out, None, y, None, None, None, self._sources, self._by_rank),
            *(self._received_by_channel, self._head, len(y), tokens, out.shape[1], 0, its.buffers),
            *(its.rank, its.ranks, "stream", NUM_SMS, SENT_AT_ONCE[its.ranks][1], RECEIVED_AT_ONCE),
        )
