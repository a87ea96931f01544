"""`Plan`: the file a deployment loads. JSON that people check in, read and diff; matched on its content, never its name."""

import os
from typing import Any

import attrs
import numpy as np

from rampwrap.errors import PlanError, PlanMismatchError
from rampwrap.files import replacing
from rampwrap.kernel.activation import SILU
from rampwrap.kernel.catalog import KERNELS
from rampwrap.kernel.device import Device
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.names import members_of
from rampwrap.kernel.protocol import (
    Config,
    Kernel,
    check_configs,
    config_key,
    index_by_key,
    kernel_version,
    why_not_launched,
)
from rampwrap.kernel.shape import MoEShape
from rampwrap.model.base import CostModel
from rampwrap.model.features import Geometry
from rampwrap.plan import file as plan_file
from rampwrap.policy.graph_lists import Shortlist
from rampwrap.policy.policies import Bucket, Static, WaveCost
from rampwrap.policy.reach import Reach, extrapolated, span
from rampwrap.policy.static import StaticTable, default_table
from rampwrap.routing.drift import Profiled
from rampwrap.schema import between


@attrs.frozen(eq=False)
class Plan:
    """Everything that dispatch needs to know about one kernel, shape and GPU.

    Attributes:
        configs, grids: the configs that any bucket or the static table may launch, nothing else.
        static: the baseline that serves whenever the model's gain is within its error.
        model: fitted coefficients of those configs.
        buckets: candidates by token count; the nearest bucket serves.
        choosing_us: cost of choosing, which a predicted gain must exceed besides the model's error.
        in_graph: what batches choose from inside a CUDA graph, ascending by `first`; none where the plan was made by
            a version that did not store it, or by a model that cannot choose there.
        profiled: what the routing that was profiled looked like; none in plans that do not say.
        provenance: how the plan came about: table, date, versions, held-out figures.
    """

    kernel: str
    kernel_version: str
    device: Device
    shape: MoEShape
    configs: tuple[Config, ...]
    grids: tuple[CtaGrid, ...]
    static: StaticTable
    model: CostModel
    buckets: tuple[Bucket, ...]
    choosing_us: float = attrs.field(default=0.0, validator=between(0, 1e12, PlanError, whole=False))
    in_graph: tuple[Shortlist, ...] = ()
    profiled: tuple[Profiled, ...] = ()
    provenance: dict[str, Any] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        configs, grids, geometry = self.configs, self.grids, self.model.geometry
        check_configs(configs, "the plan")
        if len(grids) != len(configs) or self.model.num_configs != len(configs):
            raise PlanError(
                f"the plan holds {len(configs)} configs, {len(grids)} grids and coefficients for "
                f"{self.model.num_configs}; make it anew with 'rampwrap fit'."
            )
        named = [*self.static.indices, *(i for bucket in self.buckets for i in bucket.shortlist)]
        for index in (*named, *(i for its in self.in_graph for i in its.candidates)):
            if index not in range(len(configs)):
                raise PlanError(
                    f"the plan names config {index} but holds {len(configs)}; make it anew with 'rampwrap fit'."
                )
        meant = Geometry.of(grids, self.device.num_sms)
        launches = np.pad(meant.launches, [(0, 0), (0, max(0, geometry.launches.shape[1] - meant.launches.shape[1]))])
        for name, is_so in (
            ("num_sms", geometry.num_sms == meant.num_sms),
            ("block_m", np.array_equal(geometry.block_m, meant.block_m)),
            ("launches", np.array_equal(geometry.launches, launches)),
        ):
            if not is_so:
                raise PlanError(
                    f"{name} of the model contradicts the plan's device or grids; make it anew with 'rampwrap fit'."
                )
        for name, places in (
            ("buckets", [its.num_tokens for its in self.buckets]),
            ("in_graph", [its.first for its in self.in_graph]),
            ("profiled", [its.num_tokens for its in self.profiled]),
        ):
            if places != sorted(set(places)):
                raise PlanError(f"{name} of the plan is not ascending in tokens; make it anew with 'rampwrap fit'.")

    def policy(self, choosing_us: float | None = None, kernel: Kernel | None = None) -> WaveCost:
        """The routing-aware policy this plan stands for.

        Args:
            choosing_us: in place of the plan's own.
            kernel: whose own defaults serve outside the plan's `Reach`; the policy's configs then go on, after the
                plan's, with those of them that the plan lacks.
        """
        tokens = [its.num_tokens for its in self.buckets] or self.static.token_counts
        low, high = span(tokens)
        configs, grids, own = self.configs, self.grids, hasattr(kernel, "default_config")
        if kernel is not None and own:
            table, where = default_table(kernel), index_by_key(self.configs)
            named = {index: kernel.configs[index] for index in sorted(set(table.indices))}
            more = [config for config in named.values() if config_key(config) not in where]
            configs += tuple(more)
            grids += tuple(kernel.grid(config, self.shape) for config in more)
            where = index_by_key(configs)
            outside = table.renumber({index: where[config_key(config)] for index, config in named.items()})
        else:
            outside = extrapolated(self.model, self.shape, self.static, high)
        reach = Reach(low, high, outside, own, self.profiled)
        cost = self.choosing_us if choosing_us is None else choosing_us
        static = reach.joined(self.static)
        return WaveCost(configs, self.model, static, grids, self.device.num_sms, self.buckets, cost, reach)

    def static_policy(self) -> Static:
        """The plan's static baseline alone: what serves where the plan itself is refused."""
        return Static(self.configs, self.static)

    def check(self, kernel: Kernel, device: Device | None = None, shape: MoEShape | None = None) -> None:
        """Whether this plan may choose for a kernel here.

        Args:
            device: what to compare with; None skips the comparison.
            shape: the same.

        Raises:
            PlanMismatchError: made for another kernel, version, GPU, shape or dtype, or for configs that the
                kernel neither lists nor supports; the message says which, and the command that makes a plan that fits.
        """
        pairs = [("kernel", self.kernel, kernel.name), ("kernel version", self.kernel_version, kernel_version(kernel))]
        if device is not None and not self.device.same_kind(device):
            pairs.append(("GPU", self.device.label, device.label))
        if shape is not None:
            pairs.append(("dtype", self.shape.dtype, shape.dtype))
            pairs.append(("shape", str(self.shape), str(shape)))
        for what, planned, found in pairs:
            if planned != found:
                raise PlanMismatchError(
                    f"the plan was made for {what} {planned} but this is {found}; make one with "
                    f"'{self.remedy(kernel, shape)}'."
                )
        for config in self.configs:
            if (reason := why_not_launched(kernel, config, shape or self.shape)) is not None:
                raise PlanMismatchError(
                    f"the plan uses the config {config_key(config)}, which {kernel.name} does not have "
                    f"({reason.rstrip('.')}); make one with '{self.remedy(kernel, shape)}'."
                )

    def remedy(self, kernel: Kernel, shape: MoEShape | None = None) -> str:
        """The command that makes a plan for this kernel and shape."""
        return profile_command(kernel, shape or self.shape)

    def to_json(self) -> str:
        """The file's text: one number list a line, so that a diff shows which config changed."""
        return plan_file.text_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all."""
        with replacing(path) as stream:
            stream.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sealed: bool = True) -> "Plan":
        """Reads a plan, whole: what is loaded neither fails nor predicts nonsense later.

        Args:
            sealed: whether the file's checksum must fit; False for a plan that was edited on purpose.

        Raises:
            PlanError: missing, truncated, not a plan, of another schema, with a field that is missing, unknown or out
                of range, or with another checksum than its content has.
        """
        return plan_file.read(path, cls, sealed)


def shape_arguments(shape: MoEShape) -> str:
    """The options of the command line that name a layer."""
    local = "" if shape.num_local_experts == shape.num_experts else f" --num-local-experts {shape.num_local_experts}"
    activation = "" if shape.activation == SILU else f" --activation {shape.activation}"
    scales = "" if shape.scales == "block-128" else f" --scales {shape.scales}"
    return (
        f"--num-experts {shape.num_experts} --top-k {shape.top_k} --hidden-size {shape.hidden_size} "
        f"--intermediate-size {shape.intermediate_size} --dtype {shape.dtype}{local}{activation}{scales}"
    )


def profile_command(kernel: Kernel, shape: MoEShape) -> str:
    """The command that profiles a kernel for a shape, from which 'rampwrap fit' makes a plan."""
    # A portfolio of a user's own kernels is made by code that no name here can find again. Some portfolios of kernels
    # here need a copy of the weights; the command then says so.
    known = all(name in KERNELS for name in members_of(kernel.name) or [kernel.name])
    name = kernel.name if known else "YOUR_PACKAGE.MODULE:FACTORY"
    return f"rampwrap profile --kernel {name} {shape_arguments(shape)}"
