"""What a file may hold: JSON read within bounds, classes filled by the types that they declare, and checksums.

The classes are the description: attrs fields with their types, and `between` where a number has a range. One strict
`cattrs` converter fills them: true is no number, 1.5 is no integer, nothing is infinite, no key is unknown.
"""

import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np

from rampwrap.errors import RampwrapError

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")

MOST_DEPTH = 16
"Lists and objects inside each other; the files that we write have 5."
MOST_BYTES = 1 << 24
"Of one JSON text: a plan of 800 configs has 1 MB. Parsed, this much takes at most 400 MB."
LARGEST = 1 << 53
"Integers up to here are the same in JSON, in float64 and here."
MOST_TOKENS = 1 << 17
"Of a batch. Fitting draws this many tokens times the experts."
MOST_EXPERTS = 1 << 14
MOST_SIZE = 1 << 24
"Of a layer's widths, block heights, CTAs and SMs."
CHECKSUM = "checksum"
"The key of a file's own checksum, in each of them."

OMIT: Mapping[str, bool] = types.MappingProxyType({"omit": True})
"Metadata of a field that is not written while it has its default."


def between(low: float, high: float, error: type[RampwrapError], whole: bool = True) -> Callable[..., None]:
    """A validator of attrs: a finite number of at least `low` and at most `high`, an integer unless `whole` is False.

    Raises:
        error: it is not; names the class, the field and the value.
    """
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)

    def check(instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            what = "whole number" if whole else "number"
            few = f"from {low:g} to {high:g}" if high < LARGEST else f"of at least {low:g}"
            name = f"{type(instance).__name__}.{attribute.name}"
            raise error(f"{name} is {_short(value)}; give a {what} {few}.")

    return check


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 200 else "a number of more than 60 digits"
    return text if len(text) <= 80 else text[:77] + "..."


def parse(data: bytes, what: str = "it") -> Any:
    """Reads JSON: UTF-8, finite numbers, each key once, no half characters, `MOST_DEPTH` deep, `MOST_BYTES` long.

    Raises:
        ValueError: it is not; says what.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"{what} has more than {MOST_BYTES >> 20} MB")
    text = data.decode("utf-8")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)):
        depth += 1 if bracket in "[{" else -1
        if depth > MOST_DEPTH:
            raise ValueError(f"{what} is nested more than {MOST_DEPTH} deep")
    found = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_once)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()  # a UnicodeEncodeError, which is a ValueError
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"a number is {text}")


def _finite(text: str) -> float:
    value = float(text)  # 1e999 is JSON, and infinite
    return value if math.isfinite(value) else _no_number(text[:40])


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_short(next(key for key in keys if keys.count(key) > 1))} stands in it twice")
    return found


def checksum(raw: Mapping[str, Any], *more: bytes) -> str:
    """128 bits over the content of a JSON object, spacing, order of keys and its own checksum apart, and `more`."""
    content = {key: value for key, value in raw.items() if key != CHECKSUM}
    found = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    for part in more:
        found.update(part)
    return found.hexdigest()[:32]


def seal(raw: Mapping[str, Any], *more: bytes) -> dict[str, Any]:
    """The object with its checksum, behind its first key."""
    first, *others = raw.items()
    return dict([first, (CHECKSUM, checksum(raw, *more)), *others])


def unseal(raw: dict[str, Any], *more: bytes, check: bool = True) -> dict[str, Any]:
    """The object without its checksum, which must fit where there is one: files of older versions have none.

    Raises:
        ValueError: it does not.
    """
    stated = raw.get(CHECKSUM)
    if check and CHECKSUM in raw and stated != (found := checksum(raw, *more)):
        raise ValueError(f"its checksum is {found} and not {_short(stated)}: damaged, or edited by hand")
    return {key: value for key, value in raw.items() if key != CHECKSUM}


def read(raw: Any, cls: type[T], error: type[RampwrapError], using: "Converter | None" = None) -> T:
    """An instance of a class that attrs made, from parsed JSON.

    Raises:
        error: a field is missing, unknown, of another type or out of its range; names the first, as
            ``device.num_sms: ...``.
    """
    from cattrs.errors import BaseValidationError

    try:
        return (using or converter()).structure(raw, cls)
    except (BaseValidationError, ValueError, TypeError) as found:
        path, cause = next(_leaves(found, ""))
        raise error(f"{path}: {_said(cause)}" if path else _said(cause)) from found


def dump(value: Any, using: "Converter | None" = None) -> Any:
    """The JSON form of what `read` reads."""
    return (using or converter()).unstructure(value)


def _leaves(error: BaseException, path: str) -> Any:
    from cattrs.errors import AttributeValidationNote, ClassValidationError, IterableValidationError

    if isinstance(error, ClassValidationError | IterableValidationError):
        noted, other = error.group_exceptions()
        for inner, note in noted:
            where = f".{note.name}" if isinstance(note, AttributeValidationNote) else f"[{note.index}]"
            yield from _leaves(inner, (path + where).lstrip("."))
        for inner in other:
            yield from _leaves(inner, path)
    else:
        yield path, error


def _said(error: BaseException) -> str:
    from cattrs.errors import ForbiddenExtraKeysError

    if isinstance(error, ForbiddenExtraKeysError):
        return f"the key {', '.join(_short(key) for key in sorted(error.extra_fields))} is unknown"
    if isinstance(error, KeyError):
        return "it is missing"
    return str(error).rstrip(".")


@functools.cache
def converter() -> "Converter":
    """The strict converter, shared; `new_converter` for hooks of one's own."""
    return new_converter()


def new_converter() -> "Converter":
    """A strict converter for attrs classes of numbers, text, tuples, mappings and int64 or float64 arrays."""
    from cattrs import Converter
    from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

    made = Converter(forbid_extra_keys=True)
    for kind, hook in ((int, _int), (bool, _bool), (float, _float), (str, _str)):
        made.register_structure_hook(kind, hook)
    made.register_structure_hook_factory(_is_tuple, lambda kind: functools.partial(_tuple, made, kind))
    made.register_structure_hook_func(_is_mapping, functools.partial(_mapping, made))
    made.register_structure_hook_func(_is_array, _array)
    made.register_unstructure_hook_func(_is_tuple, lambda value: [made.unstructure(each) for each in value])
    made.register_unstructure_hook_func(_is_array, _listed)
    made.register_unstructure_hook(np.ndarray, _listed)

    def fill(cls: Any) -> Callable[..., Any]:
        inner: Callable[..., Any] = make_dict_structure_fn(cls, made, _cattrs_forbid_extra_keys=True)
        return lambda raw, kind: inner(_must(dict, raw, "an object"), kind)

    def empty(cls: Any) -> Callable[..., Any]:
        omitted = [field.name for field in attrs.fields(cls) if field.metadata.get("omit")]
        left_out: dict[str, Any] = {name: override(omit_if_default=True) for name in omitted}
        return make_dict_unstructure_fn(cls, made, **left_out)

    made.register_structure_hook_factory(attrs.has, fill)
    made.register_unstructure_hook_factory(attrs.has, empty)
    return made


def _must(kind: type, raw: Any, wanted: str) -> Any:
    if type(raw) is not kind:
        raise ValueError(f"{_short(raw)} is not {wanted}")
    return raw


def _int(raw: Any, _: Any = None) -> int:
    if type(raw) is not int or abs(raw) > LARGEST:
        raise ValueError(f"{_short(raw)} is not a whole number of at most 2**53")
    return raw


def _float(raw: Any, _: Any = None) -> float:
    if type(raw) not in (int, float) or not abs(raw) < 1e300:
        raise ValueError(f"{_short(raw)} is not a finite number")
    return float(raw)


def _bool(raw: Any, _: Any = None) -> bool:
    return bool(_must(bool, raw, "true or false"))


def _str(raw: Any, _: Any = None) -> str:
    return str(_must(str, raw, "text"))


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _tuple(made: "Converter", kind: Any, raw: Any, _: Any = None) -> tuple[Any, ...]:
    kinds = typing.get_args(kind)
    _must(list, raw, "a list")
    if kinds[-1] is Ellipsis:
        each: list[Any] = made.structure(raw, list[kinds[0]])  # type: ignore[valid-type]
        return tuple(each)
    if len(raw) != len(kinds):
        raise ValueError(f"{_short(raw)} has {len(raw)} entries instead of {len(kinds)}")
    return tuple(made.structure(value, one) for value, one in zip(raw, kinds, strict=True))


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) in (dict, Mapping)


def _mapping(made: "Converter", raw: Any, kind: Any) -> dict[Any, Any]:
    """``dict[int, ...]`` has its keys in decimal; anything but text may stand under ``Any``, as JSON has it."""
    key_kind, value_kind = typing.get_args(kind)
    _must(dict, raw, "an object")
    if key_kind is int and (bad := [key for key in raw if not re.fullmatch(r"0|[1-9][0-9]{0,14}", key)]):
        raise ValueError(f"the key {_short(bad[0])} is not a whole number")
    if value_kind is Any:
        return dict(raw)
    values = [made.structure(value, value_kind) for value in raw.values()]
    return dict(zip(map(key_kind, raw), values, strict=True))


def _is_array(kind: Any) -> bool:
    return typing.get_origin(kind) is np.ndarray


def _array(raw: Any, kind: Any) -> Any:
    """A rectangle of numbers; null is NaN in arrays of floats."""
    dtype = np.dtype(typing.get_args(typing.get_args(kind)[1])[0])
    cells = np.array(_must(list, raw, "a list"), dtype=object)
    one = _int if dtype.kind == "i" else lambda value: math.nan if value is None else _float(value)
    return np.array([one(value) for value in cells.ravel()], dtype=dtype).reshape(cells.shape)


def _listed(value: Any) -> list[Any]:
    if value.dtype.kind == "f" and np.isnan(value).any():
        value = np.where(np.isnan(value), None, value.astype(object))
    return list(value.tolist())
