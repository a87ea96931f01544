"""What `make demo` runs: the A/B of routing-aware dispatch against static tables.

Without a GPU it replays a table that was measured on a Hopper GPU and ships with the project, through the same
Dispatcher that would run there, and runs the real Triton kernel on a small layer in Triton's interpreter against
a float64 reference. With a GPU it does the job live: profiles for about a minute, fits, and runs the A/B.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton decorates a kernel

from rampwrap import SHAPES, Dispatcher, MoEShape, Routing, Timings, Workload, format_config, make_plan
from rampwrap.adapters.triton_fused_moe import TritonFusedMoE

HERE = pathlib.Path(__file__).parent
TABLE = pathlib.Path(os.path.relpath(HERE)) / "data" / "h200-triton_fused_moe-olmoe-bf16.npz"
OUT = pathlib.Path("build/demo")


def rampwrap(*arguments: str) -> None:
    """A command as a user would type it, and what it prints."""
    print("$ rampwrap", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "rampwrap", *arguments], check=True)


def replay() -> None:
    """The A/B from the shipped table, and one decision explained."""
    timings = Timings.load(TABLE)
    when = timings.notes.get("date", "")
    print(f"Replaying {TABLE.name}: measured on {timings.device.name} {when}\n")
    rampwrap("replay", str(TABLE), "--plot", str(OUT / "ab.png"))
    plan = make_plan(timings)
    plan.save(OUT / "plan.json")
    # The same Dispatcher as on a GPU; only `select`, since there is nothing to launch on.
    moe = Dispatcher(TritonFusedMoE(timings.shape), plan.policy(), shape=timings.shape)
    print("\nThe same 96 tokens, routed in three ways:")
    for name in ("uniform", "dirichlet:0.1", "hot:2"):
        choice = moe.select(Workload(96, Routing.parse(name)).topk_ids(timings.shape.num_experts, timings.shape.top_k))
        print(f"  {name:<14} {choice}")


def small_layer() -> None:
    """The real kernel, dispatched, against float64."""
    shape = MoEShape(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)
    kernel = TritonFusedMoE(shape)
    routing = Workload(24, Routing.parse("zipf:1.2")).topk_ids(shape.num_experts, shape.top_k)
    inputs = kernel.inputs(shape, torch.from_numpy(routing))
    runnable = [config for config in kernel.configs if kernel.supports(config, shape) is None]
    moe = Dispatcher(kernel, shape=shape)
    print("\nThe Triton kernel on a small layer, in Triton's interpreter, against float64:")
    expected = kernel.reference(shape, inputs).double()
    for config in runnable[:: max(1, len(runnable) // 3)][:3]:
        got = moe.pin(config)(**inputs).double()
        print(f"  relative error {float((got - expected).norm() / expected.norm()):.4f}  {format_config(config)}")


def live() -> None:
    """Profile for about a minute, fit, A/B on held-out routings."""
    table, plan = str(OUT / "olmoe.npz"), str(OUT / "plan.json")
    print(f"{torch.cuda.get_device_name()}: {SHAPES['olmoe']}\n")
    rampwrap("profile", "--model", "olmoe", "--budget", "60s", "--out", table)
    rampwrap("fit", table, "--out", plan)
    rampwrap("compare", plan, "--batch-size", "24", "96", "192", "384", "768", "--plot", str(OUT / "ab.png"))


def main() -> None:
    """Live with a GPU, replayed without."""
    OUT.mkdir(parents=True, exist_ok=True)
    np.set_printoptions(precision=3)
    if GPU:
        live()
    else:
        replay()
        small_layer()
    print(f"\nPicture and plan: {OUT}")


if __name__ == "__main__":
    os.environ.setdefault("MPLCONFIGDIR", tempfile.mkdtemp())
    main()
