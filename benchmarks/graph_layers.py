"""The layers, configs and routings that `in_graph.py` replays."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import graph_tools
import numpy as np
import torch
from graph_tools import Clock, Graph, capture, compile_in_time

from rampwrap.dispatch.graph import graph_modes
from rampwrap.errors import InputError
from rampwrap.kernel.protocol import config_key
from rampwrap.kernels.triton.select.host import Candidates, align_and_select, allocate_selected
from rampwrap.model.packed import pack
from rampwrap.plan.plan import Plan
from rampwrap.routing.recorded import read_trace
from rampwrap.routing.workloads import Routing

LAYERS = 8
# What matters most comes first, as time may run out.
CONTROL_TOKENS = (64, 512, 8, 256, 128, 32)
REPLAY_TOKENS = (64, 128, 256, 32, 512, 16, 8, 4, 2, 1)
ROUTINGS = ("lognormal:1.0", "dirichlet:0.1", "dirichlet:0.3", "zipf:1.2")
MOST_SINGLES = 6


class Layers:
    """`LAYERS` calls of one layer with shifted experts, and buffers for their routing."""

    def __init__(self, kernel: Any, tokens: int) -> None:
        self.kernel, self.tokens, self.shape = kernel, tokens, kernel.shape
        device = graph_tools.DEVICE
        self.inputs = kernel.inputs(self.shape, torch.zeros(tokens, self.shape.top_k, dtype=torch.int32, device=device))
        self.ids = torch.zeros(LAYERS, tokens, self.shape.top_k, dtype=torch.int32, device=device)
        self.shift = (torch.arange(LAYERS, device=device) * (self.shape.num_experts // LAYERS)).int()[:, None, None]
        self.fixed: dict[str, Any] = {}
        parameters = inspect.signature(kernel.launch).parameters
        if "workspace" in parameters:
            self.fixed["workspace"] = kernel.workspace(tokens, device)
        self.with_out = "out" in parameters
        self.out = [torch.empty_like(self.inputs["hidden_states"]) for _ in range(LAYERS)]
        self.last: dict[str, torch.Tensor] = {}
        self.kept: list[Any] = []  # what graphs point into

    def route(self, ids: Any) -> None:
        """Writes the routing of a step into the buffers that the graphs read."""
        sample = torch.from_numpy(ids).to(self.ids.device)
        self.ids.copy_((sample[None] + self.shift) % self.shape.num_experts)

    def arguments(self, layer: int) -> dict[str, Any]:
        out = {"out": self.out[layer]} if self.with_out else {}
        return {**self.inputs, "topk_ids": self.ids[layer], **out}

    def graph(self, name: str, launch: Callable[..., Any]) -> Graph:
        """All layers; `last` keeps what the last one returns."""

        def run() -> None:
            for layer in range(LAYERS):
                self.last[name] = launch(**self.arguments(layer))

        return capture(run)

    def single(self, name: str, config: Any, **options: Any) -> Graph:
        return self.graph(name, lambda **given: self.kernel.launch(config, **given, **self.fixed, **options))

    def candidates(self, name: str, configs: Sequence[Any], model: Any, mode: str) -> Graph:
        """The first config is chosen always."""
        shape = self.shape
        tables = Candidates.on(pack(model, 1e9), graph_tools.DEVICE)
        blocks = allocate_selected(
            self.tokens, shape.top_k, shape.num_local_experts, tables.packed.block_ms, graph_tools.DEVICE
        )
        more: dict[str, Any] = {"merged": True} if mode == "merged" else {}
        if mode == "parallel":
            more["streams"] = [torch.cuda.Stream() for _ in configs[1:]]  # type: ignore[no-untyped-call]
        self.kept.append((tables, blocks, more))

        def launch(**given: Any) -> Any:
            align_and_select(given["topk_ids"], tables, 0, shape.num_local_experts, selected=blocks)
            return self.kernel.launch_candidates(configs, blocks.blocks, blocks.choice, **given, **self.fixed, **more)

        return self.graph(name, launch)


def control_order(plan: Plan, tokens: int) -> list[int]:
    """The static config and three more, those of the plan's bucket first."""
    best = plan.static.index(tokens)
    bucket = min(plan.buckets, key=lambda b: abs(b.num_tokens - tokens))
    others = [i for i in (*bucket.shortlist, *range(len(plan.configs))) if i != best]
    return [best, *dict.fromkeys(others)][:4]


def singles(plan: Plan, tokens: int) -> list[int]:
    """Configs that get a graph of their own in `bench_replay`: static, the plan's shortlists, at most MOST_SINGLES."""
    bucket = min(plan.buckets, key=lambda b: abs(b.num_tokens - tokens))
    near = [i for its in plan.in_graph if its.first <= tokens for i in its.candidates][-4:]
    return sorted(dict.fromkeys([plan.static.index(tokens), *near, *bucket.shortlist]))[:MOST_SINGLES]


class Ready:
    """Which configs and which merged lists were compiled in time."""

    def __init__(self, plan: Plan, name: str, kernel: Any, parts: Sequence[str], clock: Clock, seconds: float) -> None:
        merged = "merged" in graph_modes(kernel)
        control = CONTROL_TOKENS if "control" in parts else ()
        replay = REPLAY_TOKENS if "replay" in parts else ()
        used = {i for tokens in control for i in control_order(plan, tokens)}
        used |= {i for tokens in replay for i in singles(plan, tokens)}
        lists = [tuple(control_order(plan, tokens)[:n]) for tokens in control for n in (2, 3)] if merged else []
        work: list[tuple[Sequence[Any], bool]] = [([plan.configs[i]], False) for i in sorted(used)]
        work += [([plan.configs[i] for i in some], True) for some in dict.fromkeys(lists)]
        tokens = sorted({*control, *replay})
        single, together, missing = compile_in_time(name, plan.shape, work, tokens, seconds)
        self.keys = {config_key(configs[0]) for configs in single}
        self.merged = {tuple(map(config_key, configs)) for configs in together}
        clock.mark(f"compiled {len(single)} configs and {len(together)} merged lists, {len(missing)} missing")
        print(*missing, sep="\n", flush=True)

    def has(self, configs: Sequence[Any], mode: str = "early-exit") -> bool:
        keys = tuple(map(config_key, configs))
        return keys in self.merged if mode == "merged" and len(keys) > 1 else self.keys.issuperset(keys)


class Routes:
    """Routing of each step: synthetic and recorded kinds in turn, one popularity a kind and step."""

    def __init__(self, shape: Any, trace: str | None) -> None:
        self.shape, self.rng = shape, np.random.default_rng(2)
        self.kinds: list[Any] = [Routing.parse(text) for text in ROUTINGS]
        self.source = "synthetic"
        if trace is None:
            return
        try:
            self.loads = read_trace(trace, shape.num_experts)
            self.source += f", {trace}"
        except InputError:
            # Recorded with another number of experts: as many of its experts are drawn for each step.
            self.loads = next(rows for n in (128, 256, 64, 512) if len(rows := _loads(trace, n)) and n >= shape.num_experts)  # fmt: skip
            self.source += f", {trace} of {self.loads.shape[1]} experts, {shape.num_experts} of them drawn at random"
        self.kinds += [None] * len(ROUTINGS)

    def __len__(self) -> int:
        return len(self.kinds)

    def draw(self, step: int, tokens: int) -> Any:
        shape, kind = self.shape, self.kinds[step % len(self.kinds)]
        if kind is not None:
            return kind.sample(tokens, shape.num_experts, shape.top_k, self.rng)
        row = self.loads[self.rng.integers(len(self.loads))]
        popularity = self.rng.permutation(row)[: shape.num_experts] + 1e-9
        noise = self.rng.gumbel(size=(tokens, shape.num_experts)) + np.log(popularity)
        return np.argpartition(-noise, shape.top_k - 1, axis=1)[:, : shape.top_k].astype(np.int32)


def _loads(trace: str, experts: int) -> Any:
    try:
        return read_trace(trace, experts)
    except InputError:
        return np.empty((0, experts))
