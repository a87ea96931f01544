"""`Reach`: for which batches a plan speaks, and what serves the others.

A plan speaks for token counts from half of the least profiled one to twice the largest, and for routing with at least as
many active experts as some profiled workload had. Elsewhere nothing was measured, so nothing is claimed: what the kernel
itself runs when nobody chooses serves there, hence never worse than that. Of a kernel without a `default_config` the
fitted trend alone, without its correction, names a config for balanced routing (`extrapolated`): on 152 batches of 19
simulated tables 0.80 times the first config's time in the geometric mean and never more than 0.99 times. Within reach but
far from the profiled spread the guarded choice stands, and is said to be far: on 96 such batches at most 1.07 times the
kernel's own default. tests/test_reach.py repeats both with a bound of 1.15.
"""

from collections.abc import Sequence

import attrs
import numpy as np

from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.base import CostModel
from rampwrap.policy.static import StaticTable
from rampwrap.routing.drift import Profiled, drift, routing_numbers

REACH = 2
"A plan speaks for 1 / REACH of the least profiled token count to REACH times the largest."
FAR = 1.0
"Drift of a single batch from which on it is far from what was profiled: as far out as the profiled range is wide."
FURTHEST = 1 << 16
"Tokens up to which a trend is followed; the last config serves above."


@attrs.frozen(eq=False)
class Reach:
    """The token counts that a plan speaks for, and what serves outside.

    Attributes:
        low, high: first and last token count.
        outside: what serves elsewhere, in the policy's numbering.
        own: whether that is the kernel's own default, which then also serves where too few experts are active.
        profiled: ranges of the routing that was profiled; none in plans that do not say.
    """

    low: int
    high: int
    outside: StaticTable
    own: bool
    profiled: tuple[Profiled, ...] = ()

    def inside(self, num_tokens: int) -> bool:
        """Whether the plan speaks for a batch of so many tokens."""
        return self.low <= num_tokens <= self.high

    @property
    def serves(self) -> str:
        """What serves outside, in words."""
        return "the kernel's own default serves" if self.own else "the config that is best by trend serves"

    def beyond(self) -> str:
        """Said where `inside` is false."""
        return f"beyond the profiled batches ({self.low} to {self.high} tokens are within reach): {self.serves}"

    def spread(self, counts: IntArray, num_tokens: int) -> str:
        """Said where the routing of a batch is far from what was profiled around its token count; empty elsewhere."""
        active, concentration = (float(value) for value in routing_numbers(counts))
        moved = drift(self.profiled, num_tokens, active, concentration)
        if moved is None or moved < FAR:
            return ""
        return f"outside the profiled spread ({active:.0f} active experts, concentration {concentration:.3f}, drift {moved:.1f})"

    def joined(self, static: StaticTable) -> StaticTable:
        """A static table inside, `outside` elsewhere."""
        its = {
            tokens: static.index(tokens)
            for tokens in (self.low, self.high, *static.token_counts)
            if self.inside(tokens)
        }
        near = {self.low - 1, self.high + 1} - {0, -1}
        far = {tokens for tokens in self.outside.token_counts if not self.inside(tokens) and tokens}
        rows = sorted((its | {tokens: self.outside.index(tokens) for tokens in near | far}).items())
        return StaticTable(static.source, tuple(tokens for tokens, _ in rows), tuple(index for _, index in rows))


def extrapolated(model: CostModel, shape: MoEShape, static: StaticTable, high: int) -> StaticTable:
    """For token counts above `high` the config with the least trend for balanced routing; below, the static table's.

    Static stays within the model's own error, as everywhere.
    """
    counts = [tokens for tokens in (2**power for power in range(FURTHEST.bit_length())) if tokens > high]
    rows = [(static.token_counts[0], static.indices[0])] if not counts or static.token_counts[0] < counts[0] else []
    for tokens in counts:
        slots = -(-tokens * shape.top_k * shape.num_local_experts // shape.num_experts)
        even = slots // shape.num_local_experts + (np.arange(shape.num_local_experts) < slots % shape.num_local_experts)
        us, fallback = model.trend(even), static.index(tokens)
        best = int(us.argmin())
        gains = us[best] > 0 and us[fallback] > (1 + model.margin(even)) * us[best]
        rows.append((tokens, best if gains else fallback))
    return StaticTable("trend", tuple(tokens for tokens, _ in rows), tuple(index for _, index in rows))


def span(token_counts: Sequence[int]) -> tuple[int, int]:
    """First and last token count within reach of profiled ones, ascending."""
    return -(-token_counts[0] // REACH), token_counts[-1] * REACH
