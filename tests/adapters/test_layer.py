"""What `LayerKernel` gives a backend: the signature that it shows, the checks, inputs and reference."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from rampwrap.adapters.layer import CandidateKernel, LayerKernel, check_blocks, check_workspace, launch_each, runnable
from rampwrap.dispatch.graph import chooses_in_graph
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import Contract, Operands

SHAPE = MoEShape(4, 2, 128, 128)
TENSORS = ["hidden_states", "w13", "w2", "topk_weights", "topk_ids"]


class Plain(LayerKernel):
    """Notes what it is asked to run."""

    name, version = "plain", "1"
    without = ("w13_scale", "w2_scale", "out")

    def __init__(self, shape=SHAPE, contract=True):
        usable = runnable(self.name, shape, [{"block_m": 16}, {"block_m": 64}, {"block_m": 24}], self.supports)
        super().__init__(shape, usable, Contract(shape) if contract else None)
        self.calls = []

    def supports(self, config, shape):
        return "block_m=24 is odd; use 16." if config["block_m"] == 24 or shape.hidden_size != 128 else None

    def grid(self, config, shape):
        return CtaGrid(config["block_m"], 1)

    def run(self, config, operands, /, *, speed=1):
        self.calls.append((config, speed))
        return operands.hidden_states * speed


class Chooser(CandidateKernel):
    """Runs candidates too."""

    name, version = "chooser", "1"

    def __init__(self, shape=SHAPE):
        super().__init__(shape, [{"block_m": 16}, {"block_m": 64}], Contract(shape))

    def supports(self, config, shape):
        return None if config["block_m"] in (16, 64) else f"block_m={config['block_m']} is not compiled; use 16."

    def run(self, config, operands, /, *, workspace=None):
        return operands.output().fill_(config["block_m"])

    def run_candidates(self, configs, blocks, choice, operands, /, *, streams=()):
        return operands.output().fill_(configs[int(choice)]["block_m"])


def inputs(kernel, tokens=3):
    return kernel.inputs(SHAPE, torch.tensor([0, 1] * tokens, dtype=torch.int32).view(tokens, 2))


def test_a_launch_shows_the_operands_and_the_arguments_of_run():
    """What a dispatcher, a portfolio and the engines look for."""
    assert isinstance(Plain(), Kernel)
    shown = inspect.signature(Plain().launch).parameters
    assert list(shown) == ["config", *TENSORS, "expert_map", "speed"] and shown["speed"].default == 1
    whole = ["config", *TENSORS, "w13_scale", "w2_scale", "expert_map", "out"]
    assert list(inspect.signature(Chooser().launch).parameters) == [*whole, "workspace"]
    candidates = list(inspect.signature(Chooser().launch_candidates).parameters)
    assert candidates == ["configs", "blocks", "choice", *whole[1:], "streams"]
    assert chooses_in_graph(Chooser()) and not chooses_in_graph(Plain())


def test_a_launch_of_ones_own_stays():
    class Own(Plain):
        def launch(self, config, /, topk_ids, **others):
            return super().launch(config, topk_ids=topk_ids, **others, speed=3)

    kernel = Own()
    kernel.launch({"block_m": 16}, **inputs(kernel))
    assert kernel.calls == [({"block_m": 16}, 3)]


def test_by_place_or_by_name():
    kernel = Plain()
    its = inputs(kernel)
    out = kernel.launch({"block_m": 64}, *(its[name] for name in TENSORS), speed=2)
    assert torch.equal(out, its["hidden_states"] * 2)
    assert torch.equal(out, kernel.launch({"block_m": 64}, **its, w13_scale=None, speed=2))
    assert kernel.calls == [({"block_m": 64}, 2)] * 2


def test_refused_before_it_runs():
    kernel = Plain()
    its = inputs(kernel)
    assert kernel.configs == ({"block_m": 16}, {"block_m": 64})
    with pytest.raises(ConfigError, match="block_m=24 cannot run: block_m=24 is odd"):
        kernel.launch({"block_m": 24}, **its)
    with pytest.raises(InputError, match="plain takes no out; leave it out"):
        kernel.launch({"block_m": 16}, **its, out=its["hidden_states"])
    with pytest.raises(InputError, match=r"w2 is float32 of shape \(4, 128, 128\); give contiguous bfloat16"):
        kernel.launch({"block_m": 16}, **its | {"w2": its["w2"].float()})
    with pytest.raises(TypeError, match="power"):
        kernel.launch({"block_m": 16}, **its, power=1)
    with pytest.raises(ConfigError, match=r"No config of plain runs .*block_m=24 is odd"):
        Plain(MoEShape(4, 2, 256, 128))
    assert not kernel.calls
    free = Plain(contract=False)
    free.launch({"block_m": 16}, **its | {"w2": "whatever vLLM takes"})
    assert free.calls


def test_no_tokens_no_launch():
    kernel = Plain()
    assert kernel.launch({"block_m": 16}, **inputs(kernel, 0)).shape == (0, 128)
    assert not kernel.calls


def test_candidates_are_checked_and_run():
    kernel = Chooser()
    its, configs = inputs(kernel), list(kernel.configs)
    out = torch.empty_like(its["hidden_states"])
    assert kernel.launch_candidates(configs, [None, None], torch.tensor([1]), **its, out=out) is out
    assert out[0, 0] == 64
    with pytest.raises(ConfigError, match="block_m=8 is not compiled"):
        kernel.launch_candidates([{"block_m": 8}], [None], torch.tensor([0]), **its)
    with pytest.raises(InputError, match="topk_ids is float32"):
        kernel.launch_candidates(
            configs, [None, None], torch.tensor([1]), **its | {"topk_ids": its["topk_ids"].float()}
        )


def test_a_portfolio_gives_each_what_it_takes():
    """An output for one that takes none is copied into."""
    portfolio = Portfolio([Chooser(), Plain()])
    its = inputs(Plain())
    out = torch.empty_like(its["hidden_states"])
    assert portfolio.launch({"kernel": "plain", "block_m": 16}, **its, out=out, workspace=None) is out
    assert torch.equal(out, its["hidden_states"])


def test_weights_come_in_the_layout_of_the_kernel():
    class Turned(Plain):
        def convert_weights(self, *, w13, **_):
            return {"w13": w13.flip(1)}

    kernel = Turned()
    its, plain = inputs(kernel), inputs(Plain())
    assert torch.equal(its["w13"].flip(1), plain["w13"]) and torch.equal(its["w2"], plain["w2"])
    assert inputs(kernel)["w13"] is its["w13"]  # made once


def test_why_a_launch_fails():
    kernel = Plain()
    its = inputs(kernel)
    assert launch_each(kernel, kernel.configs, its) == [None, None]
    (reason,) = launch_each(kernel, [{"block_m": 24}], its)
    assert reason.startswith("ConfigError: The config block_m=24 cannot run")


def test_memory_of_a_caller():
    class Memory:
        num_slots, block_m = 6, 16

    operands, more = Operands(**inputs(Plain())), Operands(**inputs(Plain(), 4))
    check_workspace(operands, Memory())
    check_workspace(more, None)
    check_blocks(operands, Memory(), 16)
    with pytest.raises(InputError, match="workspace holds 6 slots, this batch has 8"):
        check_workspace(more, Memory())
    with pytest.raises(
        InputError, match="blocks hold 6 slots at block_m=16; align this batch of 6 slots at block_m=24"
    ):
        check_blocks(operands, Memory(), 24)
    with pytest.raises(InputError, match="align this batch of 8 slots at block_m=16"):
        check_blocks(more, Memory(), 16)


def test_a_contract_of_what_need_not_be_contiguous():
    its = inputs(Plain())
    wide = its | {"hidden_states": torch.zeros(3, 256, dtype=torch.bfloat16)[:, ::2]}
    Contract(SHAPE, contiguous=False).check(Operands(**wide))
    with pytest.raises(InputError, match=r"shape \(3, 128\) and not contiguous; give contiguous bfloat16 \(3, 128\)"):
        Contract(SHAPE).check(Operands(**wide))
    with pytest.raises(InputError, match=r"w2 is float32 of shape \(4, 128, 128\); give bfloat16"):
        Contract(SHAPE, contiguous=False).check(Operands(**wide | {"w2": its["w2"].float()}))
