"""The library is a house of small rooms: how long its modules are."""

import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LINES = {
    str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
    for top in ("rampwrap", "adapters", "kernels")
    for file in (ROOT / top).rglob("*.py")
    # Those two are links in the tree.
    if file.relative_to(ROOT).parts[:2] not in (("rampwrap", "adapters"), ("rampwrap", "kernels"))
}
# A wheel under test has no source tree beside the tests.
pytestmark = pytest.mark.skipif("rampwrap/schema.py" not in LINES, reason="only the source tree has modules to count")


def test_no_module_is_long() -> None:
    assert {name: lines for name, lines in LINES.items() if lines > 400} == {}


def test_most_modules_are_short() -> None:
    """Those that only say what a folder is do not count."""
    assert statistics.median(lines for name, lines in LINES.items() if not name.endswith("__init__.py")) < 200
