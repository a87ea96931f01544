"""What ``rampwrap profile`` is asked for."""

from typing import Any

import attrs

from rampwrap.checkpoint.model import Alike, Layers, Ranks, layers_of
from rampwrap.cli.layer import LayerRequest
from rampwrap.cli.measuring import ROUNDS, MeasuringRequest
from rampwrap.cli.workloads import EVAL_ROUTINGS, EVAL_TOKENS, RECORDED_LIMIT, recorded_of, recorded_said, routings_of
from rampwrap.errors import InputError
from rampwrap.kernel import catalog
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.routing.workloads import Routing, Workload, workload_grid

TRAIN_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRAIN_ROUTINGS = tuple(map(Routing.parse, ("uniform", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1", "zipf:1.2")))
"What a new table is profiled on."
ENGINES = ("vllm", "sglang", "transformers")
ENGINE_CONFIGS, ENGINE_ROUNDS = 24, 3
"""Configs of each kernel that an engine's plans are profiled with, and rounds, where nothing else is asked for.

On eight complete tables plans of 24 configs lose to those of 40 nothing in the mean and 0.2 % at most, and a plan of two
rounds loses to one of four 0.03 % in one table (`benchmarks/kept_configs.py`)."""
ENGINE_EVAL_TOKENS = (6, 24, 96, 384, 1536)
ENGINE_EVAL_ROUTINGS = tuple(map(Routing.parse, ("dirichlet:0.2", "zipf:0.8", "lognormal:1.0")))
"What an engine's plan is judged by: the fit never sees it, and it takes the GPU's time all the same."


@attrs.frozen
class ProfileRequest:
    """What is timed: a layer, or those of an engine's model; by which kernel, on which workloads, in how much time."""

    kernel: str | None = None
    engine: str | None = None
    layer: LayerRequest = attrs.field(factory=LayerRequest)
    ep: bool = False
    num_redundant_experts: int = 0
    fused_shared_experts: int | None = None
    batch_size: tuple[int, ...] = TRAIN_TOKENS
    routing: tuple[Routing, ...] = attrs.field(default=TRAIN_ROUTINGS, converter=routings_of)
    seed: int = 0
    eval_batch_size: tuple[int, ...] = attrs.field()
    eval_routing: tuple[Routing, ...] = attrs.field(converter=routings_of)
    recorded: tuple[str, ...] = ()
    eval_recorded: tuple[str, ...] = ()
    recorded_limit: int = RECORDED_LIMIT
    measuring: MeasuringRequest = attrs.field(factory=MeasuringRequest)
    budget: float | None = None
    most_configs: int | None = None
    ignore_engine: bool = False
    dry_run: bool = False
    out: str | None = None

    @eval_batch_size.default
    def _usual_tokens(self) -> tuple[int, ...]:
        return ENGINE_EVAL_TOKENS if self.engine else EVAL_TOKENS

    @eval_routing.default
    def _usual_routings(self) -> tuple[Routing, ...]:
        return ENGINE_EVAL_ROUTINGS if self.engine else EVAL_ROUTINGS

    def __attrs_post_init__(self) -> None:
        if self.most_configs and self.budget:
            raise InputError(
                f"--most-configs {self.most_configs} and --budget were both given; a budget picks configs itself, leave one out."
            )

    def shape(self) -> MoEShape:
        """The one layer that is named."""
        for name, given in (
            ("--ep", self.ep),
            ("--num-redundant-experts", self.num_redundant_experts),
            ("--fused-shared-experts", self.fused_shared_experts is not None),
        ):
            if given:
                raise InputError(
                    f"{name} is for the models of an engine, --engine with --model DIR; give the experts of a "
                    "rank by --num-local-experts here."
                )
        return self.layer.shape()

    @property
    def rounds(self) -> int:
        """Of measurement."""
        return self.measuring.rounds or (ENGINE_ROUNDS if self.engine and not self.budget else ROUNDS)

    @property
    def ranks(self) -> Ranks:
        """How the engine spreads a model."""
        return Ranks(self.layer.tp_size, self.ep, self.num_redundant_experts, self.fused_shared_experts)

    def layers(self) -> Layers:
        """The layers of a model's folder, or the one that the sizes name."""
        its = self.layer
        if its.model and its.num_experts is None and its.num_local_experts is None:
            for name, given in (("--activation", its.activation), ("--scales", its.scales)):
                if given:
                    raise InputError(
                        f"{name} {given} is for a layer given by its sizes; a model's config says its own, leave it out."
                    )
            return layers_of(its.model, self.ranks, dtype=its.dtype, engine=self.engine)
        if not its.model and its.num_experts is None:
            raise InputError(
                "--engine was given without --model; give the folder of a model with its config.json, or the sizes of a layer."
            )
        return Layers((Alike((), (self.shape(),)),))

    def kernel_name(self, shape: MoEShape) -> str:
        """The kernel asked for, else what serves the shape best."""
        from rampwrap.engines.profile import default_kernel

        return default_kernel(self.engine, shape)[0] if self.kernel is None else self.kernel

    def make_kernel(self, shape: MoEShape) -> Kernel:
        """The kernel to profile."""
        return catalog.make_kernel(self.kernel_name(shape), shape)

    def workloads(self, shape: MoEShape) -> list[Workload]:
        """Rows of the table, those to train on first."""
        rows = workload_grid(self.batch_size, self.routing, "train", self.seed)
        rows += workload_grid(self.eval_batch_size, self.eval_routing, "eval", self.seed)
        rows += recorded_of(self.recorded, shape, self.recorded_limit, "train", self.seed)
        rows += recorded_of(self.eval_recorded, shape, self.recorded_limit, "eval", self.seed)
        # Held-out rows need every config, or there is no oracle to judge by: a budget pays for the train rows alone.
        return [row for row in rows if row.split == "train"] if self.budget else rows

    def recorded_said(self, shape: MoEShape) -> dict[str, Any]:
        """What became of recordings and traces."""
        files, routings = (*self.recorded, *self.eval_recorded), (*self.routing, *self.eval_routing)
        return recorded_said(shape, routings, files, self.recorded_limit)
