"""Portfolio: the choice crosses kernels; everything around a Kernel works on it unchanged."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rampwrap.compare.oracle import Oracle
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.portfolio import Portfolio
from rampwrap.kernel.protocol import Kernel, why_not_launched
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.full import profile
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.routing.workloads import Routing, Workload, workload_grid
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(64, 8, 2048, 1024)
SMALL = ({"block_m": 16, "block_n": 128, "stages": 4}, {"block_m": 32, "block_n": 128, "stages": 4})
LARGE = ({"block_m": 128, "block_n": 256, "stages": 2},)


class Decode(SimKernel):
    """Good at few tokens."""

    name = "decode"

    def __init__(self, shape=SHAPE):
        super().__init__(shape, SMALL)

    def default_config(self, num_tokens):
        return self.configs[1]


class Prefill(SimKernel):
    """Good at many."""

    name = "prefill"
    version = "7"

    def __init__(self, shape=SHAPE):
        super().__init__(shape, LARGE)


@pytest.fixture
def portfolio():
    return Portfolio([Decode(), Prefill()])


def ids(num_tokens, seed=0):
    return Workload(num_tokens, Routing("uniform"), seed=seed).topk_ids(64, 8)


def test_is_a_kernel(portfolio):
    """The union of the configs, each with its kernel's name; the rest is the member's."""
    assert isinstance(portfolio, Kernel)
    assert portfolio.name == "portfolio:decode+prefill" and portfolio.version == "1+7"
    assert [config["kernel"] for config in portfolio.configs] == ["decode", "decode", "prefill"]
    assert portfolio.shape == SHAPE and portfolio.device.name == "simulated"
    for config in portfolio.configs:
        kernel, own = portfolio.untagged(config)
        assert portfolio.grid(config, SHAPE) == kernel.grid(own, SHAPE)
        assert portfolio.grid(dict(config), SHAPE) == kernel.grid(own, SHAPE)
        assert portfolio.supports(config, SHAPE) is None
        assert portfolio.launch(config, topk_ids=ids(9)) == kernel.launch(own, topk_ids=ids(9))
    assert portfolio.default_config(4) == {"kernel": "decode", **SMALL[1]}
    assert portfolio.capturable is True
    assert list(inspect.signature(portfolio.launch).parameters) == ["config", "topk_ids"]


def test_members_compile_ahead_and_say_what_is_not_exact(portfolio):
    """Each member gets its own configs; reasons come back in the order asked."""
    asked = []

    def precompile(configs, **arguments):
        asked.append((list(configs), arguments))
        return ["too wide" if config["block_m"] == 32 else None for config in configs]

    portfolio.members["decode"].precompile = precompile
    order = [portfolio.configs[2], portfolio.configs[1], portfolio.configs[0]]
    assert portfolio.precompile(order, topk_ids=1) == [None, "too wide", None]
    assert asked == [([SMALL[1], SMALL[0]], {"topk_ids": 1})]
    portfolio.members["prefill"].precompile = lambda configs, **_: []
    with pytest.raises(ValueError):  # an answer for each config, or none is trusted
        portfolio.precompile(order, topk_ids=1)
    assert portfolio.nondeterministic is None
    portfolio.members["prefill"].nondeterministic = "sums in no fixed order"
    assert portfolio.nondeterministic == "prefill: sums in no fixed order"


def test_dispatch_crosses_kernels(portfolio, tmp_path):
    """Profile, fit, save, load, dispatch: few tokens go to one kernel, many to the other, as the oracle would."""
    rows = workload_grid(
        [1, 8, 64, 512, 4096], [Routing.parse(name) for name in ("uniform", "zipf:1.2", "dirichlet:0.3")]
    )
    timings = profile(portfolio, SHAPE, rows, quiet=True, out=tmp_path / "t.npz")
    assert timings.kernel == portfolio.name
    make_plan(timings).save(tmp_path / "plan.json")
    dispatcher = Dispatcher(portfolio, Plan.load(tmp_path / "plan.json"), strict=True)
    oracle = Oracle(timings)
    chosen = set()
    for counts, tokens in zip(timings.counts, timings.num_tokens, strict=True):
        mine = dispatcher.select(expert_counts=counts, num_tokens=int(tokens)).config
        chosen.add(mine["kernel"])
        us = {config["kernel"]: timings.us[0, i] for i, config in enumerate(timings.configs)}
        assert us  # every member was measured
        assert mine["kernel"] == oracle.select(np.asarray(counts), int(tokens)).config["kernel"]
    assert chosen == {"decode", "prefill"}
    assert dispatcher(ids(4096)) == pytest.approx(portfolio.members["prefill"].launch(LARGE[0], ids(4096)))
    assert "kernel=prefill" in dispatcher.explain()


def test_refused_members():
    """One sentence each."""
    with pytest.raises(InputError, match="holds no kernel"):
        Portfolio([])
    with pytest.raises(InputError, match="two of the kernels decode, decode"):
        Portfolio([Decode(), Decode()])
    with pytest.raises(InputError, match="make all for one layer"):
        Portfolio([Decode(), Prefill(MoEShape(8, 2, 64, 64))])
    odd = Decode()
    odd.configs = ({"kernel": 1},)
    with pytest.raises(ConfigError, match="has a key 'kernel'; rename it"):
        Portfolio([odd])
    blind = Prefill()
    blind.launch = lambda config, ids: 1.0
    with pytest.raises(InputError, match="has no parameter topk_ids"):
        Portfolio([Decode(), blind])
    blind.launch = lambda config, ids, topk_ids: 1.0
    with pytest.raises(InputError, match=r"launch of 'prefill' takes ids, topk_ids, not topk_ids like 'decode'"):
        Portfolio([Decode(), blind])


def test_unknown_configs(portfolio):
    """A config of no member is refused, by name."""
    with pytest.raises(ConfigError, match="names the kernel None; use one of decode, prefill"):
        portfolio.launch(SMALL[0], topk_ids=ids(1))
    assert "names the kernel 'x'" in portfolio.supports({"kernel": "x"}, SHAPE)
    assert portfolio.capturable is True
    portfolio.members["prefill"].capturable = "it reads the host"
    assert portfolio.capturable == "prefill: it reads the host"


def test_a_member_vouches_for_what_it_no_longer_lists(portfolio):
    """Only with `supports`: the list of a kernel that has none is all that it runs."""
    more = {"block_m": 64, "block_n": 128, "stages": 4}
    assert "not in the kernel's list" in portfolio.supports({"kernel": "decode", **more}, SHAPE)
    portfolio.members["decode"].supports = lambda config, shape: None if config["block_m"] < 100 else "too high."
    assert portfolio.supports({"kernel": "decode", **more}, SHAPE) is None
    assert why_not_launched(portfolio, {"kernel": "decode", **more}, SHAPE) is None
    assert portfolio.supports({"kernel": "decode", **more, "block_m": 128}, SHAPE) == "too high."
    moe = Dispatcher(portfolio).pin({"kernel": "decode", **more})
    assert moe(topk_ids=ids(9)) == portfolio.members["decode"].launch(more, topk_ids=ids(9))


def test_a_config_that_was_dropped_is_no_other(portfolio):
    """Configs are known by identity; one that was left out must not be taken for a new one at its address."""
    where = id(portfolio.configs[0])
    portfolio.configs = portfolio.configs[1:]
    for _ in range(100):
        fresh = {"kernel": "prefill", **LARGE[0]}
        assert portfolio.untagged(fresh) == (portfolio.members["prefill"], LARGE[0])
        if id(fresh) == where:
            break


class Plain:
    """A layer that returns its weights' sum, so that a test sees which weights it got."""

    name, weight_layout = "plain", "vllm"
    configs = ({"a": 1},)

    def __init__(self):
        self.shape = MoEShape(4, 2, 8, 4)

    def grid(self, config, shape):
        raise NotImplementedError

    def launch(self, config, /, x, w13, w2, topk_ids, *, w13_scale=None):
        return (self.name, w13, w2, w13_scale)


class Doubled(Plain):
    """Wants w13 and its scales doubled."""

    name, weight_layout = "doubled", "twice"
    conversions = 0

    def convert_weights(self, *, w13, w13_scale=None, **_):
        self.conversions += 1
        return {"w13": 2 * w13} | ({} if w13_scale is None else {"w13_scale": 2 * w13_scale})

    def converted_bytes(self, shape):
        return 2_500_000_000


class Foreign(Plain):
    """Another layout, and no way there."""

    name, weight_layout = "foreign", "tiles"


def test_layouts_need_permission():
    """Another layout is refused with the bytes it takes, until allowed; one that cannot be made is refused always."""
    with pytest.raises(
        InputError, match=r"'doubled' reads weights as twice, not vllm: that takes 2500000000 bytes \(2.50 GB\)"
    ):
        Portfolio([Plain(), Doubled()])
    with pytest.raises(InputError, match="cannot be made of vllm"):
        Portfolio([Plain(), Foreign()], extra_memory=True)
    with pytest.raises(InputError, match="cannot be made of twice"):
        Portfolio([Doubled(), Plain()], extra_memory=True)
    assert Portfolio([Plain(), Doubled()], extra_memory=True).extra_bytes(Plain()) == 0


def test_converted_once_per_layer():
    """Positional or by name, the member gets its copy, the others the weights themselves; views share the copy."""
    member = Doubled()
    portfolio = Portfolio([Plain(), member], extra_memory=True)
    plain, doubled = portfolio.configs
    w13, other, w2, scale = torch.ones(4, 8, 8), torch.ones(4, 8, 8), torch.zeros(4, 8, 4), torch.ones(4)
    name, got, w2_got, s = portfolio.launch(plain, None, w13, w2, None, w13_scale=scale)
    assert (name, got is w13, w2_got is w2, s is scale) == ("plain", True, True, True)
    first = portfolio.launch(doubled, None, w13, w2, None, w13_scale=scale)
    assert first[0] == "doubled" and first[1].sum() == 2 * w13.sum() and first[2] is w2 and first[3].sum() == 8
    again = portfolio.launch(doubled, x=None, w13=w13.view(4, 8, 8), w2=w2, topk_ids=None, w13_scale=scale)
    assert again[1] is first[1] and member.conversions == 1
    portfolio.prepare(w13=other, w2=w2)
    portfolio.launch(doubled, None, other, w2, None)
    assert member.conversions == 2
    del other
    portfolio.launch(doubled, None, torch.ones(4, 8, 8) * 3, w2, None)
    assert len(portfolio._copies) <= 2  # the layer that is gone took its copy along
    portfolio.forget()
    assert portfolio.launch(doubled, None, w13, w2, None)[1] is not first[1]
    before = member.conversions
    other_w13 = torch.ones(4, 8, 8)
    portfolio.prepare(w13=other_w13, w2=w2, w13_scale=None, w2_scale=None)
    portfolio.launch(doubled, None, other_w13, w2, None)
    assert member.conversions == before + 1  # scales that are None are none


class Scratch:
    """Memory of some bytes on a device."""

    def __init__(self, num_bytes, device):
        self.num_bytes, self.device = num_bytes, device


class Working(Plain):
    """Says which of the optional arguments it got."""

    size, made = 64, 0

    def __init__(self, name):
        super().__init__()
        self.name = name

    def workspace(self, num_tokens, device):
        self.made += device != "meta"
        return Scratch(self.size * num_tokens, device)

    def launch(self, config, /, x, w13, w2, topk_ids, *, workspace=None, blocks=None):
        return (workspace, blocks)


class Choosy(Working):
    """Knows no meta tensors."""

    def workspace(self, num_tokens, device):
        if device == "meta":
            raise NotImplementedError
        return super().workspace(num_tokens, device)


class Into(Plain):
    """Takes memory for its result and for nothing else."""

    name = "into"

    def launch(self, config, /, x, w13, w2, topk_ids, *, out=None):
        return x if out is None else out.copy_(x)


def test_members_get_the_memory_they_take():
    """Equal workspaces are one, others are each member's own, and what a launch does not take it does not get."""
    alike, other, larger, choosy = Working("alike"), Working("other"), Working("larger"), Choosy("choosy")
    larger.size = 128
    kernels = [Plain(), alike, other, larger, choosy, Into()]
    portfolio = Portfolio(kernels)
    assert "workspace" in inspect.signature(portfolio.launch).parameters  # which the first member does not take
    memory = portfolio.workspace(10, "cpu")
    assert memory.num_bytes == 640 + 1280 + 640 and alike.made + other.made == 1
    x = torch.arange(3.0)
    given = {"x": x, "w13": None, "w2": None, "topk_ids": None, "workspace": memory, "blocks": "blocks"}
    got = {config["kernel"]: portfolio.launch(config, **given) for config in portfolio.configs}
    assert got["plain"] == ("plain", None, None, None) and got["into"] is x
    assert {got[name][1] for name in ("alike", "other", "larger", "choosy")} == {"blocks"}
    assert got["alike"][0] is got["other"][0] and got["larger"][0].num_bytes == 1280
    assert got["choosy"][0] not in (got["alike"][0], got["larger"][0], None)
    out = torch.zeros(3)
    assert portfolio.launch(portfolio.configs[-1], **given, out=out) is out and torch.equal(out, x)
    assert "workspace" not in inspect.signature(Portfolio([Plain(), Into()]).launch).parameters


def test_a_result_goes_where_it_was_asked_for():
    """Of a member that returns memory of its own too."""
    plain = Plain()
    plain.launch = lambda config, /, x, w13, w2, topk_ids: 2 * x
    portfolio = Portfolio([Into(), plain])
    x, out = torch.ones(3), torch.zeros(3)
    for config, factor in zip(portfolio.configs, (1, 2), strict=True):
        assert portfolio.launch(config, x, None, None, None, out=out) is out and torch.equal(out, factor * x)
        assert torch.equal(portfolio.launch(config, x, None, None, None), factor * x)
