"""The profiler on a simulated kernel: what is measured, what survives, and what is never measured twice."""

import errno
import io
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from rampwrap import schema
from rampwrap.errors import ConfigError, DeviceFault, InputError, TableError
from rampwrap.kernel.device import find_device
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure import session
from rampwrap.measure.full import compiling_s, plan_profile, profile, roofline_us
from rampwrap.measure.graph_timer import default_timer
from rampwrap.measure.journal import journal_path, read_journal
from rampwrap.measure.session import Bench
from rampwrap.measure.timer import Measurement, ReturnTimer
from rampwrap.measure.timings import Timings
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, workload_grid
from rampwrap.testing.sim import SIM_CONFIGS, SimKernel

SHAPE = MoEShape(16, 2, 512, 256)
CONFIGS = SIM_CONFIGS[:6]
WORKLOADS = workload_grid([1, 16, 128], [Routing.parse("uniform"), Routing.parse("zipf:1.2")])


class Recording(SimKernel):
    """A SimKernel that notes what it launches, and may do something else instead."""

    def __init__(self, before: Callable[[int, int], None] | None = None, **options: Any) -> None:
        super().__init__(SHAPE, CONFIGS, **options)
        self.seen: list[tuple[tuple[int, ...], int]] = []
        self.before = before

    def launch(self, config: Config, topk_ids: Any) -> float:
        index = self.configs.index(config)
        if self.before is not None:
            self.before(len(self.seen), index)
        self.seen.append((tuple(expert_counts(topk_ids, SHAPE.num_experts).tolist()), index))
        return super().launch(config, topk_ids)

    @property
    def cells(self) -> set[tuple[tuple[int, ...], int]]:
        return set(self.seen)


def run(kernel: SimKernel, out: pathlib.Path | None = None, **options: Any) -> Timings:
    return profile(kernel, SHAPE, WORKLOADS, out=out, quiet=True, **options)


def stop_at(number: int, error: BaseException) -> Callable[[int, int], None]:
    def before(launches: int, index: int) -> None:
        if launches == number:
            raise error

    return before


class TestTable:
    def test_times_are_the_kernels_own(self, tmp_path: pathlib.Path) -> None:
        """Every cell holds the kernel's time; the file holds the same table and the journal is gone."""
        kernel, out = Recording(), tmp_path / "t.npz"
        table = run(kernel, out)
        for row in range(len(WORKLOADS)):
            for index, config in enumerate(CONFIGS):
                assert table.us[row, index] == pytest.approx(kernel.time_us(config, table.counts[row]))
        loaded = Timings.load(out)
        np.testing.assert_allclose(loaded.us, table.us, rtol=1e-6)
        assert loaded.label == tuple(w.label for w in WORKLOADS)
        assert loaded.notes["weight_bytes"] == SHAPE.weight_bytes and loaded.notes["timer"] == "returned"
        assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]

    def test_same_seed_same_table(self) -> None:
        """Order of measurement, noise and inputs are seeded."""
        first, second = run(Recording(noise=0.02)), run(Recording(noise=0.02))
        np.testing.assert_array_equal(first.us, second.us)
        assert first.spread is not None and first.spread.max() > 0

    def test_rounds_interleave(self) -> None:
        """No config is sampled twice before all others were sampled once."""
        kernel = Recording()
        profile(kernel, SHAPE, WORKLOADS[:1], rounds=3, quiet=True)
        first = [index for _, index in kernel.seen[: len(CONFIGS)]]
        assert sorted(first) == list(range(len(CONFIGS)))
        assert max(np.bincount([index for _, index in kernel.seen])) == 3

    def test_chosen_configs(self) -> None:
        """`configs` narrows the table to some of the kernel's."""
        assert run(Recording(), configs=CONFIGS[2:4]).configs == CONFIGS[2:4]

    def test_local_experts(self) -> None:
        """A rank that holds half of the experts counts only theirs."""
        shape = attrs.evolve(SHAPE, num_local_experts=8)
        table = profile(Recording(), shape, WORKLOADS, quiet=True)
        assert table.counts.shape == (len(WORKLOADS), 8)

    def test_progress_on_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A bar with the best config and its time; nothing on stdout, nothing at all when quiet."""
        profile(Recording(), SHAPE, WORKLOADS[:2])
        said = capsys.readouterr()
        assert "12/12" in said.err and "us with block_m=" in said.err and not said.out
        run(Recording())
        assert capsys.readouterr() == ("", "")

    def test_shifted_experts(self) -> None:
        """A timer that asks for rotations gets calls whose histograms are cyclic shifts of the workload's."""

        class Turning(ReturnTimer):
            def rotations(self, active_bytes: int) -> int:
                return 4

            def prepare(self, calls: Any) -> Any:
                for call in calls:
                    call()
                return super().prepare(calls)

        kernel = Recording()
        table = profile(kernel, SHAPE, WORKLOADS[1:2], timer=Turning(), quiet=True)
        shifts = {tuple(np.roll(table.counts[0], 4 * turn).tolist()) for turn in range(4)}
        assert {counts for counts, _ in kernel.seen} == shifts


class TestFailures:
    def test_a_raising_config_is_nan_with_its_reason(self, tmp_path: pathlib.Path) -> None:
        """It fails late, is tried no further, and all other cells are there."""

        def before(launches: int, index: int) -> None:
            if index == 2 and launches > 20:
                raise RuntimeError("out of resources\nlong dump")

        kernel = Recording(before)
        table = run(kernel, tmp_path / "t.npz")
        assert table.reasons == {2: "RuntimeError: out of resources"}
        assert np.isnan(table.us[:, 2]).all()
        assert np.isfinite(np.delete(table.us, 2, axis=1)).all()

    def test_refused_configs_are_never_launched(self) -> None:
        """`supports` is asked first."""
        kernel = Recording()
        kernel.supports = lambda config, shape: "too wide" if config["block_n"] == 128 else None  # type: ignore[attr-defined]
        table = run(kernel)
        refused = [index for index, config in enumerate(CONFIGS) if config["block_n"] == 128]
        assert table.reasons == dict.fromkeys(refused, "too wide")
        assert not {index for _, index in kernel.seen} & set(refused)

    def test_nothing_runs(self) -> None:
        """All refused, or all failing: an error that quotes a reason."""
        kernel = Recording()
        kernel.supports = lambda config, shape: "no"  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="refuses every config"):
            run(kernel)

        def before(launches: int, index: int) -> None:
            raise ValueError("bad tile")

        with pytest.raises(ConfigError, match="bad tile"):
            run(Recording(before))

    def test_want_of_a_gpu_is_said_unless_the_kernel_is_simulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No time at all may have that reason, besides the kernel's own."""

        def before(launches: int, index: int) -> None:
            raise ValueError("bad tile")

        monkeypatch.setattr(session, "no_gpu", lambda: "none here")
        kernel = Recording(before)
        with pytest.raises(ConfigError, match=r"^no config of kernel 'sim' can run .*bad tile"):
            run(kernel)
        del kernel.device
        with pytest.raises(ConfigError, match=r"^there is no GPU \(none here\), and no config of kernel 'sim' can run"):
            run(kernel)

    def test_a_lost_device_is_remembered(self, tmp_path: pathlib.Path) -> None:
        """The run ends with an error; the next goes on without the config that did it."""

        class Lost(ReturnTimer):
            def fault(self) -> str | None:
                return "CUDA error: an illegal memory access"

        def before(launches: int, index: int) -> None:
            if index == 3 and launches > 8:
                raise RuntimeError("CUDA error: an illegal memory access")

        out = tmp_path / "t.npz"
        with pytest.raises(DeviceFault, match="run the same command again"):
            run(Recording(before), out, timer=Lost())
        table = run(Recording(before), out)
        assert list(table.reasons) == [3]

    def test_precompile(self) -> None:
        """A kernel that can compile many configs at once is asked to, once for each; its errors are left to `launch`."""
        kernel, asked = Recording(), []

        def precompile(configs: Any, **arguments: Any) -> None:
            asked.extend(configs)
            assert list(arguments) == ["topk_ids"]
            raise RuntimeError("no compiler")

        kernel.precompile = precompile  # type: ignore[attr-defined]
        assert not run(kernel).reasons and asked == list(CONFIGS)

    @pytest.mark.parametrize(
        ("workloads", "options", "message"),
        [
            ([], {}, "no workloads"),
            ([attrs.evolve(WORKLOADS[0], num_tokens=0)], {}, "0 tokens"),
            (WORKLOADS, {"rounds": 0}, "rounds is 0"),
        ],
    )
    def test_bad_requests(self, workloads: Any, options: Any, message: str) -> None:
        """One sentence each."""
        with pytest.raises(InputError, match=message):
            profile(Recording(), SHAPE, workloads, quiet=True, **options)


class TestResume:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
    def test_after_an_interruption(self, tmp_path: pathlib.Path, error: BaseException) -> None:
        """Finished workloads are read back; the journal reads as a table; the result is as if nothing happened."""
        out = tmp_path / "t.npz"
        kernel = Recording(stop_at(40, error))
        with pytest.raises(type(error)):
            run(kernel, out)
        partial = read_journal(str(journal_path(out)))
        kept = {(tuple(row.tolist()), c) for row in partial.counts for c in range(len(CONFIGS))}
        assert 0 < len(partial.us) < len(WORKLOADS) and np.isfinite(partial.us).all()
        elapsed = partial.notes["elapsed_s"]
        assert partial.notes["unfinished"] is True and isinstance(elapsed, float) and elapsed == round(elapsed, 1)
        again = Recording()
        table = run(again, out)
        assert not kept & again.cells
        np.testing.assert_allclose(table.us, run(Recording()).us, rtol=1e-5)
        assert not pathlib.Path(str(journal_path(out))).exists()

    def test_ctrl_c_says_what_is_kept(self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One sentence on stderr."""
        with pytest.raises(KeyboardInterrupt):
            profile(Recording(stop_at(40, KeyboardInterrupt())), SHAPE, WORKLOADS, out=tmp_path / "t.npz")
        assert "of 6 workloads are kept in" in capsys.readouterr().err

    def test_after_sigkill(self, tmp_path: pathlib.Path) -> None:
        """A process killed in the middle of a launch loses no finished workload."""
        out = tmp_path / "t.npz"
        script = f"""
            import os, signal, importlib.util
            spec = importlib.util.spec_from_file_location("t", {str(pathlib.Path(__file__))!r})
            t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
            def before(launches, index):
                if launches == 50:
                    os.kill(os.getpid(), signal.SIGKILL)
            t.run(t.Recording(before), {str(out)!r})
        """
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not out.exists()
        kept = len(read_journal(str(journal_path(out))).us)
        kernel = Recording()
        run(kernel, out)
        assert kept > 0 and len(kernel.cells) == (len(WORKLOADS) - kept) * len(CONFIGS)

    def test_torn_last_line(self, tmp_path: pathlib.Path) -> None:
        """What a kill left half written is measured again, what stands before it is not."""
        out = tmp_path / "t.npz"
        with pytest.raises(KeyboardInterrupt):
            run(Recording(stop_at(60, KeyboardInterrupt())), out)
        journal = pathlib.Path(str(journal_path(out)))
        lines = journal.read_bytes().splitlines(keepends=True)
        first, second = [at for at, line in enumerate(lines) if line.startswith(b'{"label"')][:2]
        journal.write_bytes(b"".join(lines[: first + 1]) + lines[second][:30])
        kernel = Recording()
        run(kernel, out)
        assert len(kernel.cells) == (len(WORKLOADS) - 1) * len(CONFIGS)

    def test_more_workloads_go_on(self, tmp_path: pathlib.Path) -> None:
        """A journal serves a longer list as well."""
        out = tmp_path / "t.npz"
        with pytest.raises(KeyboardInterrupt):
            run(Recording(stop_at(40, KeyboardInterrupt())), out)
        longer = [*WORKLOADS, *workload_grid([64], [Routing.parse("uniform")])]
        assert len(profile(Recording(), SHAPE, longer, out=out, quiet=True).us) == len(longer)

    @pytest.mark.parametrize(
        ("kernel", "shape", "options", "message"),
        [
            (SimKernel(SHAPE, CONFIGS[:3]), SHAPE, {}, "number of configs 6 instead of 3"),
            (SimKernel(SHAPE, CONFIGS[::-1]), SHAPE, {}, "config 0"),
            (SimKernel(SHAPE, CONFIGS), attrs.evolve(SHAPE, dtype="fp8"), {}, "shape"),
            (SimKernel(SHAPE, CONFIGS), SHAPE, {"device": find_device("h200"), "timer": ReturnTimer()}, "device"),
        ],
    )
    def test_another_profiles_journal(
        self, tmp_path: pathlib.Path, kernel: SimKernel, shape: MoEShape, options: Any, message: str
    ) -> None:
        """Refused with the difference and the fix, and left as it is."""
        out = tmp_path / "t.npz"
        with pytest.raises(KeyboardInterrupt):
            run(Recording(stop_at(40, KeyboardInterrupt())), out)
        before = pathlib.Path(str(journal_path(out))).read_bytes()
        with pytest.raises(TableError, match=f"{message}.*delete it"):
            profile(kernel, shape, WORKLOADS, out=out, quiet=True, **options)
        assert pathlib.Path(str(journal_path(out))).read_bytes() == before

    def test_foreign_and_damaged_files(self, tmp_path: pathlib.Path) -> None:
        """Neither is overwritten."""
        out = tmp_path / "t.npz"
        journal = pathlib.Path(str(journal_path(out)))
        journal.write_text("my diary\n")
        with pytest.raises(TableError, match="not a profile journal"):
            run(Recording(), out)
        journal.unlink()
        with pytest.raises(KeyboardInterrupt):
            run(Recording(stop_at(40, KeyboardInterrupt())), out)
        first, *lines = journal.read_text().splitlines()
        raw = json.loads(first)
        del raw["checksum"]
        journal.write_text("\n".join([json.dumps(schema.seal(raw | {"journal": raw["journal"] + 1})), *lines]) + "\n")
        with pytest.raises(TableError, match="it is none of schema"):
            run(Recording(), out)
        journal.write_text("\n".join([first, *lines]) + "\n")
        header, *rest = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join([header, '{"label": 3}\n', *rest]))
        with pytest.raises(TableError, match="damaged in line 2"):
            run(Recording(), out)
        with pytest.raises(TableError, match="cannot be read"):
            read_journal(tmp_path / "none")

    def test_one_writer_at_a_time(self, tmp_path: pathlib.Path) -> None:
        """A second profile into the same file is refused."""
        out = tmp_path / "t.npz"
        with Bench(Recording(), SHAPE, WORKLOADS, out=out, quiet=True), pytest.raises(TableError, match="in use"):
            run(Recording(), out)


class TestDisk:
    def test_full_while_measuring(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A half-written record is undone; what was recorded before is readable, and the next run goes on."""
        out = tmp_path / "t.npz"
        real = pathlib.Path.open

        class Full(io.FileIO):
            room = 3600

            def write(self, data: Any) -> int:
                part = bytes(data)[: max(self.room, 0)]
                self.room -= len(data)
                if not part:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(part)

        def opened(path: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return Full(path, "ab") if mode == "ab" else real(path, mode, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "open", opened)
            with pytest.raises(TableError, match=r"No space left on device.*free some space"):
                run(Recording(), out)
        journal = pathlib.Path(str(journal_path(out)))
        assert all(json.loads(line) for line in journal.read_text().splitlines())
        kept = len(read_journal(journal).us)
        kernel = Recording()
        run(kernel, out)
        assert kept > 0 and len(kernel.cells) == (len(WORKLOADS) - kept) * len(CONFIGS)

    def test_full_while_saving(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The journal stays, and the next run only saves."""
        out = tmp_path / "t.npz"

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(np, "savez_compressed", full)
            with pytest.raises((TableError, OSError)):
                run(Recording(), out)
        kernel = Recording()
        run(kernel, out)
        assert not kernel.seen and out.exists()

    def test_no_such_folder(self, tmp_path: pathlib.Path) -> None:
        """Said before anything is measured."""
        kernel = Recording()
        with pytest.raises(TableError, match="cannot be written"):
            run(kernel, tmp_path / "none" / "t.npz")
        assert not kernel.seen


class TestPlan:
    def test_dry_run_launches_nothing(self) -> None:
        """It counts cells, refused configs and bytes."""
        kernel = Recording()
        kernel.supports = lambda config, shape: "no" if config["block_m"] != 16 else None  # type: ignore[attr-defined]
        kernel.configs = SIM_CONFIGS[:8]
        plan = plan_profile(kernel, SHAPE, WORKLOADS)
        assert (plan.workloads, plan.configs, plan.cells) == (6, 8, 36)
        assert plan.weight_bytes == SHAPE.weight_bytes and not kernel.seen
        assert "6 workloads x 8 configs = 36 cells (2 configs refused)" in str(plan)
        real = plan_profile(kernel, SHAPE, WORKLOADS, device=find_device("h200")).seconds
        assert plan.seconds is not None and real is not None and 0 < plan.seconds < real

    def test_compilations_count_as_the_kernel_makes_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One after the other, in as many processes as there are cores, or not at all where a library has them."""
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        kernel: Any = Recording()
        assert compiling_s(kernel, CONFIGS) == 1.5 * len(CONFIGS)
        many = [{"i": i} for i in range(80)]
        kernel.precompile = lambda configs, **_: [None] * len(configs)
        assert compiling_s(kernel, many) == 10 + 2.4 * 10 and compiling_s(kernel, many[:1]) == 1.5
        kernel.must_compile = lambda configs: len(configs) > 2
        assert compiling_s(kernel, many[:2]) == 0 and compiling_s(kernel, many) == 34
        asked = {"device": find_device("h200"), "configs": CONFIGS}
        cold, warm = (plan_profile(kernel, SHAPE, WORKLOADS, compiled=its, **asked).seconds for its in (False, True))
        assert cold is not None and warm is not None and cold - warm == pytest.approx(compiling_s(kernel, CONFIGS))

    def test_roofline(self) -> None:
        """OLMoE in bf16 on an H200: 805 MB at 4.3 TB/s for one token an expert; compute for many."""
        shape, device = MoEShape(64, 8, 2048, 1024), find_device("h200")
        few, many = roofline_us(device, shape, [[1] * 64, [4096] * 64])
        assert few == pytest.approx(187, abs=1) and many == pytest.approx(4176, abs=5)

    def test_budget(self, tmp_path: pathlib.Path) -> None:
        """No time: one workload is measured all the same, the notes say what is missing, and another run goes on."""
        out = tmp_path / "t.npz"
        table = run(Recording(), out, budget_s=1e-9)
        assert len(table.us) == 1 and "5 of 6 workloads" in table.notes["gave_up"]
        kernel = Recording()
        assert len(run(kernel, out).us) == 6
        assert len(kernel.cells) == 5 * len(CONFIGS)


class TestTimers:
    def test_measurement(self) -> None:
        """Median and (p80 - p20) / median."""
        found = Measurement.of([1.0, 2.0, 3.0, 4.0, 100.0])
        assert found.us == 3.0 and 0 < found.spread < 10

    def test_return_timer(self) -> None:
        """Believes positive numbers only."""
        assert ReturnTimer().time(lambda: 5.0) == Measurement(5.0, 0.0)
        for value in (None, 0.0, float("nan"), float("inf")):
            with pytest.raises(InputError, match="positive microseconds"):
                ReturnTimer().time(lambda value=value: value)

    def test_default(self) -> None:
        """The simulated device needs no GPU."""
        assert isinstance(default_timer(SimKernel(SHAPE).device, SHAPE), ReturnTimer)


class TestDrift:
    """Times of one workload that were taken at different clocks."""

    def test_a_later_visit_is_put_on_the_scale_of_the_first(self) -> None:
        """The GPU got 10 % faster between two visits; the table does not show it."""

        class Clocks(ReturnTimer):
            drifts = True

        class Faster(SimKernel):
            pace = 1.0

            def launch(self, config: Config, topk_ids: Any) -> float:
                return super().launch(config, topk_ids) * self.pace

        kernel = Faster(SHAPE, CONFIGS)
        with Bench(kernel, SHAPE, WORKLOADS[:1], timer=Clocks(), quiet=True) as bench:
            first = bench.measure(0, [0, 1, 2])
            kernel.pace = 0.9
            later = bench.measure(0, [3, 1])
        true = [kernel.time_us(CONFIGS[config], bench.counts[0]) for config in (0, 1, 2, 3)]
        np.testing.assert_allclose([*first, later[0]], true, rtol=1e-6)
        assert later[1] == first[1]
