"""What the command line reads: durations, counts and histograms, each refused with how to write it."""

import click


def seconds(text: str) -> float:
    """Reads ``90``, ``90s``, ``3m`` or ``1h``."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        value = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise click.BadParameter(f"{text!r} is no duration; write 90s, 3m or 1h.")
    return value


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise click.BadParameter(f"{text!r} is not a whole number of at least 1.")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Reads ``3,0,5``; whether it fits the layer is for the command to say."""
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers; write 3,0,5,...") from None
