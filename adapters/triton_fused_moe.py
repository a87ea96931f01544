"""rampwrap's own Triton fused MoE (`rampwrap.kernels.triton`) as a wrapped kernel."""

from collections.abc import Sequence
from typing import Any

import torch

from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, check_configs, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FP8, TORCH_DTYPES, Operands
from rampwrap.kernels.triton.align.host import TokenBlocks
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.kernels.triton.moe import configs as tuning
from rampwrap.kernels.triton.moe.host import fused_moe, fused_moe_candidates
from rampwrap.kernels.triton.moe.warm import warm
from rampwrap.kernels.triton.moe.workspace import Workspace, workspace


class TritonFusedMoE:
    """The Triton fused MoE layer of one shape.

    >>> kernel = TritonFusedMoE(MoEShape(64, 8, 2048, 1024))
    >>> out = kernel.launch(kernel.configs[0], hidden_states, w13, w2, topk_weights, topk_ids)
    """

    name = "triton_fused_moe"
    # Changes with every change that moves timings: profiles of another version are refused.
    version = "2"

    def __init__(self, shape: MoEShape) -> None:
        self.shape = shape
        usable = [config for config in tuning.CONFIGS[shape.dtype] if self.supports(config, shape) is None]
        if not usable:
            reason = self.supports(tuning.CONFIGS[shape.dtype][0], shape)
            raise ConfigError(f"No config of {self.name} runs {shape}: {reason}")
        self.configs: tuple[Config, ...] = check_configs(usable, self.name)
        self._legal = {tuple(config.values()) for config in usable}
        self._random = reference.RandomInputs()

    def default_config(self, num_tokens: int) -> Config:
        """A config for balanced routing, by tokens per expert; nothing measured goes into it."""
        shape = self.shape
        return tuning.default_config(num_tokens, shape.num_experts, shape.top_k, shape.dtype)

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        if shape.dtype == "fp8":
            for name in ("hidden_size", "intermediate_size"):
                if getattr(shape, name) % GROUP:
                    return f"{name}={getattr(shape, name)} is no multiple of the {GROUP}-wide scale blocks; pad it or use bf16."
        reason = tuning.refusal(config, shape.dtype)
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
            ctas_per_sm=tuning.ctas_per_sm(config, shape.dtype),
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
        return num_sms * tuning.ctas_per_sm(config, self.shape.dtype) * waves or None

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
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: Workspace | None = None,
        blocks: TokenBlocks | None = None,
        waves: int = 0,
    ) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: one of `configs`, or any other that `supports` accepts.
            hidden_states: [T, H], bf16 or fp16 (bf16 for an FP8 layer, which quantises them itself).
            w13: [E, 2I, H], gate rows first.
            w2: [E, H, I].
            topk_weights: [T, top_k], floating point.
            topk_ids: int32 or int64 [T, top_k]; slots with an id out of range contribute zero.
            w13_scale: float32 [E, 2I/128, H/128], FP8 only.
            w2_scale: float32 [E, H/128, I/128], FP8 only.
            expert_map: int32 [num_experts], local expert of each global one, -1 where it is elsewhere.
            out: [T, H], written and returned; allocated where absent.
            workspace: scratch memory from `workspace`; allocated where absent.
            blocks: an alignment of `topk_ids` for the config's block_m; made where absent.
            waves: grids of at most so many waves of CTAs, each of which goes on to further tiles; same bits. 0 gives
                every tile that the capacity allows for a CTA of its own.

        Raises:
            ConfigError: the config cannot run this shape.
            InputError: a tensor has the wrong shape, dtype or layout.
        """
        self._check_config(config)
        self._check(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, expert_map, out)
        self._check_memory(topk_ids, [config], [] if blocks is None else [blocks], workspace)
        return fused_moe(
            config,
            Operands(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, expert_map, out),
            workspace=workspace,
            blocks=blocks,
            most_ctas=self.most_ctas(config, waves, topk_ids.device),
        )

    def launch_candidates(
        self,
        configs: Sequence[Config],
        blocks: Sequence[TokenBlocks],
        choice: torch.Tensor,
        /,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: Workspace | None = None,
        waves: int = 1,
        streams: Sequence[Any] = (),
    ) -> torch.Tensor:
        """Runs the layer with the one of several configs that was chosen on the GPU; all of them are launched.

        Args:
            configs: candidates.
            blocks: of each candidate, from `select.align_and_select`: only the chosen one's have rows.
            choice: int32 [1], its place.
            waves: as for `launch`; a candidate without rows costs about 1 us with grids of one wave.
            streams: for the candidates after the first, to run beside it; none runs them one after the other.

        The other arguments, and what is raised, are those of `launch`.
        """
        for config in configs:
            self._check_config(config)
        self._check(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, expert_map, out)
        self._check_memory(topk_ids, configs, blocks, workspace)
        return fused_moe_candidates(
            configs,
            blocks,
            choice,
            Operands(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, expert_map, out),
            workspace=workspace,
            most_ctas=[self.most_ctas(config, waves, topk_ids.device) for config in configs],
            streams=streams,
        )

    def _check_config(self, config: Config) -> None:
        if tuple(config.values()) not in self._legal:
            reason = self.supports(config, self.shape)
            if reason is not None:
                raise ConfigError(f"The config {format_config(config)} cannot run: {reason}")

    def _check_memory(
        self,
        topk_ids: torch.Tensor,
        configs: Sequence[Config],
        blocks: Sequence[TokenBlocks],
        workspace: Workspace | None,
    ) -> None:
        for config, its in zip(configs, blocks, strict=False):
            if (its.block_m, its.num_slots) != (config["block_m"], topk_ids.numel()):
                raise InputError(
                    f"The blocks hold {its.num_slots} slots at block_m={its.block_m}; "
                    f"align this batch of {topk_ids.numel()} slots at block_m={config['block_m']}."
                )
        if workspace is not None and workspace.num_slots < topk_ids.numel():
            raise InputError(
                f"The workspace holds {workspace.num_slots} slots, this batch has {topk_ids.numel()}; allocate a larger one."
            )

    def _check(
        self,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_scale: torch.Tensor | None,
        w2_scale: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> None:
        shape = self.shape
        experts, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
        if hidden_states.dim() != 2:
            raise InputError(f"hidden_states has shape {tuple(hidden_states.shape)}; give [num_tokens, {hidden}].")
        tokens = hidden_states.shape[0]
        act = TORCH_DTYPES[shape.dtype]
        weight = FP8 if shape.dtype == "fp8" else act
        _expect("hidden_states", hidden_states, (tokens, hidden), (act,))
        _expect("w13", w13, (experts, 2 * inter, hidden), (weight,))
        _expect("w2", w2, (experts, hidden, inter), (weight,))
        _expect("topk_ids", topk_ids, (tokens, shape.top_k), (torch.int32, torch.int64))
        _expect("topk_weights", topk_weights, (tokens, shape.top_k), (torch.float32, torch.bfloat16, torch.float16))
        if shape.dtype == "fp8":
            if w13_scale is None or w2_scale is None:
                raise InputError("FP8 weights come with scales; give w13_scale and w2_scale.")
            _expect("w13_scale", w13_scale, (experts, 2 * inter // GROUP, hidden // GROUP), (torch.float32,))
            _expect("w2_scale", w2_scale, (experts, hidden // GROUP, inter // GROUP), (torch.float32,))
        elif w13_scale is not None or w2_scale is not None:
            raise InputError(
                f"Scales were given for a {shape.dtype} layer; leave them out or use a shape with dtype='fp8'."
            )
        if expert_map is not None:
            _expect("expert_map", expert_map, (shape.num_experts,), (torch.int32,))
        elif experts != shape.num_experts:
            raise InputError(
                f"{experts} of {shape.num_experts} experts are on this rank; give expert_map to say which."
            )
        if out is not None:
            _expect("out", out, (tokens, hidden), (act,))

    def inputs(self, shape: MoEShape, topk_ids: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `launch` on random data of order one, on the device of `topk_ids`.

        The weights are made once for a shape, device and seed and stay with the adapter; they are drawn expert
        by expert, so that memory peaks at the weights plus one expert.
        """
        return self._random.make(shape, topk_ids, seed)

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, in plain torch; FP8 with the same quantisation steps."""
        return reference.layer(shape, inputs)


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        layout = "" if tensor.is_contiguous() else " and not contiguous"
        raise InputError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}{layout}; "
            f"give contiguous {kinds} {shape}."
        )
