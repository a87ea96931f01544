"""The compiled kernels at run time: found, loaded in milliseconds, looked up by symbol."""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rampwrap._version import __version__
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernels.cute.build.build import (
    GET_DSL,
    LIBRARY,
    MANIFEST,
    build,
    default_folder,
    dsl_version,
    source_digest,
)
from rampwrap.kernels.cute.configs import CuteConfig, Variant

VARIABLE = "RAMPWRAP_CUTE_LIBRARY"
"Names a library, or its folder, that is used instead of the installed or the default one."
WHEEL = "rampwrap_cute"
"Package of the wheel rampwrap-cute, which carries a library."
ABSENT = (
    "the CuTe kernels are not built: get them compiled with pip install rampwrap-cute, or run 'rampwrap build-kernels' on "
    f"any machine with the CuTe DSL ({GET_DSL}) and g++, here or elsewhere, and name the library in {VARIABLE}."
)
_log = logging.getLogger("rampwrap")

Function = Callable[..., Any]


class Library:
    """A built library, and what is compiled on first use where the CuTe DSL is installed.

    Args:
        path: of the library; None compiles everything on first use.

    Raises:
        InputError: the file or its list is missing or unreadable, it was built from another source, or
            apache-tvm-ffi is not installed.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self.path = path
        self.kernels: dict[str, Any] = {}
        "By symbol, registers and instruction counts of what was built."
        self.refused: dict[str, str] = {}
        self.can_compile = dsl_version() is not None
        self._functions: dict[str, Function] = {}
        self._modules: list[Any] = []
        if path is not None:
            self._add(path)

    def _add(self, path: pathlib.Path) -> None:
        manifest = read_manifest(path)
        self._modules.append(_load(path))
        self.kernels |= manifest["kernels"]
        self.refused = {
            symbol: reason
            for symbol, reason in {**self.refused, **manifest["refused"]}.items()
            if symbol not in self.kernels
        }

    def why_absent(self, config: CuteConfig) -> str | None:
        """Why a config has no compiled kernels and none can be made on first use; None if it has, or they can."""
        for variant in config.variants:
            symbol = variant.symbol
            if symbol in self.kernels:
                continue
            if symbol in self.refused:
                return f"its kernel {symbol} was refused: {self.refused[symbol]}"
            if not self.can_compile:
                return f"its kernel {symbol} is not in {self.path}; build it with 'rampwrap build-kernels'."
        return None

    def ensure(self, variants: Iterable[Variant]) -> None:
        """Compiles those that are missing, in parallel, and loads them; where the CuTe DSL is installed."""
        missing = self._missing(variants)
        if not missing or not self.can_compile:
            return
        folder = _first_use(missing)
        try:
            self._add(folder / LIBRARY if _holds(folder, missing) else build(missing, folder).library)
        except ConfigError as error:
            self.refused |= {variant.symbol: str(error) for variant in missing}

    def must_compile(self, variants: Iterable[Variant]) -> bool:
        """Whether `ensure` would compile, rather than find all loaded or what it made for the same variants before."""
        missing = self._missing(variants)
        return bool(missing) and self.can_compile and not _holds(_first_use(missing), missing)

    def _missing(self, variants: Iterable[Variant]) -> list[Variant]:
        known = {*self.kernels, *self.refused}
        return [variant for variant in dict.fromkeys(variants) if variant.symbol not in known]

    def function(self, variant: Variant) -> Function:
        """A compiled kernel; its arguments are positional and checked by it.

        Raises:
            ConfigError: it is not in the library and cannot be compiled here.
        """
        found = self._functions.get(variant.symbol)
        if found is None:
            found = self._functions[variant.symbol] = self._find(variant)
        return found

    def _find(self, variant: Variant) -> Function:
        self.ensure([variant])
        if variant.symbol in self.kernels:
            for module in self._modules:
                function = module.get_function(variant.symbol)
                if function is not None:
                    return function  # type: ignore[no-any-return]
        reason = self.refused.get(variant.symbol, f"it is not in {self.path}; run 'rampwrap build-kernels'.")
        raise ConfigError(f"The kernel {variant.symbol} cannot be used: {reason}")


def _first_use(variants: Sequence[Variant]) -> pathlib.Path:
    """Where `ensure` puts a library of these, the same in every process."""
    symbols = sorted(variant.symbol for variant in variants)
    digest = hashlib.sha256(" ".join(symbols).encode()).hexdigest()[:16]
    return default_folder() / "first_use" / (symbols[0] if len(symbols) == 1 else digest)


def _holds(folder: pathlib.Path, variants: Iterable[Variant]) -> bool:
    try:
        manifest = read_manifest(folder / LIBRARY)
    except InputError:
        return False
    return all(variant.symbol in manifest["kernels"] or variant.symbol in manifest["refused"] for variant in variants)


def read_manifest(library: pathlib.Path) -> dict[str, Any]:
    """The list beside a library.

    Raises:
        InputError: it is missing, damaged, or of another source than this package's.
    """
    path = library.with_name(MANIFEST)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["source"] != source_digest():
            raise InputError(
                f"{library} was built from another version of the kernels; run 'rampwrap build-kernels' again."
            )
        if not isinstance(manifest["kernels"], dict) or manifest["num_bytes"] != library.stat().st_size:
            raise ValueError("it does not describe the library beside it")
        manifest.setdefault("refused", {})
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be used ({error}); run 'rampwrap build-kernels' again.") from error
    return manifest


def find(path: str | os.PathLike[str] | None = None) -> pathlib.Path | None:
    """The library to use: the path, else that of ``$RAMPWRAP_CUTE_LIBRARY``, of the wheel rampwrap-cute, or the default one.

    None without any.

    Raises:
        InputError: one is named and is not there.
    """
    named = path or os.environ.get(VARIABLE)
    if named:
        found = pathlib.Path(named)
        found = found / LIBRARY if found.is_dir() else found
        if not found.exists():
            raise InputError(
                f"{found} is no library of CuTe kernels; build it with 'rampwrap build-kernels --out DIR'."
            )
        return found
    found = default_folder() / LIBRARY
    return _of_wheel() or (found if found.exists() else None)


@functools.cache
def _of_wheel() -> pathlib.Path | None:
    """The library of rampwrap-cute; None where it is not installed or, as a warning says once, of other kernels."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return None
    found = pathlib.Path(spec.origin).with_name(LIBRARY)
    try:
        read_manifest(found)
    except InputError as error:
        _log.warning(
            "The kernels of the installed rampwrap-cute are passed over (%s); those of this version come with "
            "pip install rampwrap-cute==%s.",
            str(error).partition(";")[0],
            __version__,
        )
        return None
    return found


@functools.cache
def _open(path: pathlib.Path | None, changed: int) -> Library:
    return Library(path)


def load(path: str | os.PathLike[str] | None = None) -> Library:
    """The library to use (see `find`), loaded once a process.

    Raises:
        InputError: there is none and the CuTe DSL is not installed either, or it cannot be used.
    """
    found = find(path)
    if found is None and dsl_version() is None:
        raise InputError(ABSENT)
    return _open(found, 0 if found is None else found.stat().st_mtime_ns)


def _load(path: pathlib.Path) -> Any:
    import torch  # noqa: F401  (brings the CUDA runtime that the library's functions call)

    if importlib.util.find_spec("tvm_ffi") is None:
        raise InputError("apache-tvm-ffi, which loads the CuTe kernels, is not installed; pip install apache-tvm-ffi.")
    try:
        import tvm_ffi

        return tvm_ffi.load_module(str(path.resolve()))
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be loaded: {str(error).strip()[:200]}") from error
