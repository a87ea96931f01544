"""The launches of one layer in the ragged form: what prepares, gate+up, down and the sum."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from rampwrap.errors import InputError
from rampwrap.kernel.grid import max_blocks
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import Operands
from rampwrap.kernels.cute.configs import CuteConfig
from rampwrap.kernels.cute.costs import Costs, works_of
from rampwrap.kernels.cute.host.prepare import prepare, sum_rows
from rampwrap.kernels.cute.schedule import PADDING, UNIT_ROWS, WIDTHS
from rampwrap.kernels.triton.align.host import TokenBlocks
from rampwrap.kernels.triton.moe.workspace import Workspace, workspace


@attrs.frozen
class Line:
    """What a layer's launches need of its costs, made once: a launch has 40 us of the host in all."""

    numbers: tuple[int, ...]
    "Of `Costs`, in order."
    most_passes: int
    "Passes of all experts that 32 bits count."

    @classmethod
    def of(cls, shape: MoEShape, costs: Costs) -> "Line":
        """For a layer of bf16 or FP8."""
        each = (
            work.groups * work.steps * work.step_cost(work.widths[-1], work.memory) for work in works_of(shape, costs)
        )
        return cls(attrs.astuple(costs), ((1 << 31) - 1) // max(each))


def with_fragments(memory: Workspace, dtype: str, ctas: int) -> Workspace:
    """A workspace with room for what CTAs of a launch leave each other; its marks are zero, as every launch leaves them."""
    device = memory.y.device
    floats = ctas * UNIT_ROWS * WIDTHS[dtype][-1]
    return attrs.evolve(
        memory,
        fragments=torch.empty(floats, dtype=torch.float32, device=device),
        marks=torch.zeros(ctas, dtype=torch.int32, device=device),
    )


def run_ragged(
    shape: MoEShape,
    config: CuteConfig,
    functions: Sequence[Callable[..., Any]],
    line: Line,
    ctas: int,
    operands: Operands,
    *,
    memory: Workspace | None = None,
    blocks: TokenBlocks | None = None,
) -> torch.Tensor:
    """Launches a layer and returns [T, H].

    Args:
        shape: the layer.
        config: of `configs.RAGGED`.
        functions: the compiled kernels of ``config.variants``.
        line: by which the work is cut; the same counts, costs and CTAs give the same bits.
        ctas: of a launch, one for each SM.
        operands: of at least one token, taken as they are.
        memory: of `with_fragments`, for as many CTAs at least; made here where absent.
        blocks: an alignment of the topk_ids in blocks of `schedule.PADDING`; made here where absent.

    Raises:
        InputError: the workspace has no room for fragments, or the batch is longer than the line can count.
    """
    topk_ids, expert_map = operands.topk_ids, operands.expert_map
    (num_tokens, top_k), num_slots = topk_ids.shape, topk_ids.numel()
    experts = shape.num_local_experts
    if memory is None:
        memory = with_fragments(workspace(shape, num_tokens, topk_ids.device), config.dtype, ctas)
    if memory.fragments is None or memory.marks is None or len(memory.marks) < ctas:
        raise InputError(
            "The workspace has no room for fragments of the ragged form; make it with CuteFusedMoE(shape, 'ragged').workspace."
        )
    if max_blocks(num_slots, experts, config.block_m) > line.most_passes:
        raise InputError(f"{num_tokens} tokens are more than the ragged form counts; use another form.")
    out = operands.output()
    quantised = None
    h: tuple[torch.Tensor, ...] = (memory.h[:num_slots],)
    if config.dtype == "fp8":
        assert memory.x_fp8 is not None and memory.x_scale is not None
        assert memory.h_fp8 is not None and memory.h_scale is not None
        quantised = memory.x_fp8[:num_tokens], memory.x_scale[:num_tokens]
        h = memory.h_fp8[:num_slots], memory.h_scale[:num_slots]
    aligned = blocks or memory.token_blocks(num_tokens, top_k, experts, PADDING)
    assert aligned is not None
    prepare(
        operands.hidden_states,
        quantised,
        None,
        topk_ids,
        PADDING,
        experts,
        expert_map=expert_map,
        memory=aligned,
        aligned=blocks is not None,
    )
    tokens: tuple[Any, ...] = quantised or (operands.hidden_states,)
    first: tuple[Any, ...] = (operands.w13,)
    second: tuple[Any, ...] = (operands.w2,)
    if config.dtype == "fp8":
        first, second = (*first, operands.w13_scale), (*second, operands.w2_scale)
    routing = aligned.sorted_token_ids, aligned.expert_counts
    left = memory.fragments, memory.marks
    numbers = (top_k, *line.numbers, ctas)
    up, down = functions
    up(*tokens, *first, *routing, *h, *left, *numbers)
    down(*h, *second, *routing, operands.topk_weights.float().view(-1), memory.y[:num_slots], *left, *numbers)
    sum_rows(out, memory.y, topk_ids, experts, expert_map=expert_map)
    return out
