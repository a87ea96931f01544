"""The configs of the CuTe kernels: which are compiled ahead, what each occupies, which can run a shape.

A config is

    form        "two" launches (gate/up, then down), "one" for the whole layer, or "prefill": two with tokens as M of wgmma;
                or "ragged": two in which each tile is as wide as the tokens of its block
    dtype       "fp8" (128-block scales) or "bf16"
    block_m     tokens of a CTA: the N of wgmma, so any multiple of 8, and the most of the ragged form; 128 of the prefill
                form, 64 a warpgroup
    block_n     weight rows of a consumer warp, a multiple of 16; of the prefill form all 256 of the tile
    warp_n      consumer warps of a CTA, in warpgroups of 4
    stages      depth of the pipeline: `rows` x 128 bytes of weights and block_m x 128 bytes of tokens each

and its compiled kernels are its variants. The order of tiles, group_m, is chosen at run time and compiles nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from rampwrap.kernel.shape import MoEShape

FORMS = ("two", "one", "prefill", "ragged")
DTYPES = ("fp8", "bf16")
KEYS = ("form", "block_m", "block_n", "warp_n", "stages", "group_m")
"Of a config of the adapter, in this order."
GROUP_MS = (1, 8)
"M blocks whose tiles run side by side, to share weights in L2; any number up to `MAX_GROUP_M` is legal."
MAX_GROUP_M = 1024
SCALE = 128
"Width and height of the blocks of weights, and width of the groups of activations, that share an FP8 scale."
STEP_BYTES = 128
"Bytes of a row that one stage holds: 128 columns in FP8, 64 in bf16."

# sm_90. An SM has 1 KB of shared memory more than a CTA may take, and each resident CTA costs 1 KB.
MAX_SHARED = 227 * 1024
HALF_SHARED = 113 * 1024
"Of each of two CTAs on an SM."
SM_REGISTERS = 65_536
MAX_BLOCK_M = 104
PRODUCER_THREADS = 128
PRODUCER_REGISTERS = 40
# Of a consumer thread, besides accumulators. With 40 no compiled config spills; with less FP8 104x32 does.
OTHER_REGISTERS = 40
MAX_REGISTERS = 240
MAX_STAGES = 12

BLOCK_MS = tuple(range(8, MAX_BLOCK_M + 1, 8))
PREFILL_BLOCK_MS = {"fp8": (112, 128), "bf16": (112, 128, 144)}
"""Larger ones of the two-launch form, for thousands of tokens: more work for each byte that a CTA reads. Beyond them FP8
runs out of accumulators, bf16 out of producer registers, and the last M block of an expert is mostly empty."""
PREFILL_TILE = (32, 8)
"block_n and warp_n of these."
TOKENS_AS_M = (128, 256, 8, 4)
"block_m, block_n, warp_n and stages of the prefill form."
MAX_SUMS_OF_ONE = 128
"float32 sums of a consumer thread in the one-launch form."
DOWN_STAGES = {(16, 4): 6, (32, 4): 4, (64, 4): 3, (16, 8): 4, (32, 8): 3}
"The one depth of a tile's down kernels: w2 has I columns, 2 to 16 steps in most models, so more stages stay empty."
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128)
"Of the tiles of the ragged form up to its block_m, which is the widest: each has a K loop and an epilogue in the kernel."


def _to(least: int, most: int) -> tuple[int, ...]:
    """Multiples of 8, both ends among them."""
    return tuple(range(least, most + 1, 8))


LISTED: dict[tuple[str, str], dict[tuple[int, int, int], tuple[int, ...]]] = {
    ("two", "fp8"): {
        (16, 4, 6): (8, 16),
        (32, 4, 4): (*_to(8, 48), 64, 80, 104),
        (32, 4, 6): (8, 16),
        (64, 4, 3): _to(8, 56),
        (64, 4, 4): _to(8, 56),
        (32, 8, 3): (8, 16, *_to(48, 104)),
        (32, 8, 4): (48, *_to(64, 112), 128),
        (32, 8, 5): (80, 88),
    },
    ("two", "bf16"): {
        (16, 4, 10): _to(8, 104),
        (32, 4, 6): _to(16, 104),
        (64, 4, 4): (40, 48, 72),
        (32, 8, 4): (*_to(64, 112), 128, 144),
        (32, 8, 5): (96, 104),
    },
    ("one", "fp8"): {
        (16, 4, 6): (8, 16),
        (32, 4, 4): _to(8, 48),
        (32, 4, 6): (8, 16, 24),
        (64, 4, 3): _to(8, 32),
        (64, 4, 4): (8, 16),
        **{(16, 8, stages): (8,) for stages in (4, 6)},
        **{(32, 8, stages): (8, 16) for stages in (3, 4, 5)},
        (32, 8, 6): (8,),
    },
    ("one", "bf16"): {
        (16, 4, 6): (8, 16),
        (32, 4, 4): (8, 16, 24),
        (32, 4, 6): _to(8, 48),
        (64, 4, 3): (8, 16),
        (64, 4, 4): (8, 16),
        **{(16, 8, stages): (8, 16) for stages in (4, 6, 8)},
        **{(32, 8, stages): (8, 16) for stages in (3, 4, 5)},
        (32, 8, 6): (8,),
    },
    **{("prefill", dtype): {TOKENS_AS_M[1:]: TOKENS_AS_M[:1]} for dtype in DTYPES},
    ("ragged", "fp8"): {(64, 4, 4): (40, 56, 72), (32, 8, 4): (64, 96), (32, 8, 3): (96,)},
    ("ragged", "bf16"): {(32, 4, 6): (64, 96), (64, 4, 4): (72,), (32, 8, 4): (64, 112, 144)},
}
"""Of a form and dtype: (block_n, warp_n, stages), and the block_m compiled for it. Of "two" and "one" what tables and the race of five
layers need to stay within 0.3 % of the best in the mean of a band of token counts and within 2 % at every workload, what defaults
and shipped plans name, and neighbours of these for layers that no table has (`benchmarks/config_lists.py`). Narrow tiles need more stages
to keep 64 KB of loads in flight, and are for sizes that only they divide too: 64 rows in bf16, 128 in FP8.

Of the ragged form the tiles that tables of the two-launch form have within 2 % of the best at 32 to 1024 tokens. On an H100 the best of them for
each workload is 0.93-1.03x as fast as the best of all other forms from 6 tokens on, but where the prefill form is ahead in
FP8 (0.83; `benchmarks/results/h100-race-issue16.json`)."""
STREAM_CHUNK = 32 * 1024
"Bytes that `device.stream` copies at once: those of a step of 256 weight rows."


@attrs.frozen(order=True)
class CuteConfig:
    """One set of compile-time parameters; not checked: `why_illegal` says what cannot run."""

    form: str
    dtype: str
    block_m: int
    block_n: int
    warp_n: int
    stages: int

    @property
    def rows(self) -> int:
        """Weight rows of a CTA's tile; half gate and half up in the up-projection."""
        return self.block_n if self.form == "prefill" else self.block_n * self.warp_n

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.warp_n // 4

    @property
    def threads(self) -> int:
        """Threads of a CTA: the producer warpgroup and the consumers."""
        return PRODUCER_THREADS + 32 * self.warp_n

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight."""
        return 1 if self.dtype == "fp8" else 2

    @property
    def step(self) -> int:
        """Columns of a row that one stage holds."""
        return STEP_BYTES // self.element_bytes

    @property
    def cluster(self) -> int:
        """CTAs that together hold 128 columns of h, where those share a scale or go into one product."""
        return max(1, 2 * SCALE // self.rows) if self.dtype == "fp8" or self.form == "one" else 1

    @property
    def consumer_registers(self) -> int:
        """What setmaxnreg gives a consumer thread once the producers have handed back theirs."""
        left = SM_REGISTERS - PRODUCER_THREADS * PRODUCER_REGISTERS
        return min(MAX_REGISTERS, left // (32 * self.warp_n) // 8 * 8)

    @property
    def other_registers(self) -> int:
        """Registers of a consumer thread besides accumulators, without which it spills."""
        if self.form not in ("two", "ragged") or self.block_n < 64:
            return OTHER_REGISTERS
        # Four tiles of a thread are stored, and in bf16 activated, at once: 88x64 and 80x64 spill.
        return OTHER_REGISTERS + (16 if self.dtype == "fp8" else 48)

    @property
    def product_sets(self) -> int:
        """FP8: 64-row tiles whose products of a step are under way at once, 1 to all of a warpgroup's, as registers allow."""
        tiles, each = self.block_n // 16, self.block_m // 2
        # With 8 registers fewer to spare than the legal least, 96x32 spills one.
        spare = self.other_registers + (8 if self.form in ("two", "ragged") else 0)
        free = self.consumer_registers - spare - tiles * each
        return max(1, min(tiles, free // each))

    @property
    def accumulators(self) -> int:
        """float32 accumulators of a consumer thread: FP8 keeps scaled sums beside the products of a step."""
        if self.form == "prefill":  # a quarter of the rows of two tokens; FP8 products are of 128 rows
            return self.rows // 2 + (SCALE // 2 if self.dtype == "fp8" else 0)
        sets = self.product_sets if self.dtype == "fp8" else 0
        return (self.block_n // 16 + sets) * self.block_m // 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens of its tiles, ascending: those of a block that has as many or fewer take the first that holds them."""
        return (*(width for width in WIDTHS if self.form == "ragged" and width < self.block_m), self.block_m)

    @property
    def product_columns(self) -> tuple[int, ...]:
        """Every N of its wgmma: tokens, or in the prefill form the weight rows of a product."""
        if self.form != "prefill":
            return self.widths
        return (SCALE if self.dtype == "fp8" else self.rows,)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of the largest of its kernels, in bytes."""
        return max(variant.shared_bytes for variant in self.variants)

    @property
    def ctas_per_sm(self) -> int:
        """CTAs on an SM: two of the one-launch form where shared memory and registers are enough for both."""
        if self.form != "one":
            return 1
        at_launch = SM_REGISTERS // (2 * self.threads) // 8 * 8
        left = at_launch * self.threads - PRODUCER_THREADS * PRODUCER_REGISTERS
        need = self.block_n // 16 * self.block_m // 2 * (2 if self.dtype == "fp8" else 1) + OTHER_REGISTERS
        enough = need <= min(MAX_REGISTERS, left // (32 * self.warp_n) // 8 * 8)
        return 2 if enough and self.shared_bytes <= HALF_SHARED else 1

    @property
    def variants(self) -> tuple["Variant", ...]:
        """The kernels that are compiled for it, in the order of their launches; configs share their down kernels."""
        if self.form == "one":
            return (Variant("mega", self),)
        if self.form == "prefill":
            return Variant("prefill_up", self), Variant("prefill_down", self)
        depth = min(self.stages, DOWN_STAGES.get((self.block_n, self.warp_n), self.stages))
        prefix = "ragged_" if self.form == "ragged" else ""
        return Variant(f"{prefix}up", self), Variant(f"{prefix}down", attrs.evolve(self, stages=depth))

    @property
    def name(self) -> str:
        """A short form, part of symbols and file names."""
        return f"{self.dtype}_m{self.block_m}_n{self.block_n}_w{self.warp_n}_s{self.stages}"

    def keys(self, group_m: int) -> dict[str, Any]:
        """As a config of the adapter, which knows the dtype from the layer's shape."""
        return {
            "form": self.form,
            "block_m": self.block_m,
            "block_n": self.block_n,
            "warp_n": self.warp_n,
            "stages": self.stages,
            "group_m": group_m,
        }


@attrs.frozen(order=True)
class Variant:
    """One compiled kernel: the "up" or "down" of two-launch configs, "prefill_up" or "prefill_down", or the one launch's "mega"."""

    role: str
    config: CuteConfig

    @property
    def symbol(self) -> str:
        """Its C name, such as up_fp8_m16_n64_w4_s4."""
        return f"{self.role}_{self.config.name}"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory in bytes: the pipeline with its barriers, and what the epilogue exchanges."""
        config = self.config
        if self in STREAMS:
            return config.stages * (STREAM_CHUNK + 8)
        block_m, stages, cluster = config.block_m, config.stages, config.cluster
        fp8 = config.dtype == "fp8"
        if config.form == "prefill":
            size = stages * ((config.rows + block_m) * STEP_BYTES + 16) + 1024
            return size + (stages * 4 * (block_m + 2) if fp8 else 0)  # scales of tokens and of both boxes of weights
        size = stages * (config.rows + block_m) * STEP_BYTES + 16 * stages + 1024
        size += 4 * block_m * stages if fp8 else 0
        if self.role in ("down", "ragged_down"):
            return size + 16 * block_m  # slots and routing weights, of two tiles
        size += 8 * block_m  # slots of two tiles, or rows and factors
        if fp8:
            size += 4 * block_m * (1 + config.warp_n)  # 448 / maximum, maxima of warps
            size += 8 * block_m * cluster if cluster > 1 else 0  # maxima of the CTAs, of two tiles
        size += 24 if cluster > 1 else 0
        return size + (block_m * STEP_BYTES * config.element_bytes if self.role == "mega" else 0)  # 128 columns of h


STREAMS = tuple(Variant(role, CuteConfig("stream", "fp8", 8, 32, 8, 6)) for role in ("stream", "stream_overlapping"))
"""What reads weights and does nothing with them, for `benchmarks/account.py`: part of no layer, and in no library unless asked
for. Of the config only the stages count."""


def from_keys(keys: Mapping[str, Any], dtype: str) -> CuteConfig | str:
    """A config of the adapter, for a layer's dtype; or a sentence that says what is wrong with its keys or group_m."""
    if set(keys) != set(KEYS):
        return f"The config has {', '.join(keys) or 'no keys'}; give {', '.join(KEYS)}."
    for key, value in keys.items():
        if key != "form" and (not isinstance(value, int) or isinstance(value, bool)):
            return f"{key}={value!r} is no whole number; give one."
    if not 1 <= keys["group_m"] <= MAX_GROUP_M:
        return f"group_m={keys['group_m']} is not supported; use 1 to {MAX_GROUP_M}."
    return CuteConfig(dtype=dtype, **{key: keys[key] for key in KEYS if key != "group_m"})


def why_illegal(config: CuteConfig, shape: MoEShape | None = None) -> str | None:
    """Why a config cannot run, on any layer or on that of a shape, in a sentence; None if it can.

    The one statement of what is legal: lists, builds and launches all ask it.
    """
    return _why_not_compiled(config) or (None if shape is None else _why_not_shape(config, shape))


def _why_not_compiled(config: CuteConfig) -> str | None:
    if config.form not in FORMS:
        return f"form={config.form!r} is unknown; use one of {', '.join(FORMS)}."
    if config.dtype not in DTYPES:
        return f"dtype {config.dtype} is not compiled; use one of {', '.join(DTYPES)}."
    if config.form == "prefill":
        return _why_not_prefill(config)
    if config.form == "ragged" and config not in all_configs("ragged", config.dtype):
        tiles = ", ".join(listed.name for listed in all_configs("ragged", config.dtype))
        return f"{config.name} is not compiled for form='ragged'; use one of {tiles}."
    prefill = config.form in ("two", "ragged") and config.block_m in PREFILL_BLOCK_MS[config.dtype]
    if config.block_m not in BLOCK_MS and not (prefill and (config.block_n, config.warp_n) == PREFILL_TILE):
        return f"block_m={config.block_m} is not compiled; use a multiple of 8 from 8 to {MAX_BLOCK_M}."
    if config.warp_n not in (4, 8):
        return f"warp_n={config.warp_n} makes no whole warpgroups that fit the registers; use 4 or 8."
    if config.block_n not in (16, 32, 64):
        return f"block_n={config.block_n} is not compiled; use 16, 32 or 64."
    if config.rows > 256:
        return f"block_n={config.block_n} with warp_n={config.warp_n} is {config.rows} rows, one TMA box holds 256; use fewer."
    if not 2 <= config.stages <= MAX_STAGES:
        return f"stages={config.stages} is not compiled; use 2 to {MAX_STAGES}."
    need = config.accumulators + config.other_registers
    if need > config.consumer_registers:
        return (
            f"It needs {need} registers a thread where {config.consumer_registers} are free, and would spill; "
            "use a smaller block_m or block_n."
        )
    # Sums of both products at once: 80x64 in FP8 and 72x64 in bf16 spill.
    if config.form == "one" and (held := config.block_n // 16 * config.block_m // 2) > MAX_SUMS_OF_ONE:
        return (
            f"It keeps {held} sums a thread where one launch has room for {MAX_SUMS_OF_ONE}; use the two-launch form."
        )
    if config.shared_bytes > MAX_SHARED:
        return (
            f"It needs {config.shared_bytes} bytes of shared memory where a CTA gets {MAX_SHARED}; "
            "use fewer stages or a smaller block_m."
        )
    return None


def _why_not_prefill(config: CuteConfig) -> str | None:
    tile = config.block_m, config.block_n, config.warp_n, config.stages
    if tile != TOKENS_AS_M:
        return (
            f"block_m, block_n and warp_n of {tile[:3]} with stages={config.stages} are not compiled for form='prefill'; "
            f"use {TOKENS_AS_M[:3]} with stages={TOKENS_AS_M[3]}."
        )
    return None


def _why_not_shape(config: CuteConfig, shape: MoEShape) -> str | None:
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    if config.dtype != shape.dtype:
        return f"dtype {shape.dtype} is not that of the config, {config.dtype}; use configs of {shape.dtype}."
    grouped = config.dtype == "fp8" or config.form in ("one", "prefill")
    multiple = SCALE if grouped else config.step
    what = "128-wide groups of h and scales" if grouped else f"{multiple} columns of a step"
    for name, size in (("hidden_size", hidden), ("intermediate_size", intermediate)):
        if size % multiple:
            return f"{name}={size} is no multiple of the {what}; pad it."
    if 2 * intermediate % config.rows:
        return (
            f"intermediate_size={intermediate} is no multiple of the {config.rows // 2} columns of a tile; "
            "use a smaller block_n or warp_n."
        )
    width = config.rows * (config.cluster if config.form == "one" else 1)
    if hidden % width:
        remedy = "use the two-launch form" if config.form in ("one", "prefill") else "use a smaller block_n or warp_n"
        return f"hidden_size={hidden} is no multiple of the {width} output columns of a tile; {remedy}."
    return None


def all_configs(form: str, dtype: str) -> tuple[CuteConfig, ...]:
    """Every config of a form and a dtype that is compiled ahead, by tile, depth and block_m.

    Others that `why_illegal` lets pass are compiled when they are asked for, where the DSL is installed.
    """
    tiles = LISTED.get((form, dtype), {}).items()
    return tuple(CuteConfig(form, dtype, block_m, *tile) for tile, heights in tiles for block_m in heights)


def all_variants(forms: Sequence[str] = FORMS, dtypes: Sequence[str] = DTYPES) -> tuple[Variant, ...]:
    """The kernels of every config of some forms and dtypes, each once."""
    every = (config for form in forms for dtype in dtypes for config in all_configs(form, dtype))
    return tuple(dict.fromkeys(variant for config in every for variant in config.variants))
