"""rampwrap's own Triton fused MoE (`rampwrap.kernels.triton`) as a wrapped kernel."""

from collections.abc import Sequence
from typing import Any

import torch

from rampwrap.adapters.layer import CandidateKernel, check_blocks, check_workspace, runnable
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import Contract, Operands
from rampwrap.kernels.triton.align.host import TokenBlocks
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe import configs as tuning
from rampwrap.kernels.triton.moe.host import fused_moe, fused_moe_candidates
from rampwrap.kernels.triton.moe.warm import warm
from rampwrap.kernels.triton.moe.workspace import Workspace, workspace


class TritonFusedMoE(CandidateKernel):
    """The Triton fused MoE layer of one shape.

    >>> kernel = TritonFusedMoE(MoEShape(64, 8, 2048, 1024))
    >>> out = kernel.launch(kernel.configs[0], hidden_states, w13, w2, topk_weights, topk_ids)
    """

    name = "triton_fused_moe"
    # Changes with every change that moves timings: profiles of another version are refused.
    version = "2"
    stores_once = True

    def __init__(self, shape: MoEShape) -> None:
        usable = runnable(
            self.name, shape, tuning.listed(shape.dtype, shape.scale_group), self.supports, every_form=True
        )
        super().__init__(shape, usable, Contract(shape, quantised=True))

    def default_config(self, num_tokens: int) -> Config:
        """The config that serves `num_tokens` tokens of a routing that nobody knows (`configs.default_config`)."""
        shape = self.shape
        return tuning.default_config(num_tokens, shape.num_experts, shape.top_k, shape.dtype, shape.scale_group)

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        group = shape.scale_group
        if shape.dtype == "fp8" and group:
            for name in ("hidden_size", "intermediate_size"):
                if getattr(shape, name) % group:
                    return f"{name}={getattr(shape, name)} is no multiple of the {group}-wide scale blocks; pad it or use bf16."
        reason = tuning.refusal(config, shape.dtype, group)
        split_k = config.get("split_k", 1)
        if reason is None and split_k > 1 and shape.intermediate_size < split_k * config["block_k"]:
            return f"split_k={split_k} leaves parts of intermediate_size={shape.intermediate_size} empty; use fewer."
        return reason

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """CTAs per M block: 2I / block_n of the gate+up GEMM and split_k * H / block_n of the down GEMM.

        Batches of more than `configs.SPLIT_MAX_SLOTS` slots run unsplit, which the grid of a config cannot say.
        """
        block_n = config["block_n"]
        up = -(-shape.intermediate_size // (block_n // 2))
        split_k = config.get("split_k", 1)
        down = -(-shape.hidden_size // block_n) * split_k
        return CtaGrid(
            block_m=config["block_m"],
            ctas_per_block=up + down,
            launches=(up, down),
            ctas_per_sm=tuning.ctas_per_sm(config, shape.dtype, shape.scale_group),
            split_k=split_k,
        )

    def workspace(self, num_tokens: int, device: torch.device | str = "cuda") -> Workspace:
        """Memory for `launch(..., workspace=...)` with any config and up to `num_tokens` tokens."""
        return workspace(self.shape, num_tokens, device)

    def precompile(self, configs: Sequence[Config], *, topk_ids: torch.Tensor, **_: Any) -> list[str | None]:
        """Compiles configs in parallel processes, for launches with arguments like these.

        Returns:
            For each config None, or why it failed. Nothing is compiled, or fails, where there is no GPU.
        """
        if INTERPRETED.value or not topk_ids.is_cuda or len(configs) < 2:
            return [None] * len(configs)
        return warm(self.shape, configs, ids_dtype=topk_ids.dtype)

    def most_ctas(self, config: Config, waves: int, device: torch.device) -> int | None:
        """CTAs of some waves of a config: the largest grid of a launch with ``waves``; None for 0."""
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return num_sms * tuning.ctas_per_sm(config, self.shape.dtype, self.shape.scale_group) * waves or None

    def run(
        self,
        config: Config,
        operands: Operands,
        /,
        *,
        workspace: Workspace | None = None,
        blocks: TokenBlocks | None = None,
        waves: int = 0,
        hidden_scale: torch.Tensor | None = None,
        w13_input_scale: torch.Tensor | None = None,
        w2_input_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: what to launch.
            operands: of the layer.
            workspace: scratch memory from `workspace`; allocated where absent.
            blocks: an alignment of the topk_ids for the config's block_m; made where absent.
            waves: grids of at most so many waves of CTAs, each of which goes on to further tiles; same bits. 0 gives
                every tile that the capacity allows for a CTA of its own.
            hidden_scale: float32 [T, H/128] of e4m3 hidden states, which are read as they are; the operands hold it.
            w13_input_scale: float32, one number by which hidden states are quantised, with ``scales="static"`` alone.
            w2_input_scale: float32, one number by which the activation's output is.
        """
        check_workspace(operands, workspace)
        if blocks is not None:
            check_blocks(operands, blocks, config["block_m"])
        most_ctas = self.most_ctas(config, waves, operands.topk_ids.device)
        return fused_moe(config, operands, self.shape, workspace=workspace, blocks=blocks, most_ctas=most_ctas)

    def run_candidates(
        self,
        configs: Sequence[Config],
        blocks: Sequence[TokenBlocks],
        choice: torch.Tensor,
        operands: Operands,
        /,
        *,
        workspace: Workspace | None = None,
        waves: int = 1,
        streams: Sequence[Any] = (),
        hidden_scale: torch.Tensor | None = None,
        w13_input_scale: torch.Tensor | None = None,
        w2_input_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `run`; a candidate without rows costs about 1 us with grids of one wave."""
        check_workspace(operands, workspace)
        for config, its in zip(configs, blocks, strict=True):
            check_blocks(operands, its, config["block_m"])
        limits = [self.most_ctas(config, waves, operands.topk_ids.device) for config in configs]
        return fused_moe_candidates(
            configs, blocks, choice, operands, self.shape, workspace=workspace, most_ctas=limits, streams=streams
        )
