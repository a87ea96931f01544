"""What grouped GEMMs that gather by themselves read of an alignment: where each tile's tokens end, and how many tiles."""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import torch

import triton
import triton.language as tl
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.align.host import TokenBlocks
from rampwrap.kernels.triton.pdl import wait_for_launch_before


@triton.jit(do_not_specialize=["num_slots"])
def ends_kernel(
    ends_ptr,
    num_tiles_ptr,
    sorted_token_ids_ptr,
    num_tokens_post_padded_ptr,
    num_slots,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """One M block a CTA: its padding comes last, so that its tokens end behind as many rows as there are slots."""
    wait_for_launch_before(PDL)
    block = tl.program_id(0)
    padded = tl.load(num_tokens_post_padded_ptr)
    if block == 0:
        tl.store(num_tiles_ptr, padded // BLOCK_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(sorted_token_ids_ptr + row, mask=row < padded, other=num_slots)
    tl.store(ends_ptr + block, block * BLOCK_M + tl.sum((slot < num_slots).to(tl.int32), 0))


def tile_ends(blocks: TokenBlocks, ends: torch.Tensor, num_tiles: torch.Tensor) -> None:
    """Fills in where tokens end, after an alignment.

    Args:
        blocks: aligned; block_m a power of two.
        ends: int32 [M blocks], written: the row behind the last token of each block, its first row where it has none.
        num_tiles: int32 [1], written: M blocks with tokens.
    """
    ends_kernel[(len(ends),)](
        ends,
        num_tiles,
        blocks.sorted_token_ids,
        blocks.num_tokens_post_padded,
        blocks.num_slots,
        BLOCK_M=blocks.block_m,
        num_warps=1,
        **pdl.arguments(),
    )
