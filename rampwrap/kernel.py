"""What a kernel must offer to be wrapped: `Kernel`, and the values it speaks in."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs

from rampwrap.errors import ConfigError, InputError
from rampwrap.grid import CtaGrid
from rampwrap.schema import MOST_EXPERTS, MOST_SIZE, OMIT, between

Config = Mapping[str, Any]
"A kernel's tuning parameters: flat, JSON-able, and opaque to everything but the kernel."
MEMBER = "kernel"
"The key by which a config of a portfolio names its kernel; no kernel's own config has it."

DTYPES = ("bf16", "fp16", "fp8")


@attrs.frozen
class MoEShape:
    """The shape of one routed MoE layer on one rank.

    `intermediate_size` is per rank (after tensor parallelism); `num_local_experts` is the number of experts
    whose weights this rank holds and therefore the length of `expert_counts`.
    """

    num_experts: int = attrs.field(validator=between(1, MOST_EXPERTS, InputError))
    top_k: int = attrs.field(validator=between(1, MOST_EXPERTS, InputError))
    hidden_size: int = attrs.field(validator=between(1, MOST_SIZE, InputError))
    intermediate_size: int = attrs.field(validator=between(1, MOST_SIZE, InputError))
    dtype: str = "bf16"
    num_local_experts: int = attrs.field(validator=between(1, MOST_EXPERTS, InputError), metadata=OMIT)

    @num_local_experts.default
    def _all(self) -> int:
        return self.num_experts

    def __attrs_post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise InputError(
                f"top_k is {self.top_k} with {self.num_experts} experts; a token cannot visit an expert twice."
            )
        if self.num_local_experts > self.num_experts:
            raise InputError(
                f"num_local_experts is {self.num_local_experts}, more than num_experts={self.num_experts}."
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}.")

    @property
    def weight_bytes(self) -> int:
        """Bytes of w13 [E,2I,H] and w2 [E,H,I] on this rank, without scales."""
        element = 1 if self.dtype == "fp8" else 2
        return 3 * self.num_local_experts * self.hidden_size * self.intermediate_size * element

    def __str__(self) -> str:
        local = "" if self.num_local_experts == self.num_experts else f" ({self.num_local_experts} here)"
        return f"E={self.num_experts}{local} top_k={self.top_k} H={self.hidden_size} I={self.intermediate_size} {self.dtype}"


# Layers of published models, tensor parallelism applied where the name says so.
SHAPES = {
    "olmoe": MoEShape(64, 8, 2048, 1024),
    "mixtral-8x7b": MoEShape(8, 2, 4096, 14336),
    "qwen3-30b": MoEShape(128, 8, 2048, 768),
    "qwen3-235b": MoEShape(128, 8, 4096, 1536),
    "qwen3-next-80b": MoEShape(512, 10, 2048, 512),
    "deepseek-v3": MoEShape(256, 8, 7168, 2048),
    "deepseek-v3-tp8": MoEShape(256, 8, 7168, 256),
    "gpt-oss-120b": MoEShape(128, 4, 2880, 2880),
    "glm-4.5-air": MoEShape(128, 8, 4096, 1408),
    "kimi-k2-tp8": MoEShape(384, 8, 7168, 256),
}


@runtime_checkable
class Kernel(Protocol):
    """Any object with these four members can be wrapped; it needs no base class.

    Optional members, found by name:
        ``version: str``                        compared with a plan's; "0" where absent.
        ``supports(config, shape)``             None, or the reason why the config cannot run this shape.
        ``default_config(num_tokens)``          what the kernel runs when nobody chooses.
        ``inputs(shape, topk_ids, *, seed=0)``  keyword arguments for `launch` on random data, for profiling.
    """

    @property
    def name(self) -> str:
        """By which plans and tables know it."""
        ...

    @property
    def configs(self) -> Sequence[Config]:
        """All tuning parameters it can be launched with, each once."""
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
