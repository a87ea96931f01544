"""The conformance suite: passes for what conforms, and names what does not in a sentence."""

import os
import pathlib

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rampwrap.errors import ConfigError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.shape import MoEShape
from rampwrap.testing.conformance import CHECKS, check
from rampwrap.testing.sim import SimKernel

SHAPE = MoEShape(8, 2, 64, 32)


class TorchMoE:
    """A layer in plain torch that pretends to run in blocks; the tests break it."""

    name = "torch_moe"
    configs = tuple({"block_m": block_m, "block_n": block_n} for block_m in (16, 32) for block_n in (32, 64))
    extra_ctas = 0

    def __init__(self, shape=SHAPE):
        self.shape = shape

    def supports(self, config, shape):
        sizes = {"block_m": (16, 32), "block_n": (32, 64)}
        wrong = set(config) ^ set(sizes) or {key for key in sizes if config[key] not in sizes[key]}
        return f"{', '.join(wrong)} is not supported; use one of configs." if wrong else None

    def grid(self, config, shape):
        up, down = 2 * shape.intermediate_size // config["block_n"], shape.hidden_size // config["block_n"]
        return CtaGrid(config["block_m"], up + down, launches=(up, down))

    def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
        if reason := self.supports(config, self.shape):
            raise ConfigError(reason)
        real = (topk_ids >= 0) & (topk_ids < len(w13))
        blocks = sum(-(-c // config["block_m"]) for c in torch.bincount(topk_ids[real]).tolist())
        self.last_grid = [blocks * n + self.extra_ctas for n in self.grid(config, self.shape).launches]
        out = torch.empty_like(hidden_states) if out is None else out
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in topk_ids[real].unique().tolist():
            token, k = torch.nonzero(topk_ids == expert, as_tuple=True)
            gate, up = (hidden_states[token].float() @ w13[expert].float().T).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ w2[expert].float().T
            total.index_add_(0, token, y * topk_weights[token, k, None])
        return out.copy_(total)

    def inputs(self, shape, topk_ids, *, seed=0):
        g = torch.Generator().manual_seed(seed)
        e, h, i, t = shape.num_experts, shape.hidden_size, shape.intermediate_size, len(topk_ids)
        x, w13, w2 = (torch.randn(s, generator=g) for s in ((t, h), (e, 2 * i, h), (e, h, i)))
        weights = torch.rand(topk_ids.shape, generator=g)
        made = {"hidden_states": x, "w13": w13 * h**-0.5, "w2": w2 * i**-0.5}
        device = topk_ids.device
        made = {name: tensor.bfloat16().to(device) for name, tensor in made.items()}
        return made | {"topk_weights": weights.to(device), "topk_ids": topk_ids}

    def reference(self, shape, inputs):
        x, ids = inputs["hidden_states"].double(), inputs["topk_ids"].long()
        y = torch.einsum("th,tknh->tkn", x, inputs["w13"].double()[ids])
        gate, up = y.chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, inputs["w2"].double()[ids])
        return (y * inputs["topk_weights"].double()[..., None]).sum(1)


def fails(kernel, message, **options):
    with pytest.raises(AssertionError, match=message):
        check(kernel, device="cpu", **options)


def test_a_kernel_that_conforms():
    """Every check passes or says why it was skipped."""
    kernel = TorchMoE()
    report = check(kernel, device="cpu", direct=lambda config, inputs: TorchMoE().launch(config, **inputs))
    assert set(report.passed) | set(report.skipped) == set(CHECKS)
    assert set(report.skipped) == {"graph"} and report.worst_error < 1e-2
    text = str(report)
    assert text.startswith("torch_moe conforms:") and "called directly: bit for bit" in text
    assert "graph: skipped, no GPU (cpu)" in text
    kernel.capturable = "it reads the histogram on the host"
    assert "it reads the histogram" in check(kernel, device="cpu").skipped["graph"]


def test_wrong_numbers():
    """A wrong result, and output that nobody wrote."""

    class Scaled(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            return super().launch(config, hidden_states, w13, w2, topk_weights * 1.1, topk_ids, out=out)

    class Forgetful(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            kept = out[-1:].clone() if out is not None else None
            done = super().launch(config, hidden_states, w13, w2, topk_weights, topk_ids, out=out)
            return done if kept is None or len(done) < 5 else done[-1:].copy_(kept) is None or done

    fails(Scaled(), r"block_m=16 block_n=32 is off by 0.* at M=1 uniform, more than 0\.01")
    fails(Forgetful(), "is off by nan at M=5 uniform.*reads memory nobody wrote")


def test_padding_and_duplicates():
    """Padding that raises, that is counted, and a duplicate that counts once a token."""

    class Raises(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            torch.bincount(topk_ids.flatten())
            return super().launch(config, hidden_states, w13, w2, topk_weights, topk_ids, out=out)

    class LastExpert(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            ids = topk_ids.clamp(max=len(w13) - 1) % len(w13)
            return super().launch(config, hidden_states, w13, w2, topk_weights, ids, out=out)

    class Once(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            again = topk_ids[:, 1:] == topk_ids[:, :1]
            ids = torch.cat([topk_ids[:, :1], topk_ids[:, 1:].masked_fill(again, -1)], 1)
            return super().launch(config, hidden_states, w13, w2, topk_weights, ids, out=out)

    fails(Raises(), "with padding in topk_ids raises RuntimeError")
    fails(LastExpert(), "with padding in topk_ids writes rows that are not zero for tokens of padding alone")
    fails(Once(), "with duplicates in topk_ids is off by")


def test_wrong_grid():
    """The descriptor must explain the launched CTAs."""
    kernel = TorchMoE()
    kernel.extra_ctas = 1
    fails(kernel, r"launches \[\d+, \d+\] CTAs, which \(2, 2\) a block explains for no number of blocks")

    class Raises(TorchMoE):
        def grid(self, config, shape):
            raise KeyError("block_k")

    fails(Raises(), "grid of block_m=16 block_n=32 raises KeyError")


def test_accepts_nonsense():
    """A spoilt config must be refused with a reason, by launch as a ConfigError."""

    class Lenient(TorchMoE):
        def supports(self, config, shape):
            return None

    class Silent(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            return super().launch(self.configs[0], hidden_states, w13, w2, topk_weights, topk_ids, out=out)

    class Crashes(TorchMoE):
        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            config["block_m"] + config["block_n"]
            return super().launch(config, hidden_states, w13, w2, topk_weights, topk_ids, out=out)

    fails(Lenient(), r"supports accepts \{\}")
    fails(Silent(), r"launch ran \{\}, which supports refuses")
    fails(Crashes(), r"launch of \{\} should raise a ConfigError, not KeyError")


def test_moody_bits():
    """The same launch twice must give the same bits, unless the kernel says why it does not."""

    class Moody(TorchMoE):
        calls = 0

        def launch(self, config, /, hidden_states, w13, w2, topk_weights, topk_ids, *, out=None):
            self.calls += 1
            done = super().launch(config, hidden_states, w13, w2, topk_weights, topk_ids, out=out)
            return done.mul_(1 + 0.004 * (self.calls % 2))

    fails(Moody(), "launched again gives another result at M=33 zipf1.2: relative difference 0.00")
    kernel = Moody()
    kernel.nondeterministic = "atomics"
    assert "within the tolerance (atomics)" in check(kernel, device="cpu").passed["same bits"]
    fails(TorchMoE(), "called directly gives another result", direct=lambda c, i: TorchMoE().launch(c, **i) * 2)


def test_kernels_that_say_little():
    """Without a reference, supports or launches: skipped, with the reason. Without inputs: nothing can be checked."""
    report = check(SimKernel(SHAPE))
    assert set(report.skipped) >= {"numerics", "refusals", "grid", "graph"}
    assert "same bits" in report.passed

    class Blind(TorchMoE):
        inputs = None

    fails(Blind(), "has no inputs")
    kernel = TorchMoE()
    kernel.supports = lambda config, shape: "never at all"
    fails(kernel, "refuses every config")


def test_our_triton_kernel():
    """In the interpreter too: the grids it launches are recorded there."""
    pytest.importorskip("triton")
    from rampwrap.adapters.triton_fused_moe import TritonFusedMoE
    from rampwrap.kernels.triton.interpreter import INTERPRETED

    if not INTERPRETED.value and not torch.cuda.is_available():
        pytest.skip("Triton was imported before TRITON_INTERPRET=1 and there is no GPU")
    kernel = TritonFusedMoE(MoEShape(8, 2, 128, 64))
    report = check(kernel, num_tokens=(1, 9), configs=kernel.configs[:: len(kernel.configs) - 1])
    assert set(report.passed) >= set(CHECKS) - {"graph"}, report


def test_torch_grouped_mm():
    """One config, persistent grids."""
    pytest.importorskip("triton")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    from rampwrap.adapters.torch_grouped_mm import TorchGroupedMM

    report = check(TorchGroupedMM(MoEShape(8, 2, 128, 64)))
    assert "persistent" in report.skipped["grid"] and "numerics" in report.passed


@pytest.mark.parametrize(
    ("place", "printed"),
    [
        (1, ["my_moe conforms:", "same bits: 2 configs", "block_m=16"]),
        (2, ["expert_by_expert conforms:", "numerics: 2 configs on 12 routings", "padding: 2 configs"]),
    ],
)
def test_readme_examples(place, printed, capsys):
    """The guide's examples are complete, under 40 lines, and conform."""
    path = pathlib.Path(__file__).parent.parent.parent / "adapters" / "README.md"
    if not path.exists():
        pytest.skip("the wheel carries no guide")
    code = path.read_text().split("```python\n")[place].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    exec(compile(code, "adapters/README.md", "exec"), {"__name__": "example"})
    out = capsys.readouterr().out
    assert all(text in out for text in printed)
