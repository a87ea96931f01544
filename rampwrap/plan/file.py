"""The text of a plan file: what stands in it in which order, and the two parts that do not stand as they are in memory."""

import functools
import json
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

import attrs

from rampwrap import schema
from rampwrap.errors import PlanError, RampwrapError
from rampwrap.model.base import CostModel
from rampwrap.model.cost import model_class
from rampwrap.model.features import Geometry
from rampwrap.policy.graph_lists import Shortlist
from rampwrap.policy.static import StaticTable

if TYPE_CHECKING:
    from cattrs import Converter

    from rampwrap.plan.plan import Plan

SCHEMA = 1
ORDER = (
    *("kernel", "kernel_version", "device", "shape", "provenance", "configs", "grids", "static", "choosing_us"),
    *("buckets", "in_graph", "profiled", "model"),
)
MODEL_ORDER = (
    *("name", "error", "local_error", "num_sms", "block_m", "launches", "resident", "span"),
    *("block_ms", "support", "coef", "weights"),
)
OLD_MODES = ("early-exit", "merged", "parallel", "switch", "single")
_GEOMETRY = tuple(field.name for field in attrs.fields(Geometry))


def text_of(plan: "Plan") -> str:
    """The file's text: one number list a line, so that a diff shows which config changed.

    Raises:
        PlanError: the plan holds a number that is not finite.
    """
    raw = schema.dump(plan, converter())
    raw = schema.seal({"schema": SCHEMA, **{key: raw[key] for key in ORDER}})
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


def read(path: str | os.PathLike[str], cls: "type[Plan]", sealed: bool = True) -> "Plan":
    """The plan of a file; see `Plan.load`."""
    name = os.fspath(path)
    try:
        with pathlib.Path(path).open("rb") as stream:
            data = stream.read(schema.MOST_BYTES + 1)
        if data[:2] == b"PK":
            raise ValueError("it is a timing table: 'rampwrap fit' makes a plan of it")
        raw = schema.parse(data)
    except (OSError, ValueError) as error:
        raise PlanError(f"{name} is not a readable plan ({error}); make one with 'rampwrap fit'.") from error
    if not isinstance(raw, dict) or raw.get("schema") is True or raw.get("schema") != SCHEMA or "buckets" not in raw:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise PlanError(f"{name} is no plan of schema {SCHEMA} (found {found!r:.60}); make one with 'rampwrap fit'.")
    try:
        raw = schema.unseal(raw, check=sealed)
    except ValueError as error:
        raise PlanError(
            f"{name} is not the plan that was written ({error}); make it anew with 'rampwrap fit', or, if you edited it "
            f"on purpose, run 'rampwrap seal {name}'."
        ) from error
    try:
        return schema.read({key: value for key, value in raw.items() if key != "schema"}, cls, PlanError, converter())
    except RampwrapError as error:
        raise PlanError(f"{name} is not a usable plan ({error}); make one with 'rampwrap fit'.") from error


@functools.cache
def converter() -> "Converter":
    """The strict converter with the static table and the models as they stand in files."""
    made = schema.new_converter()

    def table(raw: Any, _: Any) -> StaticTable:
        entries = made.structure(raw, _Static)
        tokens = sorted(entries.config)
        return StaticTable(entries.source, tuple(tokens), tuple(entries.config[at] for at in tokens))

    def listed(its: StaticTable) -> dict[str, Any]:
        config = dict(zip(map(str, its.token_counts), its.indices, strict=True))
        return {"source": its.source, "config": config}

    def model(raw: Any, _: Any) -> CostModel:
        name = raw.get("name") if isinstance(raw, dict) else raw
        kind = model_class(name, "fit again with")
        own = {key: value for key, value in raw.items() if key != "name" and key not in _GEOMETRY}
        own["geometry"] = {key: raw[key] for key in _GEOMETRY if key in raw}
        return made.structure(own, kind)

    def flat(its: CostModel) -> dict[str, Any]:
        raw = made.unstructure(its, type(its))
        raw |= {"name": its.name, **raw.pop("geometry")}
        return {key: raw[key] for key in MODEL_ORDER if key in raw}

    def without_mode(raw: Any, kind: Any) -> Any:
        # Plans made before 0.1 name one of several launch modes here.
        old = isinstance(raw, dict) and raw.get("mode") in OLD_MODES
        return fill({key: value for key, value in raw.items() if key != "mode"} if old else raw, kind)

    fill = made.get_structure_hook(Shortlist)
    made.register_structure_hook(Shortlist, without_mode)
    made.register_structure_hook(StaticTable, table)
    made.register_unstructure_hook(StaticTable, listed)
    made.register_structure_hook_func(lambda kind: kind is CostModel, model)
    made.register_unstructure_hook_func(lambda kind: kind is CostModel, flat)
    return made


@attrs.frozen
class _Static:
    source: str
    config: dict[int, int]
