"""Layers whose arithmetic is not SiLU(gate) * up, which stay with the engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from rampwrap.checkpoint.config import first, short
from rampwrap.errors import InputError

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
_SWITCHES = ("is_moe", "enable_moe_block")
"False for the dense form of a model that has another with experts."
_WEIGHTED_INPUT = ("moe_apply_router_weight_on_input", "apply_router_weight_on_input")
# Layers whose arithmetic is not SiLU(gate) * up without biases, whatever else the config says: by the beginning of
# model_type, or of the architecture where that says more.
_UNSUPPORTED = {
    "gpt_oss": "its experts have biases and a clamped, interleaved activation",
    "openai_privacy_filter": "its experts have biases and a clamped activation",
    "llama4": "it weights the tokens before the experts",
    "minimax_m3": "its activation is clamped",
    "deepseek_v4": "its activation is clamped",
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
    """A sentence on why no layer of a model is SiLU(gate) * up; "" where some may be.

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
    if activation is not None and str(activation).lower() not in _SILU:
        return f"{where} has the activation {field}={short(activation)}; our kernels compute SiLU-gated experts only."
    for name in _WEIGHTED_INPUT:
        if config.get(name):
            return f"{where} has {name}={short(config[name])}: it weights the tokens before the experts; leave it to the engine."
    return ""


def clamps(config: Mapping[str, Any], where: str) -> Any:
    """Why a layer's activation is another than ours, by its number; "" where it is not."""
    found: list[tuple[str, Any]] = [(name, config[name]) for name in _CLAMPS if config.get(name) is not None]
    for name, value in found:
        for its in value if isinstance(value, list) else [value]:
            if its is not None and (isinstance(its, bool) or not isinstance(its, int | float)):
                raise InputError(f"{where} has {name}={short(value)}; give a number, or one for each layer.")

    def reason(layer: int) -> str:
        for name, value in found:
            # A list that is too short is one for some layers that it does not name.
            bound = (
                (value[layer] if layer < len(value) else max(filter(None, value), default=0))
                if isinstance(value, list)
                else value
            )
            if bound:
                return f"has a clamped or scaled activation, {name}={short(bound)}; our kernels compute SiLU(gate) * up as it is"
        return ""

    return reason
