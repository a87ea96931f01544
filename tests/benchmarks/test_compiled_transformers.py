"""What `compiled_transformers.py` makes of its measurements; the models themselves take a GPU, or minutes."""

import argparse
import math
import types

import pytest
import torch


@pytest.fixture
def its(script):
    return script("compiled_transformers")


def test_the_ends_of_the_range_come_first(its):
    arguments = argparse.Namespace(batch_size=[1, 4, 16, 64], parts=["decode", "prefill"])
    assert [batch for what, batch in its.cells(arguments) if what == "decode"] == [1, 64, 4, 16]
    assert its.cells(arguments)[:2] == [("decode", 1), ("prefill", 1)]


def test_kernels_count_within_a_step_and_once(its):
    """The kernel before a step is none of it; two that overlap take the time of both together."""

    def event(name, start, end, gpu=True):
        kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
        return types.SimpleNamespace(
            name=name, device_type=kind, time_range=types.SimpleNamespace(start=start, end=end)
        )

    events = [event(its.STEP, 10, 30, gpu=False), event(its.STEP, 50, 60, gpu=False), event(its.STEP, 12, 28)]
    events += [event("a", 5, 9), event("a", 12, 18), event("b", 15, 20), event("a", 52, 56), event("c", 40, 45)]
    events += [event("## compiled", 11, 29, gpu=False), event("## compiled", 12, 29)]
    assert its.busy_us(events) == (8 + 4) / 2
    assert math.isnan(its.busy_us([]))


def test_rows_that_took_another_token_are_not_compared(its):
    want = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).clone()
    found = want.clone()
    found[0, 1], found[1, 1] = torch.tensor([1.0, 0.0, 0.0]), 9.0
    assert its.difference(found, want, "decode") == 0
    assert its.difference(want[:, :1] * 1.5, want[:, :1], "prefill") == pytest.approx(0.5)


def test_a_report_has_worst_cell_and_mean(its, capsys):
    def row(arm, batch, us):
        return {
            "model": "m",
            "what": "decode",
            "arm": arm,
            "batch": batch,
            "gpu_us": us,
            "tokens_per_s": 100 / us,
            "off": 0,
        }

    rows = [row("grouped_mm", 1, 10.0), row("rampwrap", 1, 8.0), row("grouped_mm", 4, 10.0), row("rampwrap", 4, 12.5)]
    gains = its.report(rows, argparse.Namespace(models=["m"], arms=["grouped_mm", "rampwrap"]))
    assert gains == {
        "m decode rampwrap over grouped_mm": pytest.approx(
            {"worst": 0.8, "mean": 1.0, "tokens/s worst": 0.8, "tokens/s mean": 1.0}
        )
    }
    assert "1.250x" in capsys.readouterr().out
