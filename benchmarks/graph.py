"""What it costs to choose inside a CUDA graph: `rampwrap.policy.graph_lists.COSTS`, measured on the GPU at hand.

    python benchmarks/graph.py --plan PLAN.json --out OUT.json

align   one launch that aligns, against one that also chooses among four configs of the plan
layer   a layer that chooses among two to four configs of the plan, against the same layer with the config that it chooses

All are replayed in CUDA graphs, in turn, weights not in L2. The last line is the median over token counts, to be given to
`rampwrap.GraphDispatcher` as `costs`. Without a GPU the clock of the CPU times Triton's interpreter, which only shows that it runs.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from common import interleaved, stamp

from rampwrap.dispatch.graph import GraphDispatcher, chooses_in_graph
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import device_of
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernels.triton.align.host import align_tokens, allocate_blocks
from rampwrap.kernels.triton.select.host import Candidates, align_and_select, allocate_selected
from rampwrap.measure.graph_timer import GraphTimer, default_timer
from rampwrap.measure.timer import HostTimer
from rampwrap.model.in_graph import MAX_IN_GRAPH, pack
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import Shortlist
from rampwrap.routing.workloads import Routing, Workload

ALIGN_EXPERTS = (64, 256)
ALIGN_TOKENS = (1, 64, 256, 512, 4096)
LAYER_TOKENS = (8, 32, 64, 128, 256, 512)
ROUTING = Routing.parse("lognormal:1.0")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def spread_heights(plan: Plan) -> tuple[int, ...]:
    """Four configs of the plan, of different block heights where it has them."""
    order = sorted(range(len(plan.configs)), key=lambda index: (plan.grids[index].block_m, index))
    return tuple(dict.fromkeys(order[len(order) * place // MAX_IN_GRAPH] for place in range(MAX_IN_GRAPH)))


def align(plan: Plan, experts: Sequence[int], tokens: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Alignment without and with the choice, top 8, microseconds a launch."""
    timer = GraphTimer(0, 0) if DEVICE == "cuda" else HostTimer()
    tables = Candidates.on(pack(plan.model.take(spread_heights(plan))), DEVICE)
    heights, found = tables.packed.block_ms, []
    for count in experts:
        for num_tokens in tokens:
            ids = torch.from_numpy(Workload(num_tokens, ROUTING).topk_ids(count, 8)).to(DEVICE)
            selected = allocate_selected(num_tokens, 8, count, heights, DEVICE)
            choose = functools.partial(align_and_select, ids, tables, 0, count, selected=selected)
            choose()
            block_m = heights[int(selected.choice)]
            blocks = allocate_blocks(num_tokens, 8, count, block_m, DEVICE)
            alone = functools.partial(align_tokens, ids, block_m, count, blocks=blocks)
            us = interleaved(timer, {"align": [alone], "align + choose": [choose]}, rounds)
            found.append({"experts": count, "tokens": num_tokens, "block_m": block_m, "us": us})
            print(f"  {count:4d} experts {num_tokens:5d} tokens  " + text(us), flush=True)
    return found


def candidates(plan: Plan, num_tokens: int) -> list[int]:
    """The static config and up to three more, those of the plan's bucket first."""
    static = plan.static.index(num_tokens)
    bucket = min(plan.buckets, key=lambda its: abs(its.num_tokens - num_tokens))
    return list(dict.fromkeys([static, *bucket.shortlist, *range(len(plan.configs))]))[:MAX_IN_GRAPH]


def layer(kernel: Kernel, plan: Plan, num_tokens: int, rounds: int) -> dict[str, Any]:
    """One layer with two to four candidates, beside each config that is chosen, alone; microseconds a layer."""
    shape, timer = plan.shape, default_timer(device_of(kernel), plan.shape, simulated=False)
    ids = Workload(num_tokens, ROUTING).topk_ids(shape.num_experts, shape.top_k)
    counts = np.bincount(ids.ravel(), minlength=shape.num_experts).astype(np.int64)
    turns = timer.rotations(shape.weight_bytes * int(np.count_nonzero(counts)) // shape.num_experts)
    turned = [((ids + turn * shape.num_experts // turns) % shape.num_experts).astype(np.int32) for turn in range(turns)]
    first = kernel.inputs(shape, torch.from_numpy(ids).to(DEVICE))  # type: ignore[attr-defined]
    inputs = [first | {"topk_ids": torch.from_numpy(its).to(DEVICE)} for its in turned]
    calls, alone, order = {}, {}, candidates(plan, num_tokens)
    for count in range(2, len(order) + 1):
        few = tuple(sorted(order[:count]))
        chosen = few[plan.model.take(few).choose(counts, few.index(order[0]))]
        alone[count] = f"config {chosen}"
        for name, indices, static in ((f"{count} candidates", few, order[0]), (alone[count], (chosen,), chosen)):
            its = attrs.evolve(plan, in_graph=(Shortlist(0, num_tokens, indices, static, None, None, "measured"),))
            dispatcher = GraphDispatcher(kernel, its, max_tokens=num_tokens, strict=True, where=DEVICE)
            calls[name] = [functools.partial(dispatcher, **given) for given in inputs]
    us = interleaved(timer, calls, rounds)
    added = {count: us[f"{count} candidates"] - us[name] for count, name in alone.items()}
    print(f"  {num_tokens:5d} tokens  " + text(us) + "  added " + text({str(n): its for n, its in added.items()}))
    return {"tokens": num_tokens, "candidates": order, "us": us, "added": added}


def text(us: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in us.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True, type=pathlib.Path, help="of a kernel that can choose in a graph")
    parser.add_argument("--kernel", help="as for `rampwrap profile`; the plan's own where absent")
    parser.add_argument("--only", choices=["align", "layer"])
    parser.add_argument("--experts", nargs="+", type=int, default=list(ALIGN_EXPERTS), help="of align")
    parser.add_argument("--tokens", nargs="+", type=int, help="other token counts than the script's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSON")
    a = parser.parse_args()
    plan = Plan.load(a.plan)
    found: dict[str, Any] = stamp() | {"plan": plan.provenance}
    if a.only != "layer":
        print("align: microseconds a launch, top 8")
        found["align"] = align(plan, a.experts, a.tokens or ALIGN_TOKENS, a.rounds)
    if a.only != "align":
        kernel = make_kernel(a.kernel or plan.kernel, plan.shape)
        if not chooses_in_graph(kernel):
            parser.error(
                f"kernel {kernel.name!r} cannot choose in a graph; give a plan of one that can, or --only align."
            )
        print("layer: microseconds")
        found["layer"] = rows = [layer(kernel, plan, tokens, a.rounds) for tokens in a.tokens or LAYER_TOKENS]
        numbers = sorted({count for row in rows for count in row["added"]})
        costs = {n: max(0.0, statistics.median(row["added"][n] for row in rows if n in row["added"])) for n in numbers}
        found["costs"] = {1: 0.0} | costs
        print("costs = {1: 0.0, " + ", ".join(f"{n}: {us:.1f}" for n, us in costs.items()) + "}")
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
