"""`Memory`: what an `ExpertParallel` allocates on each rank when it is opened."""

import attrs

from rampwrap.ep.layout import Layout
from rampwrap.ep.path import LOW_LATENCY_TOKENS


@attrs.frozen
class Memory:
    """Bytes on one rank.

    Attributes:
        shared: that all ranks map, and write into.
        own: ticket and M blocks of steps of low latency.
        collectives: of steps that go by torch.distributed.
    """

    shared: int
    own: int
    collectives: int

    @property
    def total(self) -> int:
        return self.shared + self.own + self.collectives


def memory_of(layout: Layout, backend: str, num_local_experts: int) -> Memory:
    """What `ExpertParallel.open` allocates; collectives allocate further messages of a step while it runs.

    Args:
        layout: of the group.
        backend: "collectives" or "symmetric", which needs Triton.
        num_local_experts: of the rank.
    """
    if backend == "collectives":
        return Memory(0, 0, layout.bytes)
    from rampwrap.ep.symmetric import own_ints, shared_layout

    shared = shared_layout(layout)
    larger = layout.max_tokens_per_rank > LOW_LATENCY_TOKENS
    return Memory(shared.bytes, 4 * own_ints(shared, num_local_experts), layout.bytes if larger else 0)
