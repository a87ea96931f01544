"""`Tests`: which tests execute which lines, and runs of some of them in processes that are forked when torch is loaded."""

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from faults import ROOT, SOURCES, Mutant, known

STORE = ROOT / "build" / "mutants"
MOST_SECONDS = 150.0
"Of tests for one mutant, the fastest first."
LIMIT = 60.0 + 5 * MOST_SECONDS
"Seconds after which a mutant hangs, and is killed."
OUT_OF_TIME = "time ran out"


class Only:
    """A pytest plugin: runs given tests in the order given, then those of whole files, and lets hypothesis not shrink."""

    def __init__(
        self, order: dict[str, int] | None = None, whole: Iterable[str] = (), without: Iterable[str] = ()
    ) -> None:
        self.order, self.whole, self.without = order, set(whole), set(without)
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)  # to shrink an example takes minutes
        settings.register_profile("mutants", deadline=None, phases=phases, database=None)
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is None:
            return
        wanted = [i for i in items if i.nodeid in self.order or i.nodeid.split("::")[0] in self.whole]
        last = len(self.order)
        wanted.sort(key=lambda item: self.order.get(item.nodeid, last))
        items[:] = [item for item in wanted if item.nodeid not in self.without]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


class Traced(Only):
    """Notes which lines each test executes, its fixtures included."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.tracer.switch_context(item.nodeid)
        yield
        self.tracer.switch_context("")


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
    """The files of this checkout, uncommitted ones and the built extension too."""
    at_top = {"build", "dist", "shared"}  # further down a package may be named so

    def left_out(place: str, names: list[str]) -> list[str]:
        top = pathlib.Path(place) == ROOT
        return [
            n
            for n in names
            if n.startswith(".") or n == "__pycache__" or (top and (n in at_top or n.endswith(".egg-info")))
        ]

    shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out)
    return folder


def forked(function: Callable[[], tuple[int, bytes]], log: pathlib.Path, limit: float) -> tuple[int | None, bytes]:
    """Runs a function in a process of its own: (its status or None where time ran out, what it returned)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        status, answer = 70, b""
        try:
            status, answer = function()
        finally:
            os.write(writer, answer)
            os._exit(status)
    os.close(writer)
    status, end = None, time.monotonic() + limit
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it started
    if status is None:
        os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as answers:
        return status, answers.read(65536)


def pytest_args(tree: pathlib.Path, scratch: pathlib.Path) -> list[str]:
    return [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--basetemp={scratch}",
        f"--rootdir={tree}",
        "--hypothesis-seed=0",
    ]


class Tests:
    """Which tests execute a line, how long each takes, and which fail on the library as it is; traced file by file.

    A test file is traced once for its own content. Where a source changed since, its lines are no longer known and all
    tests that execute anything of it count; `--fresh` traces anew.
    """

    def __init__(self, tree: pathlib.Path, fresh: bool, gpu: bool = False) -> None:
        STORE.mkdir(parents=True, exist_ok=True)
        self.tree, self.fresh = tree, fresh
        self.gpu = gpu
        folder = tree / "tests"
        self.files = [f for f in sorted(folder.rglob("test_*.py")) if (folder / "gpu" in f.parents) == gpu]
        self.now = {str(p.relative_to(tree)): digest_of([p]) for root in SOURCES for p in (tree / root).rglob("*.py")}
        self.parts: dict[str, dict[str, Any]] = {}
        self.sound: dict[str, bool] = {}
        for file in self.files:
            if self.store(file).exists() and not fresh:
                self.parts[str(file)] = json.loads(self.store(file).read_text())

    def store(self, file: pathlib.Path) -> pathlib.Path:
        return STORE / f"{file.stem}-{digest_of([file])}.json"

    def add(self, files: Iterable[pathlib.Path]) -> None:
        """Traces those of the files that are not yet."""
        for file in files:
            if str(file) in self.parts:
                continue
            start, store = time.monotonic(), self.store(file)
            status, _ = forked(functools.partial(trace, self.tree, file, store, self.now), STORE / "trace.log", 1800.0)
            if not store.exists():
                raise SystemExit(f"the traced run of {file.name} ended with {status}: {STORE / 'trace.log'}")
            self.parts[str(file)] = json.loads(store.read_text())
            print(f"traced {file.name} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    def room(self, path: str) -> pathlib.Path:
        """The folder of a source's tests: the deepest one that there is of its own."""
        parts = [part for part in pathlib.Path(path).parent.parts if part != "rampwrap"]
        folder = self.tree / "tests" / "gpu" if self.gpu else self.tree / "tests"
        for part in parts:
            folder = folder / part if (folder / part).is_dir() else folder
        return folder

    def nearest(self, path: str) -> list[list[pathlib.Path]]:
        """Test files named after a source or listed for it; others of its room or that name its module; slow ones of both."""
        module = ".".join(pathlib.Path(path).with_suffix("").parts)
        module = module if module.startswith("rampwrap") else f"rampwrap.{module}"
        package, _, stem = module.rpartition(".")
        named = re.compile(rf"\b{re.escape(module)}\b|\bfrom {re.escape(package)} import .*\b{stem}\b")
        mine = {name for entry in known()["near"] if fnmatch.fnmatch(path, entry["path"]) for name in entry["tests"]}
        mine |= {f"test_{stem}", f"test_{stem}_gpu"}
        room = self.room(path)
        tiers: list[list[pathlib.Path]] = [[], [], []]
        for file in self.files:
            if file.stem in mine or file.parent == room or named.search(file.read_text()):
                tiers[2 if file.stem in known()["slow"] else file.stem not in mine].append(file)
        return tiers

    def passes(self, name: str, files: Iterable[str]) -> bool:
        """Whether a test passes on the library as it is, tried once: what fails there, or now and then, kills nothing.

        Raises:
            SystemExit: not even the test files can be imported.
        """
        if "::" not in name:
            for file in files:
                if file not in self.sound:
                    self.sound[file] = run(self.tree, [], [file], collect=True) is None
                if not self.sound[file]:
                    raise SystemExit(f"{file} cannot be imported: {STORE / 'mutant.log'}")
            return True
        if name not in self.sound:
            self.sound[name] = run(self.tree, [name], []) is None
        return self.sound[name]

    def of(self, mutant: Mutant, files: Iterable[pathlib.Path], near: bool) -> list[str]:
        """The tests of some traced files that execute a mutant's lines, the fastest first."""
        names: set[str] = set()
        seconds: dict[str, float] = {}
        for part in (self.parts[str(file)] for file in files if str(file) in self.parts):
            seconds |= part["seconds"]
            lines = part["tests"].get(mutant.path, {})
            same = part["sources"].get(mutant.path) == self.now[mutant.path]
            its = {name for line in mutant.lines for name in lines.get(str(line), ())} if same else set()
            if not its:  # executed at import, or nowhere: a file that names the module may look at its constants
                its = set(part["seconds"]) if near else {name for several in lines.values() for name in several}
            names |= its - set(part["failed"])
        for entry in known()["compiled"]:
            if fnmatch.fnmatch(mutant.path, entry["path"]):
                names |= {name for name in seconds if name.startswith(tuple(entry["tests"]))}
        ordered = sorted(names, key=lambda name: seconds.get(name, 0.0))
        total = itertools.accumulate(seconds.get(name, 0.0) for name in ordered)
        return [name for name, so_far in zip(ordered, total, strict=True) if so_far <= MOST_SECONDS]


def trace(tree: pathlib.Path, file: pathlib.Path, store: pathlib.Path, sources: dict[str, str]) -> tuple[int, bytes]:
    """Runs one test file under coverage and writes what it executed."""
    import coverage

    os.chdir(tree)
    data = store.with_suffix(".coverage")
    tracer = coverage.Coverage(str(data), config_file=False, source=[str(tree / name) for name in SOURCES])
    tracer.start()
    plugin = Traced(tracer)
    status = pytest.main([*pytest_args(tree, tree.parent / "basetemp"), str(file)], plugins=[plugin])
    tracer.stop()
    tracer.save()
    measured_lines = tracer.get_data()
    tests: dict[str, dict[str, list[str]]] = {}
    for measured in measured_lines.measured_files():
        lines = measured_lines.contexts_by_lineno(measured).items()
        name = str(pathlib.Path(measured).resolve().relative_to(tree.resolve()))
        tests[name] = {str(line): sorted(filter(None, names)) for line, names in lines if any(names)}
    data.unlink()
    part = store.with_suffix(".part")
    found = {"tests": tests, "seconds": plugin.seconds, "failed": sorted(set(plugin.failed)), "sources": sources}
    part.write_text(json.dumps(found))
    part.rename(store)
    return int(status), b""


def run(
    tree: pathlib.Path,
    tests: list[str],
    whole: list[str],
    without: Iterable[str] = (),
    collect: bool = False,
    limit: float = LIMIT,
) -> str | None:
    """The first test that fails on the tree as it is, of some and then of whole files; None if none does."""
    scratch = tree.parent / "basetemp"

    def child() -> tuple[int, bytes]:
        os.chdir(tree)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        plugin = Only({name: place for place, name in enumerate(tests)}, whole, without)
        files = dict.fromkeys(str(tree / name.split("::")[0]) for name in [*tests, *whole])
        marks = ["-m", "not release and not slow", *(["--collect-only"] if collect else [])]
        status = pytest.main([*pytest_args(tree, scratch), *marks, "-x", *files], plugins=[plugin])
        return int(status), (plugin.failed or ["at import"])[0].encode()

    status, killer = forked(child, STORE / "mutant.log", limit)
    shutil.rmtree(scratch, ignore_errors=True)
    if status in (0, 5):  # passed; nothing to run
        return None
    return OUT_OF_TIME if status is None else killer.decode() or "the process ended"


@contextlib.contextmanager
def applied(mutant: Mutant, tree: pathlib.Path) -> Iterator[None]:
    """The tree with the fault in it."""
    target = tree / mutant.path
    before, times = target.read_bytes(), target.stat()
    target.write_bytes(mutant.apply(before))
    try:
        yield
    finally:
        target.write_bytes(before)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))


def digest_of(paths: Iterable[pathlib.Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
