"""The tests with the oldest and with the newest releases that pyproject.toml declares: ``nox``, or ``nox -s oldest``;
``nox -s transformers`` tests that hook alone, with two releases of transformers.

Each session is an environment of its own with some 6 GB of torch and CUDA libraries; arguments after ``--`` are pytest's.
Where a CPU build of torch lies in a folder, UV_FIND_LINKS names it and the file that UV_CONSTRAINT names holds its version.

What ran, 2026-11-27: oldest with torch 2.13.0+cpu in place of 2.11, in parts, no failure; torch 2.11.0 with Triton 3.6.0, numpy 2.5.2 and
Python 3.12: all GPU tests pass, of the others 1730, and 189 fail inside Triton's interpreter, which at 3.6 does not know numpy 2.5
(a vector of one element is no number any more). Kernels on a GPU do not meet it.
"""

import os

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["oldest", "newest"]
EXTRAS = "triton,cute,plot,transformers,dev"
SHOWN = (
    "attrs",
    "cattrs",
    "click",
    "filelock",
    "numpy",
    "scipy",
    "torch",
    "tqdm",
    "triton",
    "apache-tvm-ffi",
    "matplotlib",
)


def run(session: nox.Session, resolution: str) -> None:
    session.install("--resolution", resolution, "-e", f".[{EXTRAS}]")
    print_versions = (
        f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {SHOWN!r}), sep=', ')"
    )
    session.run("python", "-c", print_versions)
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    workers = str(min(4, os.cpu_count() or 1))
    session.run("python", "-m", "pytest", "-n", workers, "--dist", "worksteal", *session.posargs, env=threads)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Every dependency at its floor; what those need besides, at its newest."""
    run(session, "lowest-direct")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Whatever the index has."""
    run(session, "highest")


@nox.session(python="3.12")
@nox.parametrize("release", ["5.17.0", "5.24.0"])
def transformers(session: nox.Session, release: str) -> None:
    """The hook's tests with the oldest and the newest release that `rampwrap.engines.transformers_layer.CHECKED` names."""
    session.install("-e", ".[triton,transformers,dev]", f"transformers=={release}")
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    session.run("python", "-m", "pytest", "tests/engines/test_transformers.py", *session.posargs, env=threads)
