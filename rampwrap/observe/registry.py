"""Seeing what happens: `stats()` of all that launches in this process, as numbers and in the log.

    rampwrap.stats()        JSON-able: per layer and bucket which config ran how often, gain, drift
    RAMPWRAP_STATS=60       a line in the log every 60 seconds

`rampwrap.observe.metrics` hands the same to Prometheus, `rampwrap.observe.server` at a port of each process.

Reading waits for the GPU, so it is left out while a CUDA graph is captured. Drift beyond what was profiled is said
once for each plan, with the command that profiles anew.
"""

import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rampwrap._version import __version__
from rampwrap.errors import CaptureError
from rampwrap.kernel.protocol import format_config
from rampwrap.observe import server
from rampwrap.routing.drift import drift

INTERVAL = "RAMPWRAP_STATS"
DRIFTED = 0.1
"Drift from which on it is said: a tenth of the profiled range beyond it."
ENOUGH_STEPS = 32
"Launches of a bucket before its drift is judged."
PATIENCE_S = 60.0
"How long `stats` waits for a capture to end: an engine's take seconds."

_log = logging.getLogger("rampwrap")
_sources: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
"Each with its number, which is never given again: a label of Prometheus' counters."
_numbers = itertools.count()
_changing = threading.Lock()
"Held while `_sources` is changed or listed; threads of an engine make graph dispatchers while the log's thread reads."
_said: "weakref.WeakSet[Any]" = weakref.WeakSet()
_reading = threading.Lock()
"Held while counters are read, and while the log is on also while a CUDA graph is captured."


def _renew() -> None:
    """In a forked process: locks that threads of the parent held, and its log, are not there any more."""
    global _reading, _running
    _changing.release()
    _reading, _running = threading.Lock(), None


# A fork waits for `_changing`, which is never held for long, so that what it guards is whole in the child. It does not
# wait for `_reading`: a reading waits for the GPU.
os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_renew)


def watch(source: Any) -> None:
    """Counts a `GraphDispatcher` or `Dispatcher` in, for as long as it lives; starts log and endpoint where variables ask for them."""
    with _changing:
        _sources.setdefault(source, next(_numbers))
    if _running is None and os.environ.get(INTERVAL):
        start_log()
    if os.environ.get(server.ADDRESS):
        server.start()


_running: "Log | None" = None


def unwatch(source: Any) -> None:
    """Leaves it out: something that is watched counts for it."""
    with _changing:
        _sources.pop(source, None)


def stats() -> dict[str, Any]:
    """What every `GraphDispatcher` and `Dispatcher` of this process has launched so far. Waits for the GPU.

    Returns:
        ``{"rampwrap": version, "sources": [...]}``, a source for each that launched something: ``kernel``, ``shape``,
        ``kind``, ``number`` (its own as long as the process lives), ``plan`` (None without one) and ``layers``, an entry for each layer,
        bucket of token counts and mode. In it ``configs`` (``config``, ``launches``, ``share``, ``static``), ``observed``
        (launches whose routing was seen: all that the GPU counted, what reached the host in lagged modes) and over these
        the means ``active_experts`` and ``concentration``, ``outside`` (share beyond what was profiled) and ``drift``
        (`rampwrap.routing.drift.drift`); where the GPU counted also the means of ``static_us`` and ``chosen_us`` (predicted) and
        ``predicted_gain`` (static over chosen, minus 1); None where nothing is known.

    Raises:
        CaptureError: a CUDA graph is being captured.
    """
    torch = sys.modules.get("torch")
    under = torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if under or not _reading.acquire(timeout=PATIENCE_S):
        raise CaptureError("counters cannot be read while a CUDA graph is captured; call stats() afterwards.")
    try:
        measured = _read()
    finally:
        _reading.release()
    say_drift(measured)
    return as_found(measured)


Measured = list[tuple[Any, dict[str, Any]]]
"Each source that launched something, and what `stats` says of it."


def _read() -> Measured:
    found = [(s, _of_graph_dispatcher(s, n) if hasattr(s, "telemetry") else _of_dispatcher(s, n)) for s, n in _alive()]
    return [(source, its) for source, its in found if its["layers"]]


def glance() -> Measured | None:
    """What was launched, without a wait for a capture: None while one is under way, and where counters cannot be read.

    For threads of their own, after `keep_apart_from_capture`: the engine goes on whatever becomes of them.
    """
    if not _reading.acquire(blocking=False):
        return None
    try:
        return _read()
    except Exception as error:
        _log.debug("rampwrap cannot read its counters: %s", error)
        return None
    finally:
        _reading.release()


def as_found(measured: Measured) -> dict[str, Any]:
    """As `stats` returns it."""
    return {"rampwrap": __version__, "sources": [its for _, its in measured]}


def _alive() -> list[tuple[Any, int]]:
    with _changing:
        alive = list(_sources.items())
    return sorted(alive, key=lambda its: (its[0].kernel.name, str(its[0].shape), its[1]))


def _of_graph_dispatcher(graph_dispatcher: Any, number: int) -> dict[str, Any]:
    plan, layers = graph_dispatcher.plan, []
    serves = graph_dispatcher.policy
    static = _static(serves)
    for row in graph_dispatcher.telemetry():
        entry = _entry(row.layer, row.num_tokens, row.mode, row.counts, serves.configs, static)
        if row.observed:
            names = ("active_experts", "concentration", "outside")
            means = {name: getattr(row, name) / row.observed for name in names}
            moved = drift(plan.profiled, row.num_tokens, *means.values())
            entry |= {**means, "observed": row.observed, "drift": moved}
        if row.on_device and row.steps:
            gain = row.static_us / row.chosen_us - 1 if row.chosen_us else 0.0
            entry |= {name: getattr(row, name) / row.steps for name in ("static_us", "chosen_us")}
            entry["predicted_gain"] = gain
        layers.append(entry)
    made = None if plan is None else {**plan.provenance, "device": plan.device.name}
    return _source(graph_dispatcher, number, "graph dispatcher", made, layers)


def _static(policy: Any) -> Any:
    """The static table in the numbering of the policy's own configs: a refused plan's is not served."""
    return getattr(policy, "static", getattr(policy, "table", None))


def _of_dispatcher(dispatcher: Any, number: int) -> dict[str, Any]:
    counts = {index: count for index, count in enumerate(dispatcher.launch_counts) if count}
    policy = dispatcher.policy
    entry = _entry("", None, type(policy).__name__, counts, policy.configs, _static(policy))
    return _source(dispatcher, number, "dispatcher", None, [entry] if counts else [])


def _source(source: Any, number: int, kind: str, plan: Any, layers: list[dict[str, Any]]) -> dict[str, Any]:
    named = {"kernel": source.kernel.name, "shape": str(source.shape), "kind": kind, "number": number}
    return {**named, "plan": plan, "layers": layers}


def _entry(
    layer: str, tokens: int | None, mode: str, counts: Mapping[int, int], configs: Any, static: Any
) -> dict[str, Any]:
    steps = sum(counts.values())
    serves = None if static is None or tokens is None else static.index(tokens)
    ran = sorted(((count, index) for index, count in counts.items() if count), reverse=True)
    unknown = ("static_us", "chosen_us", "predicted_gain", "active_experts", "concentration", "outside", "drift")
    return {
        "layer": layer,
        "num_tokens": tokens,
        "mode": mode,
        "steps": steps,
        "observed": 0,
        "configs": [
            {
                "config": format_config(configs[index]),
                "launches": count,
                "share": count / steps,
                "static": None if serves is None else index == serves,
            }
            for count, index in ran
        ],
        **dict.fromkeys(unknown),
    }


def line(found: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """One line for the log: launches since an earlier `stats()`, how many were not the static config, gain and drift."""
    # By source: one that is gone since takes back none of the others' launches.
    earlier = {its["number"]: _steps({"sources": [its]}) for its in (before or {"sources": []})["sources"]}
    steps = sum(_steps({"sources": [its]}) - earlier.get(its["number"], 0) for its in found["sources"])
    routed = [entry for entry in _entries(found) if entry["chosen_us"]]
    total = sum(entry["steps"] for entry in _entries(found))
    moved = sum(ran["launches"] for entry in _entries(found) for ran in entry["configs"] if ran["static"] is False)
    parts = [f"{steps} launches, {total} in all", f"{moved / max(total, 1):.1%} not the static config"]
    if routed:
        static, chosen = (sum(entry[key] * entry["steps"] for entry in routed) for key in ("static_us", "chosen_us"))
        parts.append(f"predicted gain {static / chosen - 1:.1%}")
    if judged := [entry for entry in _entries(found) if entry["drift"] is not None]:
        most = max(judged, key=lambda entry: entry["drift"])
        where = f" ({most['layer'] or 'layer'} at {most['num_tokens']} tokens)" if most["drift"] else ""
        parts.append(f"drift {most['drift']:.2f}{where}")
    return "rampwrap: " + "; ".join(parts)


def _entries(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return (entry for source in found["sources"] for entry in source["layers"])


def _steps(found: Mapping[str, Any]) -> int:
    return sum(entry["steps"] for entry in _entries(found))


def say_drift(measured: Measured) -> None:
    """Warns, once for each graph dispatcher, where launches lie beyond the range its plan was profiled on."""
    for graph_dispatcher, its in measured:
        moved = [
            entry for entry in its["layers"] if (entry["drift"] or 0.0) > DRIFTED and entry["observed"] >= ENOUGH_STEPS
        ]
        if not moved:
            continue
        with _changing:
            if graph_dispatcher in _said:
                continue
            _said.add(graph_dispatcher)
        most = max(moved, key=lambda entry: entry["drift"])
        _log.warning(
            "rampwrap serves routing that its plan for %s was not profiled on: %s at %s tokens has %.1f active experts "
            "and concentration %.4f, drift %.2f. Record histograms with the engine (formats: rampwrap.routing.recorded) and "
            "make the plan anew with '%s --recorded FILE', then 'rampwrap fit'.",
            its["shape"],
            most["layer"] or "a layer",
            most["num_tokens"],
            most["active_experts"],
            most["concentration"],
            most["drift"],
            graph_dispatcher.plan.remedy(graph_dispatcher.kernel),
        )


class Log(threading.Thread):
    """A daemon thread that logs `line` at intervals; it skips its turn while a CUDA graph is captured."""

    def __init__(self, interval_s: float) -> None:
        super().__init__(name="rampwrap-stats", daemon=True)
        self.interval_s = interval_s
        self._over = threading.Event()
        self._before: dict[str, Any] | None = None

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.wait(self.interval_s):
            self.turn()

    def turn(self) -> None:
        """One line, where something was launched since the last."""
        if (measured := glance()) is None:
            return
        found = as_found(measured)
        if _steps(found) != (0 if self._before is None else _steps(self._before)):
            _log.info("%s", line(found, self._before))
            say_drift(measured)
        self._before = found

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()


def start_log(interval_s: float | None = None) -> Log | None:
    """Starts the log of this process, once.

    Args:
        interval_s: seconds between lines; None takes $RAMPWRAP_STATS, and starts nothing where that is not set.
    """
    global _running
    if interval_s is None:
        given = os.environ.get(INTERVAL, "").strip()
        try:
            interval_s = float(given or 0)
        except ValueError:
            _log.warning("%s=%s is no number of seconds; no statistics are logged.", INTERVAL, given)
            return None
    if not 0 < interval_s < threading.TIMEOUT_MAX:
        return None
    if _running is None or not _running.is_alive():
        keep_apart_from_capture()
        if _log.level == logging.NOTSET and _log.getEffectiveLevel() > logging.INFO:
            _log.setLevel(logging.INFO)
        if not _log.hasHandlers():
            _log.addHandler(logging.StreamHandler())
        _running = Log(interval_s)
        _running.start()
        time.sleep(0)
    return _running


def keep_apart_from_capture() -> None:
    """Makes captures of CUDA graphs wait for a reading that is under way, and readings skip captures.

    A copy to the host on another thread while a graph is captured would end the capture with an error. All captures of
    torch, and of engines on it, begin and end in these two methods.
    """
    import torch

    # Several captures may be under way, on streams of one thread too: the first takes the lock, the last returns it.
    graph, holding, counting = torch.cuda.CUDAGraph, set[int](), threading.Lock()
    if hasattr(graph.capture_begin, "rampwrap"):
        return
    begin: Callable[..., Any] = graph.capture_begin
    end: Callable[..., Any] = graph.capture_end

    def leave(self: Any) -> None:
        with counting:
            if id(self) in holding:  # a capture that began before this was in place holds nothing
                holding.discard(id(self))
                if not holding:
                    _reading.release()

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        with counting:
            if not holding:
                _reading.acquire()
            holding.add(id(self))
        try:
            return begin(self, *args, **kwargs)
        except BaseException:
            leave(self)
            raise

    def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return end(self, *args, **kwargs)
        finally:
            leave(self)

    capture_begin.rampwrap = True  # type: ignore[attr-defined]
    graph.capture_begin, graph.capture_end = capture_begin, capture_end  # type: ignore[method-assign]
