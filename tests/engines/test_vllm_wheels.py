"""The contract and the plugin against the Python sources of vLLM's own wheels, the classes of each in a process of its own.

Of a wheel's 300 MB the files that are needed are read in a dozen requests, where the index serves ranges as PyPI does, and
else the whole of it once; they are kept in build/sources. All releases: ``pytest -m "slow or release" FILE``.
"""

import contextlib
import functools
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
import zipfile

import pytest

from rampwrap.engines import vllm_contract as contract
from rampwrap.plan import folder as places

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
IN_CI = ("0.26.0", "0.30.0", "0.33.0")
BETWEEN = ("0.27.1", "0.28.0", "0.29.0", "0.31.0", "0.32.0")
RELEASES = [pytest.param(one, marks=pytest.mark.slow) for one in IN_CI]
RELEASES += [pytest.param(one, marks=pytest.mark.release) for one in BETWEEN]
KEPT = ROOT / "build" / "sources"
# Folders of a wheel, by the ends of which files are taken.
WANTED = ("vllm/model_executor/layers/fused_moe/", "vllm/model_executor/layers/quantization/utils/quant_utils.py")
WANTED += ("vllm/v1/worker/workspace.py", "vllm/utils/math_utils.py", "vllm/forward_context.py", "vllm/config/vllm.py")
WANTED += ("vllm/__init__.py", "vllm/_version.py")


class Ranges(io.RawIOBase):
    """A file of an index, read piece by piece. A library that reads members one by one takes 8 s for a wheel, this 0.6 s."""

    def __init__(self, url):
        self.url, self.at = url, 0
        with self.get("0-0") as reply:
            if reply.status != 206:
                raise OSError("the index serves no ranges")
            self.size = int(reply.headers["Content-Range"].rpartition("/")[2])

    def get(self, span):
        return urllib.request.urlopen(urllib.request.Request(self.url, headers={"Range": f"bytes={span}"}), timeout=60)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer):
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        with self.get(f"{self.at}-{end - 1}") as reply:
            found = reply.read()
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def url_of(version):
    """Where the index has a release's wheel for Linux on x86."""
    uv = pytest.importorskip("uv", reason="uv is not installed (the extra 'dev')").find_uv_bin()
    command = [uv, "pip", "compile", "-", "--no-deps", "--format", "pylock.toml", "--no-config", "--quiet"]
    done = subprocess.run(command, input=f"vllm=={version}", capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr)
    (package,) = tomllib.loads(done.stdout)["packages"]
    return next(wheel["url"] for wheel in package["wheels"] if wheel["url"].endswith("x86_64.whl"))


def unpacked(version, folder):
    """Extracts what is wanted of a wheel."""
    url = url_of(version)
    with contextlib.ExitStack() as open_files:
        try:
            stream = open_files.enter_context(io.BufferedReader(Ranges(url), 1 << 18))
        except OSError:
            stream = open_files.enter_context(tempfile.TemporaryFile())
            with urllib.request.urlopen(url, timeout=60) as reply:
                shutil.copyfileobj(reply, stream)
        wheel = open_files.enter_context(zipfile.ZipFile(stream))
        for member in sorted(wheel.infolist(), key=lambda its: its.header_offset):
            if member.filename.endswith(".py") and member.filename.startswith(WANTED):
                wheel.extract(member, folder)


@functools.cache
def sources(version):
    """The folder ``vllm`` of a release. Out of reach it is skipped, and an error where CI says that it needs the index."""
    kept = KEPT / f"vllm-{version}"
    if not kept.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            try:
                unpacked(version, folder)
            except OSError as error:
                if "RAMPWRAP_NEEDS_INDEX" in os.environ:
                    raise
                pytest.skip(f"vLLM's wheel is out of reach: {error!s:.200}")
            with contextlib.suppress(OSError):  # another process was faster
                pathlib.Path(folder).replace(kept)
                pathlib.Path(folder).mkdir()
    return kept / "vllm"


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_keeps_the_contract(version):
    root = sources(version)
    assert contract.source_version(root) == version and contract.faults(root) == []


def test_the_ends_of_what_was_read_are_checked():
    """The oldest and the newest release in CI are those that the contract names."""
    assert IN_CI[0].startswith(f"{contract.OLDEST}.") and IN_CI[-1].startswith(f"{contract.NEWEST}.")


@pytest.mark.parametrize("version", RELEASES)
def test_with_the_classes_of_a_release(tmp_path, version):
    """vLLM's own kernel, prepare, experts, configs and workspace around our launch; see `vllm_classes`."""
    environment = os.environ | {places.PLANS: str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "vllm_classes.py", sources(version), version, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"ran in vLLM {version}" in done.stdout
