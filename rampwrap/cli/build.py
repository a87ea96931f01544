"""The command ``rampwrap build-kernels``: compiles our CuTe kernels ahead of time, on any machine with the CuTe DSL."""

import sys

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.several import Several
from rampwrap.cli.types import positive
from rampwrap.kernels.cute.build.build import build
from rampwrap.kernels.cute.configs import DTYPES, FORMS, all_variants


@attrs.frozen
class BuildRequest:
    """Which kernels are compiled, and where to."""

    out: str | None = None
    form: tuple[str, ...] = tuple(FORMS)
    dtype: tuple[str, ...] = tuple(DTYPES)
    processes: int | None = None
    quiet: bool = False


@command("build-kernels", BuildRequest)
@click.option("--out", metavar="DIR", help="by default where the adapter looks, below ~/.cache/rampwrap")
@click.option(
    "--form", cls=Several, type=click.Choice(FORMS), metavar=f"[{'|'.join(FORMS)}]...", help="launches of a layer"
)
@click.option("--dtype", cls=Several, type=click.Choice(DTYPES), metavar=f"[{'|'.join(DTYPES)}]...")
@click.option("--processes", type=positive, metavar="N", help="that compile; by default one for each CPU")
@click.option("--quiet", is_flag=True, help="no progress bar")
def build_kernels(its: BuildRequest) -> Answer:
    """Builds; what `Build` says, for people and as JSON."""
    from tqdm import tqdm

    with tqdm(unit="kernel", disable=its.quiet or not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = build(all_variants(its.form, its.dtype), its.out, processes=its.processes, progress=progress)
    return Answer(str(done), {**attrs.asdict(done), "library": str(done.library)})
