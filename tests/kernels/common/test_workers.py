"""Children of a script do not import it, for as long as anyone starts some."""

import sys
import types

import pytest

from rampwrap.kernels.common.workers import main_hidden


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The script that this process runs."""
    main = types.ModuleType("__main__")
    main.__file__, main.__spec__ = "script.py", None
    monkeypatch.setitem(sys.modules, "__main__", main)
    return main


def test_the_script_is_hidden_and_comes_back(main: types.ModuleType) -> None:
    main.__spec__ = "how it was found"
    for _ in range(2):
        with main_hidden():
            assert main.__file__ is None and main.__spec__ is None
        assert (main.__file__, main.__spec__) == ("script.py", "how it was found")


def test_users_overlap_and_the_last_one_shows_it_again(main: types.ModuleType) -> None:
    """In whatever order they leave."""
    first, second = main_hidden(), main_hidden()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert main.__file__ is None
    second.__exit__(None, None, None)
    assert main.__file__ == "script.py"
    with main_hidden():
        assert main.__file__ is None
    assert main.__file__ == "script.py"


def test_an_error_shows_it_again_and_what_was_not_there_stays_away(main: types.ModuleType) -> None:
    """A script from standard input has no file."""
    del main.__file__
    with pytest.raises(ValueError, match="no"), main_hidden():
        raise ValueError("no")
    assert not hasattr(main, "__file__") and main.__spec__ is None
    main.__file__ = "now.py"
    with main_hidden():
        assert main.__file__ is None
    assert main.__file__ == "now.py"
