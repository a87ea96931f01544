"""Names of kernels as strings, so that plans may know them: of one, and of several seen as one."""

from collections.abc import Sequence

PREFIX = "portfolio:"
"What a portfolio's name begins with; its members' names follow, joined by a plus sign."


def joint_name(names: Sequence[str]) -> str:
    """The name of the portfolio of these kernels."""
    return PREFIX + "+".join(names)


def joint_version(versions: Sequence[str]) -> str:
    """Its version: that of every member."""
    return "+".join(versions)


def members_of(name: str) -> tuple[str, ...]:
    """The names of a portfolio's members by its own; none where it is no portfolio's name."""
    return tuple(name.removeprefix(PREFIX).split("+")) if name.startswith(PREFIX) else ()
