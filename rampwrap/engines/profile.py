"""The plans of a model: one for each shape of MoE layer that its `config.json` gives a rank."""

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from rampwrap.checkpoint.model import Layers, Ranks
from rampwrap.dispatch.graph import chooses_in_graph
from rampwrap.engines.backends import backend_for
from rampwrap.engines.installed import NAMES
from rampwrap.engines.vllm_layer import preference
from rampwrap.errors import ConfigError, FitError, InputError
from rampwrap.files import make_folder
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import device_of
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build.library import find
from rampwrap.measure.outlook import PLANNING, Keep
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import HOOK_KERNELS, PLANS, SUFFIX, Plans, alike, plans_path
from rampwrap.plan.make import make_plan

Measure = Callable[[MoEShape, str, Keep], tuple[Kernel, Timings]]
"``measure(shape, table, keep)``: profiles a shape into a table's file; the kernel and what was measured."
SIMULATED = "sim"
"The kernel by which every command can be tried out."


def kernels_of(engine: str, shape: MoEShape) -> tuple[str, ...]:
    """The kernels whose plans the hook of an engine takes for a layer.

    Raises:
        InputError: it takes none; with the reason.
    """
    if engine == "vllm":
        return preference(shape)
    if shape.form:
        name = NAMES[engine]
        raise InputError(f"the hook of {name} runs no layer with {' and '.join(shape.form)}; leave it to {name}.")
    if engine == "transformers" and shape.dtype != "bf16":
        raise InputError(
            f"transformers' hook runs experts in bf16, and these are in {shape.dtype}; load the model as bfloat16 and pass "
            "--dtype bf16, or leave it to transformers."
        )
    if shape.top_k > shape.num_local_experts:
        raise InputError(
            f"the hook of {NAMES[engine]} runs no layer with fewer experts on a rank ({shape.num_local_experts}) than top_k={shape.top_k}; "
            "use fewer ranks."
        )
    return HOOK_KERNELS[engine]


def detours(engine: str, layers: Layers, ranks: Ranks, version: str = "") -> list[str]:
    """A sentence for each kind of layers that the engine itself runs with a kernel that our hook never sees.

    Raises:
        InputError: no layer of the model has a shape here; with the reason, and what the engine runs them with.
    """
    name, found = NAMES[engine], list[str]()
    for its in layers.alike:
        own = backend_for(engine, layers, its, ranks, version)
        if not layers.shapes:
            more = f"; on Hopper {name} itself runs them with {own}" if own else ""
            raise InputError(f"{its.reason.removesuffix('.')}{more}.")
        if own is not None and not own.hooked and its.shapes:
            flag = "; plans serve where it is started with --moe-backend triton" if engine == "vllm" else ""
            found.append(f"On Hopper {name} itself runs {' and '.join(map(str, its.shapes))} with {own}{flag}.")
    return found


def check_kernel(engine: str, kernel: str, shape: MoEShape) -> None:
    """Refuses a kernel whose plans the engine's hook never takes, before it is profiled; the simulated one costs nothing.

    Raises:
        InputError: with the kernels that it takes.
    """
    known = kernels_of(engine, shape)
    if kernel != SIMULATED and not any(alike(kernel, name) for name in known):
        raise InputError(
            f"the hook of {NAMES[engine]} takes no plans of kernel {kernel!r} for {shape}; use --kernel {' or '.join(known)}, or profile it "
            "without --engine."
        )


def default_kernel(engine: str | None, shape: MoEShape) -> tuple[str, str]:
    """The kernel that is profiled where the user names none, and in a sentence what would be faster; "" for nothing.

    What the engine's hook prefers, as far as it can be made here. The CuTe kernels count only where their library was
    built: without it their hundreds of configs would be compiled before anything is measured.
    """
    usual = kernels_of(engine, shape)[0] if engine in HOOK_KERNELS else "triton_fused_moe"
    if engine != "vllm" or (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9):
        return usual, ""
    hint = ""
    for name in preference(shape):
        try:
            # Asked first: with the CuTe DSL installed the adapter works without a library too.
            if "cute_moe" in name and find() is None:
                raise InputError("run 'rampwrap build-kernels' first")
            return make_kernel(name, shape).name, hint
        except (InputError, ConfigError) as error:
            if shape.dtype == "fp8" and not hint:
                reason = str(error).removesuffix(".")
                hint = f"In FP8 the CuTe kernels are faster, but cannot be profiled here: {reason}."
    return usual, hint


def file_name(kernel: str) -> str:
    """A kernel's name as part of a file's: ``portfolio-a+b``."""
    return kernel.replace(":", "-")


def plan_name(kernel: str, device: str, shape: MoEShape) -> str:
    """``triton_fused_moe-NVIDIA_H200-E64-k8-H2048-I1024-bf16``; for people, since plans are found by their content."""
    local = "" if shape.num_local_experts == shape.num_experts else f"of{shape.num_local_experts}"
    sizes = f"E{shape.num_experts}{local}-k{shape.top_k}-H{shape.hidden_size}-I{shape.intermediate_size}"
    return "-".join([file_name(kernel), "_".join(device.split()), sizes, shape.dtype, *shape.suffixes])


def profile_model(
    layers: Layers,
    kernel: Callable[[MoEShape], Kernel],
    measure: Measure,
    *,
    folder: str | os.PathLike[str] | None = None,
    prepare: Callable[[Kernel, str], Any] | None = None,
    during: Callable[[tuple[str, ...]], contextlib.AbstractContextManager[None]] = lambda kind: (
        contextlib.nullcontext()
    ),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Profiles every MoE shape of a model and writes its plans where the engines' hooks look for them.

    A table that is done has its plan at once, as that of a sweep or of one kernel of several.

    Args:
        layers: of the model.
        kernel: makes the kernel of a shape, for its name and device.
        measure: profiles a shape; an interrupted call goes on where it stopped.
        folder: for plans and tables; $RAMPWRAP_PLANS or the default folder where absent.
        prepare: called with each kernel and the path of its plan, once that is written.
        during: of an `Outlook`, within which a plan is made.
        say: takes a sentence on each plan that serves until a better one is there.

    Returns:
        ``plans`` (the files written), ``left`` (a sentence for each reason why layers have none), ``out`` (the folder) and
        ``text``.

    Raises:
        InputError: the place of the plans is no folder and none can be made there.
        TableError, FitError: as profiling and fitting.
    """
    place = make_folder(folder if folder is not None else plans_path(), f"give another --out, or set {PLANS}")
    lines, written = list(layers.left), []
    for shape in layers.shapes:
        made = kernel(shape)
        name = plan_name(made.name, device_of(made).name, shape)
        early: dict[pathlib.Path, None] = {}

        def keep(its: Kernel, timings: Timings, table: str, shape: MoEShape = shape, early: Any = early) -> None:
            path = place / f"{plan_name(its.name, device_of(its).name, shape)}{SUFFIX}"
            with contextlib.suppress(FitError):  # too few rows perhaps, which those to come mend
                make_plan(timings, source=table).save(path)
                early[path] = None
                say(f"{path} serves if this is stopped; it is of {table}.")

        made, timings = measure(shape, str(place / f"{name}.npz"), keep)
        path = place / f"{name}{SUFFIX}"
        with during(PLANNING):
            plan = make_plan(timings, source=f"{name}.npz")
            plan.save(path)
            # Those of one kernel of several would go before the plan of all where theirs is preferred.
            for other in early.keys() - {path}:
                other.unlink(missing_ok=True)
            if prepare is not None:
                prepare(made, str(path))
        written.append(str(path))
        choices = sum(len(its.candidates) > 1 for its in plan.in_graph) if chooses_in_graph(made) else 0
        lines.append(f"{path}: {shape}, {len(plan.configs)} configs, {choices} of {len(plan.in_graph)} batches choose")
    if place != plans_path() and not Plans.read().found:
        lines.append(f"next: RAMPWRAP_PLANS={place} for the engine")
    return {"out": str(place), "plans": written, "left": list(layers.left), "text": "\n".join(lines)}
