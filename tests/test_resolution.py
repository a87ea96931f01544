"""`pip install ENGINE rampwrap[...]` gives the engine's newest release, not an old one that happens to fit our floors.

A resolver that cannot have the newest vLLM takes an older one without a word: with a floor of ours that vLLM's pins did not
meet it took one of years ago. Asked is the index itself: constraints, overrides and files of this machine stay out.
"""

import os
import pathlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXTRAS = ("triton", "cute", "plot", "metrics", "transformers")
"What users install beside an engine; `cute-kernels` needs what `cute` does, and no compiler."
# SGLang's wheels ask for glibc 2.34; uv's plain linux means 2.28 and would take a release of half a year ago.
PLATFORM = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39", "--no-python-downloads")
# Where the index is; anything else that bends a resolution is left out.
KEPT = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_CACHE_DIR")
UNREACHABLE = ("error sending request", "Failed to fetch", "dns error", "timed out")


def resolved(engine: str, *options: str) -> dict[str, str]:
    """Versions by package of what uv would install for an engine and the options, on Linux with Python 3.12."""
    uv = pytest.importorskip("uv", reason="uv is not installed (the extra 'dev')").find_uv_bin()
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_")) or name in KEPT}
    command = [uv, "pip", "compile", "-", *options, *PLATFORM, "--no-config", "--quiet", "--no-annotate", "--no-header"]
    done = subprocess.run(command, input=engine, capture_output=True, text=True, cwd=ROOT, env=bare, check=False)
    if (
        done.returncode
        and any(said in done.stderr for said in UNREACHABLE)
        and "RAMPWRAP_NEEDS_INDEX" not in os.environ
    ):
        pytest.skip(f"the package index is out of reach: {done.stderr[:200]}")
    assert not done.returncode, done.stderr
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


@pytest.mark.slow
def test_the_newest_engines_are_what_one_gets_beside_rampwrap() -> None:
    if not (ROOT / "rampwrap").is_dir():
        pytest.skip("the requirements are read from the source tree")
    extras = [option for extra in EXTRAS for option in ("--extra", extra)]
    engines = ("vllm", "sglang")
    with ThreadPoolExecutor() as threads:  # they wait for the index, nearly all of the time
        newest = [threads.submit(resolved, engine, "--no-deps") for engine in engines]
        beside = [threads.submit(resolved, engine, "pyproject.toml", *extras) for engine in engines]
        for engine, alone, both in zip(engines, newest, beside, strict=True):
            assert both.result()[engine] == alone.result()[engine], both.result()
            assert {"nvidia-cutlass-dsl", "apache-tvm-ffi", "matplotlib"} <= set(both.result())
