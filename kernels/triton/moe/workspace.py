"""Memory of one fused MoE layer besides weights, input and output, so that a captured layer allocates nothing."""

import attrs
import torch

from rampwrap.errors import InputError
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FP8, TORCH_DTYPES
from rampwrap.kernels.triton.align.host import TokenBlocks, alignment_ints, blocks_in
from rampwrap.kernels.triton.moe.configs import partial_rows

ORDERED_BLOCK_M = 128
"Of the kernels that keep h in the order of the blocks."
LARGEST_BLOCK_M = 144
"Of all kernels here: the CuTe kernels go to 144, Triton's to 128, and a workspace serves both."


@attrs.frozen
class Workspace:
    """Scratch tensors for up to `num_slots` slots, any config and any routing.

    One workspace serves any number of layers of a shape that run one after the other.
    """

    num_slots: int
    h: torch.Tensor
    "[num_slots or `ordered_rows`, I], SwiGLU output."
    y: torch.Tensor
    """[partial_rows(num_slots), H], weighted rows before the sum over top-k, those of each split together.

    Of the activations' type: unsplit rows are rounded to it anyway, and the parts' own rounding adds no more.
    """
    alignment: torch.Tensor | None = None
    "int32, backs `TokenBlocks`; None lets each call allocate its own."
    x_fp8: torch.Tensor | None = None
    x_scale: torch.Tensor | None = None
    h_fp8: torch.Tensor | None = None
    h_scale: torch.Tensor | None = None
    "[num_slots or `ordered_rows`, I / 128]; other groups where scales have them, one a row where they are by channel or tensor."

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        tensors = (*(self.h, self.y, self.alignment, self.x_fp8, self.x_scale, self.h_fp8, self.h_scale),)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def ordered_h(self, rows: int, fp8: bool) -> tuple[torch.Tensor, ...]:
        """Memory for h in the order of blocks of 128 rows: bf16 [rows, I], or e4m3 [rows, I] and scales [I / 128, rows].

        Raises:
            InputError: the workspace was made for fewer tokens or experts.
        """
        columns = self.h.shape[1]
        if not fp8:
            if rows > self.h.shape[0]:
                raise InputError(_too_small(rows, self.h.shape[0]))
            return (self.h[:rows],)
        assert self.h_scale is not None
        if rows > min(2 * self.h.shape[0], self.h_scale.shape[0]):
            raise InputError(_too_small(rows, min(2 * self.h.shape[0], self.h_scale.shape[0])))
        # FP8 layers of this order have no use for the bf16 rows, which have room for twice as many.
        h = self.h.view(-1).view(FP8)[: rows * columns].view(rows, columns)
        scale = self.h_scale.view(-1)[: rows * (columns // GROUP)].view(columns // GROUP, rows)
        return h, scale

    def token_blocks(self, num_tokens: int, top_k: int, num_local_experts: int, block_m: int) -> TokenBlocks | None:
        """This workspace's alignment memory laid out for a batch and a block size."""
        if self.alignment is None:
            return None
        return blocks_in(self.alignment, num_tokens, top_k, num_local_experts, block_m)


def _too_small(rows: int, have: int) -> str:
    return (
        f"The workspace holds {have} rows of h in the order of blocks, this batch needs {rows}; allocate a larger one."
    )


def ordered_rows(num_slots: int, num_local_experts: int) -> int:
    """Rows of h in the order of blocks of 128 rows: the most that any routing of up to `num_slots` slots takes."""
    return max_blocks(num_slots, num_local_experts, ORDERED_BLOCK_M) * ORDERED_BLOCK_M


def workspace(shape: MoEShape, num_tokens: int, device: torch.device | str = "cuda") -> Workspace:
    """A workspace for batches of up to `num_tokens` tokens of a layer, with every config.

    Its size, `num_bytes`, which the device "meta" tells without allocating it: per slot 2 (H + I) bytes and the alignment,
    for FP8 layers the quantised copies on top, rows of split configs for small batches (`configs.partial_rows`), and up to
    127 more rows of h an expert for kernels that keep it in the order of blocks (`ordered_rows`).
    """
    if num_tokens < 1:
        raise InputError(f"num_tokens is {num_tokens}; give the largest batch the workspace must hold, at least 1.")
    ints = alignment_ints(num_tokens, shape.top_k, shape.num_local_experts, LARGEST_BLOCK_M)
    return allocate(
        num_tokens,
        shape.top_k,
        shape.hidden_size,
        shape.intermediate_size,
        TORCH_DTYPES[shape.dtype],
        fp8=shape.dtype == "fp8",
        device=device,
        num_local_experts=shape.num_local_experts,
        group=shape.scale_group,
        alignment=torch.empty(ints, dtype=torch.int32, device=device),
    )


def allocate(
    num_tokens: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    *,
    fp8: bool,
    device: torch.device | str,
    num_local_experts: int = 0,
    group: int = GROUP,
    alignment: torch.Tensor | None = None,
) -> Workspace:
    """The tensors of a `Workspace` from plain numbers; without experts it has no room for h in the order of blocks.

    FP8 activations have a scale for each `group` columns, or one a row where that is 0.
    """
    num_slots = num_tokens * top_k
    ordered = ordered_rows(num_slots, num_local_experts) if num_local_experts else 0

    def empty(rows: int, columns: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=of, device=device)

    rows = max(num_slots, ordered // 2 if fp8 else ordered)  # of bf16, which have room for two of FP8
    h, y = empty(rows, intermediate), empty(partial_rows(num_slots), hidden)
    if not fp8:
        return Workspace(num_slots, h, y, alignment)
    return Workspace(
        num_slots,
        h,
        y,
        alignment,
        x_fp8=empty(num_tokens, hidden, FP8),
        x_scale=empty(num_tokens, hidden // group if group else 1, torch.float32),
        h_fp8=empty(num_slots, intermediate, FP8),
        h_scale=empty(max(num_slots, ordered), intermediate // group if group else 1, torch.float32),
    )
