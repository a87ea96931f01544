"""`Path`: the way that a step's rows take. Every rank computes it from counts that all ranks have, so all take the same."""

from collections.abc import Sequence

import attrs

from rampwrap.ep.layout import Layout

BY_SOURCE_TOKENS = 8192
"""Tokens of a rank from which on a layer may run source by source. In CUDA graphs on four H100 a layer of Qwen3-30B takes 0.83-0.84 times as long there as by
one launch, and 0.91-0.94 at 4096, where one of a DeepSeek-V3-like shard takes 1.02-1.04 times as long. Outside graphs the host needed 2.7-5.9 ms to launch the
former kind, a launch for each source, so that it is asked for and no default."""
# Measured on 4 H100 with 64 CTAs of ordinary stores, out of each GPU.
STORE_BYTES_PER_US = 318e3
# What asking each row's ids before sending it may cost at most, to be on the safe side.
MASK_US = 0.5


@attrs.frozen
class Path:
    """How one step's rows go.

    Attributes:
        masked: only to ranks that own one of a row's experts; else every row to every rank.
        by_source: a whole layer runs on a few sources at a time, while copy engines move the rows of others; else one launch moves all.
    """

    masked: bool
    by_source: bool

    def __str__(self) -> str:
        return f"{'masked' if self.masked else 'all rows'}{', by source' if self.by_source else ''}"


def share_of_ranks(num_ranks: int, top_k: int) -> float:
    """Ranks that a row is expected to reach, as a share, where every slot picks a rank evenly."""
    return 1.0 - (1.0 - 1.0 / num_ranks) ** top_k


def row_bytes(layout: Layout) -> int:
    """Of one row on the link: columns and scales. Its ids and weights go to all ranks on every path."""
    columns = layout.shape.hidden_size
    return columns + columns // 32 if layout.payload == "fp8" else 2 * columns


def path_of(
    layout: Layout,
    tokens_per_rank: Sequence[int],
    masked: bool | None = None,
    by_source: bool = False,
    by_source_tokens: int = BY_SOURCE_TOKENS,
) -> Path:
    """The path of a step; `masked` decides its part of it, where it is not None, and `by_source` allows that.

    It must depend on nothing but its arguments, which all ranks share: ranks on different paths would wait for each
    other for ever.
    """
    most = max(tokens_per_rank)
    by_source = by_source and most >= by_source_tokens
    saved = 1.0 - share_of_ranks(layout.num_ranks, layout.shape.top_k)
    bytes_saved = most * (layout.num_ranks - 1) * row_bytes(layout) * saved
    pays = bytes_saved > MASK_US * STORE_BYTES_PER_US and not by_source  # runs of rows know nothing of one
    return Path(pays if masked is None else masked, by_source)
