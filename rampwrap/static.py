"""`StaticTable`: token count -> config, the way every engine chooses today, and the strongest baselines of that kind."""

import bisect
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import ConfigError, InputError, TableError
from rampwrap.grid import IntArray
from rampwrap.kernel import MEMBER, Config, Kernel, config_key, format_config, index_by_key
from rampwrap.timings import Timings

# How vLLM and SGLang spell what other kernels call block_m, ...
_SPELLING = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
}


@attrs.frozen
class StaticTable:
    """One config per profiled token count; at run time the nearest token count serves, the lower one on a tie.

    Nearest is by absolute difference, as in the engines' own lookup.
    """

    source: str
    "Where it comes from: ``uniform``, ``averaged``, a file, ``default``."
    token_counts: tuple[int, ...]
    "Ascending."
    indices: tuple[int, ...]
    "Index of the config for each token count."

    def __attrs_post_init__(self) -> None:
        counts = self.token_counts
        if not counts or len(counts) != len(self.indices) or list(counts) != sorted(set(counts)):
            raise InputError(
                f"a static table with token counts {counts} is not usable; give each once, ascending, with one config."
            )

    def index(self, num_tokens: int) -> int:
        """The config for a batch of `num_tokens` tokens."""
        counts = self.token_counts
        right = bisect.bisect_left(counts, num_tokens)
        if right == len(counts):
            return self.indices[-1]
        if right and num_tokens - counts[right - 1] <= counts[right] - num_tokens:
            right -= 1
        return self.indices[right]

    def span(self, position: int) -> tuple[int, int]:
        """The first and last token count that entry `position` serves."""
        counts = self.token_counts
        low = 0 if position == 0 else (counts[position - 1] + counts[position]) // 2 + 1
        last = position == len(counts) - 1
        return low, 1 << 62 if last else (counts[position] + counts[position + 1]) // 2

    def used(self, low: int, high: int) -> set[int]:
        """Every config that serves some token count from `low` to `high`."""
        inside = {index for tokens, index in zip(self.token_counts, self.indices, strict=True) if low <= tokens <= high}
        return inside | {self.index(low), self.index(high)}

    def renumber(self, where: Mapping[int, int]) -> "StaticTable":
        """The same table after configs moved to other indices."""
        return attrs.evolve(self, indices=tuple(where[index] for index in self.indices))


def tuned(timings: Timings, rows: IntArray, source: str) -> StaticTable:
    """The config with the least mean time over `rows`, for each token count among them.

    A config that did not run on every row of a token count is passed over where another did.
    """
    token_counts, indices = [], []
    for tokens in np.unique(timings.num_tokens[rows]):
        us = timings.us[rows[timings.num_tokens[rows] == tokens]]
        mean = us.mean(axis=0)
        if np.isnan(mean).all():
            # No config ran on every row: each is judged by the rows it has, relative to the best of the row.
            with np.errstate(invalid="ignore"):
                share = us / np.nanmin(
                    np.where(np.isnan(us).all(axis=1, keepdims=True), 1.0, us), axis=1, keepdims=True
                )
            seen = ~np.isnan(share)
            if not seen.any():
                continue
            mean = np.where(
                seen.any(axis=0), np.where(seen, share, 0.0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1), np.nan
            )
        token_counts.append(int(tokens))
        indices.append(int(np.nanargmin(mean)))
    if not token_counts:
        raise TableError(f"no config ran on the {source} workloads; profile them again.")
    return StaticTable(source, tuple(token_counts), tuple(indices))


def tuned_uniform(timings: Timings, rows: IntArray) -> StaticTable:
    """Tuned per token count under uniform routing: what the engines' tuning scripts produce.

    Raises:
        TableError: no row of `rows` was measured under uniform routing.
    """
    uniform = rows[timings.is_uniform[rows]]
    if not len(uniform):
        raise TableError(
            "the table has no 'uniform' workloads to tune a static table on; profile with --routing uniform too."
        )
    return tuned(timings, uniform, "uniform")


def tuned_averaged(timings: Timings, rows: IntArray) -> StaticTable:
    """Tuned per token count on the mean over all profiled skews: the best that a token count alone can do."""
    return tuned(timings, rows, "averaged")


def static_table(timings: Timings, source: str) -> StaticTable:
    """The baseline that a user names, tuned on all workloads of a table.

    Args:
        timings: the workloads to tune on.
        source: ``uniform`` (``averaged`` where the table has no uniform rows), ``averaged``, or the path of an
            engine's tuned file.
    """
    rows = np.arange(len(timings.us))
    if source == "uniform" and timings.is_uniform.any():
        return tuned_uniform(timings, rows)
    return tuned_averaged(timings, rows) if source in ("uniform", "averaged") else read_static(source, timings.configs)


def default_table(kernel: Kernel) -> StaticTable:
    """What the kernel runs when nobody chooses: its `default_config(num_tokens)`, its first config where it has none."""
    default = getattr(kernel, "default_config", None)
    if default is None:
        return StaticTable("default", (1,), (0,))
    where = index_by_key(kernel.configs)
    tokens = tuple(2**power for power in range(17))
    try:
        return StaticTable("default", tokens, tuple(where[config_key(default(count))] for count in tokens))
    except KeyError as error:
        raise ConfigError(
            f"kernel {kernel.name!r} has the default config {error} outside its configs; add it."
        ) from None


def _spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    return {_SPELLING.get(key, key): value for key, value in config.items()}


def read_static(path: str | os.PathLike[str], configs: Sequence[Config]) -> StaticTable:
    """Reads an engine's tuned file: ``{"64": {"BLOCK_SIZE_M": 16, ...}}`` of vLLM or SGLang, or Alpha-MoE's.

    Keys that a kernel's configs do not have are ignored, so that a file of a newer engine still serves; a
    token count whose config the kernel does not have is left out.

    Raises:
        InputError: the file cannot be read or names none of the kernel's configs.
    """
    try:
        raw = json.loads(pathlib.Path(path).read_text())
        entries = {int(key): _spelled(value) for key, value in raw.items() if str(key).isdigit()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{os.fspath(path)} is not a tuned config file ({error}); give JSON of the form {{'64': {{...}}}}."
        ) from error
    names = {name for config in configs for name in _spelled(config)}
    where = index_by_key([_spelled(config) for config in configs])
    found = {
        tokens: where[key]
        for tokens, config in sorted(entries.items())
        if (key := config_key({name: value for name, value in config.items() if name in names})) in where
    }
    if not found:
        example = format_config(next(iter(entries.values()), {}))
        hint = f"add a key {MEMBER!r} to each entry" if all(MEMBER in config for config in configs) else "add them"
        raise InputError(
            f"{os.fspath(path)} names none of the kernel's {len(configs)} configs (it has {example}); {hint}."
        )
    missing = len(entries) - len(found)
    source = pathlib.Path(path).name + (f" ({missing} of {len(entries)} entries unknown)" if missing else "")
    return StaticTable(source, tuple(found), tuple(found.values()))


def write_static(table: StaticTable, configs: Sequence[Config], *, spelling: str = "vllm") -> str:
    """The table as text of the engines' JSON file, keys spelled as vLLM does where it has them."""
    back = {short: long for long, short in _SPELLING.items()} if spelling == "vllm" else {}
    entries = {
        str(tokens): {back.get(key, key): value for key, value in configs[index].items()}
        for tokens, index in zip(table.token_counts, table.indices, strict=True)
    }
    return json.dumps(entries, indent=4) + "\n"
