"""`StaticTable`: token count -> config, the way every engine chooses today, and the strongest baselines of that kind."""

import bisect
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import InputError, TableError
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.protocol import MEMBER, Config, Kernel, config_key, format_config, index_by_key
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.policy.tuned_file import ENGINE_DEFAULTS, ENGINE_KERNEL, SPELLING, TunedFile


@attrs.frozen
class FileNotes:
    """What of a tuned file does not count where it is judged."""

    path: str
    entries: int
    left_out: tuple[int, ...] = ()
    "Token counts whose config is not among those judged."
    completed: tuple[int, ...] = ()
    "Token counts whose entry lacks num_warps or the like."
    notes: tuple[str, ...] = ()
    "All of it in words."


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
    file: FileNotes | None = attrs.field(default=None, eq=False)
    "What was left out of the file that it was read from."

    def __attrs_post_init__(self) -> None:
        counts = self.token_counts
        if not counts or len(counts) != len(self.indices) or list(counts) != sorted(set(counts)) or counts[0] < 0:
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
    return tuned_averaged(timings, rows) if source in ("uniform", "averaged") else read_measured(source, timings)


def default_table(kernel: Kernel) -> StaticTable:
    """What the kernel runs when nobody chooses: its `default_config(num_tokens)`, its first config where it has none."""
    default = getattr(kernel, "default_config", None)
    if default is None:
        return StaticTable("default", (1,), (0,))
    where = index_by_key(kernel.configs)
    # Half octaves: by powers of two alone the CuTe kernels' default was up to 1.17x behind the best at 9 to 64 tokens, not 1.11x.
    tokens = tuple(sorted({2**power for power in range(17)} | {3 * 2**power for power in range(15)}))
    wanted = [default(count) for count in tokens]
    absent = sum(config_key(config) not in where for config in wanted)
    source = "default" + (f" ({absent} of {len(wanted)} cannot run here, the nearest configs serve)" if absent else "")
    found = [where.get(config_key(its)) for its in wanted]
    indices = [_nearest(its, kernel.configs) if at is None else at for its, at in zip(wanted, found, strict=True)]
    return StaticTable(source, tokens, tuple(indices))


def engine_table(kernel: Kernel) -> StaticTable:
    """What the engine that a kernel comes from would run: its `tuned_file()`, or `default_table` where it has none."""
    path = getattr(kernel, "tuned_file", lambda: None)()
    return default_table(kernel) if path is None else read_static(path, kernel.configs)


def _nearest(wanted: Config, configs: Sequence[Config]) -> int:
    """The config that differs least: numbers in octaves, all else by being another. Engines tune for GPUs with more memory."""

    def number(value: Any) -> float | None:
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        return math.log2(value) if whole else None

    def apart(config: Config) -> float:
        total = 0.0
        for key, value in wanted.items():
            here, there = number(config.get(key)), number(value)
            total += abs(here - there) if here is not None and there is not None else float(config.get(key) != value)
        return total

    return min(range(len(configs)), key=lambda index: (apart(configs[index]), index))


def read_static(
    path: str | os.PathLike[str],
    configs: Sequence[Config],
    *,
    kernel: str = "",
    device: str = "",
    shape: MoEShape | None = None,
    num_tokens: Sequence[int] | IntArray = (),
) -> StaticTable:
    """Reads an engine's tuned file: ``{"64": {"BLOCK_SIZE_M": 16, ...}}`` of vLLM or SGLang, or another kernel's.

    An entry whose config is not among `configs` is left out, and its neighbours serve in its place. What does not count, and
    what of the file's name is another than the arguments say, is told in the table's `file`.

    Args:
        configs: the kernel's, over which the table is made.
        kernel, device, shape: what they were measured with; the file's name is not judged by what is absent.
        num_tokens: token counts that will be judged.

    Raises:
        InputError: the file cannot be read; by its name it is for another layer or dtype, or for one GEMM of two; its
            entries are another kernel's; or most of them are not among `configs`, or would serve most of `num_tokens`.
    """
    file = TunedFile.read(path)
    notes = _of_its_name(file, kernel, device, shape)
    if foreign := file.foreign(configs, kernel):
        every = all(MEMBER in config for config in configs)
        hint = f"add a key {MEMBER!r} to each entry" if every else _where_to_judge(file)
        raise InputError(f"{os.fspath(path)} is of another kernel than {kernel or 'this one'}, {foreign}; {hint}.")
    found = file.find(configs)
    everything = StaticTable("", tuple(file.entries), tuple(range(len(file.entries))))
    left_out = tuple(count for count in file.entries if count not in found.indices)
    if left_out:
        lost = [everything.token_counts[everything.index(int(count))] in left_out for count in num_tokens]
        total, share = len(file.entries), f", and with them {sum(lost)} of {len(lost)} workloads" if lost else ""
        what = f"{len(left_out)} of {total} entries ({_few(left_out)} tokens) name configs that the table lacks{share}"
        if 2 * len(left_out) > total or 2 * sum(lost) > len(lost):
            first = f"{left_out[0]} tokens: {format_config(file.entries[left_out[0]])}"
            raise InputError(f"{file.path} cannot be judged: {what} ({first}); {_how_to_add(kernel)}.")
        notes.append(f"{what}; their neighbours serve there")
    if found.completed:
        defaults = " ".join(f"{key}={value}" for key, value in ENGINE_DEFAULTS.items())
        notes.append(
            f"{len(found.completed)} of {len(file.entries)} entries ({_few(found.completed)} tokens) lack one of "
            f"{', '.join(ENGINE_DEFAULTS)}; taken as the engine's defaults ({defaults})"
        )
    notes += [
        f"{times} entries set {key}, which no config of the table has; judged without"
        for key, times in found.ignored.items()
    ]
    if file.halfway:
        where = f"at {_few(file.halfway)} tokens, halfway between two entries,"
        notes.append(f"its entries do not ascend: {where} the engine takes the higher and the lower is judged")
    said = FileNotes(file.path, len(file.entries), left_out, found.completed, tuple(notes))
    source = pathlib.Path(path).name + (
        f" ({len(left_out)} of {len(file.entries)} entries unknown)" if left_out else ""
    )
    return StaticTable(source, tuple(found.indices), tuple(found.indices.values()), said)


def _of_its_name(file: TunedFile, kernel: str, device: str, shape: MoEShape | None) -> list[str]:
    """What of a file's name is another than the table's, in sentences; refused where it is the layer."""
    notes: list[str] = []
    layer = file.layer
    if layer is None:
        return notes
    if layer.down:
        raise InputError(f"{file.path} holds the configs of the down GEMM alone; give the file without _down.")
    if shape is not None:
        if other := layer.other_layer(shape):
            raise InputError(
                f"{file.path} is tuned for another layer: {other}; give this layer's file, or judge a copy under a "
                "name that does not say so."
            )
        if other := layer.other_scales(shape, kernel):
            notes.append(f"tuned with {other}")
    if device and layer.other_device(device):
        notes.append(f"tuned on another GPU, {layer.device}, where the table is of {device}")
    if (down := pathlib.Path(file.path.removesuffix(".json") + "_down.json")).exists():
        notes.append(f"SGLang runs {down.name} in the second GEMM; judged is this file's config in both")
    return notes


def _where_to_judge(file: TunedFile) -> str:
    if file.kernel is None:
        return "give a file of this kernel's configs"
    return f"judge it on a table of {file.kernel}, made by 'rampwrap profile --kernel {file.kernel}'"


def _how_to_add(kernel: str) -> str:
    if kernel.startswith(ENGINE_KERNEL):
        return "profile again with VLLM_TUNED_CONFIG_FOLDER naming the file's folder, which times those of its configs that the kernel can run"
    return "add them to the kernel's configs and profile it again"


def _few(counts: Sequence[int]) -> str:
    """``1, 2, 4, 8, ...`` for a list of token counts."""
    return ", ".join(map(str, counts[:6])) + (", ..." if len(counts) > 6 else "")


def read_measured(path: str | os.PathLike[str], timings: Timings, rows: IntArray | None = None) -> StaticTable:
    """`read_static` over what a table measured; `rows` are the workloads that will be judged, all by default."""
    judged = timings.num_tokens if rows is None else timings.num_tokens[rows]
    return read_static(
        path,
        timings.configs,
        kernel=timings.kernel,
        device=timings.device.name,
        shape=timings.shape,
        num_tokens=judged,
    )


def write_static(table: StaticTable, configs: Sequence[Config], *, spelling: str = "vllm") -> str:
    """The table as text of the engines' JSON file, keys spelled as vLLM does where it has them."""
    back = {short: long for long, short in SPELLING.items()} if spelling == "vllm" else {}
    entries = {
        str(tokens): {back.get(key, key): value for key, value in configs[index].items()}
        for tokens, index in zip(table.token_counts, table.indices, strict=True)
    }
    return json.dumps(entries, indent=4) + "\n"
