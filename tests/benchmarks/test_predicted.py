"""The race over the prediction: histograms drawn again are those that raced, and a layer is near what is predicted."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.errors import InputError
from rampwrap.kernel.shape import SHAPES


def test_a_layer_is_near_what_is_predicted(script, monkeypatch, capsys):
    its = script("predicted")
    monkeypatch.setattr("sys.argv", ["predicted.py", "--layers", "olmoe:fp8"])
    its.main()
    assert "| olmoe:fp8 |" in capsys.readouterr().out
    race = json.loads(its.RACE.read_text())["races"]["olmoe:fp8"]
    found = its.ratios("olmoe:fp8", race)
    assert {tokens for tokens, _ in found} == {64, 256} and len(found) == len(race["rows"] + race["changing"])
    assert abs(np.log([ratio for _, ratio in found]).mean()) < 0.03


def test_another_histogram_than_raced_is_refused(script):
    row = {"label": "M=4 uniform", "tokens": 4, "active_experts": 1, "slots": 32}
    with pytest.raises(InputError, match="drawn otherwise"):
        script("predicted").counts_of(row, SHAPES["olmoe"])
    assert script("predicted").counts_of(row | {"label": "M=4 trace"}, SHAPES["olmoe"]) is None
