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
_ACTIVATION = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")
_SILU = ("silu", "swish", "swiglu", "swish_glu")
# Where composite configs keep the language model, and DBRX its feed-forward sizes.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "ffn_act_fn")
# float32 checkpoints are served in bf16 where the GPU has it.
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "bf16", "float": "bf16"}
# Layers whose arithmetic is not SiLU(gate) * up without biases, whatever else the config says.
_UNSUPPORTED = {
    "gpt_oss": "its experts have biases and a clamped, interleaved activation",
    "llama4": "it weights the tokens before the experts",
    "llama4_text": "it weights the tokens before the experts",
}
GROUP = 128


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
    activation = _first(config, _ACTIVATION)
    if activation is not None and str(activation).lower() not in _SILU:
        raise InputError(f"{where} has the activation {activation!r}; our kernels compute SiLU-gated experts only.")
    experts, top_k, hidden, inter = (
        _numbers(config, names, where) for names in (_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE)
    )
    stored = dtype or _dtype(config, where)
    if tp_size < 1:
        raise InputError(f"tp_size is {tp_size}; give at least 1.")
    shapes = []
    for num_experts, k, intermediate_size, hidden_size in _together(experts, top_k, inter, hidden):
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
    except (OSError, ValueError) as error:
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


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _numbers(config: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[int, ...]:
    """One number for all layers, or one for each."""
    found = _first(config, names)
    values = found if isinstance(found, list) else [found]
    if not values or not all(isinstance(value, int) and value >= 0 for value in values):
        raise InputError(f"{where} names none of {', '.join(names)} as whole numbers; is it a mixture of experts?")
    return tuple(values)


def _together(*columns: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Layer by layer: a single number stands for every layer; layers without experts are left out."""
    layers = max(len(column) for column in columns)
    wide = [column * layers if len(column) == 1 else column for column in columns]
    return [row for row in zip(*wide, strict=False) if row[0] > 1]


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
    quantised = config.get("quantization_config") or config.get("compression_config")
    if isinstance(quantised, Mapping) and quantised:
        if _block_fp8(quantised):
            return "fp8"
        raise InputError(
            f"{where} is quantised as {_method(quantised)}; our kernels run bf16, fp16 and FP8 with 128x128 scale blocks."
        )
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if stored not in _DTYPES:
        raise InputError(f"{where} has the dtype {stored!r}; use bfloat16, float16 or FP8 weights, or pass --dtype.")
    return _DTYPES[stored]


def _block_fp8(quantised: Mapping[str, Any]) -> bool:
    if quantised.get("quant_method") == "fp8":
        return list(quantised.get("weight_block_size") or ()) == [GROUP, GROUP]
    groups = quantised.get("config_groups")
    if quantised.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return False
    weights = [group.get("weights") or {} for group in groups.values()]
    return bool(weights) and all(
        its.get("type") == "float"
        and its.get("num_bits") == 8
        and its.get("strategy") == "block"
        and list(its.get("block_structure") or ()) == [GROUP, GROUP]
        for its in weights
    )


def _method(quantised: Mapping[str, Any]) -> str:
    block = quantised.get("weight_block_size")
    return f"{quantised.get('quant_method', 'something unnamed')}{f' in blocks of {block}' if block else ''}"
