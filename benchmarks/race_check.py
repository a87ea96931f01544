"""What launches of a token count in `race.py` work on, and whether they are right: replays on poisoned memory against float64."""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from common import graph_nodes
from race_field import Batch, Field

from rampwrap.errors import RampwrapError
from rampwrap.kernel.portfolio import Memory, Portfolio
from rampwrap.kernel.protocol import MEMBER, Config, Kernel, config_key, format_config
from rampwrap.measure.inputs import MAX_ROTATIONS
from rampwrap.measure.timer import Call
from rampwrap.testing.conformance import TOLERANCE


def poison(memory: Any) -> None:
    """Fills a workspace with NaN."""
    for its in memory.by_member.values() if isinstance(memory, Memory) else [memory]:
        for tensor in attrs.asdict(its, recurse=False).values() if attrs.has(type(its)) else ():
            if isinstance(tensor, torch.Tensor):
                tensor.view(torch.uint8).fill_(0xFF)


def poisoned(kernel: Kernel, tokens: int, like: torch.Tensor) -> dict[str, Any]:
    """The workspace and the output that a launch takes, full of NaN."""
    given: dict[str, Any] = {}
    takes = inspect.signature(kernel.launch).parameters
    if "workspace" in takes and hasattr(kernel, "workspace"):
        given["workspace"] = kernel.workspace(tokens, like.device)
        poison(given["workspace"])
    if "out" in takes:
        given["out"] = torch.full_like(like, torch.nan)
    return given


def captured(call: Call) -> tuple[Any, Any]:
    """What a call returns while it is captured, and the graph, which keeps its nodes. Not `torch.cuda.graph`, which collects garbage."""
    graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = call()
        finally:
            graph.capture_end()
    graph.instantiate()
    return result, graph


class Launches:
    """Launches of a token count: their memory, what they are checked against, and whom an error is blamed on."""

    def __init__(self, its: Field, tokens: int) -> None:
        assert its.both is not None
        self.field, self.tokens, self.both = its, tokens, its.both
        makes = any(hasattr(kernel, "workspace") for kernel in its.kernels)
        self.memory = its.both.workspace(tokens, its.where) if makes else None
        self.out: torch.Tensor | None = None
        self.known: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._checked: set[str] = set()
        self._compiled: set[str] = set()
        first = its.kernels[0]
        made = getattr(first, "default_config", None)
        self.default = Portfolio.tagged(first, first.configs[0] if made is None else made(tokens))

    def variants(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Arguments of launches that take turns, as many as the batch with the fewest experts needs for weights not in L2."""
        shape = self.field.shape
        active = min(int(np.count_nonzero(batch.counts)) for batch in batches)
        turns = self.field.timer.rotations(shape.weight_bytes * active // shape.num_local_experts)
        turns = min(turns, MAX_ROTATIONS, shape.num_local_experts)
        shifted = [self.field.turned(batches[0], turn, turns) for turn in range(turns)]
        made = [self.both.inputs(shape, ids, seed=self.field.a.seed) for ids in shifted]
        if self.out is None and "hidden_states" in made[0]:
            self.out = torch.empty_like(made[0]["hidden_states"])
        return made

    def calls(self, config: Config, variants: Iterable[dict[str, Any]]) -> list[Call]:
        """Each with the memory that serving holds for it, where the kernel takes such."""
        kernel = self.both.untagged(config)[0]
        takes = inspect.signature(kernel.launch).parameters
        mine = {"workspace": self.memory, "out": self.out}
        given = {name: value for name, value in mine.items() if name in takes and value is not None}
        return [functools.partial(self.both.launch, config, **variant, **given) for variant in variants]

    def compile(self, configs: Sequence[Config], arguments: dict[str, Any]) -> None:
        """In parallel, what is new; what cannot be says so when it is launched."""
        new = [config for config in configs if config_key(config) not in self._compiled]
        self._compiled |= {config_key(config) for config in new}
        if new and "hidden_states" in arguments:
            with contextlib.suppress(Exception):
                self.both.precompile(new, **arguments)

    def blaming(self, config: Config) -> "_Blame":
        """Names the config as wrong where the block raises; a lost GPU ends the race."""
        return _Blame(self.field, config)

    def learn(self, batch: Batch) -> None:
        """Keeps the layer in float64 for one routing more; two are enough."""
        if hasattr(self.field.kernels[0], "reference") and len(self.known) < 2:
            ids = torch.from_numpy(batch.ids).to(self.field.where)
            inputs = self.both.inputs(self.field.shape, ids, seed=self.field.a.seed)
            self.known.append((ids, self.both.reference(self.field.shape, inputs)))
            self._checked.clear()

    def right(self, config: Config) -> bool:
        """Whether the replays of one graph are the layer for every routing known, on poisoned memory."""
        key = config_key(config)
        if key not in self._checked and self.known and key not in self.field.wrong:
            self._checked.add(key)
            with self.blaming(config):
                if (why := self._off(config)) is not None:
                    self.field.wrong[key] = why
        return key not in self.field.wrong

    def _off(self, config: Config) -> str | None:
        kernel, _ = self.both.untagged(config)
        inputs = self.both.inputs(self.field.shape, self.known[0][0].clone(), seed=self.field.a.seed)
        (call,) = self.calls(config, [inputs])
        result, again = call(), call
        if torch.cuda.is_available():
            result, graph = captured(call)
            self._note(config, graph)
            again = graph.replay
        for ids, expected in self.known:
            inputs["topk_ids"].copy_(ids)
            if self.memory is not None:
                poison(self.memory)
            if self.out is not None:
                self.out.fill_(torch.nan)
            found = again()
            found = result if found is None else found
            off = float((found.double() - expected).norm() / expected.norm())
            if not off < getattr(kernel, "tolerance", TOLERANCE[self.field.shape.dtype]):
                return f"{format_config(config)}: relative error {off:.3g} at {self.tokens} tokens"
        return None

    def _note(self, config: Config, graph: Any) -> None:
        name = f"{config[MEMBER]} {config.get('form', '')}".strip()
        name += " (default)" if config == self.default else ""
        if name not in self.field.nodes:
            try:
                self.field.nodes[name] = graph_nodes(graph)
            except Exception as error:  # no reason not to race
                self.field.nodes[name] = {"kernels": [], "others": [f"unknown, {error}"]}


class _Blame:
    def __init__(self, field: Field, config: Config) -> None:
        self._field, self._config = field, config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        text = str(error).splitlines()[0][:200] if str(error) else ""
        self._field.wrong[config_key(self._config)] = f"{format_config(self._config)}: {type(error).__name__}: {text}"
        if (lost := self._field.timer.fault()) is not None:
            raise RampwrapError(f"{format_config(self._config)} lost the GPU: {lost}") from error
        return True
