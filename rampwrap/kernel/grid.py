"""`CtaGrid`: all that a cost model may know of a config, and the arithmetic of blocks and waves."""

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import ConfigError
from rampwrap.schema import MOST_SIZE, OMIT, between

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_size = between(1, MOST_SIZE, ConfigError)


@attrs.frozen
class CtaGrid:
    """How many thread blocks (CTAs) a config launches for a histogram, and how they fill the GPU.

    A fused-MoE kernel cuts the tokens of each expert into M blocks of `block_m` rows and launches a fixed
    number of CTAs for each of them, so ``CTAs = num_blocks(expert_counts, block_m) * ctas_per_block``.
    """

    block_m: int = attrs.field(validator=_size)
    "Token rows of one M block."
    ctas_per_block: int = attrs.field(validator=_size)
    "CTAs of one M block over all launches of the layer, split-K copies included."
    launches: tuple[int, ...] = attrs.field(converter=tuple, kw_only=True, metadata=OMIT)
    "The same by launch: sums to `ctas_per_block`."
    ctas_per_sm: int | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(between(1, 1 << 10, ConfigError)), metadata=OMIT
    )
    "CTAs of this config resident on one SM at a time; None where the kernel cannot say."
    split_k: int = attrs.field(default=1, kw_only=True, validator=_size, metadata=OMIT)
    persistent: bool = attrs.field(default=False, kw_only=True, metadata=OMIT)
    "One CTA per slot of the GPU, each looping over tiles: there is no tail wave to quantise."

    @launches.default
    def _one_launch(self) -> tuple[int, ...]:
        return (self.ctas_per_block,)

    @launches.validator
    def _launches_add_up(self, attribute: "attrs.Attribute[tuple[int, ...]]", value: tuple[int, ...]) -> None:
        if sum(value) != self.ctas_per_block or min(value, default=0) < 1:
            raise ConfigError(
                f"CtaGrid.launches is {value}; give positive numbers that add up to ctas_per_block={self.ctas_per_block}."
            )

    def num_ctas(self, expert_counts: npt.ArrayLike) -> int:
        """CTAs that do work for this histogram, over all launches of the layer."""
        return int(num_blocks(expert_counts, self.block_m)) * self.ctas_per_block

    def waves(self, expert_counts: npt.ArrayLike, num_sms: int) -> tuple[int, float]:
        """Waves of a layer, whose launches come one after the other, and the share of the last one that has work.

        Of a persistent grid: tiles that its busiest CTA does.
        """
        blocks, resident = int(num_blocks(expert_counts, self.block_m)), self.ctas_per_sm or 1
        waves = sum(num_waves(blocks * ctas, num_sms, resident) for ctas in self.launches)
        return waves, last_wave_util(blocks * self.launches[-1], num_sms, resident)


def num_blocks(expert_counts: npt.ArrayLike, block_m: int) -> IntArray:
    """M blocks of a histogram: ``sum_e ceil(counts[..., e] / block_m)``.

    Args:
        expert_counts: integers [E] or [W, E], tokens per local expert.
        block_m: rows of one block.

    Returns:
        int64 [] or [W].
    """
    counts = np.asarray(expert_counts, dtype=np.int64)
    blocks: IntArray = np.sum(-(-counts // block_m), axis=-1, dtype=np.int64)
    return blocks


def num_waves(num_ctas: int, num_sms: int, ctas_per_sm: int = 1) -> int:
    """Rounds the GPU needs to run `num_ctas` CTAs when `num_sms * ctas_per_sm` run at a time."""
    return -(-num_ctas // (num_sms * ctas_per_sm))


def last_wave_util(num_ctas: int, num_sms: int, ctas_per_sm: int = 1) -> float:
    """Share of the last wave's slots that have work, in (0, 1]; 1.0 for an empty grid."""
    slots = num_sms * ctas_per_sm
    return ((num_ctas - 1) % slots + 1) / slots if num_ctas else 1.0


def max_blocks(num_slots: int, num_experts: int, block_m: int) -> int:
    """The most M blocks that any routing of `num_slots` = tokens x top_k rows can make: the capacity of a grid.

    With E' = min(E, slots) experts active, each costs one block and every further `block_m` rows one more.
    """
    active = min(num_experts, num_slots)
    return active + (num_slots - active) // block_m
