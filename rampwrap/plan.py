"""`Plan`: the file a deployment loads. JSON that people check in, read and diff; matched on its content, never its name."""

import json
import math
import os
import pathlib
import re
from typing import Any

import attrs

from rampwrap.catalog import KERNELS
from rampwrap.cost import CostModel, model_from_dict
from rampwrap.device import Device
from rampwrap.drift import Profiled
from rampwrap.errors import PlanError, PlanMismatchError, RampwrapError
from rampwrap.files import replacing
from rampwrap.grid import CtaGrid
from rampwrap.kernel import Config, Kernel, MoEShape, check_configs, config_key, index_by_key, kernel_version
from rampwrap.policy import Bucket, Static, WaveCost
from rampwrap.portfolio import members_of
from rampwrap.shortlist import Shortlist
from rampwrap.static import StaticTable

SCHEMA = 1


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
    choosing_us: float = 0.0
    in_graph: tuple[Shortlist, ...] = ()
    profiled: tuple[Profiled, ...] = ()
    provenance: dict[str, Any] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        check_configs(self.configs, "the plan")
        known = range(len(self.configs))
        named = [*self.static.indices, *(i for bucket in self.buckets for i in bucket.shortlist)]
        for index in (*named, *(i for its in self.in_graph for i in its.candidates)):
            if index not in known:
                raise PlanError(
                    f"the plan names config {index} but holds {len(self.configs)}; make it anew with 'rampwrap fit'."
                )
        numbers = (self.choosing_us, self.model.error, *(error for _, error in self.model.local_error))
        if not all(map(math.isfinite, numbers)):
            raise PlanError(
                "an error or the cost of choosing is not finite; the plan is poisoned, make it anew with 'rampwrap fit'."
            )
        if len(self.grids) != len(self.configs) or self.model.num_configs != len(self.configs):
            raise PlanError(
                f"the plan holds {len(self.configs)} configs, {len(self.grids)} grids and coefficients for "
                f"{self.model.num_configs}; make it anew with 'rampwrap fit'."
            )

    def policy(self, choosing_us: float | None = None) -> WaveCost:
        """The routing-aware policy this plan stands for; `choosing_us` in place of the plan's own, where given."""
        cost = self.choosing_us if choosing_us is None else choosing_us
        return WaveCost(self.configs, self.model, self.static, self.grids, self.device.num_sms, self.buckets, cost)

    def static_policy(self) -> Static:
        """The plan's static baseline alone: what serves where the plan itself is refused."""
        return Static(self.configs, self.static)

    def check(self, kernel: Kernel, device: Device | None = None, shape: MoEShape | None = None) -> None:
        """Whether this plan may choose for a kernel here.

        Args:
            device, shape: what to compare with; None skips the comparison.

        Raises:
            PlanMismatchError: made for another kernel, version, GPU, shape or dtype, or for configs that the
                kernel does not have; the message says which, and the command that makes a plan that fits.
        """
        pairs = [("kernel", self.kernel, kernel.name), ("kernel version", self.kernel_version, kernel_version(kernel))]
        if device is not None:
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
        have = index_by_key(kernel.configs)
        for config in self.configs:
            if config_key(config) not in have:
                raise PlanMismatchError(
                    f"the plan uses the config {config_key(config)}, which {kernel.name} does not have; make one with "
                    f"'{self.remedy(kernel, shape)}'."
                )

    def remedy(self, kernel: Kernel, shape: MoEShape | None = None) -> str:
        """The command that makes a plan for this kernel and shape."""
        return profile_command(kernel, shape or self.shape)

    def to_json(self) -> str:
        """The file's text: one number list a line, so that a diff shows which config changed."""
        raw = {
            "schema": SCHEMA,
            "kernel": self.kernel,
            "kernel_version": self.kernel_version,
            "device": self.device.to_dict(),
            "shape": self.shape.to_dict(),
            "provenance": self.provenance,
            "configs": [dict(config) for config in self.configs],
            "grids": [grid.to_dict() for grid in self.grids],
            "static": {
                "source": self.static.source,
                "config": dict(zip(map(str, self.static.token_counts), self.static.indices, strict=True)),
            },
            "choosing_us": self.choosing_us,
            "buckets": [bucket.to_dict() for bucket in self.buckets],
            "in_graph": [its.to_dict() for its in self.in_graph],
            "profiled": [its.to_dict() for its in self.profiled],
            "model": self.model.to_dict(),
        }
        try:
            text = json.dumps(raw, indent=1, allow_nan=False)
        except ValueError as error:
            raise PlanError(
                f"the plan holds a number that is not finite ({error}); make it anew with 'rampwrap fit'."
            ) from error
        # Innermost lists and objects go on one line each, and objects with one list in them: the shortlists.
        for innermost in (r"[\[{][^\[\]{}]*[\]}]", r"\{[^\[\]{}]*\[[^\[\]{}]*\][^\[\]{}]*\}"):
            text = re.sub(innermost, lambda m: re.sub(r"\s*\n\s*", " ", m[0]), text)
        return text + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all."""
        with replacing(path) as stream:
            stream.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a plan.

        Raises:
            PlanError: missing, truncated, not a plan, of another schema, or with numbers that are not finite.
        """
        try:
            raw = json.loads(pathlib.Path(path).read_text(), parse_constant=_no_constant, parse_float=_finite)
        except (OSError, ValueError) as error:
            raise PlanError(
                f"{os.fspath(path)} is not a readable plan ({error}); make one with 'rampwrap fit'."
            ) from error
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or "buckets" not in raw:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise PlanError(
                f"{os.fspath(path)} is no plan of schema {SCHEMA} (found {found!r}); make one with 'rampwrap fit'."
            )
        try:
            table = {int(tokens): int(index) for tokens, index in raw["static"]["config"].items()}
            return cls(
                kernel=raw["kernel"],
                kernel_version=raw["kernel_version"],
                device=Device.from_dict(raw["device"]),
                shape=MoEShape(**raw["shape"]),
                configs=tuple(raw["configs"]),
                grids=tuple(CtaGrid.from_dict(grid) for grid in raw["grids"]),
                static=StaticTable(raw["static"]["source"], tuple(table), tuple(table.values())),
                model=model_from_dict(raw["model"]),
                buckets=tuple(Bucket.from_dict(bucket) for bucket in raw["buckets"]),
                choosing_us=float(raw.get("choosing_us", 0.0)),
                in_graph=tuple(Shortlist.from_dict(its) for its in raw.get("in_graph", ())),
                profiled=tuple(Profiled.from_dict(its) for its in raw.get("profiled", ())),
                provenance=raw.get("provenance", {}),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = str(error) if isinstance(error, RampwrapError) else f"{type(error).__name__}: {error}"
            raise PlanError(
                f"{os.fspath(path)} is not a usable plan ({reason}); make one with 'rampwrap fit'."
            ) from error


def _no_constant(text: str) -> float:
    raise ValueError(f"a coefficient is {text}")


def _finite(text: str) -> float:
    value = float(text)  # 1e999 is JSON, and infinite
    return value if math.isfinite(value) else _no_constant(text)


def profile_command(kernel: Kernel, shape: MoEShape) -> str:
    """The command that profiles a kernel for a shape, from which 'rampwrap fit' makes a plan."""
    # A portfolio of a user's own kernels is made by code that no name here can find again. Some portfolios of kernels
    # here need a copy of the weights; the command then says so.
    known = all(name in KERNELS for name in members_of(kernel.name))
    name = kernel.name if known else "YOUR_PACKAGE.MODULE:FACTORY"
    local = "" if shape.num_local_experts == shape.num_experts else f" --num-local-experts {shape.num_local_experts}"
    return (
        f"rampwrap profile --kernel {name} --num-experts {shape.num_experts} --top-k {shape.top_k} --hidden-size "
        f"{shape.hidden_size} --intermediate-size {shape.intermediate_size} --dtype {shape.dtype}{local}"
    )
