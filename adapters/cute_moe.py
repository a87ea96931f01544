"""rampwrap's own CuTe DSL kernels for Hopper (`rampwrap.kernels.cute`) as a wrapped kernel; sm_90 only.

Weights are those of the Triton kernel, gate rows first, so both go into one `Portfolio`. The kernels are compiled ahead
of time by ``rampwrap build-kernels``, or on first use where the CuTe DSL is installed.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
from rampwrap.errors import CaptureError, ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, check_configs, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.operands import FP8, TORCH_DTYPES, Operands
from rampwrap.kernels.cute.build.library import Library, load
from rampwrap.kernels.cute.configs import (
    FORMS,
    GROUP_MS,
    SCALE,
    CuteConfig,
    Variant,
    all_configs,
    from_keys,
    why_illegal,
)
from rampwrap.kernels.cute.host.launch import MAX_CTAS, run_layer
from rampwrap.kernels.triton.align.host import TokenBlocks
from rampwrap.kernels.triton.moe.workspace import Workspace, workspace


class CuteFusedMoE:
    """The CuTe fused MoE layer of one shape.

    >>> kernel = CuteFusedMoE(MoEShape(64, 8, 2048, 1024, "fp8"))
    >>> out = kernel.launch(kernel.configs[0], hidden_states, w13, w2, topk_weights, topk_ids, w13_scale=..., w2_scale=...)

    Args:
        shape: the layer, bf16 or fp8.
        form: "two" launches, "one", "prefill" (two launches for thousands of tokens), or "both" for the configs of all.
        library: compiled kernels: a path, a `Library`, or None for the default one (see `library.find`).
        waves: CTAs launched for each that an SM holds; each goes on to further tiles and loads them while it stores
            the last. 0 launches a CTA for every tile. Same bits.

    Raises:
        InputError: there is no library and no CuTe DSL, or the GPU is not a Hopper.
        ConfigError: no config runs this shape.
    """

    name = "cute_moe"
    # Changes with every change that moves timings: profiles of another version are refused.
    version = "2"
    capturable = True

    def __init__(
        self,
        shape: MoEShape,
        form: str = "both",
        library: Library | str | os.PathLike[str] | None = None,
        *,
        waves: int = 1,
    ) -> None:
        if form not in (*FORMS, "both"):
            raise InputError(f"form {form!r} is unknown; use {', '.join(FORMS)} or both.")
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            raise InputError(
                f"The CuTe kernels run on sm_90 only, this is {torch.cuda.get_device_name()}; use Triton's."
            )
        self.shape, self.waves = shape, waves
        self.forms = FORMS if form == "both" else (form,)
        every = [config for form in self.forms for config in all_configs(form, shape.dtype)]
        if not every:
            raise ConfigError(
                f"No config of {self.name} runs {shape}: dtype {shape.dtype} is not compiled; use bf16 or fp8."
            )
        reasons = [why_illegal(config, shape) for config in every]
        legal = [config for config, reason in zip(every, reasons, strict=True) if reason is None]
        if not legal:
            raise ConfigError(f"No config of {self.name} runs {shape}: {reasons[0]}")
        self.library = library if isinstance(library, Library) else load(library)
        usable = [config for config in legal if self.library.why_absent(config) is None]
        if not usable:
            raise ConfigError(f"No config of {self.name} runs {shape}: {self.library.why_absent(legal[0])}")
        self.configs: tuple[Config, ...] = check_configs(
            [config.keys(group_m) for config in usable for group_m in GROUP_MS], self.name
        )
        if "one" in self.forms:
            self.nondeterministic = "the one-launch form adds output tiles in no fixed order"
        if len(self.forms) == 1:
            self.launch_names = ("kernel_cutlass",) * len(usable[0].variants)
        self._layer = TritonFusedMoE(shape)
        self._ready: dict[tuple[Any, ...], tuple[CuteConfig, tuple[Callable[..., Any], ...]]] = {}
        self._warm: set[tuple[str, int | None]] = set()

    def default_config(self, num_tokens: int) -> Config:
        """A config for balanced routing, by tokens per expert; nothing measured goes into it."""
        per_expert = num_tokens * self.shape.top_k / self.shape.num_experts
        want = (min(64, 8 * max(1, -(-int(per_expert) // 8))), 32, 8, 4, 1 if per_expert < 16 else 8)

        def distance(config: Config) -> tuple[int, ...]:
            have = (config["block_m"], config["block_n"], config["warp_n"], config["stages"], config["group_m"])
            return tuple(abs(a - b) for a, b in zip(have, want, strict=True))

        return min(self.configs, key=distance)

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        found = from_keys(config, shape.dtype)
        return found if isinstance(found, str) else why_illegal(found, shape) or self.library.why_absent(found)

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """Tiles of an M block: 2I / rows of the gate+up GEMM, and H / rows of the down GEMM in two launches."""
        found = from_keys(config, shape.dtype)
        if isinstance(found, str):
            raise ConfigError(found)
        up, persistent = 2 * shape.intermediate_size // found.rows, self.waves > 0
        if found.form == "one":
            return CtaGrid(found.block_m, up, ctas_per_sm=found.ctas_per_sm, persistent=persistent)
        down = shape.hidden_size // found.rows
        launches: Any = (up, down)  # mypy infers no element type for attrs' converter
        return CtaGrid(
            found.block_m, up + down, launches=launches, ctas_per_sm=found.ctas_per_sm, persistent=persistent
        )

    def workspace(self, num_tokens: int, device: torch.device | str = "cuda") -> Workspace:
        """Memory for `launch(..., workspace=...)` with any config and up to `num_tokens` tokens; fits Triton's too."""
        return workspace(self.shape, num_tokens, device)

    def must_compile(self, configs: Sequence[Config]) -> bool:
        """Whether `precompile` would compile, seconds a kernel, rather than find all of them built."""
        return self.library.must_compile(self._variants(configs))

    def precompile(self, configs: Sequence[Config], **_: Any) -> list[str | None]:
        """Compiles what the library lacks, in parallel; for each config None, or why it cannot run."""
        found = [from_keys(config, self.shape.dtype) for config in configs]
        self.library.ensure(self._variants(configs))
        return [config if isinstance(config, str) else self.library.why_absent(config) for config in found]

    def _variants(self, configs: Sequence[Config]) -> list[Variant]:
        found = [from_keys(config, self.shape.dtype) for config in configs]
        return [variant for config in found if isinstance(config, CuteConfig) for variant in config.variants]

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
        waves: int | None = None,
    ) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: one of `configs`, or any other that `supports` accepts.
            hidden_states: bf16 [T, H]; an FP8 layer quantises them itself.
            w13: [E, 2I, H], gate rows first.
            w2: [E, H, I].
            topk_weights: [T, top_k], floating point; float32 is read as it is, other types are converted first.
            topk_ids: int32 or int64 [T, top_k]; slots with an id out of range contribute zero.
            w13_scale: float32 [E, 2I/128, H/128], FP8 only.
            w2_scale: float32 [E, H/128, I/128], FP8 only.
            expert_map: int32 [num_experts], local expert of each global one, -1 where it is elsewhere.
            out: bf16 [T, H], written and returned; allocated where absent.
            workspace: scratch memory from `workspace`; allocated where absent.
            blocks: an alignment of `topk_ids` for the config's block_m; made where absent.
            waves: as for the class, which gives the default.

        Raises:
            ConfigError: the config cannot run this shape; nothing was launched.
            InputError: a tensor has the wrong shape, dtype or layout.
            CaptureError: the config was not launched before this capture, which is when its code is loaded.
        """
        ready = self._ready.get(tuple(config.items())) or self._prepare(config)
        tokens = self._check(
            hidden_states,
            w13,
            w2,
            topk_weights,
            topk_ids,
            w13_scale,
            w2_scale,
            expert_map,
            out,
            workspace,
            blocks,
            ready[0].block_m,
        )
        device = topk_ids.device
        warm = (ready[0].variants[0].symbol, device.index)
        cold = tokens and warm not in self._warm
        if cold and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CaptureError(f"The config {format_config(config)} was never launched; launch it before the capture.")
        out = run_layer(
            ready[0],
            ready[1],
            config["group_m"],
            self._most_ctas(ready[0].ctas_per_sm * (self.waves if waves is None else waves), device),
            Operands(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, expert_map, out),
            workspace=workspace,
            blocks=blocks,
        )
        if tokens:
            self._warm.add(warm)  # only now: a launch that failed has warmed nothing
        return out

    def _prepare(self, config: Config) -> tuple[CuteConfig, tuple[Callable[..., Any], ...]]:
        reason = self.supports(config, self.shape)
        found = from_keys(config, self.shape.dtype)
        if reason is not None or isinstance(found, str):
            raise ConfigError(f"The config {format_config(config)} cannot run: {reason}")
        ready = found, tuple(self.library.function(variant) for variant in found.variants)
        self._ready[tuple(config.items())] = ready
        return ready

    @staticmethod
    def _most_ctas(for_each_sm: int, device: torch.device) -> int:
        if for_each_sm < 1:
            return MAX_CTAS
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return for_each_sm * int(sms)

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
        memory: Workspace | None,
        blocks: TokenBlocks | None,
        block_m: int,
    ) -> int:
        """Raises what `launch` says; the number of tokens."""
        shape, fp8 = self.shape, self.shape.dtype == "fp8"
        experts, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
        tokens = hidden_states.shape[0] if hidden_states.dim() else 0
        act = TORCH_DTYPES[shape.dtype]
        kind = FP8 if fp8 else act
        if fp8 and (w13_scale is None or w2_scale is None):
            raise InputError("FP8 weights come with scales; give w13_scale and w2_scale.")
        if not fp8 and (w13_scale is not None or w2_scale is not None):
            raise InputError(
                f"Scales were given for a {shape.dtype} layer; leave them out or use a shape with dtype='fp8'."
            )
        if expert_map is None and experts != shape.num_experts:
            raise InputError(
                f"{experts} of {shape.num_experts} experts are on this rank; give expert_map to say which."
            )
        blocked = (experts, 2 * inter // SCALE, hidden // SCALE), (experts, hidden // SCALE, inter // SCALE)
        for name, tensor, dtypes, expected in (
            ("hidden_states", hidden_states, (act,), (tokens, hidden)),
            ("w13", w13, (kind,), (experts, 2 * inter, hidden)),
            ("w2", w2, (kind,), (experts, hidden, inter)),
            ("topk_ids", topk_ids, (torch.int32, torch.int64), (tokens, shape.top_k)),
            ("topk_weights", topk_weights, (torch.float32, torch.bfloat16, torch.float16), (tokens, shape.top_k)),
            ("w13_scale", w13_scale, (torch.float32,), blocked[0]),
            ("w2_scale", w2_scale, (torch.float32,), blocked[1]),
            ("expert_map", expert_map, (torch.int32,), (shape.num_experts,)),
            ("out", out, (act,), (tokens, hidden)),
        ):
            if tensor is None:
                continue
            if tensor.shape != expected or tensor.dtype not in dtypes or not tensor.is_contiguous():
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                layout = "" if tensor.is_contiguous() else " and not contiguous"
                raise InputError(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}{layout}; "
                    f"give contiguous {kinds} {expected}."
                )
            if tensor.data_ptr() % 16 and name in (("w13", "w2") if fp8 else ("w13", "w2", "hidden_states")):
                raise InputError(f"{name} does not start at a multiple of 16 bytes, as its copies need; give a copy.")
        if memory is not None and memory.num_slots < topk_ids.numel():
            raise InputError(
                f"The workspace holds {memory.num_slots} slots, this batch has {topk_ids.numel()}; allocate a larger one."
            )
        if blocks is not None and (blocks.block_m, blocks.num_slots) != (block_m, topk_ids.numel()):
            raise InputError(
                f"The blocks hold {blocks.num_slots} slots at block_m={blocks.block_m}; "
                f"align this batch of {topk_ids.numel()} slots at block_m={block_m}."
            )
        return tokens

    def inputs(self, shape: MoEShape, topk_ids: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `launch` on random data of order one, on the device of `topk_ids`."""
        return self._layer.inputs(shape, topk_ids, seed=seed)

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, with the same quantisation steps."""
        return reference.layer(shape, inputs, h_dtype=torch.float32 if shape.dtype == "fp8" else torch.bfloat16)
