"""The dispatcher: the one code path between a user's call and a kernel's launch."""

import inspect
import pathlib
import warnings
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rampwrap import Device, Dispatcher, MoEShape, Plan
from rampwrap.errors import CaptureError, ConfigError, InputError, PlanMismatchError
from rampwrap.kernel.protocol import Config
from rampwrap.plan.make import make_plan
from rampwrap.policy.policies import Pinned, Static
from rampwrap.policy.static import StaticTable
from rampwrap.routing.counts import expert_counts
from rampwrap.routing.workloads import Routing, Workload
from rampwrap.testing.sim import SimKernel

H100 = Device("NVIDIA H100 80GB HBM3", 114)


class Recorder(SimKernel):
    """Remembers the configs it was launched with."""

    def __init__(self, shape: MoEShape, **options: Any) -> None:
        super().__init__(shape, **options)
        self.launched: list[Config] = []

    def launch(self, config: Config, topk_ids: Any) -> float:
        self.launched.append(config)
        return super().launch(config, topk_ids)


def ids(name: str = "zipf:1.2", tokens: int = 64) -> Any:
    return Workload(tokens, Routing.parse(name), seed=5).topk_ids(64, 8)


def test_a_call_launches_what_select_says(sim_plan: Plan) -> None:
    kernel = Recorder(sim_plan.shape)
    moe = Dispatcher(kernel, sim_plan)
    for tokens in (1, 64, 100, 512):
        for name in ("uniform", "dirichlet:0.1", "hot:2"):
            routed = ids(name, tokens)
            expected = moe.select(routed)
            assert moe(routed) == kernel.time_us(expected.config, expert_counts(routed, 64))
            assert moe(topk_ids=torch.from_numpy(routed)) == kernel.time_us(expected.config, expert_counts(routed, 64))
            assert kernel.launched[-2:] == [expected.config] * 2
            by_histogram = moe.select(expert_counts=expert_counts(routed, 64))
            assert by_histogram == expected
    assert sum(moe.launch_counts) == 24


@given(st.integers(0, 2**32 - 1), st.integers(1, 600))
def test_the_same_histogram_always_gives_the_same_choice(sim_plan: Plan, seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(tokens * 8, rng.dirichlet(np.full(64, 0.2)))
    policy = sim_plan.policy()
    first = policy.index(counts, tokens)
    assert policy.index(counts.copy(), tokens) == first == policy.select(counts, tokens).index
    # Only how the counts are distributed matters, not which expert has them.
    assert policy.index(rng.permutation(counts), tokens) == first


def test_an_empty_batch_runs_the_static_config(sim_plan: Plan) -> None:
    kernel = Recorder(sim_plan.shape)
    moe = Dispatcher(kernel, sim_plan)
    moe(np.zeros((0, 8), dtype=np.int32))
    assert kernel.launched == [sim_plan.configs[sim_plan.static.index(0)]]
    assert "no tokens" in moe.select(expert_counts=np.zeros(64, dtype=int)).why


def test_pinning(sim_plan: Plan) -> None:
    kernel = Recorder(sim_plan.shape)
    moe = Dispatcher(kernel, sim_plan).pin(kernel.configs[3])
    moe(ids())
    moe.pin(7)(ids())
    assert kernel.launched == [kernel.configs[3], kernel.configs[7]]
    assert "pinned: " in moe.explain(ids())
    moe.pin(None)(ids())
    assert kernel.launched[-1] == moe.select(ids()).config
    for bad in (99, {"block_m": 3}):
        with pytest.raises(ConfigError):
            moe.pin(bad)


def test_explain_says_what_ran_and_what_would(sim_plan: Plan) -> None:
    moe = Dispatcher(SimKernel(sim_plan.shape), sim_plan)
    assert moe.explain() == "sim: nothing launched yet"
    moe(ids())
    assert "sim: 1 launches" in moe.explain() and "100.0%" in moe.explain()
    text = moe.explain(ids())
    assert "predicted" in text and "waves" in text and "runner-up" in text


@pytest.mark.parametrize(
    ("routing", "named"),
    [
        ({"topk_ids": [[0] * 7 + [65]]}, "holds 65"),
        ({"topk_ids": [[0] * 7 + [-3]]}, "holds -3"),
        ({"topk_ids": [[0, 1]]}, r"shape \(1, 2\); give \[num_tokens, top_k\] with top_k=8"),
        ({"topk_ids": [0] * 8}, r"shape \(8,\)"),
        ({"topk_ids": [[0.5] * 8]}, "dtype float64"),
        ({"topk_ids": torch.zeros(1, 8)}, "dtype torch.float32"),
        ({"topk_ids": torch.zeros(1, 8, dtype=torch.bool)}, "dtype torch.bool"),
        ({"expert_counts": [1, 2]}, "shape"),
        ({"expert_counts": [-1] + [1] * 63}, "negative"),
        ({"expert_counts": [1] * 64, "num_tokens": 7}, "sums to 64, more than tokens x top_k = 56"),
        ({}, "no routing"),
    ],
)
def test_bad_routing_launches_nothing(sim_plan: Plan, routing: dict[str, Any], named: str) -> None:
    kernel = Recorder(sim_plan.shape)
    with pytest.raises(InputError, match=named):
        Dispatcher(kernel, sim_plan).select(**routing)
    if "topk_ids" in routing:
        with pytest.raises(InputError, match=named):
            Dispatcher(kernel, sim_plan)(**routing)
    assert not kernel.launched


def test_a_foreign_plan_serves_its_static_table_with_one_warning(sim_plan: Plan) -> None:
    kernel = Recorder(sim_plan.shape, device=H100)
    with pytest.warns(
        RuntimeWarning, match=r"GPU simulated .* but this is NVIDIA H100.*rampwrap profile --kernel sim"
    ) as seen:
        moe = Dispatcher(kernel, sim_plan)
        moe(ids())
    assert len(seen) == 1
    assert kernel.launched == [sim_plan.configs[sim_plan.static.index(64)]]
    with pytest.raises(PlanMismatchError):
        Dispatcher(kernel, sim_plan, strict=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kernel": "other"}, "kernel other"),
        ({"kernel_version": "0.9"}, "kernel version 0.9"),
        ({"shape": MoEShape(64, 8, 2048, 1024, "fp8")}, "dtype fp8"),
        ({"shape": MoEShape(64, 4, 2048, 1024)}, "shape E=64 top_k=4"),
    ],
)
def test_every_kind_of_mismatch_has_its_reason(sim_plan: Plan, change: dict[str, Any], named: str) -> None:
    plan = attrs.evolve(sim_plan, **change)
    with pytest.raises(PlanMismatchError, match=named):
        Dispatcher(SimKernel(sim_plan.shape), plan, strict=True)
    with pytest.warns(RuntimeWarning, match=named):
        assert isinstance(Dispatcher(SimKernel(sim_plan.shape), plan).policy, Static)


def test_a_plan_may_be_given_by_path(sim_plan: Plan, tmp_path: pathlib.Path) -> None:
    sim_plan.save(tmp_path / "plan.json")
    moe = Dispatcher(SimKernel(sim_plan.shape), tmp_path / "plan.json")
    assert moe.select(ids()) == Dispatcher(SimKernel(sim_plan.shape), sim_plan).select(ids())


def test_without_a_plan_the_kernels_default_runs(sim_kernel: SimKernel) -> None:
    assert "static table (default)" in Dispatcher(sim_kernel).select(ids()).why


def test_config_lists_are_checked_when_wrapping(sim_kernel: SimKernel) -> None:
    class Bad:
        name, shape = "bad", sim_kernel.shape
        configs: tuple[Config, ...] = ()
        grid, launch = sim_kernel.grid, sim_kernel.launch

    with pytest.raises(ConfigError, match="no configs"):
        Dispatcher(Bad())
    Bad.configs = ({"block_m": 16, "block_n": 64}, {"block_n": 64, "block_m": 16})
    with pytest.raises(ConfigError, match="twice"):
        Dispatcher(Bad())
    with pytest.raises(ConfigError, match=r"has no config block_m=1 .*; fit the policy"):
        Dispatcher(sim_kernel, Pinned(({"block_m": 1},), 0))


class Supporting(Recorder):
    """Lists two configs and runs any other with an even number of stages."""

    def __init__(self, shape: MoEShape) -> None:
        super().__init__(shape)
        self.configs = self.configs[:2]

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        return None if config["stages"] % 2 == 0 else f"stages={config['stages']} is odd."


def test_what_is_no_longer_listed_still_runs(sim_plan: Plan, tmp_path: pathlib.Path) -> None:
    """A plan of a longer list loads and chooses as it did, where the kernel supports its configs."""
    whole, kernel = Dispatcher(SimKernel(sim_plan.shape), sim_plan), Supporting(sim_plan.shape)
    assert len(sim_plan.configs) > 2 and all(config["stages"] % 2 == 0 for config in sim_plan.configs)
    sim_plan.save(tmp_path / "plan.json")
    moe = Dispatcher(kernel, tmp_path / "plan.json", strict=True)
    routed = [ids(name, tokens) for tokens in (1, 64, 512) for name in ("uniform", "dirichlet:0.1", "hot:2")]
    for its in routed:
        assert moe.select(its).config == whole.select(its).config and moe(its) == whole(its)
    assert any(config not in kernel.configs for config in kernel.launched)
    gone = next(config for config in sim_plan.configs if config not in kernel.configs)
    moe.pin(dict(gone))(routed[0])
    assert kernel.launched[-1] == gone
    with pytest.raises(ConfigError, match=r"no config .* \(stages=3 is odd\); pick one of kernel.configs"):
        moe.pin({**gone, "stages": 3})
    with pytest.raises(ConfigError, match="other keys or types"):
        moe.pin({**gone, "stages": "4"})
    odd = attrs.evolve(sim_plan, configs=tuple({**config, "stages": 3} for config in sim_plan.configs))
    with pytest.raises(PlanMismatchError, match=r"does not have \(stages=3 is odd\); make one with"):
        Dispatcher(kernel, odd, strict=True)
    with pytest.raises(PlanMismatchError, match=r"does not have \(it is not in the kernel's list\)"):
        cut = SimKernel(sim_plan.shape, sim_plan.configs[:1])
        Dispatcher(cut, sim_plan, strict=True)


def test_a_launch_without_topk_ids_is_refused(sim_kernel: SimKernel) -> None:
    class Blind(SimKernel):
        def launch(self, config: Config, x: Any) -> float:  # type: ignore[override]
            return 0.0

    with pytest.raises(InputError, match="topk_ids"):
        Dispatcher(Blind(sim_kernel.shape))


class _OnGpu:
    """Looks like a CUDA tensor, which a CPU cannot have."""

    is_cuda, shape, dtype = True, (64, 8), torch.int32

    def __len__(self) -> int:
        return 64

    def detach(self) -> Any:
        raise AssertionError("the host read the GPU")


def test_capture_with_host_selection_is_refused_and_static_never_reads_the_gpu(
    sim_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class Takes(Recorder):
        def launch(self, config: Config, topk_ids: Any) -> float:
            self.launched.append(config)
            return 0.0

    with pytest.raises(CaptureError, match="pin a config"):
        Dispatcher(Takes(sim_plan.shape), sim_plan)(_OnGpu())
    kernel = Takes(sim_plan.shape)
    Dispatcher(kernel, Static(sim_plan.configs, StaticTable("test", (1,), (2,))))(_OnGpu())
    Dispatcher(kernel, sim_plan).pin(1)(_OnGpu())
    assert kernel.launched == [sim_plan.configs[2], kernel.configs[1]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda kernel: Dispatcher(SimKernel),
            r"kernel is the class SimKernel; give an instance of it, SimKernel\(...\)",
        ),
        (lambda kernel: Dispatcher(lambda topk_ids: 0), "kernel is a function without name, configs, grid, launch"),
        (lambda kernel: Dispatcher(kernel, {"schema": 1}), "policy is a dict; give a Plan"),
        (lambda kernel: Dispatcher(kernel)(), "given 0 positional arguments and no topk_ids"),
        (lambda kernel: Dispatcher(kernel)(hidden_states=1), "0 positional arguments, hidden_states and no topk_ids"),
        (lambda kernel: Dispatcher(kernel).pin("block_m=16"), "pin was given 'block_m=16'"),
        (lambda kernel: Dispatcher(kernel)(np.zeros((4, 3), dtype=np.int64)), "top_k=8"),
        (lambda kernel: make_plan("t.npz"), "make_plan was given 't.npz'"),
        (lambda kernel: MoEShape("8", 2, 64, 64), "num_experts is '8'; give a whole number"),
        (lambda kernel: MoEShape(8.0, 2, 64, 64), "num_experts is 8.0"),
        (lambda kernel: MoEShape(8, True, 64, 64), "top_k is True"),
        (lambda kernel: MoEShape(8, 2, 64, 64, num_local_experts=2.5), "num_local_experts is 2.5"),
    ],
)
def test_first_mistakes_get_a_sentence(sim_plan: Plan, call: Any, named: str) -> None:
    with pytest.raises((InputError, ConfigError), match=named):
        call(SimKernel(sim_plan.shape))


def test_a_routing_may_be_text() -> None:
    named = Workload(4, "zipf:1.2")
    assert named == Workload(4, Routing.parse("zipf:1.2")) and named.topk_ids(64, 8).shape == (4, 8)


def test_wrapping_warns_of_nothing_when_the_plan_fits(sim_plan: Plan) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dispatcher(SimKernel(sim_plan.shape), sim_plan)(ids())


def test_topk_ids_is_found_wherever_launch_has_it(sim_plan: Plan) -> None:
    class Late(SimKernel):
        def launch(self, config: Config, hidden_states: Any, topk_weights: Any, topk_ids: Any) -> float:  # type: ignore[override]
            return super().launch(config, topk_ids)

    assert list(inspect.signature(Late.launch).parameters)[-1] == "topk_ids"
    moe = Dispatcher(Late(sim_plan.shape), sim_plan)
    assert moe(None, None, ids()) == moe(None, None, topk_ids=ids()) > 0
