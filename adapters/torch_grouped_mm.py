"""torch's own grouped GEMM (`torch.nn.functional.grouped_mm`, bf16) as a kernel with one config: for large batches.

Sort the slots by expert, gather, one grouped GEMM, SwiGLU times the routing weight, another grouped GEMM, and one pass
that adds up the rows of each token. Every size depends on the batch alone and the offsets stay on the GPU, so it can
be captured in a CUDA graph (sm_90; torch's fallback for other GPUs reads the offsets on the host).
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from rampwrap.adapters.layer import LayerKernel, runnable
from rampwrap.errors import InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import Contract, Operands

# The larger of the two tiles that torch's CUTLASS kernel uses on sm_90; it picks one itself.
TILE_M, TILE_N = 128, 256
ALIGNMENT = 8
"Values in 16 bytes of bf16: rows must begin at multiples of it."
CONFIG: Config = {"sort": "stable"}


class TorchGroupedMM(LayerKernel):
    """torch's grouped GEMM around one MoE layer; there is nothing to tune, so it is of use inside a `Portfolio`.

    Raises:
        InputError: this torch has no `grouped_mm`.
        ConfigError: it cannot run this shape.
    """

    name = "torch_grouped_mm"
    version = f"torch {torch.__version__.split('+')[0]}"
    weight_layout = "vllm"
    without = ("w13_scale", "w2_scale", "expert_map")

    def __init__(self, shape: MoEShape) -> None:
        if not hasattr(F, "grouped_mm"):
            raise InputError(f"torch {torch.__version__} has no grouped_mm; install torch 2.10 or later.")
        usable = runnable(self.name, shape, [CONFIG], self.supports)
        super().__init__(shape, usable, Contract(shape, contiguous=False))

    @property
    def capturable(self) -> bool | str:
        """True, or why a CUDA graph cannot hold it."""
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
            return "torch's grouped_mm reads the offsets on the host on GPUs before sm_90"
        return True

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        if dict(config) != CONFIG:
            return f"{self.name} has nothing to tune; use {format_config(CONFIG)}."
        if shape.dtype != "bf16":
            return f"dtype {shape.dtype} is not bf16, the only one of grouped_mm; use another kernel."
        if shape.num_local_experts != shape.num_experts:
            return f"{shape.num_local_experts} of {shape.num_experts} experts are here; grouped_mm leaves rows of others undefined, use another kernel."
        for name in ("hidden_size", "intermediate_size"):
            if getattr(shape, name) % ALIGNMENT:
                return f"{name}={getattr(shape, name)} is no multiple of {ALIGNMENT}, rows would not be aligned to 16 bytes; pad it."
        return None

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """Tiles of torch's persistent kernel: one CTA an SM walks them, expert by expert."""
        launches: Any = (-(-2 * shape.intermediate_size // TILE_N), -(-shape.hidden_size // TILE_N))
        return CtaGrid(TILE_M, sum(launches), launches=launches, ctas_per_sm=1, persistent=True)

    def run(self, config: Config, operands: Operands, /) -> torch.Tensor:
        """Runs the layer and returns [T, H]."""
        topk_ids, w13 = operands.topk_ids, operands.w13
        tokens, top_k = topk_ids.shape
        flat, slots = topk_ids.flatten(), topk_ids.numel()
        # Padding comes last, behind the last offset, where rows are undefined; so does one row more that nobody routed.
        flat = torch.where((flat >= 0) & (flat < len(w13)), flat, len(w13))
        experts, order = F.pad(flat, (0, 1), value=len(w13)).sort(stable=True)
        order.clamp_(max=slots - 1)
        numbers = torch.arange(1, len(w13) + 1, dtype=experts.dtype, device=experts.device)
        ends = torch.searchsorted(experts, numbers, out_int32=True)
        x = operands.hidden_states.index_select(0, order // top_k)
        gate_up = F.grouped_mm(x, w13.transpose(1, 2), offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)
        # The routing weight scales h, which has I columns, instead of the output's H.
        h = F.silu(gate).mul_(up).mul_(operands.topk_weights.flatten()[order].unsqueeze(1))
        y = F.grouped_mm(h, operands.w2.transpose(1, 2), offs=ends)
        back = torch.empty_like(flat, dtype=order.dtype)
        back[order[:slots]] = torch.arange(slots, device=order.device)
        back.masked_fill_(flat == len(w13), slots)
        # Gathers and adds up in one pass, always in the order of top_k: no atomics, the same bits every time.
        summed = F.embedding_bag(back.view(tokens, top_k), y, mode="sum", padding_idx=slots)
        return summed if operands.out is None else operands.out.copy_(summed)
