"""`Memory`: what an `ExpertParallel` allocates on each rank when it is opened."""

import attrs

from rampwrap.ep.layout import Layout, placed


@attrs.frozen
class Memory:
    """Bytes on one rank.

    Attributes:
        shared: that all ranks map, and write into.
        own: M blocks.
        collectives: what torch.distributed moves rows into.
    """

    shared: int
    own: int
    collectives: int

    @property
    def total(self) -> int:
        return self.shared + self.own + self.collectives


def memory_of(layout: Layout, backend: str, num_local_experts: int) -> Memory:
    """What `ExpertParallel.open` allocates. Collectives allocate further messages of a step while it runs, and a step by source
    sums of the type of `partials` for all rows.

    Args:
        layout: of the group.
        backend: "collectives" or "symmetric", which needs Triton.
        num_local_experts: of the rank.
    """
    if backend == "collectives":
        return Memory(0, 0, placed(layout.tensors)[-1].end)
    from rampwrap.ep.symmetric import own_ints

    return Memory(layout.bytes, 4 * own_ints(layout, num_local_experts), 0)
