"""The plans of a model: one for each shape of MoE layer that its `config.json` gives a rank."""

import os
from collections.abc import Callable
from typing import Any

import torch

from rampwrap.catalog import make_kernel
from rampwrap.device import device_of
from rampwrap.engines.plans import PLANS, SUFFIX, Plans, plans_path
from rampwrap.engines.vllm import preference
from rampwrap.errors import ConfigError, InputError
from rampwrap.files import make_folder
from rampwrap.fitting import make_plan
from rampwrap.kernel import Kernel, MoEShape
from rampwrap.kernels.cute.library import find
from rampwrap.models import read_model
from rampwrap.selector import chooses_in_graph
from rampwrap.timings import Timings

Measure = Callable[[MoEShape, str], tuple[Kernel, Timings]]
"``measure(shape, table)``: profiles a shape into a table's file; the kernel and what was measured."


def default_kernel(engine: str | None, shape: MoEShape) -> tuple[str, str]:
    """The kernel that is profiled where the user names none, and in a sentence what would be faster; "" for nothing.

    What the engine's hook prefers, as far as it can be made here. The CuTe kernels count only where their library was
    built: without it their hundreds of configs would be compiled before anything is measured.
    """
    usual = "triton_fused_moe"
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
    return f"{file_name(kernel)}-{'_'.join(device.split())}-{sizes}-{shape.dtype}"


def profile_model(
    model: str | os.PathLike[str],
    kernel: Callable[[MoEShape], Kernel],
    measure: Measure,
    *,
    tp_size: int = 1,
    expert_parallel: bool = False,
    dtype: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    prepare: Callable[[Kernel, str], Any] | None = None,
) -> dict[str, Any]:
    """Profiles every MoE shape of a model and writes its plans where the engines' hooks look for them.

    Args:
        model: folder with ``config.json``.
        kernel: makes the kernel of a shape, for its name and device.
        measure: profiles a shape; an interrupted call goes on where it stopped.
        tp_size, expert_parallel, dtype: as of `read_model`.
        folder: for plans and tables; $RAMPWRAP_PLANS or the default folder where absent.
        prepare: called with each kernel and the path of its plan, once that is written.

    Returns:
        ``plans`` (the files written), ``out`` (the folder) and ``text``.

    Raises:
        InputError: as `read_model`.
        TableError, FitError: as profiling and fitting.
    """
    place = make_folder(folder if folder is not None else plans_path(), f"give another --out, or set {PLANS}")
    lines, written = [], []
    for shape in read_model(model, tp_size=tp_size, expert_parallel=expert_parallel, dtype=dtype):
        made = kernel(shape)
        name = plan_name(made.name, device_of(made).name, shape)
        made, timings = measure(shape, str(place / f"{name}.npz"))
        path = place / f"{name}{SUFFIX}"
        plan = make_plan(timings, source=f"{name}.npz")
        plan.save(path)
        if prepare is not None:
            prepare(made, str(path))
        written.append(str(path))
        choices = sum(len(its.candidates) > 1 for its in plan.in_graph) if chooses_in_graph(made) else 0
        lines.append(f"{path}: {shape}, {len(plan.configs)} configs, {choices} of {len(plan.in_graph)} batches choose")
    if place != plans_path() and not Plans.read().found:
        lines.append(f"next: RAMPWRAP_PLANS={place} for the engine")
    return {"out": str(place), "plans": written, "text": "\n".join(lines)}
