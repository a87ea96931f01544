"""What a kernel must offer to be wrapped: `Kernel`, and the values it speaks in."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rampwrap.errors import ConfigError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.shape import MoEShape

Config = Mapping[str, Any]
"A kernel's tuning parameters: flat, JSON-able, and opaque to everything but the kernel."
MEMBER = "kernel"
"The key by which a config of a portfolio names its kernel; no kernel's own config has it."


@runtime_checkable
class Kernel(Protocol):
    """Any object with these four members can be wrapped; it needs no base class.

    Optional members, found by name:
        ``version: str``                        compared with a plan's; "0" where absent.
        ``supports(config, shape)``             None, or the reason why the config cannot run this shape; asked of configs
                                                that are not in the list too, which older plans and tables may name.
        ``default_config(num_tokens)``          what the kernel runs when nobody chooses.
        ``inputs(shape, topk_ids, *, seed=0)``  keyword arguments for `launch` on random data, for profiling.
    """

    @property
    def name(self) -> str:
        """By which plans and tables know it."""
        ...

    @property
    def configs(self) -> Sequence[Config]:
        """The tuning parameters worth measuring, each once; what else can be launched, ``supports`` knows."""
        ...

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """The CTA grid that `launch` will use for this config: data only, never a launch."""
        ...

    def launch(self, config: Config, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer with this config and returns what the kernel returns."""
        ...


def config_key(config: Config) -> str:
    """A stable text form by which configs are compared and found in files."""
    return json.dumps(dict(config), sort_keys=True)


def index_by_key(configs: Sequence[Config]) -> dict[str, int]:
    """Where each config stands, by its `config_key`."""
    return {config_key(config): index for index, config in enumerate(configs)}


def format_config(config: Config) -> str:
    """One short line for people: ``block_m=16 block_n=64``."""
    return " ".join(f"{key}={value}" for key, value in config.items())


def kernel_version(kernel: Kernel) -> str:
    """The kernel's declared version, "0" where it declares none."""
    return str(getattr(kernel, "version", "0"))


def refusal(kernel: Kernel, config: Config, shape: MoEShape) -> str | None:
    """Why `config` cannot run `shape`, by the kernel's own `supports`; None if it can or the kernel has none."""
    supports = getattr(kernel, "supports", None)
    reason = None if supports is None else supports(config, shape)
    return None if reason is None else str(reason)


def why_not_launched(kernel: Kernel, config: Config, shape: MoEShape) -> str | None:
    """Why a config out of a plan or table cannot be launched; None if the kernel lists it, or its `supports` accepts it."""
    if config in kernel.configs:
        return None
    if not hasattr(kernel, "supports"):
        return "it is not in the kernel's list"
    # A kernel need not expect what a file may hold: only what has the keys and types of a listed config is asked about.
    if not any(_form(config) == _form(listed) for listed in kernel.configs):
        return "it has other keys or types than the kernel's configs"
    return refusal(kernel, config, shape)


def _form(config: Config) -> dict[str, type]:
    return {key: type(value) for key, value in config.items()}


def refusals(kernel: Kernel, configs: Sequence[Config], shape: MoEShape) -> dict[int, str]:
    """Configs that the kernel refuses, with its reasons.

    Raises:
        ConfigError: it refuses all of them.
    """
    said = {index: refusal(kernel, config, shape) for index, config in enumerate(configs)}
    refused = {index: reason for index, reason in said.items() if reason is not None}
    if len(refused) == len(configs):
        raise ConfigError(f"kernel {kernel.name!r} refuses every config for {shape}; the first: {refused[0]}")
    return refused


def check_configs(configs: Sequence[Config], owner: str) -> tuple[Config, ...]:
    """Returns the configs as a tuple.

    Raises:
        ConfigError: there is none, or one stands in the list twice.
    """
    if not configs:
        raise ConfigError(f"{owner} has no configs; give at least one.")
    seen: dict[str, int] = {}
    for index, config in enumerate(configs):
        first = seen.setdefault(config_key(config), index)
        if first != index:
            raise ConfigError(
                f"{owner} lists the config {format_config(config)} twice (at {first} and {index}); remove one."
            )
    return tuple(configs)
