"""`Sent`: what a rank brings to a dispatch, and what is wrong with it."""

from collections.abc import Mapping

import attrs
import torch

from rampwrap.ep.layout import Layout
from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.operands import FLOATS, FP8, IDS
from rampwrap.kernels.common.reference import quantise


@attrs.frozen(eq=False)
class Sent:
    """The tensors of one call, as they were given.

    Attributes:
        hidden_states: [T, H].
        topk_ids: [T, top_k].
        topk_weights: [T, top_k].
        scales: [T, H / 128] of e4m3 rows.
    """

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    scales: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0] if self.hidden_states.dim() else 0

    def refusal(self, layout: Layout, device: torch.device) -> str | None:
        """What keeps a rank from sending this, in a sentence; None where nothing does."""
        count, hidden, top_k = self.num_tokens, layout.shape.hidden_size, layout.shape.top_k
        if count > layout.max_tokens_per_rank:
            return f"{count} tokens are more than max_tokens_per_rank={layout.max_tokens_per_rank}; open with more, or cut the batch."
        given = self.hidden_states.dtype == FP8
        if given != (self.scales is not None):
            return "e4m3 hidden_states come with scales, others without; give both or neither."
        if given and layout.payload != "fp8":
            return f"hidden_states are e4m3 and rows travel in {layout.payload}; open with payload='fp8'."
        wanted = [
            ("hidden_states", self.hidden_states, (count, hidden), (FP8 if given else layout.hidden_dtype,)),
            ("topk_ids", self.topk_ids, (count, top_k), IDS),
            ("topk_weights", self.topk_weights, (count, top_k), FLOATS),
        ]
        if self.scales is not None:
            wanted.append(("scales", self.scales, (count, hidden // GROUP), (torch.float32,)))
        for name, tensor, shape, dtypes in wanted:
            if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                return (
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}; "
                    f"give {kinds} {shape} on {device}."
                )
        return None

    def regions(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """As the regions of a layout hold it, contiguous: ids in int32, weights in float32, rows quantised if need be."""
        its = {"topk_ids": narrow(self.topk_ids), "topk_weights": _packed(self.topk_weights.float())}
        if layout.payload != "fp8":
            return its | {"rows": _packed(self.hidden_states)}
        rows, scales = (self.hidden_states, self.scales) if self.scales is not None else quantise(self.hidden_states)
        return its | {"rows": _packed(rows), "scales": _packed(scales)}


def narrow(topk_ids: torch.Tensor) -> torch.Tensor:
    """int32; an int64 id beyond it stays out of range."""
    if topk_ids.dtype == torch.int64:
        topk_ids = topk_ids.clamp(-1, (1 << 31) - 1).int()
    return _packed(topk_ids)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the stride 1 that a view of other width needs: a single column may have any, and counts as contiguous."""
    return x.contiguous() if x.stride(-1) == 1 else x.new_empty(x.shape).copy_(x)
