"""The tuning parameters of the fused MoE kernels: what is legal, what is in the list, what it occupies.

A config is a dict of

    block_m     token rows of a CTA
    block_n     weight rows of a CTA, in both GEMMs (half gate, half up in the first)
    block_k     depth of one step
    group_m     M blocks whose tiles are launched side by side, to share weights in L2
    num_warps, num_stages
    swap_ab     multiply W X^T instead of X W^T: the weights become the 64-row operand of wgmma, so that
                16 and 32 token rows run on wgmma too (mma.sync otherwise, which converts FP8 to fp16 first)
    split_k     CTAs that share the depth of one tile of the down GEMM, each writing rows of its own for the sum
                over top-k to add; only configs that split carry the key

`group` is the side of the blocks of FP8 weights that share a scale, 0 where scales are by channel or tensor
(`MoEShape.scale_group`); other dtypes have none, whatever it says.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from rampwrap.kernels.common.fp8 import GROUP
from rampwrap.kernels.common.sm90 import MAX_SHARED, SM_REGISTERS, SM_SHARED, SM_THREADS

KEYS = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages", "swap_ab")
SPLITS = (1, 2, 4)
MAX_BLOCK_M = 128
# Rows of partial sums cost memory and traffic in proportion to the batch, while a larger batch fills the GPU
# without them: above so many slots a config runs unsplit.
SPLIT_MAX_SLOTS = 512

# Accumulators a thread may hold. 128 is 128x256 at 8 warps in bf16: 254 registers, no spill; FP8 block scales
# need a second set, because each step's product is scaled before it is added.
MAX_ACCUMULATORS = 128


def element_size(dtype: str) -> int:
    """Bytes of one weight of a `MoEShape.dtype`."""
    return 1 if dtype == "fp8" else 2


def splits(config: Mapping[str, Any], num_slots: int) -> int:
    """Parts into which a config cuts the depth of the down GEMM of a batch of num_slots = tokens x top_k."""
    return int(config.get("split_k", 1)) if num_slots <= SPLIT_MAX_SLOTS else 1


def partial_rows(num_slots: int) -> int:
    """Rows of the down GEMM that any config may write for a batch of up to num_slots = tokens x top_k."""
    return max(num_slots, max(SPLITS) * min(num_slots, SPLIT_MAX_SLOTS))


def uses_wgmma(config: Mapping[str, Any]) -> bool:
    """Whether the operand with the 64-row granularity is large enough; mma.sync runs otherwise."""
    return bool(config["swap_ab"]) or config["block_m"] >= 64


def quantises_h(config: Mapping[str, Any], group: int = GROUP) -> bool:
    """Whether an FP8 tile is one group of h wide, so that the up epilogue can quantise it."""
    return bool(config["block_n"] == 2 * group)


def shared_bytes(config: Mapping[str, Any], dtype: str, group: int = GROUP) -> int:
    """Shared memory of a CTA: the pipeline's buffers, or the tile on its way to a coalesced store.

    Triton keeps `num_stages` buffers under wgmma, which reads operands while the next load lands, and one
    less under mma.sync. Compiled kernels are compared with this number in the tests.
    """
    rows = config["block_m"] + config["block_n"]
    buffers = config["num_stages"] if uses_wgmma(config) else max(1, config["num_stages"] - 1)
    pipeline = buffers * rows * config["block_k"] * element_size(dtype)
    if dtype == "fp8" and 0 < group < GROUP:
        pipeline += 4 * config["block_n"]  # a scale for each weight row, on its way to the threads that need it
    return int(max(pipeline, config["block_m"] * config["block_n"] * 4))


def accumulators(config: Mapping[str, Any], dtype: str, group: int = GROUP) -> int:
    """float32 accumulators of a thread."""
    sets = 2 if dtype == "fp8" and group else 1
    return int(config["block_m"] * config["block_n"] // (32 * config["num_warps"]) * sets)


def registers(config: Mapping[str, Any], dtype: str, group: int = GROUP) -> int:
    """Estimate of a thread's registers, read off 157 compiled configs in bf16 and 30 in FP8 (Triton 3.6, sm_90).

    By it 156 and 29 of them get the residency that their registers and shared memory allow. wgmma keeps operands in
    shared memory, mma.sync in registers; scaled FP8 products and swapped operands take some on top.
    """
    held = accumulators(config, dtype, group)
    if uses_wgmma(config) and not (dtype == "fp8" and config["swap_ab"]):
        return min(255, max(48, 2 * held))
    return min(255, 48 + 3 * held // 2 if dtype == "fp8" else 32 + 2 * held)


def ctas_per_sm(config: Mapping[str, Any], dtype: str, group: int = GROUP) -> int:
    """CTAs resident on one SM, by shared memory, registers and threads."""
    threads = 32 * config["num_warps"]
    by_shared = SM_SHARED // (shared_bytes(config, dtype, group) + 1024)
    by_registers = SM_REGISTERS // (threads * registers(config, dtype, group))
    return int(max(1, min(by_shared, by_registers, SM_THREADS // threads, 32)))


def refusal(config: Mapping[str, Any], dtype: str, group: int = GROUP) -> str | None:
    """Why a config cannot run with a dtype, in a sentence; None if it can. The one statement of what is legal."""
    missing = [key for key in KEYS if key not in config]
    if missing:
        return f"The config lacks {', '.join(missing)}; give all of {', '.join(KEYS)}."
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    warps, stages = config["num_warps"], config["num_stages"]
    if block_m not in (16, 32, 64, 128):
        return f"block_m={block_m} is not supported; use 16, 32, 64 or 128."
    if block_n not in (32, 64, 128, 256):
        return f"block_n={block_n} is not supported; use 32, 64, 128 or 256."
    if dtype == "fp8" and group and block_k != group:
        return f"block_k={block_k} does not match the {group}-wide scale blocks of FP8 weights; use {group}."
    if block_k not in (32, 64, 128, 256):
        return f"block_k={block_k} is not supported; use 32, 64, 128 or 256."
    if warps not in (4, 8):
        return f"num_warps={warps} is not supported; use 4 or 8."
    if not 1 <= stages <= 8:
        return f"num_stages={stages} is not supported; use 1 to 8."
    if config.get("split_k", 1) not in SPLITS:
        return f"split_k={config['split_k']} is not supported; use {', '.join(map(str, SPLITS))}."
    if config["group_m"] < 1:
        return f"group_m={config['group_m']} is not supported; use 1 or more."
    if config["swap_ab"] and block_n < 16 * warps:
        return f"swap_ab needs 16 weight rows a warp, block_n={block_n} has fewer with {warps} warps; use a wider tile."
    if accumulators(config, dtype, group) < 4:
        return f"A {block_m}x{block_n} tile leaves some of {warps} warps without work; use fewer warps."
    if accumulators(config, dtype, group) > MAX_ACCUMULATORS:
        return f"A {block_m}x{block_n} tile does not fit the registers of {warps} warps in {dtype}; use more warps or a smaller tile."
    shared = shared_bytes(config, dtype, group)
    if shared > MAX_SHARED:
        return f"The config needs {shared} bytes of shared memory, an SM gives {MAX_SHARED}; use fewer stages or a smaller tile."
    return None


# What is worth measuring, by (block_m, block_n, block_k), stages by number of warps, values of group_m. Far more is legal.
# Few token rows: time is the time to stream the weights, so what counts is bytes in flight, 64 KB or more an SM
# (4.3 TB/s over 132 SMs times 1 to 2 us). Many rows: 64x128 and up on wgmma, deep enough to hide L2.
# Of 167 and 135 configs that H200s ran these are left: those within 1 % of the best for any batch of any table, within 3 %
# in FP8, whose whole list ran on one layer alone; those that a short sweep kept; `default_config`'s
# (`python benchmarks/config_lists.py`).
_Family = tuple[tuple[int, int, int], dict[int, tuple[int, ...]], tuple[int, ...]]

_BF16: tuple[_Family, ...] = (
    ((16, 32, 128), {4: (4,)}, (1,)),
    ((16, 64, 64), {4: (3, 4, 5)}, (1,)),
    ((16, 64, 128), {4: (2, 4, 5)}, (1,)),
    ((16, 64, 128), {4: (3,)}, (1, 16)),
    ((16, 64, 256), {4: (2, 3)}, (1,)),
    ((16, 128, 64), {4: (3, 4, 5)}, (1,)),
    ((16, 128, 128), {4: (2, 4), 8: (4,)}, (1,)),
    ((16, 128, 128), {4: (3,)}, (1, 16)),
    ((16, 256, 128), {8: (2,)}, (1,)),
    ((32, 64, 128), {4: (3, 4)}, (1,)),
    ((32, 128, 64), {4: (3,)}, (1, 8)),
    ((32, 128, 128), {4: (2, 3)}, (1, 8)),
    ((32, 256, 64), {4: (3,)}, (1,)),
    ((64, 64, 64), {4: (3, 4)}, (1,)),
    ((64, 128, 64), {8: (4,)}, (1,)),
    ((64, 128, 64), {4: (3, 4), 8: (3,)}, (1, 8)),
    ((64, 256, 64), {8: (4,)}, (8, 16)),
    ((128, 128, 64), {4: (3,)}, (1,)),
    ((128, 128, 64), {8: (3,)}, (1, 8, 16)),
    ((128, 256, 64), {8: (3, 4)}, (1, 8, 16)),
)

_BF16_SWAPPED: tuple[_Family, ...] = (
    ((16, 64, 64), {4: (4, 5)}, (1,)),
    ((16, 64, 128), {4: (3, 4, 5)}, (1,)),
    ((16, 128, 64), {4: (3, 4, 5)}, (1,)),
    ((16, 128, 128), {4: (2, 3), 8: (3, 4)}, (1,)),
    ((16, 256, 64), {8: (3,)}, (1,)),
    ((32, 64, 64), {4: (4, 5)}, (1,)),
    ((32, 64, 128), {4: (3, 4)}, (1,)),
    ((32, 128, 64), {4: (3, 4, 5), 8: (4,)}, (1, 8)),
    ((32, 256, 64), {8: (3,)}, (1, 8)),
    ((64, 128, 64), {4: (3,)}, (1, 8)),
)

_FP8: tuple[_Family, ...] = (
    ((16, 32, 128), {4: (4,)}, (1,)),
    ((16, 64, 128), {4: (3, 4, 5)}, (1,)),
    ((16, 128, 128), {4: (3, 4)}, (1,)),
    ((16, 256, 128), {4: (3, 4)}, (1,)),
    ((32, 128, 128), {4: (3,)}, (1,)),
    ((64, 64, 128), {4: (3,)}, (8,)),
    ((64, 128, 128), {4: (3, 4), 8: (4,)}, (1, 8, 16)),
    ((64, 256, 128), {8: (4,)}, (1, 8, 16)),
    ((128, 128, 128), {8: (4,)}, (8,)),
    ((128, 128, 128), {8: (3,)}, (16,)),
)

_FP8_SWAPPED: tuple[_Family, ...] = (
    ((16, 64, 128), {4: (3, 4, 5, 6)}, (1,)),
    ((16, 128, 128), {4: (3, 4, 5, 6), 8: (4, 5)}, (1,)),
    ((16, 256, 128), {4: (3,), 8: (3,)}, (1,)),
    ((32, 64, 128), {4: (3, 4, 5, 6)}, (1,)),
    ((32, 128, 128), {4: (5,)}, (1,)),
    ((32, 128, 128), {4: (3, 4), 8: (4,)}, (1, 8)),
    ((32, 256, 128), {4: (3,)}, (1, 8)),
)


def _expand(families: Iterable[_Family], swap_ab: bool) -> Iterable[tuple[int | bool, ...]]:
    for tile, stages_by_warps, groups in families:
        for warps, all_stages in stages_by_warps.items():
            for stages in all_stages:
                for group in groups:
                    yield (*tile, group, warps, stages, swap_ab)


# Scales outside the loop leave the second set of accumulators free: the widest tiles of bf16 fit, at twice the depth.
_FP8_WHOLE: tuple[_Family, ...] = (
    ((128, 128, 128), {8: (3, 4)}, (1, 8)),
    ((128, 256, 128), {8: (3, 4)}, (1, 8)),
)

# For 1 to 8 tokens, where a layer has fewer tiles of the down GEMM than an SM can keep in flight.
_SPLIT_BF16 = ((16, 128, 128, 1, 4, 3, False, 2),)
_SPLIT_FP8 = ((16, 64, 128, 1, 4, 5, True, 2),)


@functools.cache
def listed(dtype: str, group: int = GROUP) -> tuple[dict[str, Any], ...]:
    """`CONFIGS` of a dtype, for scales of any form: those were measured with blocks of 128, for others nothing was yet."""
    plain, swapped = (_FP8, _FP8_SWAPPED) if dtype == "fp8" else (_BF16, _BF16_SWAPPED)
    if dtype == "fp8" and not group:
        plain = (*plain, *_FP8_WHOLE)
    rows = sorted({*_expand(plain, False), *_expand(swapped, True)})
    configs = [dict(zip(KEYS, row, strict=True)) for row in rows]
    split = _SPLIT_FP8 if dtype == "fp8" else _SPLIT_BF16
    configs += [dict(zip((*KEYS, "split_k"), row, strict=True)) for row in split]
    if dtype == "fp8" and 0 < group < GROUP:
        configs = _shallow(configs, group)
    return tuple(config for config in configs if refusal(config, dtype, group) is None)


def _shallow(configs: Iterable[Mapping[str, Any]], group: int) -> list[dict[str, Any]]:
    """Steps as deep as a smaller group, with as many bytes in flight as far as stages reach, and with as many stages as before."""
    made = {
        tuple(its.items()): its
        for config in configs
        for stages in (min(8, config["num_stages"] * GROUP // group), config["num_stages"])
        for its in [{**config, "block_k": group, "num_stages": stages}]
    }
    return list(made.values())


CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {dtype: listed(dtype) for dtype in ("bf16", "fp16", "fp8")}
"""The configs of each dtype that are worth measuring, sorted by their values in the order of `KEYS`; those that split come last.

Any other that `refusal` lets pass can be launched too, as plans and tables of longer lists ask for."""


_Rows = tuple[tuple[float, tuple[int | bool, ...]], ...]
_BF16_MEAN: _Rows = (
    (2.5, (16, 64, 128, 1, 4, 3, True)),
    (6.5, (32, 64, 128, 1, 4, 3, True)),
    (11, (32, 128, 64, 1, 4, 5, True)),
    (80, (64, 128, 64, 1, 4, 3, False)),
    (200, (128, 256, 64, 1, 8, 4, False)),
    (float("inf"), (128, 256, 64, 8, 8, 4, False)),
)
"What serves up to so many tokens an expert."
_FEW_BF16: _Rows = ((15, (16, 64, 128, 1, 4, 3, True)), (32, (16, 128, 64, 1, 4, 3, True)))
_FEW_FP8: _Rows = ((8, (16, 64, 128, 1, 4, 4, True)), (24, (16, 64, 128, 1, 4, 3, True)))
"And up to so many slots, where each has an expert of its own."
_FP8_MEAN: _Rows = (
    (7, (16, 128, 128, 1, 4, 3, True)),
    (28, (32, 256, 128, 8, 4, 3, True)),
    (float("inf"), (64, 128, 128, 8, 4, 4, False)),
)
_FP8_WHOLE_MEAN: _Rows = (
    *_FP8_MEAN[:-1],
    (80, (64, 128, 128, 1, 4, 4, False)),
    (200, (128, 256, 128, 1, 8, 4, False)),
    (float("inf"), (128, 256, 128, 8, 8, 4, False)),
)
"""Scales outside the loop, a prediction: few rows stream weights as with blocks of 128, many have the accumulators of bf16 and,
at twice the depth, its bytes in flight."""
_FP8_OTHERWISE: _Rows = (
    (12, (16, 128, 128, 1, 4, 4, True)),
    (32, (32, 128, 128, 1, 4, 4, True)),
    (96, (64, 128, 128, 1, 4, 4, False)),
    (float("inf"), (128, 128, 128, 8, 8, 4, False)),
)
"Smaller blocks of scales: nothing was measured."


def _first(value: float, rows: _Rows) -> tuple[int | bool, ...] | None:
    return next((row for most, row in rows if value <= most), None)


def default_config(num_tokens: int, num_experts: int, top_k: int, dtype: str, group: int = GROUP) -> dict[str, Any]:
    """A config for whatever routing, where nobody has measured the layer: by what was fastest over skews in tables of two others.

    H200, OLMoE and Qwen3-30B, time over the best config of each workload in geometric mean: bf16 1.01-1.02, FP8 1.02, at no number
    of tokens above 1.07 (`benchmarks/defaults.py`).
    """
    num_slots, per_expert = num_tokens * top_k, num_tokens * top_k / num_experts
    if dtype == "fp8" and 0 < group < GROUP:
        row = _first(per_expert, _FP8_OTHERWISE)
    else:
        in_fp8 = _FEW_FP8, _FP8_MEAN if group else _FP8_WHOLE_MEAN
        few, mean = in_fp8 if dtype == "fp8" else (_FEW_BF16, _BF16_MEAN)
        # A slot mostly has an expert of its own there: how many CTAs there are, and how the last wave is filled, is theirs.
        row = (_first(num_slots, few) if per_expert <= 0.5 else None) or _first(per_expert, mean)
    assert row is not None
    config = dict(zip(KEYS, row, strict=True))
    return _shallow([config], group)[0] if dtype == "fp8" and 0 < group < GROUP else config
