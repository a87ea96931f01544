"""Scripts are imported as they are when they run: with their folder on the path."""

import importlib
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
# The wheel is tested without benchmarks.
collect_ignore_glob = [] if FOLDER.exists() else ["test_*.py"]


@pytest.fixture
def script(monkeypatch):
    """A script by its name, as a module that finds its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module
