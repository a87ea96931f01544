"""Flags of steps whose rows go by copy engines: kernels that tell and wait, and move nothing.

None of these launches overlaps the one before it (`pdl`): they stand on streams of their own, between events.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import triton
import triton.language as tl

from rampwrap.kernels.ep.flags import await_all, next_epoch, tell_all


@triton.jit(do_not_specialize=["rank", "peer", "num_tokens"])
def tell_kernel(
    bases_ptr, header_ptr, rank, peer, num_tokens, CELLS_AT: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr
):
    """Writes this rank's cell at RANKS ranks from a peer on, after all that the stream did before."""
    tell_all(bases_ptr + peer, CELLS_AT, rank, next_epoch(header_ptr), num_tokens, RANKS, LANES)


@triton.jit(do_not_specialize=["source", "limit_ns", "num_tokens"])
def wait_kernel(cells_ptr, header_ptr, fault_ptr, source, limit_ns, num_tokens, PHASE: tl.constexpr):
    """Waits for the cell of one rank."""
    expected = tl.zeros((1,), tl.int32) + num_tokens
    epoch = next_epoch(header_ptr)
    await_all(cells_ptr + source, header_ptr, fault_ptr, epoch, expected, limit_ns, PHASE, 1, 1, source)
