"""The command ``rampwrap profile`` and its options."""

import click

from rampwrap.cli import profiling
from rampwrap.cli.command import Answer, command
from rampwrap.cli.layer import layer_options, rank_options
from rampwrap.cli.measuring import measuring_options
from rampwrap.cli.profile_request import ENGINES, ProfileRequest
from rampwrap.cli.types import positive, seconds
from rampwrap.cli.workloads import (
    limit_option,
    recorded_option,
    routings_option,
    seed_option,
    tokens_option,
)
from rampwrap.kernel import catalog


@command("profile", ProfileRequest)
@click.option(
    "--kernel",
    help=f"{', '.join(catalog.KERNELS)}, portfolio:a+b of them, or package.module:factory; by default triton_fused_moe, "
    "with --engine vllm the fastest one that runs here",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="profile all MoE shapes of the model in the folder --model and write its plans",
)
@layer_options
@rank_options
@tokens_option()
@routings_option()
@seed_option
@tokens_option("--eval-batch-size", "held-out token counts", empty=True)
@routings_option("--eval-routing", "held-out routings", empty=True)
@recorded_option()
@recorded_option("--eval-recorded", ", held out")
@limit_option
@measuring_options
@click.option("--budget", type=seconds, metavar="3m", help="measure only the cells that matter, within this time")
@click.option(
    "--most-configs",
    type=positive,
    metavar="N",
    help="keep N configs of each kernel after a short sweep; all by default; with --engine and no --budget 24, in 3 rounds",
)
@click.option(
    "--ignore-engine",
    is_flag=True,
    help="profile although the hook would leave the engine that is installed here as it is",
)
@click.option("--dry-run", is_flag=True, help="say what would be measured, and for how long")
@click.option("--out", metavar="TABLE.npz")
def profile(its: ProfileRequest) -> Answer:
    """Profiles into a table, or a model's layers into plans."""
    return profiling.run(its)
