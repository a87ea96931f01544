"""What the tests share: small tables and plans, all of them of the simulated kernel."""

import contextlib
import inspect
import json
import os
import pathlib
import re
import shlex
import signal
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

# A shell starts what runs in its background with SIGINT ignored; tests of the watchdog need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Before anything imports Triton: kernels are decorated for the interpreter or for a GPU, once.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rampwrap.cli.main import main
from rampwrap.kernel import catalog
from rampwrap.kernel.catalog import KERNELS
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(64, 8, 2048, 1024)

with contextlib.suppress(ImportError):  # not on every GPU machine
    from hypothesis import settings

    # Two workers on two cores, and other work beside them: how long an example takes says nothing.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")


def remember_builtins() -> None:
    """Makes Triton's interpreter list the members of `triton.language` once, and not at each call of a device function.

    It searches all modules and classes for what is left to patch, 0.7 ms a call, and nothing is but in a kernel's own
    call: 42 % of the processor time of a test that runs `choose`. The same names are patched as before.
    """
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if interpreter.tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    same = ["package" if name == "pkg" else name for name in inspect.signature(interpreter._patch_builtin).parameters]
    if same == list(inspect.signature(patch_builtin).parameters):  # another Triton may have changed it
        interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError, AttributeError):
        remember_builtins()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def routings(*names: str) -> list[Routing]:
    return [Routing.parse(name) for name in names]


@pytest.fixture(scope="session")
def sim_kernel() -> SimKernel:
    """The simulated kernel with an OLMoE layer."""
    return SimKernel(SHAPE)


@pytest.fixture(scope="session")
def sim_timings(sim_kernel: SimKernel) -> Timings:
    """A full table of the simulated kernel: 8 token counts x 5 routings to train on, 7 x 3 others held out."""
    seen = routings("uniform", "dirichlet:1", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2")
    unseen = routings("dirichlet:0.2", "zipf:0.8", "hot:2")
    rows = workload_grid([1, 4, 16, 64, 128, 256, 1024, 4096], seen)
    rows += workload_grid([3, 12, 48, 96, 192, 512, 2048], unseen, "eval")
    counts = np.stack([expert_counts(row.topk_ids(64, 8), 64) for row in rows])
    us = np.array([[sim_kernel.time_us(config, row) for config in sim_kernel.configs] for row in counts])
    return Timings(
        us=us,
        counts=counts,
        split=tuple(row.split for row in rows),
        label=tuple(row.label for row in rows),
        kernel=sim_kernel.name,
        kernel_version=sim_kernel.version,
        device=sim_kernel.device,
        shape=SHAPE,
        configs=sim_kernel.configs,
        grids=tuple(sim_kernel.grid(config, SHAPE) for config in sim_kernel.configs),
    )


@pytest.fixture(scope="session")
def sim_plan(sim_timings: Timings) -> Plan:
    """A plan fitted to `sim_timings`."""
    return make_plan(sim_timings)


def difference(found: Any, record: Any, place: str = "") -> str | None:
    """The first place where two JSON values differ; numbers that another machine may round otherwise are alike."""
    if isinstance(found, dict) and isinstance(record, dict) and found.keys() == record.keys():
        pairs = [(f"{place}.{key}", found[key], record[key]) for key in record]
    elif isinstance(found, list) and isinstance(record, list) and len(found) == len(record):
        pairs = [(f"{place}[{number}]", *both) for number, both in enumerate(zip(found, record, strict=True))]
    else:
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (found, record))
        same = found == pytest.approx(record, rel=1e-4) if numbers else found == record
        return None if same else f"{place}: {found!r} was {record!r}"
    return next(filter(None, (difference(its, was, where) for where, its, was in pairs)), None)


@pytest.fixture(scope="session")
def is_recorded() -> Callable[[str, Any], None]:
    """``is_recorded(name, value)``: a JSON value is that of ``data/NAME.json``; REFRESH_RECORDS=1 writes it anew.

    For what long arithmetic makes of inputs that never change, where every constant was chosen by measurements.
    """

    def check(name: str, value: Any) -> None:
        path = pathlib.Path(__file__).parent / "data" / f"{name}.json"
        value = json.loads(json.dumps(value))
        if os.environ.get("REFRESH_RECORDS"):
            path.write_text(
                json.dumps(value, separators=(",", ":")).replace('],"', '],\n"').replace("},{", "},\n{") + "\n"
            )
        changed = difference(value, json.loads(path.read_text()))
        assert changed is None, f"{changed}; where that is meant, run again with REFRESH_RECORDS=1"

    return check


class Simulated(SimKernel):
    """A kernel under another's name and with some of its configs, which pretends to run them."""

    def __init__(self, shape: MoEShape, name: str, version: str, configs: Sequence[Config]) -> None:
        super().__init__(shape, configs)
        self.name, self.version = name, version

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        return CtaGrid(int(config.get("block_m") or config["BLOCK_SIZE_M"]), 4)

    def time_us(self, config: Config, counts: npt.ArrayLike) -> float:
        height = self.grid(config, self.shape).block_m
        return float(100 + 2 * height + 100 * np.ceil(np.asarray(counts) / height).sum())


@pytest.fixture
def obey(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs the first command between quotes in a message, with kernels that are simulated under the real ones' names."""
    from rampwrap.adapters import vllm_fused_moe as theirs
    from rampwrap.adapters.triton_fused_moe import TritonFusedMoE

    def one_a_height(configs: Sequence[Config], key: str) -> list[Config]:
        return list({config[key]: config for config in reversed(configs)}.values())

    def ours(shape: MoEShape) -> Simulated:
        real = TritonFusedMoE(shape)
        return Simulated(shape, real.name, real.version, one_a_height(real.configs, "block_m"))

    def vllms(shape: MoEShape) -> Simulated:
        return Simulated(shape, "vllm_fused_moe", "0.26.0", one_a_height(theirs.CONFIGS[shape.dtype], "BLOCK_SIZE_M"))

    module = types.ModuleType("simulated_kernels")
    module.__dict__.update(ours=ours, vllms=vllms)

    def run(message: str) -> int:
        found = re.search(r"'(rampwrap profile .*?)'(?= and|[.;]|$)", message)
        assert found, message
        program, *arguments = shlex.split(found[1])
        assert program == "rampwrap"
        few = ["--quiet", "--batch-size", "4", "16", "64", "--eval-batch-size", "--rounds", "2"]
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module.__name__, module)
            patched.setattr(catalog, "missing_gpu", lambda name: "")  # simulated kernels need none
            patched.setitem(KERNELS, "triton_fused_moe", f"{module.__name__}:ours")
            patched.setitem(KERNELS, "vllm_fused_moe", f"{module.__name__}:vllms")
            return main([*arguments, *few])

    return run
