"""What all commands share: a typed request, ``--json``, and modules that load when a command is asked for."""

import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import attrs
import click

from rampwrap.cli.several import gathered

Request = TypeVar("Request", bound=attrs.AttrsInstance)
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Decorator(Protocol):
    """One option, or several, of a command."""

    def __call__(self, function: Decorated, /) -> Decorated:
        """Adds them to it."""
        ...


@attrs.frozen
class Answer:
    """What a command found, for people and as one JSON object, and its exit code."""

    text: str
    values: Mapping[str, Any]
    status: int = 0

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Answer":
        """Of values with their ``text`` among them."""
        return cls(found["text"], {key: value for key, value in found.items() if key != "text"})


class Command(click.Command):
    """A command that makes a request of its options; invoked, it does nothing yet but return what will answer it.

    Args:
        kind: the class of the request, which its function takes.
    """

    def __init__(self, *args: Any, kind: type[attrs.AttrsInstance], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.kind = kind
        self.params.append(click.Option(["--json", "as_json"], is_flag=True, help="print one JSON object"))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click, with options of several values."""
        return super().parse_args(ctx, gathered(args, self.get_params(ctx), ctx))

    def invoke(self, ctx: click.Context) -> Callable[[], tuple[str, int]]:
        """What to call for the text to print and the exit code."""
        as_json, answer = ctx.params.pop("as_json"), self.callback
        its = request(self.kind, ctx.params)
        assert answer is not None

        def answered() -> tuple[str, int]:
            found: Answer = answer(its)
            return json.dumps(found.values, default=float) if as_json else found.text, found.status

        return answered


class Commands(click.Group):
    """Commands by name, each a place (``module:object``) that is imported when the command is asked for, and a line of help."""

    def __init__(self, places: Mapping[str, tuple[str, str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the places."""
        return list(self.places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports it."""
        if cmd_name not in self.places:
            return None
        place, text = self.places[cmd_name]
        module, _, name = place.partition(":")
        found: click.Command = getattr(importlib.import_module(module), name)
        found.help = text
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, which does not know the names of what is not imported."""
        if args[0] not in self.places:
            near = difflib.get_close_matches(args[0], self.places, 1)
            advice = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(self.places)}."
            ctx.fail(f"No such command {args[0]!r}. {advice}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Their lines of help, without an import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.places.items()])


def command(name: str, kind: type[attrs.AttrsInstance]) -> Callable[[Callable[[Any], Answer]], Command]:
    """Makes a function of a request the command that builds it; its line of help stands with the group."""
    return click.command(name, cls=Command, kind=kind)


def options(*each: Decorator) -> Decorator:
    """Several of click's decorators as one, in the order of ``--help``."""

    def decorate(function: Decorated, /) -> Decorated:
        for option in reversed(each):
            function = option(function)
        return function

    return decorate


def request(kind: type[Request], given: Mapping[str, Any]) -> Request:
    """A request of the options that were given; requests inside it take theirs, and defaults stand in its class."""
    fields: dict[str, Any] = {}
    for field in attrs.fields(kind):
        if isinstance(field.type, type) and attrs.has(field.type) and field.name not in given:
            fields[field.name] = request(field.type, given)
        elif given.get(field.name) is not None:
            fields[field.name] = given[field.name]
    return kind(**fields)
