"""What is compiled before an engine needs it: each span's configs once, in a process that imports this rampwrap."""

import contextlib
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.dispatch.graph import GraphDispatcher
from rampwrap.engines import prepare
from rampwrap.kernels.triton import pdl
from rampwrap.kernels.triton.moe import warm
from rampwrap.plan.plan import Plan
from rampwrap.testing.sim import SimKernel


class Spans:
    """A dispatcher of which each number of tokens has the configs of its span."""

    def __init__(self, max_tokens: int, spans: dict[int, list[dict[str, int]]]) -> None:
        self.max_tokens, self.spans, self.asked = max_tokens, spans, []

    def prepared(self, num_tokens: int) -> Any:
        assert 1 <= num_tokens <= self.max_tokens
        first = max(first for first in self.spans if first <= num_tokens)
        return types.SimpleNamespace(position=first, configs=self.spans[first])


A, B, C = {"a": 1}, {"b": 2}, {"c": 3}


@pytest.mark.parametrize(
    ("max_tokens", "firsts", "single", "several"),
    [
        (1, [1], [A], []),
        (4, [1], [A], []),
        (5, [1, 5], [A], [B, C]),
        (6, [1, 5, 6], [A], [B, C]),
        (7, [1, 5, 6, 7], [A, B], [B, C]),
        (64, [1, 5, 6, 7, 33], [A, B], [B, C, A]),
    ],
)
def test_each_span_up_to_the_largest_batch_once(
    max_tokens: int, firsts: list[int], single: list[Any], several: list[Any]
) -> None:
    """Configs that are launched alone and among candidates are compiled apart, each once, in the order of the spans."""
    its: Any = Spans(max_tokens, {1: [A], 5: [B, C], 6: [A], 7: [B], 33: [C, A]})
    assert prepare._firsts(its) == firsts
    assert prepare.launched(its) == (single, several)


@pytest.mark.parametrize(("single", "several"), [([A], [B, C]), ([A], []), ([], [B, C])])
def test_configs_alone_and_among_candidates_are_warmed_apart(
    monkeypatch: pytest.MonkeyPatch, single: list[Any], several: list[Any]
) -> None:
    asked: list[Any] = []

    def run(shape: str, configs: Sequence[Any], persistent: bool = False) -> list[str | None]:
        asked.append((shape, configs, persistent))
        return [None, f"{len(configs)} failed"]

    monkeypatch.setattr(warm, "warm", run)
    monkeypatch.setattr(prepare, "launched", lambda its: (single, several))
    kernel = types.SimpleNamespace(name="triton_fused_moe")
    its: Any = types.SimpleNamespace(kernel=kernel, plan=types.SimpleNamespace(configs=[A]), shape="the shape")
    failed = prepare.compile_plan(its)
    assert asked == [("the shape", part, part is several) for part in (single, several) if part]
    assert failed == [f"{len(part)} failed" for part in (single, several) if part]


def test_the_process_imports_this_rampwrap_and_compiles_as_this_process_would(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, Any] = {}
    ended = types.SimpleNamespace(returncode=0, stderr="a warning\n")

    def run(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        if isinstance(ended.returncode, BaseException):
            raise ended.returncode
        return ended

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("KEPT", "too")
    pdl.use("1")
    try:
        assert prepare._run("x.plan.json", 64)
    finally:
        pdl.use(None)
    assert seen["command"] == [sys.executable, "-m", "rampwrap.engines.prepare", "x.plan.json", "64"]
    root, *others = seen["env"]["PYTHONPATH"].split(os.pathsep)
    assert (pathlib.Path(root) / "rampwrap" / "engines" / "prepare.py").exists() and others == ["mine"]
    assert seen["env"]["KEPT"] == "too" and seen["env"][pdl.VARIABLE] == "1"
    assert seen["timeout"] == 600 and seen["capture_output"] and seen["text"] and not seen["check"]
    monkeypatch.delenv("PYTHONPATH")
    assert prepare._run("x.plan.json", 64) and os.pathsep not in seen["env"]["PYTHONPATH"]
    for ended.returncode, ended.stderr, said in (
        (1, "first\nno compiler\n", ["no compiler"]),
        (1, "", []),
        (OSError("no room"), "", ["no room"]),
        (subprocess.TimeoutExpired("x", 600), "", ["timed out after 600 seconds"]),
    ):
        caplog.clear()
        assert prepare._run("x.plan.json", 64) is (not said)
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == len(said) and all(part in warned[0] for part in said)


@pytest.mark.parametrize("reasons", [[], ["one failed.", "another failed."]])
def test_as_a_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sim_plan: Plan,
    tmp_path: pathlib.Path,
    reasons: list[str],
) -> None:
    """The errors on stderr, a line each, and their like as the exit status."""
    sim_plan.save(tmp_path / "a.plan.json")
    asked: list[GraphDispatcher] = []
    monkeypatch.setattr(prepare, "compile_plan", lambda its: (asked.append(its), reasons)[1])
    assert prepare.main([str(tmp_path / "a.plan.json"), "48"]) == (1 if reasons else 0)
    assert (asked[0].max_tokens, asked[0].plan.configs, asked[0].kernel.name) == (48, sim_plan.configs, "sim")
    assert capsys.readouterr().err.splitlines() == reasons


def test_a_plans_file_is_compiled_for_the_batches_of_engines(
    monkeypatch: pytest.MonkeyPatch, sim_plan: Plan, tmp_path: pathlib.Path
) -> None:
    """Nothing without a GPU; 16,384 tokens unless told."""
    path = str(tmp_path / "a.plan.json")
    sim_plan.save(path)
    kernel, asked = SimKernel(sim_plan.shape), []
    monkeypatch.setattr(prepare, "ensure_compiled", lambda its, path: (asked.append((its.max_tokens, path)), "yes")[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prepare.compile_for(kernel, path) is False and not asked

    def made(kernel: SimKernel, path: str, *, max_tokens: int) -> Any:
        return types.SimpleNamespace(max_tokens=max_tokens)

    monkeypatch.setattr(prepare, "GraphDispatcher", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prepare.compile_for(kernel, path) == prepare.compile_for(kernel, path, 64) == "yes"
    assert asked == [(16384, path), (64, path)]


def test_one_process_at_a_time_compiles_and_larger_batches_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The mark holds the largest batch; a failure leaves none; who waits for the lock waits as long as it takes."""
    mark, ran, works = tmp_path / "mark", [], True
    monkeypatch.setattr(prepare, "_run", lambda path, tokens: (ran.append((path, tokens)), works)[1])
    locked, waits = prepare.locked, []
    monkeypatch.setattr(prepare, "locked", lambda path, wait_s=0.0: (waits.append(wait_s), locked(path))[1])

    def ensure(tokens: int) -> bool:
        its: Any = types.SimpleNamespace(max_tokens=tokens)
        return prepare._ensure(its, mark, "p")

    assert [ensure(tokens) for tokens in (64, 64, 63, 65)] == [True, False, False, True]
    assert ran == [("p", 64), ("p", 65)] and mark.read_text() == "65" and waits == [-1] * 4
    works = False
    assert ensure(66) and mark.read_text() == "65"
    mark.write_text("")
    assert ensure(1) and len(ran) == 4


@pytest.mark.parametrize(("must", "works"), [(True, True), (True, False), (False, True)])
def test_the_library_is_filled_by_one_process_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, must: bool, works: bool
) -> None:
    """Who comes second waits for as long as it takes, and loads what the first has compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done: list[Any] = []

    @contextlib.contextmanager
    def locked(path: pathlib.Path, wait_s: float = 0.0) -> Any:
        done.append((path.relative_to(tmp_path).as_posix(), path.parent.is_dir(), wait_s))
        yield
        done.append("unlocked")

    monkeypatch.setattr(prepare, "locked", locked)
    monkeypatch.setattr(prepare, "_run", lambda path, tokens: (done.append((path, tokens)), works)[1])
    kernel = types.SimpleNamespace(must_compile=lambda configs: configs if must else [], precompile=done.append)
    assert prepare._ensure_cute(kernel, [A, B], 64, "p") is must
    compiled = [("rampwrap/cute/warming", True, -1), ("p", 64), "unlocked"] if must else []
    assert done == compiled + ([[A, B]] if works else [])
