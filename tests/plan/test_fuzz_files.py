"""Damaged plans, tables and journals: refused in one sentence, or they mean what they meant.

Half of the mutants keep their checksum, so that damage must be seen; the other half are sealed anew, as by somebody who
edited on purpose, so that types and ranges must be: what then loads must choose, explain, show and replay.
"""

import contextlib
import copy
import io
import json
import math
import pathlib
import pickle
import random
import re
import time
import zipfile
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from rampwrap import MoEShape, Plan, Routing, Timings, schema
from rampwrap.cli.main import main
from rampwrap.compare import evaluate as compare
from rampwrap.errors import RampwrapError
from rampwrap.measure.full import profile
from rampwrap.measure.journal import read_journal
from rampwrap.measure.session import Bench
from rampwrap.plan.make import make_plan
from rampwrap.routing.workloads import workload_grid
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(8, 2, 64, 64)
ROUTINGS = [Routing.parse(name) for name in ("uniform", "zipf:1.2", "dirichlet:0.3")]
ROWS = workload_grid([1, 4, 16, 64], ROUTINGS) + workload_grid([2, 8, 32], ROUTINGS[:2], "eval")
HISTOGRAMS = [[2, 0, 5, 1, 9, 30, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 7 + [2], [400] * 8, [0] * 8]
INFINITE, TWICE = 987654321.5, "987654321 twice"
SLOWEST, MOST_MB = 60.0, 1024


@pytest.fixture(scope="module")
def table() -> Timings:
    made = profile(SimKernel(SHAPE), SHAPE, ROWS, quiet=True)
    few = np.arange(0, len(made.configs), 3)
    configs, grids = (tuple(its[i] for i in few) for its in (made.configs, made.grids))
    return attrs.evolve(made, us=made.us[:, few], spread=None, configs=configs, grids=grids)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, taken out, put in or doubled."""
    out, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.choice([1, 1, 5, 20])):
                out[rng.randrange(len(out))] = rng.randrange(256)
        case 1:
            del out[at:]
        case 2:
            del out[at : at + rng.choice([1, 3, 40])]
        case 3:
            out[at:at] = rng.randbytes(rng.choice([1, 3, 40]))
        case _:
            out[at:at] = out[at : at + rng.choice([1, 10, 300])]
    return bytes(out)


def other(value: Any, rng: random.Random) -> Any:
    """Something else in the place of a value."""
    numbers = [
        0,
        -1,
        1,
        2,
        0.5,
        -0.5,
        1e-320,
        1e300,
        2**31,
        2**53,
        2**63,
        10**30,
        -(10**400),
        math.nan,
        math.inf,
        INFINITE,
    ]
    strange = [None, True, False, "", "x", "1", "\ud800", "\x00", "M=7", "a" * 100_000, [], {}, [value], {"x": value}]
    nested: Any = value
    for _ in range(rng.choice([3, 300])):
        nested = [nested]
    choices = [rng.choice(numbers), rng.choice(numbers), rng.choice(strange), nested]
    if isinstance(value, int | float):
        with contextlib.suppress(OverflowError):
            choices += [-value, value * 2, value + 1, value / 2, float(value), str(value), value * 1e6]
    if isinstance(value, list) and value:
        choices += [value[:-1], value[1:], value + value[-1:], value[::-1], [rng.choice(numbers)] * len(value)]
    return rng.choice(choices)


def places(raw: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it."""
    found = [(raw, key) for key in (raw if isinstance(raw, dict) else range(len(raw)))]
    inner = [raw[key] for _, key in found if isinstance(raw[key], dict | list) and raw[key]]
    return found + [place for its in inner for place in places(its)]


def edited(raw: Any, rng: random.Random) -> Any:
    """Parsed JSON with one or two fields dropped, renamed, retyped, out of range, swapped or in another order."""
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice([1, 1, 1, 2])):
        # Long arrays have most of the places, so that every other draw is of a field near the top.
        every = places(raw)
        near = [place for place in every if isinstance(place[0], dict)] or every
        where, key = rng.choice(near if rng.random() < 0.6 else every)
        match rng.randrange(8):
            case 0:
                del where[key]
            case 1 if isinstance(where, dict):
                where[rng.choice(["x", "", "schema", "num_sms", key + "2"])] = where[key]
            case 2:
                second, its = rng.choice(near)
                where[key], second[its] = copy.deepcopy(second[its]), copy.deepcopy(where[key])
            case 3 if isinstance(where, dict):
                items = list(where.items())
                rng.shuffle(items)
                where.clear()
                where.update(items)
            case 4 if isinstance(where, dict):
                where[TWICE] = [key, where[key]]
            case _:
                where[key] = other(where[key], rng)
        if not raw:
            break
    return raw


def text_of(raw: Any) -> bytes:
    """JSON, with what Python writes only on demand: numbers that overflow, keys that stand twice."""
    text = json.dumps(raw, indent=None).replace(str(INFINITE), "1e999")
    return text.replace(f'"{TWICE}": [', '"kernel": [', 1).encode()


def sealed(raw: Any) -> Any:
    return schema.seal({"schema": raw.get("schema", 1), **raw}) if isinstance(raw, dict) and raw else raw


@contextlib.contextmanager
def bounded(what: str) -> Any:
    """A mutant is refused in one sentence, in time; anything else names it."""
    start = time.monotonic()
    try:
        yield
    except RampwrapError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error).strip(), f"{what}: {error}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error!s:.200}") from error
    assert time.monotonic() - start < SLOWEST, f"{what} took long"


@contextlib.contextmanager
def frugal() -> Any:
    """The process grows by less than a gigabyte."""

    def held(name: str) -> int:
        (kib,) = re.findall(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        return int(kib) // 1024

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now: earlier tests held more
    before = held("VmRSS")
    yield
    assert held("VmHWM") - before < MOST_MB


def command(*argv: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(argv)
    out.getvalue().encode()
    if code:
        raise RampwrapError(said.getvalue())


def works(plan: Plan) -> None:
    """Every choice is one of the plan's, with times above nothing, and can be explained."""
    policy = plan.policy()
    experts = plan.shape.num_local_experts
    for row in HISTOGRAMS:
        counts = np.array((row * experts)[:experts])
        for tokens in (1, 24, 100_000):
            assert 0 <= policy.index(counts, tokens) < len(plan.configs)
            str(policy.select(counts, tokens))
        us = plan.model.predict(counts)
        assert not np.isnan(us).any()
        if plan.model.name == "wave" and counts.any():
            assert (us > 0).all() and np.isfinite(us[plan.model._fast.unfitted == 0]).all()  # type: ignore[attr-defined]
    plan.static_policy().index(counts, 3)
    again = json.loads(plan.to_json(), parse_constant=pytest.fail)
    assert again["checksum"] == schema.checksum(again)


samples = pytest.mark.parametrize("share", [0.03, pytest.param(1, marks=pytest.mark.slow)])


@samples
@pytest.mark.parametrize("model", ["wave", "ramp4"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_damaged_plans(table: Timings, tmp_path: pathlib.Path, model: str, share: float) -> None:
    plan, path = make_plan(table, model=model), tmp_path / "p.json"
    text = plan.to_json()
    raw, loaded = json.loads(text), 0
    with frugal():
        for seed in range(int(5000 * share)):
            rng = random.Random(f"{model} {seed}")
            anew = seed % 2
            if anew:
                data = text_of(sealed(edited(raw, rng)))
            else:
                data = damaged(text.encode(), rng) if rng.random() < 0.4 else text_of(edited(raw, rng))
            path.write_bytes(data)
            # A file without a checksum is one of an older version, whatever else was changed in it.
            anew = anew or b'"checksum"' not in data
            with bounded(f"plan {model} {seed}"):
                found = Plan.load(path)
                loaded += 1
                assert anew or json.loads(found.to_json()) == raw
                works(found)
                if seed % 4 == 1:
                    command("show", str(path))
                    command("explain", str(path), "--batch-size", "24")
    assert loaded


def members(table: Timings, path: pathlib.Path) -> dict[str, Any]:
    table.save(path)
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def changed(arrays: dict[str, Any], rng: random.Random, anew: bool, trap: pathlib.Path) -> dict[str, Any]:
    """The arrays of a table with one of them edited."""
    out, name = dict(arrays), rng.choice(["us", "counts", "split", "label", "spread", "meta"])
    meta = json.loads(str(arrays["meta"]))
    value = out.get(name, out["us"])
    match rng.randrange(8 if name != "meta" else 1):
        case 0:
            meta = edited(meta, rng)
        case 1:
            out.pop(name, None)
        case 2:
            dtypes = ["f2", "f4", "f8", "i4", "i8", "u1", "c8", "U3", "S9", "V4", "?"]
            with np.errstate(all="ignore"), contextlib.suppress(TypeError, ValueError):
                out[name] = value.astype(rng.choice(dtypes))
        case 3:
            out[name] = rng.choice(list(out.values()))
        case 4:
            shapes = [value.T, value[:-1], value[..., :-1], value[None], value[:0], value.ravel(), value[::-1]]
            out[name] = rng.choice(shapes)
        case 5:
            out[name] = np.array([_Trap(trap)], dtype=object)
        case 6 if value.dtype.kind in "fi":
            one = value.astype(np.float64 if value.dtype.kind == "f" else np.int64)
            far = [0, -1, np.nan, np.inf, 1e-30, 1e12, 1e308] if value.dtype.kind == "f" else [-1, 2**31, 2**62, 7]
            where = np.unravel_index(rng.randrange(one.size), one.shape)
            one[where if rng.random() < 0.7 else ...] = rng.choice(far)
            out[name] = one
        case _ if value.dtype.kind == "U":
            one = value.astype("U64")
            one[rng.randrange(len(one))] = rng.choice(
                ["", "x", "M=0 uniform", "M=" + "9" * 30, "M=131072 zipf1", "M=\u0661 x"]
            )
            out[name] = one
    if anew and isinstance(meta, dict):
        meta.pop("checksum", None)
    out["meta"] = np.array(text_of(meta).decode())
    return out


class _Trap:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pathlib.Path.touch, (self.path,)


def oversized(arrays: dict[str, Any], rng: random.Random, path: pathlib.Path) -> None:
    """A table with an array that claims, or unpacks to, much more than there is."""
    name = rng.choice(["us", "counts", "label", "split"])
    shape = rng.choice([(10**6, 10**6), (2**62, 4), (1 << 32,), (15, 2**40), (0, 8), (-1, 8), (15, 8, 1)])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in arrays.items():
            out = io.BytesIO()
            np.lib.format.write_array(out, value)
            if key == name:
                out = io.BytesIO()
                descr = rng.choice(["<f4", "<U60", "|O", "<i8", "<U99999"])
                np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
                out.write(rng.choice([b"", pickle.dumps(3), bytes(80_000_000) if rng.random() < 0.1 else b"0" * 99]))
            archive.writestr(key + ".npy", out.getvalue())


@samples
@pytest.mark.filterwarnings("ignore")
def test_damaged_tables(table: Timings, tmp_path: pathlib.Path, share: float) -> None:
    path, trap = tmp_path / "t.npz", tmp_path / "executed"
    arrays = members(table, path)
    whole, data = Timings.load(path), path.read_bytes()
    same = schema.dump(whole.notes), whole.us.tobytes(), whole.counts.tobytes(), whole.label, whole.split, whole.configs
    loaded = 0
    with frugal():
        for seed in range(int(3000 * share)):
            rng = random.Random(seed)
            anew, kind = seed % 2 == 1, rng.random()
            if kind < 0.1:
                oversized(arrays, rng, path)
            elif kind < 0.4 and not anew:
                path.write_bytes(damaged(data, rng))
            else:
                np.savez_compressed(path, **changed(arrays, rng, anew, trap))
            with bounded(f"table {seed}"):
                found = Timings.load(path)
                loaded += 1
                its = (
                    schema.dump(found.notes),
                    found.us.tobytes(),
                    found.counts.tobytes(),
                    found.label,
                    found.split,
                    found.configs,
                )
                assert anew or its == same
                command("show", str(path))
                if anew and loaded % 4 == 0:
                    with bounded(f"replay of table {seed}"):
                        compare.replay(found)
                    works(make_plan(found))
            assert not trap.exists()
    assert loaded


@samples
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_damaged_journals(tmp_path: pathlib.Path, share: float) -> None:
    with Bench(SimKernel(SHAPE), SHAPE, ROWS, out=tmp_path / "j.npz", quiet=True) as bench:
        for row in range(6):
            bench.measure(row, range(len(bench.configs)))
    path = next(tmp_path.glob("j.npz*.jsonl"))
    data = path.read_bytes()
    lines, whole = data.splitlines(), read_journal(path)
    known = {
        (label, tuple(counts)): us
        for label, counts, us in zip(whole.label, whole.counts.tolist(), whole.us, strict=True)
    }
    loaded = 0
    with frugal():
        for seed in range(int(1500 * share)):
            rng = random.Random(seed)
            anew, some = seed % 2 == 1, list(lines)
            at = rng.randrange(len(some))
            if anew:
                raw = edited(schema.unseal(json.loads(some[at])), rng)
                some[at] = text_of(schema.seal(raw) if isinstance(raw, dict) and raw else raw)
            elif rng.random() < 0.5:
                some[at] = text_of(edited(json.loads(some[at]), rng))
            else:
                match rng.randrange(3):
                    case 0:
                        some.pop(at)
                    case 1:
                        rng.shuffle(some)
                    case _:
                        some.insert(at, some[rng.randrange(len(some))])
            text = b"\n".join(some) + b"\n"
            path.write_bytes(text if anew or rng.random() < 0.6 else damaged(data, rng))
            with bounded(f"journal {seed}"):
                found = read_journal(path)
                loaded += 1
                assert ((found.us > 0) & (found.us < np.inf) | np.isnan(found.us)).all()
                if not anew:
                    for label, counts, us in zip(found.label, found.counts.tolist(), found.us, strict=True):
                        np.testing.assert_array_equal(us, known[label, tuple(counts)])
    assert loaded
