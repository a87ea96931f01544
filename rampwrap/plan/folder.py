"""Plans as a deployment keeps them: a folder for many models and GPU types, searched by what is in the files.

    RAMPWRAP_PLANS     a folder of ``*.plan.json``, or one plan; `default_folder()` where it is not set
    RAMPWRAP_OWN_PLANS 1 leaves out the plans that come with rampwrap; else they serve where these have none for a layer and GPU
    RAMPWRAP_DISABLE   1 keeps every hook away from the engine

Files are read when an engine starts and never again: a plan that is replaced while it serves counts from the next
start on.
"""

import logging
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import attrs

from rampwrap.errors import ConfigError, InputError, PlanError, PlanMismatchError
from rampwrap.files import cache_folder
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.names import members_of
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import Plan

PLANS = "RAMPWRAP_PLANS"
OWN_PLANS = "RAMPWRAP_OWN_PLANS"
DISABLE = "RAMPWRAP_DISABLE"
SUFFIX = ".plan.json"
SHIPPED = pathlib.Path(__file__).parents[1] / "plans"
"Plans that come with rampwrap; a test holds them against the kernels as they are."
HOOK_KERNELS = {"sglang": ("vllm_fused_moe",), "transformers": ("triton_fused_moe",)}
"""Kernels whose plans an engine's hook takes: SGLang's own kernel has the source of vLLM's. vLLM's hook takes those of
several, which depend on the layer."""


def disabled() -> bool:
    """Whether RAMPWRAP_DISABLE is set to anything but nothing, 0, no or false."""
    return enabled(DISABLE)


def enabled(variable: str) -> bool:
    """Whether a variable of the environment is set to anything but nothing, 0, no or false."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "no", "false")


def default_folder() -> pathlib.Path:
    """``~/.cache/rampwrap/plans``, or where else `cache_folder` is."""
    return cache_folder() / "plans"


def plans_path() -> pathlib.Path:
    """Where plans are looked for: $RAMPWRAP_PLANS, else `default_folder()`."""
    given = os.environ.get(PLANS, "").strip()
    try:
        return pathlib.Path(given).expanduser() if given else default_folder()
    except RuntimeError as error:  # a user without a home
        raise InputError(f"{PLANS}={given} names a home folder, and there is none; give a full path.") from error


@attrs.frozen(eq=False)
class Fit:
    """A plan that may choose for a layer, and the kernel it was made for.

    Attributes:
        path, plan, kernel: the plan's file, what it holds, and its kernel for the layer's shape.
        passed_over: a sentence for each kernel that is preferred and has plans for this layer and GPU, none of which
            can be used: not built here, say, or of another version.
    """

    path: str
    plan: Plan
    kernel: Kernel
    passed_over: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Plans:
    """The plans of a place.

    Attributes:
        where: the folder or file.
        found: path and plan, by name.
        broken: one sentence for each file that is no usable plan.
        shipped: path and plan of those that come with rampwrap, which serve where none of `found` does.
    """

    where: str = ""
    found: tuple[tuple[str, Plan], ...] = ()
    broken: tuple[str, ...] = ()
    shipped: tuple[tuple[str, Plan], ...] = ()

    @property
    def every(self) -> tuple[tuple[str, Plan], ...]:
        """All of them; those that count first come last."""
        return (*self.shipped, *self.found)

    @classmethod
    def read(cls, where: str | os.PathLike[str] | None = None) -> "Plans":
        """Reads a folder's ``*.plan.json`` or one file; a place that is not there is empty.

        Args:
            where: that one alone; by default `plans_path()` and the plans that come with rampwrap.
        """
        if where is None:
            its, shipped = cls.read(plans_path()), cls() if enabled(OWN_PLANS) else cls.read(SHIPPED)
            return attrs.evolve(its, broken=(*its.broken, *shipped.broken), shipped=shipped.found)
        path = pathlib.Path(where)
        try:
            single = [path] if path.exists() else []
            files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else single
        except OSError as error:
            return cls(str(path), broken=(f"{path} cannot be read ({error.strerror}); set {PLANS} to another folder.",))
        found, broken = [], []
        for file in files:
            try:
                found.append((str(file), Plan.load(file)))
            except PlanError as error:
                broken.append(str(error))
        return cls(str(path), tuple(found), tuple(broken))

    def find(self, shape: MoEShape, device: Device, kernels: Sequence[str]) -> Fit | None:
        """The plan for a layer on a GPU; None if none fits.

        Of several that fit, the kernel named first in `kernels` counts, then one made under this GPU's own name, then the
        newest, then the last by name.
        """
        passed_over: list[str] = []
        for plans in (self.found, self.shipped):
            for name in kernels:
                usable, refused = [], ""
                for path, plan in plans:
                    if alike(plan.kernel, name) and plan.shape == shape and plan.device.same_kind(device):
                        kernel = _kernel(plan.kernel, shape)
                        reason = kernel if isinstance(kernel, str) else _refusal(plan, kernel, device, shape)
                        if isinstance(kernel, str) or reason is not None:
                            refused = f"{path}: {reason}"
                            continue
                        usable.append(Fit(path, plan, kernel))
                if usable:
                    best = max(usable, key=lambda fit: _rank(fit, device))
                    return attrs.evolve(best, passed_over=tuple(passed_over))
                # Nobody asked for those that come with rampwrap: that one cannot serve here is no news.
                passed_over += [refused] if refused and plans is self.found else []
        return None

    def with_local(self) -> "Plans":
        """These, and those of expert-parallel layers once more as of layers that have their local experts alone.

        Both have the same histogram: of the tokens that each local expert gets.
        """

        def local(plans: tuple[tuple[str, Plan], ...]) -> list[tuple[str, Plan]]:
            return [
                (path, attrs.evolve(plan, shape=plan.shape.alone))
                for path, plan in plans
                if plan.shape.top_k <= plan.shape.num_local_experts < plan.shape.num_experts
            ]

        found, shipped = (*self.found, *local(self.found)), (*self.shipped, *local(self.shipped))
        return attrs.evolve(self, found=found, shipped=shipped)

    def remedy(self, command: str) -> str:
        """How to put plans where an engine's hook looks for them, in a clause; by a 'rampwrap profile --engine ...'."""
        place, more = pathlib.Path(self.where), ""
        if place.is_file():
            place, more = place.parent, f" and let ${PLANS} name that folder"
        out = "" if place == default_folder() else f" --out {shlex.quote(str(place))}"
        return f"make a plan with '{command}{out}'{more}"

    def why_not(self, shape: MoEShape, device: Device, kernels: Sequence[str]) -> str:
        """Why `find` gives None: the reason of the plan that comes nearest, in a clause."""
        # Of those that come with rampwrap only one for this layer, GPU and kernel is worth a word.
        brought = [
            (path, plan)
            for path, plan in self.shipped
            if plan.shape == shape
            and plan.device.same_kind(device)
            and any(alike(plan.kernel, name) for name in kernels)
        ]
        if not self.found and not brought:
            extra = f" ({self.broken[0]})" if self.broken else ""
            return f"there is no plan in {self.where}{extra}"
        reasons = []
        for path, plan in (*self.found, *brought):
            known = any(alike(plan.kernel, name) for name in kernels)
            near = (plan.shape == shape, plan.device.same_kind(device), known)
            if not known:
                reason = f"it is for kernel {plan.kernel}, used here are {', '.join(kernels)}"
            else:
                kernel = _kernel(plan.kernel, shape)
                found = kernel if isinstance(kernel, str) else _refusal(plan, kernel, device, shape)
                reason = found or "it fits"
            reasons.append((sum(near), pathlib.Path(path), reason))
        _, nearest, reason = max(reasons, key=lambda entry: entry[0])
        where = self.where if nearest.parent != SHIPPED else SHIPPED
        if len(reasons) == 1:
            return f"{nearest.name} in {where} does not fit: {reason}"
        where = f"{self.where} and of rampwrap" if brought else self.where
        return f"none of {len(reasons)} plans in {where} fits; nearest is {nearest.name}: {reason}"


def alike(planned: str, name: str) -> bool:
    """Whether two names stand for one kernel; portfolios do in whatever order their members are named."""
    return planned == name or sorted(members_of(planned)) == sorted(members_of(name)) != []


def made_elsewhere(plan: Plan, device: Device) -> str:
    """``, made on NVIDIA H100 80GB HBM3, the same kind of GPU``, where a plan serves under another name than its own."""
    if plan.device.label == device.label:
        return ""
    return f", made on {plan.device.label}, a GPU of the same kind as {device.label} by its properties"


def _rank(fit: Fit, device: Device) -> tuple[Any, ...]:
    return fit.plan.device.label == device.label, str(fit.plan.provenance.get("made", "")), fit.path


def _kernel(name: str, shape: MoEShape) -> Kernel | str:
    """The kernel, or why there is none."""
    try:
        return make_kernel(name, shape)
    except (InputError, ConfigError) as error:
        return str(error).removesuffix(".")


def _refusal(plan: Plan, kernel: Kernel, device: Device, shape: MoEShape) -> str | None:
    try:
        plan.check(kernel, device, shape)
    except PlanMismatchError as error:
        # The command that the error ends with is for one shape; an engine's message has its own.
        return str(error).split("; make one with", maxsplit=1)[0]
    return None


class OneWarning:
    """Warns of each subject once in a process, whatever the number of layers, engines and calls."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[str] = set()

    def __call__(self, subject: str, message: str, *values: Any, level: int = logging.WARNING) -> None:
        """Logs `message` unless `subject` was warned of before."""
        if subject not in self._said:
            self._said.add(subject)
            self._logger.log(level, message, *values)
