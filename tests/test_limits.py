"""Limits: the largest and the least that are taken, and what lies one beyond, refused in a sentence."""

import io
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from rampwrap import schema
from rampwrap.errors import ConfigError, InputError, RampwrapError, TableError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.archive import Array, read_arrays
from rampwrap.measure.records import Begun, Header, Measured
from rampwrap.measure.timings import Timings
from rampwrap.policy.graph_lists import Shortlist
from rampwrap.policy.policies import Bucket
from rampwrap.routing.drift import Profiled

SIZE, LARGE = 1 << 24, 1 << 53


def shape(**its: Any) -> MoEShape:
    given = {"num_experts": 1 << 14, "top_k": 1, "hidden_size": 64, "intermediate_size": 64} | its
    return MoEShape(**given)


def grid(**its: Any) -> CtaGrid:
    return CtaGrid(**{"block_m": 16, "ctas_per_block": 4} | its)


def measured(us: float = 1.0, spread: float = 0.0, seconds: float = 0.0) -> Measured:
    return Measured("M=1 uniform", "train", (1,), ((0, us, spread),), seconds)


def shortlist(**its: Any) -> Shortlist:
    given = {"first": 1, "num_tokens": 1, "candidates": (0,), "static": 0, "expected_us": None, "static_us": None}
    return Shortlist(**given | {"why": ""} | its)


RANGES: list[tuple[Callable[..., Any], str, float, float, type[RampwrapError]]] = [
    *((shape, name, 1, 1 << 14, InputError) for name in ("num_experts", "top_k", "num_local_experts")),
    *((shape, name, 1, SIZE, InputError) for name in ("hidden_size", "intermediate_size")),
    *((grid, name, 1, SIZE, ConfigError) for name in ("block_m", "ctas_per_block", "split_k")),
    (grid, "ctas_per_sm", 1, 1024, ConfigError),
    (measured, "us", 1e-3, 1e9, TableError),
    (measured, "spread", 0.0, 6e4, TableError),
    (measured, "seconds", 0.0, 1e9, TableError),
    (lambda deaths: Begun(0, "M=1 uniform", "train", deaths), "deaths", 0, 1000, TableError),
    (lambda num_tokens: Bucket(num_tokens, (0,)), "num_tokens", 0, LARGE, InputError),
    (lambda num_tokens: Profiled(num_tokens, (1.0, 1.0), (1.0, 1.0)), "num_tokens", 1, LARGE, InputError),
    *((shortlist, name, 0, LARGE, InputError) for name in ("first", "num_tokens")),
]


@pytest.mark.parametrize(("make", "name", "least", "most", "error"), RANGES)
def test_numbers(make: Callable[..., Any], name: str, least: float, most: float, error: type[RampwrapError]) -> None:
    whole = isinstance(least, int)
    beyond = (least - 1, most + 1) if whole else (least - 1e-4, most * 1.001)
    for value in (least, most):
        make(**{name: value})
    for wrong in (*beyond, float("nan"), float("inf"), -1):
        with pytest.raises(error):
            make(**{name: wrong})
    if whole:
        for wrong in (
            (True, least + 0.5, "1", None) if name not in ("ctas_per_sm", "num_local_experts") else (True, 1.5)
        ):
            with pytest.raises((error, TypeError)):
                make(**{name: wrong})


def test_what_is_left_out() -> None:
    """Defaults of what every file and every caller may leave out."""
    assert (shape().dtype, shape().num_local_experts, shape(num_experts=8).num_local_experts) == ("bf16", 1 << 14, 8)
    assert attrs.asdict(grid()) == {
        **{"block_m": 16, "ctas_per_block": 4, "launches": (4,)},
        **{"ctas_per_sm": None, "split_k": 1, "persistent": False},
    }
    assert Begun(0, "M=1", "train").deaths == 0 and measured().seconds == 0.0 and Bucket(1, (0,)).why == ""


def test_a_shape_agrees_with_itself() -> None:
    """And knows its bytes: three matrices of hidden x intermediate an expert here."""
    for wrong in ({"num_experts": 4, "top_k": 5}, {"num_experts": 4, "num_local_experts": 5}, {"dtype": "fp32"}):
        with pytest.raises(InputError):
            shape(**wrong)
    assert shape(num_experts=4, top_k=4, num_local_experts=4).top_k == 4
    assert (
        shape(num_experts=4, num_local_experts=2, hidden_size=8, intermediate_size=16).weight_bytes
        == 3 * 2 * 8 * 16 * 2
    )
    assert shape(num_experts=2, hidden_size=8, intermediate_size=16, dtype="fp8").weight_bytes == 3 * 2 * 8 * 16


@pytest.mark.parametrize("launches", [(), (4, 0), (5, -1), (2, 1), (3, 2)])
def test_launches_add_up(launches: tuple[int, ...]) -> None:
    assert grid(launches=[3, 1]).launches == (3, 1)
    with pytest.raises(ConfigError, match="add up to ctas_per_block=4"):
        grid(launches=launches)


def test_a_record_is_of_its_profile(sim_timings: Timings) -> None:
    """As many experts as the layer has here, counts that a table can hold, and configs that there are."""
    t = sim_timings.take([0])
    header = Header(t.kernel, t.kernel_version, t.device, shape(num_experts=2), t.configs, t.grids, "returned")

    def record(counts: tuple[int, ...], config: int = 0) -> Measured:
        return Measured("M=1 uniform", "train", counts, ((config, 1.0, 0.0),))

    record((0, (1 << 31) - 1), len(t.configs) - 1).check(header)
    for wrong in (
        record((1,)),
        record((1, 1, 1)),
        record((-1, 1)),
        record((1 << 31, 1)),
        record((1, 1), len(t.configs)),
        record((1, 1), -1),
    ):
        with pytest.raises(TableError):
            wrong.check(header)


class TestArchive:
    """Arrays of files: 64 MB of file, as much unpacked, and 10,000 characters of header."""

    ANY = {"a": Array("f", 1), "b": Array("iu", 2, optional=True)}

    def write(self, path: pathlib.Path, **members: bytes) -> pathlib.Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)
        return path

    def npy(self, array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
        out = io.BytesIO()
        np.lib.format.write_array(out, array, version)
        return out.getvalue()

    def test_reads(self, tmp_path: pathlib.Path) -> None:
        a, b = np.arange(3.0), np.arange(6).reshape(2, 3)
        for version in ((1, 0), (2, 0)):
            both = self.write(tmp_path / "t.npz", a=self.npy(a, version), b=self.npy(np.asfortranarray(b), version))
            found = read_arrays(both, self.ANY)
            assert list(found) == ["a", "b"] and (found["a"] == a).all() and (found["b"] == b).all()
        assert list(read_arrays(self.write(tmp_path / "t.npz", a=self.npy(a)), self.ANY)) == ["a"]

    @pytest.mark.parametrize(
        ("members", "said"),
        [
            ({"b": np.ones((1, 1), dtype=int)}, "it lacks the array a"),
            ({"a": np.ones(2), "c": np.ones(2)}, "it holds 'c.npy'; not a timing table"),
            ({"a": np.ones((2, 2))}, "a is float64 of 2 dimensions; wanted is kind f of 1"),
            ({"a": np.ones(2, dtype=int)}, "a is int64 of 1 dimensions"),
            ({"a": np.ones(0)}, "has 0 bytes"),
            ({"a": np.array([None])}, "a is object"),
        ],
    )
    def test_refuses(self, tmp_path: pathlib.Path, members: dict[str, np.ndarray], said: str) -> None:
        np.savez(tmp_path / "t.npz", **members)
        with pytest.raises(ValueError, match=said):
            read_arrays(tmp_path / "t.npz", self.ANY)

    def test_damage(self, tmp_path: pathlib.Path) -> None:
        whole, path = self.npy(np.arange(3.0)), tmp_path / "t.npz"
        for data, said in (
            (whole[:-1], "has 23 bytes"),
            (whole + b"x", "has 25 bytes"),
            (self.npy(np.arange(3.0), (3, 0)), r"unknown format \(3, 0\)"),
            (b"\x93NUMPY", "damaged|EOF|magic"),
        ):
            with pytest.raises(ValueError, match=said):
                read_arrays(self.write(path, a=data), self.ANY)
        for text, said in ((b" {}", "it is JSON"), (b"plain", "no .npz archive"), (b"PK\3\4", "damaged")):
            path.write_bytes(text)
            with pytest.raises(ValueError, match=said):
                read_arrays(path, self.ANY)
        with pytest.raises(ValueError, match="No such file"):
            read_arrays(tmp_path / "none", self.ANY)

    def test_sizes(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "t.npz"
        for size, said in ((1 << 26, "no .npz archive"), ((1 << 26) + 1, "more than 64 MB")):
            with path.open("wb") as stream:
                stream.truncate(size)
            with pytest.raises(ValueError, match=said):
                read_arrays(path, self.ANY)
        most = np.zeros(((1 << 26) - 128) // 8)
        assert len(self.npy(most)) == 1 << 26
        assert len(read_arrays(self.write(path, a=self.npy(most)), self.ANY)["a"]) == len(most)
        with pytest.raises(ValueError, match="arrays have more than 64 MB"):
            read_arrays(self.write(path, a=self.npy(most), b=self.npy(np.ones((1, 1), dtype=int))), self.ANY)

    def test_headers(self, tmp_path: pathlib.Path) -> None:
        """Padded with spaces, which say nothing."""
        for length, fits in ((10_000, True), (10_001, False)):
            text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }"
            data = b"\x93NUMPY\1\0" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n" + bytes(8)
            path = self.write(tmp_path / "t.npz", a=data)
            if fits:
                assert read_arrays(path, self.ANY)["a"].tolist() == [0.0]
            else:
                with pytest.raises(ValueError, match=r"(?i)header"):
                    read_arrays(path, self.ANY)


def test_depth_and_length_of_json() -> None:
    """16 lists inside each other, 16 MB."""
    assert schema.parse(b"[" * 16 + b"]" * 16) is not None
    for data in (b"[" * 17 + b"]" * 17, b" " * (1 << 24) + b"1"):
        with pytest.raises(ValueError):
            schema.parse(data)
    assert schema.parse(b" " * ((1 << 24) - 1) + b"1") == 1
