"""The shape of a routed MoE layer, and those of published models."""

import re

import attrs

from rampwrap.errors import InputError
from rampwrap.kernel.activation import SILU, Activation
from rampwrap.schema import MOST_EXPERTS, MOST_SIZE, OMIT, between

DTYPES = ("bf16", "fp16", "fp8")
SCALES = {"block-128": 128, "block-64": 64, "block-32": 32, "channel": 0, "tensor": 0, "static": 0}
"""Scales of an FP8 layer, with the side of the blocks of weights that share one.

In blocks, activations have a scale for as many columns of a token. With a scale a channel (row of w13 and w2) or a tensor (of
one expert) activations have one a token. ``static`` is by tensor too, and activations have one for all tokens that comes with the
weights: one for x, one for h.
"""


@attrs.frozen
class MoEShape:
    """The shape of one routed MoE layer on one rank.

    `intermediate_size` is per rank (after tensor parallelism); `num_local_experts` is the number of experts
    whose weights this rank holds and therefore the length of `expert_counts`. Files name the activation where it is
    not SiLU, and scales where they are not blocks of 128; layers that are not FP8 have none, and that value.
    """

    num_experts: int = attrs.field(validator=between(1, MOST_EXPERTS, InputError))
    top_k: int = attrs.field(validator=between(1, MOST_EXPERTS, InputError))
    hidden_size: int = attrs.field(validator=between(1, MOST_SIZE, InputError))
    intermediate_size: int = attrs.field(validator=between(1, MOST_SIZE, InputError))
    dtype: str = "bf16"
    num_local_experts: int = attrs.field(validator=between(1, MOST_EXPERTS, InputError), metadata=OMIT)
    activation: Activation = attrs.field(default=SILU, metadata=OMIT)
    scales: str = attrs.field(default="block-128", metadata=OMIT)

    @num_local_experts.default
    def _all(self) -> int:
        return self.num_experts

    def __attrs_post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise InputError(
                f"top_k is {self.top_k} with {self.num_experts} experts; a token cannot visit an expert twice."
            )
        if self.num_local_experts > self.num_experts:
            raise InputError(
                f"num_local_experts is {self.num_local_experts}, more than num_experts={self.num_experts}."
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
        if self.scales not in SCALES:
            raise InputError(f"scales {self.scales!r} are unknown; use one of {', '.join(SCALES)}.")
        if self.scales != "block-128" and self.dtype != "fp8":
            raise InputError(f"A {self.dtype} layer has no scales, and {self.scales!r} were given; leave them out.")

    @property
    def alone(self) -> "MoEShape":
        """The same layer where a rank's own experts are all that anybody knows of, as with some engines.

        Raises:
            InputError: they are fewer than `top_k`.
        """
        return attrs.evolve(self, num_experts=self.num_local_experts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of w13 [E,2I,H] and w2 [E,H,I] on this rank, without scales."""
        element = 1 if self.dtype == "fp8" else 2
        return 3 * self.num_local_experts * self.hidden_size * self.intermediate_size * element

    def __str__(self) -> str:
        local = "" if self.num_local_experts == self.num_experts else f" ({self.num_local_experts} here)"
        sizes = f"E={self.num_experts}{local} top_k={self.top_k} H={self.hidden_size} I={self.intermediate_size}"
        return " ".join([sizes, self.dtype, *self.form])

    @property
    def scale_group(self) -> int:
        """Side of the blocks of an FP8 layer's weights that share a scale; 0 where scales are by channel or tensor."""
        return SCALES[self.scales]

    @property
    def form(self) -> tuple[str, ...]:
        """What sets the layer apart from the plain one of its sizes and dtype, in words; empty for SiLU and blocks of 128."""
        scales = () if self.scales == "block-128" else (f"scales={self.scales}",)
        return scales if self.activation == SILU else (*scales, str(self.activation))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """`form` as parts of a file's name: ``silu_limit10``."""
        return tuple(re.sub(r"[:,]", "_", its.removeprefix("scales=")).replace("=", "") for its in self.form)


# Layers of published models, tensor parallelism applied where the name says so.
SHAPES = {
    "olmoe": MoEShape(64, 8, 2048, 1024),
    "mixtral-8x7b": MoEShape(8, 2, 4096, 14336),
    "qwen3-30b": MoEShape(128, 8, 2048, 768),
    "qwen3-235b": MoEShape(128, 8, 4096, 1536),
    "qwen3-next-80b": MoEShape(512, 10, 2048, 512),
    "deepseek-v3": MoEShape(256, 8, 7168, 2048),
    "deepseek-v3-tp8": MoEShape(256, 8, 7168, 256),
    "gpt-oss-120b": MoEShape(128, 4, 2880, 2880),
    "glm-4.5-air": MoEShape(128, 8, 4096, 1408),
    "kimi-k2-tp8": MoEShape(384, 8, 7168, 256),
}
