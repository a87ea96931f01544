"""Alpha-MoE's fused FP8 layer (`torch.ops.alpha_moe.fused_moe_w8a8_up_down`) as a wrapped kernel; sm_90 only.

One launch does both GEMMs: a CTA computes 128 columns of the activations of one M block, and adds its share of
the output rows to memory in bf16. Facts of its source that users meet:

* the output must be zero before the launch, and is summed in no fixed order: results differ in their last bits;
* the gate+up GEMM accumulates in bf16: 3 % from a layer in float64, where other FP8 kernels are within 1 %;
* the down GEMM covers whole tiles of 256 columns of the output, so H must be a multiple of 256;
* a config that does not fit shared memory, and any other CUDA error of its set-up, ends the process.
"""

import functools
import importlib
import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from rampwrap.adapters.layer import CandidateKernel, only_on_hopper, runnable
from rampwrap.errors import InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.branches import run_beside
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FP8, Contract, Operands
from rampwrap.kernels.common.sm90 import MAX_GRID_Y, MAX_SHARED, SM_REGISTERS, SM_SHARED, SM_THREADS
from rampwrap.kernels.triton.align.host import TokenBlocks, align_tokens
from rampwrap.kernels.triton.quantise import quantise_rows

KEYS = ("block_m", "block_n", "warp_n", "stages")
PAIRS = ((64, 4), (32, 8))
"(block_n, warp_n): 256 rows of the gate+up weights either way, on one or two warpgroups."
TILE = 256
"Gate+up rows of a CTA, and output columns of one step of its down GEMM."
ABSENT = (
    "Alpha-MoE is not installed ({}); get it with 'pip install --no-build-isolation "
    "git+https://github.com/Aleph-Alpha/Alpha-MoE' on a machine with nvcc and a Hopper GPU."
)


def shared_bytes(config: Config) -> int:
    """Shared memory of a CTA in bytes: the larger of its two phases, plus what is static.

    Up: per stage 256x128 weights and block_m x 128 activations, and float scales, 2 x (2 + block_m) a stage. Down: the
    weights' stages, the activations [block_m, 128] and the bf16 output tile [block_m, 264]. Both are padded to 1 KB.
    Static: barriers, the routing weights of the block, the down scales.
    """
    block_m, stages = config["block_m"], config["stages"]
    weights = stages * TILE * GROUP
    up = weights + stages * block_m * GROUP + 8 * stages * (2 + block_m)
    down = weights + block_m * GROUP + 2 * block_m * (TILE + 8)
    static = 16 * stages + 4 * block_m + 16 * stages
    return int(-(-max(up, down) // 1024) * 1024 + static)


def refusal(config: Config) -> str | None:
    """Why a config cannot be launched, in a sentence; None if it can. The one statement of what is legal."""
    if set(config) != set(KEYS):
        return f"The config has {', '.join(config)}; give {', '.join(KEYS)}."
    if config["block_m"] not in range(8, 129, 8):
        return f"block_m={config['block_m']} is not compiled; use a multiple of 8 up to 128."
    if (config["block_n"], config["warp_n"]) not in PAIRS:
        return (
            f"block_n={config['block_n']} with warp_n={config['warp_n']} is not compiled; use 64 with 4 or 32 with 8."
        )
    if config["stages"] not in range(1, 6):
        return f"stages={config['stages']} is not compiled; use 1 to 5."
    shared = shared_bytes(config)
    if shared > MAX_SHARED:
        return f"It needs {shared} bytes of shared memory where an SM gives {MAX_SHARED}, which would end the process; use fewer stages or a smaller block_m."
    return None


_EVERY = (
    dict(zip(KEYS, (block_m, *pair, stages), strict=True))
    for block_m in range(8, 129, 8)
    for pair in PAIRS
    for stages in range(1, 6)
)
CONFIGS: tuple[Config, ...] = tuple(config for config in _EVERY if refusal(config) is None)
"Its 160 instances without the 8 that would end the process."


def interleave(weights: torch.Tensor, rows: int = 8) -> torch.Tensor:
    """[E, 2n, ...] with gate rows first -> the same with `rows` gate rows and `rows` up rows in turn; a copy.

    Alpha-MoE reads w13 with rows=8 and its scales with rows=1.
    """
    return _swap_axes(weights, (weights.shape[0], 2, -1, rows, *weights.shape[2:]))


def deinterleave(weights: torch.Tensor, rows: int = 8) -> torch.Tensor:
    """Undoes `interleave`."""
    return _swap_axes(weights, (weights.shape[0], -1, 2, rows, *weights.shape[2:]))


def _swap_axes(weights: torch.Tensor, split: tuple[int, ...]) -> torch.Tensor:
    if weights.shape[1] % (2 * split[3]):
        raise InputError(
            f"weights of shape {tuple(weights.shape)} do not interleave by {split[3]}; pad axis 1 to a multiple of {2 * split[3]}."
        )
    # FP8 has few operations of its own; its bytes have all.
    raw = weights.view(torch.uint8) if weights.dtype == FP8 else weights
    return raw.view(split).transpose(1, 2).contiguous().view(raw.shape).view(weights.dtype)


class AlphaMoE(CandidateKernel):
    """Alpha-MoE's layer of one shape.

    >>> kernel = AlphaMoE(MoEShape(64, 8, 2048, 1024, "fp8"))
    >>> weights = kernel.convert_weights(w13=w13, w13_scale=w13_scale)  # once
    >>> out = kernel.launch(kernel.configs[0], x, w2=w2, w2_scale=s2, topk_weights=..., topk_ids=..., **weights)

    Raises:
        InputError: Alpha-MoE is not installed, or the GPU is not a Hopper.
        ConfigError: it cannot run this shape.
    """

    name = "alpha_moe"
    weight_layout = "alpha_moe_interleaved8"
    capturable = True
    nondeterministic = "output tiles are added in bf16 in no fixed order"
    launch_names = ("fused_moe_w8a8",)
    tolerance = 0.05

    def __init__(self, shape: MoEShape) -> None:
        try:
            importlib.import_module("alpha_moe")
            self._op: Any = torch.ops.alpha_moe.fused_moe_w8a8_up_down
        except (ImportError, AttributeError) as error:
            raise InputError(ABSENT.format(error)) from error
        only_on_hopper("Alpha-MoE runs")
        try:
            self.version = importlib.metadata.version("alpha_moe_python")
        except importlib.metadata.PackageNotFoundError:
            self.version = "0.0.1"
        usable = runnable(self.name, shape, CONFIGS, self.supports)
        super().__init__(shape, usable, Contract(shape, topk_weights=(torch.float32,)))

    def default_config(self, num_tokens: int) -> Config:
        """A config for balanced routing, by tokens per expert: Alpha-MoE itself has none without a tuned file."""
        per_expert = num_tokens * self.shape.top_k / self.shape.num_experts
        block_m = min(64, 8 * max(1, -(-int(per_expert) // 8)))
        return dict(zip(KEYS, (block_m, 32, 8, 4), strict=True))

    def tuned_file(self) -> pathlib.Path | None:
        """The JSON of its tuner that Alpha-MoE reads, ``$ALPHA_MOE_CONFIG``; None where that is not set."""
        path = os.environ.get("ALPHA_MOE_CONFIG")
        return pathlib.Path(path) if path else None

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        if shape.dtype != "fp8":
            return f"dtype {shape.dtype} is not FP8, the only one it has; use another kernel."
        if shape.hidden_size % TILE:
            return (
                f"hidden_size={shape.hidden_size} is no multiple of {TILE}, the last columns would stay zero; pad it."
            )
        if shape.intermediate_size % GROUP:
            return f"intermediate_size={shape.intermediate_size} is no multiple of {GROUP}; pad it."
        return refusal(config)

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """2I / 256 CTAs for each M block, in one launch."""
        threads = 128 + 32 * config["warp_n"]
        # bf16 sums and float32 products of a thread, and about 60 for the rest.
        registers = min(255, 60 + 6 * (config["block_n"] // 16) * (config["block_m"] // 8))
        by_shared = SM_SHARED // (shared_bytes(config) + 1024)
        resident = max(1, min(by_shared, SM_REGISTERS // (threads * registers), SM_THREADS // threads))
        return CtaGrid(config["block_m"], -(-2 * shape.intermediate_size // TILE), ctas_per_sm=resident)

    def run(self, config: Config, operands: Operands, /, *, scaling_factor: float = 1.0) -> torch.Tensor:
        """Quantises, aligns, zeroes the output and runs the layer; returns [T, H], times `scaling_factor`."""
        local, expert_map = self.shape.num_local_experts, operands.expert_map
        blocks = align_tokens(operands.topk_ids, config["block_m"], local, expert_map=expert_map)
        return self.run_candidates([config], [blocks], None, operands, scaling_factor=scaling_factor)

    def run_candidates(
        self,
        configs: Sequence[Config],
        blocks: Sequence[TokenBlocks],
        choice: torch.Tensor | None,
        operands: Operands,
        /,
        *,
        scaling_factor: float = 1.0,
        streams: Sequence[Any] = (),
    ) -> torch.Tensor:
        """Quantises and zeroes once, and launches each config on its blocks.

        `choice` is not read, since the blocks say it: a CTA past num_tokens_post_padded leaves before it reads anything
        else.
        """
        hidden_states, tokens = operands.hidden_states, operands.num_tokens
        for config, its in zip(configs, blocks, strict=True):
            if its.sorted_token_ids.numel() > MAX_GRID_Y * config["block_m"]:
                raise InputError(
                    f"{tokens} tokens make more than {MAX_GRID_Y} blocks of {config['block_m']}; split the batch or use a larger block_m."
                )
        out = operands.output().zero_()
        x = torch.empty_like(hidden_states, dtype=FP8)
        x_scale = hidden_states.new_empty(tokens, self.shape.hidden_size // GROUP, dtype=torch.float32)
        quantise_rows(hidden_states, x, x_scale)
        work = [
            functools.partial(
                self._op,
                *(x, x_scale, operands.w13, operands.w13_scale, operands.w2, operands.w2_scale),
                *(its.sorted_token_ids, its.expert_ids, its.num_tokens_post_padded, operands.topk_weights, out),
                *(self.shape.top_k, *(config[key] for key in KEYS), scaling_factor),
            )
            for config, its in zip(configs, blocks, strict=True)
        ]
        run_beside(streams, work)
        return out

    def convert_weights(self, *, w13: torch.Tensor, w13_scale: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """What differs from the layout of vLLM (gate rows first): w13 interleaved by 8 and its scales by 1; copies."""
        return {"w13": interleave(w13), "w13_scale": interleave(w13_scale, 1)}

    def converted_bytes(self, shape: MoEShape) -> int:
        """Bytes that `convert_weights` allocates."""
        rows = shape.num_local_experts * 2 * shape.intermediate_size
        return rows * shape.hidden_size + 4 * rows * shape.hidden_size // GROUP**2

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, with the same quantisation steps."""
        plain = {"w13": deinterleave(inputs["w13"]), "w13_scale": deinterleave(inputs["w13_scale"], 1)}
        return super().reference(shape, inputs | plain)
