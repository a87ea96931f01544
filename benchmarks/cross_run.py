"""Regret without the winner's curse: fit and oracle from one run of a table, judged by the times of another run.

    python benchmarks/cross_run.py RUN1.npz RUN2.npz

The oracle of a single noisy table is the luckiest of many near-equal configs, so regret against it has a floor
that no policy can get below: what the oracle of one run itself loses in the other. Both tables must hold the same
workloads. Prints, both ways round, mean and p95 regret, captured headroom and the share of workloads more than
1 % slower than the uniform-tuned static table, and the floor by token count.
"""

import argparse

import numpy as np

from rampwrap.compare import evaluate as compare
from rampwrap.measure.timings import Timings
from rampwrap.model.fit import fit
from rampwrap.policy.policies import Static
from rampwrap.policy.static import static_table


def judge(fitted: Timings, judged: Timings) -> None:
    """Everything is learnt from `fitted`; only the judging times come from `judged`."""
    train, held_out = fitted.take(fitted.rows("train")), fitted.rows("eval")
    static = static_table(train, "uniform")
    model = fit(train)
    policies = {
        "static-uniform": Static(train.configs, static),
        "static-averaged": Static(train.configs, static_table(train, "averaged")),
        "wave": compare.routing_aware(train, model, static),
    }
    result = compare.evaluate(judged.take(held_out), policies)
    rows = np.arange(len(held_out))
    oracle = judged.us[held_out][rows, np.nanargmin(fitted.us[held_out], axis=1)]
    base = result.us("static-uniform")
    for name in policies:
        us = result.us(name)
        regret = us / oracle - 1
        print(
            f"  {name:<16} regret {regret.mean():6.2%} p95 {np.quantile(regret, 0.95):6.2%} "
            f"captured {(base - us).sum() / (base - oracle).sum():5.0%} slower {(us > 1.01 * base).mean():5.1%}"
        )


def main() -> None:
    """Both ways round, then the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs=2)
    one, two = (Timings.load(path) for path in parser.parse_args().tables)
    if one.label != two.label or not np.array_equal(one.counts, two.counts):
        raise SystemExit("the tables hold different workloads; profile both with the same command")
    for names, fitted, judged in (("run 1, judged by run 2", one, two), ("run 2, judged by run 1", two, one)):
        print(f"fit and oracle of {names}:")
        judge(fitted, judged)
    print("what the oracle of run 1 loses in run 2, by tokens:")
    rows = np.arange(len(one.us))
    lost = two.us[rows, np.nanargmin(one.us, axis=1)] / np.nanmin(two.us, axis=1) - 1
    for tokens in np.unique(one.num_tokens):
        print(f"  {tokens:>6} {lost[one.num_tokens == tokens].mean():6.2%}")


if __name__ == "__main__":
    main()
