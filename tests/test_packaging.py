"""The wheel's package list, and what must never become importable."""

import importlib.util
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_package_list_is_the_tree() -> None:
    if not (ROOT / "rampwrap").is_dir():
        pytest.skip("only the source tree can be compared with the package list")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"rampwrap"}
    for top in ("rampwrap", "adapters", "kernels"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).parts[:-1]
            if "__pycache__" not in parts and not (top == "rampwrap" and parts[1:2] in (("adapters",), ("kernels",))):
                name = parts if top == "rampwrap" else ("rampwrap", *parts)
                found.update(".".join(name[:depth]) for depth in range(1, len(name) + 1))
    assert sorted(settings["packages"]) == sorted(found)


def test_top_level_names_of_others_stay_free() -> None:
    for name in ("adapters", "kernels"):
        spec = importlib.util.find_spec(name)
        assert spec is None or spec.origin is None or "rampwrap" not in spec.origin


def test_importing_rampwrap_needs_neither_torch_nor_triton() -> None:
    code = "import sys, rampwrap; print([n for n in ('torch', 'triton', 'cutlass', 'matplotlib') if n in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
