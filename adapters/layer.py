"""`LayerKernel`: what every wrapped MoE layer here shares, so that an adapter is its configs, its grid and its `run`."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config, check_configs, format_config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference
from rampwrap.kernels.common.operands import Contract, Operands

if TYPE_CHECKING:  # it imports Triton, which not every backend needs
    from rampwrap.kernels.triton.align.host import TokenBlocks

_C = TypeVar("_C")


def _shown(method: Callable[..., Any], run: Callable[..., Any], without: Sequence[str]) -> Callable[..., Any]:
    """A method that shows what a backend takes: the operands but for some, and the keyword arguments of its `run`."""
    own = types.FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__)
    functools.update_wrapper(own, method)  # and not a function around it, which costs each launch 0.35 us
    own.__kwdefaults__ = method.__kwdefaults__
    *shared, _ = inspect.signature(method).parameters.values()
    options = [
        its for its in inspect.signature(run).parameters.values() if its.kind in (its.KEYWORD_ONLY, its.VAR_KEYWORD)
    ]
    taken = [its for its in shared if its.name not in without]
    own.__signature__ = inspect.Signature([*taken, *options], return_annotation=torch.Tensor)  # type: ignore[attr-defined]
    return own


class LayerKernel:
    """A kernel of one layer on the weights of vLLM, gate rows first, unless its `weight_layout` says otherwise.

    A backend has a `name` and a `version`, `supports`, `grid`, and `run`, which gets operands that were checked. Keyword
    arguments of `run` are arguments of `launch`: the signature that a dispatcher sees names them.

    Args:
        shape: the layer.
        configs: those that run the shape: `runnable` finds them.
        contract: what operands must be; None leaves it to the backend.
    """

    name: str
    version: str
    without: ClassVar[tuple[str, ...]] = ()
    "Operands that the kernel does not take."
    stores_once: ClassVar[bool] = False
    "Whether each place of `out` is stored once and none is read: it may then be memory of another GPU."

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "run" in vars(cls):
            cls.launch = _shown(LayerKernel.launch, cls.run, cls.without)  # type: ignore[method-assign]

    def __init__(self, shape: MoEShape, configs: Sequence[Config], contract: Contract | None) -> None:
        self.shape, self.contract = shape, contract
        self.configs: tuple[Config, ...] = check_configs(configs, self.name)
        self._known = {tuple(config.items()) for config in configs}

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """Why `config` cannot run `shape`, in a sentence; None if it can."""
        raise NotImplementedError

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """The CTAs of a config's launches."""
        raise NotImplementedError

    def run(self, config: Config, operands: Operands, /, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Launches the layer on at least one token and returns [T, H]; config and operands were checked."""
        raise NotImplementedError

    def launch(
        self,
        config: Config,
        /,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Runs the layer and returns [T, H].

        Args:
            config: one of `configs`, or any other that `supports` accepts.
            hidden_states: [T, H], bf16 or fp16 (bf16 for an FP8 layer, which quantises them itself).
            w13: [E, 2I, H], gate rows first, or as `convert_weights` makes it.
            w2: [E, H, I].
            topk_weights: [T, top_k], floating point.
            topk_ids: int32 or int64 [T, top_k]; slots with an id out of range contribute zero.
            w13_scale: float32 [E, 2I/128, H/128], FP8 only; other forms of scales as `operands.scale_shapes` says.
            w2_scale: float32 [E, H/128, I/128], FP8 only.
            expert_map: int32 [num_experts], local expert of each global one, -1 where it is elsewhere.
            out: [T, H], written and returned; allocated where absent.
            options: keyword arguments of the backend's `run`.

        Raises:
            ConfigError: the config cannot run this shape; nothing was launched.
            InputError: a tensor has the wrong shape, dtype or layout, or is none that the kernel takes.
        """
        self.check_config(config)
        given = options.get("hidden_scale"), options.get("w13_input_scale"), options.get("w2_input_scale")
        tensors = hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale
        operands = Operands(*tensors, expert_map, out, *given)
        self._check(operands)
        return self.run(config, operands, **options) if operands.num_tokens else operands.output()

    def check_config(self, config: Config) -> None:
        """Nothing, for a config that `supports` accepts.

        Raises:
            ConfigError: it cannot run.
        """
        if tuple(config.items()) not in self._known:
            reason = self.supports(config, self.shape)
            if reason is not None:
                raise ConfigError(f"The config {format_config(config)} cannot run: {reason}")
            self._known.add(tuple(config.items()))

    def _check(self, operands: Operands) -> None:
        for name in self.without:
            if getattr(operands, name) is not None:
                raise InputError(f"{self.name} takes no {name}; leave it out.")
        if self.contract is not None:
            self.contract.check(operands)

    @functools.cached_property
    def _random(self) -> reference.RandomInputs:
        return reference.RandomInputs(getattr(self, "convert_weights", None))

    def inputs(self, shape: MoEShape, topk_ids: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `launch` on random data of order one, on the device of `topk_ids`.

        Weights are converted where the kernel has `convert_weights`; they are made once for a shape, device and seed and stay
        with the adapter.
        """
        return self._random.make(shape, topk_ids, seed)

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """The layer in float64, expert by expert, in plain torch; FP8 with the same quantisation steps."""
        return reference.layer(shape, inputs)


class CandidateKernel(LayerKernel):
    """A `LayerKernel` that can launch several configs of which the GPU lets one run: it has `run_candidates` too."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "run_candidates" in vars(cls):
            shown = _shown(CandidateKernel.launch_candidates, cls.run_candidates, cls.without)
            cls.launch_candidates = shown  # type: ignore[method-assign]

    def run_candidates(
        self,
        configs: Sequence[Config],
        blocks: Sequence["TokenBlocks"],
        choice: torch.Tensor,
        operands: Operands,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As `run`, with all of the configs; those of them that were not chosen have blocks without rows."""
        raise NotImplementedError

    def launch_candidates(
        self,
        configs: Sequence[Config],
        blocks: Sequence["TokenBlocks"],
        choice: torch.Tensor,
        /,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Runs the layer with the one of several configs that was chosen on the GPU; all of them are launched.

        Args:
            configs: candidates.
            blocks: of each candidate, from `select.align_and_select`: only the chosen one's have rows.
            choice: int32 [1], its place.
            options: keyword arguments of the backend's `run_candidates`. `streams` are for the candidates after the
                first, to run beside it; none runs them one after the other.

        The other arguments, and what is raised, are those of `launch`.
        """
        for config in configs:
            self.check_config(config)
        given = options.get("hidden_scale"), options.get("w13_input_scale"), options.get("w2_input_scale")
        tensors = hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale
        operands = Operands(*tensors, expert_map, out, *given)
        self._check(operands)
        if not operands.num_tokens:
            return operands.output()
        return self.run_candidates(configs, blocks, choice, operands, **options)


def runnable(
    name: str,
    shape: MoEShape,
    configs: Sequence[_C],
    refusal: Callable[[_C, MoEShape], str | None],
    *,
    every_form: bool = False,
) -> list[_C]:
    """Those of a kernel's configs that nothing speaks against on a shape.

    Args:
        every_form: whether the kernel has the activations that are not SiLU and the scales that are not blocks of 128.

    Raises:
        ConfigError: none can; says what the first lacks.
    """
    if shape.form and not every_form:
        raise ConfigError(f"{name} has no {' and '.join(shape.form)}; use triton_fused_moe.")
    reasons = [refusal(config, shape) for config in configs]
    found = [config for config, reason in zip(configs, reasons, strict=True) if reason is None]
    if not found:
        raise ConfigError(f"No config of {name} runs {shape}: {reasons[0]}")
    return found


def check_workspace(operands: Operands, workspace: Any) -> None:
    """Nothing, where memory that a caller brings, if any, has room for the batch.

    Raises:
        InputError: it has not.
    """
    if workspace is not None and workspace.num_slots < operands.num_slots:
        raise InputError(
            f"The workspace holds {workspace.num_slots} slots, this batch has {operands.num_slots}; allocate a larger one."
        )


def check_blocks(operands: Operands, blocks: "TokenBlocks", block_m: int) -> None:
    """Nothing, where an alignment that a caller brings is of this batch and of a config's block_m.

    Raises:
        InputError: it is another.
    """
    num_slots = operands.num_slots
    if (blocks.block_m, blocks.num_slots) != (block_m, num_slots):
        raise InputError(
            f"The blocks hold {blocks.num_slots} slots at block_m={blocks.block_m}; "
            f"align this batch of {num_slots} slots at block_m={block_m}."
        )


def launch_each(kernel: LayerKernel, configs: Sequence[Config], arguments: Mapping[str, Any]) -> list[str | None]:
    """Launches each config once, for kernels that compile at their first launch; for each None, or why it fails."""
    reasons: list[str | None] = []
    for config in configs:
        try:
            kernel.launch(config, **arguments)
            reasons.append(None)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    return reasons


def only_on_hopper(who_runs: str) -> None:
    """Nothing, on sm_90 and where there is no GPU.

    Raises:
        InputError: the GPU is another.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        raise InputError(f"{who_runs} on sm_90 only, this is {torch.cuda.get_device_name()}; use another kernel.")
