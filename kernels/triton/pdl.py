"""Programmatic dependent launch (PDL): a kernel starts while the one before it ends, and waits for it on the GPU.

A launch after another costs about 2 us inside a CUDA graph, most of it between the last CTA of the one and the first of
the other. With PDL a kernel lets the next one start as soon as all its own CTAs run, and the next one waits inside.
Every kernel does both before it touches memory: `wait_for_launch_before` is its first statement, ahead of any return.
It waits first: otherwise whole chains of launches come to sit on the SMs, waiting, and take the room of the one that
works (an alignment of 16384 slots took 18.0 us so, where it takes 9.5 without PDL).
It therefore ends after the kernel before it, which holds for that one too, and so on: whatever runs behind the wait
sees all that was launched earlier, and overwrites nothing that is still read. Results are the same bits.

One kernel waits at its end, the sum of a combine (`kernels.ep.combine`): flags tell it all that it needs of the launch before, which has
waited for all before that when it lets others start. So the chain holds there too.

A kernel that is launched with the attribute but does not wait breaks this, for itself and for all that come later. Only
those whose parameter PDL hands on to `wait_for_launch_before` are given `arguments`.

RAMPWRAP_PDL says where it is used; it is read once, at the first launch:

    1        everywhere, the default where every GPU of the process is of sm_90 or later
    single   not for selection and not for candidates that it chooses from (branches of a graph, conditional nodes)
    0        nowhere

`use` changes it in a running process, between captures. What runs under another setting is another kernel to Triton's
cache: what was warmed is compiled anew.
"""

# Bodies under @triton.jit have no Python types, and their constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: N803

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

import triton
import triton.language as tl
from rampwrap.errors import InputError
from rampwrap.kernels.triton.interpreter import INTERPRETED

VARIABLE = "RAMPWRAP_PDL"
EVERYWHERE, SINGLE, NOWHERE = SETTINGS = ("1", "single", "0")

WITH: dict[str, Any] = {"PDL": True, "launch_pdl": True}
"The kernel's constant and Triton's launch option; nothing but the two together makes sense."
WITHOUT: dict[str, Any] = {"PDL": False}
"No option: the interpreter and backends other than CUDA's do not know it."

# Arguments of launches for one config and of those for several candidates; None until the first launch.
_decided: tuple[dict[str, Any], dict[str, Any]] | None = None
_asked: str | None = None


@triton.jit
def wait_for_launch_before(PDL: tl.constexpr):
    """Waits until the launch before this one has ended and its writes are seen, then lets the one after it start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin_next_launch(PDL: tl.constexpr):
    """Lets the launch after this one start; it waits for the end of this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def end_after_launch_before(PDL: tl.constexpr):
    """The last statement of a kernel that needs no more of the launch before it than flags tell: what comes after sees that one's end."""
    if PDL:
        tl.extra.cuda.gdc_wait()


def arguments(several: bool = False) -> dict[str, Any]:
    """Keyword arguments of a launch: the constant PDL and, where it is set, Triton's option.

    Args:
        several: the launch selects among candidates or runs one of them.
    """
    return (_decided or _decide())[several]


def setting() -> str:
    """One of `SETTINGS`: the last `use`, or else the environment's.

    Raises:
        InputError: the environment holds something else.
    """
    asked = _asked if _asked is not None else os.environ.get(VARIABLE, "") or EVERYWHERE
    if asked not in SETTINGS:
        raise InputError(f"{VARIABLE} is {asked!r}; set it to one of {', '.join(SETTINGS)}.")
    return asked


def use(asked: str | None) -> None:
    """Sets one of `SETTINGS` for the launches to come, in all threads; None goes back to the environment.

    Raises:
        InputError: another value.
    """
    global _asked, _decided
    if asked is not None and asked not in SETTINGS:
        raise InputError(f"the setting {asked!r} is unknown; use one of {', '.join(SETTINGS)}.")
    _asked, _decided = asked, None


@contextlib.contextmanager
def using(asked: str) -> Iterator[None]:
    """`use` for the launches of a block."""
    before = _asked
    use(asked)
    try:
        yield
    finally:
        use(before)


def _decide() -> tuple[dict[str, Any], dict[str, Any]]:
    global _decided
    asked = setting()
    single = WITH if asked != NOWHERE and _possible() else WITHOUT
    decided = _decided = (single, single if asked == EVERYWHERE else WITHOUT)
    return decided


@functools.cache
def _possible() -> bool:
    # Asked once, of all GPUs: a launch must not pay for asking which one it goes to.
    if INTERPRETED.value or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return all(torch.cuda.get_device_capability(i) >= (9, 0) for i in range(torch.cuda.device_count()))
