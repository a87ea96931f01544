"""Python sources of engines' released wheels, for tests on an engine's own code without an installation of it."""

import contextlib
import functools
import io
import os
import pathlib
import shutil
import subprocess
import tempfile
import tomllib
import urllib.request
import zipfile
import zlib
from collections.abc import Callable

import pytest

KEPT = pathlib.Path(__file__).parents[2] / "build" / "sources"


class Ranges(io.RawIOBase):
    """A file of an index, read piece by piece; an OSError where the index serves no pieces."""

    def __init__(self, url: str) -> None:
        self.url, self.at = url, 0
        with self.get("0-0") as reply:
            if reply.status != 206:
                raise OSError("the index serves no ranges")
            self.size = int(reply.headers["Content-Range"].rpartition("/")[2])

    def get(self, span: str):
        return urllib.request.urlopen(urllib.request.Request(self.url, headers={"Range": f"bytes={span}"}), timeout=60)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        with self.get(f"{self.at}-{end - 1}") as reply:
            found = reply.read()
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def url_of(package: str, version: str) -> str:
    """Where the index has a release's wheel for Linux on x86 and Python 3.12."""
    uv = pytest.importorskip("uv", reason="uv is not installed (the extra 'dev')").find_uv_bin()
    command = [uv, "pip", "compile", "-", "--no-deps", "--format", "pylock.toml", "--no-config", "--quiet"]
    command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39", "--no-python-downloads"]
    bare = {name: value for name, value in os.environ.items() if name not in ("UV_CONSTRAINT", "UV_OVERRIDE")}
    done = subprocess.run(command, input=f"{package}=={version}", capture_output=True, text=True, check=False, env=bare)
    if done.returncode:
        raise OSError(done.stderr)
    (found,) = tomllib.loads(done.stdout)["packages"]
    wheels = [wheel["url"] for wheel in found["wheels"] if wheel["url"].endswith("x86_64.whl")]
    return next((url for url in wheels if "-cp312-cp312-" in url), wheels[0])


def unpack(url: str, wanted: tuple[str, ...], folder: str) -> None:
    """Extracts the Python files of a wheel whose paths begin with one of `wanted`.

    They are read in a dozen requests where the index serves ranges, as PyPI does, and else the whole wheel is, once. (A
    library that reads members one by one takes 8 s for a wheel, this 0.6 s.)
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(io.BufferedReader(Ranges(url), 1 << 18))
        except OSError:
            stream = stack.enter_context(tempfile.TemporaryFile())
            with urllib.request.urlopen(url, timeout=60) as reply:
                shutil.copyfileobj(reply, stream)
        wheel = stack.enter_context(zipfile.ZipFile(stream))
        for member in sorted(wheel.infolist(), key=lambda its: its.header_offset):
            if member.filename.endswith(".py") and member.filename.startswith(wanted):
                wheel.extract(member, folder)


@functools.cache
def sources(package: str, version: str, wanted: tuple[str, ...]) -> pathlib.Path:
    """The folder of a release's package, kept in build/sources.

    Where the index is out of reach the test is skipped, and fails where RAMPWRAP_NEEDS_INDEX says that there is one, as
    `make test` does.
    """
    kept = KEPT / f"{package}-{version}-{zlib.crc32(repr(wanted).encode()):08x}"
    if not kept.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            try:
                unpack(url_of(package, version), wanted, folder)
            except OSError as error:
                if "RAMPWRAP_NEEDS_INDEX" in os.environ:
                    raise
                pytest.skip(f"the wheel of {package} {version} is out of reach: {error!s:.200}")
            with contextlib.suppress(OSError):  # another process was faster
                pathlib.Path(folder).replace(kept)
                pathlib.Path(folder).mkdir()
    return kept / package


@pytest.fixture
def released() -> Callable[[str, str, tuple[str, ...]], pathlib.Path]:
    """`sources`."""
    return sources
