"""`overlap`: whether two tensors share memory."""

import torch


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bytes from the first to the last of one tensor and those of the other have some in common."""
    (first, end), (other_first, other_end) = _range(one), _range(other)
    return first < other_end and other_first < end


def _range(its: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of that behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(its.shape, its.stride(), strict=True))
    return its.data_ptr(), its.data_ptr() + (last + 1) * its.element_size() if its.numel() else 0
