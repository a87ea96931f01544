"""Each test of what is observed sees its own sources alone."""

import gc
import threading
from collections.abc import Iterator

import pytest

from rampwrap.observe import registry as observe


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sources, warnings and log of this test only."""
    gc.collect()
    for name in ("_sources", "_said"):
        monkeypatch.setattr(observe, name, type(getattr(observe, name))())
    monkeypatch.setattr(observe, "_running", None)
    monkeypatch.setattr(observe, "_reading", threading.Lock())
    monkeypatch.delenv("RAMPWRAP_STATS", raising=False)
    yield
    if observe._running is not None:
        observe._running.stop()
        observe._running.join(5)
