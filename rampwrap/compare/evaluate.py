"""Compare: policies over workloads, judged by measured times. The same code judges a live A/B and a replayed table."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap import schema
from rampwrap.compare.oracle import Oracle
from rampwrap.errors import InputError, TableError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.measure.timings import Timings
from rampwrap.model.base import CostModel
from rampwrap.model.fit import fit
from rampwrap.policy.policies import Bucket, Policy, Static, WaveCost
from rampwrap.policy.static import FileNotes, StaticTable, static_table
from rampwrap.schema import dump

STATIC_UNIFORM, STATIC_AVERAGED, ORACLE = "static-uniform", "static-averaged", "oracle"
# A workload counts as slower than static from here on: repeated measurements agree within 0.2-0.8 %.
SLOWER_BY = 0.01


@attrs.frozen
class Summary:
    """One policy over all workloads; everything but microseconds is a fraction."""

    policy: str
    mean_us: float
    speedup: float
    "Geometric mean over workloads of baseline time / this policy's time."
    regret_mean: float
    "Regret: time over the measured best config of the same workload, minus 1."
    regret_p95: float
    regret_max: float
    captured_headroom: float
    "(baseline - picked) / (baseline - oracle) in total time; 0 where the baseline leaves nothing to gain."
    slower_than_static_share: float
    "Share of workloads more than 1 % slower than the baseline."


@attrs.frozen(eq=False)
class Comparison:
    """Which config each policy picked on each workload, over a table that says what that costs.

    Attributes:
        timings: the workloads judged, and their measured times.
        picks: per policy, int64 [workloads]: index of the config it picked.
        baseline: the policy that speedups and headroom refer to.
        models: the models behind the fitted policies, by policy.
        fit_seconds: wall-clock time of all fits.
        files: what does not count of the tuned files that policies were read from, by policy.
        notes: what else a reader has to know, in sentences.
    """

    timings: Timings
    picks: dict[str, IntArray]
    baseline: str = STATIC_UNIFORM
    models: dict[str, CostModel] = attrs.field(factory=dict)
    fit_seconds: float = 0.0
    files: dict[str, FileNotes] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()

    def us(self, policy: str) -> FloatArray:
        """Measured time of what the policy picked, float64 [workloads].

        Where the pick did not run, the baseline's serves instead, as in a deployment; where that did not run
        either, the config that is best on the whole among those that ran. `unmeasured` says how often.
        """
        times, rows = self.timings.us, np.arange(len(self.timings.us))
        picked, static = times[rows, self.picks[policy]], times[rows, self.picks[self.baseline]]
        ran = ~np.isnan(times)
        relative = np.where(ran, times / np.nanmin(times, axis=1, keepdims=True), 0.0).sum(axis=0)
        whole = np.where(ran.any(axis=0), relative / np.maximum(ran.sum(axis=0), 1), np.inf)
        serves = np.where(np.isnan(static), times[rows, np.where(ran, whole, np.inf).argmin(axis=1)], static)
        out: FloatArray = np.where(np.isnan(picked), serves, picked)
        return out

    def unmeasured(self, policy: str) -> int:
        """Workloads on which the policy picked a config that did not run."""
        return int(np.isnan(self.timings.us[np.arange(len(self.timings.us)), self.picks[policy]]).sum())

    def spread(self, policy: str) -> FloatArray:
        """Relative spread of those measurements, float64 [workloads]; NaN where not recorded."""
        if self.timings.spread is None:
            return np.full(len(self.timings.us), np.nan)
        picked: FloatArray = self.timings.spread[np.arange(len(self.timings.us)), self.picks[policy]]
        return picked

    def summary(self, policy: str) -> Summary:
        """The policy's figures over all workloads."""
        us, static, oracle = self.us(policy), self.us(self.baseline), np.nanmin(self.timings.us, axis=1)
        regret = us / oracle - 1.0
        headroom = float((static - oracle).sum())
        return Summary(
            policy,
            float(us.mean()),
            float(np.exp(np.log(static / us).mean())),
            float(regret.mean()),
            float(np.quantile(regret, 0.95)),
            float(regret.max()),
            float((static - us).sum()) / headroom if headroom > 0 else 0.0,
            float((us > static * (1.0 + SLOWER_BY)).mean()),
        )

    def summaries(self) -> list[Summary]:
        """All policies, in the order they were given."""
        return [self.summary(policy) for policy in self.picks]

    def by_tokens(self, policy: str) -> list[tuple[int, float, float]]:
        """(tokens, mean us, geometric-mean speedup over the baseline) for each token count."""
        us, static = self.us(policy), self.us(self.baseline)
        return [
            (int(tokens), float(us[rows].mean()), float(np.exp(np.log(static[rows] / us[rows]).mean())))
            for tokens in np.unique(self.timings.num_tokens)
            for rows in [self.timings.num_tokens == tokens]
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON form: ``{"policies": {NAME: {...}}, "fit_seconds", ...}``, all as fractions."""
        policies: dict[str, Any] = {}
        for summary in self.summaries():
            policies[summary.policy] = attrs.asdict(summary, filter=lambda field, _: field.name != "policy")
            if missing := self.unmeasured(summary.policy):
                policies[summary.policy]["unmeasured_picks"] = missing
            if summary.policy in self.models:
                error = prediction_error(self.models[summary.policy], self.timings)
                policies[summary.policy]["mean_absolute_error"] = error
            if summary.policy in self.files:
                policies[summary.policy]["file"] = dump(self.files[summary.policy])
        return {
            "policies": policies,
            "fit_seconds": self.fit_seconds,
            "baseline": self.baseline,
            "notes": list(self.notes),
            "workloads": len(self.timings.us),
            "configs": len(self.timings.configs),
            "kernel": self.timings.kernel,
            "device": self.timings.device.name,
            "shape": schema.dump(self.timings.shape),
        }


def evaluate(timings: Timings, policies: Mapping[str, Policy], baseline: str = STATIC_UNIFORM) -> Comparison:
    """Asks every policy for every workload of a table and judges the answers by its times.

    Args:
        timings: what to judge on; workloads that no config ran are left out.
        policies: by name; their configs must be those of the table, in its order.
        baseline: the policy that speedups refer to.

    Raises:
        TableError: no workload has a measured time.
        InputError: a policy is made for other configs, or the baseline is not among the policies.
    """
    ran = np.flatnonzero(~np.isnan(timings.us).all(axis=1))
    if not len(ran):
        raise TableError("no workload of the table has a measured time; profile it again.")
    if baseline not in policies:
        raise InputError(f"the baseline {baseline!r} is not among the policies {', '.join(policies)}; add it.")
    timings = timings.take(ran)
    picks = {}
    for name, policy in policies.items():
        if len(policy.configs) != len(timings.configs):
            raise InputError(
                f"policy {name!r} has {len(policy.configs)} configs but the table {len(timings.configs)}; fit it to this table."
            )
        chosen = [
            policy.index(counts, int(tokens)) for counts, tokens in zip(timings.counts, timings.num_tokens, strict=True)
        ]
        picks[name] = np.array(chosen, dtype=np.int64)
    files = {name: its.table.file for name, its in policies.items() if isinstance(its, Static) and its.table.file}
    return Comparison(timings, picks, baseline, files=files)


def replay(
    timings: Timings,
    train: str = "train",
    eval_split: str = "eval",
    models: Sequence[str] = ("ramp4", "wave"),
    extra: Mapping[str, StaticTable] | None = None,
) -> Comparison:
    """Fits on one split of a table, dispatches the other, and judges by the measured times; needs no GPU.

    Args:
        timings: a table with both splits.
        train, eval_split: names of the splits.
        models: fitted models to judge. ``ramp4`` is the published form: plain argmin, no guard.
        extra: more static baselines, by name.

    Raises:
        TableError: a split is missing or empty.
        FitError: no model can be fitted to the train split.
    """
    fitted, judged = timings.take(timings.rows(train)), timings.take(timings.rows(eval_split))
    uniform = static_table(fitted, "uniform")
    policies: dict[str, Policy] = {
        STATIC_UNIFORM: Static(timings.configs, uniform),
        STATIC_AVERAGED: Static(timings.configs, static_table(fitted, "averaged")),
    }
    policies |= {name: Static(timings.configs, table) for name, table in (extra or {}).items()}
    started = time.perf_counter()
    fits = {name: fit(fitted, name) for name in models}
    seconds = time.perf_counter() - started
    policies |= {name: routing_aware(fitted, model, uniform) for name, model in fits.items()}
    policies[ORACLE] = Oracle(judged)
    notes = (
        () if fitted.is_uniform.any() else (f"no {train!r} row is uniform: {STATIC_UNIFORM} is tuned on all routings",)
    )
    return attrs.evolve(evaluate(judged, policies), models=fits, fit_seconds=seconds, notes=notes)


def routing_aware(
    timings: Timings, model: CostModel, static: StaticTable, buckets: tuple[Bucket, ...] = (), choosing_us: float = 0.0
) -> WaveCost:
    """The routing-aware policy of a fitted model over the configs of a table."""
    return WaveCost(timings.configs, model, static, timings.grids, timings.device.num_sms, buckets, choosing_us)


def prediction_error(model: CostModel, timings: Timings) -> float:
    """Mean absolute relative error of a model over all measured cells of a table."""
    predicted = model.predict(timings.counts)
    seen = ~np.isnan(timings.us) & np.isfinite(predicted)
    return float(np.abs(predicted[seen] / timings.us[seen] - 1.0).mean()) if seen.any() else float("nan")
