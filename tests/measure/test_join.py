"""Tables of several kernels as one: what profiling their portfolio gives, and what cannot be joined."""

import json

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rampwrap.cli.main import main
from rampwrap.errors import InputError, TableError
from rampwrap.kernel import catalog
from rampwrap.kernel.names import members_of
from rampwrap.kernel.portfolio import Portfolio, by_member
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import profile
from rampwrap.measure.join import join
from rampwrap.measure.sweep import sweep, sweep_workloads, worth_keeping
from rampwrap.measure.timings import Timings
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(64, 8, 2048, 1024)
SMALL = ({"block_m": 16, "block_n": 128, "stages": 4}, {"block_m": 32, "block_n": 128, "stages": 4})
LARGE = ({"block_m": 128, "block_n": 256, "stages": 2},)
LAYER = ["--num-experts", "64", "--top-k", "8", "--hidden-size", "2048", "--intermediate-size", "1024"]
ROWS = workload_grid([1, 4, 64, 1024, 4096], [Routing.parse("uniform"), Routing.parse("zipf:1.2")])


class Few(SimKernel):
    """Good at few tokens."""

    name = "few"

    def __init__(self, shape=SHAPE):
        super().__init__(shape, SMALL)


class Many(SimKernel):
    """Good at many."""

    name = "many"
    version = "7"

    def __init__(self, shape=SHAPE):
        super().__init__(shape, LARGE)


def table(kernel, rows=ROWS):
    return profile(kernel, SHAPE, rows, quiet=True)


@pytest.fixture(scope="module")
def tables():
    return [table(Few()), table(Many())]


def test_is_the_portfolios_own_table(tables):
    """Configs, grids, names and times of the joined table are those of profiling both at once."""
    portfolio = Portfolio([Few(), Many()])
    joined, own = join(tables), table(portfolio)
    assert (joined.kernel, joined.kernel_version) == (own.kernel, own.kernel_version) == ("portfolio:few+many", "1+7")
    assert joined.configs == own.configs and joined.grids == own.grids
    assert joined.split == own.split and joined.label == own.label and np.array_equal(joined.counts, own.counts)
    np.testing.assert_allclose(joined.us, own.us, rtol=0.05)  # simulated times carry noise
    make_plan(joined).check(portfolio, joined.device, SHAPE)


def test_joins_what_all_have(tables):
    """Workloads in the first table's order, whatever the others' order is; refusals keep their configs."""
    few = attrs.evolve(tables[0], reasons={1: "too wide"}, us=np.where([[False, True]], np.nan, tables[0].us))
    many = attrs.evolve(tables[1].take(np.arange(len(ROWS))[::-1][:-2]), reasons={0: "too tall"})
    joined = join([few, many])
    assert joined.label == few.label[2:] and joined.reasons == {1: "too wide", 2: "too tall"}
    assert np.array_equal(joined.us[:, 2], tables[1].us[2:, 0]) and np.isnan(joined.us[:, 1]).all()
    assert joined.spread is not None and joined.spread.shape == joined.us.shape
    assert join([attrs.evolve(few, spread=None), many]).spread is None
    assert join([few]) is few


def test_what_cannot_be_joined(tables):
    """One sentence that names what differs."""
    few, many = tables
    device = attrs.evolve(many.device, name="another")
    shape = attrs.evolve(SHAPE, top_k=4)
    other = table(Many(), workload_grid([2], [Routing.parse("uniform")]))
    for given, said in (
        ([], "there is no table to join"),
        ([few, few], r"two of the tables are of one kernel \(few, few\)"),
        ([few, attrs.evolve(many, device=device)], "differ in GPU .*another"),
        ([few, attrs.evolve(many, device=attrs.evolve(many.device, num_sms=66))], "differ in GPU .*66 SMs"),
        ([few, attrs.evolve(join([few, many]), kernel="third")], "third is joined already"),
        ([few, attrs.evolve(many, shape=shape)], "differ in shape .*top_k=4"),
        ([few, other], "the tables of few, many share no workload"),
    ):
        with pytest.raises(TableError, match=said):
            join(given)


@pytest.fixture
def known(monkeypatch):
    """Both kernels under names that the command line knows."""
    monkeypatch.setitem(catalog.KERNELS, "few", f"{__name__}:Few")
    monkeypatch.setitem(catalog.KERNELS, "many", f"{__name__}:Many")


def test_names_of_portfolios(known):
    """A plan names its portfolio, which the catalog makes again; the remedy is a command that can be run."""
    kernel = catalog.make_kernel("portfolio:few+many", SHAPE)
    assert kernel.name == "portfolio:few+many" and members_of(kernel.name) == ("few", "many") and not members_of("few")
    assert [(its.name, len(own)) for its, own in by_member(kernel, kernel.configs)] == [("few", 2), ("many", 1)]
    assert [(its.name, own) for its, own in by_member(Few(), SMALL)] == [("few", list(SMALL))]
    plan = make_plan(join([table(Few()), table(Many())]))
    assert "--kernel portfolio:few+many --num-experts 64" in plan.remedy(kernel)
    alone = Portfolio([SimKernel(SHAPE), type("Mine", (Many,), {"name": "mine"})()])
    assert "YOUR_PACKAGE.MODULE:FACTORY" in plan.remedy(alone)
    with pytest.raises(InputError, match="kernel 'nothing' is unknown"):
        catalog.make_kernel("portfolio:few+nothing", SHAPE)


def test_command_line(known, tmp_path, capsys):
    """`profile` of a portfolio times one kernel after the other; `fit` and `replay` take the tables of several."""
    rows = ["--batch-size", "1", "64", "4096", "--routing", "uniform", "zipf:1", "--eval-batch-size", "16", "--quiet"]
    out = tmp_path / "both.npz"
    assert main(["profile", "--kernel", "portfolio:few+many", *LAYER, *rows, "--out", str(out)]) == 0
    parts = [str(tmp_path / f"both.{name}.npz") for name in ("few", "many")]
    assert f"{out}: 11 workloads x 3 configs" in capsys.readouterr().out
    joined, kept = join([Timings.load(part) for part in parts]), Timings.load(out)
    assert np.array_equal(joined.us, kept.us) and joined.configs == kept.configs
    plan = tmp_path / "p.plan.json"
    assert main(["fit", *parts, "--out", str(plan)]) == 0
    assert Plan.load(plan).kernel == "portfolio:few+many"
    assert Plan.load(plan).provenance["table"] == "both.few.npz + both.many.npz"
    assert main(["replay", *parts]) == 0 and "portfolio:few+many on simulated" in capsys.readouterr().out
    assert main(["fit", *parts]) == 1 and "pass --out PLAN.json" in capsys.readouterr().err
    assert main(["profile", "--kernel", "portfolio:few+many", *LAYER, *rows, "--dry-run"]) == 0
    assert "few: 11 workloads x 2 configs = 22 cells" in capsys.readouterr().out
    assert main(["fit", str(out), parts[0], "--out", str(plan)]) == 1
    assert "is joined already" in capsys.readouterr().err
    (tmp_path / "tuned.json").write_text(json.dumps({"64": dict(SMALL[0])}))
    assert main(["replay", *parts, "--static-file", str(tmp_path / "tuned.json")]) == 1
    assert "add a key 'kernel' to each entry" in capsys.readouterr().err
    (tmp_path / "tuned.json").write_text(json.dumps({"64": {"kernel": "few", **SMALL[0]}}))
    assert main(["replay", *parts, "--static-file", str(tmp_path / "tuned.json")]) == 0


def test_a_sweep_keeps_what_wins():
    """All winners, then what is often near the best; the sweep keeps to the token counts that will be profiled."""
    timings = table(SimKernel(SHAPE))
    best = np.unique(np.nanargmin(timings.us, axis=1))
    for most in (1, len(best) + 2, 1000):
        kept = worth_keeping(timings, most)
        assert len(kept) <= max(most, len(best)) and kept[: len(best)] == [timings.configs[i] for i in best]
    near = (timings.us <= 1.04 * timings.us.min(axis=1, keepdims=True)).any(axis=0)
    assert len(worth_keeping(timings, 1000)) == near.sum()
    tokens = [its.num_tokens for its in sweep_workloads(workload_grid([6, 300], [Routing.parse("uniform")]))]
    assert sorted(set(tokens)) == [6, 16, 64, 256, 300]
    assert not {its.seed for its in sweep_workloads(seed=3)} & {3, 4}


def test_a_sweep_comes_before_a_profile(tmp_path, capsys):
    """`--most-configs` times few configs on all workloads, and says in the table of how many."""
    rows = ["--batch-size", "1", "64", "--routing", "uniform", "--eval-batch-size", "--quiet"]
    out = tmp_path / "t.npz"
    run = ["profile", "--kernel", "sim", *LAYER, *rows, "--most-configs", "5", "--out", str(out)]
    assert main(run) == 0
    assert len(Timings.load(out).configs) == 5
    assert Timings.load(out).notes["swept_configs"] == len(SimKernel(SHAPE).configs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.npz"], "the next run begins anew"
    assert main([*run, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "sim: a sweep of 8 workloads x" in said and "then 2 workloads x 5 configs = 10 cells" in said
    assert main([*run, "--budget", "9s"]) == 1 and "leave one out" in capsys.readouterr().err
    assert sweep(SimKernel(SHAPE), SHAPE, 1000) == list(SimKernel(SHAPE).configs)


def test_a_finished_sweep_stands(tmp_path):
    """A run that goes on must keep the same configs; another kernel, seed or a file cut off is swept anew."""
    out, kernel = tmp_path / "s.npz", SimKernel(SHAPE)
    kept = sweep(kernel, SHAPE, 5, out=out, quiet=True)
    written = out.stat().st_mtime_ns
    assert sweep(kernel, SHAPE, 5, out=out, quiet=True) == kept and out.stat().st_mtime_ns == written
    whole = Timings.load(out)
    attrs.evolve(whole, kernel_version="another").save(out)
    assert sweep(kernel, SHAPE, 5, out=out, quiet=True) and Timings.load(out).kernel_version == whole.kernel_version
    sweep(kernel, SHAPE, 5, out=out, quiet=True, seed=7)
    assert Timings.load(out).label == whole.label and not np.array_equal(Timings.load(out).counts, whole.counts)
    out.write_bytes(b"cut off")
    assert sweep(kernel, SHAPE, 5, out=out, quiet=True) and Timings.load(out).label == whole.label


def test_members_that_were_finished_stay(known, tmp_path, capsys, monkeypatch):
    """A run killed in the second kernel goes on there; a finished profile is measured anew, or replaced, if asked to."""
    rows = ["--batch-size", "1", "64", "--routing", "uniform", "--eval-batch-size", "16", "--quiet"]
    out, timed = tmp_path / "b.npz", []
    run = ["profile", "--kernel", "portfolio:few+many", *LAYER, *rows, "--out", str(out)]
    real = SimKernel.launch

    def launch(kernel, config, topk_ids):
        if kernel.name == "many" and kernel.name not in timed:
            timed.append(kernel.name)
            raise KeyboardInterrupt
        timed.append(kernel.name)
        return real(kernel, config, topk_ids)

    def again(*command):
        timed[:] = ["many"]
        return main([*command]), set(timed[1:])

    monkeypatch.setattr(SimKernel, "launch", launch)
    assert main(run) == 130 and set(timed) == {"few", "many"}
    assert again(*run) == (0, {"many"}) and "14 cells were there already" in capsys.readouterr().out
    assert again(*run) == (0, set())
    assert again(*run, "--replace") == (0, {"few", "many"})
    other = [*run[:-4], "32", "--quiet", *run[-2:]]
    assert again(*other) == (1, set()) and "b.npz is there and holds another profile" in capsys.readouterr().err
    assert again(*other, "--replace") == (0, {"few", "many"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("portfolio:few+", "kernel '' is unknown"),
        ("portfolio:", "kernel '' is unknown"),
        ("portfolio:few+nothere", "kernel 'nothere' is unknown"),
        ("portfolio:few+few", "have one name"),
    ],
)
def test_a_portfolio_is_made_before_it_is_measured(known, tmp_path, capsys, name, said):
    assert main(["profile", "--kernel", name, *LAYER, "--out", str(tmp_path / "x.npz")]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_gave_up_is_said(tables):
    joined = join([attrs.evolve(tables[0], notes={"gave_up": "3 of 20 workloads: 1 s were over."}), tables[1]])
    assert joined.notes["gave_up"] == "few: 3 of 20 workloads: 1 s were over."
    assert joined.notes["members"]["many"] == tables[1].notes
