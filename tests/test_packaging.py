"""The wheel's package list, and what must never become importable."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
import tomllib

import pytest

import rampwrap

ROOT = pathlib.Path(__file__).parent.parent


def test_the_package_list_is_the_tree() -> None:
    if not (ROOT / "rampwrap").is_dir():
        pytest.skip("only the source tree can be compared with the package list")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {"rampwrap"}
    for top in ("rampwrap", "adapters", "kernels"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).parts[:-1]
            if "__pycache__" not in parts and not (top == "rampwrap" and parts[1:2] in (("adapters",), ("kernels",))):
                name = parts if top == "rampwrap" else ("rampwrap", *parts)
                found.update(".".join(name[:depth]) for depth in range(1, len(name) + 1))
    assert sorted(settings["packages"]) == sorted(found)


def test_the_version_is_the_tags(tmp_path: pathlib.Path) -> None:
    """Counted on by later commits; 0.1.0.dev without a tag, and without git."""
    scm = pytest.importorskip("setuptools_scm")
    settings = tmp_path / "pyproject.toml"
    settings.write_bytes((ROOT / "pyproject.toml").read_bytes())

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def version() -> str:
        configuration = scm.Configuration.from_file(settings)
        return str(scm.get_version(root=tmp_path, fallback_version=configuration.fallback_version))

    assert version() == "0.1.0.dev0"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert version().startswith("0.1.0.dev1+g")
    git("tag", "v0.1.0")
    assert version() == "0.1.0"
    git("commit", "--allow-empty", "-m", "second")
    assert version().startswith("0.1.1.dev1+g")


def test_top_level_names_of_others_stay_free() -> None:
    for name in ("adapters", "kernels"):
        spec = importlib.util.find_spec(name)
        assert spec is None or spec.origin is None or "rampwrap" not in spec.origin


def loaded(code: str, names: tuple[str, ...]) -> str:
    """Which of the modules `names` are there after `code`, as a fresh process prints it."""
    code = f"import sys\n{code}\nprint([n for n in {names!r} if n in sys.modules], file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip()


HEAVY = ("scipy", "torch", "triton", "cutlass", "matplotlib", "tqdm")
HELP = """
from rampwrap.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
"""


def test_importing_rampwrap_loads_nothing_that_is_not_used() -> None:
    assert loaded("import rampwrap; rampwrap.__version__", (*HEAVY, "numpy", "attrs", "importlib.metadata")) == "[]"
    assert loaded(HELP, HEAVY) == "[]"


def test_every_public_name_is_importable_and_three_alone_need_torch() -> None:
    light = [name for name in rampwrap.__all__ if name not in ("ExpertParallel", "GraphDispatcher", "Received")]
    assert loaded(f"import rampwrap\n[getattr(rampwrap, name) for name in {light}]", HEAVY) == "[]"
    assert "scipy" not in loaded("import rampwrap\nrampwrap.GraphDispatcher, rampwrap.ExpertParallel", HEAVY)
    assert set(rampwrap.__all__) <= set(dir(rampwrap))
    with pytest.raises(AttributeError, match="'rampwrap' has no attribute 'Nope'"):
        _ = rampwrap.Nope


def test_a_type_checker_reads_the_names_that_are_imported_on_first_use() -> None:
    tree = ast.parse(pathlib.Path(rampwrap.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed.pop("observe") == "rampwrap"
    assert typed == {name: f"rampwrap.{module}" for name, module in rampwrap._HOME.items()}
    assert set(rampwrap.__all__) == {*typed, "observe", "__version__"}


def test_files_are_text_in_utf8_whatever_the_locale() -> None:
    """Every call that opens text names its encoding."""
    root = pathlib.Path(rampwrap.__file__).parent
    found = []
    for file in (path for folder in (root, root / "adapters", root / "kernels") for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            mode = next(
                (str(a.value) for a in node.args if isinstance(a, ast.Constant) and set(str(a.value)) <= set("rwab+x")),
                "",
            )
            text = name in ("read_text", "write_text") or (
                name in ("open", "fdopen") and "b" not in mode and (mode or not node.args)
            )
            own = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self"  # no file
            if text and not own and not any(keyword.arg == "encoding" for keyword in node.keywords):
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert found == []


@pytest.mark.slow
def test_users_code_is_type_checked_wherever_rampwrap_is_installed(tmp_path: pathlib.Path) -> None:
    """In a folder of the user's own, by `make setup`'s environment and by the wheel's."""
    installed = pathlib.Path(sysconfig.get_path("purelib")) / "rampwrap"
    if not installed.is_dir():
        pytest.skip("rampwrap is on the path alone, not installed by make setup or as a wheel")
    (tmp_path / "mine.py").write_text(
        "import rampwrap\nfrom rampwrap import Plan\nfrom rampwrap.kernel.shape import MoEShape\n"
        "plan: Plan = Plan.load('p.json')\nshape: MoEShape = rampwrap.MoEShape(8, 2, 64, 64)\n"
        "text: str = rampwrap.observe.prometheus()\nwrong: int = shape\n"
    )
    run = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "mine.py"]
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    said = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=bare).stdout
    assert said.count("error:") == 1 and "mine.py:7" in said, said
