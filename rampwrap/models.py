"""A model's `config.json` as the shapes of its MoE layers on one rank."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from rampwrap.errors import InputError
from rampwrap.kernel import MoEShape

# One quantity, the names it has in published configs; the first one present counts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_INTERMEDIATE = ("moe_intermediate_size", "expert_intermediate_size", "ffn_hidden_size", "intermediate_size")
_ACTIVATION = ("ffn_act_fn", "mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")
_SILU = ("silu", "swish", "swiglu", "swish_glu")
# Where composite configs keep the language model, and DBRX its feed-forward sizes.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")
_QUANTISED = ("quantization_config", "compression_config")
# float32 checkpoints are served in bf16 where the GPU has it.
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "bf16", "float": "bf16"}
# Layers whose arithmetic is not SiLU(gate) * up without biases, whatever else the config says.
_UNSUPPORTED = {
    "gpt_oss": "its experts have biases and a clamped, interleaved activation",
    "llama4": "it weights the tokens before the experts",
    "llama4_text": "it weights the tokens before the experts",
}
GROUP = 128
_BLOCK_FP8 = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [GROUP, GROUP]}
MOST = 1 << 24
"No size of a layer is larger; a config that says so is damaged."


def read_model(
    model: str | os.PathLike[str], *, tp_size: int = 1, expert_parallel: bool = False, dtype: str | None = None
) -> tuple[MoEShape, ...]:
    """The shapes of a model's routed layers on one rank, each once.

    Args:
        model: the folder with ``config.json``, or the file itself.
        tp_size: tensor-parallel ranks; each has a slice of every expert.
        expert_parallel: the ranks share out whole experts instead; where they do not come out even, the first ranks
            have one more and there are two shapes.
        dtype: ``bf16``, ``fp16`` or ``fp8``, in place of what the config says.

    Raises:
        InputError: no readable config, no routed layer, or one that our kernels do not compute; with the reason.
    """
    where, raw = read_config(model)
    config = _flat(raw)
    kind = str(config.get("model_type", ""))
    if kind in _UNSUPPORTED:
        raise InputError(f"model {kind} of {where} cannot be profiled: {_UNSUPPORTED[kind]}; leave it to the engine.")
    field, activation = _first(config, _ACTIVATION)
    if isinstance(activation, Mapping):  # DBRX: {"name": "silu"}, which is what it has without a name too
        field, activation = f"{field}.name", activation.get("name")
    if activation is not None and str(activation).lower() not in _SILU:
        raise InputError(
            f"{where} has the activation {field}={_short(activation)}; our kernels compute SiLU-gated experts only."
        )
    experts, top_k, hidden, inter = (
        _numbers(config, names, where) for names in (_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE)
    )
    stored = dtype or _dtype(config, where)
    if tp_size < 1:
        raise InputError(f"tp_size is {tp_size}; give at least 1.")
    shapes = []
    for num_experts, k, intermediate_size, hidden_size in _together(where, experts, top_k, inter, hidden):
        whole = MoEShape(num_experts, k, hidden_size, intermediate_size, stored)
        shapes += _on_a_rank(whole, tp_size, expert_parallel, where)
    if not shapes:
        raise InputError(f"{where} has no layer with more than one expert; is it a mixture of experts?")
    return tuple(dict.fromkeys(shapes))


def read_config(model: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """The path and the content of a model's ``config.json``.

    Raises:
        InputError: it is not there, or is no JSON object.
    """
    path = pathlib.Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no readable model config ({error}); give the folder of a model with its config.json."
        ) from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no JSON object; give the folder of a model with its config.json.")
    return str(path), raw


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's own settings over those around them."""
    out = dict(raw)
    for name in _NESTED:
        inner = raw.get(name)
        if isinstance(inner, Mapping):
            out |= {key: value for key, value in _flat(inner).items() if value is not None}
    return out


def _first(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of some fields that is there and not null, and its value; the last name and None without any."""
    return next(((name, config[name]) for name in names if config.get(name) is not None), (names[-1], None))


def _short(value: Any) -> str:
    """A value of somebody's config in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _numbers(config: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[int, ...]:
    """One number for all layers, or one for each."""
    name, found = _first(config, names)
    if found is None:
        raise InputError(f"{where} names none of {', '.join(names)} as whole numbers; is it a mixture of experts?")
    values = found if isinstance(found, list) else [found]
    if not values or not all(type(value) is int and 0 <= value <= MOST for value in values):
        raise InputError(
            f"{where} has {name}={_short(found)}; give whole numbers from 0 to {MOST}, one for all layers or one for each."
        )
    return tuple(values)


def _together(where: str, *columns: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Layer by layer: a single number stands for every layer; layers without experts are left out."""
    lengths = sorted({len(column) for column in columns} - {1})
    if len(lengths) > 1:
        raise InputError(
            f"{where} has experts, top_k or sizes for {' and for '.join(map(str, lengths))} layers; they must be as many."
        )
    wide = [column * lengths[0] if lengths and len(column) == 1 else column for column in columns]
    return [row for row in zip(*wide, strict=True) if row[0] > 1]


def _on_a_rank(whole: MoEShape, tp_size: int, expert_parallel: bool, where: str) -> list[MoEShape]:
    experts, inter = whole.num_experts, whole.intermediate_size
    if tp_size == 1:
        return [whole]
    if expert_parallel:
        if tp_size > experts:
            raise InputError(f"{where} has {experts} experts, fewer than {tp_size} ranks; use fewer ranks.")
        least, extra = divmod(experts, tp_size)
        return [attrs.evolve(whole, num_local_experts=local) for local in ([least + 1] if extra else []) + [least]]
    if inter % tp_size:
        raise InputError(f"{tp_size} ranks do not divide intermediate_size={inter} of {where}; use a divisor.")
    return [attrs.evolve(whole, intermediate_size=inter // tp_size)]


def _dtype(config: Mapping[str, Any], where: str) -> str:
    """``fp8`` for weights with 128x128 scale blocks, else what unquantised weights are served in.

    Raises:
        InputError: another quantisation, or an unknown type.
    """
    field, quantised = next(((name, config[name]) for name in _QUANTISED if config.get(name)), ("", None))
    if quantised is not None:
        why = _why_not_block_fp8(quantised)
        if why is None:
            return "fp8"
        raise InputError(
            f"{where} is quantised, {field}{why}; our kernels run bf16, fp16 and FP8 with {GROUP}x{GROUP} scale blocks."
        )
    field, stored = _first(config, ("dtype", "torch_dtype"))
    name = "bfloat16" if stored is None else str(stored).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(
            f"{where} has {field}={_short(stored)}; use bfloat16, float16 or FP8 weights, or pass --dtype."
        )
    return _DTYPES[name]


def _why_not_block_fp8(quantised: Any) -> str | None:
    """None for weights in FP8 with blocks of scales as our kernels read them, else which field says otherwise."""
    if not isinstance(quantised, Mapping):
        return f"={_short(quantised)}"
    method = quantised.get("quant_method")
    if method == "fp8":
        block = quantised.get("weight_block_size")
        return None if block == [GROUP, GROUP] else f" of quant_method 'fp8' with weight_block_size={_short(block)}"
    if method != "compressed-tensors":
        return f".quant_method={_short(method)}"
    groups = quantised.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return f".config_groups={_short(groups)}"
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return f".config_groups.{name} has no weights"
        for key, wanted in _BLOCK_FP8.items():
            if weights.get(key) != wanted:
                return f".config_groups.{name}.weights.{key}={_short(weights.get(key))}"
    return None
