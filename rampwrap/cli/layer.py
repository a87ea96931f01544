"""The layer of a command: a known model's, or its sizes."""

import pathlib

import attrs
import click

from rampwrap.cli.command import options
from rampwrap.cli.types import positive
from rampwrap.errors import InputError
from rampwrap.kernel.activation import SILU, Activation
from rampwrap.kernel.shape import SCALES, SHAPES, MoEShape


@attrs.frozen
class LayerRequest:
    """A layer's shape: the name of a known model, or its sizes."""

    model: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    dtype: str | None = None
    tp_size: int = 1
    num_local_experts: int | None = None
    activation: str | None = None
    scales: str | None = None

    @property
    def sizes(self) -> dict[str, int | None]:
        """The four sizes by option."""
        names = ("num_experts", "top_k", "hidden_size", "intermediate_size")
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}

    @property
    def named(self) -> bool:
        """Whether a layer was given at all."""
        return bool(self.model) or any(self.sizes.values())

    def shape(self) -> MoEShape:
        """The layer that ``--model`` or the four sizes name, as one rank has it.

        Raises:
            InputError: both, neither or not all of them, or a rank's share that does not exist.
        """
        given = [name for name, value in self.sizes.items() if value is not None]
        if self.model:
            if given:
                raise InputError(f"--model {self.model} and {', '.join(given)} were both given; leave one out.")
            if self.model not in SHAPES:
                more = " For a folder with a config.json add --engine." if pathlib.Path(self.model).exists() else ""
                raise InputError(
                    f"model {self.model!r} is unknown; use one of {', '.join(SHAPES)} or give the four sizes.{more}"
                )
            base = attrs.evolve(SHAPES[self.model], dtype=self.dtype or "bf16")
        else:
            experts, top_k, hidden, inter = self.sizes.values()
            if experts is None or top_k is None or hidden is None or inter is None:
                missing = [name for name in self.sizes if name not in given]
                raise InputError(f"the layer's shape lacks {', '.join(missing)}; give it, or --model.")
            base = MoEShape(experts, top_k, hidden, inter, dtype=self.dtype or "bf16")
        if base.intermediate_size % self.tp_size:
            raise InputError(
                f"--tp-size {self.tp_size} does not divide intermediate_size={base.intermediate_size}; use a divisor."
            )
        local = self.num_local_experts or base.num_experts
        return attrs.evolve(
            base,
            intermediate_size=base.intermediate_size // self.tp_size,
            num_local_experts=local,
            activation=Activation.parse(self.activation) if self.activation else SILU,
            scales=self.scales or base.scales,
        )


layer_options = options(
    click.option("--model", help=f"{', '.join(SHAPES)}; with --engine a folder with a config.json"),
    click.option("--num-experts", "-E", type=positive, metavar="N"),
    click.option("--top-k", type=positive, metavar="N"),
    click.option("--hidden-size", "-K", type=positive, metavar="N"),
    click.option("--intermediate-size", "-N", type=positive, metavar="N"),
    click.option("--dtype", help="bf16, fp16 or fp8; bf16 by default, with --engine what the model's config says"),
    click.option("--tp-size", type=positive, metavar="N"),
    click.option("--num-local-experts", type=positive, metavar="N", help="on this rank; all by default"),
    click.option("--activation", metavar="NAME", help="silu (default), silu:limit=10, swiglu_oai, gelu_tanh"),
    click.option("--scales", metavar="FORM", help=f"of an fp8 layer: {', '.join(SCALES)}; block-128 by default"),
)
rank_options = options(
    click.option("--ep", is_flag=True, help="the --tp-size ranks of an engine share out whole experts"),
    click.option(
        "--num-redundant-experts",
        type=int,
        metavar="N",
        help="with --ep: copies of experts that the engine adds for balance, over all ranks",
    ),
    click.option(
        "--fused-shared-experts",
        type=int,
        metavar="N",
        help="shared experts that the engine makes routed ones; by default those that SGLang does by itself",
    ),
)


def shape_name(shape: MoEShape) -> str:
    """``E64-k8-H2048-I1024-bf16``, for names of files."""
    local = "" if shape.num_local_experts == shape.num_experts else f"({shape.num_local_experts})"
    sizes = f"E{shape.num_experts}{local}-k{shape.top_k}-H{shape.hidden_size}-I{shape.intermediate_size}"
    return "-".join([sizes, shape.dtype, *shape.suffixes])
