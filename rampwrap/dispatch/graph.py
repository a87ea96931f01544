"""`GraphDispatcher`: a kernel and a plan whose choice is made on the GPU, so that it lives inside a CUDA graph.

Without a plan each token count has one config, the kernel's default.

Called like `kernel.launch` without its config, in eager mode and under capture alike. For each token count it takes
from the plan the one to four configs that are worth choosing from, the cost of choosing included; one means that
nothing is added to the graph. Modes:

    graph       one launch aligns and selects; all candidates are launched on branches of the graph, and those not
                chosen find no rows and leave; kernels without ``launch_candidates`` get one config a span
    lagged      the host chooses by the histogram of the step before, copied back without waiting; any kernel, but
                a graph would freeze the choice, so for eager and piecewise execution

The bits of a choice are tested against the host's. `graph_lists.COSTS` were measured on an H200; `benchmarks/graph.py`
measures them on the machine at hand, to be given as `costs`.
"""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from rampwrap.dispatch.host import Dispatcher
from rampwrap.dispatch.lane import Lane, Layer, Served
from rampwrap.dispatch.spans import Prepared, Spans
from rampwrap.errors import InputError
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import Kernel, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.in_graph import MAX_IN_GRAPH, pack
from rampwrap.observe.registry import unwatch, watch
from rampwrap.observe.tally import Telemetry
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import WaveCost

MODES = ("graph", "lagged")


def chooses_in_graph(kernel: Kernel) -> bool:
    """Whether a kernel can run candidates of which the GPU lets one run: it has ``launch_candidates``.

    A member ``chooses_in_graph`` overrules that.
    """
    return bool(getattr(kernel, "chooses_in_graph", hasattr(kernel, "launch_candidates")))


class GraphDispatcher:
    """A kernel whose config is chosen on the GPU.

    Args:
        kernel: as for `Dispatcher`; a choice inside the graph needs a member ``launch_candidates``.
        plan: a `Plan` or the path of one, with the model ``wave``; None serves the kernel's defaults.
        max_tokens: the largest batch; memory is `GraphDispatcher.memory_bytes`.
        mode: one of `MODES`.
        costs: microseconds by number of candidates, as `graph_lists.COSTS`; None takes the shortlists that the plan
            holds, and those costs where it holds none that fit.
        max_candidates: at most four.
        shape, device, strict: as for `Dispatcher`.
        where: the torch device of tables and scratch memory; the current GPU where there is one.

    Raises:
        PlanError: the plan cannot choose on the GPU, or is poisoned.
        InputError: an unknown mode, or no tokens.
    """

    def __init__(
        self,
        kernel: Kernel,
        plan: Plan | str | os.PathLike[str] | None = None,
        *,
        max_tokens: int,
        mode: str = "graph",
        costs: Mapping[int, float] | None = None,
        max_candidates: int = MAX_IN_GRAPH,
        shape: MoEShape | None = None,
        device: Device | None = None,
        strict: bool = False,
        where: torch.device | str | None = None,
    ) -> None:
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; give the largest batch, at least 1.")
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}.")
        self.kernel, self.max_tokens, self.mode = kernel, max_tokens, mode
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
        self._dispatcher = Dispatcher(kernel, self.plan, shape=shape, device=device, strict=strict)
        self.shape = self._dispatcher.shape
        self.policy = policy = self._dispatcher.policy
        routed = isinstance(policy, WaveCost)
        where = torch.device(where or ("cuda" if torch.cuda.is_available() else "cpu"))
        chooses = mode == "graph" and chooses_in_graph(kernel)
        # The whole plan once: a poisoned coefficient is refused before anything is captured.
        if self.plan is not None and routed and mode == "graph":
            for index in range(len(self.plan.configs)):
                pack(self.plan.model.take((index,)))
        self._spans = Spans(self.plan, policy, chooses, costs, max_candidates, where)
        parameters = tuple(inspect.signature(kernel.launch).parameters)[1:]  # the config stands first
        served_mode = mode if routed else "graph"
        self._served = Served(
            kernel,
            self.plan,
            self._dispatcher,
            self.shape,
            self._spans,
            served_mode,
            max_tokens,
            where,
            parameters,
            chooses and "streams" in inspect.signature(getattr(kernel, "launch_candidates")).parameters,  # noqa: B009
        )
        self._lanes: list[Lane] = []
        self._main = self.lane()
        unwatch(self._dispatcher)  # its launches are counted by layer
        watch(self)

    def prepared(self, num_tokens: int) -> Prepared:
        """What serves a batch of `num_tokens`: a microsecond, and some milliseconds at the first call for its span.

        Raises:
            CaptureError: it would have to be made under capture.
        """
        return self._spans.of(num_tokens)

    def lane(self) -> Lane:
        """A caller of its own, for another CUDA stream.

        Lanes share the plan's tables; each has memory of its own, since what two streams run at a time must not write
        to the same.
        """
        made = Lane(self._served)
        made.layer("")
        self._lanes.append(made)
        return made

    def layer(self, name: str) -> Layer:
        """The layer of this name on the main lane: called like the graph dispatcher, with counters of its own.

        The same name gives the same layer. Layers share scratch memory, so they must run one after the other; those
        of another stream come from `Lane.layer`. Make them before capturing.
        """
        return self._main.layer(name)

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

    def telemetry(self) -> list[Telemetry]:
        """What each layer chose at each span of token counts, replays included. Waits for the GPU."""
        return [row for lane in self._lanes for row in lane.telemetry()]

    def counts(self) -> dict[int, dict[int, int]]:
        """How often each config of the plan was chosen on the GPU, by the token count of the span, over all layers.

        Waits for the GPU; replays are counted.
        """
        found: dict[int, dict[int, int]] = {}
        for row in self.telemetry():
            if row.on_device:
                its = found.setdefault(row.num_tokens, {})
                for index, count in row.counts.items():
                    its[index] = its.get(index, 0) + count
        return dict(sorted(found.items()))

    def explain(self) -> str:
        """For people: what each prepared span chooses from, why, and what ran so far. Waits for the GPU."""
        lines = [f"{self.kernel.name} ({self.shape}), mode {self.mode}"]
        # By position, not by token count: spans of the plan may share a span and differ in their candidates.
        counted: dict[int, Counter[int]] = {}
        for lane in self._lanes:
            for position, counts in lane.counts().items():
                counted.setdefault(position, Counter()).update(counts)
        for span in self._spans:
            its, ran = span.shortlist, counted.get(span.position, Counter[int]())
            lines.append(f"  from {its.first} tokens, {its.mode}: {its.why}")
            total = sum(ran.values())
            # What the host chose, in mode lagged, need not be a candidate of a graph.
            for index in sorted({*its.candidates, *ran}):
                share = f"{ran.get(index, 0) / total:6.1%} {ran.get(index, 0):8d}  " if total else ""
                static = "  (static)" if index == its.static else ""
                lines.append(f"    {share}{format_config(self.policy.configs[index])}{static}")
        return "\n".join(lines)
