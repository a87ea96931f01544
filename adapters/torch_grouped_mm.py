"""torch's own grouped GEMM (`torch.nn.functional.grouped_mm`, bf16) as a kernel with one config: for large batches.

Sort the slots by expert, gather, one grouped GEMM, SwiGLU times the routing weight, another grouped GEMM, and one pass
that adds up the rows of each token. Every size depends on the batch alone and the offsets stay on the GPU, so it can
be captured in a CUDA graph (sm_90; torch's fallback for other GPUs reads the offsets on the host).
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import MoEShape

# The larger of the two tiles that torch's CUTLASS kernel uses on sm_90; it picks one itself.
TILE_M, TILE_N = 128, 256
ALIGNMENT = 8
"Values in 16 bytes of bf16: rows must begin at multiples of it."


class TorchGroupedMM:
    """torch's grouped GEMM around one MoE layer; there is nothing to tune, so it is of use inside a `Portfolio`.

    Raises:
        InputError: this torch has no `grouped_mm`.
        ConfigError: it cannot run this shape.
    """

    name = "torch_grouped_mm"
    version = f"torch {torch.__version__.split('+')[0]}"
    weight_layout = "vllm"
    configs: tuple[Config, ...] = ({"sort": "stable"},)

    def __init__(self, shape: MoEShape) -> None:
        if not hasattr(F, "grouped_mm"):
            raise InputError(f"torch {torch.__version__} has no grouped_mm; install torch 2.10 or later.")
        self.shape = shape
        reason = self.supports(self.configs[0], shape)
        if reason is not None:
            raise ConfigError(f"No config of {self.name} runs {shape}: {reason}")
        self._layer = TritonFusedMoE(shape)

    @property
    def capturable(self) -> bool | str:
        """True, or why a CUDA graph cannot hold it."""
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
            return "torch's grouped_mm reads the offsets on the host on GPUs before sm_90"
        return True

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        if dict(config) != self.configs[0]:
            return f"{self.name} has nothing to tune; use {format_config(self.configs[0])}."
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

    def launch(
        self,
        config: Config,
        /,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: the one there is.
            hidden_states: bf16 [T, H].
            w13: bf16 [E, 2I, H], gate rows first.
            w2: bf16 [E, H, I].
            topk_weights: [T, top_k], floating point.
            topk_ids: int32 or int64 [T, top_k]; slots with an id out of range contribute zero.
            out: bf16 [T, H], written and returned; allocated where absent.

        Raises:
            ConfigError: the config is another.
            InputError: a tensor has the wrong dtype.
        """
        if dict(config) != self.configs[0]:
            raise ConfigError(f"The config {format_config(config)} cannot run: {self.supports(config, self.shape)}")
        for name, tensor in (("hidden_states", hidden_states), ("w13", w13), ("w2", w2)):
            if tensor.dtype != torch.bfloat16:
                raise InputError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; give bfloat16.")
        tokens, top_k = topk_ids.shape
        if not tokens:
            return torch.empty_like(hidden_states) if out is None else out
        flat, slots = topk_ids.flatten(), topk_ids.numel()
        # Padding comes last, behind the last offset, where rows are undefined; so does one row more that nobody routed.
        flat = torch.where((flat >= 0) & (flat < len(w13)), flat, len(w13))
        experts, order = F.pad(flat, (0, 1), value=len(w13)).sort(stable=True)
        order.clamp_(max=slots - 1)
        numbers = torch.arange(1, len(w13) + 1, dtype=experts.dtype, device=experts.device)
        ends = torch.searchsorted(experts, numbers, out_int32=True)
        x = hidden_states.index_select(0, order // top_k)
        gate_up = F.grouped_mm(x, w13.transpose(1, 2), offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)
        # The routing weight scales h, which has I columns, instead of the output's H.
        h = F.silu(gate).mul_(up).mul_(topk_weights.flatten()[order].unsqueeze(1))
        y = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)
        back = torch.empty_like(flat, dtype=order.dtype)
        back[order[:slots]] = torch.arange(slots, device=order.device)
        back.masked_fill_(flat == len(w13), slots)
        # Gathers and adds up in one pass, always in the order of top_k: no atomics, the same bits every time.
        summed = F.embedding_bag(back.view(tokens, top_k), y, mode="sum", padding_idx=slots)
        return summed if out is None else out.copy_(summed)

    def inputs(self, shape: MoEShape, topk_ids: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `launch` on random data of order one, on the device of `topk_ids`."""
        return self._layer.inputs(shape, topk_ids, seed=seed)

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, in plain torch."""
        return self._layer.reference(shape, inputs)
