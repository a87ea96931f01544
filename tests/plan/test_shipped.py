"""Plans that the wheel brings: of tables in this repository, for the kernels as they are. `make plans` makes them anew."""

import hashlib
import pathlib
import runpy
import types

import pytest

pytest.importorskip("triton")

from rampwrap.kernel.catalog import make_kernel
from rampwrap.kernel.device import Device
from rampwrap.kernel.protocol import MEMBER
from rampwrap.kernels.cute.configs import all_configs, from_keys
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import SHIPPED, Plans
from rampwrap.plan.plan import Plan

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the measured tables are not beside the tests")
PLANS = sorted(SHIPPED.glob("*.plan.json"))


@pytest.fixture(scope="module")
def tool() -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "shipped_plans.py"), run_name="tool"))


def test_there_is_one_for_all_tables_of_todays_kernels(tool: types.SimpleNamespace) -> None:
    """And none besides; together they are small."""
    today = []
    for tables in tool.TABLES:
        read = [Timings.load(tool.RESULTS / f"{table}.npz") for table in tables]
        if all(its.kernel_version == make_kernel(its.kernel, its.shape).version for its in read):  # type: ignore[attr-defined]
            today.append([f"{table}.npz" for table in tables])
    made = [[its["table"] for its in Plan.load(path).provenance["measured"]] for path in PLANS]
    assert sorted(made) == sorted(today), "run make plans"
    assert sum(path.stat().st_size for path in PLANS) < 400_000


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_it_fits_its_kernel_and_says_where_it_comes_from(path: pathlib.Path, tool: types.SimpleNamespace) -> None:
    plan = Plan.load(path)
    plan.check(make_kernel(plan.kernel, plan.shape))
    for its in plan.provenance["measured"]:
        assert {"table", "date", "torch", "triton", "commit", "sha256"} <= set(its)
        table = (tool.RESULTS / its["table"]).read_bytes()
        assert its["sha256"] == hashlib.sha256(table).hexdigest(), "run make plans"


def test_the_cute_configs_that_they_name_are_listed() -> None:
    """So a library from a wheel serves them where nothing can be compiled."""
    named = 0
    for plan in map(Plan.load, PLANS):
        for config in plan.configs:
            if config.get(MEMBER, plan.kernel) == "cute_moe":
                keys = {key: value for key, value in config.items() if key != MEMBER}
                assert from_keys(keys, plan.shape.dtype) in all_configs(keys["form"], plan.shape.dtype), keys
                named += 1
    assert named


def test_they_are_found_without_a_word_from_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("RAMPWRAP_PLANS", str(tmp_path))
    plans = Plans.read()
    assert len(plans.shipped) == len(PLANS) and not plans.broken
    for _, plan in plans.shipped:
        assert plans.find(plan.shape, plan.device, (plan.kernel,)) is not None
        assert plans.find(plan.shape, Device("another", 132), (plan.kernel,)) is None


def test_the_tool_makes_what_is_there(tool: types.SimpleNamespace) -> None:
    """The smallest of them: configs, static table and buckets; coefficients may round otherwise elsewhere."""
    tables = tool.TABLES[-1]
    names = [f"{table}.npz" for table in tables]
    there = [Plan.load(path) for path in PLANS]
    (old,) = (plan for plan in there if [its["table"] for its in plan.provenance["measured"]] == names)
    new = tool.shipped(tables)
    assert (new.configs, new.static, new.shape, new.device) == (old.configs, old.static, old.shape, old.device)
    assert new.provenance["measured"] == old.provenance["measured"] and new.provenance["made"] == old.provenance["made"]
