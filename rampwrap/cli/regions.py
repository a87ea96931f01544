"""The command ``rampwrap regions``: where a property of a kernel's configs helps, from hardware constants alone."""

import attrs
import click

from rampwrap.cli.command import Answer, command
from rampwrap.cli.layer import LayerRequest, layer_options, shape_name
from rampwrap.cli.reporting import is_picture
from rampwrap.cli.workloads import tokens_option
from rampwrap.compare.regions import run
from rampwrap.kernel.device import find_device
from rampwrap.kernel.shape import SHAPES


@attrs.frozen
class RegionsRequest:
    """Which layers, batches and device."""

    layer: LayerRequest = attrs.field(factory=LayerRequest)
    device: str = "h200"
    batch_size: tuple[int, ...] = (8, 256, 4096)
    plot: str | None = attrs.field(default=None, validator=is_picture)


@command("regions", RegionsRequest)
@layer_options
@click.option("--device", help="a known GPU, h200 by default")
@tokens_option()
@click.option("--plot", metavar="FILE", help="draw the regions (needs matplotlib)")
def regions(its: RegionsRequest) -> Answer:
    """The regions of one layer, or of all known ones."""
    shapes = SHAPES
    if its.layer.named:
        shape = its.layer.shape()
        shapes = {its.layer.model or shape_name(shape): shape}
    return Answer.of(run(shapes, find_device(its.device), its.batch_size, its.plot))
