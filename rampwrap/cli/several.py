"""Options of several values, all up to the next option: ``--batch-size 64 96 192``. click's own take a fixed number."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import click

_MARK = "\0"
"Begins each of the values that travel through click as one; no argument of a process can hold it."


class Several(click.Option):
    """A tuple of values of one type.

    Args:
        empty: whether the option may stand without values.
    """

    def __init__(self, *args: Any, empty: bool = False, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.empty = empty

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Each value, of what `gathered` made one."""
        if not isinstance(value, str):  # not given
            return super().type_cast_value(ctx, value)
        return tuple(self.type(part, self, ctx) for part in value.split(_MARK)[1:])


def gathered(arguments: Sequence[str], parameters: Iterable[click.Parameter], ctx: click.Context) -> list[str]:
    """The command line with all values of an option of several as one argument; given twice, the last counts.

    Raises:
        click.UsageError: an option stands without its value. click would take the next option for it.
    """
    options = {name: its for its in parameters if isinstance(its, click.Option) for name in its.opts}
    rest, found = list(arguments), list[str]()
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        option = options.get(name)
        if argument == "--":
            return [*found, argument, *rest]
        if option is None or option.is_flag:
            found.append(argument)
            continue
        several = isinstance(option, Several)
        values = [value] if equals else []
        while rest and not equals and not _names_option(rest[0]) and (several or not values):
            values.append(rest.pop(0))
        if not values and not (isinstance(option, Several) and option.empty):
            raise click.BadOptionUsage(name, f"Option {name!r} requires a value.", ctx)
        found += [name, "".join(_MARK + its for its in values) if several else values[0]]
    return found


def _names_option(text: str) -> bool:
    return text[:1] == "-" and len(text) > 1 and not re.match(r"-\.?\d", text)
