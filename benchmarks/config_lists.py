"""Which configs of our kernels the measured tables need, and what the lists lack of them; no GPU.

    python benchmarks/config_lists.py

For each table: its configs, those within 1 % of the best of the table for at least one of its workloads (*near*), how many
configs the kernel lists today, how many near ones it does not list, and by token counts the time that is lost if only listed
configs can be chosen: geometric mean (worst). The same for the ten layers of the regions' run, whose few configs were drawn by rule, many of
them never listed, and for the race of five layers, `race.py`: of each workload it kept the best config but the ragged, the default,
the static one and the best ragged one, so what is lost there is at most this. No table holds the ragged form, so without it more is lost than with it.
Then for each form and tile of the CuTe kernels: what is listed, at how many workloads a config of it is the best that is not, and
the most that is lost there. Exits 1 where a list loses more than 0.3 % in a mean or 2 % at a workload.
"""

import argparse
import json
import pathlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import attrs
import numpy as np
from common import geometric_mean

from rampwrap.kernel.protocol import MEMBER, Config, config_key
from rampwrap.kernels.cute import configs as cute
from rampwrap.kernels.triton.moe import configs as triton
from rampwrap.measure.timings import Timings

RESULTS = pathlib.Path(__file__).parent / "results"
NEAR = 1.01
MEAN, WORST = 1.003, 1.02
"What lists may lose."
SPANS = ((1, 1), (2, 4), (5, 96), (97, 384), (385, 1024), (1025, 1 << 62))


@attrs.frozen
class Table:
    """Microseconds of configs, by their keys, for workloads of some tokens."""

    name: str
    kernel: str
    dtype: str
    keys: list[str]
    num_tokens: np.ndarray
    us: np.ndarray
    "[workloads, configs], NaN where one did not run."

    def lost(self, have: set[str]) -> np.ndarray:
        """Of each workload, the time of the best config among some over the best of all; infinite where none ran."""
        mine = np.array([key in have for key in self.keys])
        reached = np.where(np.isnan(self.us), np.inf, self.us)[:, mine].min(axis=1, initial=np.inf)
        return np.asarray(reached / np.nanmin(self.us, axis=1))


def listed(kernel: str, dtype: str) -> set[str]:
    """Keys of the configs that a kernel lists; the CuTe kernels' with both orders of tiles."""
    if kernel == "triton_fused_moe":
        return {config_key(config) for config in triton.CONFIGS[dtype]}
    compiled = (config for form in cute.FORMS for config in cute.all_configs(form, dtype))
    return {config_key(config.keys(group_m)) for config in compiled for group_m in cute.GROUP_MS}


def tables() -> Iterator[Table]:
    """Everything measured."""
    for path in sorted(RESULTS.glob("*.npz")):
        table = Timings.load(path)
        members = [config.get(MEMBER, table.kernel) for config in table.configs]
        for kernel in ("triton_fused_moe", "cute_moe"):
            columns = [index for index, member in enumerate(members) if member == kernel]
            us = table.us[:, columns]
            if columns:
                ran, keys = np.isfinite(us).any(axis=1), [key_of(table.configs[index]) for index in columns]
                yield Table(path.stem, kernel, table.shape.dtype, keys, table.num_tokens[ran], us[ran])
    regions = json.loads((RESULTS / "h200-regions.json").read_text(encoding="utf-8"))
    for model, tokens, timed in regions["times"]:
        keys, us = [key_of(config) for config, _, _ in timed], np.array([[us for _, us, _ in timed]])
        yield Table(f"regions {model} {tokens}", "triton_fused_moe", "bf16", keys, np.array([tokens]), us)
    races = json.loads((RESULTS / "h100-race-issue16.json").read_text(encoding="utf-8"))["races"]
    for layer, race in sorted(races.items()):
        ours = {index: config for index, config in enumerate(race["configs"]) if config[MEMBER].startswith("cute_")}
        place = {index: column for column, index in enumerate(ours)}
        for kind in ("rows", "changing"):
            us = np.full((len(race[kind]), len(ours)), np.nan)
            for row, its in zip(us, race[kind], strict=True):
                for index, found, _ in its["best"].values():
                    if index in ours:
                        row[place[index]] = found
            tokens = np.array([row["tokens"] for row in race[kind]])
            keys = [key_of(config) for config in ours.values()]
            yield Table(f"race {layer}, {kind}", "cute_moe", layer.partition(":")[2], keys, tokens, us)


def key_of(config: Config) -> str:
    """Its key, without what says nothing: the kernel of a portfolio's config, and a split into one part."""
    return config_key({key: value for key, value in config.items() if key != MEMBER and (key, value) != ("split_k", 1)})


def tile_of(key: str) -> str:
    """Form, block_n, warp_n and stages of a CuTe config's key."""
    config = json.loads(key)
    return " ".join(f"{config[name]:>{width}}" for name, width in zip(("form", "block_n", "warp_n", "stages"), (7, 3, 1, 2), strict=True))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    failed, needed, ran = False, defaultdict(set), defaultdict(set)
    best_of, most_of = defaultdict(Counter), defaultdict(lambda: defaultdict(float))
    heads = "".join(f"{f'{low}-{high}' if high < 1 << 62 else f'from {low}':>16s}" for low, high in SPANS)
    print(f"{'table':46s} {'kernel':16s} dtype workloads configs  near  listed  near, not listed{heads}")
    for table in tables():
        kind, have = (table.kernel, table.dtype), listed(table.kernel, table.dtype)
        over, lost = table.us / np.nanmin(table.us, axis=1, keepdims=True), table.lost(have)
        near = (over <= NEAR).any(axis=0)
        mine = np.array([key in have for key in table.keys])
        needed[kind].update(key for key, its in zip(table.keys, near, strict=True) if its)
        ran[kind].update(table.keys)
        for column, its in zip(np.nanargmin(table.us, axis=1), lost, strict=True):
            if its > 1:
                tile = table.keys[column]
                best_of[kind][tile] += 1
                most_of[kind][tile] = max(most_of[kind][tile], its - 1)
        shown = f"{len(lost):9d} {len(mine):7d} {near.sum():5d} {mine.sum():7d} {(near & ~mine).sum():17d}"
        for low, high in SPANS:
            its = lost[(table.num_tokens >= low) & (table.num_tokens <= high)]
            text = f"{geometric_mean(its) - 1:.2%} ({its.max() - 1:.2%})" if len(its) else ""
            # The regions' configs were drawn by rule, and the best of them need not be near the best of the list.
            if len(its) and not table.name.startswith("regions"):
                failed |= bool(geometric_mean(its) > MEAN or its.max() > WORST)
            shown += f"{text:>16s}"
        print(f"{table.name:46s} {table.kernel:16s} {table.dtype:5s} {shown}")
    for kind, near_anywhere in needed.items():
        have = listed(*kind)
        seen = f"{len(ran[kind])} measured, {len(near_anywhere)} near somewhere"
        print(f"{kind[0]} {kind[1]}: {seen}; {len(have)} listed, {len(have & near_anywhere)} of them near somewhere")
    for dtype in cute.DTYPES:
        print_tiles(dtype, best_of["cute_moe", dtype], most_of["cute_moe", dtype])
    print(f"{len(cute.all_variants())} compiled CuTe kernels")
    return int(failed)


def print_tiles(dtype: str, best: Counter[str], most: dict[str, float]) -> None:
    """Of each form and tile: block_m listed; unlisted configs that are the best somewhere, and the most lost without them."""
    kept, gone, lost = defaultdict(set), defaultdict(Counter), defaultdict(float)
    for key in listed("cute_moe", dtype):
        kept[tile_of(key)].add(json.loads(key)["block_m"])
    for key, workloads in best.items():
        gone[tile_of(key)][json.loads(key)["block_m"]] += workloads
        lost[tile_of(key)] = max(lost[tile_of(key)], most[key])
    print(
        f"{dtype}: form, block_n, warp_n, stages: block_m listed | best of all, not listed: block_m x workloads, at most lost"
    )
    for tile in sorted({*kept, *gone}):
        these = ", ".join(f"{block_m} x {its}" for block_m, its in sorted(gone[tile].items()))
        print(
            f"  {tile}: {' '.join(map(str, sorted(kept[tile]))) or 'none'} | {these}{f', {lost[tile]:.2%}' if these else ''}"
        )


if __name__ == "__main__":
    sys.exit(main())
