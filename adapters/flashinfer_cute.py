"""FlashInfer's CuTe DSL grouped GEMMs for Hopper, unmodified, as a layer; bf16 and fp16, sm_90 only.

Its first GEMM gathers tokens and activates, its second weights rows and adds them up. In front of them stand our alignment
and one launch that says where each tile's tokens end: FlashInfer's own sort is C++ that is compiled at the first call, with
headers from a server. Facts of its source that users meet:

* a config's two kernels are compiled at its first launch, some seconds each, for this process only; configs with the same
  half share it;
* rows are added to the output in bf16 in no fixed order, after it was set to zero: results differ in their last bits;
* rows are padded to 64 or 128 by expert, and a padded row's h is undefined;
* it reads w13 with 32 up rows and 32 gate rows in turn: a copy of it.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from rampwrap.adapters.layer import LayerKernel, check_workspace, launch_each, only_on_hopper, runnable
from rampwrap.errors import CaptureError, InputError
from rampwrap.kernel.grid import CtaGrid, max_blocks
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.operands import TORCH_DTYPES, Contract, Operands
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align.host import ALIGNED, align_tokens, alignment_ints, blocks_in
from rampwrap.kernels.triton.tiles import tile_ends

WHERE = "flashinfer.fused_moe.cute_dsl."
UP = "sm90_contiguous_gather_grouped_gemm_act_fusion"
DOWN = "sm90_contiguous_grouped_gemm_finalize_fusion"
"Modules, and the functions in them."
ABSENT = (
    "FlashInfer's CuTe DSL GEMMs for Hopper are not installed ({}); get them with "
    "'pip install \"flashinfer-python>=0.7.2\" nvidia-cutlass-dsl'."
)
GLUE = "1"
"Version of what stands around the GEMMs; changes with every change that moves timings."

KEYS = ("block_m", "up_n", "swizzle", "down_n", "cluster", "along_m")
VALUES: dict[str, tuple[Any, ...]] = {
    "block_m": (128, 64),
    "up_n": (256, 192, 128, 64),
    "swizzle": (1, 8, 16),
    "down_n": (256, 128, 64),
    "cluster": (1, 2),
    "along_m": (False, True),
}
"""Its tactics: rows of both tiles; columns of the up tile, gate and up counted; M blocks that go through the columns
together; columns of the down tile; down tiles that share rows of h by multicast; whether those go by M block first."""
DEFAULT: Config = dict(zip(KEYS, (128, 64, 1, 64, 1, False), strict=True))
"What it runs untuned."
INTERLEAVED = 32
"Rows of w13 of one kind before those of the other."
# Its autotuner leaves these out; they are legal all the same.
LEAST_SHARED = 192
"Intermediate size from which on down tiles share h."
MOST_ALONG_M = 384
"Intermediate size up to which down tiles go by M block first, with 128 rows."
MOST_SWIZZLED = 48 << 20
"Bytes of an expert's w13 up to which blocks share them in L2, with more than 16 experts."


def refusal(config: Config) -> str | None:
    """Why a config cannot be launched on any layer, in a sentence; None if it can."""
    if set(config) != set(KEYS):
        return f"The config has {', '.join(config) or 'no keys'}; give {', '.join(KEYS)}."
    for key in KEYS:
        if config[key] not in VALUES[key]:
            return f"{key}={config[key]} is none of its tactics; use one of {', '.join(map(str, VALUES[key]))}."
    if config["block_m"] == 64 and config["down_n"] > 128:
        return f"down_n={config['down_n']} takes 128 rows, not 64; use block_m=128 or a smaller down_n."
    return None


_EVERY = (dict(zip(KEYS, values, strict=True)) for values in itertools.product(*VALUES.values()))
CONFIGS: tuple[Config, ...] = tuple(config for config in _EVERY if refusal(config) is None)


def tuned(config: Config, shape: MoEShape) -> bool:
    """Whether FlashInfer's autotuner would try a legal config on a layer, for a batch of at least 8 rows an expert."""
    inter = shape.intermediate_size
    heavy = 4 * inter * shape.hidden_size >= MOST_SWIZZLED and shape.num_experts > 16
    return not (
        (config["cluster"] > 1 and inter < LEAST_SHARED)
        or (config["along_m"] and (config["block_m"] == 64 or inter > MOST_ALONG_M))
        or (config["swizzle"] > 1 and heavy)
    )


def interleave(w13: torch.Tensor) -> torch.Tensor:
    """[E, 2I, H] with gate rows first -> the same with 32 up rows and 32 gate rows in turn; a copy."""
    experts, rows, hidden = w13.shape
    gate, up = w13.view(experts, 2, -1, INTERLEAVED, hidden).unbind(1)
    return torch.stack((up, gate), dim=2).view(experts, rows, hidden)


def deinterleave(w13: torch.Tensor) -> torch.Tensor:
    """Undoes `interleave`."""
    experts, rows, hidden = w13.shape
    up, gate = w13.view(experts, -1, 2, INTERLEAVED, hidden).unbind(2)
    return torch.stack((gate, up), dim=1).view(experts, rows, hidden)


@attrs.frozen
class TileWorkspace:
    """Scratch memory of a layer for up to `num_slots` slots, any config and any routing."""

    num_slots: int
    h: torch.Tensor
    "[rows, I], rows in the order of the blocks."
    alignment: torch.Tensor
    ends: torch.Tensor
    "int32, the number of tiles, and from `ALIGNED` on the end of each."

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.h, self.alignment, self.ends))


class FlashInferCuteMoE(LayerKernel):
    """A layer around FlashInfer's CuTe DSL GEMMs, of one shape.

    >>> kernel = FlashInferCuteMoE(MoEShape(64, 8, 2048, 1024))
    >>> weights = kernel.convert_weights(w13=w13)  # once
    >>> out = kernel.launch(kernel.configs[0], x, w2=w2, topk_weights=..., topk_ids=..., **weights)

    Raises:
        InputError: FlashInfer or its CuTe DSL is not here, or the GPU is not a Hopper.
        ConfigError: it cannot run this shape.
    """

    name = "flashinfer_cute"
    without = ("w13_scale", "w2_scale")
    weight_layout = "flashinfer_up_gate32"
    capturable = True
    nondeterministic = "rows are added to the output in bf16 in no fixed order"
    tolerance = 0.01

    def __init__(self, shape: MoEShape) -> None:
        try:
            self._up: Callable[..., Any] = getattr(importlib.import_module(WHERE + UP), UP)
            self._down: Callable[..., Any] = getattr(importlib.import_module(WHERE + DOWN), DOWN)
            version = importlib.import_module("flashinfer").__version__
        except (ImportError, AttributeError, AssertionError, OSError, RuntimeError) as error:
            raise InputError(ABSENT.format(" ".join(str(error).split()).rstrip("."))) from error
        only_on_hopper("FlashInfer's CuTe DSL GEMMs run")
        self.version = f"{version}-{GLUE}"
        usable = runnable(self.name, shape, CONFIGS, self.supports)
        tried = [config for config in usable if tuned(config, shape)]
        super().__init__(shape, tried, Contract(shape, aligned=("hidden_states", "w13", "w2")))
        self._warm: set[tuple[Any, ...]] = set()

    def default_config(self, num_tokens: int) -> Config:
        """What FlashInfer runs untuned, for every batch."""
        return DEFAULT

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        if shape.dtype not in ("bf16", "fp16"):
            return f"dtype {shape.dtype} is neither bf16 nor fp16, the only ones it has; use another kernel."
        for name, multiple in (("hidden_size", 8), ("intermediate_size", INTERLEAVED)):
            if getattr(shape, name) % multiple:
                return f"{name}={getattr(shape, name)} is no multiple of {multiple}; pad it."
        if (reason := refusal(config)) is not None:
            return reason
        tiles = -(-shape.hidden_size // config["down_n"])
        if tiles % config["cluster"]:
            return f"hidden_size={shape.hidden_size} makes {tiles} tiles of down_n={config['down_n']}, which do not pair; use cluster=1."
        return None

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """Tiles of its persistent kernels: one CTA an SM walks them."""
        launches: Any = (
            -(-2 * shape.intermediate_size // config["up_n"]),
            -(-shape.hidden_size // config["down_n"]),
        )
        return CtaGrid(config["block_m"], sum(launches), launches=launches, ctas_per_sm=1, persistent=True)

    def workspace(self, num_tokens: int, device: torch.device | str = "cuda") -> TileWorkspace:
        """Memory for `launch(..., workspace=...)` with any config and up to `num_tokens` tokens."""
        if num_tokens < 1:
            raise InputError(f"num_tokens is {num_tokens}; give the largest batch the workspace must hold, at least 1.")
        shape, slots, experts = self.shape, num_tokens * self.shape.top_k, self.shape.num_local_experts
        rows, tiles = max_blocks(slots, experts, 128) * 128, max_blocks(slots, experts, 64)
        ints = alignment_ints(num_tokens, shape.top_k, experts, 128)
        empty = functools.partial(torch.empty, device=device)
        return TileWorkspace(
            slots,
            h=empty(rows, shape.intermediate_size, dtype=TORCH_DTYPES[shape.dtype]),
            alignment=empty(ints, dtype=torch.int32),
            ends=empty(ALIGNED + tiles, dtype=torch.int32),
        )

    def precompile(self, configs: Sequence[Config], **arguments: Any) -> list[str | None]:
        """Launches each config once with these arguments, which is when it is compiled; for each None, or why it fails."""
        return launch_each(self, configs, arguments)

    def run(self, config: Config, operands: Operands, /, *, workspace: TileWorkspace | None = None) -> torch.Tensor:
        """Zeroes the output, aligns, and runs both GEMMs; returns [T, H].

        Args:
            config: what to launch.
            operands: of the layer; topk_weights of another type than float32 are converted first.
            workspace: scratch memory from `workspace`; allocated where absent.

        Raises:
            CaptureError: the config was not launched before this capture, which is when its kernels are compiled.
        """
        check_workspace(operands, workspace)
        topk_ids, out = operands.topk_ids, operands.output()
        overlaps = pdl.arguments() == pdl.WITH
        warm = (*(config[key] for key in KEYS), overlaps, topk_ids.device)
        if warm not in self._warm and topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise CaptureError(f"The config {format_config(config)} was never launched; launch it before the capture.")
        memory = workspace or self.workspace(len(topk_ids), topk_ids.device)
        (tokens, top_k), experts, block_m = topk_ids.shape, self.shape.num_local_experts, config["block_m"]
        out.zero_()
        blocks = blocks_in(memory.alignment, tokens, top_k, experts, block_m)
        align_tokens(topk_ids, block_m, experts, expert_map=operands.expert_map, blocks=blocks)
        tiles = max_blocks(topk_ids.numel(), experts, block_m)
        rows, ends, num_tiles = tiles * block_m, memory.ends[ALIGNED : ALIGNED + tiles], memory.ends[:1]
        tile_ends(blocks, ends, num_tiles)
        routing = blocks.expert_ids[:tiles], ends, blocks.sorted_token_ids[:rows], num_tiles
        h, same = memory.h[:rows], {"topk": top_k, "enable_pdl": overlaps}
        self._up(
            *(operands.hidden_states, operands.w13, *routing),
            out=h,
            permuted_m=rows,
            tile_shape_mn=(block_m, config["up_n"]),
            swizzle_size=config["swizzle"],
            **same,
        )
        self._down(
            *(h, operands.w2, *routing, operands.topk_weights.float(), out),
            tile_shape_mn=(block_m, config["down_n"]),
            cluster_shape_mn=(1, config["cluster"]),
            raster_along_m=config["along_m"],
            **same,
        )
        self._warm.add(warm)  # only now: a launch that failed has compiled nothing
        return out

    def convert_weights(self, *, w13: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """What differs from the layout of vLLM (gate rows first): w13 with up and gate rows in turn; a copy."""
        return {"w13": interleave(w13)}

    def converted_bytes(self, shape: MoEShape) -> int:
        """Bytes that `convert_weights` allocates."""
        return shape.num_local_experts * 2 * shape.intermediate_size * shape.hidden_size * 2

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, in plain torch."""
        return reference.layer(shape, inputs | {"w13": deinterleave(inputs["w13"])}, h_dtype=TORCH_DTYPES[shape.dtype])
