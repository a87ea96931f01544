"""What an A/B is made against besides, and where its result goes."""

import os
import pathlib
from collections.abc import Collection
from typing import Any

import attrs
import click

from rampwrap.cli.command import Answer, options
from rampwrap.cli.several import Several
from rampwrap.compare import report
from rampwrap.compare.evaluate import Comparison


def is_picture(request: Any, attribute: "attrs.Attribute[Any]", path: str | None) -> None:
    """A validator: a type of picture that can be drawn, asked before anything is measured."""
    if path:
        report.picture_type(path)


@attrs.frozen
class ReportRequest:
    """What is compared with besides, and what is written of the comparison."""

    static_file: tuple[str, ...] = ()
    csv: str | None = None
    plot: str | None = attrs.field(default=None, validator=is_picture)

    def answer(self, comparison: Comparison) -> Answer:
        """Writes the files that were asked for."""
        if self.csv:
            report.save_text(report.csv_text(comparison), self.csv)
        if self.plot:
            report.picture(comparison, self.plot)
        return Answer(report.text(comparison), comparison.to_dict())

    def files(self, taken: Collection[str]) -> dict[str, str]:
        """Names of tuned files as policies; the folder tells those of one name apart, as SGLang's by version of Triton."""
        named: dict[str, str] = {}
        for path in dict.fromkeys(map(os.path.normpath, self.static_file)):
            parts, stem = list(pathlib.Path(path).absolute().parts[:-1]), pathlib.Path(path).name.removesuffix(".json")
            name = f"static {stem}"
            while (name in named or name in taken) and parts:
                stem = f"{parts.pop().strip('/')}/{stem}"
                name = f"static {stem}"
            named[name] = path
        return named


report_options = options(
    click.option(
        "--static-file",
        cls=Several,
        metavar="JSON...",
        help="tuned files of vLLM, SGLang or Alpha-MoE to compare with",
    ),
    click.option("--csv", metavar="FILE", help="write one line a workload and policy"),
    click.option("--plot", metavar="FILE", help="draw the speedups (needs matplotlib)"),
)
