"""Which layers of a model have experts, by the fields in which published configs say so."""

from collections.abc import Callable, Mapping
from typing import Any

from rampwrap.checkpoint.config import first, short
from rampwrap.errors import InputError

MOST_LAYERS = 1_000
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
Has = Callable[[int], bool]
"Whether the layer of a number has experts."


def _whole(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= MOST_LAYERS:
        raise ValueError(f"a whole number from {least} to {MOST_LAYERS}")
    return value


def _numbers(value: Any) -> frozenset[int]:
    """``[3, 4]`` or ``"3,4"``."""
    try:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list) and all(type(part) in (int, str) for part in parts):
            return frozenset(int(part) for part in parts if part != "")
    except ValueError:
        pass
    raise ValueError("numbers of layers")


def _kinds(value: Any) -> Has:
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise ValueError("a name for each layer")
    return lambda layer: layer < len(value) and "dense" not in value[layer]


def _frequency(value: Any) -> Has:
    if isinstance(value, list) and all(type(its) in (int, bool) for its in value):
        return lambda layer: layer < len(value) and bool(value[layer])
    step = _whole(value, 1)
    return lambda layer: layer % step == 0


def _from(value: Any) -> Has:
    start = _whole(value, 0)
    return lambda layer: layer >= start


def _until(value: Any) -> Has:
    end = _whole(value, -1)  # Ernie writes -1 for the last one
    return lambda layer: end == -1 or layer <= end


def _every(value: Any) -> Has:
    step = _whole(value, 1)
    return lambda layer: (layer + 1) % step == 0


def _besides(value: Any) -> Has:
    dense = _numbers(value)
    return lambda layer: layer not in dense


def _these(value: Any) -> Has:
    sparse = _numbers(value)
    return lambda layer: layer in sparse


_RULES: dict[str, Callable[[Any], Has]] = {
    "first_k_dense_replace": _from,
    "num_dense_layers": _from,
    "moe_layer_start_index": _from,
    "moe_layer_end_index": _until,
    "moe_layer_freq": _frequency,
    "moe_layer_frequency": _every,
    "moe_layer_interval": _every,
    "decoder_sparse_step": _every,
    "mlp_only_layers": _besides,
    "moe_layers_enum": _these,
}
"A layer has experts where all rules that its config names say so."
_LISTED = "mlp_layer_types"
"Where it is there, it alone counts."
_PERIOD = ("expert_layer_period", "expert_layer_offset")


def sparse_layers(config: Mapping[str, Any], where: str) -> tuple[int, list[int]] | None:
    """The number of layers and which of them have experts; None where the config does not say how many there are.

    Raises:
        InputError: a field has no such value as its name asks for, or no layer is left.
    """
    name, found = first(config, _COUNTS)
    rules: list[Has] = []
    named = [_LISTED] if config.get(_LISTED) else list(_RULES)
    try:
        count = None if found is None else _whole(found, 1)
        for name in named:
            if (found := config.get(name)) is not None:
                rules.append(_kinds(found) if name == _LISTED else _RULES[name](found))
        name, found = _PERIOD[0], config.get(_PERIOD[0])
        if found is not None:
            period = _whole(found, 1)
            name, found = _PERIOD[1], config.get(_PERIOD[1], 0)
            offset = _whole(found, 0)
            rules.append(lambda layer: (layer - offset) % period == 0)
    except ValueError as error:
        raise InputError(f"{where} has {name}={short(found)}; give {error}.") from None
    if count is None:
        return None
    sparse = [layer for layer in range(count) if all(has(layer) for has in rules)]
    if not sparse:
        said = ", ".join(f"{its}={short(config[its])}" for its in (*named, *_PERIOD) if config.get(its) is not None)
        raise InputError(f"{where} has {count} layers and none with experts by {said}; is it a mixture of experts?")
    return count, sparse
