"""What a table makes: the whole plan of the simulated one, and how its policies fare, are those on record."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from rampwrap.compare.evaluate import replay
from rampwrap.measure.timings import Timings
from rampwrap.plan.plan import Plan


def test_the_plan(sim_plan: Plan, tmp_path: pathlib.Path, is_recorded: Callable[[str, Any], None]) -> None:
    """Configs, static table, buckets, spans, candidates, and every coefficient of its model."""
    sim_plan.save(tmp_path / "a.plan.json")
    made = json.loads((tmp_path / "a.plan.json").read_text())
    del made["checksum"], made["provenance"]["made"], made["provenance"]["rampwrap"]
    is_recorded("sim_plan", made)


def test_the_published_form(sim_timings: Timings, is_recorded: Callable[[str, Any], None]) -> None:
    """The figures of `ramp4` and of the static tables on held-out rows."""
    found = replay(sim_timings, models=("ramp4",)).to_dict()
    del found["fit_seconds"]
    is_recorded("sim_replay", found)
