"""Plans of one layer against each other: what each would put into a CUDA graph, timed on the same workloads in one run.

    python benchmarks/compare_plans.py FIRST.plan.json SECOND.plan.json --out results/h200-plans-olmoe.npz

For every token count each plan names the config of its static table and the one that it expects to be best over skews.
Plans may be of different kernels; all run as members of one portfolio. Needs a GPU, and the kernels' libraries.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.names import joint_name, members_of
from rampwrap.kernel.protocol import MEMBER, Config, config_key
from rampwrap.measure.full import profile
from rampwrap.plan.plan import Plan
from rampwrap.policy.graph_lists import serving
from rampwrap.routing.workloads import Routing, workload_grid

TOKENS = [2, 4, 8, 24, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048]
ROUTINGS = ("uniform", "dirichlet:0.1", "dirichlet:0.3", "lognormal:1.05", "zipf:1.0")
SEED = 77
"Draws that no table was measured with."


def picks(plan: Plan, tokens: int) -> dict[str, Config]:
    """The plan's two configs for a token count, as a portfolio's."""
    indices = {
        "static": plan.static.index(tokens),
        "graph": plan.in_graph[serving(plan.in_graph, tokens)].static,
    }
    own = {} if members_of(plan.kernel) else {MEMBER: plan.kernel}
    return {what: {**own, **plan.configs[index]} for what, index in indices.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plans", nargs="+", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    plans = {path.name: Plan.load(path) for path in arguments.plans}
    names = dict.fromkeys(name for plan in plans.values() for name in members_of(plan.kernel) or (plan.kernel,))
    shape = next(iter(plans.values())).shape
    kernel = make_kernel(joint_name(tuple(names)), shape)
    chosen = {
        (name, tokens, what): config
        for name, plan in plans.items()
        for tokens in TOKENS
        for what, config in picks(plan, tokens).items()
    }
    configs: dict[str, Any] = {config_key(config): config for config in chosen.values()}
    workloads = workload_grid(TOKENS, [Routing.parse(text) for text in ROUTINGS], "eval", SEED)
    timings = profile(
        kernel, shape, workloads, configs=list(configs.values()), rounds=arguments.rounds, out=arguments.out
    )
    place = {key: index for index, key in enumerate(configs)}
    columns = [(name, what) for name in plans for what in ("static", "graph")]
    means = np.array(
        [
            [
                np.log(timings.us[timings.num_tokens == tokens, place[config_key(chosen[name, tokens, what])]]).mean()
                for name, what in columns
            ]
            for tokens in TOKENS
        ]
    )
    print("geometric means over routings, us: " + ", ".join(f"{name} {what}" for name, what in columns))
    for tokens, row in zip(TOKENS, np.exp(means), strict=True):
        print(f"{tokens:6d}" + "".join(f"{us:10.1f}" for us in row))
    print("over the first" + "".join(f"{ratio:9.3f}x" for ratio in np.exp((means[:, :1] - means).mean(axis=0))))


if __name__ == "__main__":
    main()
