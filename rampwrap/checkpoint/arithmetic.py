"""What layers make of gate and up, and which of them stay with the engine for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from rampwrap.checkpoint.config import first, short
from rampwrap.errors import InputError
from rampwrap.kernel.activation import SILU, SWIGLU_OAI, Activation

_ACTIVATION = ("ffn_act_fn", "mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")
_SILU = ("silu", "swish", "swiglu", "swish_glu")
_CLAMPS = (
    "swiglu_limits",
    "expert_swiglu_limit_list",
    "swiglu_limit",
    "swiglu_clamp_limit",
    "swiglu_alpha",
    "swiglu_beta",
)
"Bounds and slopes that make SiLU(gate) * up another function; one for all layers or one for each, 0 and null are none."
_FIELDS = {"swiglu_limit": "limit", "swiglu_limits": "limit", "swiglu_alpha": "alpha", "swiglu_beta": "beta"}
_CUT_FIRST: dict[str, Activation] = {
    "deepseek_v4": Activation(limit=10.0),
    "glm5_next": Activation(limit=10.0),
    "hy_v4": Activation(limit=10.0),
    "exaone_moe": SILU,
    "minimax_m3": SWIGLU_OAI,
}
"""By the beginning of model_type, models that cut gate and up off before anything else, as `Activation` does, with what their
config classes have where config.json says nothing (it leaves out what is so). Step and Ling cut SiLU's result off instead."""
_GELU_TANH = "gemma4"
"Whose activation is GELU in its tanh form, whatever another field says."
_SWITCHES = ("is_moe", "enable_moe_block")
"False for the dense form of a model that has another with experts."
_WEIGHTED_INPUT = ("moe_apply_router_weight_on_input", "apply_router_weight_on_input")
# Layers whose arithmetic is none of ours, whatever else the config says: by the beginning of
# model_type, or of the architecture where that says more.
_UNSUPPORTED = {
    "gpt_oss": "its experts have biases and a clamped, interleaved activation",
    "openai_privacy_filter": "its experts have biases and a clamped activation",
    "llama4": "it weights the tokens before the experts",
    "muse_spark": "it has a norm after each expert",
    "kimi_k3": "its activation is SiTU",
    "Grok1": "its activation is GELU",
    "doge": "its experts are rows of embeddings",
    "jetmoe": "its attention has experts too, and no engine runs them as fused layers",
    "nemotron_h": "its experts have no gate",
    "nllb-moe": "its experts have no gate",
    "switch_transformers": "its experts have no gate",
}


def arithmetic_of(kinds: Sequence[str], config: Mapping[str, Any], where: str) -> str:
    """A sentence on why no layer of a model is one of ours; "" where some may be.

    Raises:
        InputError: the model has no experts.
    """
    for name in _SWITCHES:
        if config.get(name) is False:
            raise InputError(f"{where} has {name}=False and thus no experts; is it a mixture of experts?")
    for kind in kinds:
        reason = next((why for begin, why in _UNSUPPORTED.items() if kind.startswith(begin)), None)
        if reason is not None:
            return f"model {kind} of {where} cannot be profiled: {reason}; leave it to the engine."
    field, activation = first(config, _ACTIVATION)
    if isinstance(activation, Mapping):  # DBRX: {"name": "silu"}, which is what it has without a name too
        field, activation = f"{field}.name", activation.get("name")
    known: tuple[str, ...] = _SILU
    if any(kind.startswith(_GELU_TANH) for kind in kinds):
        known = ("gelu_pytorch_tanh",)
    elif any(kind.startswith("minimax_m3") for kind in kinds):
        known = (*_SILU, "swigluoai")
    if activation is not None and str(activation).lower() not in known:
        return f"{where} has the activation {field}={short(activation)}; our kernels have {', '.join(known)} of such a model."
    for name in _WEIGHTED_INPUT:
        if config.get(name):
            return f"{where} has {name}={short(config[name])}: it weights the tokens before the experts; leave it to the engine."
    return ""


def activations(kinds: Sequence[str], config: Mapping[str, Any], where: str) -> Callable[[int], Activation | str]:
    """The activation of a layer by its number, or why it is another than ours.

    Raises:
        InputError: a bound or a slope is no number.
    """
    usual = next((its for begin, its in _CUT_FIRST.items() if any(kind.startswith(begin) for kind in kinds)), None)
    if any(kind.startswith(_GELU_TANH) for kind in kinds):
        return lambda layer: Activation("gelu_tanh")
    found: list[tuple[str, Any]] = [(name, config[name]) for name in _CLAMPS if config.get(name) is not None]
    for name, value in found:
        for its in value if isinstance(value, list) else [value]:
            if its is not None and (isinstance(its, bool) or not isinstance(its, int | float)):
                raise InputError(f"{where} has {name}={short(value)}; give a number, or one for each layer.")

    def of_layer(layer: int) -> Activation | str:
        made = usual or SILU
        for name, value in found:
            # A list that is too short is one for some layers that it does not name.
            bound = (
                (value[layer] if layer < len(value) else max(filter(None, value), default=0))
                if isinstance(value, list)
                else value
            )
            field = _FIELDS.get(name)
            if bound and (usual is None or field is None or (field != "limit" and usual != SWIGLU_OAI)):
                return (
                    f"has a clamped or scaled activation, {name}={short(bound)}, which means one thing in one model and "
                    f"another in the next; our kernels know that of {', '.join(_CUT_FIRST)}"
                )
            if usual is not None and field is not None:
                number: Any = (bound or None) if field == "limit" else float(bound or 0)
                try:
                    made = attrs.evolve(made, **{field: number})
                except InputError as error:
                    return f"has {name}={short(bound)}: {str(error).rstrip('.')}"
        return made

    return of_layer
