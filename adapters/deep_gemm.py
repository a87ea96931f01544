"""DeepGEMM's grouped GEMMs, unmodified, as a layer; sm_90 only.

Found as `deep_gemm`, or as the copy in vLLM's wheel. Around its two GEMMs stand our alignment and `kernels.triton.rows`:
tokens are quantised and scattered to rows by expert, activated and requantised between the GEMMs, and added up after them.
Facts of its source that users meet:

* nvcc compiles a kernel for each shape, layout and kind of batch size at its first launch, 2 to 15 s each, into
  ``$DG_JIT_CACHE_DIR`` or ``~/.deep_gemm``; a batch size is therefore launched once before it is captured;
* rows are padded by expert, to 128 or with block_m=64 to 64. Matrices are as large as the worst routing of a batch needs,
  since nobody waits for the real one: layout ``contiguous`` loads the unused blocks and skips their arithmetic, ``psum``
  does not touch them. The GEMMs of ``psum`` on sm_90 are not among DeepGEMM's own tests; they are among ours;
* the alignment is one setting of the process: it is set for a launch with block_m=64 and put back;
* scales of the weights are read as they are, so it needs no memory besides `workspace`.
"""

import contextlib
import importlib
import inspect
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import attrs
import torch

from rampwrap.adapters.layer import LayerKernel, check_workspace, launch_each, only_on_hopper, runnable
from rampwrap.errors import CaptureError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FP8, Contract, Operands
from rampwrap.kernels.triton.align.host import align_tokens, alignment_ints, blocks_in
from rampwrap.kernels.triton.rows import CONTIGUOUS, MASKED, PSUM, Routed, place, rows_needed

PLACES = ("deep_gemm", "vllm.third_party.deep_gemm")
"Where it is looked for: in vLLM's order."
ABSENT = (
    "DeepGEMM is not installed ({}); install vLLM 0.26 or later, whose wheel carries it, or build it from its "
    "repository, on a machine with nvcc and a Hopper GPU."
)
GLUE = "1"
"Version of what stands around the GEMMs; changes with every change that moves timings."

CONFIGS: tuple[Config, ...] = tuple(
    {"layout": layout, "block_m": block_m}
    for layout, block_m in ((CONTIGUOUS, 128), (CONTIGUOUS, 64), (PSUM, 128), (PSUM, 64), (MASKED, 64))
)
"Of ``masked`` DeepGEMM chooses 64 or 128 itself."
MASKED_MAX_SLOTS = 256
"Batches of more slots run ``contiguous``: without waiting for the counts, each expert must have room for all slots."
MASKED_ROWS = 128
"An expert's room is a multiple of it, so that no tile of 128 rows reaches into the next expert's."
TILE_N = 128
"Columns of a tile as the grid counts them: DeepGEMM takes 16 to 256, by the number of rows."

_switching = threading.Lock()


def find() -> ModuleType:
    """The package.

    Raises:
        InputError: it is nowhere, or cannot be imported; in one sentence.
    """
    reasons = []
    for place_ in PLACES:
        try:
            module = importlib.import_module(place_)
        except (ImportError, AssertionError, OSError, RuntimeError) as error:
            reasons.append(f"{place_}: {str(error).rstrip('.') or type(error).__name__}")
            continue
        if hasattr(module, "m_grouped_fp8_gemm_nt_contiguous") and hasattr(module, "m_grouped_bf16_gemm_nt_contiguous"):
            return module
        reasons.append(f"{place_} has no grouped GEMMs")
    raise InputError(ABSENT.format("; ".join(reasons)))


def compiler() -> pathlib.Path:
    """The nvcc that DeepGEMM will call; it need not exist."""
    if asked := os.environ.get("DG_JIT_NVCC_COMPILER"):
        return pathlib.Path(asked)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and (found := shutil.which("nvcc")):
        return pathlib.Path(found)
    return pathlib.Path(home or "/usr/local/cuda", "bin", "nvcc")


@attrs.frozen
class GroupedWorkspace:
    """Scratch memory of a layer for up to `num_slots` slots, any config and any routing.

    The two matrices serve both GEMMs: h takes the place of the tokens' rows once these are multiplied, and y that of
    gate and up once these are activated; so do the scales.
    """

    num_slots: int
    into: torch.Tensor
    "Bytes of the rows that a GEMM reads, [rows, max(H, I)]."
    out_of: torch.Tensor
    "bf16, the rows that a GEMM writes, [rows, max(2I, H)]."
    scale: torch.Tensor | None
    "float32, FP8 only."
    of_slot: torch.Tensor
    layout: torch.Tensor
    alignment: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        tensors = (self.into, self.out_of, self.scale, self.of_slot, self.layout, self.alignment)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class DeepGemmMoE(LayerKernel):
    """A layer around DeepGEMM's grouped GEMMs, of one shape.

    >>> kernel = DeepGemmMoE(MoEShape(64, 8, 2048, 1024, "fp8"))
    >>> out = kernel.launch(kernel.configs[0], hidden_states, w13, w2, topk_weights, topk_ids, w13_scale=..., w2_scale=...)

    Raises:
        InputError: DeepGEMM or nvcc is not here, or the GPU is not a Hopper.
        ConfigError: it cannot run this shape.
    """

    name = "deep_gemm"
    capturable = True

    def __init__(self, shape: MoEShape) -> None:
        self._package = find()
        only_on_hopper("This layer around DeepGEMM runs")
        with_nvcc = not int(os.environ.get("DG_JIT_USE_NVRTC") or 0)
        if torch.cuda.is_available() and with_nvcc and not compiler().exists():
            raise InputError(f"DeepGEMM compiles with {compiler()}, which is not here; install it or set CUDA_HOME.")
        self.version = f"{getattr(self._package, '__version__', '0')}-{GLUE}"
        kind = "bf16" if shape.dtype == "bf16" else "fp8"
        self._contiguous: Callable[..., None] = getattr(self._package, f"m_grouped_{kind}_gemm_nt_contiguous")
        self._masked: Callable[..., None] = getattr(self._package, f"m_grouped_{kind}_gemm_nt_masked")
        # An extension's functions say their parameters in the docstring.
        self._has_psum = "use_psum_layout" in (inspect.getdoc(self._contiguous) or "")
        self._has_switch = hasattr(self._package, "set_mk_alignment_for_contiguous_layout")
        super().__init__(shape, runnable(self.name, shape, CONFIGS, self.supports), Contract(shape))
        self._warm: set[tuple[Any, ...]] = set()

    def default_config(self, num_tokens: int) -> Config:
        """DeepGEMM's own way: masked for few tokens, contiguous for many."""
        return CONFIGS[-1] if num_tokens * self.shape.top_k <= MASKED_MAX_SLOTS else CONFIGS[0]

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        if shape.dtype not in ("bf16", "fp8"):
            return f"dtype {shape.dtype} is neither bf16 nor FP8, the only ones it has; use another kernel."
        step = GROUP if shape.dtype == "fp8" else GROUP // 2
        for name in ("hidden_size", "intermediate_size"):
            if getattr(shape, name) % step:
                return f"{name}={getattr(shape, name)} is no multiple of {step}, which its tiles are wide; pad it."
        if dict(config) not in [dict(known) for known in CONFIGS]:
            known = "; ".join(format_config(known) for known in CONFIGS)
            return f"{format_config(config) or 'an empty config'} is none of its configs; use {known}."
        if config["layout"] == PSUM and not self._has_psum:
            return f"DeepGEMM {self.version} has no layout psum; use contiguous."
        if config["layout"] != MASKED and config["block_m"] != 128 and not self._has_switch:
            return f"DeepGEMM {self.version} pads to 128 rows only; use block_m=128."
        return None

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """Tiles of its persistent kernels, of `TILE_N` columns: one CTA an SM walks them."""
        launches: Any = (-(-2 * shape.intermediate_size // TILE_N), -(-shape.hidden_size // TILE_N))
        return CtaGrid(config["block_m"], sum(launches), launches=launches, ctas_per_sm=1, persistent=True)

    def workspace(self, num_tokens: int, device: torch.device | str = "cuda") -> GroupedWorkspace:
        """Memory for `launch(..., workspace=...)` with any config and up to `num_tokens` tokens.

        A row takes max(H, I) + 2 max(2I, H) bytes in FP8, and there are up to 127 more than slots for each expert; for
        16384 tokens of Qwen3-30B that is 0.9 GB.
        """
        if num_tokens < 1:
            raise InputError(f"num_tokens is {num_tokens}; give the largest batch the workspace must hold, at least 1.")
        shape, slots = self.shape, num_tokens * self.shape.top_k
        hidden, inter, experts = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
        few = min(slots, MASKED_MAX_SLOTS)
        rows = max(rows_needed(slots, experts, 128, CONTIGUOUS), rows_needed(few, experts, _masked_room(few), MASKED))
        size = 1 if shape.dtype == "fp8" else 2
        tallest = max(128, _masked_room(few))
        ints = alignment_ints(num_tokens, shape.top_k, experts, tallest)

        def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        return GroupedWorkspace(
            slots,
            into=empty(rows * max(hidden, inter) * size, torch.uint8),
            out_of=empty(rows * max(2 * inter, hidden), torch.bfloat16),
            scale=empty(rows * max(hidden, inter) // GROUP, torch.float32) if size == 1 else None,
            of_slot=empty(slots, torch.int32),
            layout=empty(max(rows, experts), torch.int32),
            alignment=empty(ints, torch.int32),
        )

    def precompile(self, configs: Sequence[Config], **arguments: Any) -> list[str | None]:
        """Launches each config once with these arguments, which is when DeepGEMM compiles; for each None, or why it fails."""
        return launch_each(self, configs, arguments)

    def run(self, config: Config, operands: Operands, /, *, workspace: GroupedWorkspace | None = None) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: what to launch.
            operands: of the layer.
            workspace: scratch memory from `workspace`; allocated where absent.

        Raises:
            CaptureError: a batch of this size was not launched before this capture, which is when its kernels are compiled.
        """
        check_workspace(operands, workspace)
        tokens, device = operands.num_tokens, operands.topk_ids.device
        warm = (*config.values(), tokens, device)
        if warm not in self._warm and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                f"The config {format_config(config)} was never launched with {tokens} tokens; launch it before the capture."
            )
        out = operands.output()
        self._compute(config, operands, out, workspace or self.workspace(tokens, device))
        self._warm.add(warm)  # only now: a launch that failed has compiled nothing
        return out

    def _compute(self, config: Config, operands: Operands, out: torch.Tensor, memory: GroupedWorkspace) -> None:
        """Aligns, scatters, multiplies, activates, multiplies, adds up."""
        topk_ids, expert_map, slots = operands.topk_ids, operands.expert_map, operands.num_slots
        (tokens, top_k), experts = topk_ids.shape, self.shape.num_local_experts
        hidden, inter = self.shape.hidden_size, self.shape.intermediate_size
        layout, block_m = config["layout"], config["block_m"]
        if layout == MASKED:
            layout, block_m = (MASKED, _masked_room(slots)) if slots <= MASKED_MAX_SLOTS else (CONTIGUOUS, 128)
        blocks = blocks_in(memory.alignment, tokens, top_k, experts, block_m)
        align_tokens(topk_ids, block_m, experts, expert_map=expert_map, blocks=blocks)
        rows = place(blocks, layout, memory.of_slot[:slots], memory.layout)
        routed = Routed(topk_ids, expert_map, experts, rows)
        groups = experts if layout == MASKED else 1
        narrow = FP8 if memory.scale is not None else torch.bfloat16

        def matrix(of: torch.Tensor, columns: int) -> torch.Tensor:
            return of[: rows.num_rows * columns].view(rows.num_rows, columns)

        def scales(columns: int) -> torch.Tensor | None:
            if memory.scale is None:
                return None
            held = memory.scale[: rows.num_rows * columns // GROUP]
            return held.view(groups, columns // GROUP, rows.stride)

        into = memory.into.view(narrow)
        a, a_scale, gate_up = matrix(into, hidden), scales(hidden), matrix(memory.out_of, 2 * inter)
        h, h_scale, y = matrix(into, inter), scales(inter), matrix(memory.out_of, hidden)
        # What an expert gets in the mean: by it DeepGEMM chooses its tiles.
        expected = min(block_m if layout == MASKED else slots, -(-slots // self.shape.num_experts))
        w13: Any = operands.w13 if a_scale is None else (operands.w13, operands.w13_scale)
        w2: Any = operands.w2 if a_scale is None else (operands.w2, operands.w2_scale)
        routed.scatter(operands.hidden_states, a, a_scale)
        with self._aligned(block_m if layout != MASKED else None):
            self._multiply(layout, a, a_scale, w13, gate_up, rows.layout, expected)
            routed.activate(gate_up, h, h_scale)
            self._multiply(layout, h, h_scale, w2, y, rows.layout, expected)
        routed.combine(y, operands.topk_weights, out)

    def _multiply(
        self,
        layout: str,
        a: torch.Tensor,
        a_scale: torch.Tensor | None,
        weight: Any,
        d: torch.Tensor,
        of_rows: torch.Tensor,
        expected: int,
    ) -> None:
        """d = a weight^T by expert; scales of rows by columns, as its TMA reads them."""
        more: dict[str, Any] = {} if a_scale is None else {"disable_ue8m0_cast": True}
        if layout == MASKED:
            experts = self.shape.num_local_experts
            a, d = a.view(experts, -1, a.shape[1]), d.view(experts, -1, d.shape[1])
            left: Any = a if a_scale is None else (a, a_scale.transpose(1, 2))
            self._masked(left, weight, d, of_rows, expected, **more)
            return
        if layout == PSUM:
            more |= {"use_psum_layout": True, "expected_m_for_psum_layout": expected}
        left = a if a_scale is None else (a, a_scale[0].T)
        self._contiguous(left, weight, d, of_rows, **more)

    @contextlib.contextmanager
    def _aligned(self, block_m: int | None) -> Iterator[None]:
        """DeepGEMM's alignment for the launches inside, and what it was before for everybody else's."""
        if block_m is None or not self._has_switch:
            yield
            return
        with _switching:
            before = self._package.get_mk_alignment_for_contiguous_layout()
            if before == block_m:
                yield
                return
            self._package.set_mk_alignment_for_contiguous_layout(block_m)
            try:
                yield
            finally:
                self._package.set_mk_alignment_for_contiguous_layout(before)

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, but for gate and up, which pass through memory in bf16.

        From a layer without that rounding FP8 is off by 1 to 3 %: values of h fall to the other side of FP8's steps.
        """
        return reference.layer(shape, inputs, h_dtype=torch.bfloat16, gate_up_dtype=torch.bfloat16)


def _masked_room(num_slots: int) -> int:
    """Rows of each expert that hold a batch even if all of its slots go to one."""
    return -(-num_slots // MASKED_ROWS) * MASKED_ROWS
