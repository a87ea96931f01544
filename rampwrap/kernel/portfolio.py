"""`Portfolio`: several kernels of one layer seen as one, so that the choice may cross kernels at each step."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from rampwrap.errors import CaptureError, ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.names import joint_name, joint_version
from rampwrap.kernel.protocol import (
    MEMBER,
    Config,
    Kernel,
    check_configs,
    format_config,
    kernel_version,
    refusal,
    why_not_launched,
)
from rampwrap.kernel.shape import MoEShape

DEFAULT_LAYOUT = "vllm"
"w13 [E, 2I, H] with gate rows first, w2 [E, H, I], scales beside them: what a kernel that says nothing reads."
WEIGHTS = ("w13", "w2", "w13_scale", "w2_scale")
FORWARDED = ("inputs", "reference", "device")
OPTIONAL = ("workspace", "blocks", "out")
"Arguments that change where a launch works, not what it computes: a member that does not take one runs without."


def by_member(kernel: Kernel, configs: Sequence[Config]) -> list[tuple[Kernel, list[Config]]]:
    """Configs by the kernel that launches them, as that kernel's own; all of them for what is no portfolio."""
    if not isinstance(kernel, Portfolio):
        return [(kernel, list(configs))]
    pairs = [kernel.untagged(config) for config in configs]
    return [(its, [own for owner, own in pairs if owner is its]) for its in kernel.members.values()]


def layout_of(kernel: Kernel) -> str:
    """In which order a kernel reads the weights: its `weight_layout`."""
    return str(getattr(kernel, "weight_layout", DEFAULT_LAYOUT))


class Portfolio:
    """Several kernels with the configs of all; a Kernel itself, so it is profiled, planned and dispatched as one.

    >>> portfolio = Portfolio([TritonFusedMoE(shape), VllmFusedMoE(shape)])
    >>> out = Dispatcher(portfolio, plan)(hidden_states, w13, w2, topk_weights, topk_ids)

    It is called with the first kernel's arguments; of those in `OPTIONAL` each member gets what it takes. Members with the same `weight_layout` read the same weights. A member
    with another one needs its own copy of what differs, which its `convert_weights(**weights)` makes from the first's
    layout: once for each layer, at its first launch or in `prepare`.

    Args:
        kernels: at least one; their names must differ.
        extra_memory: allow members that need their own copy of the weights.

    Raises:
        InputError: no kernels, two of one name or for different layers, a launch without ``topk_ids`` in the
            place of the first's, or a layout that needs memory nobody allowed or cannot be made.
        ConfigError: a config uses the key ``kernel``.
    """

    def __init__(self, kernels: Sequence[Kernel], *, extra_memory: bool = False) -> None:
        if not kernels:
            raise InputError("the portfolio holds no kernel; give at least one.")
        self.members = {kernel.name: kernel for kernel in kernels}
        if len(self.members) < len(kernels):
            raise InputError(f"two of the kernels {', '.join(k.name for k in kernels)} have one name; rename one.")
        self.first = kernels[0]
        self.name = joint_name(tuple(self.members))
        self.version = joint_version([kernel_version(kernel) for kernel in kernels])
        self.weight_layout = layout_of(self.first)
        shapes = {shape for kernel in kernels if (shape := getattr(kernel, "shape", None)) is not None}
        if len(shapes) > 1:
            raise InputError(f"the kernels are made for {' and '.join(map(str, shapes))}; make all for one layer.")
        self.shape: MoEShape | None = next(iter(shapes), None)
        for kernel in kernels[1:]:
            self._check_layout(kernel, extra_memory)
        self.configs: tuple[Config, ...] = check_configs(
            [self.tagged(kernel, config) for kernel in kernels for config in kernel.configs], self.name
        )
        # By identity: a Dispatcher launches these very objects, and hashing a dict's content costs microseconds.
        flat = [(kernel, config) for kernel in kernels for config in kernel.configs]
        # The objects stay with it: a config that is dropped from `configs` must not leave its address to another.
        self._mine = self.configs
        self._known = {id(mine): pair for mine, pair in zip(self.configs, flat, strict=True)}
        self._names = _positional(self.first)
        for kernel in kernels[1:]:
            if _positional(kernel)[: len(self._names)] != self._names:
                raise InputError(
                    f"launch of {kernel.name!r} takes {', '.join(_positional(kernel))}, not {', '.join(self._names)} "
                    f"like {self.first.name!r}; wrap it so that they are called alike."
                )
        self._copies: dict[tuple[str, Any], _Copy] = {}
        self._lacks = {kernel.name: tuple(name for name in OPTIONAL if not _takes(kernel, name)) for kernel in kernels}
        self.launch: Callable[..., Any] = functools.partial(Portfolio._launch, self)
        # So that a Dispatcher finds topk_ids where the members have it, and a GraphDispatcher who takes which memory.
        self.launch.__signature__ = self._signature()  # type: ignore[attr-defined]

    def _signature(self) -> inspect.Signature:
        """The first kernel's, with a workspace where any member takes one."""
        its = inspect.signature(self.first.launch)
        if _takes(self.first, "workspace") or all("workspace" in lacking for lacking in self._lacks.values()):
            return its
        return its.replace(
            parameters=[*its.parameters.values(), inspect.Parameter("workspace", inspect.Parameter.KEYWORD_ONLY)]
        )

    def _check_layout(self, kernel: Kernel, extra_memory: bool) -> None:
        layout = layout_of(kernel)
        if layout == self.weight_layout:
            return
        if not hasattr(kernel, "convert_weights") or self.weight_layout != DEFAULT_LAYOUT:
            raise InputError(
                f"kernel {kernel.name!r} reads weights as {layout}, which cannot be made of {self.weight_layout} "
                f"({self.first.name!r}); leave one out, or put a kernel with layout {DEFAULT_LAYOUT} first."
            )
        if not extra_memory:
            size = self.extra_bytes(kernel)
            amount = "a copy" if size is None else f"{size} bytes ({size / 1e9:.2f} GB) a layer"
            raise InputError(
                f"kernel {kernel.name!r} reads weights as {layout}, not {self.weight_layout}: that takes {amount} more; "
                "pass extra_memory=True to allow it."
            )

    def extra_bytes(self, kernel: Kernel) -> int | None:
        """Memory that a member needs besides the shared weights, for one layer; None where nobody knows the shape."""
        shape = self.shape or getattr(kernel, "shape", None)
        if layout_of(kernel) == self.weight_layout:
            return 0
        if shape is None:
            return None
        converted = getattr(kernel, "converted_bytes", None)
        return int(shape.weight_bytes if converted is None else converted(shape))

    @staticmethod
    def tagged(kernel: Kernel, config: Config) -> Config:
        """A member's config as one of the portfolio's."""
        if MEMBER in config:
            raise ConfigError(f"the config {format_config(config)} of {kernel.name!r} has a key 'kernel'; rename it.")
        return {MEMBER: kernel.name, **config}

    def untagged(self, config: Config) -> tuple[Kernel, Config]:
        """The member that a config belongs to, and its own config.

        Raises:
            ConfigError: no member of that name.
        """
        found = self._known.get(id(config))
        if found is not None:
            return found
        name = config.get(MEMBER)
        if name not in self.members:
            raise ConfigError(
                f"the config {format_config(config)} names the kernel {name!r}; use one of {', '.join(self.members)}."
            )
        return self.members[name], {key: value for key, value in config.items() if key != MEMBER}

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """The member's."""
        kernel, own = self.untagged(config)
        return kernel.grid(own, shape)

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """The member's reason why `config` cannot run `shape`; None if it can."""
        try:
            kernel, own = self.untagged(config)
        except ConfigError as error:
            return str(error)
        return refusal(kernel, own, shape) or why_not_launched(kernel, own, shape)

    def default_config(self, num_tokens: int) -> Config:
        """The first kernel's."""
        default = getattr(self.first, "default_config", None)
        return self.tagged(self.first, self.first.configs[0] if default is None else default(num_tokens))

    @property
    def nondeterministic(self) -> str | None:
        """Why two launches may differ in their last bits: the first member's reason that has one."""
        reasons = {name: getattr(kernel, "nondeterministic", None) for name, kernel in self.members.items()}
        return next((f"{name}: {why}" for name, why in reasons.items() if why), None)

    @property
    def stores_once(self) -> bool:
        """Whether all members store each place of ``out`` once."""
        return all(getattr(kernel, "stores_once", False) for kernel in self.members.values())

    @property
    def capturable(self) -> bool | str:
        """True, or which member cannot be captured in a CUDA graph, and why."""
        reasons = {name: getattr(kernel, "capturable", True) for name, kernel in self.members.items()}
        return next((f"{name}: {why}" for name, why in reasons.items() if why is not True), True)

    def precompile(self, configs: Sequence[Config], **arguments: Any) -> list[str | None]:
        """Lets the members that can compile ahead do so; for each config None, or why it cannot run."""
        reasons: dict[int, str | None] = {}
        owners = [self.untagged(config) for config in configs]
        for kernel in self.members.values():
            mine = [place for place, (owner, _) in enumerate(owners) if owner is kernel]
            hook = getattr(kernel, "precompile", None)
            if hook is not None and mine:
                reasons.update(zip(mine, hook([owners[place][1] for place in mine], **arguments), strict=True))
        return [reasons.get(place) for place in range(len(configs))]

    def workspace(self, num_tokens: int, device: Any) -> "Memory":
        """Memory for `launch(..., workspace=...)` of any member that takes some, for up to `num_tokens` tokens.

        Members whose workspaces are of one type and one size, as those of our Triton and CuTe kernels, share one.
        """
        made: dict[Any, Any] = {}
        by_member = {}
        for name, kernel in self.members.items():
            make = getattr(kernel, "workspace", None)
            if make is None or "workspace" in self._lacks[name]:
                continue
            key = _size(make, num_tokens) or name
            if key not in made:
                made[key] = make(num_tokens, device)
            by_member[name] = made[key]
        return Memory(by_member)

    def _launch(self, config: Config, /, *args: Any, **kwargs: Any) -> Any:
        """The member's launch, with its own copy of the weights where it has one."""
        kernel, own = self.untagged(config)
        memory = kwargs.get("workspace")
        if isinstance(memory, Memory):
            del kwargs["workspace"]
            kwargs.update(memory.arguments(kernel.name))
        lacks = self._lacks[kernel.name]
        if not lacks:
            return self._launch_member(kernel, own, args, kwargs)
        out = kwargs.get("out")
        for name in lacks:
            kwargs.pop(name, None)
        result = self._launch_member(kernel, own, args, kwargs)
        if out is None or "out" not in lacks:
            return result
        return out.copy_(result)

    def _launch_member(self, kernel: Kernel, own: Config, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layout_of(kernel) != self.weight_layout:
            weights = {name: value for name, value in zip(self._names, args, strict=False) if name in WEIGHTS}
            weights |= {name: kwargs[name] for name in WEIGHTS if kwargs.get(name) is not None}
            copied = self._converted(kernel, weights)
            args = tuple(copied.get(name, value) for name, value in zip(self._names, args, strict=False))
            kwargs |= {name: value for name, value in copied.items() if name not in self._names[: len(args)]}
        return kernel.launch(own, *args, **kwargs)

    def prepare(self, **weights: Any) -> None:
        """Makes the copies that members with other layouts need of these weights, before a CUDA graph is captured.

        Args:
            weights: w13, w2 and the scales, as `launch` gets them; None stands for none.
        """
        weights = {name: value for name, value in weights.items() if value is not None}
        for kernel in self.members.values():
            if layout_of(kernel) != self.weight_layout:
                self._converted(kernel, weights)

    def forget(self) -> None:
        """Drops all copies: after weights were changed in place, the next launch makes them anew."""
        self._copies.clear()

    def _converted(self, kernel: Kernel, weights: dict[str, Any]) -> dict[str, Any]:
        w13 = weights["w13"]
        storage = w13.untyped_storage()
        key = (kernel.name, (storage.data_ptr(), w13.storage_offset(), tuple(w13.shape), *sorted(weights)))
        found = self._copies.get(key)
        if found is None or found.source.expired():
            torch = sys.modules["torch"]
            if w13.is_cuda and torch.cuda.is_current_stream_capturing():
                raise CaptureError(
                    f"the weights for {kernel.name!r} are not converted yet and cannot be under CUDA graph capture; "
                    "call prepare(w13=..., w2=..., ...) before."
                )
            from torch.multiprocessing.reductions import StorageWeakRef

            # Layers that are gone take their copies with them.
            self._copies = {k: copy for k, copy in self._copies.items() if not copy.source.expired()}
            made = kernel.convert_weights(**weights)  # type: ignore[attr-defined]
            found = self._copies[key] = _Copy(StorageWeakRef(storage), made)  # type: ignore[no-untyped-call]
        return found.weights

    def __getattr__(self, name: str) -> Any:
        # The first kernel's, whose layout the arguments have; what describes one member's launches is not for all.
        if name in FORWARDED:
            return getattr(self.first, name)
        raise AttributeError(f"a Portfolio has no {name!r}; ask one of its members.")


@attrs.frozen
class Memory:
    """Scratch memory of a portfolio's members, by their names; some may be the same object."""

    by_member: dict[str, Any]

    def arguments(self, name: str) -> dict[str, Any]:
        """What a member's launch gets of it."""
        found = self.by_member.get(name)
        return {} if found is None else {"workspace": found}

    @property
    def num_bytes(self) -> int:
        """Device memory held, as far as the members' workspaces say."""
        distinct = {id(its): its for its in self.by_member.values()}
        return sum(int(getattr(its, "num_bytes", 0)) for its in distinct.values())


@attrs.frozen
class _Copy:
    """Converted weights, and whether what they were made of still exists."""

    source: Any
    weights: dict[str, Any]


def _takes(kernel: Kernel, name: str) -> bool:
    """Whether a kernel's launch has this parameter, or takes any."""
    parameters = inspect.signature(kernel.launch).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _size(make: Callable[..., Any], num_tokens: int) -> tuple[type, int] | None:
    """Type and bytes of a workspace, without allocating it; None where that cannot be told."""
    try:
        planned = make(num_tokens, "meta")
    except Exception:  # somebody else's kernel that knows no meta tensors: it gets memory of its own
        return None
    size = getattr(planned, "num_bytes", None)
    return None if size is None else (type(planned), int(size))


def _positional(kernel: Kernel) -> list[str]:
    """Names of the positional parameters of `launch` after the config.

    Raises:
        InputError: topk_ids is not among the parameters.
    """
    parameters = list(inspect.signature(kernel.launch).parameters.values())[1:]
    if all(parameter.name != "topk_ids" for parameter in parameters):
        raise InputError(f"launch of kernel {kernel.name!r} has no parameter topk_ids; name the expert ids so.")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
