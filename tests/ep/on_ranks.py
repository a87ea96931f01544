"""What the processes of the expert-parallel tests run: each is one rank, takes calls on a socket of its own and answers there.

A call names a function of this file and the ranks of its group; the answer is what it returns, or its error. They are forks
of one process: importing torch takes seconds.
"""

import functools
import io
import math
import os
import pathlib
import pickle
import runpy
import socket
import sys
import time
from datetime import timedelta
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from rampwrap.ep.group import ExpertParallel
from rampwrap.errors import RampwrapError
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import local_ids

Batch = dict[str, torch.Tensor]


def expert_of(rows: torch.Tensor, expert: int) -> torch.Tensor:
    """What stands for an expert: bf16 [n, H] -> bf16 [n, H], different for each expert and column."""
    columns = torch.arange(rows.shape[1]) % 7 + 1
    return (rows.float() * (expert + 1) / columns).to(torch.bfloat16)


def by_slot(rows: torch.Tensor, topk_ids: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """bf16 [n, top_k, H]: each local slot's output, NaN for the others, which nobody may read."""
    out = torch.full((*topk_ids.shape, rows.shape[1]), torch.nan, dtype=torch.bfloat16)
    for row, slot in here.nonzero().tolist():
        out[row, slot] = expert_of(rows[row : row + 1], int(topk_ids[row, slot]))[0]
    return out


def opened(group: dist.ProcessGroup, arguments: dict[str, Any]) -> ExpertParallel:
    arguments = dict(arguments)
    each = arguments.pop("each", None)  # of each rank its own
    if each is not None:
        arguments |= each[dist.get_rank(group)]
    experts = arguments.pop("experts", None)
    if experts is not None:
        mine = np.array(experts[dist.get_rank(group)])
        arguments["placement"] = Placement(arguments["shape"].num_experts, mine)
    return ExpertParallel(group, **arguments)


def rounds(
    group: dist.ProcessGroup, arguments: dict[str, Any], batches: list[list[Batch]], known: bool, summed: bool
) -> list[dict[str, Any]]:
    """Dispatch and combine of each batch, [round][rank]; what this rank saw and got."""
    rank, seen = dist.get_rank(group), []
    with opened(group, arguments) as ep:
        for batch in batches:
            counts = [len(its["topk_ids"]) for its in batch] if known else None
            received = ep.dispatch(**batch[rank], tokens_per_rank=counts)
            here = ep.owners.is_local(received.topk_ids)
            read = here.any(1)
            rows = received.hidden_states(torch.bfloat16)
            output: torch.Tensor = by_slot(rows, received.topk_ids, here)
            if summed:
                output = received.partial(output, torch.float32)
                output[~read] = torch.nan
            seen.append(
                {
                    "rows": rows[read],
                    "read": read,
                    "topk_ids": received.topk_ids.clone(),
                    "topk_weights": received.topk_weights.clone(),
                    "expert_counts": received.expert_counts,
                    "first": received.first,
                    "path": str(received.path),
                    "out": ep.combine(output),
                }
            )
    return seen


def whole_layer(
    group: dist.ProcessGroup, shape: MoEShape, batch: list[Batch], weights: Batch, payload: str
) -> torch.Tensor:
    """The layer by `ep.layer` with a wrapped kernel on this rank's experts."""
    from rampwrap.adapters.triton_fused_moe import TritonFusedMoE

    rank = dist.get_rank(group)
    with ExpertParallel(group, shape, 16, payload=payload) as ep:
        kernel = TritonFusedMoE(ep.shape)
        mine = {name: its[torch.from_numpy(ep.placement.experts)] for name, its in weights.items()}

        config = kernel.default_config(8)

        def run(**operands: Any) -> torch.Tensor:
            assert operands["hidden_states"].dtype == torch.bfloat16
            return kernel.launch(config, **operands)

        out = ep.layer(run, **batch[rank], **mine)
        # As it is, e4m3 rows are read in place.
        again = ep.layer(functools.partial(kernel.launch, config), **batch[rank], **mine)
        assert payload == "fp8" or torch.equal(out, again)
        return again


def layers(group: dist.ProcessGroup, arguments: dict[str, Any], batches: list[list[Batch]], known: bool) -> list[Any]:
    """Outputs of whole layers of each batch, [round][rank], and how often the experts were run for one."""
    rank, seen, calls = dist.get_rank(group), [], 0

    def run(**its: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        here = local_ids(its["topk_ids"], its["expert_map"]) >= 0
        return by_slot(its["hidden_states"], its["topk_ids"], here)

    with opened(group, arguments) as ep:
        for batch in batches:
            counts = [len(its["topk_ids"]) for its in batch] if known else None
            before = calls
            out = ep.layer(run, **batch[rank], tokens_per_rank=counts)
            seen.append((out, calls - before))
    return seen


def alignment(group: dist.ProcessGroup, shape: MoEShape, batch: list[Batch], block_m: int) -> Any:
    """The block list of a dispatch that was asked for one."""
    with ExpertParallel(group, shape, 16) as ep:
        blocks = ep.dispatch(**batch[dist.get_rank(group)], block_m=block_m).blocks
        assert blocks is not None
        return blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded, blocks.expert_counts


def refused(group: dist.ProcessGroup, arguments: dict[str, Any], calls: list[Any]) -> list[str | None]:
    """What each call of a sequence says, where it is refused; a call is of all ranks, or a list with one of each."""
    rank, said = dist.get_rank(group), []
    ep = opened(group, arguments)
    for call in calls:
        name, *its = call[rank] if isinstance(call, list) else call
        try:
            if name == "sleep":
                time.sleep(its[0])
            elif name == "combine_into":
                ep.combine(torch.zeros(4, 64), out=torch.empty(its[0], dtype=torch.bfloat16))
            elif name == "second":
                ExpertParallel(OTHERS[its[0]], arguments["shape"], 4, timeout_s=2.0).open()._let_go()
            else:
                values = [value[rank] if isinstance(value, list) else value for value in its]
                getattr(ep, name)(*values)
            said.append(None)
        except RampwrapError as error:
            said.append(f"{type(error).__name__}: {error}")
    ep._let_go()
    return said


def opens_gathered(group: dist.ProcessGroup, each: list[dict[str, int]]) -> str:
    """Why `Gathered` does not open, with each rank's own arguments and version of the protocol."""
    from rampwrap.ep import terms
    from rampwrap.ep.gathered import Gathered

    its = {"token_bytes": 8, "hidden_size": 8, **each[dist.get_rank(group)]}
    version = terms.PROTOCOL
    terms.PROTOCOL = its.pop("version", version)
    try:
        Gathered.open(group, torch.device("cpu"), **its, dtype=torch.float32, timeout_s=1.0, open_s=20.0)
    except RampwrapError as error:
        return str(error)
    finally:
        terms.PROTOCOL = version
    return ""


def script(group: dist.ProcessGroup, path: str, function: str, arguments: list[Any]) -> Any:
    """A function of a script that takes a group."""
    return runpy.run_path(path)[function](group, *arguments)


def benchmark(group: dist.ProcessGroup, path: str, arguments: list[str]) -> Any:
    """Rows of benchmarks/ep.py, of phases and of layers, and as lines."""
    sys.path.insert(0, str(pathlib.Path(path).parent))
    its = runpy.run_path(path)
    given, device = its["arguments"]().parse_args(arguments), torch.device("cpu")
    phases = list(its["phases"](group, given, device, math.inf))
    layers = list(its["ep_layer"].layers(group, given, device, math.inf))
    return phases, layers, [*map(its["line"], phases), *map(its["ep_layer"].line, layers)]


def rivals(group: dist.ProcessGroup, path: str, arguments: list[str]) -> Any:
    """Rows of benchmarks/ep_rivals.py, without those who need GPUs."""
    sys.path.insert(0, str(pathlib.Path(path).parent))
    its = runpy.run_path(path)
    return list(its["near"](group, its["arguments"]().parse_args(arguments), torch.device("cpu"), math.inf))


class Standin:
    """What a kernel must have for a benchmark of layers."""

    def default_config(self, num_tokens: int) -> dict[str, int]:
        return {"rows": num_tokens}

    def launch(self, config: dict[str, int], /, **its: torch.Tensor) -> torch.Tensor:
        assert config == {"rows": len(its["hidden_states"])}
        return self.reference(None, its).bfloat16()

    def reference(self, _: Any, its: dict[str, torch.Tensor]) -> torch.Tensor:
        here = local_ids(its["topk_ids"], its["expert_map"]) >= 0
        factor = torch.where(here, its["topk_weights"], 0.0).sum(1, keepdim=True)
        return its["hidden_states"].double() * factor


def bulk_benchmark(group: dist.ProcessGroup, path: str, arguments: list[str]) -> Any:
    """Rows of benchmarks/ep_bulk.py, of phases and of one layer, and as lines."""
    sys.path.insert(0, str(pathlib.Path(path).parent))
    its = runpy.run_path(path)
    given, device = its["arguments"]().parse_args(arguments), torch.device("cpu")
    phases = list(its["phases"](group, given, device, math.inf))
    row: dict[str, Any] = {"ranks": dist.get_world_size(group), "layer": "small", "dtype": "bf16", "tokens": 8}
    with ExpertParallel(group, MoEShape(8, 2, 128, 128), 8, by_source_tokens=0) as ep:
        row |= next(sys.modules["ep_bulk_layers"].layer(group, ep, Standin(), {}, 8, 1))
    return phases, [row], [*(its["phase_line"](one) for one in phases), its["layer_line"](row)]


OTHERS: dict[int, dist.ProcessGroup] = {}
"Groups of the first ranks, by their number; -2 is another of two."


def tell(stream: IO[bytes], what: Any) -> None:
    """Writes a message; torch's format holds e4m3, which pickle does not."""
    text = io.BytesIO()
    torch.save(what, text)
    pickle.dump(text.getvalue(), stream)
    stream.flush()


def hear(stream: IO[bytes]) -> Any:
    return torch.load(io.BytesIO(pickle.load(stream)), weights_only=False)


def serve(rank: int, num_ranks: int, port: int, channel: socket.socket) -> None:
    """Answers calls until there are no more."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    for number in range(1, num_ranks + 1):
        OTHERS[number] = dist.new_group(range(number))
    OTHERS[-2] = dist.new_group(range(2))
    with channel.makefile("rwb") as stream:
        tell(stream, None)
        while True:
            try:
                name, number, arguments = hear(stream)
            except EOFError:
                return
            try:
                answer: Any = globals()[name](OTHERS[number], *arguments)
            except Exception as error:
                answer = error
            tell(stream, answer)


def main() -> None:
    port, *channels = map(int, sys.argv[1:])
    for rank, number in enumerate(channels):
        if not os.fork():
            for other in channels:
                if other != number:
                    os.close(other)
            serve(rank, len(channels), port, socket.socket(fileno=number))
            os._exit(0)
    for number in channels:
        os.close(number)
    for _ in channels:
        os.wait()


if __name__ == "__main__":
    main()
