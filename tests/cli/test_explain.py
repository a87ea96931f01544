"""`rampwrap explain` tells what a `Dispatcher` would launch, beyond what was profiled too."""

import json
import pathlib
from typing import Any

import attrs
import numpy as np
import pytest

from rampwrap.cli.main import main
from rampwrap.dispatch.host import Dispatcher
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import Plan
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.sim import SimKernel

FAR = 100_000
"Tokens beyond the reach of any plan here."


class Own(SimKernel):
    """The simulated kernel with a default of its own, which no trend would name."""

    def default_config(self, num_tokens: int) -> Config:
        return self.configs[-1]


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    assert main(["explain", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.fixture
def saved(sim_plan: Plan, tmp_path: pathlib.Path) -> str:
    sim_plan.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


@pytest.mark.parametrize("kernel", [SimKernel, Own])
@pytest.mark.parametrize("tokens", [64, FAR])
@pytest.mark.parametrize("routing", ["uniform", "hot:1"])
def test_it_is_what_dispatch_launches(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    saved: str,
    sim_plan: Plan,
    kernel: type[SimKernel],
    tokens: int,
    routing: str,
) -> None:
    monkeypatch.setattr("rampwrap.testing.sim.SimKernel", kernel)  # where the catalogue finds "sim"
    told, _ = explained(capsys, saved, "--batch-size", str(tokens), "--routing", routing)
    moe = Dispatcher(kernel(sim_plan.shape), sim_plan)
    moe(Workload(tokens, Routing.parse(routing)).topk_ids(64, 8))
    assert told["config"] == moe.policy.configs[moe.launch_counts.index(1)]
    if tokens == FAR:
        assert (told["config"] == Own(sim_plan.shape).configs[-1]) == (kernel is Own)


def test_fewer_active_experts_than_any_workload_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saved: str, sim_plan: Plan
) -> None:
    monkeypatch.setattr("rampwrap.testing.sim.SimKernel", Own)
    counts = np.zeros(64, dtype=np.int64)
    counts[:1] = 512
    told, _ = explained(capsys, saved, "--expert-counts", ",".join(map(str, counts)), "--batch-size", "64")
    assert told["config"] == Own(sim_plan.shape).configs[-1] and "fewer active experts" in told["why"]
    assert told["config"] == Dispatcher(Own(sim_plan.shape), sim_plan).policy.select(counts, 64).config


def test_a_kernel_that_is_not_here_is_said_and_no_config_is_claimed(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, sim_plan: Plan
) -> None:
    path = str(tmp_path / "plan.json")
    attrs.evolve(sim_plan, kernel="theirs").save(path)
    told, _ = explained(capsys, path, "--batch-size", "64", str(FAR))
    near, far = told["choices"]
    assert near["config"] == sim_plan.configs[near["index"]] and "theirs" not in near["why"]
    assert far["config"] is None and far["index"] is None and "kernel 'theirs' is unknown" in far["why"]
    assert "the kernel's own default serves" in far["why"] and "trend" not in far["why"]
    assert main(["explain", path, "--batch-size", str(FAR)]) == 0
    assert capsys.readouterr().out.startswith("beyond the profiled batches")
    assert main(["explain", path, "--batch-size", "64", "--kernel", "theirs"]) == 1


def test_a_plan_that_dispatch_refuses_is_explained_as_what_serves(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, sim_plan: Plan
) -> None:
    path = str(tmp_path / "plan.json")
    attrs.evolve(sim_plan, kernel_version="0").save(path)
    told, said = explained(capsys, path, "--batch-size", str(FAR))
    assert "static table" in told["why"] and said.startswith(
        "rampwrap: rampwrap serves static configs: the plan was made"
    )


def test_the_kernel_is_imported_only_where_the_plan_does_not_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    made: list[MoEShape] = []
    monkeypatch.setattr("rampwrap.testing.sim.SimKernel", lambda shape: made.append(shape) or SimKernel(shape))
    explained(capsys, saved, "--batch-size", "64")
    assert not made
    explained(capsys, saved, "--batch-size", str(FAR))
    assert len(made) == 1


def test_what_the_ragged_form_would_do(capsys: pytest.CaptureFixture[str], saved: str, sim_plan: Plan) -> None:
    """Widths of the experts, a share for each SM, a time that is called a prediction; the plan's answer is unchanged."""
    counts = [0] * 60 + [1, 9, 300, 330]
    asked = (saved, "--expert-counts", ",".join(map(str, counts)))
    plain, _ = explained(capsys, *asked)
    told, _ = explained(capsys, *asked, "--ragged")
    ragged = told.pop("ragged")
    assert told == plain and ragged["predicted"] is True
    assert sim_plan.shape.dtype == "bf16"
    most = ragged["config"]["block_m"]
    full = [*(300 // most * [most]), *(330 // most * [most])]
    assert ragged["widths"][:62] == [[]] * 60 + [[8], [16]] and ragged["tiles"][str(most)] >= len(full)
    for gemm in ("up_us", "down_us"):
        assert len(ragged[gemm]) == sim_plan.device.num_sms and 0 < max(ragged[gemm]) < ragged["us"]
    assert 0 < ragged["roofline_share"] < 1
    assert main(["explain", *asked, "--ragged"]) == 0
    out = capsys.readouterr().out
    assert (
        "as predicted: bf16_m" in out and "% of the roofline" in out and "60 without tokens, 1 of 8, 1 of 16, " in out
    )


def test_a_layer_without_a_plan_is_served_by_the_cute_kernels_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a GPU nor a library is asked for; where the ragged form serves, what it should do is told."""
    asked = ("--model", "qwen3-30b", "--dtype", "fp8", "--batch-size", "1", "256", "4096", "--routing", "dirichlet:0.1")
    told, _ = explained(capsys, *asked, "--device", "h100")
    one, ragged, prefill = told["choices"]
    assert [its["config"]["form"] for its in (one, ragged, prefill)] == ["one", "ragged", "prefill"]
    assert "ragged" not in one and "ragged" not in prefill and 0.3 < ragged["ragged"]["roofline_share"] < 1
    assert (
        ragged["ragged"]["config"]["block_m"] == ragged["config"]["block_m"] and len(ragged["ragged"]["widths"]) == 128
    )
    faster, _ = explained(capsys, *asked, "--device", "h200", "--ragged")
    assert all("ragged" in its for its in faster["choices"])
    assert faster["choices"][1]["ragged"]["us"] < 0.85 * ragged["ragged"]["us"]
    far, _ = explained(capsys, "--model", "gpt-oss-120b", "--batch-size", "8")
    assert "engines pass over" in far["why"] and far["config"]["form"] == "two"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((), "no layer; pass a plan, or --model"),
        (("--model", "olmoe"), "no routing; pass"),
        (("--model", "olmoe", "--kernel", "sim"), "without a plan leave it out"),
        (("--model", "olmoe", "--device", "a100"), "do not run on NVIDIA A100"),
        (("--model", "olmoe", "--dtype", "fp16"), "do not run dtype fp16"),
        (("--model", "olmoe", "--dtype", "fp8", "--scales", "channel"), "do not run scales=channel"),
        (("PLAN", "--device", "h100"), "is of a layer on a GPU; leave out --device"),
        (("PLAN", "--dtype", "fp8"), "is of a layer on a GPU; leave out --device"),
    ],
)
def test_what_cannot_be_explained(
    capsys: pytest.CaptureFixture[str], saved: str, asked: tuple[str, ...], message: str
) -> None:
    its = [saved if part == "PLAN" else part for part in asked]
    assert main(["explain", *its, *(() if message.startswith("no routing") else ("--batch-size", "8"))]) == 1
    assert message in capsys.readouterr().err
