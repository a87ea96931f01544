"""What `stats` holds as metrics of Prometheus, made by its own client: `pip install 'rampwrap[metrics]'`.

from prometheus_client import REGISTRY, start_http_server

REGISTRY.register(rampwrap.observe.Collector())
start_http_server(9400)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rampwrap.errors import InputError
from rampwrap.observe import registry

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector as ClientCollector
except ImportError as error:
    raise InputError(
        f"metrics need prometheus_client ({error}); install it with pip install 'rampwrap[metrics]'."
    ) from error

LABELS = ("source", "kernel", "shape", "layer", "tokens", "mode")
LAUNCHES = ("rampwrap_launches", "Launches of a layer at the token counts of a bucket, by config.")
GAUGES = {
    "predicted_gain": (
        "rampwrap_predicted_gain_ratio",
        "Predicted time of static over that of what was chosen, minus 1.",
    ),
    "drift": ("rampwrap_drift_ratio", "How far the routing lies beyond what was profiled, over the width of that."),
    "outside": ("rampwrap_outside_ratio", "Share of launches beyond what was profiled, for which static served."),
    "active_experts": ("rampwrap_active_experts", "Experts with at least one token, mean over launches."),
    "concentration": ("rampwrap_concentration", "Sum of the squared shares of tokens of experts, mean over launches."),
}
"Name and help of each mean that an entry of `stats` may hold."
NOTHING: Mapping[str, Any] = {"sources": []}


def families(found: Mapping[str, Any]) -> Iterator[Metric]:
    """The metrics of what `stats` returned; means that are not known have no sample."""
    launches = CounterMetricFamily(*LAUNCHES, labels=(*LABELS, "config"))
    gauges = {key: GaugeMetricFamily(*named, labels=LABELS) for key, named in GAUGES.items()}
    for source in found["sources"]:
        for entry in source["layers"]:
            tokens = "" if entry["num_tokens"] is None else str(entry["num_tokens"])
            labels = (str(source["number"]), source["kernel"], source["shape"], entry["layer"], tokens, entry["mode"])
            for ran in entry["configs"]:
                launches.add_metric((*labels, ran["config"]), ran["launches"])
            for key, gauge in gauges.items():
                if entry[key] is not None:
                    gauge.add_metric(labels, entry[key])
    return iter((launches, *gauges.values()))


class Collector(ClientCollector):
    """Hands Prometheus, at each scrape, what every dispatcher of this process has launched.

    A scrape waits for the GPU. One that comes while a CUDA graph is captured is answered with the numbers of the last;
    captures that begin meanwhile wait for it.
    """

    def __init__(self) -> None:
        registry.keep_apart_from_capture()
        self._last = NOTHING

    def describe(self) -> Iterator[Metric]:
        """Names alone, for the registry that this is registered with; reads nothing."""
        return families(NOTHING)

    def collect(self) -> Iterator[Metric]:
        """All metrics, each without samples until something was launched."""
        measured = registry.glance()
        if measured is not None:
            self._last = registry.as_found(measured)
            registry.say_drift(measured)
        return families(self._last)


def listen(port: int, host: str) -> None:
    """Answers Prometheus on a port from now on, in a thread of its own; other collectors of the process stay out of it.

    Raises:
        OSError: the port cannot be had.
    """
    one = CollectorRegistry()
    one.register(Collector())
    start_http_server(port, host, one)


class _Snapshot(ClientCollector):
    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    def collect(self) -> Iterator[Metric]:
        return families(self.found)


def prometheus(found: Mapping[str, Any] | None = None) -> str:
    """`stats()` in Prometheus' text format.

    Args:
        found: what `stats` returned; read now where absent.

    Raises:
        CaptureError: a CUDA graph is being captured, and `found` is absent.
    """
    one = CollectorRegistry()
    one.register(_Snapshot(registry.stats() if found is None else found))
    return generate_latest(one).decode()
