"""`check`: the suite that every wrapped kernel passes; for authors of kernels, in their own tests too.

    from rampwrap.testing.conformance import check

    print(check(MyKernel(shape)))

Optional members of a kernel that it knows, besides those of `rampwrap.kernel.protocol.Kernel`:
    ``reference(shape, inputs)``  the layer in float64, from what `inputs` returned; no numerics without it.
    ``tolerance``                 largest relative error against it; by dtype where absent.
    ``nondeterministic``          why two launches differ in their last bits; none where they must not.
    ``capturable``                True, or why a CUDA graph cannot hold the launch.
    ``launch_names``              parts of the names of the GPU kernels that `grid(...).launches` counts, in order.
    ``last_grid``                 CTAs of each of them in the latest launch; recorded from outside where absent.
"""

import contextlib
import importlib.util
import inspect
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import RampwrapError
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.grid import CtaGrid, num_blocks
from rampwrap.kernel.protocol import Config, Kernel, check_configs, format_config, refusal
from rampwrap.kernel.shape import MoEShape
from rampwrap.routing.workloads import Routing, Workload

Direct = Callable[[Config, dict[str, Any]], Any]
"``direct(config, inputs)``: the kernel itself, called as its own users call it."
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp8": 2e-2}
CHECKS = ("configs", "refusals", "numerics", "padding", "same bits", "grid", "graph")


@attrs.frozen
class Report:
    """What was checked, and what could not be, with the reason."""

    kernel: str
    passed: dict[str, str]
    "By check, what it covered."
    skipped: dict[str, str]
    worst_error: float = math.nan
    "Largest relative error (Frobenius norm) against the reference."

    def __str__(self) -> str:
        lines = [f"{self.kernel} conforms:"]
        lines += [f"  {name}: {self.passed.get(name) or 'skipped, ' + self.skipped[name]}" for name in CHECKS]
        return "\n".join(lines)


def check(
    kernel: Kernel,
    *,
    shape: MoEShape | None = None,
    device: str | torch.device | None = None,
    configs: Sequence[Config] | None = None,
    num_tokens: Sequence[int] = (1, 5, 33),
    direct: Direct | None = None,
    seed: int = 0,
) -> Report:
    """Runs every check on a few configs, spread over the list.

    Args:
        kernel: made for `shape`, with `inputs`; small shapes are enough, and needed in Triton's interpreter.
        shape, device: the layer and where it runs; ``kernel.shape`` and the GPU, if there is one, by default.
        configs: which ones to launch; 4 of the list by default (24 on a GPU).
        seed, num_tokens: of the random data, and batch sizes, each with uniform, skewed, one-hot-expert and mostly-empty routing.
        direct: launches the kernel without the adapter; its results must have the same bits.

    Raises:
        AssertionError: the kernel does not conform; a sentence names the config, the routing and what was found.
    """
    made: Any = shape or getattr(kernel, "shape", None)
    _ensure(made, f"kernel {kernel.name!r} has no shape; pass shape=MoEShape(...).")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    suite = _Suite(kernel, made, where, seed, tuple(num_tokens))
    some = tuple(configs) if configs is not None else suite.spread(24 if where.type == "cuda" else 4)
    suite.configs(some)
    suite.refusals(some)
    suite.numerics(some)
    suite.padding(some)
    suite.same_bits(some, direct)
    suite.grid(some)
    suite.graph(some[0])
    return Report(kernel.name, suite.passed, suite.skipped, suite.worst)


def _ensure(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, RampwrapError):
        raise
    except Exception as error:
        raise AssertionError(f"{what} {type(error).__name__}: {error}") from error


@attrs.define(slots=False)
class _Suite:
    kernel: Kernel
    shape: MoEShape
    device: torch.device
    seed: int
    batches: Sequence[int]
    passed: dict[str, str] = attrs.field(factory=dict)
    skipped: dict[str, str] = attrs.field(factory=dict)
    worst: float = math.nan

    def __attrs_post_init__(self) -> None:
        self.exact = getattr(self.kernel, "nondeterministic", None)
        self.simulated = getattr(self.kernel, "device", None) == SIMULATED
        self.tolerance = float(getattr(self.kernel, "tolerance", TOLERANCE[self.shape.dtype]))
        self._made: Any = getattr(self.kernel, "inputs", None)
        _ensure(self._made, f"kernel {self.kernel.name!r} has no inputs(shape, topk_ids, seed=0); give it one.")

    def spread(self, count: int) -> tuple[Config, ...]:
        """Configs that can run, evenly over the list."""
        usable = [config for config in self.kernel.configs if refusal(self.kernel, config, self.shape) is None]
        _ensure(usable, f"kernel {self.kernel.name!r} refuses every config for {self.shape}; give another shape.")
        picks = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int))
        return tuple(usable[index] for index in picks)

    def routings(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Batches by name: uniform, skewed, one hot expert, and all experts empty but top_k."""
        shape = self.shape
        for tokens in self.batches:
            for name in ("uniform", "zipf:1.2", "hot:1"):
                workload = Workload(tokens, Routing.parse(name), seed=self.seed)
                drawn = workload.topk_ids(shape.num_experts, shape.top_k)
                yield workload.label, torch.from_numpy(drawn).to(self.device)
            rng = np.random.default_rng(self.seed)
            few = rng.choice(shape.num_experts, shape.top_k, replace=False).astype(np.int32)
            yield f"M={tokens} few", torch.from_numpy(np.tile(few, (tokens, 1))).to(self.device)

    def inputs(self, topk_ids: torch.Tensor) -> dict[str, Any]:
        return dict(self._made(self.shape, topk_ids, seed=self.seed))

    def launch(self, config: Config, inputs: Mapping[str, Any], call: Callable[..., Any] | None = None) -> Any:
        """A launch on memory that holds NaN, its result taken over before the next one."""
        inputs = dict(inputs)
        if "out" in inspect.signature(self.kernel.launch).parameters:
            inputs["out"] = torch.full_like(inputs["hidden_states"], math.nan)
        if self.device.type == "cuda" and (x := inputs.get("hidden_states")) is not None:
            # What is freed here is what the launch allocates next.
            for scale in (1, self.shape.top_k, 4 * self.shape.top_k):
                torch.full((x.numel() * scale,), math.nan, dtype=x.dtype, device=x.device)
        result = (call or self.kernel.launch)(config, **inputs)
        return result.clone() if isinstance(result, torch.Tensor) else result

    def differ(self, one: Any, other: Any) -> str | None:
        """How two results differ: by a bit, or by more than the order of additions explains; None if they do not."""
        if not isinstance(one, torch.Tensor):
            return None if one == other else f"{one!r} and {other!r}"
        if one.shape == other.shape and torch.equal(one, other):
            return None
        error = _error(other, one.double()) if one.shape == other.shape else math.inf
        return None if self.exact and error < self.tolerance else f"relative difference {error:.2g}"

    def configs(self, some: Sequence[Config]) -> None:
        """The list is sound, and every grid is data of the right kind, the same at every call."""
        every = check_configs(self.kernel.configs, f"kernel {self.kernel.name!r}")
        for config in (*every, *some):
            with _explained(f"grid of {format_config(config)} raises"):
                grid = self.kernel.grid(config, self.shape)
                same = grid == self.kernel.grid(json.loads(json.dumps(dict(config))), self.shape)
            _ensure(isinstance(grid, CtaGrid) and same, f"grid of {format_config(config)} is not stable: {grid}.")
        self.passed["configs"] = f"{len(every)} configs with their grids"

    def refusals(self, some: Sequence[Config]) -> None:
        """Spoilt configs are refused by `supports` with a reason, and by `launch` before it does anything."""
        if not hasattr(self.kernel, "supports"):
            self.skipped["refusals"] = "the kernel has no supports(config, shape)"
            return
        inputs, spoilt = self.inputs(next(self.routings())[1]), [{}, {"unknown": 1}]
        for key, value in some[0].items():
            spoilt.append({k: v for k, v in some[0].items() if k != key})
            if isinstance(value, int) and not isinstance(value, bool):
                spoilt += [{**some[0], key: wrong} for wrong in (0, -1, 3_000_003)]
        for config in spoilt:
            reason = refusal(self.kernel, config, self.shape)
            if reason is None and len(config) == len(some[0]) and 3_000_003 in config.values():
                continue  # a kernel may have parameters without an upper bound
            _ensure(reason and len(reason) > 10, f"supports accepts {config} or says too little: {reason!r}.")
            with contextlib.suppress(RampwrapError), _explained(f"launch of {config} should raise a ConfigError, not"):
                self.kernel.launch(config, **inputs)
                raise AssertionError(f"launch ran {config}, which supports refuses: {reason}")
        self.passed["refusals"] = f"{len(spoilt)} spoilt configs"

    def numerics(self, some: Sequence[Config]) -> None:
        """Every routing with every config against float64."""
        if (reference := getattr(self.kernel, "reference", None)) is None:
            self.skipped["numerics"] = "the kernel has no reference(shape, inputs)"
            return
        self.worst = 0.0
        for label, ids in self.routings():
            inputs = self.inputs(ids)
            expected = reference(self.shape, inputs)
            for config in some:
                error = _error(self.launch(config, inputs), expected)
                self.worst = max(self.worst, error)
                what = f"{format_config(config)} is off by {error:.3g} at {label}, more than {self.tolerance:g}"
                _ensure(error < self.tolerance, f"{what}; nan means that it reads memory nobody wrote.")
        routings = 4 * len(self.batches)
        self.passed["numerics"] = f"{len(some)} configs on {routings} routings, worst error {self.worst:.2g}"

    def odd_ids(self) -> dict[str, torch.Tensor]:
        """Batches by name: with padding of either kind in whole rows and in single slots, of padding alone, with duplicates."""
        shape = self.shape
        drawn = Workload(max(8, *self.batches), Routing.parse("uniform"), seed=self.seed)
        ids = torch.from_numpy(drawn.topk_ids(shape.num_experts, shape.top_k)).to(self.device)
        padded, twice = ids.clone(), ids.clone()
        padded[1::4], padded[2::4] = -1, shape.num_experts
        padded[3, 0], padded[7, -1] = -1, shape.num_experts
        twice[::2] = twice[::2, :1]
        only = {f"only {pad}": torch.full_like(ids, pad) for pad in (-1, shape.num_experts)}
        return {"padding": padded, **only, "duplicates": twice}

    def padding(self, some: Sequence[Config]) -> None:
        """Ids of -1 and num_experts add nothing, and each slot of an expert named twice counts once (`rampwrap.routing.workloads`).

        The reference gets an expert in range with weight zero for them, so it need not know of padding.
        """
        reference, experts = getattr(self.kernel, "reference", None), self.shape.num_experts
        for label, ids in self.odd_ids().items():
            real = (ids >= 0) & (ids < experts)
            inputs = {**self.inputs(torch.where(real, ids, 0)), "topk_ids": ids}
            for config in some:
                what = f"{format_config(config)} with {label} in topk_ids"
                with _explained(f"{what} raises"):
                    out = self.launch(config, inputs)
                if not isinstance(out, torch.Tensor):
                    without = self.launch(config, {**inputs, "topk_ids": ids[real.any(1)]})
                    _ensure(out == without, f"{what} gives {out}, without the rows of padding {without}.")
                    continue
                lone = ~real.any(1)
                _ensure(not out[lone].any(), f"{what} writes rows that are not zero for tokens of padding alone.")
                if reference is None or "topk_weights" not in inputs:
                    continue
                weights = inputs["topk_weights"].masked_fill(~real, 0.0)
                plain = {**inputs, "topk_ids": torch.where(real, ids, 0), "topk_weights": weights}
                error = _error(out, reference(self.shape, plain))
                _ensure(error < self.tolerance, f"{what} is off by {error:.3g}, more than {self.tolerance:g}.")
        self.passed["padding"] = f"{len(some)} configs, padding of -1 and {experts}, duplicates"

    def same_bits(self, some: Sequence[Config], direct: Direct | None) -> None:
        """Through a Dispatcher, twice, and called directly: the same result."""
        dispatcher, (label, ids) = Dispatcher(self.kernel, shape=self.shape), list(self.routings())[-3]
        inputs = self.inputs(ids)
        for config in some:
            first, found = self.launch(config, inputs), {"launched again": self.launch(config, inputs)}
            if any(config is mine or config == mine for mine in self.kernel.configs):
                found["dispatched"] = self.launch(config, inputs, lambda c, **kw: dispatcher.pin(c)(**kw))
            if direct is not None:
                found["called directly"] = direct(config, dict(inputs))
            for how, other in found.items():
                difference = self.differ(first, other)
                _ensure(difference is None, f"{format_config(config)} {how} gives another result at {label}: {difference}.")  # fmt: skip
        how = "within the tolerance (" + self.exact + ")" if self.exact else "bit for bit"
        self.passed["same bits"] = f"{len(some)} configs, {', '.join(found)}: {how}"

    def grid(self, some: Sequence[Config]) -> None:
        """CTAs of real launches are what the descriptor says, for some number of blocks that the batch allows."""
        some = [config for config in some if not self.kernel.grid(config, self.shape).persistent]
        if self.simulated or not some:
            self.skipped["grid"] = "simulated" if self.simulated else "persistent grids: tiles are counted, not CTAs"
            return
        for label, ids in (batch for batch in self.routings() if batch[0].endswith(("uniform", "few"))):
            inputs = self.inputs(ids)
            counts = np.bincount(ids.flatten().cpu().numpy(), minlength=self.shape.num_experts)
            for config in some:
                grid = self.kernel.grid(config, self.shape)
                if (seen := self.recorded(config, inputs)) is None:
                    self.skipped["grid"] = f"{self.device}: no last_grid, and no profiler or interpreter saw a launch"
                    return
                least = int(num_blocks(counts, grid.block_m))
                most = -(-ids.numel() // grid.block_m) + self.shape.num_local_experts
                named = hasattr(self.kernel, "launch_names") or hasattr(self.kernel, "last_grid")
                what = (
                    f"{format_config(config)} at {label} launches {seen} CTAs, which {grid.launches} a block explains"
                )
                fit = any(least <= number <= most for number in _blocks(grid, seen, named))
                _ensure(fit, f"{what} for no number of blocks from {least} to {most}; correct grid().")
        self.passed["grid"] = f"{len(some)} configs on {2 * len(self.batches)} routings"

    def recorded(self, config: Config, inputs: dict[str, Any]) -> list[int] | None:
        """CTAs of each launch of a layer that counts; None where nobody can tell."""
        if hasattr(self.kernel, "last_grid"):
            self.launch(config, inputs)
            return list(self.kernel.last_grid)
        if self.device.type == "cuda":
            self.launch(config, inputs)  # compiled before it is recorded
            names = profiled_launches(lambda: self.kernel.launch(config, **inputs))
        elif importlib.util.find_spec("triton") is None:
            return None
        else:
            with interpreted_launches() as names:
                self.kernel.launch(config, **inputs)
        if (wanted := getattr(self.kernel, "launch_names", None)) is None or not names:
            return [ctas for _, ctas in names] or None
        left = [(name, ctas) for name, ctas in names if any(part in name for part in wanted)]
        matches = len(left) == len(wanted) and all(part in name for part, (name, _) in zip(wanted, left, strict=True))
        _ensure(matches, f"expected launches of {', '.join(wanted)}, found {[name for name, _ in names]}.")
        return [ctas for _, ctas in left]

    def graph(self, config: Config) -> None:
        """A captured launch follows its inputs: replays equal eager launches."""
        capturable = getattr(self.kernel, "capturable", True)
        if capturable is not True or self.device.type != "cuda" or self.simulated:
            self.skipped["graph"] = str(capturable) if capturable is not True else f"no GPU ({self.device})"
            return
        batches = [ids for _, ids in self.routings()][-4:]  # all of one size
        inputs = self.inputs(batches[0].clone())
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.kernel.launch(config, **inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        why = f"{format_config(config)} cannot be captured; set `capturable` to the reason:"
        with _explained(why), torch.cuda.graph(graph):
            out = self.kernel.launch(config, **inputs)
        for ids in batches:
            inputs["topk_ids"].copy_(ids)
            graph.replay()
            difference = self.differ(out.clone(), self.kernel.launch(config, **inputs))
            _ensure(difference is None, f"{format_config(config)} in a graph differs from eager: {difference}.")
        self.passed["graph"] = f"{len(batches)} replays"


def _error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))


def _blocks(grid: CtaGrid, seen: Sequence[int], ordered: bool) -> set[int]:
    """Numbers of M blocks for which every entry of `grid.launches` was launched."""
    if ordered:
        exact = len(seen) == len(grid.launches) and all(c % n == 0 for c, n in zip(seen, grid.launches, strict=True))
        quotients = {c // n for c, n in zip(seen, grid.launches, strict=True)} if exact else set()
        return quotients if len(quotients) == 1 else set()
    candidates = {c // n for c in seen for n in grid.launches if c % n == 0}
    return {b for b in candidates if all(seen.count(n * b) >= grid.launches.count(n) for n in grid.launches)}


@contextlib.contextmanager
def interpreted_launches() -> Iterator[list[tuple[str, int]]]:
    """(name, CTAs) of every launch in Triton's interpreter while inside."""
    from triton.runtime import interpreter

    seen: list[tuple[str, int]] = []
    run = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(self.fn).bind_partial(*args).arguments | kwargs
        size = self.grid(arguments) if callable(self.grid) else self.grid
        seen.append((self.fn.__name__, math.prod(size)))
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded
    try:
        yield seen
    finally:
        interpreter.GridExecutor.__call__ = run


def profiled_launches(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """(name, CTAs) of every GPU kernel that `call` launches, in order, as CUPTI records them."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: float(event["ts"]))
    return [(event["name"], math.prod(event["args"]["grid"])) for event in kernels]
