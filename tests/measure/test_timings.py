"""The timing table: its file, and what it refuses."""

import errno
import json
import pathlib

import attrs
import numpy as np
import pytest

from rampwrap.errors import TableError
from rampwrap.files import replacing
from rampwrap.measure.timings import Timings


def test_a_table_survives_its_file(tmp_path: pathlib.Path, sim_timings: Timings) -> None:
    timings = attrs.evolve(sim_timings, reasons={2: "out of shared memory"}, spread=np.full_like(sim_timings.us, 0.01))
    timings.save(tmp_path / "t.npz")
    loaded = Timings.load(tmp_path / "t.npz")
    np.testing.assert_allclose(loaded.us, timings.us, rtol=1e-6)
    np.testing.assert_array_equal(loaded.counts, timings.counts)
    for name in ("split", "label", "kernel", "kernel_version", "device", "shape", "configs", "grids", "reasons"):
        assert getattr(loaded, name) == getattr(timings, name), name
    assert loaded.spread is not None


def test_rows_by_split_and_label(sim_timings: Timings) -> None:
    timings = sim_timings
    held_out = timings.take(timings.rows("eval"))
    assert set(held_out.num_tokens) == {3, 12, 48, 96, 192, 512, 2048} and not held_out.is_uniform.any()
    with pytest.raises(TableError, match="no 'test' workloads"):
        timings.rows("test")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"us": np.zeros((61, 24))}, "not positive"),
        ({"us": np.ones((3, 24))}, "contradicts"),
        ({"label": ("zipf",) * 61}, "'zipf'"),
        ({"counts": np.full((61, 64), -1)}, "-1"),
        ({"counts": np.ones((61, 3), dtype=np.int64)}, "64 experts"),
        ({"split": ("train",)}, "split has 1 entries"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(
    change: dict[str, object], named: str, sim_timings: Timings
) -> None:
    with pytest.raises(TableError, match=named):
        attrs.evolve(sim_timings, **change)


def test_an_empty_table_is_refused(sim_timings: Timings) -> None:
    with pytest.raises(TableError, match="0 workloads"):
        sim_timings.take([])


def test_foreign_files_are_one_sentence(tmp_path: pathlib.Path, sim_timings: Timings) -> None:
    sim_timings.save(tmp_path / "good.npz")
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.savez(tmp_path / "newer.npz", meta=np.array(json.dumps({"schema": 99})))
    for name in ("missing.npz", "torn.npz", "text.npz", "other.npz", "newer.npz"):
        with pytest.raises(TableError, match=name):
            Timings.load(tmp_path / name)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "t.npz"
    target.write_bytes(b"old")

    with pytest.raises(TableError, match="free some space"), replacing(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(TableError, match="choose a folder"), replacing(tmp_path / "none" / "t.npz"):
        pass
