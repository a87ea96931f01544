"""A model's `config.json`: found by folder, file or name, and flattened, for the language model may be nested in it."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rampwrap.errors import InputError

# Where composite configs keep the language model, and DBRX its feed-forward sizes.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")
MOST_LEVELS = 16
MOST_BYTES = 16 << 20


def read_config(model: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """The path and the content of a model's ``config.json``.

    Raises:
        InputError: it is not there, or is no JSON object.
    """
    path = pathlib.Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path if path.exists() else _cached(os.fspath(model)) or path
        raw = _json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no readable model config ({error}); give the folder of a model with its config.json."
        ) from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no JSON object; give the folder of a model with its config.json.")
    return str(path), raw


def _json(path: pathlib.Path) -> Any:
    """A file's JSON, which is UTF-8 whatever the locale; with a mark at its beginning where an editor put one."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"it has {size} bytes, a config {MOST_BYTES} at most")
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _cached(name: str) -> pathlib.Path | None:
    """The config of a model by its name, as engines are started with it, in Hugging Face's cache; nothing is fetched."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # not installed, or no name of a model
        return None
    return pathlib.Path(found) if isinstance(found, str) else None


def beside(where: str, config: Mapping[str, Any]) -> Any:
    """The content of ModelOpt's own file beside a config, which engines look at where that says nothing; None without."""
    path = pathlib.Path(where).with_name("hf_quant_config.json")
    if config.get("quantization_config") or config.get("compression_config") or not path.is_file():
        return None
    try:
        return _json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no readable JSON ({error}); mend it, or pass --dtype.") from error


def levels_of(raw: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """A config and those of language models nested in it, the outer ones first."""
    levels, waiting = [], [raw]
    while waiting:
        level = waiting.pop()
        levels.append(level)
        waiting += [level[name] for name in reversed(_NESTED) if isinstance(level.get(name), Mapping)]
        if len(levels) > MOST_LEVELS:
            raise InputError(
                f"{where} nests over {MOST_LEVELS} configs in each other; give that of the language model."
            )
    return levels


def flat(levels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The language model's own settings over those around them."""
    out = dict(levels[0])
    for level in levels[1:]:
        out |= {key: value for key, value in level.items() if value is not None}
    return out


def kinds_of(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    """The model types and architectures of configs."""
    found = [[its.get("model_type"), *listed(its.get("architectures"))] for its in levels]
    return [name for names in found for name in names if isinstance(name, str)]


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []


def short(value: Any) -> str:
    """A value of somebody's config in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of some fields that is there and not null, and its value; the last name and None without any."""
    return next(((name, config[name]) for name in names if config.get(name) is not None), (names[-1], None))
