"""`RAMPWRAP_METRICS`: an endpoint for Prometheus in each process that launches, without a line of code.

    RAMPWRAP_METRICS=9400              port 9400 of every interface
    RAMPWRAP_METRICS=127.0.0.1:9400    of one

An engine's workers are processes of their own and inherit the variable: each takes the first free port from there on, and
says which in the log.
"""

import errno
import logging
import os

from rampwrap.errors import InputError

ADDRESS = "RAMPWRAP_METRICS"
MOST_PORTS = 64
"Ports that are tried: more than the workers of one host."

_log = logging.getLogger("rampwrap")
_started_in: int | None = None
"The process that has an endpoint. A fork inherits the number and not the thread."


def start() -> int | None:
    """Starts this process's endpoint, once, where $RAMPWRAP_METRICS asks for it. What goes wrong is said and stops nothing.

    Returns:
        Its port; None where there is none, or it was there before.
    """
    global _started_in
    given = os.environ.get(ADDRESS, "").strip()
    if not given or _started_in == os.getpid():
        return None
    _started_in = os.getpid()
    try:
        host, port = _parsed(given)
        taken = _listening(host, port)
    except InputError as error:
        _log.warning("rampwrap serves no metrics: %s", error)
        return None
    _log.warning("rampwrap serves metrics of process %d at http://%s:%d/metrics.", os.getpid(), host, taken)
    return taken


def _parsed(given: str) -> tuple[str, int]:
    host, _, port = given.rpartition(":")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise InputError(f"{ADDRESS}={given} names no port; give one, as in 9400 or 127.0.0.1:9400.")
    return host.strip("[]") or "0.0.0.0", int(port)


def _listening(host: str, first: int) -> int:
    from rampwrap.observe.metrics import listen

    ports = range(first, min(first + MOST_PORTS, 1 << 16))
    for port in ports:
        try:
            listen(port, host)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(
                    f"{ADDRESS} asks for {host}:{port}, which cannot be had ({error.strerror or error}); give another."
                ) from error
        else:
            return port
    raise InputError(f"ports {ports[0]} to {ports[-1]} are all taken; set {ADDRESS} to another first port.")
