"""The default: which config serves a layer and a number of tokens where no plan chooses.

A rule of few constants by the mean number of tokens of an expert, for a skew that nobody knows: tiles are two to three times as
wide as the mean, since the experts that decide have more; those of the ragged form are as wide as each expert needs, up to block_m.
Forms of one width were fitted to tables of two layers on an H200, the ragged form to a race of five on an H100; both are judged by
`benchmarks/defaults.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.configs import FORMS

SMS = 132
"Of an H100 or H200."


@attrs.frozen
class Tile:
    """What a CTA takes: block_n, warp_n and stages, and block_m by the mean number of tokens of an expert."""

    block_n: int
    warp_n: int
    stages: int
    least: float
    "Of block_m, for an expert without tokens."
    slope: float = 0.0
    "Of block_m, for each token of the mean."
    most: int = 8

    def keys(self, mean: float) -> dict[str, int]:
        """Of the config, with block_m a multiple of 8."""
        block_m = min(self.most, 8 * max(1, math.ceil((self.least + self.slope * mean) / 8)))
        return {"block_m": block_m, "block_n": self.block_n, "warp_n": self.warp_n, "stages": self.stages}


@attrs.frozen
class Rule:
    """The default of a dtype."""

    one_to: float
    """Mean tokens of an expert up to which one launch serves: it adds its output tiles in memory, more of them the more tokens
    share the weights that it reads, of which FP8 has half the bytes."""
    prefill_from: float
    "Mean from which the prefill form serves."
    narrow: Tile
    "Of one launch while wider tiles would leave a quarter of the SMs idle."
    one: Tile
    two: Mapping[float, Tile]
    "By the least mean that each is for, ascending."
    ragged: Mapping[float, Tile]
    "The same; below the least of all, `RAGGED_OF_SOME_FROM` on a rank with some of the experts, the other forms serve."


RAGGED_OF_SOME_FROM = 2.5
"""Mean from which the ragged form serves where a rank has some of the experts, and tokens are those of all ranks. With 32 of 128 experts of
Qwen3-30B at a mean of 2, and 8 of DeepSeek-V3's 256 at 1, one launch was faster in each of 20 steps in FP8, uniform and skewed, by 7 and 8 %
(`benchmarks/results/h100-ep-choice-fp8.json`), in bf16 by 2 % at 2; from 4 on the ragged form is 1-7 % ahead of the best static config. A race
in which tokens were those alone that name an expert of the rank, which get 1.5 to 4 times as many each, said 1."""
PREFILL = Tile(256, 8, 4, 128, most=128)
# Of the best config for each token count: time over the best of each workload, geometric mean over routings, OLMoE / Qwen3-30B:
# one launch or two   FP8: 1.02 or 1.04 / 1.03 or 1.01 at a mean of 2, 1.04 or 1.03 / 1.03 or 1.01 at 3
#                     bf16: 1.01 or 1.03 / 1.02 or 1.01 at 4, 1.04 or 1.02 / 1.04 or 1.01 at 8
# two or prefill      FP8, H100: 1.01 or 1.03 at 16, 1.03 or 1.00 at 32; bf16, H200: prefill is the best at 128 and more
# narrow tiles        one token of Qwen3-30B makes 96 tiles of 128 rows: 1.11 in FP8, where 64 rows have 1.00; OLMoE makes 128, and
#                     64 of 256 rows are as good
# block_m             in FP8 at 2 to 24: 1.02, worst 1.09 (4 + 2 for each token: 1.02, worst 1.11; held out 1.03 both); bf16 at 4 to
#                     24: 1.02, worst 1.08 (28 + 3: worst 1.12); 112 from 48 on 1.02, where 88 or 144 have 1.04-1.10
# Ragged: race of 2026-11-27 on four H100s (`benchmarks/results/h100-race-issue16.json`): OLMoE, Qwen3-30B, DeepSeek-V3 on eight
# tensor-parallel ranks, and on ranks with 32 and 8 of its experts. At 6-96, 128-384, 512-1024 tokens, means of layers, even or skewed:
# best of others over its best   bf16: 0.96-1.00, 0.99-1.01, 0.99-1.03; FP8: 0.93-0.99, 0.97-1.01, 0.83-0.99, behind where prefill serves
# others' default over its best  bf16: 0.99-1.08, 1.00-1.23, 1.00-1.29; FP8: 0.98-1.08, 0.99-1.13, 0.83-1.04
#   whole layers, at a mean of   bf16: 1.01 at 0.5, 1.03 at 2, 1.02-1.07 at 4; FP8: 0.98-1.05 at 2, 0.99-1.00 at 4, 1.00-1.02 at 8 and 16
# block_m                        best most often in bf16: 64 up to a mean of 8, 96 at 16, 64-144 at 32; in FP8: 40 up to 8, 40 or 64 at 16
#   one H100, bf16, best of others over the config of the rule (one run more): OLMoE at a mean of 2 0.97 (one launch is the best), 8 0.99,
#   32 1.00, 64 0.99; Qwen3-30B at 4 1.00, 16 1.00, 32 1.00
RULES = {
    "fp8": Rule(
        *(2, 24, Tile(16, 4, 6, 8), Tile(32, 4, 4, 8)),
        {0: Tile(64, 4, 4, 16, 1.5, 56)},
        {6: Tile(64, 4, 4, 40, most=40), 12: Tile(32, 8, 4, 64, most=64)},
    ),
    "bf16": Rule(
        *(4, 128, Tile(16, 4, 6, 8), Tile(32, 4, 6, 8, 2, 48)),
        {0: Tile(32, 4, 6, 24, 3, 88), 48: Tile(32, 8, 4, 112, most=112), 120: Tile(32, 8, 4, 144, most=144)},
        {2.5: Tile(32, 4, 6, 64, most=64), 12: Tile(32, 4, 6, 96, most=96), 48: Tile(32, 8, 4, 112, most=112)}
        | {96: Tile(32, 8, 4, 144, most=144)},
    ),
}


def default(configs: Sequence[Mapping[str, Any]], shape: MoEShape, num_tokens: int) -> int:
    """Index of the one among configs of the adapter that serves `num_tokens` tokens of a layer; of every rank with experts here."""
    rule, forms = RULES[shape.dtype], {config["form"] for config in configs}
    mean = num_tokens * shape.top_k / shape.num_experts
    form, tile = _choose(rule, forms, shape, mean)
    want = {"form": form, **tile.keys(mean)}
    return min(range(len(configs)), key=lambda index: _apart(configs[index], want))


def lacking(configs: Sequence[Mapping[str, Any]], shape: MoEShape) -> str | None:
    """Why the defaults among these configs are not what was measured, in a clause; None where each is near what the rule wants.

    A library may lack a form, or a layer's sizes be such that only narrow tiles divide them. Best of vLLM's Triton kernel over
    such defaults at 513 tokens and more, means of the tables of OLMoE and Qwen3-30B: one launch alone 0.36 in FP8 and 0.58-0.67 in
    bf16, tiles of 64 rows 0.35 and 0.75, of 128 rows 0.91 in FP8 and 1.05-1.08 in bf16. Two launches alone stay ahead everywhere. So does
    the ragged form, whose full tiles are theirs: in the race above vLLM's own config takes 1.02-2.00 of its best config's time at each
    number of tokens up to 1024, in the mean of routings. A library without it has what was measured before it.
    """
    rule, forms = RULES[shape.dtype], {config["form"] for config in configs}
    rows, whole = rule.two[0].block_n * rule.two[0].warp_n, forms | (set(FORMS) - {"ragged"})
    for num_tokens in (1 << power for power in range(17)):
        mean = num_tokens * shape.top_k / shape.num_experts
        (form, _), (_, tile) = _choose(rule, whole, shape, mean), _choose(rule, forms, shape, mean)
        found, block_m = configs[default(configs, shape, num_tokens)], tile.keys(mean)["block_m"]
        narrow = found["form"] == "two" and found["block_n"] * found["warp_n"] < rows
        if (
            found["form"] not in (form, "two", "ragged")
            or narrow
            or abs(found["block_m"] - block_m) > max(24, block_m / 2)
        ):
            its = " ".join(f"{key}={value}" for key, value in found.items() if key != "group_m")
            return f"the CuTe kernels here have nothing near their default for {num_tokens} tokens, {its} at best"
    return None


def _choose(rule: Rule, forms: set[str], shape: MoEShape, mean: float) -> tuple[str, Tile]:
    if "prefill" in forms and (mean >= rule.prefill_from or forms == {"prefill"}):
        return "prefill", PREFILL
    least = min(rule.ragged) if shape.num_local_experts == shape.num_experts else RAGGED_OF_SOME_FROM
    others = "two" in forms or ("one" in forms and mean <= rule.one_to)
    if "ragged" in forms and (mean >= least or not others):
        return "ragged", _tile(rule.ragged, mean)
    if "one" in forms and (mean <= rule.one_to or "two" not in forms):
        slots = mean * shape.num_local_experts
        tiles = slots * 2 * shape.intermediate_size / (rule.one.block_n * rule.one.warp_n)
        return "one", rule.narrow if tiles < 0.75 * SMS else rule.one
    return "two", _tile(rule.two, mean)


def _tile(tiles: Mapping[float, Tile], mean: float) -> Tile:
    """The last that is for a mean; the first below all."""
    return [tile for least, tile in tiles.items() if least <= max(mean, min(tiles))][-1]


def _apart(config: Mapping[str, Any], want: Mapping[str, Any]) -> tuple[float, ...]:
    """How far a config is from a wanted one: 8 tokens of a tile cost as much as another count of warps."""
    same = {key: config[key] == value for key, value in want.items()}
    tile = abs(config["block_m"] - want["block_m"]) / 8 + 2 * (not same["block_n"]) + (not same["warp_n"])
    return not same["form"], tile + 0.5 * abs(config["stages"] - want["stages"]), config["group_m"]
