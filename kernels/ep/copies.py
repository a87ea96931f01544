"""Launches of bulk steps: copies of a rank's rows into the memory of peers, and the flags around them, one peer at a time."""

from collections.abc import Sequence
from typing import Any

import torch

from rampwrap.errors import InputError
from rampwrap.kernels.ep.bulk import copy_kernel, tell_kernel, wait_kernel
from rampwrap.kernels.ep.host import Mapped

MOST_FIELDS = 3
"Tensors of one copy."
FIELD_CTAS = 8
"For each peer, of a copy of ids, weights and scales: 1.5 MB for 4096 tokens and three peers."
Copy = tuple[torch.Tensor, int]
"A contiguous tensor, and the byte of every rank's memory that it goes to, a multiple of 4."


def copy_to_all(mapped: Mapped, copies: Sequence[Copy]) -> None:
    """One launch: up to `MOST_FIELDS` short tensors to all peers, the next rank's first."""
    if mapped.num_ranks > 1:
        _copy(mapped, copies, 1, (FIELD_CTAS, mapped.num_ranks - 1), None, BLOCK=1024, num_warps=8)


def copy_to(mapped: Mapped, copies: Sequence[Copy], peer: int, max_ctas: int, phase: int, num_tokens: int) -> None:
    """One launch of at most `max_ctas` CTAs: tensors to one peer, and then this rank's cell of the phase there."""
    first = (peer - mapped.rank) % mapped.num_ranks
    _copy(mapped, copies, first, (max_ctas, 1), phase, num_tokens, BLOCK=8192, num_warps=16)


def _copy(
    mapped: Mapped,
    copies: Sequence[Copy],
    first: int,
    grid: tuple[int, int],
    phase: int | None,
    num_tokens: int = 0,
    **options: int,
) -> None:
    if not 1 <= len(copies) <= MOST_FIELDS:
        raise InputError(f"{len(copies)} tensors are copied; give one to {MOST_FIELDS}.")
    runs = [its.view(-1).view(torch.int32) for its, _ in copies]
    wide = all(
        at % 16 == 0 and run.numel() % 4 == 0 and run.data_ptr() % 16 == 0
        for run, (_, at) in zip(runs, copies, strict=True)
    )
    given: dict[str, Any] = {}
    for number in range(MOST_FIELDS):
        here = number < len(copies)
        given[f"field_{number}_ptr"] = runs[number] if here else None
        given[f"at_{number}"] = copies[number][1] if here else 0
        given[f"count_{number}"] = runs[number].numel() // (4 if wide else 1) if here else 0
    copy_kernel[grid](
        bases_ptr=mapped.bases,
        header_ptr=mapped.views["header"],
        ticket_ptr=mapped.ticket,
        rank=mapped.rank,
        first=first,
        num_tokens=num_tokens,
        RANKS=mapped.num_ranks,
        WIDE=wide,
        TELLS=phase is not None,
        CELLS_AT=0 if phase is None else mapped.cells(phase)[1],
        **given,
        **options,
    )


def tell(mapped: Mapped, peer: int, phase: int, num_tokens: int) -> None:
    """One launch: this rank's cell of a phase at one peer, or at itself, after all that the stream did before."""
    _, at = mapped.cells(phase)
    tell_kernel[(1,)](mapped.bases, mapped.views["header"], mapped.rank, peer, num_tokens, CELLS_AT=at, num_warps=1)


def wait(mapped: Mapped, sources: int, first: int, phase: int, tokens_per_rank: Sequence[int]) -> None:
    """One launch, which ends when the cells of some ranks are there, from the `first` on: what comes after it sees what they announce."""
    cells, _ = mapped.cells(phase)
    wait_kernel[(sources,)](
        cells,
        mapped.views["header"],
        mapped.fault,
        first,
        int(mapped.timeout_s * 1e9),
        **mapped.counts(tokens_per_rank),
        RANKS=mapped.num_ranks,
        PHASE=phase,
        num_warps=1,
    )
