"""Wrap a kernel, profile it, dispatch by the runtime expert histogram. Runs anywhere: the kernel is simulated.

python examples/wrap_in_three_lines.py
"""

import pathlib
import tempfile

from rampwrap import Dispatcher, MoEShape, Routing, Workload, make_plan, profile, workload_grid
from rampwrap.testing import SimKernel


def main() -> None:
    """Profiles for a second, then routes one skewed batch."""
    kernel = SimKernel(MoEShape(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024))
    routings = [Routing.parse(name) for name in ("uniform", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2")]
    plan = pathlib.Path(tempfile.mkdtemp()) / "plan.json"
    make_plan(profile(kernel, kernel.shape, workload_grid([1, 8, 64, 512, 4096], routings), quiet=True)).save(plan)
    topk_ids = Workload(96, Routing.parse("hot:2")).topk_ids(num_experts=64, top_k=8)

    # The three lines:
    moe = Dispatcher(kernel, plan)
    out = moe(topk_ids)
    print(moe.explain(topk_ids))

    print(f"launched; it would have taken {out:.1f} us")


if __name__ == "__main__":
    main()
