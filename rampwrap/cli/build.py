"""The command ``rampwrap build-kernels``: compiles our CuTe kernels ahead of time, on any machine with the CuTe DSL."""

import argparse
import sys
from typing import Any

import attrs

from rampwrap.kernels.cute.build.build import Build, build
from rampwrap.kernels.cute.configs import DTYPES, FORMS, all_variants

TEXT = "compile the CuTe kernels of every config into one library; needs no GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", metavar="DIR", help="by default where the adapter looks, below ~/.cache/rampwrap")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="launches of a layer")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--processes", type=_positive, metavar="N", help="that compile; by default one for each CPU")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Builds; what `Build` says, for people and as JSON."""
    from tqdm import tqdm

    with tqdm(unit="kernel", disable=a.quiet or not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = build(all_variants(a.form, a.dtype), a.out, processes=a.processes, progress=progress)
    return {**_plain(done), "text": str(done)}


def _plain(done: Build) -> dict[str, Any]:
    return {**attrs.asdict(done), "library": str(done.library)}
