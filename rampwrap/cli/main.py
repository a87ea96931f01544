"""The command ``rampwrap``: a group of commands, each of which builds a request and hands it to a function.

Exit codes: 0 done, 1 a one-sentence error or layers that are not served, 2 wrong usage, 130 interrupted.
"""

import os
import sys
from collections.abc import Callable, Sequence

import click

from rampwrap._version import __version__
from rampwrap.cli.command import Commands
from rampwrap.errors import RampwrapError

PLACES = {
    "profile": (
        "rampwrap.cli.profile:profile",
        "time every config on every workload; resumes where a killed run stopped",
    ),
    "doctor": (
        "rampwrap.cli.doctor:doctor",
        "which layers of a model rampwrap would serve in an engine, why not the others, and the command that makes a plan",
    ),
    "fit": ("rampwrap.cli.plans:fit", "fit a timing table and write the plan a deployment loads"),
    "show": ("rampwrap.cli.plans:show", "what a plan or a timing table holds"),
    "seal": (
        "rampwrap.cli.plans:seal",
        "accept a plan or timing table that you edited by hand: check it whole, renew its checksum",
    ),
    "explain": ("rampwrap.cli.explain:explain", "which config a routing would get, and why"),
    "compare": ("rampwrap.cli.compare:compare", "A/B on the live kernel: routing-aware against static"),
    "replay": ("rampwrap.cli.replay:replay", "the same A/B on a timing table, without a GPU"),
    "ep": (
        "rampwrap.cli.ep:ep",
        "what a layer over several ranks takes: memory, and the path of its rows by number of tokens",
    ),
    "place": (
        "rampwrap.cli.place:place",
        "which rank gets which expert, so that the slowest rank's predicted time is least",
    ),
    "build-kernels": (
        "rampwrap.cli.build:build_kernels",
        "compile the CuTe kernels of every config into one library; needs no GPU",
    ),
    "regions": (
        "rampwrap.cli.regions:regions",
        "where swizzle, split-K and wide tiles help, from hardware constants alone",
    ),
}
"Where each command is, and its line of help."

COMMANDS = click.version_option(__version__, message="%(version)s")(
    Commands(
        PLACES,
        name="rampwrap",
        help="Profiles MoE kernels, and launches at each step the config that is fastest for its expert histogram.",
        no_args_is_help=True,
        context_settings={"max_content_width": 100},
    )
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Raises:
        SystemExit: there is none to run: after ``--help``, ``--version`` and wrong usage.
    """
    try:
        answer = _parsed(sys.argv[1:] if argv is None else argv)
        return _printed(*answer())
    except RampwrapError as error:
        print(f"rampwrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rampwrap: interrupted.", file=sys.stderr)
        return 130


def _parsed(arguments: Sequence[str]) -> Callable[[], tuple[str, int]]:
    """What a command line asks for. click's own `main` would end the process also where a command is interrupted."""
    try:
        with COMMANDS.make_context("rampwrap", list(arguments)) as context:
            answer: Callable[[], tuple[str, int]] = COMMANDS.invoke(context)
            return answer
    except click.exceptions.Exit as ended:
        raise SystemExit(ended.exit_code) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # of --help and --version, which print
        raise SystemExit(_unwritten(error)) from None


def _printed(text: str, status: int) -> int:
    """Prints a command's answer; returns the exit code."""
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)
        return status
    except OSError as error:
        return _unwritten(error)


def _unwritten(error: OSError) -> int:
    # What is still in the buffer is written again at exit, where nobody catches that.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # The reader of our output left (`rampwrap show ... | head`): not an error of ours.
    if isinstance(error, BrokenPipeError):
        return 0
    print(f"rampwrap: the answer cannot be written ({error.strerror}); free some space there.", file=sys.stderr)
    return 1
