"""Kernels by name: those of the catalogue, portfolios of them, and a user's own with what goes wrong in it."""

import pathlib
import sys

import pytest

from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel import catalog
from rampwrap.kernel.catalog import GPU_ONLY, KERNELS, make_kernel, missing_gpu
from rampwrap.kernel.shape import MoEShape
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(8, 2, 512, 256)
OWN = """
from rampwrap.errors import ConfigError
from rampwrap.testing.sim import SimKernel

class Bare:
    name, grid = "bare", None

def refuses(shape):
    raise ConfigError("not this one.")

def fails(shape):
    raise ValueError("bad\\n  tile.")

def silent(shape):
    raise ValueError

def bare(shape):
    return Bare()

class Plain(Bare):
    configs, launch = (), None

def plain():
    raise ValueError("no size")
"""


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The current folder, with a module `mine` in it, and nothing of it left behind."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "torn.py").write_text("x = 1\nx = (\n")
    (tmp_path / "needy.py").write_text("import none_such.part\n")
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "inner.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    for name in ("mine", "torn", "needy", "kit", "kit.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("mine", "torn", "needy", "kit", "kit.inner"):
        sys.modules.pop(name, None)


def test_by_name() -> None:
    assert isinstance(make_kernel("sim", SHAPE), SimKernel) and make_kernel("sim", SHAPE).shape == SHAPE
    assert set(KERNELS) - GPU_ONLY == {"sim", "torch_grouped_mm"}
    with pytest.raises(InputError, match=r"kernel 'sin' is unknown; use one of triton_fused_moe, .*, portfolio:a\+b"):
        make_kernel("sin", SHAPE)
    for name in ("module:", "module.name"):
        with pytest.raises(InputError, match="is unknown"):
            make_kernel(name, SHAPE)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "theirs", "none_such:Kernel")
    with pytest.raises(
        InputError, match=r"kernel 'theirs' needs a package that is not here \(No module named 'none_such'"
    ):
        make_kernel("theirs", SHAPE)


def test_which_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours that do, also as a member; nobody knows of a user's own."""
    monkeypatch.setattr(catalog, "no_gpu", lambda: "none here")
    for name in (*GPU_ONLY, "portfolio:sim+cute_moe"):
        assert missing_gpu(name) == "none here", name
    for name in ("sim", "torch_grouped_mm", "mine:Kernel", "portfolio:sim+torch_grouped_mm"):
        assert missing_gpu(name) is None, name


def test_ones_own_in_this_folder_or_in_a_package(here: pathlib.Path) -> None:
    """The folder comes first on the path, once, and only where it holds the module."""
    assert make_kernel("rampwrap.testing.sim:SimKernel", SHAPE).name == "sim"
    assert str(here) not in sys.path
    for name in ("mine:SimKernel", "kit.inner:SimKernel", "mine:SimKernel"):
        assert make_kernel(name, SHAPE).shape == SHAPE
    assert sys.path[0] == str(here) and sys.path.count(str(here)) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine:SimKernels", r"module mine has no SimKernels; check the spelling\."),
        ("mine:fails", r"fails\(shape\) raises ValueError: bad tile \(.*mine\.py, line 12\)\."),
        ("mine:silent", r"silent\(shape\) raises ValueError: no message \(.*mine\.py, line 15\)\."),
        ("mine:bare", r"bare\(shape\) gives no kernel, it lacks configs, launch\."),
        ("torn:Kernel", r"importing torn raises SyntaxError: .*'\(' was never closed \(.*torn\.py, line 2\)\."),
        ("needy:Kernel", r"importing needy raises ModuleNotFoundError: No module named 'none_such' \(.*line 1\)\."),
        ("mine.py:SimKernel", r"no module mine\.py is installed or in .*; write mine:SimKernel, or run where it is\."),
        ("nowhere:Kernel", r"no module nowhere is installed or in .*; check the name, or run where it is\."),
        ("nowhere.deep:Kernel", r"no module nowhere is installed or in .*; check the name, or run where it is\."),
    ],
)
def test_what_goes_wrong_in_it_is_said_as_what_it_is(here: pathlib.Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=f"kernel '{name}': {said}"):
        make_kernel(name, SHAPE)


def test_one_that_takes_no_shape(here: pathlib.Path) -> None:
    """As the class in the guide "Wrap your own kernel", which has no `__init__`."""
    assert type(make_kernel("mine:Plain", SHAPE)).__name__ == "Plain"
    with pytest.raises(InputError, match=r"plain\(\) raises ValueError: no size \(.*mine\.py"):
        make_kernel("mine:plain", SHAPE)


def test_its_own_refusal_comes_through(here: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"^not this one\.$"):
        make_kernel("mine:refuses", SHAPE)
