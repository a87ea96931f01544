"""Compiles what a graph dispatcher launches before an engine needs it, in parallel, and only where it was not yet done.

In the engine's own process the kernels of a plan take a minute or two one by one; sixteen processes take seconds, and
Triton's disk cache keeps them for every later start on the machine. CuTe kernels come compiled in their library; those
that it lacks are compiled the same way where the CuTe DSL is installed, and kept in the cache of its object files.

    python -m rampwrap.engines.prepare PLAN.json MAX_TOKENS
"""

import hashlib
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rampwrap._version import __version__
from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.errors import RampwrapError
from rampwrap.files import locked, make_folder, replacing
from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.portfolio import by_member
from rampwrap.kernel.protocol import Config, Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import Plan

logger = logging.getLogger("vllm.rampwrap")
LIMIT_S = 600
MAX_TOKENS = 16384
"Tokens of a step that engines allow by default on large GPUs."


def ensure_compiled(graph_dispatcher: GraphDispatcher, path: str) -> bool:
    """Compiles in processes of their own what `graph_dispatcher` will launch, unless Triton's cache has it from before.

    The processes need up to half a gigabyte of the GPU each and are gone when this returns. A failure costs time only:
    the engine then compiles as it goes.

    Args:
        graph_dispatcher: of a plan for our Triton or CuTe kernels, or both; others have their own way and are left alone.
        path: the plan's file, which the processes read.

    Returns:
        Whether something had to be compiled.
    """
    if not torch.cuda.is_available():
        return False
    compiled = False
    assert graph_dispatcher.plan is not None
    try:
        # Not only what its spans launch: in mode lagged the host may choose any.
        for kernel, configs in by_member(graph_dispatcher.kernel, graph_dispatcher.plan.configs):
            if kernel.name == "cute_moe":
                compiled |= _ensure_cute(kernel, configs, graph_dispatcher.max_tokens, path)
            elif kernel.name == "triton_fused_moe":
                compiled |= _ensure(graph_dispatcher, _mark(path), path)
    except (OSError, RampwrapError) as error:  # a cache that cannot be written, say
        logger.warning("rampwrap could not compile ahead (%s); the engine does it as it goes.", error)
    return compiled


def _ensure(graph_dispatcher: GraphDispatcher, mark: pathlib.Path, path: str) -> bool:
    # One process of a machine at a time; ranks that come second find the work done.
    with locked(mark, wait_s=-1):
        # The mark holds the largest batch compiled for; larger ones may take spans that are not.
        if mark.exists() and int(mark.read_text(encoding="utf-8") or 0) >= graph_dispatcher.max_tokens:
            return False
        if _run(path, graph_dispatcher.max_tokens):
            with replacing(mark) as stream:
                stream.write(str(graph_dispatcher.max_tokens).encode())
    return True


def _ensure_cute(kernel: Any, configs: Sequence[Config], max_tokens: int, path: str) -> bool:
    from rampwrap.kernels.cute.build.build import cache_folder

    compiles, done = kernel.must_compile(configs), True
    if compiles:
        make_folder(cache_folder(), "set XDG_CACHE_HOME")
        with locked(cache_folder() / "warming", wait_s=-1):
            done = _run(path, max_tokens)
    if done:
        # Linked and loaded in one piece; at its first launch each would be by itself.
        kernel.precompile(configs)
    return bool(compiles)


def _run(path: str, max_tokens: int) -> bool:
    """Compiles a plan in a process of its own; whether all could be."""
    from rampwrap.kernels.triton import pdl

    logger.info("rampwrap compiles the kernels of %s, once on this machine.", path)
    run = [sys.executable, "-m", "rampwrap.engines.prepare", path, str(max_tokens)]
    found = [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found)), pdl.VARIABLE: pdl.setting()}
    try:
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = [str(error)]
    if failed:
        logger.warning("rampwrap could not compile ahead (%s); the engine does it as it goes.", failed[0])
    return not failed


def compile_for(kernel: Kernel, path: str, max_tokens: int = MAX_TOKENS) -> bool:
    """`ensure_compiled` for a plan's file, for batches as large as engines run them."""
    if not torch.cuda.is_available():
        return False
    return ensure_compiled(GraphDispatcher(kernel, path, max_tokens=max_tokens), path)


def compile_plan(graph_dispatcher: GraphDispatcher) -> list[str]:
    """Compiles what the spans of a graph dispatcher launch up to its `max_tokens`; the errors, as sentences.

    Of a portfolio all configs of the plan: in mode lagged the host may choose any, and in graphs it never chooses.
    """
    reasons: list[str | None] = []
    assert graph_dispatcher.plan is not None
    for kernel, configs in by_member(graph_dispatcher.kernel, graph_dispatcher.plan.configs):
        if kernel.name == "cute_moe":
            its: Any = kernel
            reasons += its.precompile(configs)
        elif kernel.name == "triton_fused_moe":
            reasons += _compile_triton(graph_dispatcher, configs if kernel is not graph_dispatcher.kernel else None)
    return [reason for reason in reasons if reason]


def _compile_triton(graph_dispatcher: GraphDispatcher, configs: list[Config] | None) -> list[str | None]:
    """Compiles our Triton kernel in these configs, launched alone; None: as the spans launch it."""
    from rampwrap.kernels.triton.moe.warm import warm

    single, several = launched(graph_dispatcher) if configs is None else (configs, [])
    shape: MoEShape = graph_dispatcher.shape
    reasons = warm(shape, single) if single else []
    return reasons + (warm(shape, several, persistent=True) if several else [])


def launched(graph_dispatcher: GraphDispatcher) -> tuple[list[Config], list[Config]]:
    """What the spans up to `max_tokens` launch: configs alone, and configs among candidates."""
    single: list[Config] = []
    several: list[Config] = []
    for tokens in _firsts(graph_dispatcher):
        span = graph_dispatcher.prepared(tokens)
        if len(span.configs) == 1:
            single.append(span.configs[0])
        else:
            several += span.configs
    return _once(single), _once(several)


def _firsts(graph_dispatcher: GraphDispatcher) -> list[int]:
    """A token count of each span."""
    tokens, found = 1, []
    while tokens <= graph_dispatcher.max_tokens:
        position = graph_dispatcher.prepared(tokens).position
        found.append(tokens)
        low, high = tokens, graph_dispatcher.max_tokens + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if graph_dispatcher.prepared(middle).position == position else (low, middle)
        tokens = high
    return found


def _once(items: Sequence[Any]) -> list[Any]:
    out: list[Any] = []
    for item in items:
        if item not in out:
            out.append(item)
    return out


def _mark(path: str) -> pathlib.Path:
    """Stands for these kernels in Triton's cache: named by all that decides what is compiled."""
    import triton

    from rampwrap.kernels.triton import pdl

    root = pathlib.Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))  # noqa: PTH111, as Triton does, home or not
    said = hashlib.sha256(f"{__version__} {triton.__version__} {pdl.setting()}".encode())
    sources = (pathlib.Path(__file__).parents[1] / "kernels" / "triton").rglob("*.py")
    for file in (pathlib.Path(path), *sorted(sources)):
        said.update(file.read_bytes())
    return make_folder(root, "set TRITON_CACHE_DIR") / f"rampwrap-{said.hexdigest()[:16]}"


def main(argv: Sequence[str]) -> int:
    """Compiles one plan."""
    plan = Plan.load(argv[0])
    kernel = make_kernel(plan.kernel, plan.shape)
    reasons = compile_plan(GraphDispatcher(kernel, plan, max_tokens=int(argv[1])))
    for reason in reasons:
        print(reason, file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
