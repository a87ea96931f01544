"""`Dispatcher`: a kernel and a policy. Every call launches the config that the policy picks for that call's routing."""

import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rampwrap.errors import CaptureError, ConfigError, InputError, PlanMismatchError
from rampwrap.kernel.device import Device, device_of
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.protocol import (
    Config,
    Kernel,
    check_configs,
    config_key,
    format_config,
    index_by_key,
    why_not_launched,
)
from rampwrap.kernel.shape import MoEShape
from rampwrap.observe.registry import watch
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import Choice, Policy, Static
from rampwrap.policy.static import default_table
from rampwrap.routing.counts import check_counts, expert_counts, to_numpy

_NO_COUNTS: IntArray = np.zeros(0, dtype=np.int64)


class Dispatcher:
    """Wraps a kernel: called like `kernel.launch` without its config, and chooses the config itself.

    Args:
        kernel: anything with `configs`, `grid` and `launch` (`rampwrap.kernel.protocol.Kernel`); `launch` must have a
            parameter named ``topk_ids`` (integers [num_tokens, top_k]), by which the routing is seen.
        policy: a `Plan`, the path of one, or a `Policy`; None runs the kernel's own default configs.
        shape: the layer; None takes the plan's or ``kernel.shape``.
        device: where the kernel runs; None asks torch (or ``kernel.device``). A plan for another one is refused.
        strict: raise when the plan is refused, instead of one warning and the plan's static table.

    Raises:
        ConfigError: the kernel's config list is empty or has duplicates, or lacks a config of the policy.
        InputError: `kernel` is none, or `policy` is none, no shape is known, or `launch` has no parameter ``topk_ids``.
        PlanError: the plan file cannot be read.
        PlanMismatchError: `strict`, and the plan is for something else.
    """

    def __init__(
        self,
        kernel: Kernel,
        policy: "Plan | Policy | str | os.PathLike[str] | None" = None,
        *,
        shape: MoEShape | None = None,
        device: Device | None = None,
        strict: bool = False,
    ) -> None:
        _refuse_no_kernel(kernel)
        self.kernel = kernel
        configs = check_configs(kernel.configs, f"kernel {kernel.name!r}")
        plan = Plan.load(policy) if isinstance(policy, str | os.PathLike) else policy
        if plan is not None and not isinstance(plan, Plan) and not hasattr(plan, "select"):
            raise InputError(
                f"policy is a {type(plan).__name__}; give a Plan, the path of one, a Policy, or None for the kernel's defaults."
            )
        shape = shape or getattr(kernel, "shape", None) or (plan.shape if isinstance(plan, Plan) else None)
        if shape is None:
            raise InputError(
                f"the layer's shape is unknown; pass shape=MoEShape(...) to Dispatcher for kernel {kernel.name!r}."
            )
        self.shape: MoEShape = shape
        if isinstance(plan, Plan):
            self.policy = self._accept(plan, device or device_of(kernel), strict)
        else:
            self.policy = plan if plan is not None else Static(configs, default_table(kernel))
        self._listed, self._by_key = configs, index_by_key(configs)
        self._configs = [self._own(config, "fit the policy to this kernel") for config in self.policy.configs]
        self.launch_counts = [0] * len(self._configs)
        "How often each config of `policy.configs` was launched."
        self._launch = kernel.launch
        self._pinned: Config | None = None
        # Not of the Policy protocol: histogram and choice in one call, for policies that have it.
        self._of_ids = getattr(self.policy, "index_of_ids", None)
        self._ids_position = self._find_topk_ids()
        self._row = (shape.top_k,)
        self._checked: set[Any] = set()
        "Integer types of ids that were seen: looking one up takes a tenth of asking what kind it is."
        watch(self)

    def _accept(self, plan: Plan, device: Device, strict: bool) -> Policy:
        try:
            plan.check(self.kernel, device, self.shape)
        except PlanMismatchError as error:
            if strict:
                raise
            warnings.warn(f"rampwrap serves static configs: {error}", RuntimeWarning, stacklevel=4)
            lost = (why_not_launched(self.kernel, config, self.shape) for config in plan.configs)
            if plan.kernel == self.kernel.name and not any(lost):
                return plan.static_policy()
            return Static(tuple(self.kernel.configs), default_table(self.kernel))
        return plan.policy(kernel=self.kernel)

    def _find_topk_ids(self) -> int:
        """Where ``topk_ids`` stands among the positional arguments of a call."""
        names = list(inspect.signature(self.kernel.launch).parameters)
        if "topk_ids" not in names:
            raise InputError(
                f"launch of kernel {self.kernel.name!r} has parameters {', '.join(names)}; one must be named topk_ids."
            )
        return names.index("topk_ids") - 1  # the config stands first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Launches the kernel with the chosen config and returns what it returns.

        Raises:
            CaptureError: the policy needs the histogram, which the host cannot read under CUDA graph capture.
            InputError: there are no topk_ids, or they are no integers [num_tokens, top_k], or one of them is out of range.
        """
        if self._pinned is not None:
            return self._launch(self._pinned, *args, **kwargs)
        try:
            ids = kwargs["topk_ids"] if "topk_ids" in kwargs else args[self._ids_position]
        except IndexError:
            given = ", ".join([f"{len(args)} positional arguments", *kwargs])
            raise InputError(
                f"launch of kernel {self.kernel.name!r} was given {given} and no topk_ids; pass topk_ids=..."
            ) from None
        index = self._choose(ids, kwargs.get("expert_map"))
        self.launch_counts[index] += 1
        return self._launch(self._configs[index], *args, **kwargs)

    def _check_ids(self, topk_ids: Any) -> None:
        """Refuses what is no integers [num_tokens, top_k]: a wrong axis would be a wrong histogram."""
        try:
            if topk_ids.shape[1:] == self._row and topk_ids.dtype in self._checked:
                return
        except AttributeError:  # nested lists
            topk_ids = np.asarray(topk_ids)
        if tuple(topk_ids.shape) == (0,):
            return
        if len(topk_ids.shape) != 2 or topk_ids.shape[1] != self.shape.top_k:
            raise InputError(
                f"topk_ids has shape {tuple(topk_ids.shape)}; give [num_tokens, top_k] with top_k={self.shape.top_k}."
            )
        dtype = topk_ids.dtype
        if not (dtype.kind in "iu" if hasattr(dtype, "kind") else "int" in str(dtype)):  # numpy's, else torch's
            raise InputError(f"topk_ids has dtype {dtype}; give integers.")
        self._checked.add(dtype)

    def _choose(self, topk_ids: Any, expert_map: Any) -> int:
        self._check_ids(topk_ids)
        if not self.policy.needs_counts:
            return self.policy.index(_NO_COUNTS, len(topk_ids))
        _refuse_capture(topk_ids)
        ids = to_numpy(topk_ids)
        if expert_map is None and self._of_ids is not None:
            index: int | None = self._of_ids(ids, self.shape.num_experts)
            if index is not None:
                return index
        return self.policy.index(expert_counts(ids, self.shape.num_experts, expert_map), len(ids))

    def select(
        self,
        topk_ids: Any = None,
        *,
        expert_counts: Any = None,
        num_tokens: int | None = None,
        expert_map: Any = None,
    ) -> Choice:
        """What a call with this routing would launch, and why; launches nothing.

        Args:
            topk_ids: integers [num_tokens, top_k]; or give the histogram itself:
            expert_counts: integers [num_local_experts].
            num_tokens: tokens of the batch, padding included; None takes sum(expert_counts) / top_k, right where all experts
                are local.

        Raises:
            InputError: ids as in a call, or counts that are negative, of wrong length or more than the tokens have.
        """
        if topk_ids is not None:
            self._check_ids(topk_ids)
            counts, tokens = self._count(topk_ids, expert_map), len(topk_ids)
        elif expert_counts is not None:
            counts = check_counts(expert_counts, self.shape.num_local_experts)
            tokens = num_tokens if num_tokens is not None else -(-int(counts.sum()) // self.shape.top_k)
            if counts.sum() > tokens * self.shape.top_k:
                raise InputError(
                    f"expert_counts sums to {int(counts.sum())}, more than tokens x top_k = {tokens * self.shape.top_k}; "
                    "recount topk_ids."
                )
        else:
            raise InputError("select was given no routing; pass topk_ids or expert_counts.")
        return self.policy.select(counts, tokens)

    def _count(self, topk_ids: Any, expert_map: Any) -> IntArray:
        _refuse_capture(topk_ids)
        return expert_counts(topk_ids, self.shape.num_experts, expert_map)

    def explain(self, topk_ids: Any = None, **routing: Any) -> str:
        """For people: what a call with this routing would launch and why; without one, what was launched so far.

        Args are those of `select`.
        """
        if topk_ids is None and not routing:
            total = sum(self.launch_counts)
            if not total:
                return f"{self.kernel.name}: nothing launched yet"
            ranked = sorted(enumerate(self.launch_counts), key=lambda item: (-item[1], item[0]))
            lines = [
                f"  {count / total:6.1%}  {count:8d}  {format_config(self._configs[i])}" for i, count in ranked if count
            ]
            return "\n".join([f"{self.kernel.name}: {total} launches", *lines])
        choice = self.select(topk_ids, **routing)
        pinned = "" if self._pinned is None else f"pinned: {format_config(self._pinned)}; without the pin: "
        return f"{self.kernel.name} ({self.shape}): {pinned}{choice}"

    def pin(self, config: Config | int | None) -> "Dispatcher":
        """From now on always this config (or the kernel's config of this index); None lets the policy choose again.

        Raises:
            ConfigError: the kernel has no such config.
        """
        if config is None:
            self._pinned = None
            return self
        configs: Sequence[Config] = self.kernel.configs
        if isinstance(config, int):
            if not 0 <= config < len(configs):
                raise ConfigError(
                    f"config index {config} does not exist; kernel {self.kernel.name!r} has {len(configs)}."
                )
            self._pinned = configs[config]
            return self
        if not isinstance(config, Mapping):
            raise ConfigError(f"pin was given {config!r}; give a config of kernel {self.kernel.name!r} or its index.")
        self._pinned = self._own(config, "pick one of kernel.configs")
        return self

    def _own(self, config: Config, remedy: str) -> Config:
        """The kernel's own object where it lists the config (a `Portfolio` knows these), or one that it supports."""
        found = self._by_key.get(config_key(config))
        if found is not None:
            return self._listed[found]
        reason = why_not_launched(self.kernel, config, self.shape)
        if reason is not None:
            raise ConfigError(
                f"kernel {self.kernel.name!r} has no config {format_config(config)} ({reason.rstrip('.')}); {remedy}."
            )
        return config


def _refuse_no_kernel(kernel: Any) -> None:
    """The first mistakes: a class, a function, a module in place of a kernel."""
    if isinstance(kernel, type):
        raise InputError(f"kernel is the class {kernel.__name__}; give an instance of it, {kernel.__name__}(...).")
    missing = [name for name in ("name", "configs", "grid", "launch") if not hasattr(kernel, name)]
    if missing:
        raise InputError(
            f"kernel is a {type(kernel).__name__} without {', '.join(missing)}; give an object with name, configs, "
            "grid(config, shape) and launch(config, ...), as in examples/wrap_in_three_lines.py."
        )


def _refuse_capture(topk_ids: Any) -> None:
    """The host must not wait for the GPU while a CUDA graph is captured."""
    if getattr(topk_ids, "is_cuda", False) and sys.modules["torch"].cuda.is_current_stream_capturing():
        raise CaptureError(
            "the routing cannot be read on the host under CUDA graph capture; pin a config or use a static policy while capturing."
        )
