"""`TunedFile`: an engine's file of configs by token count, what its name says it is for, and where a table has them."""

import codecs
import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from rampwrap.errors import InputError
from rampwrap.kernel.protocol import MEMBER, Config, config_key
from rampwrap.kernel.shape import MoEShape
from rampwrap.schema import MOST_TOKENS, parse

# How vLLM and SGLang spell what other kernels call block_m, ...
SPELLING = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
}
ENGINE_DEFAULTS = {"group_m": 1, "num_warps": 4, "num_stages": 3}
"What the engines' kernel runs where an entry does not say: Triton's own defaults."
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "SPLIT_K": (1,),
    "USE_TMA": (False,),
    "num_ctas": (1,),
    "waves_per_eu": (0,),
    "kpack": (1,),
}
"Values of keys that say no more than that the key is not used; without them the config is the same."
KERNELS = {
    "alpha_moe": frozenset({"block_m", "block_n", "warp_n", "stages"}),
    "cute_moe": frozenset({"form", "block_m", "block_n", "warp_n", "stages", "group_m"}),
    "triton_fused_moe": frozenset({*SPELLING.values(), "num_warps", "num_stages", "swap_ab"}),
}
"Whose configs have which keys; the engines' own are told by their spelling."
ENGINE_KERNEL = "vllm_fused_moe"
"The kernel of vLLM's and SGLang's files, of which they share the source."
DTYPES = {
    "": ("bf16", "fp16"),
    "bf16": ("bf16",),
    "bfloat16": ("bf16",),
    "fp16": ("fp16",),
    "float16": ("fp16",),
    "fp8_w8a8": ("fp8",),
    "float8": ("fp8",),
}
"What the engines write into a file's name, and the dtypes of a `MoEShape` that it means; their others have none."
# The largest of vLLM 0.33 and SGLang 0.5.23 has 6 KB.
MAX_BYTES = 1 << 22


@attrs.frozen
class LayerName:
    """What a tuned file's name says: ``E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128]``."""

    experts: int
    "On one rank."
    intermediate_size: int
    device: str = ""
    dtype: str = ""
    block_shape: tuple[int, ...] = ()
    down: bool = False
    "SGLang's configs of the second GEMM alone."

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> "LayerName | None":
        """Reads a name; None where it names no layer.

        Raises:
            InputError: it names something else, a dense GEMM or a kernel of other operands.
        """
        stem = pathlib.Path(path).name.removesuffix(".json")
        down = stem.endswith("_down")
        found = re.findall(r"(\w+)=(\[[^\]]*\]|[^,]*)", stem.removesuffix("_down"))
        said = dict(found)
        if {"N", "K"} <= set(said) or {"E", "N1"} <= set(said):
            raise InputError(
                f"{os.fspath(path)} is by its name no file of a fused MoE layer; give one named E=..,N=..."
            )
        if not {"E", "N"} <= set(said):
            return None
        try:
            blocks = tuple(int(part) for part in said.get("block_shape", "[]").strip("[]").split(",") if part.strip())
            experts, size = int(said["E"]), int(said["N"])
        except ValueError as error:
            raise InputError(f"the name of {os.fspath(path)} is not understood ({error}); name it E=..,N=...") from None
        return cls(experts, size, said.get("device_name", ""), said.get("dtype", ""), blocks, down)

    def other_layer(self, shape: MoEShape) -> str:
        """What of the layer is another than `shape`, in words; empty where nothing is."""
        told = ("E", self.experts, shape.num_local_experts), ("N", self.intermediate_size, shape.intermediate_size)
        pairs = [(f"{name}={said}", f"{name}={wanted}") for name, said, wanted in told if said != wanted]
        if shape.dtype not in DTYPES.get(self.dtype, ()):
            pairs.append((f"dtype {self.dtype or 'bf16'}", f"dtype {shape.dtype}"))
        theirs, ours = (", ".join(pair[side] for pair in pairs) for side in (0, 1))
        return f"{theirs} where the table has {ours}" if pairs else ""

    def other_scales(self, shape: MoEShape, kernel: str) -> str:
        """How its FP8 scales differ from the table's, in words; empty where they do not or nothing says so."""
        if shape.dtype != "fp8":
            return f"scale blocks of {list(self.block_shape)} where the table has none" if self.block_shape else ""
        wanted = () if kernel.endswith("per_tensor") or not shape.scale_group else (shape.scale_group,) * 2
        if self.block_shape == wanted:
            return ""
        words = [f"blocks of {list(b)}" if b else "one a tensor or channel" for b in (self.block_shape, wanted)]
        return f"FP8 scales, {words[0]}, where the table has {words[1]}"

    def other_device(self, device: str) -> bool:
        """Whether its GPU is another than `device`; vLLM reads the file of the H200 on all of that family."""
        if not self.device:
            return False
        ours = re.sub(r"[\s/]+", "_", device)
        return self.device != ours and not (self.device == "NVIDIA_H200" and "H200" in ours.split("_"))


@attrs.frozen
class Found:
    """Where a table's configs stand in a tuned file."""

    indices: dict[int, int]
    "Index of the config, by token count, of the entries that the table has."
    completed: tuple[int, ...]
    "Token counts whose entry names no num_warps, num_stages or group_m; the engines' defaults were taken."
    ignored: dict[str, int]
    "Entries with a key that no config of the table has, and that says something there; by key."


@attrs.frozen
class TunedFile:
    """Configs by token count, as an engine's tuner wrote them.

    Attributes:
        path: where it was read.
        layer: what its name says; None where it says nothing.
        entries: config by token count, ascending, in the words that our kernels have.
        engine: spelled as vLLM and SGLang do.
        halfway: token counts as far from one entry as from the next, for which the file names the higher first: the
            engines take that one.
    """

    path: str
    layer: LayerName | None
    entries: dict[int, dict[str, Any]]
    engine: bool
    halfway: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "TunedFile":
        """Reads ``{"64": {"BLOCK_SIZE_M": 16, ...}}`` of vLLM or SGLang, or the like of other kernels.

        Raises:
            InputError: it cannot be read, or is something else.
        """
        path = os.fspath(path)
        layer = LayerName.parse(path)
        try:
            with pathlib.Path(path).open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES >> 20} MB")
            entries = _entries(parse(content.removeprefix(codecs.BOM_UTF8)))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is not a tuned config file ({error}); give JSON of the form {{'64': {{...}}}}."
            ) from error
        engine = any(key in SPELLING for config in entries.values() for key in config)
        place = {count: number for number, count in enumerate(entries)}
        pairs = itertools.pairwise(sorted(entries))
        halfway = tuple((a + b) // 2 for a, b in pairs if (a + b) % 2 == 0 and place[b] < place[a])
        return cls(path, layer, {count: spelled(entries[count]) for count in sorted(entries)}, engine, halfway)

    @property
    def kernel(self) -> str | None:
        """The kernel whose configs these are; None where their keys do not tell."""
        keys = {frozenset(config) - {"split_k", MEMBER} for config in self.entries.values()}
        found = next((name for name, own in KERNELS.items() if keys == {own}), None)
        tiles = self.engine and all({"block_m", "block_n", "block_k"} <= its for its in keys)
        return found or (ENGINE_KERNEL if tiles else None)

    def foreign(self, configs: Sequence[Config], kernel: str = "") -> str:
        """Why the entries are another kernel's configs, in words; empty where they may be these."""
        given = {key for config in self.entries.values() for key in config} | set(self._defaults)
        names = {key for config in configs for key in spelled(config)}
        lacking = set.intersection(*(set(spelled(config)) for config in configs)) - given
        if lacking:
            return f"whose configs have {', '.join(sorted(lacking))} too"
        if not names & given:
            return "whose configs share no key with it"
        base = kernel.removesuffix("_per_tensor")
        if self.kernel and base in (*KERNELS, ENGINE_KERNEL) and base != self.kernel:
            return f"its entries are configs of {self.kernel}"
        return ""

    def find(self, configs: Sequence[Config]) -> Found:
        """Where the entries stand among `configs`; those that are not there are left out."""
        names = {name for config in configs for name in spelled(config)}
        where = {config_key(spelled(config)): index for index, config in enumerate(configs)}
        defaults = {key: value for key, value in self._defaults.items() if key in names}
        deep = min(self.layer.block_shape, default=0) if self.layer else 0
        indices, completed, ignored = {}, [], Counter[str]()
        for count, entry in self.entries.items():
            config = {**defaults, **{key: value for key, value in entry.items() if key in names}}
            # The engines cut tiles that are deeper than a scale block.
            cut = {**config, "block_k": deep} if deep and _above(config.get("block_k"), deep) else config
            index = where.get(config_key(config), where.get(config_key(cut)))
            if index is None:
                continue
            indices[count] = index
            if not set(defaults) <= set(entry):
                completed.append(count)
            ignored.update(key for key in set(entry) - names if entry[key] not in NEUTRAL.get(key, ()))
        return Found(indices, tuple(completed), dict(sorted(ignored.items())))

    @property
    def _defaults(self) -> Mapping[str, int]:
        return ENGINE_DEFAULTS if self.engine else {}


def spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the engines' keys in the words of our kernels."""
    return {SPELLING.get(key, key): value for key, value in config.items()}


def _above(value: Any, limit: int) -> bool:
    return isinstance(value, int) and value > limit


def _entries(raw: Any) -> dict[int, dict[str, Any]]:
    """Configs by token count. Other values than objects are notes of the tuner, such as ``triton_version``."""
    if not isinstance(raw, dict):
        raise ValueError("it holds no object")
    entries: dict[int, dict[str, Any]] = {}
    for key, value in raw.items():
        count = int(key) if key.isascii() and key.isdigit() and len(key) < 16 else 0
        if not 1 <= count <= MOST_TOKENS:
            if isinstance(value, str):
                continue
            raise ValueError(f"the key {key[:40]!r} is no number of tokens up to {MOST_TOKENS}")
        if not isinstance(value, dict) or not value:
            raise ValueError(f"the entry of {count} tokens is no config")
        for name, setting in value.items():
            if not isinstance(setting, (bool, int, str)):
                raise ValueError(f"{name[:40]!r} of {count} tokens is no whole number, word, true or false")
        if count in entries:
            raise ValueError(f"{count} tokens are there twice")
        entries[count] = value
    if not entries:
        raise ValueError("it has no entry")
    return entries
