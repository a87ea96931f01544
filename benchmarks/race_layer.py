"""What `race.py` does at a token count of one layer: the survey, the race, and replays with routing that changes."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from race_check import Launches
from race_field import Batch, Field

from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import MEMBER, Config, Kernel, config_key, refusal
from rampwrap.measure.timer import Measurement, Timed

NEAR = 1.10
"A config that the survey finds so much slower than the best of its kernel is no finalist."


def may_win(config: Config, block_m: int, counts: npt.NDArray[np.int64]) -> bool:
    """Whether a config may be the best for a histogram; `race.py` says what for."""
    active = counts[counts > 0]
    mean, most, form = float(active.mean()), int(active.max()), config.get("form")
    if config.get("group_m", 1) != 1 or (form == "one" and mean > 16) or (form == "prefill" and mean < 4):
        return False
    return form in ("prefill", "ragged") or mean / 4 <= block_m <= max(24, 2 * most)


def forms(kernel: Kernel) -> list[list[Config]]:
    """The configs of a kernel, those of its ragged form apart, so that its best is timed beside the best of the others."""
    apart = ([its for its in kernel.configs if (its.get("form") == "ragged") is ragged] for ragged in (False, True))
    return [configs for configs in apart if configs]


class Race:
    """The race of a layer's contenders, token count by token count."""

    def __init__(self, field: Field) -> None:
        self.field, self.a, self.kernels, self.wrong = field, field.a, field.kernels, field.wrong
        self.shape, self.timer, self.quick = field.shape, field.timer, field.quick
        self.order = np.random.default_rng(field.a.seed)

    def at(self, tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All routings of a token count: each by itself, and replayed with routing that changes."""
        launches = Launches(self.field, tokens)
        rows: list[dict[str, Any]] = []
        for routing in self.field.routings:
            batch = self.field.batch(tokens, routing, self.a.seed)
            static = rows[0]["static"] if rows and rows[0]["even"] else None
            row = self._row(launches, batch, static)
            if row is not None:
                rows.append(row)
        for row in rows:  # what a later routing has shown to be wrong
            row["cells"] = [
                its for its in row["cells"] if config_key({MEMBER: its["kernel"], **its["config"]}) not in self.wrong
            ]
        rows = [row for row in rows if row["cells"]]
        return rows, self._changing(launches, rows) if rows else []

    def _row(self, launches: Launches, batch: Batch, static: Config | None) -> dict[str, Any] | None:
        variants = launches.variants([batch])
        launches.learn(batch)
        finalists: dict[str, Config] = {}
        for kernel in self.kernels:
            if kernel.name in self.a.as_served:
                chosen = [Portfolio.tagged(kernel, kernel.default_config(batch.workload.num_tokens))]  # type: ignore[attr-defined]
                chosen = [config for config in chosen if launches.right(config)]
            else:
                chosen = [
                    config for its in forms(kernel) for config in self._survey(launches, kernel, its, batch, variants)
                ]
            finalists |= {config_key(config): config for config in chosen}
        first = self.kernels[0]
        default = launches.default
        for config in (default, static):
            if config is not None and launches.right(config):
                finalists.setdefault(config_key(config), config)
        cells = self._time(launches, finalists, variants)
        if not cells:
            return None
        row: dict[str, Any] = {"label": batch.workload.label, "tokens": batch.workload.num_tokens, "even": batch.even}
        row |= {"counts": batch.counts, "ours": first.name, "cells": cells, "default": default}
        mine = [cell for cell in cells if cell["kernel"] == first.name and cell["config"].get("form") != "ragged"]
        if static is None and batch.even and mine:
            best = min(mine, key=lambda cell: float(cell["us"]))["config"]
            static = Portfolio.tagged(first, best)
        return row | {"static": static}

    def _survey(
        self,
        launches: Launches,
        kernel: Kernel,
        configs: Sequence[Config],
        batch: Batch,
        variants: Sequence[dict[str, Any]],
    ) -> list[Config]:
        """The fastest right ones among configs of a kernel for a batch."""
        listed = [config for config in configs if refusal(kernel, config, self.shape) is None]
        likely = [its for its in listed if may_win(its, kernel.grid(its, self.shape).block_m, batch.counts)]
        tagged = [Portfolio.tagged(kernel, config) for config in likely or listed]
        launches.compile([config for config in tagged if config_key(config) not in self.wrong], variants[0])
        took: list[tuple[float, Config]] = []
        try:
            for config in tagged if len(tagged) > 1 else ():
                if config_key(config) not in self.wrong:
                    with launches.blaming(config):
                        took.append((min(self.quick.prepare(launches.calls(config, variants)).sample()), config))
        finally:
            self.quick.release()
        took.sort(key=lambda its: its[0])
        ordered = [config for us, config in took if us <= NEAR * took[0][0]] if took else tagged
        found: list[Config] = []
        for config in ordered:
            if len(found) < self.a.finalists and launches.right(config):
                found.append(config)
        others = {config_key(config): config for config in map(functools.partial(Portfolio.tagged, kernel), listed)}
        for config in found[:2]:
            twin = others.get(config_key({**config, "group_m": 8})) if config.get("group_m") == 1 else None
            if twin is not None and int(batch.counts.max()) > config["block_m"] and launches.right(twin):
                found.append(twin)
        return found

    def _ready(
        self, launches: Launches, configs: dict[str, Config], variants: Sequence[dict[str, Any]]
    ) -> dict[str, Timed]:
        """Those whose launches can be timed; the others are wrong from here on."""
        ready: dict[str, Timed] = {}
        for key, config in configs.items():
            with launches.blaming(config):
                ready[key] = self.timer.prepare(launches.calls(config, variants))
        return ready

    def _time(
        self, launches: Launches, configs: dict[str, Config], variants: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Microseconds and spread of each, sampled in turn."""
        samples: dict[str, list[float]] = {}
        try:
            ready = self._ready(launches, configs, variants)
            for _ in range(self.a.rounds):
                for key in self.order.permutation(np.array(list(ready))).tolist():
                    with launches.blaming(configs[key]):
                        samples.setdefault(key, []).extend(ready[key].sample())
        finally:
            self.timer.release()
        return [_cell(configs[key], found) for key, found in samples.items() if key not in self.wrong]

    def _changing(self, launches: Launches, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Winners, default and static config in one graph each, ids of another routing before every replay."""
        tokens = int(rows[0]["tokens"])
        kept: dict[str, Config] = {}
        for row in rows:
            best: dict[tuple[str, bool], dict[str, Any]] = {}
            for cell in sorted(row["cells"], key=lambda its: float(its["us"])):
                best.setdefault((cell["kernel"], cell["config"].get("form") == "ragged"), cell)
            picked = [{MEMBER: cell["kernel"], **cell["config"]} for cell in best.values()]
            picked += [row[name] for name in ("default", "static") if row[name] is not None]
            kept |= {config_key(config): config for config in picked if config_key(config) not in self.wrong}
        seeds = [self.a.seed + 1 + draw for draw in range(self.a.draws)]
        batches = [self.field.batch(tokens, routing, seed) for seed in seeds for routing in self.field.routings]
        variants = launches.variants(batches)
        turns = [[self.field.turned(its, turn, len(variants)) for turn in range(len(variants))] for its in batches]
        samples: dict[tuple[int, str], list[float]] = {}
        try:
            ready = self._ready(launches, kept, variants)
            for _ in range(self.a.rounds):
                for number, ids in enumerate(turns):
                    for key, timed in ready.items():
                        samples.setdefault((number, key), []).extend(replayed(timed, variants, ids))
        finally:
            self.timer.release()
        found = []
        for number, batch in enumerate(batches):
            cells = [_cell(config, samples[number, key]) for key, config in kept.items() if (number, key) in samples]
            row = {
                "label": f"{batch.workload.label} {batch.workload.seed}",
                "tokens": tokens,
                "even": batch.even,
                "cells": cells,
            }
            found.append(row | {"counts": batch.counts} | {key: rows[0][key] for key in ("ours", "default", "static")})
        return found


def replayed(timed: Timed, variants: Sequence[dict[str, Any]], ids: Sequence[torch.Tensor]) -> list[float]:
    """Microseconds of a launch in one replay after the ids were overwritten; the GPU waits until the host has asked for all of it."""
    for given, its in zip(variants, ids, strict=True):
        given["topk_ids"].copy_(its)
    graph = getattr(timed, "graph", None)
    if graph is None:
        return timed.sample()[:1]
    torch.cuda._sleep(200_000)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return [start.elapsed_time(end) * 1e3 / timed.repeats]  # type: ignore[attr-defined]


def _own(config: Config | None) -> dict[str, Any] | None:
    """A member's config without its name."""
    return None if config is None else {key: value for key, value in config.items() if key != MEMBER}


def _cell(config: Config, samples: Sequence[float]) -> dict[str, Any]:
    found = Measurement.of(samples)
    return {"kernel": config[MEMBER], "config": _own(config), "us": found.us, "spread": found.spread}
