"""An engine's own modules out of a wheel's Python sources, without what the engine requires: the rest of it stands in.

Imported, an engine brings hundreds of modules and forty packages. The functions that our hooks meet need a dozen modules. So
`install` answers for every other module of the engine: names in capitals are empty classes, a call without arguments is False
(no ROCm, no micro-batches, no batch invariance), a decorator leaves what it decorates.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from collections.abc import Collection

import torch


class Anything:
    """Stands for a value that nothing depends on."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        if not args and not kwargs:
            return False
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, key):
        return Anything()

    def __or__(self, other):
        return Anything()

    __ror__ = __or__

    def __bool__(self):
        return False


class Class(type):
    """Of classes that stand in: they have every constant, and may be given parameters."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(cls, key):
        return cls


class Module(types.ModuleType):
    """Stands for a module: has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = Class(name, (), {}) if name[0].isupper() and not name.isupper() else Anything()
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for all of a package: with its files for the modules in `real`, else with a stand-in."""

    def __init__(self, root: pathlib.Path, real: Collection[str]):
        self.root, self.real = root, real

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != self.root.name:
            return None
        where = self.root.joinpath(*name.split(".")[1:])
        if name in self.real:
            for file, inside in ((where.with_suffix(".py"), None), (where / "__init__.py", [str(where)])):
                if file.is_file():
                    return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        module.__path__ = [str(self.root.joinpath(*module.__name__.split(".")[1:]))]


def install(root: pathlib.Path, real: Collection[str]) -> None:
    """Makes an import of the package in the folder `root` find the files of the modules `real`, and stand-ins for others."""
    # It decorates a few helpers, and takes 3 s to import.
    torch.compile = lambda model=None, **options: model or (lambda its: its)
    sys.meta_path.insert(0, Finder(root, real))
