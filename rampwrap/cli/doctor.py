"""The command ``rampwrap doctor``: which layers of a model would be served in an engine, by what, and what is missing."""

import attrs
import click

from rampwrap.checkpoint.model import Ranks
from rampwrap.cli.command import Answer, command
from rampwrap.cli.layer import rank_options
from rampwrap.cli.types import positive
from rampwrap.engines.installed import NAMES


@attrs.frozen
class DoctorRequest:
    """A model in an engine, and how that is started."""

    model: str
    engine: str = "vllm"
    tp_size: int = 1
    ep: bool = False
    num_redundant_experts: int = 0
    fused_shared_experts: int | None = None
    dtype: str | None = None
    gpu: str | None = None
    moe_backend: str | None = None


@command("doctor", DoctorRequest)
@click.argument("model", metavar="MODEL_DIR")
@click.option("--engine", type=click.Choice(list(NAMES)), help="vllm by default")
@click.option("--tp-size", type=positive, metavar="N")
@rank_options
@click.option("--dtype", help="bf16, fp16 or fp8; by default what the model's config says")
@click.option("--gpu", metavar="NAME", help="by default the one that is here, else all that there are plans for")
@click.option("--moe-backend", type=click.Choice(["triton"]), help="where vLLM is started with that")
def doctor(its: DoctorRequest) -> Answer:
    """Looks at the model, the engine and the plans."""
    from rampwrap.engines.doctor import diagnose

    ranks = Ranks(its.tp_size, its.ep, its.num_redundant_experts, its.fused_shared_experts)
    triton = its.moe_backend is not None
    found = diagnose(its.model, its.engine, ranks, dtype=its.dtype, gpu=its.gpu, triton=triton)
    return Answer(str(found), found.to_dict(), status=0 if found.served else 1)
