"""`Lane` and `Layer`: the callers of a `GraphDispatcher`. A lane owns memory, a layer owns the record of its choices."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from rampwrap.dispatch.host import Dispatcher
from rampwrap.dispatch.lagged import Lagged
from rampwrap.dispatch.spans import Prepared, Spans, capturing
from rampwrap.errors import CaptureError, InputError
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.in_graph import MAX_IN_GRAPH, TALLY
from rampwrap.observe.tally import Telemetry
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import SINGLE
from rampwrap.policy.static import StaticTable
from rampwrap.routing.drift import Sums

# Layouts of alignment memory that a lane remembers; making one takes 20 us of host time.
KEPT_LAYOUTS = 256

Kinds = frozenset[tuple[str, torch.dtype, bool]]
"Of each tensor of a launch its name, its type, and whether it starts at a multiple of 16 bytes."


@attrs.frozen(eq=False)
class Served:
    """What all lanes of a graph dispatcher share.

    Attributes:
        kernel, plan, dispatcher, shape: as of the graph dispatcher; the plan is there wherever something chooses.
        spans: what serves each token count.
        mode: as asked for; ``lagged`` only where the plan may choose.
        max_tokens: the largest batch.
        device: where tensors are.
        parameters: names of the positional parameters of `kernel.launch` after the config.
        branches: whether ``launch_candidates`` takes ``streams``.
        warmed: by what of the tensors decides which kernels are compiled, a byte for each token count whose were.
    """

    kernel: Kernel
    plan: Plan | None
    dispatcher: Dispatcher
    shape: MoEShape
    spans: Spans
    mode: str
    max_tokens: int
    device: torch.device
    parameters: tuple[str, ...]
    branches: bool
    warmed: dict[Kinds, bytearray] = attrs.field(factory=dict)


class Lane:
    """Launches of a `GraphDispatcher` that run one after the other, and the scratch memory they share."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._memory: torch.Tensor | None = None
        self._workspace: Any = None
        self._streams: list[Any] = []
        self._layouts: dict[tuple[int, int], Any] = {}
        self._layers: dict[str, Layer] = {}

    @property
    def memory_bytes(self) -> int:
        """Device memory held, the tallies of its layers included."""
        scratch = getattr(self._workspace, "num_bytes", 0)
        aligned = 0 if self._memory is None else 4 * self._memory.numel()
        return int(scratch) + aligned + sum(layer.memory_bytes for layer in self._layers.values())

    def layer(self, name: str) -> "Layer":
        """The caller of this name, made at the first call; not under capture.

        Layers of a lane share its memory, so they must run one after the other; each keeps a tally of its own.
        """
        found = self._layers.get(name)
        if found is None:
            self._no_allocation(f"layer {name!r}")
            found = self._layers[name] = Layer(self, name)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `GraphDispatcher.__call__`."""
        return self.layer("")(*args, **kwargs)

    def telemetry(self) -> list[Telemetry]:
        """What each layer chose, by span. Waits for the GPU."""
        return [row for layer in tuple(self._layers.values()) for row in layer.telemetry()]

    def counts(self) -> dict[int, Counter[int]]:
        """`Layer.counts` of all its layers together. Waits for the GPU."""
        found: dict[int, Counter[int]] = {}
        for layer in tuple(self._layers.values()):
            for position, counts in layer.counts().items():
                found.setdefault(position, Counter()).update(counts)
        return found

    def _scratch(self) -> Any:
        if self._workspace is None:
            self._no_allocation("workspace")
            self._workspace = self._served.kernel.workspace(  # type: ignore[attr-defined]
                self._served.max_tokens, self._served.device
            )
        return self._workspace

    def _selected(self, num_tokens: int, span: Prepared) -> Any:
        """The lane's memory laid out for a batch; views only, so any number of layouts may be made."""
        key = (span.position, num_tokens)
        found = self._layouts.get(key)
        if found is None:
            from rampwrap.kernels.triton.select.host import selected_in, selection_ints

            shape, served = self._served.shape, self._served
            if self._memory is None:
                self._no_allocation("memory for alignment")
                # Four candidates at the most, and the list of block heights may be longer.
                assert served.plan is not None
                heights = sorted(grid.block_m for grid in served.plan.grids)
                extremes = (*heights[:1] * (MAX_IN_GRAPH // 2), *heights[-1:] * (MAX_IN_GRAPH // 2))
                ints = selection_ints(served.max_tokens, shape.top_k, shape.num_local_experts, extremes)
                self._memory = torch.empty(ints, dtype=torch.int32, device=served.device)
            if len(self._layouts) >= KEPT_LAYOUTS:
                self._layouts.clear()
            block_ms = span.candidates.packed.block_ms
            found = selected_in(self._memory, num_tokens, shape.top_k, shape.num_local_experts, block_ms)
            self._layouts[key] = found
        return found

    def _branches(self, count: int) -> list[Any]:
        while len(self._streams) < count:
            self._no_allocation("streams")
            self._streams.append(torch.cuda.Stream(self._served.device))  # type: ignore[no-untyped-call]
        return self._streams[:count]

    def _no_allocation(self, what: str) -> None:
        if capturing():
            raise CaptureError(f"this lane has no {what} yet; run one eager step on it before capturing.")


class Layer:
    """One layer of a model: called like its `GraphDispatcher`, with a tally of its own; made by `GraphDispatcher.layer`."""

    def __init__(self, lane: Lane, name: str) -> None:
        self.name = name
        self._lane, self._served, self._ran = lane, lane._served, False
        spans = self._served.spans
        self._on_host: dict[int, dict[int, int]] = {}
        self._lagged: dict[int, Lagged] = {}
        self._sums: dict[int, Sums] = {}
        # All spans at once: a tally that was made under capture would belong to the graph.
        self._tallies: torch.Tensor | None = None
        if self._served.mode != "lagged":
            self._tallies = torch.zeros(len(spans), TALLY, dtype=torch.float64, device=self._served.device)
            self._tally = list(self._tallies.unbind())

    @property
    def memory_bytes(self) -> int:
        """Device memory of the tallies."""
        return 0 if self._tallies is None else 8 * self._tallies.numel()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Launches the layer; arguments are those of `kernel.launch` without the config."""
        served = self._served
        if args:
            kwargs |= dict(zip(served.parameters, args, strict=False))
        topk_ids = kwargs["topk_ids"]
        num_tokens = len(topk_ids)
        if num_tokens > served.max_tokens:
            raise InputError(
                f"{num_tokens} tokens are more than max_tokens={served.max_tokens}; make the GraphDispatcher for a larger batch."
            )
        span, self._ran = served.spans.of(num_tokens), True
        if served.mode == "lagged":
            return self._launch_lagged(span, kwargs)
        under, kinds = capturing(), _kinds(kwargs)
        if under:
            self._check_warm(num_tokens, kinds)
        out = self._launch(span, num_tokens, kwargs)
        if not under:  # after it has returned: what failed is not warm
            warmed = served.warmed.get(kinds)
            if warmed is None:
                warmed = served.warmed[kinds] = bytearray(served.max_tokens + 1)
            warmed[num_tokens] = 1
        return out

    def _launch(self, span: Prepared, num_tokens: int, given: Mapping[str, Any]) -> Any:
        """Mode graph: one config, or the candidates of a span behind the kernel that selects."""
        served, lane, kwargs, topk_ids = self._served, self._lane, dict(given), given["topk_ids"]
        if hasattr(served.kernel, "workspace") and "workspace" in served.parameters and kwargs.get("workspace") is None:
            kwargs["workspace"] = lane._scratch()
        if span.candidates is None or num_tokens == 0:
            self._count(span.position, span.shortlist.candidates[0])
            return served.kernel.launch(span.configs[0], **kwargs)
        from rampwrap.kernels.triton.select.host import align_and_select

        selected = align_and_select(
            topk_ids,
            span.candidates,
            span.shortlist.fallback,
            served.shape.num_local_experts,
            expert_map=kwargs.get("expert_map"),
            selected=lane._selected(num_tokens, span),
            tally=self._tally[span.position],
        )
        if served.device.type == "cuda" and served.branches:  # a CPU runs one after the other
            kwargs["streams"] = lane._branches(len(span.configs) - 1)
        launch = getattr(served.kernel, "launch_candidates")  # noqa: B009  (an optional member)
        return launch(span.configs, selected.blocks, selected.choice, **kwargs)

    def telemetry(self) -> list[Telemetry]:
        """What was chosen, by span. Waits for the GPU, where it ever launched.

        Made while an engine loads weights, the tally of a layer that never does may lie in memory that the engine takes away when it
        sleeps: reading it then would be the end of the process.
        """
        if not self._ran:
            return []
        served = self._served
        rows: dict[tuple[int, str], Telemetry] = {}
        tallies = [] if self._tallies is None else self._tallies.tolist()
        for span in served.spans:
            its, host = span.shortlist, dict(self._on_host.get(span.position, {}))
            found = []
            if span.candidates is not None and sum(tallies[span.position][:MAX_IN_GRAPH]):
                tally = tallies[span.position]
                found.append(Telemetry.of_tally(self.name, its.num_tokens, its.mode, its.candidates, tally))
            if host:
                mode = "lagged" if served.mode == "lagged" else SINGLE
                sums = self._sums.get(span.position, Sums()).numbers()
                found.append(Telemetry(self.name, its.num_tokens, mode, host, sum(host.values()), **sums))
            for row in found:
                key = (row.num_tokens, row.mode)
                rows[key] = rows[key] + row if key in rows else row
        return list(rows.values())

    def counts(self) -> dict[int, dict[int, int]]:
        """By position of the span, how often each config of the plan was chosen. Waits for the GPU.

        Spans with one config are left out: of their launches only those that the host made are known.
        """
        if not self._ran:
            return {}
        if self._tallies is None:
            return {position: dict(counts) for position, counts in tuple(self._on_host.items())}
        tallies = self._tallies.tolist()
        return {
            its.position: {
                index: int(n) for index, n in zip(its.shortlist.candidates, tallies[its.position], strict=False)
            }
            for its in self._served.spans
            if its.candidates is not None
        }

    def _count(self, position: int, index: int) -> None:
        counts = self._on_host.setdefault(position, {})
        counts[index] = counts.get(index, 0) + 1

    def _check_warm(self, num_tokens: int, kinds: Kinds) -> None:
        """Compiling under capture would fail, or worse, be captured."""
        warmed = self._served.warmed.get(kinds)
        if warmed is None or not warmed[num_tokens]:
            odd = sorted(name for name, _, aligned in kinds if not aligned)
            starts = f" and the same alignment ({', '.join(odd)} not at a multiple of 16 bytes)" if odd else ""
            raise CaptureError(
                f"the kernels for {num_tokens} tokens were not compiled before this capture; run one eager step with "
                f"tensors of the same types{starts}, or GraphDispatcher.warm, first."
            )

    def _launch_lagged(self, span: Prepared, kwargs: dict[str, Any]) -> Any:
        served, topk_ids = self._served, kwargs["topk_ids"]
        if capturing():
            raise CaptureError(
                "a graph would freeze the choice of mode 'lagged'; capture the parts around the layer, or use mode 'graph'."
            )
        # By octave: a histogram of prefill says nothing of decode, and spans may span both.
        state = self._lagged.setdefault(len(topk_ids).bit_length(), Lagged(served.shape.num_local_experts))
        policy, dispatcher = served.dispatcher.policy, served.dispatcher
        counts = state.latest()
        if counts is not None:
            sums = self._sums.get(span.position)
            if sums is None:
                assert served.plan is not None
                sums = self._sums[span.position] = Sums(*served.plan.model.profiled)
            sums.add(counts)
        static: StaticTable = policy.static  # type: ignore[attr-defined]  # of WaveCost, beyond the plan's reach too
        index = static.index(len(topk_ids)) if counts is None else policy.index(counts, len(topk_ids))
        dispatcher.launch_counts[index] += 1
        self._count(span.position, index)
        out = served.kernel.launch(dispatcher._configs[index], **kwargs)
        state.read(topk_ids, kwargs.get("expert_map"))
        return out


def _kinds(kwargs: Mapping[str, Any]) -> Kinds:
    """What a compiler specialises on, in whatever order tensors were given: Triton compiles aligned pointers apart."""
    return frozenset(
        [(name, v.dtype, not v.data_ptr() & 15) for name, v in kwargs.items() if isinstance(v, torch.Tensor)]
    )
