"""Options of several values, and what click would do with them."""

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.cli.several import Several, gathered

PARAMETERS: list[click.Parameter] = [
    Several(["--tokens", "-t"], type=int),
    Several(["--none"], empty=True),
    click.Option(["--out"]),
    click.Option(["--quiet"], is_flag=True),
    click.Argument(["tables"], nargs=-1),
]
COMMAND = click.Command("test", params=PARAMETERS)
VALUES = st.text(st.characters(exclude_characters="\0", codec="utf-8")).filter(lambda text: text[:1] != "-")


def parsed(*arguments: str) -> dict[str, object]:
    context = click.Context(COMMAND)
    COMMAND.parse_args(context, gathered(arguments, PARAMETERS, context))
    return {name: value for name, value in context.params.items() if value not in (None, False, ())} | (
        {"none": ()} if context.params["none"] == () else {}
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("--tokens 1 2 3", {"tokens": (1, 2, 3)}),
        ("-t 1 2 --quiet", {"tokens": (1, 2), "quiet": True}),
        ("a b --tokens 1 -5", {"tables": ("a", "b"), "tokens": (1, -5)}),
        ("--tokens 1 2 --out x a", {"tokens": (1, 2), "out": "x", "tables": ("a",)}),
        ("--tokens=1 a", {"tokens": (1,), "tables": ("a",)}),
        ("--tokens 1 2 -- 3", {"tokens": (1, 2), "tables": ("3",)}),
        ("--tokens 1 2 --tokens 3", {"tokens": (3,)}),
        ("--none --quiet", {"none": (), "quiet": True}),
        ("--none", {"none": ()}),
        ("--none a - --out=--quiet", {"none": ("a", "-"), "out": "--quiet"}),
        ("-- --tokens 1", {"tables": ("--tokens", "1")}),
        ("", {}),
    ],
)
def test_values_go_up_to_the_next_option(line: str, found: dict[str, object]) -> None:
    assert parsed(*line.split()) == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--tokens --quiet", "'--tokens' requires a value"),
        ("-t", "'-t' requires a value"),
        ("--out --quiet", "'--out' requires a value"),
        ("--tokens 1 x", "'x' is not a valid integer"),
        ("--tokns 1", "--tokens"),
    ],
)
def test_what_is_wrong_is_named(line: str, said: str) -> None:
    with pytest.raises(click.UsageError) as raised:
        parsed(*line.split())
    assert said in raised.value.format_message()


@given(st.lists(VALUES))
def test_any_values_arrive_as_they_were(values: list[str]) -> None:
    assert parsed("--none", *values)["none"] == tuple(values)
