"""`Terms`: what ranks must agree in before they share memory, and what keeps them from it."""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from rampwrap.ep.board import Board
from rampwrap.ep.layout import PROTOCOL, Layout
from rampwrap.errors import GroupError
from rampwrap.kernel.placement import Placement


@attrs.frozen
class Terms:
    """Of one rank, as it tells the others.

    Attributes:
        agreed: what must be the same on all ranks, by name, as text.
        host: name of its machine.
        gpu: index of its GPU, None on a CPU.
        gpu_id: by which its GPU is known on the machine.
        num_experts: of the layer.
        experts: those of the rank, by local id.
        busy: why the rank can open no group, in a sentence.
    """

    agreed: dict[str, str]
    host: str
    gpu: int | None
    gpu_id: str | None
    num_experts: int = 0
    experts: list[int] = attrs.field(factory=list)
    busy: str | None = None

    @classmethod
    def of(cls, layout: Layout, placement: Placement, device: torch.device, backend: str, busy: str | None) -> "Terms":
        """Of an `ExpertParallel`."""
        shape = layout.shape
        agreed = {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "hidden_size": shape.hidden_size,
            "dtype": shape.dtype,
            "activation": " ".join(shape.form) or "silu",
            "max_tokens_per_rank": layout.max_tokens_per_rank,
            "payload": layout.payload,
            "partials": layout.partials,
            "backend": backend,
        }
        here = cls.here(agreed, device)
        return attrs.evolve(here, num_experts=shape.num_experts, experts=placement.experts.tolist(), busy=busy)

    @classmethod
    def here(cls, agreed: Mapping[str, object], device: torch.device) -> "Terms":
        """Of this process, without experts."""
        gpu = (device.index or 0) if device.type == "cuda" else None
        given = {"version of the protocol": PROTOCOL, **agreed, "device": device.type}
        return cls(
            agreed={name: str(its) for name, its in given.items()},
            host=platform.node(),
            gpu=gpu,
            gpu_id=None if gpu is None else str(torch.cuda.get_device_properties(gpu).uuid),
        )

    @property
    def placement(self) -> Placement:
        return Placement(self.num_experts, np.array(self.experts, dtype=np.int64))


def met(board: Board, wish: Terms) -> list[Terms]:
    """Those of all ranks, which tell each other theirs.

    Raises:
        GroupError: as `check`, or a rank did not arrive.
    """
    every = [Terms(**its) for its in board.exchange("open", attrs.asdict(wish))]
    check(every)
    return every


def reach(board: Board, all_terms: Sequence[Terms], rank: int) -> None:
    """Nothing, where every rank can write into the memory of all others.

    Raises:
        GroupError: the reason of the lowest rank that cannot; the same sentence on every rank.
    """
    reason = first_reason(board.exchange("reach", apart(all_terms, rank, torch.cuda.can_device_access_peer)))
    if reason is not None:
        raise GroupError(reason)


def check(all_terms: Sequence[Terms]) -> None:
    """Nothing, where all ranks can share a group.

    Raises:
        GroupError: they disagree, or one is busy; the same sentence on every rank.
    """
    for rank, its in enumerate(all_terms):
        if its.busy is not None:
            raise GroupError(f"rank {rank} cannot open this group: {its.busy}")
    first = all_terms[0]
    for name, value in first.agreed.items():
        for rank, its in enumerate(all_terms):
            if its.agreed.get(name) != value:
                raise GroupError(
                    f"ranks disagree in {name}: rank 0 has {value}, rank {rank} has {its.agreed.get(name)}; "
                    "give all ranks the same."
                )


def apart(all_terms: Sequence[Terms], rank: int, can_access: Callable[[int, int], bool]) -> str | None:
    """Why a rank cannot write into the memory of all others, in a sentence; None where it can.

    Args:
        all_terms: of every rank.
        rank: the one.
        can_access: whether a GPU of this machine reaches another, by their indices.
    """
    mine = all_terms[rank]
    if mine.gpu is None:
        return f"rank {rank} runs on a CPU; use the backend 'collectives'."
    for other, its in enumerate(all_terms):
        if other == rank:
            continue
        if its.host != mine.host:
            return (
                f"ranks {rank} and {other} are on the hosts {mine.host} and {its.host}; use the backend 'collectives'."
            )
        if its.gpu_id == mine.gpu_id:
            return f"ranks {rank} and {other} share one GPU; give each rank its own."
        # Where a process sees its own GPU only, all have index 0, and nothing but the mapping itself can tell.
        if its.gpu is not None and its.gpu != mine.gpu and not can_access(mine.gpu, its.gpu):
            return (
                f"GPU {mine.gpu} of rank {rank} has no access to GPU {its.gpu} of rank {other}; "
                "use GPUs that NVLink connects, or the backend 'collectives'."
            )
    return None


def first_reason(reasons: Sequence[Any]) -> str | None:
    """Of what each rank gave as its reason, or None, that of the lowest rank."""
    return next((str(its) for its in reasons if its is not None), None)
