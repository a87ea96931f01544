"""The documentation says what is so: its names, its commands and options, its code and what that prints."""

import contextlib
import doctest
import io
import pathlib
import re
import shlex
from typing import Any

import pytest

import rampwrap
from rampwrap.cli.main import PLACES, main

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES if page.exists()]
FENCE = re.compile(r"^(<!-- run -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not beside the tests")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def said_by(arguments: list[str]) -> str:
    """What a command prints, 0 or --help being how it ends."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code  # type: ignore[assignment]
    assert not status, (arguments, out.getvalue())
    return out.getvalue()


def commands(block: str) -> list[tuple[list[str], str]]:
    """Each ``$ rampwrap ...`` of a console block, and what is shown below it."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    split = [part.partition("\n") for part in parts]
    lines = [(shlex.split(line, comments=True), shown) for line, _, shown in split]
    return [(words[1:], shown) for words, shown in lines if words and words[0] == "rampwrap"]


def test_the_api_page_names_what_is_public() -> None:
    told = re.findall(r"^::: rampwrap\.(\w+)$", read("docs/api.md"), re.MULTILINE)
    assert sorted(told) == sorted(name for name in rampwrap.__all__ if name != "__version__")


def test_every_command_has_its_help_on_the_page() -> None:
    listed = re.findall(r"^\{\{ help (.*?) \}\}$", read("docs/cli.md"), re.MULTILINE)
    assert sorted(listed) == sorted(PLACES)
    for command in PLACES:
        assert command in said_by(["--help"])


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of each command, as its help names them."""
    return {
        command: {*re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", said_by([command, "--help"]))} for command in PLACES
    }


@pytest.mark.parametrize("name", NAMES)
def test_commands_shown_have_the_options_shown(name: str, options: dict[str, set[str]]) -> None:
    for _, language, block in FENCE.findall(read(name)):
        for words, _ in commands(block) if language == "console" else []:
            assert words[0] in options, f"{name} shows rampwrap {words[0]}"
            shown = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-zA-Z]", word)}
            assert shown <= options[words[0]], f"{name}: rampwrap {words[0]} has no {shown - options[words[0]]}"


@pytest.mark.parametrize("name", NAMES)
def test_options_named_in_the_text_exist(name: str, options: dict[str, set[str]]) -> None:
    every = set().union(*options.values())
    others = {"--expert-distribution-recorder-mode", "--init-expert-location"}  # SGLang's
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", read(name)))
    text = "\n".join(span for span in spans if not re.match(r"python |pytest |make ", span))
    if name.startswith("docs/figures"):  # options of benchmarks stand there too
        text = "\n".join(span for span in spans if span.startswith("rampwrap "))
    assert {*re.findall(r"(?<![\w-])(--[a-z][\w-]+)", text)} - others <= every


@pytest.mark.parametrize("name", [name for name in NAMES if "<!-- run -->" in read(name)])
def test_blocks_marked_as_runnable_run(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks of a page share one scope; commands print what is shown, where ``...`` stands for anything."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "docs"}
    same, flags = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for marked, language, block in FENCE.findall(read(name)):
        if marked and language == "console":
            for arguments, shown in commands(block):
                said = said_by(arguments)
                assert same.check_output(shown, said, flags), f"{name}: rampwrap {' '.join(arguments)} says\n{said}"
        elif marked and language == "python":
            exec(compile(block, name, "exec"), scope)


@pytest.mark.parametrize("name", NAMES)
def test_sessions_shown_are_what_python_answers(name: str) -> None:
    for _, language, block in FENCE.findall(read(name)):
        if language in ("python", "pycon") and block.startswith(">>>"):
            session = doctest.DocTestParser().get_doctest(block, {}, name, name, 0)
            assert doctest.DocTestRunner(verbose=False).run(session).failed == 0


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_the_pages_lead_somewhere(name: str) -> None:
    """Those between the pages are checked by ``mkdocs build --strict``."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", read(name)):
        assert (ROOT / target).exists(), f"{name} links to {target}"


def test_the_readme_is_one_page() -> None:
    assert len(read("README.md").splitlines()) <= 130


def test_pictures_shown_are_those_that_are_drawn() -> None:
    """Each has a function in docs/pictures.py, and all are small."""
    drawn = {f"{name}.svg" for name in re.findall(r'"(\w+)": \1[,}]', read("docs/pictures.py"))}
    there = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    shown = {found for name in NAMES for found in re.findall(r"\(.*?pictures/(\w+\.svg)\)", read(name))}
    assert drawn == set(there) == shown
    assert max(there.values()) < 100_000
