"""vLLM's data parallel experts: rows of decode steps through shared memory in place of an all-gather and a reduce-scatter.

By default vLLM sends the rows of every rank to all ranks, runs each rank's experts on them, and adds the outputs up
(``--all2all-backend allgather_reducescatter``). `install` puts a subclass in the place of the class that does so, with the same
inputs and outputs: in CUDA graphs, steps of up to 512 tokens a rank take `Gathered`, one launch and two, all others vLLM's own way.
It is asked for with RAMPWRAP_VLLM_GATHER=1: vLLM 0.33 on H100s is 1.04-1.10x as fast from 8 sequences a rank on, at one no clear difference was seen. It stands aside where

- a step is launched by the host, for which those of so few tokens wait: our Python takes it 55 us a layer before Triton's three launches,
- ranks are on several hosts, more than eight, or come and go (elastic),
- the GPU is not of sm_90 or later, or no memory can be shared,
- micro-batches (DBO) interleave steps, or VLLM_BATCH_INVARIANT is set,
- the rows of a step go to some of the ranks only (tensor parallelism without sequence parallelism), or are of odd sizes,
- ranks have different numbers of tokens, which they never have in graphs.

All of that is the same on every rank, so all take the same way. The sums are added by rank in float32, the same bits from run to run.
"""

import importlib
import logging
import os
import pathlib
import signal
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rampwrap.engines import vllm_contract
from rampwrap.errors import RampwrapError
from rampwrap.kernels.ep import MOST_RANKS
from rampwrap.plan.folder import OneWarning, enabled

VARIABLE = "RAMPWRAP_VLLM_GATHER"
"Set to 1, steps of few tokens go through shared memory."
MODULE = "vllm.distributed.device_communicators.all2all"
LIMIT_S = 600.0
"Seconds that a rank is waited for, torch's own limit for NCCL: a rank may compile while the others wait."
WATCH_S = 1.0

WIDE = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float8_e4m3fn: None}
"Types of rows, and those of the sums that come back; of FP8 rows the model's. Other types pack several columns."

_FILE, _CLASS = "distributed/device_communicators/all2all.py", "AgRsAll2AllManager"
_DISPATCH = ("hidden_states", "topk_weights", "topk_ids", "is_sequence_parallel", "extra_tensors")
SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "__init__": ("cpu_group", "tcp_store_group"),
    "_get_comm_group": ("is_sequence_parallel",),
    "_get_sizes": ("num_local_tokens", "comm_group"),
    "dispatch": _DISPATCH,
    "dispatch_router_logits": ("hidden_states", "router_logits", *_DISPATCH[3:]),
    "combine": ("hidden_states", "is_sequence_parallel"),
    "destroy": (),
}
LATER: Mapping[str, tuple[str, ...]] = {
    "allocate_combine_input": ("shape", "dtype", "device", "is_sequence_parallel"),
    "combine_into_output": ("hidden_states", "output", "is_sequence_parallel"),
}
"Methods that not all releases have."
MEMBERS = frozenset({*SIGNATURES, *LATER, "use_ep"})

logger = logging.getLogger("vllm.rampwrap")
_warn = OneWarning(logger)


def faults(root: pathlib.Path) -> list[str]:
    """Why vLLM's class cannot be replaced, as `vllm_contract.faults`: it is not as it was when it was read."""
    return vllm_contract.class_faults(root, _FILE, _CLASS, SIGNATURES, LATER, MEMBERS)


def register(root: pathlib.Path) -> None:
    """Where it is asked for and vLLM's sources in `root` allow it: `install`."""
    if not enabled(VARIABLE):
        return
    if found := faults(root):
        _warn("faults", "rampwrap leaves vLLM's all-gather as it is: %s.", "; ".join(found), level=logging.WARNING)
        return
    install(importlib.import_module(MODULE))


def install(module: Any) -> None:
    """Replaces the class in vLLM's module; once. Communicators that are made from now on have it."""
    if not hasattr(module.AgRsAll2AllManager, "rampwrap"):
        module.AgRsAll2AllManager = manager_of(module.AgRsAll2AllManager)


def manager_of(kind: type) -> type:
    """A subclass of vLLM's manager that hands to `Exchange` what it takes, and to vLLM all else."""
    own: Any = kind

    class AgRsAll2AllManager(own):  # type: ignore[misc]
        rampwrap = True

        def __init__(self, cpu_group: Any, tcp_store_group: Any = None) -> None:
            super().__init__(cpu_group, tcp_store_group)
            self._exchange = Exchange(self, refusal(self, tcp_store_group), model_dtype())

        def dispatch(
            self,
            hidden_states: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            is_sequence_parallel: bool = False,
            extra_tensors: list[torch.Tensor] | None = None,
        ) -> Any:
            fields = [hidden_states, topk_weights, topk_ids]
            found = self._exchange.gather([*fields, *(extra_tensors or [])], is_sequence_parallel)
            if found is None:
                return super().dispatch(*fields, is_sequence_parallel, extra_tensors)
            return tuple(found) if extra_tensors is None else (*found[:3], found[3:])

        def dispatch_router_logits(
            self,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            is_sequence_parallel: bool = False,
            extra_tensors: list[torch.Tensor] | None = None,
        ) -> Any:
            fields = [hidden_states, router_logits]
            found = self._exchange.gather([*fields, *(extra_tensors or [])], is_sequence_parallel)
            if found is None:
                return super().dispatch_router_logits(*fields, is_sequence_parallel, extra_tensors)
            return tuple(found) if extra_tensors is None else (*found[:2], found[2:])

        def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> Any:
            found = self._exchange.scatter(hidden_states)
            return super().combine(hidden_states, is_sequence_parallel) if found is None else found

        def allocate_combine_input(
            self, shape: Any, dtype: Any, device: Any, is_sequence_parallel: bool = False
        ) -> Any:
            if self._exchange.under_way:
                return None
            return super().allocate_combine_input(shape, dtype, device, is_sequence_parallel)

        def combine_into_output(
            self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
        ) -> Any:
            found = self._exchange.scatter(hidden_states, output)
            if found is None:
                return super().combine_into_output(hidden_states, output, is_sequence_parallel)
            return found

        def destroy(self) -> None:
            self._exchange.close()
            super().destroy()

    return AgRsAll2AllManager


def refusal(manager: Any, tcp_store_group: Any) -> str | None:
    """Why the ranks of a manager do not share memory, in words; the same on all of them."""
    if tcp_store_group is not None:
        return "its ranks come and go (elastic expert parallelism)"
    if manager.internode:
        return "its ranks are on several hosts"
    if not 1 < manager.world_size <= MOST_RANKS:
        return f"it has {manager.world_size} ranks, and 2 to {MOST_RANKS} share memory"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return "its GPUs are older than sm_90"
    if importlib.import_module("vllm.envs").VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set"
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    if getattr(getattr(config, "parallel_config", None), "use_ubatching", False):
        return "micro-batches (DBO) interleave their steps"
    mode = getattr(getattr(config, "compilation_config", None), "cudagraph_mode", None)
    if getattr(mode, "name", None) == "NONE":
        return "it captures no CUDA graphs"
    return None


class Exchange:
    """The steps of one manager: which go through shared memory, and those.

    Args:
        manager: vLLM's.
        reason: why none do, in words.
        dtype: of the outputs of the model's layers.
    """

    def __init__(self, manager: Any, reason: str | None, dtype: torch.dtype) -> None:
        self._manager, self._off, self._dtype = manager, reason is not None, dtype
        self._rows: Any = None
        self._counts: tuple[int, ...] | None = None
        self._launched: set[tuple[Any, ...]] = set()
        self._compiled: set[tuple[Any, ...]] = set()
        if reason is not None:
            _warn(reason, "rampwrap leaves vLLM's all-gather as it is: %s.", reason, level=logging.INFO)

    @property
    def under_way(self) -> bool:
        """Whether rows were gathered here whose sums are not scattered yet."""
        return self._counts is not None

    def gather(self, fields: Sequence[torch.Tensor], is_sequence_parallel: bool) -> list[torch.Tensor] | None:
        """The rows of all ranks of each tensor; None where the step is vLLM's.

        Raises:
            RampwrapError: a rank did not arrive at an earlier step.
        """
        under_way, self._counts, manager = self.under_way, None, self._manager
        if under_way:
            # The cells of its step are there already: nobody would wait for the rows of this one.
            self._off = True
            _warn(
                "twice",
                "rampwrap leaves vLLM's all-gather as it is from now on: rows were gathered whose sums never came.",
            )
        if self._off:
            return None
        group = manager._get_comm_group(is_sequence_parallel)
        if group.world_size != manager.world_size:
            return None
        hidden = fields[0]
        counts = tuple(manager._get_sizes(len(hidden), group))
        if counts.count(counts[0]) != len(counts):
            return None
        captures = capturing()
        if not captures:
            # Ours only once, so that what a graph of its kind will hold is compiled. All others end here, 2 us after they came.
            step = (counts[0], hidden.dtype, hidden.shape[1], len(fields))
            if step in self._launched:
                return None
            self._launched.add(step)
            if self._rows is None and hidden.dtype in WIDE:
                self._open(fields)
        rows = self._rows
        if rows is None or rows.hidden_size != hidden.shape[1] or hidden.dtype not in WIDE:
            return None
        if any(len(its) != counts[0] for its in fields) or rows.refusal(fields, counts) is not None:
            return None
        kind = (counts[0], *((its.dtype, its.shape[1:]) for its in fields))
        if captures and kind not in self._compiled:
            return None
        if (fault := rows.fault()) is not None:
            raise RampwrapError(fault)
        self._compiled.add(kind)
        self._counts = counts
        gathered: list[torch.Tensor] = rows.gather(fields, counts)
        return gathered

    def scatter(self, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The sums of this rank's tokens; None where the step is vLLM's."""
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        if not self._rows.takes(y, counts) or (out is not None and not out.is_contiguous()):
            # A gather without its scatter: no rank may begin another one.
            self._off = True
            kind = f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
            _warn("kind", "rampwrap leaves vLLM's all-gather as it is from now on: sums are %s.", kind)
            return None
        scattered: torch.Tensor = self._rows.scatter(y, counts, out)
        return scattered

    def _open(self, fields: Sequence[torch.Tensor]) -> None:
        """At the first step, which all ranks take together and before any graph is captured."""
        from rampwrap.ep.gathered import Gathered, row_bytes

        hidden, manager = fields[0], self._manager
        wide = WIDE[hidden.dtype] or self._dtype
        others = sum(map(row_bytes, fields[1:]))
        try:
            self._rows = Gathered.open(
                manager.cpu_group,
                hidden.device,
                # Other layers may send rows in the layer's type, int64 ids, or scales.
                token_bytes=2 * hidden.shape[1] + 2 * others + hidden.shape[1] // 32 + 256,
                hidden_size=hidden.shape[1],
                dtype=wide,
                timeout_s=LIMIT_S,
            )
        except RampwrapError as error:
            self._off = True
            _warn("open", "rampwrap leaves vLLM's all-gather as it is: %s", error, level=logging.WARNING)
            return
        watch(self._rows)
        _warn(
            "here", "rampwrap moves rows of steps of few tokens among %s ranks.", manager.world_size, level=logging.INFO
        )

    def close(self) -> None:
        """Lets go of the memory, at the end of an engine."""
        rows, self._rows, self._off = self._rows, None, True
        if rows is not None:
            rows.close()


def capturing() -> bool:
    """Whether a graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def model_dtype() -> torch.dtype:
    """Of the outputs of the model's layers; asked for while communicators are made, when vLLM has a current config."""
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    found = getattr(getattr(config, "model_config", None), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def watch(rows: Any) -> None:
    """Ends the process where a rank is missed for too long: graphs run on without Python, and what they made is worth nothing."""
    reference = weakref.ref(rows)

    def look() -> None:
        while (its := reference()) is not None:
            if (fault := its.fault()) is not None:
                logger.critical("rampwrap ends this process: %s", fault)
                os.kill(os.getpid(), signal.SIGABRT)
            del its
            time.sleep(WATCH_S)

    threading.Thread(target=look, name="rampwrap-gather", daemon=True).start()
