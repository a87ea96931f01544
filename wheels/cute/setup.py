"""What the wheel's settings cannot say: the version of rampwrap, as a requirement too, and a library for any Python."""

import pathlib

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution
from setuptools_scm import Configuration, get_version

ROOT = pathlib.Path(__file__).resolve().parents[2]
FALLBACK = Configuration.from_file(ROOT / "pyproject.toml").fallback_version
VERSION = get_version(root=ROOT, fallback_version=FALLBACK)


class Library(Distribution):
    """Not pure Python, though nothing is compiled here."""

    def has_ext_modules(self) -> bool:
        return True


class AnyPython(bdist_wheel):
    """The library asks the platform alone for something; no symbol of Python's is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=VERSION,
    install_requires=[f"rampwrap[triton]=={VERSION}", "apache-tvm-ffi>=0.1.10"],
    distclass=Library,
    cmdclass={"bdist_wheel": AnyPython},
)
