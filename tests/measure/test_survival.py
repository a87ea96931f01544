"""A profile survives its surroundings: too little memory, configs that end or hang the process, kills."""

import os
import pathlib
import random
import signal
import time
from typing import Any

import numpy as np
import pytest

from rampwrap.errors import TableError
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import profile
from rampwrap.measure.journal import journal_path, read_journal
from rampwrap.measure.timings import Timings
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SIM_CONFIGS, SimKernel

SHAPE = MoEShape(16, 2, 512, 256)
CONFIGS = SIM_CONFIGS[:6]
ROWS = workload_grid([1, 4, 16, 64, 256], [Routing.parse("uniform"), Routing.parse("zipf:1.2")])


class Odd(SimKernel):
    """Does something else first."""

    def before(self, index: int, tokens: int) -> None: ...

    def launch(self, config: Config, topk_ids: Any) -> float:
        self.before(self.configs.index(config), len(topk_ids))
        return super().launch(config, topk_ids)


def run(kernel: SimKernel, out: pathlib.Path | None = None, **options: Any) -> Timings:
    return profile(kernel, SHAPE, ROWS, configs=CONFIGS, out=out, quiet=True, rounds=2, **options)


def in_a_child(kernel: SimKernel, out: pathlib.Path, **options: Any) -> int:
    """Runs a profile in a process of its own; what it ended with."""
    child = os.fork()
    if not child:
        try:
            run(kernel, out, **options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class TestCells:
    def test_one_cell_costs_itself_alone(self, tmp_path: pathlib.Path) -> None:
        """The config stays on all other rows, the table says which cell and why, and another run measures it."""

        class Broken(Odd):
            def before(self, index: int, tokens: int) -> None:
                if index == 3 and tokens == 64:
                    raise ValueError("no such tile")

        out = tmp_path / "t.npz"
        table = run(Broken(SHAPE), out)
        assert np.argwhere(np.isnan(table.us)).tolist() == [[6, 3], [7, 3]] and not table.reasons
        assert {its["reason"] for its in table.notes["failed"]} == {"ValueError: no such tile"}
        again = run(Odd(SHAPE), out)
        assert np.isfinite(again.us).all() and again.notes["reused_cells"] == 58

    def test_bad_luck_is_tried_again(self) -> None:
        """A launch that fails once has its time all the same."""
        left = [1]

        class Unlucky(Odd):
            def before(self, index: int, tokens: int) -> None:
                if index == 1 and left[0]:
                    left[0] -= 1
                    raise RuntimeError("out of memory")

        table = run(Unlucky(SHAPE))
        np.testing.assert_allclose(table.us, run(Odd(SHAPE)).us)


class TestProcess:
    def test_a_config_that_ends_it(self, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Named by the second run, booked and passed over by the third, remembered by the table."""

        class Dies(Odd):
            def before(self, index: int, tokens: int) -> None:
                if index == 2:
                    os._exit(139)

        out = tmp_path / "t.npz"
        assert in_a_child(Dies(SHAPE), out) == 139
        assert in_a_child(Dies(SHAPE), out) == 139
        assert "block_m=16 block_n=128 stages=2" in capfd.readouterr().err
        table = run(Dies(SHAPE), out)
        assert list(table.reasons) == [2] and np.isfinite(np.delete(table.us, 2, axis=1)).all()
        assert list(run(Dies(SHAPE), out).reasons) == [2], "a finished table remembers it"
        assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]

    def test_a_config_that_hangs(self, tmp_path: pathlib.Path) -> None:
        """In Python it is interrupted, and the same run goes on without it."""

        class Hangs(Odd):
            def before(self, index: int, tokens: int) -> None:
                if index == 4:
                    time.sleep(60)

        table = run(Hangs(SHAPE), tmp_path / "t.npz", patience_s=0.5)
        assert list(table.reasons) == [4] and "did not return within 0.5 s" in table.reasons[4]
        assert np.isfinite(np.delete(table.us, 4, axis=1)).all()

    def test_a_hang_that_cannot_be_interrupted(
        self, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As of a kernel on the GPU: the process ends, and the next run goes on without it."""
        monkeypatch.setattr("rampwrap.measure.watchdog.GRACE_S", 0.2)

        class Stuck(Odd):
            def before(self, index: int, tokens: int) -> None:
                if index == 4:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    time.sleep(60)

        out = tmp_path / "t.npz"
        assert in_a_child(Stuck(SHAPE), out, patience_s=0.5) == 1
        assert "cannot be interrupted" in capfd.readouterr().err
        assert list(run(Stuck(SHAPE), out).reasons) == [4]


class TestPlace:
    def test_another_table_is_refused(self, tmp_path: pathlib.Path) -> None:
        """With the difference and the flag; with the flag it is overwritten. A file that is no table likewise."""
        out = tmp_path / "t.npz"
        run(Odd(SHAPE), out)
        other = MoEShape(16, 2, 512, 128)
        with pytest.raises(TableError, match=r"another profile \(shape.*--replace"):
            profile(Odd(other), other, ROWS, out=out, quiet=True)
        with pytest.raises(TableError, match="which is not asked for"):
            profile(Odd(SHAPE), SHAPE, ROWS[:3], configs=CONFIGS, out=out, quiet=True)
        assert profile(Odd(other), other, ROWS, out=out, quiet=True, replace=True).shape == other
        out.write_text("my diary")
        with pytest.raises(TableError, match="no readable timing table"):
            run(Odd(SHAPE), out)
        assert out.read_text() == "my diary" and [path.name for path in tmp_path.iterdir()] == ["t.npz"]

    def test_a_kernel_on_the_cpu(self) -> None:
        """One that returns a tensor is timed by the clock; one that returns nonsense is refused."""

        class Mine:
            name, configs = "mine", ({"ms": 1}, {"ms": 4})
            grid = SimKernel(SHAPE).grid

            def launch(self, config: Config, topk_ids: Any) -> Any:
                time.sleep(config["ms"] * 1e-3)
                return topk_ids

            def inputs(self, shape: MoEShape, topk_ids: Any, *, seed: int = 0) -> dict[str, Any]:
                return {"topk_ids": topk_ids}

        kernel: Any = Mine()
        kernel.grid = lambda config, shape: SimKernel(SHAPE).grid(CONFIGS[0], shape)
        table = profile(kernel, SHAPE, ROWS[:2], quiet=True, rounds=2)
        assert (table.us[:, 0] >= 1000).all() and (table.us[:, 1] >= 4000).all() and table.notes["timer"] == "host"


@pytest.mark.slow
def test_fifty_kills(tmp_path: pathlib.Path) -> None:
    """At random moments: nothing recorded is lost or measured again, and nothing is left over.

    A kill in the first two launches of a run counts as the config's second death if the last one fell into the same
    cell, so the moments begin behind them.
    """
    out, log, rng = tmp_path / "t.npz", tmp_path / "log", random.Random(0)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Slow(Odd):
        def launch(self, config: Config, topk_ids: Any) -> float:
            counts = "-".join(map(str, expert_counts(topk_ids, SHAPE.num_experts)))
            os.write(handle, f"{counts} {self.configs.index(config)}\n".encode())
            time.sleep(0.006)  # 2,388 cells take twice as long as fifty kills
            return super().launch(config, topk_ids)

    def seen() -> list[str]:
        return log.read_text().splitlines()

    kills = again = 0
    kept: set[str] = set()
    rows = workload_grid(range(1, 200), [Routing.parse("uniform"), Routing.parse("zipf:1.2")])
    rows = [row for number, row in enumerate(rows) if number < 398]
    options: dict[str, Any] = {"configs": CONFIGS, "out": out, "quiet": True, "rounds": 1}
    while kills < 50:
        log.write_text("")
        child = os.fork()
        if not child:
            profile(Slow(SHAPE), SHAPE, rows, **options)
            os._exit(0)
        while len(seen()) < 3 and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it was killed, and not done"
        kills += 1
        again += len(kept.intersection(seen()))
        try:
            found = read_journal(str(journal_path(out)))
        except TableError:
            continue
        now = {f"{'-'.join(map(str, counts))} {c}" for counts in found.counts.tolist() for c in range(len(CONFIGS))}
        assert kept <= now, "nothing is lost"
        kept = now
    log.write_text("")
    table = profile(Slow(SHAPE), SHAPE, rows, **options)
    again += len(kept.intersection(seen()))
    print(f"{kills} kills, {len(kept)} of {table.us.size} cells recorded before the last run, {again} measured twice")
    assert again == 0 and not table.reasons and np.isfinite(table.us).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "t.npz"]
