"""The workloads of a command: token counts with routings, and histograms that an engine recorded."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from rampwrap.cli.command import Decorator
from rampwrap.cli.several import Several
from rampwrap.cli.types import positive
from rampwrap.kernel.shape import MoEShape
from rampwrap.routing.recorded import account
from rampwrap.routing.workloads import Routing, Workload, recorded_workloads

EVAL_TOKENS = (3, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072)
EVAL_ROUTINGS = tuple(map(Routing.parse, ("dirichlet:0.2", "zipf:0.8", "zipf:1.6", "hot:2", "lognormal:1.0")))
"What is judged: token counts and skews that no fit sees."
RECORDED_LIMIT = 24
"Histograms that are taken of a file."


def routings_of(texts: Iterable[str | Routing]) -> tuple[Routing, ...]:
    """Reads ``uniform``, ``zipf:1.2`` and their like."""
    return tuple(its if isinstance(its, Routing) else Routing.parse(its) for its in texts)


def tokens_option(name: str = "--batch-size", text: str = "token counts", *, empty: bool = False) -> Decorator:
    """Token counts."""
    return click.option(name, cls=Several, empty=empty, type=positive, metavar="M...", help=text)


def routings_option(name: str = "--routing", text: str = "", *, empty: bool = False) -> Decorator:
    """Routings."""
    text = text or "uniform zipf:1.2 dirichlet:0.3 hot:1 lognormal:1 trace:FILE[:LAYER]"
    return click.option(name, cls=Several, empty=empty, metavar="R...", help=text)


def recorded_option(name: str = "--recorded", where: str = "") -> Decorator:
    """Files that an engine recorded."""
    text = f"histograms that an engine recorded{where}: SGLang's dumps, vLLM's routed experts, .npy, .npz, .json"
    return click.option(name, cls=Several, metavar="FILE[:LAYER]...", help=text)


seed_option = click.option("--seed", type=int)
limit_option = click.option("--recorded-limit", type=positive, metavar="N", help="histograms taken of a file")


def recorded_of(paths: Sequence[str], shape: MoEShape, limit: int, split: str, seed: int) -> list[Workload]:
    """Workloads of files that an engine recorded, each file once."""
    sizes = {"num_experts": shape.num_experts, "top_k": shape.top_k}
    found = [recorded_workloads(path, **sizes, limit=limit, split=split, seed=seed) for path in dict.fromkeys(paths)]
    return [workload for part in found for workload in part]


def recorded_said(
    shape: MoEShape, routings: Iterable[Routing], recorded: Iterable[str] = (), limit: int = RECORDED_LIMIT
) -> dict[str, Any]:
    """What became of the recordings and traces that a command was given: ``{"recorded": [...]}``, {} without any.

    On stderr a line for each of which anything is left out, or may be other than it looks.
    """
    files = dict.fromkeys(recorded)
    traces = dict.fromkeys(its.value for its in routings if its.kind == "trace")
    found = [account(path, shape.num_experts, shape.top_k, limit) for path in files]
    found += [account(path, shape.num_experts) for path in traces if path not in files]
    for its in found:
        if its.worth_saying:
            print(f"rampwrap: {its}", file=sys.stderr)
    return {"recorded": [its.to_dict() for its in found]} if found else {}
