"""The command ``rampwrap ep``: what a layer over several ranks would take: memory, and the path of each number of tokens."""

from typing import Any

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.layer import LayerRequest, layer_options
from rampwrap.cli.types import positive
from rampwrap.cli.workloads import tokens_option
from rampwrap.ep import BACKENDS
from rampwrap.errors import InputError
from rampwrap.kernels.ep import MOST_RANKS

STEPS = (1, 8, 32, 128)
"Tokens a rank that are looked at where none are given, and the most."


@attrs.frozen
class EpRequest:
    """A layer, its ranks and what they bring."""

    ep_size: int
    layer: LayerRequest = attrs.field(factory=LayerRequest)
    max_tokens_per_rank: int = 512
    batch_size: tuple[int, ...] = ()
    backend: str = "symmetric"
    payload: str | None = None
    partials: str | None = None
    dry_run: bool = False

    def steps(self) -> tuple[int, ...]:
        """Tokens a rank: those that were given, else some up to the most."""
        return self.batch_size or (*(few for few in STEPS if few < self.max_tokens_per_rank), self.max_tokens_per_rank)


@command("ep", EpRequest)
@layer_options
@click.option("--ep-size", required=True, type=positive, help="ranks that the experts are spread over")
@click.option("--max-tokens-per-rank", type=positive, metavar="N", help="most tokens that a rank brings (512)")
@tokens_option()
@click.option("--backend", type=click.Choice(BACKENDS), help="symmetric by default")
@click.option("--payload", help="type that rows travel in: bf16, fp16 or fp8; the layer's own by default")
@click.option("--partials", help="type that sums travel in: the layer's own by default, or fp32")
@click.option("--dry-run", is_flag=True, help="say what it would take; needed, since there is nothing to run alone")
def ep(its: EpRequest) -> Answer:
    """Memory and paths."""
    from rampwrap.ep.layout import Layout
    from rampwrap.ep.memory import memory_of
    from rampwrap.ep.owners import contiguous
    from rampwrap.ep.path import path_of, row_bytes

    if not its.dry_run:
        raise InputError("rampwrap ep says what a layer would take and runs nothing; add --dry-run.")
    chosen = {name: value for name in ("payload", "partials") if (value := getattr(its, name)) is not None}
    shape = its.layer.shape()
    local = len(contiguous(shape.num_experts, its.ep_size, 0).experts)
    shape = attrs.evolve(shape, num_local_experts=local)
    layout = Layout(shape, its.ep_size, its.max_tokens_per_rank, **chosen)
    if its.backend == "symmetric" and its.ep_size > MOST_RANKS:
        raise InputError(
            f"--ep-size {its.ep_size} is more than {MOST_RANKS} ranks, which share memory at most; use --backend collectives."
        )
    memory = memory_of(layout, its.backend, local)
    steps: list[dict[str, Any]] = []
    for tokens in its.steps():
        if tokens > its.max_tokens_per_rank:
            raise InputError(
                f"--batch-size {tokens} is more than --max-tokens-per-rank {its.max_tokens_per_rank}; give more room."
            )
        path = path_of(layout, [tokens] * its.ep_size)
        others = tokens * (its.ep_size - 1)
        sums = others * shape.hidden_size * layout.partial_dtype.itemsize
        steps.append(
            {
                "tokens_per_rank": tokens,
                "path": str(path),
                "most_dispatch_bytes": others * (row_bytes(layout) + 8 * shape.top_k),
                "most_combine_bytes": sums,
            }
        )
    lines = [
        f"{shape} on {its.ep_size} ranks; rows travel in {layout.payload}, sums in {layout.partials}",
        f"memory of a rank ({its.backend}): {memory.total / 1e6:.1f} MB, "
        f"{memory.shared / 1e6:.1f} shared, {memory.own / 1e6:.1f} of its own, {memory.collectives / 1e6:.1f} for collectives",
        "tokens a rank  path       most MB out of a rank: dispatch  combine",
        *(
            f"{step['tokens_per_rank']:13d}  {step['path']:9s}  {step['most_dispatch_bytes'] / 1e6:30.3f}  "
            f"{step['most_combine_bytes'] / 1e6:7.3f}"
            for step in steps
        ),
    ]
    return Answer("\n".join(lines), {"memory": attrs.asdict(memory), "backend": its.backend, "steps": steps})
