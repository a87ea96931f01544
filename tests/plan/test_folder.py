"""Where plans are found: the user's own, those that come with rampwrap, and those of the same GPU under another name."""

import pathlib

import attrs
import pytest

from rampwrap.kernel.device import SIMULATED, Device
from rampwrap.plan import folder
from rampwrap.plan.folder import Plans, made_elsewhere
from rampwrap.plan.plan import Plan

OTHER = Device("elsewhere", 132)


@pytest.fixture
def own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The user's folder; beside it that of rampwrap, both empty."""
    for name in ("own", "shipped"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(folder.PLANS, str(tmp_path / "own"))
    monkeypatch.setattr(folder, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "own"


def test_what_comes_with_rampwrap_serves_where_the_user_has_none(
    own: pathlib.Path, sim_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, at = sim_plan.shape, folder.SHIPPED / "a.plan.json"
    sim_plan.save(at)
    plans = Plans.read()
    fit = plans.find(shape, SIMULATED, ("sim",))
    assert fit is not None and fit.path == str(at) and not plans.found and len(plans.every) == 1
    # A folder that is asked for by name is that folder alone.
    assert Plans.read(own).find(shape, SIMULATED, ("sim",)) is None
    with monkeypatch.context() as patched:
        patched.setenv(folder.OWN_PLANS, "1")
        assert Plans.read().every == ()
    # The user's own counts, however old it is, ...
    old = attrs.evolve(sim_plan, provenance={"made": "2000-01-01"})
    old.save(own / "b.plan.json")
    fit = Plans.read().find(shape, SIMULATED, ("sim",))
    assert fit is not None and fit.path == str(own / "b.plan.json")
    assert [path for path, _ in Plans.read().every] == [str(at), str(own / "b.plan.json")]
    # ... and where it cannot serve that is said.
    attrs.evolve(old, kernel_version="0").save(own / "b.plan.json")
    plans = Plans.read()
    fit = plans.find(shape, SIMULATED, ("sim",))
    assert fit is not None and fit.path == str(at) and "kernel version 0" in fit.passed_over[0]


def test_one_that_came_with_rampwrap_and_cannot_serve_is_no_news(own: pathlib.Path, sim_plan: Plan) -> None:
    attrs.evolve(sim_plan, kernel_version="0").save(folder.SHIPPED / "a.plan.json")
    plans = Plans.read()
    assert plans.find(sim_plan.shape, SIMULATED, ("sim",)) is None
    said = plans.why_not(sim_plan.shape, SIMULATED, ("sim",))
    assert said.startswith(f"a.plan.json in {folder.SHIPPED} does not fit: ") and "kernel version 0" in said
    # One for another GPU or layer says nothing of this one.
    assert plans.why_not(sim_plan.shape, OTHER, ("sim",)) == f"there is no plan in {own}"


def test_shipped_plans_serve_local_experts_too(own: pathlib.Path, sim_plan: Plan) -> None:
    local = attrs.evolve(sim_plan.shape, num_experts=128)
    attrs.evolve(sim_plan, shape=local).save(folder.SHIPPED / "a.plan.json")
    assert Plans.read().find(sim_plan.shape, SIMULATED, ("sim",)) is None
    assert Plans.read().with_local().find(sim_plan.shape, SIMULATED, ("sim",)) is not None


def test_broken_ones_are_told_of_both_places(own: pathlib.Path) -> None:
    for place in (own, folder.SHIPPED):
        (place / "a.plan.json").write_text("{")
    assert [str(place) in said for place, said in zip((own, folder.SHIPPED), Plans.read().broken, strict=True)] == [
        True
    ] * 2


def test_the_same_gpu_under_another_name(own: pathlib.Path, sim_plan: Plan) -> None:
    properties = {"capability": "9.0", "memory_bytes": 85_000_000_000}
    here = attrs.evolve(SIMULATED, **properties)
    there = attrs.evolve(here, name="NVIDIA H800")
    attrs.evolve(sim_plan, device=there, provenance={"made": "2026-02-02"}).save(own / "a.plan.json")
    fit = Plans.read().find(sim_plan.shape, here, ("sim",))
    assert fit is not None and fit.plan.device == there
    assert made_elsewhere(fit.plan, here).startswith(", made on NVIDIA H800 (132 SMs), a GPU of the same kind")
    # One under its own name is preferred, and says nothing.
    attrs.evolve(sim_plan, device=here, provenance={"made": "2026-01-01"}).save(own / "b.plan.json")
    fit = Plans.read().find(sim_plan.shape, here, ("sim",))
    assert fit is not None and fit.path == str(own / "b.plan.json") and made_elsewhere(fit.plan, here) == ""
