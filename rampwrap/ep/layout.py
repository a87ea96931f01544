"""`Layout`: what a rank keeps of all ranks' tokens, and the memory that its peers write it into, region by region."""

from collections.abc import Iterable, Mapping

import attrs
import torch

from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FP8, TORCH_DTYPES
from rampwrap.schema import between

PROTOCOL = 3
"Of regions, cells and their meaning: ranks of different ones must not meet."
MOST_RANKS = 64
MOST_TOKENS = 1 << 16
ALIGNED = 256
"Bytes at whose multiples regions start: whole lines of 128 bytes, and 16 bytes for every vector."
HEADER = 64
"int64 values: epochs and fault code, each on a line of its own, and room."
CELLS = 384
"""Of a rank and phase, one for each CTA that shares its tokens: three on an SM of Hopper, with one or more tokens each, as many as
fit at once with the 78 registers for each of 256 threads that quantising takes. Where fewer fit, they go in the order of their numbers."""


MARKED_BYTES = 4 << 20
"""Of a rank, for sums that are their own flags. To put their marks back takes as long as to write them: more of them would take longer so
(predicted; four H100, H=7168: even with 1 to 4 MB, 2 us slower with 7)."""
Wanted = tuple[str, torch.dtype, tuple[int, ...]]
"Name, type and shape of a tensor."


@attrs.frozen
class Region:
    """A tensor inside the memory of a rank."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Without what pads it to the next region."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes to the next region."""
        return self.offset + -(-self.bytes // ALIGNED) * ALIGNED


def placed(wanted: Iterable[Wanted]) -> tuple[Region, ...]:
    """Names, types and shapes in the order of memory, each at a multiple of 256 bytes."""
    regions: list[Region] = []
    for name, dtype, shape in wanted:
        regions.append(Region(name, dtype, shape, regions[-1].end if regions else 0))
    return tuple(regions)


def views_of(regions: Iterable[Region], memory: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """The regions of uint8 memory, by name."""
    return {its.name: memory[its.offset : its.offset + its.bytes].view(its.dtype).view(its.shape) for its in regions}


def marked(num_ranks: int, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Wanted:
    """Room for sums of steps of few tokens, which are their own flags: a CTA for each, and rows of whole stores (`kernels.ep.marked`)."""
    row = hidden_size * dtype.itemsize
    few = MARKED_BYTES // (num_ranks * row) if row % 16 == 0 and hidden_size >= 64 else 0
    return "marked", dtype, (num_ranks, min(max_tokens, CELLS, few), hidden_size)


@attrs.frozen
class Layout:
    """What every rank keeps, the same on each: rows of all sources by rank, and the partial sums that come back.

    Attributes:
        shape: of the layer; how many experts are local plays no part.
        num_ranks: of the group.
        max_tokens_per_rank: most tokens that a rank may bring to a dispatch.
        payload: type that rows travel in: the layer's own ("bf16", "fp16"), or "fp8" with a float32 scale for each 128
            columns, the default of FP8 layers whose activations have such scales.
        partials: type that sums travel in: the layer's own, or "fp32".
    """

    shape: MoEShape
    num_ranks: int = attrs.field(validator=between(1, MOST_RANKS, InputError))
    max_tokens_per_rank: int = attrs.field(validator=between(1, MOST_TOKENS, InputError))
    payload: str = attrs.field()
    partials: str = attrs.field()

    @payload.default
    def _payload_of_layer(self) -> str:
        return "fp8" if self.shape.dtype == "fp8" and self.shape.scales == "block-128" else self.own_dtype

    @partials.default
    def _partials_of_layer(self) -> str:
        return self.own_dtype

    def __attrs_post_init__(self) -> None:
        own = self.own_dtype
        if self.payload not in (own, "fp8"):
            raise InputError(f"payload is {self.payload!r}; a layer in {self.shape.dtype} sends {own} or fp8.")
        if self.partials not in (own, "fp32"):
            raise InputError(f"partials is {self.partials!r}; a layer in {self.shape.dtype} adds {own} or fp32.")
        step = GROUP if self.payload == "fp8" else 8  # a group of columns has one scale; 16 bytes are one store
        if self.shape.hidden_size % step:
            raise InputError(
                f"hidden_size={self.shape.hidden_size} is no multiple of {step}, as rows in {self.payload} need; pad it."
            )

    @property
    def own_dtype(self) -> str:
        """Of the layer's hidden states and output: "bf16" or "fp16"."""
        return "fp16" if self.shape.dtype == "fp16" else "bf16"

    @property
    def hidden_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.own_dtype]

    @property
    def payload_dtype(self) -> torch.dtype:
        return FP8 if self.payload == "fp8" else self.hidden_dtype

    @property
    def partial_dtype(self) -> torch.dtype:
        return torch.float32 if self.partials == "fp32" else self.hidden_dtype

    @property
    def tensors(self) -> tuple[Wanted, ...]:
        """What travels, as it lies at every rank, whatever moves it; "scales" only where rows travel in FP8."""
        columns, top_k, most = self.shape.hidden_size, self.shape.top_k, self.max_tokens_per_rank
        rows = self.num_ranks * most
        scales: Wanted = ("scales", torch.float32, (rows, columns // GROUP))
        return (
            ("topk_ids", torch.int32, (rows, top_k)),
            ("topk_weights", torch.float32, (rows, top_k)),
            ("rows", self.payload_dtype, (rows, columns)),
            *([scales] if self.payload == "fp8" else []),
            ("partials", self.partial_dtype, (self.num_ranks, most, columns)),
        )

    @property
    def regions(self) -> tuple[Region, ...]:
        """Of shared memory, in its order, each at a multiple of 256 bytes: what kernels tell each other, then `tensors`."""
        ranks, most, top_k = self.num_ranks, self.max_tokens_per_rank, self.shape.top_k
        return placed(
            (
                ("header", torch.int64, (HEADER,)),
                ("cells", torch.int64, (2, CELLS, ranks)),  # of dispatch and of combine, one a CTA and source
                # Owners and bits of weights, which the push reads, by source: no other rank writes there.
                ("routing", torch.int32, (ranks, most, top_k, 2)),
                marked(ranks, most, self.shape.hidden_size, self.partial_dtype),
                *self.tensors,
            )
        )

    @property
    def bytes(self) -> int:
        """Of one rank's shared memory."""
        return self.regions[-1].end

    def views(self, memory: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The regions of uint8 memory of `bytes`, by name."""
        return views_of(self.regions, memory)
