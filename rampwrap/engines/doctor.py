"""What would serve the layers of a model in an engine, found out without a GPU and by the code that decides it there."""

import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import attrs

from rampwrap.checkpoint.model import Alike, Layers, Ranks, layers_of
from rampwrap.checkpoint.quantisation import FORMS
from rampwrap.engines import sglang, vllm_cutlass
from rampwrap.engines.backends import CUTLASS, TRITON, Backend, backend_for
from rampwrap.engines.defaults import KERNELS as DEFAULTS
from rampwrap.engines.defaults import TRITON as TRITON_KERNEL
from rampwrap.engines.defaults import kernel_without_plan
from rampwrap.engines.installed import NAMES, Installed, installed
from rampwrap.engines.profile import kernels_of
from rampwrap.engines.vllm_layer import by_another
from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES, SIMULATED, Device, find_device, no_gpu
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.folder import SHIPPED, Plans, made_elsewhere
from rampwrap.plan.plan import Plan

HOPPERS = ("nvidia-h100-80gb-hbm3", "nvidia-h200")
"GPUs that are looked at where nothing says which."


@attrs.frozen
class Served:
    """What serves a layer on a GPU.

    Attributes:
        gpu: its label; "" where there is neither a GPU here nor a plan for any.
        shape: of the layer.
        kernel, plan: ours and the plan's file; "" where the engine's own runs it, or where there is no plan.
        source: ``own`` for a plan of the user's, ``rampwrap`` for one that came with it, ``defaults`` for the kernel's without one.
        reason: why none does, or what else is to be said of the plan, as clauses.
        remedy: what to do about it, with the exact command.
    """

    gpu: str
    shape: MoEShape
    kernel: str = ""
    plan: str = ""
    source: str = ""
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f"on {self.gpu}: " if self.gpu else ""
        if not self.kernel:
            return f"{where}not served: {self.reason}; {self.remedy}"
        if self.source == "defaults":
            return f"{where}{self.kernel} by its defaults: {self.reason}; {self.remedy}"
        brought = ", which came with rampwrap" if self.source == "rampwrap" else ""
        more = f" ({self.reason})" if self.reason else ""
        return f"{where}{self.kernel} by {self.plan}{brought}{more}"


@attrs.frozen
class Finding:
    """Layers that are alike.

    Attributes:
        alike: the layers.
        backend: what the engine itself runs them with on Hopper; None where that is not known.
        reason: why they stay with the engine whatever plans there are; "" where they need not.
        served: by GPU and shape.
    """

    alike: Alike
    backend: Backend | None
    reason: str = ""
    served: tuple[Served, ...] = ()

    def on(self, gpu: str) -> bool:
        """Whether all of them are served on a GPU."""
        return not self.reason and all(its.kernel for its in self.served if its.gpu == gpu)

    def text(self, engine: str) -> str:
        """Lines for people."""
        number = len(self.alike.numbers)
        layers = "1 layer" if number == 1 else f"{number} layers" if number else "layers"
        shapes = " and ".join(map(str, self.alike.shapes)) or FORMS[self.alike.form]
        own = f"on Hopper {NAMES[engine]} itself runs them with {self.backend}" if self.backend else ""
        lines = [f"{layers}, {shapes}" + (f"; {own}" if own else "")]
        lines += [f"  not served: {self.reason.removesuffix('.')}"] if self.reason else []
        return "\n".join([*lines, *(f"  {its}" for its in self.served)])


@attrs.frozen
class Diagnosis:
    """What `diagnose` found."""

    model: str
    engine: Installed
    plans: Plans
    findings: tuple[Finding, ...]

    @property
    def gpus(self) -> tuple[str, ...]:
        """Labels of those that were looked at."""
        return tuple(dict.fromkeys(its.gpu for finding in self.findings for its in finding.served if its.gpu))

    @property
    def served(self) -> bool:
        """Whether every layer is, on each of the GPUs; an engine that is not here may be elsewhere."""
        on_all = all(finding.on(gpu) for finding in self.findings for gpu in self.gpus)
        return bool(self.gpus) and on_all and not self.engine.faults

    def __str__(self) -> str:
        where = f"plans in {self.plans.where} ({len(self.plans.found)})"
        where += f" and of rampwrap ({len(self.plans.shipped)})" if self.plans.shipped else ""
        lines = [f"{self.model} in {self.engine}; {where}"]
        lines += [f"rampwrap leaves {self.engine} as it is: {fault}" for fault in self.engine.faults]
        lines += [f"passed over: {sentence}" for sentence in self.plans.broken]
        lines += [finding.text(self.engine.engine) for finding in self.findings]
        last = f"every layer is served on {' and on '.join(self.gpus)}" if self.served else "not every layer is served"
        return "\n".join([*lines, last])

    def to_dict(self) -> dict[str, Any]:
        """The same, to be printed as JSON."""
        return {
            "model": self.model,
            "engine": attrs.asdict(self.engine),
            "plans": {
                "where": self.plans.where,
                "own": [path for path, _ in self.plans.found],
                "rampwrap": [path for path, _ in self.plans.shipped],
                "broken": list(self.plans.broken),
            },
            "layers": [
                {
                    "layers": list(finding.alike.numbers),
                    "form": finding.alike.form,
                    "backend": finding.backend and attrs.asdict(finding.backend),
                    "reason": finding.reason,
                    "served": [attrs.asdict(its) for its in finding.served],
                }
                for finding in self.findings
            ],
            "served": self.served,
        }


def diagnose(
    model: str | os.PathLike[str],
    engine: str,
    ranks: Ranks,
    *,
    dtype: str | None = None,
    gpu: str | None = None,
    triton: bool = False,
) -> Diagnosis:
    """What would serve the layers of a model.

    Args:
        model: a folder with its ``config.json``, the file, or a name that Hugging Face's cache knows.
        engine: of `rampwrap.engines.installed.NAMES`.
        ranks: how the engine spreads it.
        dtype: in place of what the config says.
        gpu: its name; by default the one that is here, else all that there is a plan for, of any of these layers, else `HOPPERS`
            for an engine whose layers defaults serve.
        triton: whether vLLM is started with ``--moe-backend triton``.

    Raises:
        InputError: no readable config, no routed layer, or a GPU that nobody knows.
    """
    layers, plans, its = layers_of(model, ranks, dtype=dtype, engine=engine), Plans.read(), installed(engine)
    devices = _devices(gpu, engine, plans, layers)
    command = f"rampwrap profile --engine {engine} --model {shlex.quote(os.fspath(model))}{ranks.arguments}"
    command += f" --dtype {dtype}" if dtype else ""
    findings = []
    for alike in layers.alike:
        backend = backend_for(engine, layers, alike, ranks, its.version)
        if triton and engine == "vllm" and backend is not None and alike.shapes:
            backend = attrs.evolve(backend, name=TRITON, hooked=True, remark="")
        served, reason = [], alike.reason
        for shape in alike.shapes:
            try:
                kernels = kernels_of(engine, shape)
            except InputError as error:
                reason = str(error)
                continue
            if backend is not None and not backend.hooked and engine == "vllm":
                reason = by_another(backend.name).reason
            if backend is not None and backend.name == CUTLASS and its.version and not reason:
                reason = "; ".join(vllm_cutlass.faults())
            served += [_served(engine, plans, shape, device, kernels, command) for device in devices]
        findings.append(Finding(alike, backend, reason, tuple(served)))
    return Diagnosis(os.fspath(model), its, plans, tuple(findings))


def _devices(gpu: str | None, engine: str, plans: Plans, layers: Layers) -> Sequence[Device | None]:
    """The GPUs to look at: without a name or a GPU here those of plans, else those that defaults are for; None alone for none."""
    if gpu is not None:
        known = {plan.device.label: plan.device for _, plan in plans.every}
        named = [device for device in known.values() if device.name.lower() == gpu.strip().lower()]
        return named or [find_device(gpu)]
    if no_gpu() is None:
        return [Device.current()]
    shapes = {*layers.shapes, *(its.alone for its in layers.shapes)}
    found = {plan.device.label: plan.device for _, plan in plans.every if plan.shape in shapes}
    return list(found.values()) or ([DEVICES[name] for name in HOPPERS] if engine in DEFAULTS else [None])


def _served(
    engine: str, plans: Plans, shape: MoEShape, device: Device | None, kernels: Sequence[str], command: str
) -> Served:
    # The hooks of these know a rank's experts alone.
    here = shape if engine == "vllm" else shape.alone
    usable = plans if engine == "vllm" else plans.with_local()
    gpu = "" if device is None else device.label
    found, passed_over = _plan(engine, usable, here, device, kernels) if device is not None else (None, ())
    if found is not None:
        path, plan = found
        assert device is not None
        said = [*passed_over, *filter(None, [made_elsewhere(plan, device).removeprefix(", ")])]
        source = "rampwrap" if pathlib.Path(path).parent == SHIPPED else "own"
        return Served(gpu, shape, plan.kernel, path, source, "; ".join(said))
    reason, kernel = usable.why_not(here, device or SIMULATED, kernels), ""
    if device is not None and engine in DEFAULTS:
        default = kernel_without_plan(here, device, DEFAULTS[engine])
        if not isinstance(default, str):
            kernel = default.name
        elif engine == "vllm":
            reason += f", nor do defaults serve ({default})"
        else:  # transformers' layers run the Triton kernel's, whatever they are
            kernel = TRITON_KERNEL
    return Served(gpu, shape, kernel, "", "defaults" if kernel else "", reason, plans.remedy(command))


def _plan(
    engine: str, plans: Plans, shape: MoEShape, device: Device, kernels: Sequence[str]
) -> tuple[tuple[str, Plan] | None, tuple[str, ...]]:
    if engine == "sglang":
        return sglang.plan_for(plans, shape, device), ()
    fit = plans.find(shape, device, kernels)
    return (None, ()) if fit is None else ((fit.path, fit.plan), fit.passed_over)
