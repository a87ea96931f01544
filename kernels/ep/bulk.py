"""Flags of steps whose rows go by copy engines: kernels that tell and wait, and move nothing.

None of these launches overlaps the one before it (`pdl`): they stand on streams of their own, between events.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import await_cells, end_step, has_all, next_epoch, tell


@triton.jit(do_not_specialize=["rank", "peer", "num_tokens"])
def tell_kernel(bases_ptr, header_ptr, rank, peer, num_tokens, CELLS_AT: tl.constexpr, RANKS: tl.constexpr):
    """Writes the cell of this rank's first CTA at RANKS ranks from a peer on, after all that the stream did before."""
    epoch = next_epoch(header_ptr)
    if has_all(header_ptr):
        tell(bases_ptr + peer, CELLS_AT + rank * 8, epoch, num_tokens, RANKS)


@triton.jit(do_not_specialize=["source", "limit_ns", "num_tokens"])
def wait_kernel(cells_ptr, header_ptr, fault_ptr, source, limit_ns, num_tokens, PHASE: tl.constexpr):
    """Waits for the cell of the first CTA of one rank."""
    expected = tl.zeros((1,), tl.int32) + num_tokens
    epoch, wanted = next_epoch(header_ptr), expected >= 0
    await_cells(cells_ptr + source, header_ptr, fault_ptr, epoch, expected, wanted, limit_ns, PHASE, 1, source)


@triton.jit
def end_kernel(header_ptr):
    """The end of a step source by source, when all that read its epoch has ended."""
    end_step(header_ptr, next_epoch(header_ptr))
