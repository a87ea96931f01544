"""vLLM's own Triton fused MoE (`fused_experts`, 0.26 and later) as a wrapped kernel; its source stays as it is.

vLLM asks `fused_moe.get_config()` for a config before it looks into its tuned files. This adapter answers that
question for the thread that launches, for as long as the launch lasts, and passes everybody else's through:
`override_config`, the way vLLM itself offers, is one global of the process and stays set after an exception.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from rampwrap.adapters import vllm_candidates
from rampwrap.adapters.layer import CandidateKernel, runnable
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.activation import SILU
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, config_key, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import Operands
from rampwrap.kernels.common.sm90 import MAX_SHARED
from rampwrap.kernels.triton.moe import configs as tiles

KEYS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
PACKAGE = "vllm.model_executor.layers.fused_moe"
_TRITON_DEFAULTS = {"GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}  # where vLLM's config does not say
_ALLOWED = {
    "BLOCK_SIZE_M": (8, 16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_K": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4, 5, 6, 7, 8),
}
MAX_ACCUMULATORS = 256
_SIZES = ("num_local_experts", "hidden_size", "intermediate_size")

# Besides the regular ones: best somewhere on an H200, or shipped for it; in the order of KEYS.
_EXTRA_BF16 = (
    (16, 32, 64, 1, 4, 4), (16, 64, 64, 1, 4, 5), (16, 64, 128, 1, 4, 2), (16, 64, 128, 1, 4, 5), (16, 64, 256, 1, 4, 3),
    (16, 64, 256, 1, 4, 4), (16, 256, 128, 1, 8, 2), (32, 128, 64, 8, 4, 3), (128, 256, 64, 64, 8, 4),
)  # fmt: skip


def swaps_ab(config: Config, dtype: str) -> bool:
    """Whether vLLM multiplies W X^T on sm_90."""
    return bool(dtype == "fp8" and config["BLOCK_SIZE_M"] < 64 and config["BLOCK_SIZE_N"] >= 64)


def _as_ours(config: Config, dtype: str) -> dict[str, Any]:
    """The config in the words of `rampwrap.kernels.triton.moe.configs`, whose tiles occupy the same memory."""
    return dict(zip(tiles.KEYS, (*(config[key] for key in KEYS), swaps_ab(config, dtype)), strict=True))


def refusal(config: Config, dtype: str) -> str | None:
    """Why a config cannot run with a dtype, in a sentence; None if it can. The one statement of what is legal."""
    if set(config) != set(KEYS):
        return f"The config has {', '.join(config)}; give {', '.join(KEYS)}."
    for key, allowed in _ALLOWED.items():
        if config[key] not in allowed:
            return f"{key}={config[key]} is not supported; use one of {', '.join(map(str, allowed))}."
    if config["GROUP_SIZE_M"] < 1:
        return f"GROUP_SIZE_M={config['GROUP_SIZE_M']} is not supported; use 1 or more."
    if config["BLOCK_SIZE_M"] < 16 and dtype != "fp8":
        return f"BLOCK_SIZE_M={config['BLOCK_SIZE_M']} is known to run in FP8 only, not in {dtype}; use 16."
    ours = _as_ours(config, dtype)
    if tiles.accumulators(ours, "bf16") > MAX_ACCUMULATORS:
        return f"A {ours['block_m']}x{ours['block_n']} tile does not fit the registers of {ours['num_warps']} warps; use more warps or a smaller tile."
    shared = tiles.shared_bytes(ours, dtype)
    if shared > MAX_SHARED:
        return f"The config needs {shared} bytes of shared memory, an SM gives {MAX_SHARED}; use fewer stages or a smaller tile."
    return None


def _rows(dtype: str) -> Iterator[tuple[int, ...]]:
    """Tiles whose accumulators suit their warps, 3 to 4 stages; grouped where an expert may have many blocks."""
    fp8 = dtype == "fp8"
    for block_m, block_n, block_k in itertools.product((8, 16, 32, 64, 128), (64, 128, 256), (128,) if fp8 else (64, 128)):  # fmt: skip
        for warps in {64: (4,), 128: (4, 8), 256: (8,)}[block_n]:
            for stages in (3, 4, 5) if fp8 and block_m < 64 else (3, 4):
                for group in (1, 16) if block_m >= 64 and (fp8 or block_k == 64) else (1,):
                    yield block_m, block_n, block_k, group, warps, stages
    yield from () if fp8 else _EXTRA_BF16


CONFIGS = {
    dtype: tuple(c for row in sorted(_rows(dtype)) if refusal(c := dict(zip(KEYS, row, strict=True)), dtype) is None)
    for dtype in ("bf16", "fp16", "fp8")
}
"What each dtype is profiled with, besides what vLLM's own tables hold for the shape."


class _Forced(threading.local):
    """The config that the current thread's launch runs with."""

    config: dict[str, Any] | None = None


_forced, _install = _Forced(), threading.Lock()


class _forcing:
    """``with _forcing(config)``: this thread's launches run with it; what was there before is put back in any case."""

    def __init__(self, config: dict[str, Any] | None) -> None:
        self._config, self._previous = config, _forced.config

    def __enter__(self) -> None:
        _forced.config = self._config

    def __exit__(self, *_: object) -> None:
        _forced.config = self._previous


def _listen(package: Any) -> None:
    """Makes vLLM's `get_config` answer with the launching thread's config, and with its own elsewhere; once."""
    with _install:
        inner = package.get_config
        if hasattr(inner, "rampwrap"):
            return

        @functools.wraps(inner)
        def get_config() -> Any:
            config = _forced.config
            return inner() if config is None else config

        get_config.rampwrap = True  # type: ignore[attr-defined]
        package.get_config = get_config


def config_file_name(shape: MoEShape, device_name: str, *, per_tensor: bool = False) -> str:
    """What vLLM calls the tuned file of a layer, ``E=64,N=1024,device_name=NVIDIA_H200.json``; per rank, without top_k."""
    device = re.sub(r"[\s/]+", "_", device_name)
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"
    group = 0 if per_tensor else shape.scale_group
    blocks = f",block_shape=[{group},{group}]" if group else ""
    kind = f",dtype=fp8_w8a8{blocks}" if shape.dtype == "fp8" else ""
    return f"E={shape.num_local_experts},N={shape.intermediate_size},device_name={device}{kind}.json"


def config_file(shape: MoEShape, device_name: str, *, per_tensor: bool = False) -> pathlib.Path | None:
    """The tuned file that vLLM would read: in $VLLM_TUNED_CONFIG_FOLDER, else in its package; None if there is none."""
    name = config_file_name(shape, device_name, per_tensor=per_tensor)
    folders = [pathlib.Path(folder)] if (folder := os.environ.get("VLLM_TUNED_CONFIG_FOLDER")) else []
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folders.append(pathlib.Path(place, *PACKAGE.split(".")[1:], "configs"))
    return next((path for folder in folders if (path := folder / name).is_file()), None)


class VllmFusedMoE(CandidateKernel):
    """vLLM's Triton fused MoE layer of one shape.

    Args:
        shape: the layer, SiLU-gated. FP8 weights have scales as it says, or one scale an expert with `per_tensor`.
        per_tensor: activations are quantised with one scale a batch too, static if `launch` is given it.
        device_name: whose tuned file is read; torch's GPU by default.

    Raises:
        InputError: vLLM is not installed, or is one that does not take its config from `get_config`.
        ConfigError: no config runs this shape.

    Under ``VLLM_BATCH_INVARIANT=1`` vLLM pins one config, so that results do not depend on the batch: `configs` is
    that one, and `launch` refuses others.
    """

    without = ("out",)
    capturable = True
    launch_names = ("fused_moe_kernel", "fused_moe_kernel")
    "What `grid(...).launches` counts. Activation, quantisation, alignment and `moe_sum` are launched besides."

    def __init__(self, shape: MoEShape, *, per_tensor: bool = False, device_name: str | None = None) -> None:
        try:
            names = (PACKAGE, f"{PACKAGE}.fused_moe", f"{PACKAGE}.config", "vllm.envs")
            self._package, self._module, self._quant, self._envs = map(importlib.import_module, names)
            self.version = importlib.metadata.version("vllm")
        except ImportError as error:
            raise InputError(f"vLLM cannot be imported ({error}); install vllm 0.26 or later.") from error
        self.shape, self.per_tensor = shape, per_tensor
        if per_tensor and shape.dtype != "fp8":
            raise InputError(f"per_tensor scales were asked for a {shape.dtype} layer; give a shape with dtype='fp8'.")
        if shape.scales in ("tensor", "static"):
            raise InputError(
                f"vLLM quantises activations with one scale a batch here, unlike scales={shape.scales!r}; pass per_tensor=True and "
                "leave scales out."
            )
        self.name = "vllm_fused_moe_per_tensor" if per_tensor else "vllm_fused_moe"
        self.weight_layout = "vllm-per-tensor" if per_tensor else "vllm"
        # Activations with one scale a batch lose 3 % against the reference, which does not quantise them.
        # In FP8 both x and the activations are quantised; the reference is not: 0.022 was measured on an H200.
        self.tolerance = 0.06 if per_tensor else {"bf16": 1e-2, "fp16": 2e-3, "fp8": 3e-2}[shape.dtype]
        group = shape.scale_group if shape.dtype == "fp8" and not per_tensor else 0
        self._blocks = [group, group] if group else None
        self._device_name = device_name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
        _listen(self._package)
        # Another vLLM may have other inner parts.
        self.chooses_in_graph = vllm_candidates.available(self._module)
        pinned = self._pinned()
        listed = self._listed() if pinned is None else [pinned]
        usable = runnable(self.name, shape, listed, self.supports, every_form=shape.activation == SILU)
        super().__init__(shape, usable, None)
        with _forcing({**self.configs[0], "GROUP_SIZE_M": 1 << 20}):
            seen = self._lookup(1)["GROUP_SIZE_M"] == 1 << 20
        if not seen:
            raise InputError(f"vLLM {self.version} does not take its config from get_config(); use vllm 0.26 or later.")

    def _listed(self) -> list[dict[str, Any]]:
        """The list of the dtype, and what vLLM itself would run for some batch."""
        own = [self.default_config(2**power) for power in range(17)]
        if (path := self.config_file()) is not None:
            own += [
                self._plain(value)
                for key, value in json.loads(path.read_text(encoding="utf-8")).items()
                if key.isdigit()
            ]
        rows = {tuple(config.values()) for config in (*CONFIGS[self.shape.dtype], *own)}
        return [dict(zip(KEYS, row, strict=True)) for row in sorted(rows)]

    def _plain(self, config: Config) -> dict[str, Any]:
        return {key: config[key] if key in config else _TRITON_DEFAULTS[key] for key in KEYS}

    def _lookup(self, num_tokens: int) -> Any:
        experts, hidden, inter = (getattr(self.shape, name) for name in _SIZES)
        w13, w2 = (experts, 2 * inter, hidden), (experts, hidden, inter)
        shape, kind = self.shape, "fp8_w8a8" if self.shape.dtype == "fp8" else None
        return self._module.try_get_optimal_moe_config(w13, w2, shape.top_k, kind, num_tokens, block_shape=self._blocks)

    def _pinned(self) -> dict[str, Any] | None:
        return self._plain(self._lookup(1)) if self._envs.VLLM_BATCH_INVARIANT else None

    def default_config(self, num_tokens: int) -> Config:
        """What vLLM runs when nobody chooses: its tuned file's config, else its built-in rule's."""
        return self._plain(self._lookup(num_tokens))

    def config_file(self) -> pathlib.Path | None:
        """vLLM's tuned file for this layer and GPU; None if there is none."""
        return config_file(self.shape, self._device_name, per_tensor=self.per_tensor)

    def tuned_file(self) -> pathlib.Path | None:
        """The file that vLLM reads its configs from; None where it has none, or pins one config."""
        return None if self._envs.VLLM_BATCH_INVARIANT else self.config_file()

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        pinned = self._pinned()
        if pinned is not None:
            if config_key(config) == config_key(pinned):
                return None
            return f"VLLM_BATCH_INVARIANT pins {format_config(pinned)}; unset it to choose configs."
        if self._blocks is not None:
            for name in ("hidden_size", "intermediate_size"):
                if getattr(shape, name) % (group := self._blocks[0]):
                    return f"{name}={getattr(shape, name)} is no multiple of the {group}-wide scale blocks; use per_tensor or bf16."
        return refusal(self._cut(config), shape.dtype)

    def _cut(self, config: Config) -> Config:
        """vLLM cuts tiles that are deeper than a scale block."""
        most = config.get("BLOCK_SIZE_K", 0) if self._blocks is None else self._blocks[0]
        return {**config, "BLOCK_SIZE_K": most} if config.get("BLOCK_SIZE_K", 0) > most else config

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """CTAs per M block: 2I / BLOCK_SIZE_N of the gate+up GEMM and H / BLOCK_SIZE_N of the down GEMM.

        Where tokens x top_k x 4 <= experts vLLM gives every slot a block of its own, which is what the histogram
        says too unless two tokens share an expert.
        """
        up = -(-2 * shape.intermediate_size // config["BLOCK_SIZE_N"])
        down = -(-shape.hidden_size // config["BLOCK_SIZE_N"])
        resident = tiles.ctas_per_sm(_as_ours(self._cut(config), shape.dtype), shape.dtype)
        return CtaGrid(config["BLOCK_SIZE_M"], up + down, launches=(up, down), ctas_per_sm=resident)

    def run(
        self,
        config: Config,
        operands: Operands,
        /,
        *,
        quant_config: Any = None,
        activation: Any = None,
        apply_router_weight_on_input: bool = False,
    ) -> torch.Tensor:
        """Runs the layer with vLLM's `fused_experts` and returns [T, H].

        Args:
            config: what to launch.
            operands: of the layer, float32 topk_weights. Padding, of which vLLM's alignment reads out of bounds, gets
                weight 0. With `per_tensor` the scales are [E].
            quant_config: vLLM's own, instead of one made of the two scales (static activation scales, biases).
            activation: vLLM's `MoEActivation`; SiLU where absent.
            apply_router_weight_on_input: as in vLLM.

        Raises:
            InputError: scales are missing.
        """
        quant_config = self._quantised(quant_config, operands)
        redirected = importlib.import_module("rampwrap.kernels.triton.padding").redirected
        num_experts, expert_map = self.shape.num_experts, operands.expert_map
        topk_ids, topk_weights = redirected(operands.topk_ids, operands.topk_weights, num_experts, expert_map)
        options: dict[str, Any] = {}
        if activation is not None:
            options["activation"] = activation
        if apply_router_weight_on_input:
            options["apply_router_weight_on_input"] = True
        if expert_map is not None:
            options |= {"expert_map": expert_map, "global_num_experts": num_experts}
        pinned = bool(self._envs.VLLM_BATCH_INVARIANT)
        with _forcing(None if pinned else {key: config[key] for key in KEYS}):
            out: torch.Tensor = self._package.fused_experts(
                operands.hidden_states,
                operands.w13,
                operands.w2,
                topk_weights,
                topk_ids,
                quant_config=quant_config,
                **options,
            )
        return out

    def run_candidates(
        self,
        configs: Sequence[Config],
        blocks: Sequence[Any],
        choice: torch.Tensor,
        operands: Operands,
        /,
        *,
        quant_config: Any = None,
        activation: Any = None,
        apply_router_weight_on_input: bool = False,
        streams: Sequence[Any] = (),
    ) -> torch.Tensor:
        """As `run`; `choice` is not read, since the blocks say it."""
        return vllm_candidates.launch_candidates(
            self._module,
            configs,
            blocks,
            operands,
            quant_config=self._quantised(quant_config, operands),
            activation=activation,
            apply_router_weight_on_input=apply_router_weight_on_input,
            streams=streams,
        )

    def check_config(self, config: Config) -> None:
        """As for all kernels; under VLLM_BATCH_INVARIANT, which may be set at any time, one config is left."""
        if self._envs.VLLM_BATCH_INVARIANT and (reason := self.supports(config, self.shape)) is not None:
            raise ConfigError(f"The config {format_config(config)} cannot run: {reason}")
        super().check_config(config)

    def _quantised(self, quant_config: Any, operands: Operands) -> Any:
        """vLLM's description of an FP8 layer, made of the scales where it was not given."""
        if self.shape.dtype != "fp8" or quant_config is not None:
            return quant_config
        if operands.w13_scale is None or operands.w2_scale is None:
            raise InputError("FP8 weights come with scales; give w13_scale and w2_scale, or quant_config.")
        scales = operands.w13_scale, operands.w2_scale
        channels = {"per_act_token_quant": True, "per_out_ch_quant": True} if self.shape.scales == "channel" else {}
        return self._quant.fp8_w8a8_moe_quant_config(*scales, block_shape=self._blocks, **channels)

    def inputs(self, shape: MoEShape, topk_ids: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `launch` on random data of order one, on the device of `topk_ids`."""
        made = super().inputs(shape, topk_ids, seed=seed)
        if self.per_tensor:
            made |= {name: made[name].mean((1, 2)) for name in ("w13_scale", "w2_scale")}
        return made

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, quantised as the kernel does by block; with `per_tensor` only the weights are."""
        if self.per_tensor:
            plain = {name: inputs[name].double() * inputs[f"{name}_scale"][:, None, None] for name in ("w13", "w2")}
            shape, inputs = attrs.evolve(shape, dtype="bf16"), {**inputs, **plain, "w13_scale": None, "w2_scale": None}
        return super().reference(shape, inputs)
