"""Which configs of our kernels the measured tables need, and what the lists lack of them; no GPU.

    python benchmarks/config_lists.py

For each table: its configs, those within 1 % of the best of the table for at least one of its workloads (*near*), how many
configs the kernel lists today, how many near ones it does not list, and the most time that a workload would lose if only
listed configs could be chosen. The same for the ten layers of the regions' run, whose few configs were drawn by rule, many of
them never listed. Exits 1 where a list loses more than 1 % in a table.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from rampwrap.kernel.protocol import MEMBER, Config, config_key
from rampwrap.kernels.cute import configs as cute
from rampwrap.kernels.triton.moe import configs as triton
from rampwrap.measure.timings import Timings

RESULTS = pathlib.Path(__file__).parent / "results"
NEAR = 1.01


def listed(kernel: str, dtype: str) -> set[str]:
    """Keys of the configs that a kernel lists; the CuTe kernels' with both orders of tiles."""
    if kernel == "triton_fused_moe":
        return {config_key(config) for config in triton.CONFIGS[dtype]}
    compiled = (config for form in cute.FORMS for config in cute.all_configs(form, dtype))
    return {config_key(config.keys(group_m)) for config in compiled for group_m in cute.GROUP_MS}


def tables() -> Iterator[tuple[str, str, str, list[str], np.ndarray]]:
    """Name, kernel, dtype, keys of the configs and microseconds [workloads, configs] of everything measured."""
    for path in sorted(RESULTS.glob("*.npz")):
        table = Timings.load(path)
        members = [config.get(MEMBER, table.kernel) for config in table.configs]
        for kernel in ("triton_fused_moe", "cute_moe"):
            columns = [index for index, member in enumerate(members) if member == kernel]
            if columns:
                keys = [key_of(table.configs[index]) for index in columns]
                yield path.stem, kernel, table.shape.dtype, keys, table.us[:, columns]
    regions = json.loads((RESULTS / "h200-regions.json").read_text(encoding="utf-8"))
    for model, tokens, timed in regions["times"]:
        keys = [key_of(config) for config, _, _ in timed]
        yield f"regions {model} {tokens}", "triton_fused_moe", "bf16", keys, np.array([[us for _, us, _ in timed]])


def key_of(config: Config) -> str:
    """Its key, without what says nothing: the kernel of a portfolio's config, and a split into one part."""
    return config_key({key: value for key, value in config.items() if key != MEMBER and (key, value) != ("split_k", 1)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lost, needed, ran = False, {}, {}
    print(f"{'table':46s} {'kernel':16s} dtype workloads configs  near  listed  near, not listed  most time lost")
    for name, kernel, dtype, keys, us in tables():
        have = listed(kernel, dtype)
        near = (us <= NEAR * np.nanmin(us, axis=1, keepdims=True)).any(axis=0)
        mine = np.array([key in have for key in keys])
        needed.setdefault((kernel, dtype), set()).update(key for key, its in zip(keys, near, strict=True) if its)
        ran.setdefault((kernel, dtype), set()).update(keys)
        lose = np.nan
        if mine.any():
            lose = float(np.nanmax(np.nanmin(us[:, mine], axis=1) / np.nanmin(us, axis=1))) - 1
        # The regions' configs were drawn by rule, and the best of them need not be near the best of the list.
        lost |= lose > NEAR - 1 and not name.startswith("regions")
        shown = f"{len(us):9d} {len(keys):7d} {near.sum():5d} {mine.sum():7d} {(near & ~mine).sum():17d}"
        print(f"{name:46s} {kernel:16s} {dtype:5s} {shown} {lose:14.2%}")
    for (kernel, dtype), near_anywhere in needed.items():
        have = listed(kernel, dtype)
        seen = f"{len(ran[kernel, dtype])} measured, {len(near_anywhere)} near somewhere"
        print(f"{kernel} {dtype}: {seen}; {len(have)} listed, {len(have & near_anywhere)} of them near somewhere")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
