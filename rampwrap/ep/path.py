"""`Path`: the way that a step's rows take. Every rank computes it from counts that all ranks have, so all take the same."""

from collections.abc import Sequence

import attrs

from rampwrap.ep.layout import Layout

LOW_LATENCY_TOKENS = 4096
"""Most tokens of a rank whose rows are sent by one launch. Two H100, H=2048, against NCCL's all-gather and reduce-scatter: bf16 1.72x
as fast at 1024 tokens a rank, 1.50x at 2048, 1.19x at 4096; FP8 1.48x, 1.52x, 1.09x. Beyond nothing was measured."""
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
    """

    low_latency: bool
    masked: bool

    def __str__(self) -> str:
        return f"{'low latency' if self.low_latency else 'high throughput'}, {'masked' if self.masked else 'all rows'}"


def share_of_ranks(num_ranks: int, top_k: int) -> float:
    """Ranks that a row is expected to reach, as a share, where every slot picks a rank evenly."""
    return 1.0 - (1.0 - 1.0 / num_ranks) ** top_k


def row_bytes(layout: Layout) -> int:
    """Of one row on the link: columns and scales. Its ids and weights go to all ranks on every path."""
    columns = layout.shape.hidden_size
    return columns + columns // 32 if layout.payload == "fp8" else 2 * columns


def path_of(layout: Layout, tokens_per_rank: Sequence[int], masked: bool | None = None) -> Path:
    """The path of a step; `masked` decides that part of it, where it is not None.

    It must depend on nothing but its arguments, which all ranks share: ranks on different paths would wait for each
    other for ever.
    """
    most = max(tokens_per_rank)
    saved = 1.0 - share_of_ranks(layout.num_ranks, layout.shape.top_k)
    bytes_saved = most * (layout.num_ranks - 1) * row_bytes(layout) * saved
    pays = bytes_saved > MASK_US * STORE_BYTES_PER_US
    return Path(low_latency=most <= LOW_LATENCY_TOKENS, masked=pays if masked is None else masked)
