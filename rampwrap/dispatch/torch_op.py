"""The layer of a `GraphDispatcher` as one opaque operator, so that `torch.compile` sees it and compiles around it.

moe = compiled(graph_dispatcher)
layer = torch.compile(lambda x, w, ids: moe(x, w13, w2, w, ids), fullgraph=True)
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from rampwrap.errors import InputError

_callers: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("rampwrap::moe", mutates_args=())
def moe(
    caller: int,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H] of a registered `GraphDispatcher`, `Lane` or anything that is called like one."""
    found = _callers.get(caller)
    if found is None:
        raise InputError(
            f"operator rampwrap::moe knows no graph dispatcher {caller}; keep the GraphDispatcher alive while it is used."
        )
    optional = {"w13_scale": w13_scale, "w2_scale": w2_scale, "expert_map": expert_map}
    given = {name: value for name, value in optional.items() if value is not None}
    out: torch.Tensor = found(
        hidden_states=hidden_states, w13=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids, **given
    )
    return out


@moe.register_fake
def _(
    caller: int,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def compiled(caller: Any) -> Callable[..., torch.Tensor]:
    """A function for use inside `torch.compile`, with the arguments of `moe` after the first.

    Args:
        caller: a `GraphDispatcher`, a `Layer` of one, a `Lane` or a `Dispatcher`. Under ``mode="reduce-overhead"`` or any capture it must not
            wait for the host: a `GraphDispatcher` in one of its graph modes, after `GraphDispatcher.warm` for each token count,
            since memory that it made during the first compiled call would belong to that call's graph. It is not
            kept alive by the function.
    """
    number = next(_numbers)
    _callers[number] = caller

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = moe(number, *args, **kwargs)
        return out

    return run
