"""Active profiling: few cells, by replay of a table and on a simulated kernel, within its budget."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import pytest

from rampwrap.compare import evaluate as compare
from rampwrap.errors import FitError, InputError
from rampwrap.kernel.grid import FloatArray
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.active import MIN_CELLS, SEEDS, explore, profile_active, replay_active
from rampwrap.measure.full import profile
from rampwrap.measure.journal import journal_path, read_journal
from rampwrap.measure.timings import Timings
from rampwrap.model.fit import fit, fitted_us
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(16, 2, 512, 256)
CONFIGS: list[Config] = [
    {"block_m": block_m, "block_n": block_n, "stages": stages}
    for block_m in (16, 32, 64, 128)
    for block_n in (32, 64, 128, 256)
    for stages in (1, 2, 3, 4)
]
TOKENS = [1, 4, 16, 64, 256, 1024]
SKEWS = [Routing.parse(name) for name in ("uniform", "zipf:1.2", "dirichlet:0.3")]
TRAIN = workload_grid(TOKENS, SKEWS)
EVAL = workload_grid([3, 24, 400], [Routing.parse("zipf:0.8"), Routing.parse("hot:2")], "eval")


@pytest.fixture(scope="module")
def table() -> Timings:
    return profile(SimKernel(SHAPE, CONFIGS), SHAPE, [*TRAIN, *EVAL], rounds=1, quiet=True)


class Clock:
    """Time passes only while cells are measured: `cell` seconds each."""

    def __init__(self, table: Timings, cell: float = 0.0, broken: Sequence[int] = ()) -> None:
        self.table, self.cell, self.broken = table, cell, broken
        self.now = 100.0
        self.asked: list[tuple[int, int]] = []

    def measure(self, row: int, configs: Sequence[int]) -> FloatArray:
        self.now += self.cell * len(configs)
        self.asked += [(row, config) for config in configs]
        return np.array([np.nan if c in self.broken else self.table.us[row, c] for c in configs])

    def predict(self, us: FloatArray) -> FloatArray:
        return fit(attrs.evolve(self.table, us=us)).predict(self.table.counts)

    def explore(self, **options: Any) -> Any:
        t = self.table
        return explore(
            t.counts, t.is_uniform, len(t.configs), self.measure, self.predict, clock=lambda: self.now, **options
        )


@pytest.fixture
def train(table: Timings) -> Timings:
    return table.take(table.rows("train"))


class TestReplay:
    def test_few_cells_choose_nearly_as_well(self, table: Timings) -> None:
        """A quarter of a small table; held-out rows stay whole and judge it."""
        sparse = replay_active(table, fitted_us, share=0.25)
        rows, held_out = table.rows("train"), table.rows("eval")
        assert np.isfinite(sparse.us[rows]).mean() <= 0.25
        np.testing.assert_array_equal(sparse.us[held_out], table.us[held_out])
        known = np.isfinite(sparse.us)
        np.testing.assert_array_equal(sparse.us[known], table.us[known])
        full, few = (compare.replay(t, models=("wave",)).summary("wave").regret_mean for t in (table, sparse))
        assert few <= full + 0.01

    def test_deterministic(self, table: Timings) -> None:
        """The same table gives the same cells."""
        np.testing.assert_array_equal(replay_active(table, fitted_us).us, replay_active(table, fitted_us).us)

    def test_saves_and_loads(self, table: Timings, tmp_path: pathlib.Path) -> None:
        """NaN cells and the account of them travel with the file."""
        sparse = replay_active(table, fitted_us)
        sparse.save(tmp_path / "t.npz")
        loaded = Timings.load(tmp_path / "t.npz")
        np.testing.assert_array_equal(np.isnan(loaded.us), np.isnan(sparse.us))
        assert loaded.notes["active"]["of"] == table.us[table.rows("train")].size


class TestExplore:
    def test_every_config_and_workload_is_tried(self, train: Timings) -> None:
        """All configs on the seeds, something on every workload, no cell twice, and not more than asked for."""
        clock = Clock(train)
        found = clock.explore(share=0.3)
        assert len(set(clock.asked)) == len(clock.asked) == found.cells <= 0.3 * train.us.size
        known = np.isfinite(found.us)
        assert known.all(axis=1).sum() == SEEDS and known.any(axis=1).all() and found.gave_up is None

    def test_static_candidates_on_uniform_rows(self, train: Timings) -> None:
        """What leads a workload is also measured under uniform routing of as many tokens."""
        found = Clock(train).explore(share=0.3)
        known = np.isfinite(found.us)
        leads = np.nanargmin(np.where(known, found.us, np.inf), axis=1)
        uniform = {int(train.num_tokens[row]): row for row in np.flatnonzero(train.is_uniform)}
        missing = [row for row, lead in enumerate(leads) if not known[uniform[int(train.num_tokens[row])], lead]]
        assert len(missing) <= 1

    def test_a_small_table_gets_its_minimum(self, train: Timings) -> None:
        """A share that is too small to teach a model anything is exceeded."""
        found = Clock(train).explore(share=0.001)
        assert found.cells <= SEEDS * len(CONFIGS) + MIN_CELLS * len(TRAIN)
        assert np.isfinite(found.us).any(axis=1).all()

    def test_everything(self, train: Timings) -> None:
        """A share of 1 measures the whole table."""
        assert np.isfinite(Clock(train).explore(share=1.0).us).all()

    def test_broken_configs_are_asked_once(self, train: Timings) -> None:
        """NaN from the kernel rules a config out for good."""
        clock = Clock(train, broken=(5, 17))
        found = clock.explore(share=0.3)
        assert sum(config in (5, 17) for _, config in clock.asked) == 2
        assert np.isnan(found.us[:, [5, 17]]).all()

    def test_without_a_model(self, train: Timings) -> None:
        """A model that cannot be fitted leaves the choice to the neighbours."""

        class NoModel(Clock):
            def predict(self, us: FloatArray) -> FloatArray:
                raise FitError("too few")

        found = NoModel(train).explore(share=0.3)
        assert found.cells > 0.25 * train.us.size

    @pytest.mark.parametrize("budget_s", [0.5, 2.0, 8.0, 20.0])
    def test_budget(self, train: Timings, budget_s: float) -> None:
        """Time is kept to within a chunk, and the sentence says what it cost."""
        clock = Clock(train, cell=0.05)
        found = clock.explore(share=0.5, budget_s=budget_s)
        assert clock.now - 100.0 <= budget_s + 24 * 0.05
        assert found.gave_up is not None and f"{budget_s:g} s allowed {found.cells} of" in found.gave_up
        if budget_s >= 20:
            assert "0 of 18 workloads were never measured" in found.gave_up

    def test_enough_time(self, train: Timings) -> None:
        """Nothing is given up."""
        assert Clock(train, cell=0.001).explore(share=0.3, budget_s=3600).gave_up is None

    @pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"budget_s": 0.0}, {"budget_s": float("nan")}])
    def test_bad_requests(self, train: Timings, options: Any) -> None:
        """One sentence each."""
        with pytest.raises(InputError):
            Clock(train).explore(**options)

    def test_one_workload(self, train: Timings) -> None:
        """Nothing to choose between: all of it is measured."""
        assert np.isfinite(Clock(train.take([0])).explore().us).all()


class TestOrder:
    """The order in which cells are asked for, by digest: with these constants the published tables were explored.

    Where it changes on purpose, so do the figures of active profiling in benchmarks/README.md.
    """

    ORDERS = {
        "plain": (345, "f14e43a313f4", None),
        "small": (182, "5e1e71aaf540", None),
        "without a model": (345, "a6e21e6efd46", None),
        "broken": (288, "ae6a87c31923", None),
        "no room": (345, "710a6f92caee", None),
        "in time": (460, "85e709d41436", None),
        "late": (
            128,
            "bd593c97462d",
            "3 s allowed 128 of 576 planned cells; 0 of 64 configs and 13 of 18 workloads were never measured.",
        ),
    }

    @pytest.mark.parametrize("case", ORDERS)
    def test_is_that_of_the_figures(self, train: Timings, case: str) -> None:
        """Of all stages, without a model fit: its floating point may differ in the last digit from machine to machine."""

        class Oracle(Clock):
            """Knows every time to a few percent; the largest batches may find no room."""

            def predict(self, us: FloatArray) -> FloatArray:
                if case == "without a model":
                    raise FitError("too few")
                return self.table.us * (1 + 0.03 * np.sin(np.arange(us.size)).reshape(us.shape))

            def measure(self, row: int, configs: Sequence[int]) -> FloatArray:
                found = super().measure(row, configs)
                full = case == "no room" and self.table.num_tokens[row] == 1024
                return np.full(len(configs), np.nan) if full else found

        options = {
            "small": {"share": 0.01},
            "broken": {"share": 0.25},
            "in time": {"share": 0.4, "budget_s": 12.0},
            "late": {"share": 0.5, "budget_s": 3.0},
        }
        clock = Oracle(
            train,
            cell=0.025 if case in ("in time", "late") else 0.0,
            broken=(0, 5, 63) if case == "broken" else (),
        )
        found = clock.explore(**options.get(case, {"share": 0.3}))
        digest = hashlib.sha256(str(clock.asked).encode()).hexdigest()[:12]
        assert (len(clock.asked), digest, found.gave_up) == self.ORDERS[case]


class TestLive:
    def test_same_cells_as_by_replay(self, table: Timings) -> None:
        """The live kernel takes the same path as its table."""
        live = profile_active(SimKernel(SHAPE, CONFIGS), SHAPE, TRAIN, fitted_us, rounds=1, quiet=True)
        replayed = replay_active(table.take(table.rows("train")), fitted_us)
        np.testing.assert_allclose(live.us, replayed.us, rtol=1e-5)

    def test_resumes(self, tmp_path: pathlib.Path) -> None:
        """Ctrl-C keeps the cells; the next run launches only the others and ends at the same table."""
        out = tmp_path / "t.npz"

        class Stopping(SimKernel):
            def launch(self, config: Config, topk_ids: Any) -> float:
                if self.launches == 180:
                    raise KeyboardInterrupt
                return super().launch(config, topk_ids)

        with pytest.raises(KeyboardInterrupt):
            profile_active(Stopping(SHAPE, CONFIGS), SHAPE, TRAIN, fitted_us, rounds=1, out=out, quiet=True)
        kept = int(np.isfinite(read_journal(str(journal_path(out))).us).sum())
        kernel, whole = SimKernel(SHAPE, CONFIGS), SimKernel(SHAPE, CONFIGS)
        table = profile_active(kernel, SHAPE, TRAIN, fitted_us, rounds=1, out=out, quiet=True)
        fresh = profile_active(whole, SHAPE, TRAIN, fitted_us, rounds=1, quiet=True)
        assert kept > 100 and kernel.launches == whole.launches - kept
        np.testing.assert_allclose(table.us, fresh.us, rtol=1e-5)
        assert not pathlib.Path(str(journal_path(out))).exists()

    def test_refused_configs(self) -> None:
        """They are NaN with their reason and cost no cell."""
        kernel = SimKernel(SHAPE, CONFIGS)
        kernel.supports = lambda config, shape: "no" if config["stages"] == 1 else None  # type: ignore[attr-defined]
        table = profile_active(kernel, SHAPE, TRAIN, fitted_us, rounds=1, quiet=True)
        assert len(table.reasons) == 16 and np.isnan(table.us[:, list(table.reasons)]).all()
        assert kernel.launches == table.notes["active"]["cells"]

    def test_budget_is_told(self, tmp_path: pathlib.Path) -> None:
        """The notes carry the sentence, and the journal stays for another run."""
        out = tmp_path / "t.npz"
        table = profile_active(SimKernel(SHAPE, CONFIGS), SHAPE, TRAIN, fitted_us, budget_s=0.02, out=out, quiet=True)
        assert "0.02 s allowed" in table.notes["gave_up"] and out.exists()
        assert pathlib.Path(str(journal_path(out))).exists()
