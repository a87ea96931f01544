"""How a checkpoint stores the experts of each layer: as they are computed, in FP8 with blocks of scales, or otherwise.

The experts are told apart from the dense layers around them: they may be exempt, alone in a group, or in another format.
Patterns of module names are matched as vLLM, SGLang and transformers match them, against the names that experts have in
published checkpoints.
"""

import fnmatch
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from rampwrap.checkpoint.config import short
from rampwrap.errors import InputError

GROUP = 128
_FIELDS = ("quantization_config", "compression_config")
_BLOCK_FP8 = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [GROUP, GROUP]}
_OTHER_SCALES = {
    "fp8_channel": ("channel", ("token",)),
    "fp8_tensor": ("tensor", ("tensor", "token")),
    "fp8_static": ("static", ("tensor",)),
}
"Forms without blocks: their scales, as `MoEShape` names them, and compressed-tensors' strategies for activations."
_EXEMPT = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude", "llm_int8_skip_modules")
"Lists of modules that a quantisation leaves alone, by the names that its methods have for them."
_FP8_NAMES = ("fp8", "fp8_e4m3", "float8_e4m3fn")
_FP4_NAMES = ("fp4", "mxfp4", "float4_e2m1fn_x2")
_PLAIN_NAMES = ("bf16", "bfloat16", "fp16", "float16", "half")

# Where experts are in published checkpoints: a prefix, the block of a layer, the projections of an expert.
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe", "mixer")
_PROJECTIONS = (
    (".0.gate_proj", ".0.up_proj", ".0.down_proj"),
    (".0.w1", ".0.w3", ".0.w2"),
    (".gate_up_proj", ".down_proj"),
)
_CLASS = re.compile(r"Linear|\w*(MoE|Experts)\w*")
MOST_PATTERNS = 10_000
MOST_SECONDS = 10


PLAIN = "plain"
FORMS = {
    PLAIN: "as computed",
    "fp8_block": "FP8 with blocks of scales",
    "fp8_channel": "FP8 with scales for channels and tokens",
    "fp8_tensor": "FP8 with a scale for each tensor",
    "fp8_static": "FP8 with a scale for each tensor, activations too",
    "int4": "INT4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "other": "another form",
}
"Forms in which experts are stored, in words; an engine chooses its kernel by them."
_MODELOPT = {"FP8": "fp8_static", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel", "MXFP8": "mxfp8", "NVFP4": "nvfp4"}


@attrs.frozen
class Stored:
    """The form of a layer's experts.

    Attributes:
        dtype: ``fp8`` for FP8 weights and activations, "" for whatever the model is computed in.
        why_not: the field that says otherwise, for a sentence; then no kernel of ours runs them.
        form: of `FORMS`.
        scales: of FP8, as `MoEShape` names them.
    """

    dtype: str = ""
    why_not: str = ""
    form: str = attrs.field(validator=attrs.validators.in_(FORMS))

    @form.default
    def _usual(self) -> str:
        return "other" if self.why_not else "fp8_block" if self.dtype == "fp8" else PLAIN

    scales: str = "block-128"


Reader = Callable[[int], Stored]
"The form of a layer's experts by the layer's number."


def reader_of(config: Mapping[str, Any], beside: Any, where: str) -> Reader:
    """What the config of a model says of its experts' form.

    Args:
        config: of the language model, flat.
        beside: the content of ``hf_quant_config.json``, in which ModelOpt says what config.json does not; None without.
        where: the config's path, for messages.

    Raises:
        InputError: patterns of module names that are none.
    """
    field, quantised = next(((name, config[name]) for name in _FIELDS if config.get(name)), ("", None))
    if quantised is None and beside is not None:
        field, quantised = "hf_quant_config.json", beside
    of_quantised = _reader(field, quantised, where)
    named = config.get("expert_dtype")
    if named is None:
        return of_quantised
    if isinstance(named, str) and named.lower() in _PLAIN_NAMES:
        return _always(Stored())
    four_bits = isinstance(named, str) and named.lower() in _FP4_NAMES
    other = Stored(why_not=f"expert_dtype={short(named)}", form="mxfp4" if four_bits else "other")
    if isinstance(named, str) and named.lower() in _FP8_NAMES:
        return lambda layer: other if (its := of_quantised(layer)) == Stored() else its
    return _always(other)


def _always(its: Stored) -> Reader:
    return lambda layer: its


def _reader(field: str, quantised: Any, where: str) -> Reader:
    if quantised is None:
        return _always(Stored())
    if not isinstance(quantised, Mapping):
        return _always(Stored(why_not=f"{field}={short(quantised)}"))
    method = quantised.get("quant_method")
    inner = quantised.get("quantization", quantised) if method in (None, "modelopt") else quantised
    if not isinstance(inner, Mapping):
        return _always(Stored(why_not=f"{field}.quantization={short(inner)}"))
    modelopt = method == "modelopt" or (method is None and "quant_algo" in inner)
    exempt = _exempt(inner, field, where)
    read_form = _READERS.get(method if isinstance(method, str) else "", _other)
    form = (_modelopt if modelopt else read_form)(inner, field, where)
    by_name = inner.get("moe_quant_algo")

    def read(layer: int) -> Stored:
        hit = exempt(layer)
        if hit is None:
            return Stored(why_not=f"{field} exempts only some projections of its experts")
        if hit:
            return Stored()
        if by_name is not None:
            return Stored(why_not=f"{field}.moe_quant_algo={short(by_name)}")
        return form(layer)

    return functools.cache(read)


def _exempt(quantised: Mapping[str, Any], field: str, where: str) -> Callable[[int], bool | None]:
    lists = [names_of(quantised.get(name), f"{field}.{name}", where) for name in _EXEMPT]
    dynamic = quantised.get("dynamic")  # of GPTQ: "-:" and a regular expression, for modules that stay as they are
    if isinstance(dynamic, Mapping):
        lists.append([f"re:{key[2:]}" for key in dynamic if isinstance(key, str) and key.startswith("-:")])
    patterns = Patterns([name for its in lists for name in its], field, where)
    return patterns.experts


def _fp8(quantised: Mapping[str, Any], field: str, where: str) -> Reader:
    block, scheme = quantised.get("weight_block_size"), quantised.get("activation_scheme", "dynamic")
    kind = quantised.get("fmt") or "e4m3"
    its = Stored("fp8")
    form = "fp8_block" if block is not None else "fp8_static" if scheme == "static" else "fp8_tensor"
    if block is None:
        its = Stored("fp8", form=form, scales=_OTHER_SCALES[form][0])
    elif block != [GROUP, GROUP]:
        its = Stored(why_not=f"{field} of quant_method 'fp8' with weight_block_size={short(block)}", form=form)
    if its.dtype and scheme != "dynamic" and form != "fp8_static":
        its = Stored(why_not=f"{field}.activation_scheme={short(scheme)}", form=form)
    elif its.dtype and kind not in ("e4m3", "float8_e4m3fn"):
        its = Stored(why_not=f"{field}.fmt={short(kind)}")
    return _always(its)


def _compressed(quantised: Mapping[str, Any], field: str, where: str) -> Reader:
    """A group whose targets name the experts counts before one for all linear layers; without either they are as computed."""
    groups = quantised.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return _always(Stored(why_not=f"{field}.config_groups={short(groups)}"))
    read: list[tuple[Patterns, bool, Stored]] = []
    for name, group in groups.items():
        place = f"{field}.config_groups.{short(name)[1:-1]}"
        targets = group.get("targets") if isinstance(group, Mapping) else None
        names = names_of(targets, f"{place}.targets", where)
        every = targets is None or any(_CLASS.fullmatch(its) for its in names)
        read.append(
            (Patterns([its for its in names if not _CLASS.fullmatch(its)], place, where), every, _group(group, place))
        )

    def form(layer: int) -> Stored:
        for patterns, _, its in read:
            hit = patterns.experts(layer)
            if hit is None:
                return Stored(why_not=f"{field}.config_groups name only some projections of its experts")
            if hit:
                return its
        return next((its for _, every, its in read if every), Stored())

    return form


def _group(group: Any, place: str) -> Stored:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return Stored(why_not=f"{place} has no weights")
    activations = group.get("input_activations", {})
    form = _form(weights, activations)
    scales, strategies = _OTHER_SCALES.get(form, ("block-128", ()))
    for key, wanted in ({} if strategies else _BLOCK_FP8).items():
        if weights.get(key) != wanted:
            return Stored(why_not=f"{place}.weights.{key}={short(weights.get(key))}", form=form)
    if not isinstance(activations, Mapping):  # null: weights alone are quantised
        return Stored(why_not=f"{place}.input_activations={short(activations)}")
    if not activations.get("dynamic", True) and form != "fp8_static":
        return Stored(why_not=f"{place}.input_activations.dynamic={short(activations['dynamic'])}")
    if strategies and weights.get("symmetric", True) is not True:
        return Stored(why_not=f"{place}.weights.symmetric={short(weights['symmetric'])}", form=form)
    if strategies and activations.get("strategy", "tensor") not in strategies:
        return Stored(why_not=f"{place}.input_activations.strategy={short(activations.get('strategy'))}", form=form)
    return Stored("fp8", form=form, scales=scales)


def _form(weights: Mapping[str, Any], activations: Any) -> str:
    """The form of a group of compressed-tensors, as far as it says."""
    kind, bits, strategy = (weights.get(name) for name in ("type", "num_bits", "strategy"))
    if kind == "int" and bits == 4:
        return "int4"
    if kind == "float" and bits == 4:
        return "nvfp4" if weights.get("group_size") == 16 else "mxfp4" if weights.get("group_size") == 32 else "other"
    if kind != "float" or bits != 8 or not isinstance(activations, Mapping):
        return "other"
    static = not activations.get("dynamic", True)
    forms = {"block": "fp8_block", "channel": "fp8_channel", "tensor": "fp8_static" if static else "fp8_tensor"}
    return forms.get(strategy, "other") if isinstance(strategy, str) else "other"


def _modelopt(quantised: Mapping[str, Any], field: str, where: str) -> Reader:
    """``FP8`` has static activations; it may quantise the cache alone, or other modules than the experts."""
    algo = quantised.get("quant_algo")
    if algo is None:
        return _always(Stored())
    named = quantised.get("quantized_layers")
    if algo != "MIXED_PRECISION" or not isinstance(named, Mapping):
        kind = _MODELOPT.get(algo, "other") if isinstance(algo, str) else "other"
        if kind == "fp8_static":
            return _always(Stored("fp8", form=kind, scales=_OTHER_SCALES[kind][0]))
        return _always(Stored(why_not=f"{field}.quant_algo={short(algo)}", form=kind))
    patterns = Patterns([str(key) for key in named], f"{field}.quantized_layers", where)
    kinds = sorted({str(its.get("quant_algo")) for its in named.values() if isinstance(its, Mapping)})

    named_ones = Stored(why_not=f"{field}.quantized_layers in {', '.join(kinds)}")

    def form(layer: int) -> Stored:
        return Stored() if patterns.experts(layer) is False else named_ones

    return form


def _other(quantised: Mapping[str, Any], field: str, where: str) -> Reader:
    method, bits = quantised.get("quant_method"), quantised.get("bits", quantised.get("w_bit"))
    form = "mxfp4" if method == "mxfp4" else "int4" if method in ("awq", "gptq") and bits == 4 else "other"
    return _always(Stored(why_not=f"{field}.quant_method={short(method)}", form=form))


_READERS: dict[Any, Callable[[Mapping[str, Any], str, str], Reader]] = {"fp8": _fp8, "compressed-tensors": _compressed}


def names_of(value: Any, place: str, where: str) -> list[str]:
    """A list of module names, none where there is no list.

    Raises:
        InputError: it is no list of texts.
    """
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MOST_PATTERNS or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} has {place}={short(value)}; give a list of at most {MOST_PATTERNS} module names.")
    return names


class Patterns:
    """Names, globs and regular expressions (``re:...``) of modules, asked for the experts of a layer."""

    def __init__(self, names: Iterable[str], place: str, where: str) -> None:
        self._names: set[tuple[str, ...]] = set()
        self._place, self._seconds = f"the patterns of {place} in {where}", 0.0
        expressions = []
        self._found: dict[int, bool | None] = {}
        self._all_alike = True  # where no layer is named by its number
        for name in dict.fromkeys(names):
            self._all_alike &= not re.search(r"\d", re.sub(r"\bexperts\.\d+", "", name))
            if name.startswith("re:"):
                expressions.append(_expression(name[3:], place, where))
            elif any(sign in name for sign in "*?["):
                expressions.append(fnmatch.translate(name))
            else:
                # What is said of one expert holds for all: engines refuse a layer of several kinds.
                self._names.add(tuple(re.sub(r"\bexperts\.\d+", "experts.0", name).split(".")))
        self._expressions = [re.compile(its) for its in dict.fromkeys(expressions)]

    def experts(self, layer: int) -> bool | None:
        """Whether the experts of a layer are meant; None for some of their projections only."""
        number = 0 if self._all_alike else layer
        if number not in self._found:
            self._found[number] = self._of_layer(number)
        return self._found[number]

    def _of_layer(self, layer: int) -> bool | None:
        if not self._names and not self._expressions:
            return False
        start, some = time.monotonic(), False
        for block in _BLOCKS:
            module = f"layers.{layer}.{block}.experts"
            if self._hit(module):
                return True
            for projections in _PROJECTIONS:
                hits = [self._hit(module + projection) for projection in projections]
                if all(hits):
                    return True
                some = some or any(hits)
        self._seconds += time.monotonic() - start
        if self._seconds > MOST_SECONDS:
            raise InputError(f"{self._place} take over {MOST_SECONDS} s to match; pass --dtype in their place.")
        return None if some else False

    def _hit(self, module: str) -> bool:
        for prefix in _PREFIXES:
            parts = tuple(f"{prefix}{module}".split("."))
            spans = ((start, end) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
            if self._names and any(parts[start:end] in self._names for start, end in spans):
                return True
            if any(its.match(f"{prefix}{module}") for its in self._expressions):
                return True
        return False


def _expression(text: str, place: str, where: str) -> str:
    """A regular expression of a config, refused where it is none or might never come to an end."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"{where} has the pattern {short(text)} in {place}, which is none ({error}); mend it."
        ) from None
    # Four repeats on 60 letters are 500,000 ways at most; those of digits are few, repeated groups are without bound.
    repeats = re.findall(r"[*+{]", re.sub(r"(\\d|\[0-9\])[*+]", "", text))
    if len(text) > 1000 or re.search(r"\)[*+{]", text) or len(repeats) > 4:
        raise InputError(
            f"{where} has the pattern {short(text)} in {place}, too intricate to be matched in time; pass --dtype instead."
        )
    return text
