"""`Path`: the way that a step's rows take. Every rank computes it from counts that all ranks have, so all take the same."""

from collections.abc import Sequence

import attrs

from rampwrap.ep.layout import Layout

BULK_TOKENS = 2048
"""Tokens of a rank from which on rows are sent in bulk. Predicted, not measured: by one launch, which is low latency, dispatch took 1.56
times its floor and combine 1.73 at 4096 (two H100, H=2048, bf16: 1.50x as fast as NCCL at 2048, 1.19x at 4096), and bulk has
about 20 us of launches and flags beyond its own."""
BY_SOURCE_TOKENS = 4096
"""Tokens of a rank from which on `ExpertParallel.layer` runs once for each source. Predicted, not measured: the weights are read as often,
100 us for 32 experts of Qwen3-30B in bf16, which hides behind the products from about 256 rows an expert on."""
# Measured on 4 H100 with 64 CTAs of ordinary stores, out of each GPU.
STORE_BYTES_PER_US = 318e3
# What asking each row's ids before sending it may cost at most, to be on the safe side.
MASK_US = 0.5


@attrs.frozen
class Path:
    """How one step's rows go.

    Attributes:
        low_latency: by stores of the launch that prepares them; else in bulk.
        masked: only to ranks that own one of a row's experts; else every row to every rank.
        by_source: a whole layer runs once for each source, while the rows of others travel.
    """

    low_latency: bool
    masked: bool
    by_source: bool

    def __str__(self) -> str:
        kind = "low latency" if self.low_latency else "high throughput"
        return f"{kind}, {'masked' if self.masked else 'all rows'}{', by source' if self.by_source else ''}"


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
    by_source: bool | None = None,
    bulk_tokens: int = BULK_TOKENS,
) -> Path:
    """The path of a step; `masked` and `by_source` decide their part of it, where they are not None.

    It must depend on nothing but its arguments, which all ranks share: ranks on different paths would wait for each
    other for ever.
    """
    most = max(tokens_per_rank)
    saved = 1.0 - share_of_ranks(layout.num_ranks, layout.shape.top_k)
    bytes_saved = most * (layout.num_ranks - 1) * row_bytes(layout) * saved
    pays = bytes_saved > MASK_US * STORE_BYTES_PER_US
    low_latency = most < bulk_tokens
    pieces = most >= BY_SOURCE_TOKENS if by_source is None else by_source
    masked = pays and low_latency if masked is None else masked  # runs of words know nothing of rows
    return Path(low_latency, masked, by_source=pieces and not low_latency)
