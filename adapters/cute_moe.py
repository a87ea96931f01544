"""rampwrap's own CuTe DSL kernels for Hopper (`rampwrap.kernels.cute`) as a wrapped kernel; sm_90 only.

Weights are those of the Triton kernel, gate rows first, so both go into one `Portfolio`. The kernels are compiled ahead
of time by ``rampwrap build-kernels``, or on first use where the CuTe DSL is installed.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampwrap.adapters.layer import LayerKernel, check_blocks, check_workspace, only_on_hopper, runnable
from rampwrap.errors import CaptureError, ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.operands import Contract, Operands
from rampwrap.kernels.cute.build.library import Library, load
from rampwrap.kernels.cute.configs import (
    FORMS,
    GROUP_MS,
    CuteConfig,
    Variant,
    all_configs,
    from_keys,
    why_illegal,
)
from rampwrap.kernels.cute.defaults import default
from rampwrap.kernels.cute.host.launch import MAX_CTAS, run_layer
from rampwrap.kernels.triton.align.host import TokenBlocks
from rampwrap.kernels.triton.moe.workspace import Workspace, workspace


class CuteFusedMoE(LayerKernel):
    """The CuTe fused MoE layer of one shape.

    >>> kernel = CuteFusedMoE(MoEShape(64, 8, 2048, 1024, "fp8"))
    >>> out = kernel.launch(kernel.configs[0], hidden_states, w13, w2, topk_weights, topk_ids, w13_scale=..., w2_scale=...)

    Args:
        shape: the layer, bf16 or fp8.
        form: "two" launches, "one", "prefill" (two launches for thousands of tokens), "ragged" (two whose tiles are as wide as the
            tokens of their block, up to block_m), or "both" for the configs of all four.
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
    stores_once = True

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
        only_on_hopper("The CuTe kernels run")
        self.waves, self.forms = waves, FORMS if form == "both" else (form,)
        every = [config for form in self.forms for config in all_configs(form, shape.dtype)]
        if not every:
            raise ConfigError(
                f"No config of {self.name} runs {shape}: dtype {shape.dtype} is not compiled; use bf16 or fp8."
            )
        # Before a library is looked for, or built.
        legal = runnable(self.name, shape, every, why_illegal)
        self.library = library if isinstance(library, Library) else load(library)
        usable = runnable(self.name, shape, legal, lambda config, _: self.library.why_absent(config))
        keys = [config.keys(group_m) for config in usable for group_m in GROUP_MS]
        copied = ("w13", "w2") if shape.dtype == "fp8" else ("w13", "w2", "hidden_states")
        super().__init__(shape, keys, Contract(shape, aligned=copied, quantised=True))
        if "one" in self.forms:
            self.nondeterministic = "the one-launch form adds output tiles in no fixed order"
        if len(self.forms) == 1:
            self.launch_names = ("kernel_cutlass",) * len(usable[0].variants)
        self._ready: dict[tuple[Any, ...], tuple[CuteConfig, tuple[Callable[..., Any], ...]]] = {}
        self._warm: set[tuple[str, int | None]] = set()

    def default_config(self, num_tokens: int) -> Config:
        """The config that serves `num_tokens` tokens of a routing that nobody knows (`rampwrap.kernels.cute.defaults`)."""
        return self.configs[default(self.configs, self.shape, num_tokens)]

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        found = from_keys(config, shape.dtype)
        return found if isinstance(found, str) else why_illegal(found, shape) or self.library.why_absent(found)

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """Tiles of an M block: 2I / rows of the gate+up GEMM, and H / rows of the down GEMM in two launches.

        Of the ragged form blocks of block_m, whose tiles are that wide at most. How wide they are a model sees in rows and active
        experts: where `costs.predict` stands in for times, held-out predictions are 1.2-1.5 % off, as those of two launches.
        """
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

    def check_config(self, config: Config) -> None:
        """Nothing, for a config that `supports` accepts; its functions are looked up in the library.

        Raises:
            ConfigError: it cannot run.
        """
        if tuple(config.items()) not in self._ready:
            self._prepare(config)

    def run(
        self,
        config: Config,
        operands: Operands,
        /,
        *,
        workspace: Workspace | None = None,
        blocks: TokenBlocks | None = None,
        waves: int | None = None,
        hidden_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: what to launch.
            operands: of the layer; topk_weights of another type than float32 are converted first.
            workspace: scratch memory from `workspace`; allocated where absent.
            blocks: an alignment of the topk_ids for the config's block_m; made where absent.
            waves: as for the class, which gives the default.
            hidden_scale: float32 [T, H/128] of e4m3 hidden states, which are read as they are; the operands hold it.

        Raises:
            CaptureError: the config was not launched before this capture, which is when its code is loaded.
            InputError: memory is too small, or e4m3 hidden states or their scales do not start at a multiple of 16 bytes.
        """
        found, functions = self._ready[tuple(config.items())]
        check_workspace(operands, workspace)
        if hidden_scale is not None and (operands.hidden_states.data_ptr() | hidden_scale.data_ptr()) % 16:
            raise InputError(
                "e4m3 hidden_states and hidden_scale start at multiples of 16 bytes, as their copies need; give copies."
            )
        if blocks is not None:
            check_blocks(operands, blocks, found.block_m)
        device = operands.topk_ids.device
        warm = (found.variants[0].symbol, device.index)
        if warm not in self._warm and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CaptureError(f"The config {format_config(config)} was never launched; launch it before the capture.")
        most_ctas = self._most_ctas(found.ctas_per_sm * (self.waves if waves is None else waves), device)
        out = run_layer(found, functions, config["group_m"], most_ctas, operands, workspace=workspace, blocks=blocks)
        self._warm.add(warm)  # only now: a launch that failed has warmed nothing
        return out

    def _prepare(self, config: Config) -> None:
        reason = self.supports(config, self.shape)
        found = from_keys(config, self.shape.dtype)
        if reason is not None or isinstance(found, str):
            raise ConfigError(f"The config {format_config(config)} cannot run: {reason}")
        functions = tuple(self.library.function(variant) for variant in found.variants)
        self._ready[tuple(config.items())] = found, functions

    @staticmethod
    def _most_ctas(for_each_sm: int, device: torch.device) -> int:
        if for_each_sm < 1:
            return MAX_CTAS
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return for_each_sm * int(sms)

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert; FP8 quantises h as it is, from float32."""
        return reference.layer(shape, inputs, h_dtype=torch.float32 if shape.dtype == "fp8" else torch.bfloat16)
