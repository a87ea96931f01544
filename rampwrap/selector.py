"""`Selector`: a kernel and a plan whose choice is made on the GPU, so that it lives inside a CUDA graph.

Called like `kernel.launch` without its config, in eager mode and under capture alike. For each token count it takes
from the plan the one to four configs that are worth choosing from, the cost of choosing included; one means that
nothing is added to the graph. Modes:

    early-exit  one launch aligns and selects, all candidates are launched, those not chosen find no rows and leave
    merged      the same with all candidates inside one launch of each GEMM, which needs the registers and shared
                memory of the largest; nothing is launched in vain
    parallel    early-exit with the candidates on branches of the graph, so that their launches overlap
    lagged      the host chooses by the histogram of the step before, copied back without waiting; any kernel, but
                a graph would freeze the choice, so for eager and piecewise execution
    eager       the host reads the histogram and chooses, and waits for it; any kernel
    auto        whichever of the three that live in a graph is expected to be fastest, by `costs`

The bits of a choice are tested against the host's; `COSTS` are estimates until `benchmarks/in_graph.py` has measured them
on the machine at hand, so this module is not yet part of the public interface.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import torch

from rampwrap.device import Device
from rampwrap.dispatch import Dispatcher
from rampwrap.errors import CaptureError, InputError
from rampwrap.ingraph import MAX_CANDIDATES, Shortlist, pack, shortlist
from rampwrap.kernel import Config, Kernel, MoEShape, format_config
from rampwrap.lagged import Lagged
from rampwrap.plan import Plan
from rampwrap.policy import WaveCost

MODES = ("auto", "early-exit", "merged", "parallel", "lagged", "eager")
IN_GRAPH = ("early-exit", "merged", "parallel")

# Microseconds that so many candidates cost over one config in a graph, estimated from launch counts.
COSTS: Mapping[str, Mapping[int, float]] = {
    "early-exit": {1: 0.0, 2: 3.5, 3: 5.5, 4: 7.5},
    "merged": {1: 0.0, 2: 1.8, 3: 2.2, 4: 2.6},
    "parallel": {1: 0.0, 2: 3.0, 3: 3.4, 4: 3.8},
}


@attrs.frozen(eq=False)
class Bucket:
    """What serves one token count: the shortlist, its mode, and the tables on the GPU."""

    shortlist: Shortlist
    mode: str
    configs: tuple[Config, ...]
    candidates: Any
    "`kernels.triton.select.Candidates`; None where there is nothing to choose."


class Selector:
    """A kernel whose config is chosen on the GPU.

    Args:
        kernel: as for `Dispatcher`; early-exit, merged and parallel need a member ``launch_candidates``.
        plan: a `Plan` or the path of one, with the model ``default``.
        max_tokens: the largest batch; memory is `Selector.memory_bytes`.
        mode: one of `MODES`.
        costs: microseconds by mode and number of candidates, as `COSTS`, which is the default.
        max_candidates: at most four.
        shape, device, strict: as for `Dispatcher`.

    Raises:
        PlanError: the plan cannot choose on the GPU, or is poisoned.
        InputError: an unknown mode, or one that the kernel does not allow.
    """

    def __init__(
        self,
        kernel: Kernel,
        plan: Plan | str | os.PathLike[str],
        *,
        max_tokens: int,
        mode: str = "auto",
        costs: Mapping[str, Mapping[int, float]] = COSTS,
        max_candidates: int = MAX_CANDIDATES,
        shape: MoEShape | None = None,
        device: Device | None = None,
        strict: bool = False,
        where: torch.device | str | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}.")
        self.kernel, self.max_tokens, self.mode = kernel, max_tokens, mode
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self._dispatcher = Dispatcher(kernel, self.plan, shape=shape, device=device, strict=strict)
        self.shape = self._dispatcher.shape
        self._routed = isinstance(self._dispatcher.policy, WaveCost)
        self._where = torch.device(where or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._max_candidates = max_candidates
        several = hasattr(kernel, "launch_candidates")
        if mode in IN_GRAPH and not several:
            raise InputError(f"kernel {kernel.name!r} has no launch_candidates, which mode {mode!r} needs; use lagged.")
        usable = costs if mode == "auto" else {mode: costs.get(mode) or COSTS.get(mode, {})}
        self._costs = dict(usable) if several else {}
        self._buckets: dict[int, Bucket] = {}
        self._parameters = tuple(inspect.signature(kernel.launch).parameters)[1:]  # the config stands first
        self._warmed: set[tuple[Any, ...]] = set()
        self._lanes: list[Lane] = []
        # The whole plan once: a poisoned coefficient is refused before anything is captured.
        if self._routed and mode not in ("eager", "lagged"):
            for index in range(len(self.plan.configs)):
                pack(self.plan.model.take((index,)))
        self._main = self.lane()

    def bucket(self, num_tokens: int) -> Bucket:
        """What serves a batch of `num_tokens`, made at the first call.

        Raises:
            CaptureError: it would have to be made under capture.
        """
        found = self._buckets.get(num_tokens)
        if found is None:
            if _capturing():
                raise CaptureError(
                    f"nothing is prepared for {num_tokens} tokens; run one eager step of that size, or call "
                    f"warm([{num_tokens}], ...), before capturing."
                )
            found = self._buckets[num_tokens] = self._make(num_tokens)
        return found

    def _make(self, num_tokens: int) -> Bucket:
        policy = self._dispatcher.policy
        static = policy.index(np.zeros(0, dtype=np.int64), num_tokens) if not self._routed else None
        if static is not None or self.mode in ("eager", "lagged") or num_tokens == 0:
            index = static if static is not None else self.plan.static.index(num_tokens)
            only = Shortlist(num_tokens, (index,), index, float("nan"), float("nan"))
            return Bucket(only, self.mode, (policy.configs[index],), None)
        lists = {
            mode: shortlist(self.plan, num_tokens, costs, self._max_candidates) for mode, costs in self._costs.items()
        }
        mode = min(lists, key=lambda name: lists[name].expected_us)
        best = lists[mode]
        configs = tuple(self.plan.configs[index] for index in best.candidates)
        if len(configs) == 1:
            return Bucket(best, mode, configs, None)
        from rampwrap.kernels.triton.select import Candidates

        packed = pack(self.plan.model.take(best.candidates), margin_steps=len(self.plan.model.local_error))
        return Bucket(best, mode, configs, Candidates.on(packed, self._where))

    def lane(self) -> "Lane":
        """A caller of its own: for another CUDA stream, or for another layer in mode lagged.

        Lanes share the plan's tables and counters; each has memory of its own, since what two streams run at a time
        must not write to the same. Layers that run one after the other may share a lane.
        """
        made = Lane(self)
        self._lanes.append(made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Launches the layer; arguments are those of `kernel.launch` without the config."""
        return self._main(*args, **kwargs)

    def warm(self, token_counts: Iterable[int], inputs: Callable[[int], Mapping[str, Any]]) -> None:
        """Compiles and prepares all that captures of these token counts need.

        Args:
            token_counts: sizes that will be captured.
            inputs: keyword arguments of a launch for a token count.
        """
        for num_tokens in token_counts:
            self._main(**inputs(num_tokens))

    @property
    def memory_bytes(self) -> int:
        """Device memory that all lanes hold, besides what the kernel allocates itself."""
        return sum(lane.memory_bytes for lane in self._lanes)

    def counts(self) -> dict[int, dict[int, int]]:
        """How often each config of the plan was chosen, by token count, where something is chosen on the GPU.

        Waits for the GPU; replays are counted.
        """
        found = {}
        for num_tokens, bucket in sorted(self._buckets.items()):
            if bucket.candidates is not None:
                counted = bucket.candidates.counters.tolist()
                found[num_tokens] = dict(zip(bucket.shortlist.candidates, counted, strict=False))
        return found

    def explain(self) -> str:
        """For people: what each prepared token count chooses from, why, and what ran so far. Waits for the GPU."""
        lines = [f"{self.kernel.name} ({self.shape}), mode {self.mode}"]
        counted = self.counts()
        for num_tokens, bucket in sorted(self._buckets.items()):
            lines.append(f"  {num_tokens} tokens, {bucket.mode}: {bucket.shortlist.why}")
            ran = counted.get(num_tokens, {})
            total = sum(ran.values())
            for index, config in zip(bucket.shortlist.candidates, bucket.configs, strict=True):
                share = f"{ran[index] / total:6.1%} {ran[index]:8d}  " if total else ""
                static = "  (static)" if index == bucket.shortlist.static else ""
                lines.append(f"    {share}{format_config(config)}{static}")
        return "\n".join(lines)


class Lane:
    """Launches of a `Selector` that run one after the other; made by `Selector.lane`."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self._memory: torch.Tensor | None = None
        self._workspace: Any = None
        self._streams: list[Any] = []
        self._lagged: dict[int, Lagged] = {}

    @property
    def memory_bytes(self) -> int:
        """Device memory held."""
        scratch = getattr(self._workspace, "num_bytes", 0)
        return int(scratch) + (0 if self._memory is None else 4 * self._memory.numel())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `Selector.__call__`."""
        selector = self._selector
        kwargs |= dict(zip(selector._parameters, args, strict=False))
        topk_ids = kwargs["topk_ids"]
        num_tokens = len(topk_ids)
        if selector.mode == "eager":
            return selector._dispatcher(**kwargs)
        if num_tokens > selector.max_tokens:
            raise InputError(
                f"{num_tokens} tokens are more than max_tokens={selector.max_tokens}; make the Selector for a larger batch."
            )
        bucket = selector.bucket(num_tokens)
        if selector.mode == "lagged" and selector._routed:
            return self._launch_lagged(kwargs)
        self._check_warm(bucket, kwargs)
        if "workspace" in selector._parameters and kwargs.get("workspace") is None:
            kwargs["workspace"] = self._scratch()
        if bucket.candidates is None or num_tokens == 0:
            return selector.kernel.launch(bucket.configs[0], **kwargs)
        from rampwrap.kernels.triton.select import align_and_select, selected_in

        shape, heights = selector.shape, bucket.candidates.packed.block_ms
        selected = selected_in(self._blocks_memory(), num_tokens, shape.top_k, shape.num_local_experts, heights)
        align_and_select(
            topk_ids,
            bucket.candidates,
            bucket.shortlist.fallback,
            shape.num_local_experts,
            expert_map=kwargs.get("expert_map"),
            selected=selected,
        )
        streams = self._branches(len(bucket.configs) - 1) if bucket.mode == "parallel" else ()
        launch = getattr(selector.kernel, "launch_candidates")  # noqa: B009  (an optional member)
        more = {"streams": streams, "merged": bucket.mode == "merged"}
        return launch(bucket.configs, selected.blocks, selected.choice, **kwargs, **more)

    def _check_warm(self, bucket: Bucket, kwargs: Mapping[str, Any]) -> None:
        """Compiling under capture would fail, or worse, be captured."""
        key = (bucket.shortlist.num_tokens, *((n, v.dtype) for n, v in kwargs.items() if isinstance(v, torch.Tensor)))
        if not _capturing():
            self._selector._warmed.add(key)
        elif key not in self._selector._warmed:
            raise CaptureError(
                f"the kernels for {bucket.shortlist.num_tokens} tokens were not compiled before this capture; run one "
                "eager step with tensors of the same types, or Selector.warm, first."
            )

    def _scratch(self) -> Any:
        if self._workspace is None:
            self._no_allocation("a workspace")
            self._workspace = self._selector.kernel.workspace(  # type: ignore[attr-defined]
                self._selector.max_tokens, self._selector._where
            )
        return self._workspace

    def _blocks_memory(self) -> torch.Tensor:
        from rampwrap.kernels.triton.select import selection_ints

        shape, heights = self._selector.shape, sorted({grid.block_m for grid in self._selector.plan.grids})
        if self._memory is None:
            self._no_allocation("memory for alignment")
            # Four candidates at the most, and the list of block heights may be longer.
            few, many = (heights[:1] * MAX_CANDIDATES), (heights[-1:] * MAX_CANDIDATES)
            counts = (self._selector.max_tokens, shape.top_k, shape.num_local_experts)
            ints = selection_ints(*counts, (*few[:2], *many[:2]))
            self._memory = torch.empty(ints, dtype=torch.int32, device=self._selector._where)
        return self._memory

    def _branches(self, count: int) -> list[Any]:
        while len(self._streams) < count:
            self._no_allocation("streams")
            self._streams.append(torch.cuda.Stream(self._selector._where))  # type: ignore[no-untyped-call]
        return self._streams[:count]

    def _no_allocation(self, what: str) -> None:
        if _capturing():
            raise CaptureError(f"this lane has no {what} yet; run one eager step on it before capturing.")

    def _launch_lagged(self, kwargs: dict[str, Any]) -> Any:
        selector, topk_ids = self._selector, kwargs["topk_ids"]
        if _capturing():
            raise CaptureError(
                "a graph would freeze the choice of mode 'lagged'; capture the parts around the layer, or use early-exit."
            )
        state = self._lagged.setdefault(len(topk_ids), Lagged(selector.shape.num_local_experts))
        policy = selector._dispatcher.policy
        counts = state.latest()
        fallback = selector.plan.static.index(len(topk_ids))
        index = fallback if counts is None else policy.index(counts, len(topk_ids))
        selector._dispatcher.launch_counts[index] += 1
        out = selector.kernel.launch(policy.configs[index], **kwargs)
        state.read(topk_ids, kwargs.get("expert_map"))
        return out


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
