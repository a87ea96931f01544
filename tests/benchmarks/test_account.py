"""benchmarks/account.py without a GPU: Triton's parts run in its interpreter, compiled kernels are the adapter's stand-ins.

The streaming kernel itself compiles for sm_90a where the DSL is.
"""

import importlib.util
import json
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.build import gate
from rampwrap.kernels.cute.configs import STREAM_CHUNK, STREAMS
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.measure.timer import ReturnTimer

SPEC = importlib.util.spec_from_file_location(
    "cute_stand_ins", pathlib.Path(__file__).parents[1] / "adapters" / "test_cute_moe.py"
)
cute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cute)
SHAPE = MoEShape(4, 2, 256, 128, "fp8")


class Counting(ReturnTimer):
    """Runs every call once; the n-th to be prepared takes n microseconds. Asks for two routings of each workload."""

    def __init__(self, *_):
        self.prepared = 0

    def rotations(self, active_bytes):
        return 2

    def prepare(self, calls):
        for call in calls:
            call()
        self.prepared += 1
        number = float(self.prepared)
        return super().prepare([lambda: number])


class Library(cute.StandIns):
    """Also of the streams, which note what they read; `lost` blocks are left out by the up kernel."""

    def __init__(self, lost=0):
        super().__init__()
        self.lost, self.read = lost, []

    def _find(self, variant):
        if variant in STREAMS:
            return lambda weights, experts, ctas: self.read.append(
                (variant.role, weights.shape[1] * len(experts), ctas, weights.is_contiguous())
            )
        found = super()._find(variant)
        if variant.role == "up" and self.lost:
            return lambda *its: found(*its[:-3], its[-3] - self.lost, *its[-2:])
        return found


@pytest.fixture
def account(script, monkeypatch):
    account = script("account")
    monkeypatch.setattr(account, "GraphTimer", Counting)
    monkeypatch.setitem(account.SHAPES, "small", SHAPE)
    return account


needs_interpreter = pytest.mark.skipif(not INTERPRETED.value, reason="needs Triton's interpreter")


@needs_interpreter
def test_what_it_writes(account, monkeypatch, tmp_path, capsys):
    library, out = Library(), tmp_path / "out.json"
    monkeypatch.setattr(account, "load", lambda path: library)
    told = ["--shapes", "small", "--dtype", "fp8", "--tokens", "2", "--routings", "uniform", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["account.py", *told, "--out", str(out)])
    assert account.main() == 0
    found = json.loads(out.read_text())
    (row,) = found["accounts"]["small fp8"]
    assert row["wrong"] is None and row["config"]["form"] == "two" and row["config"]["block_m"] == 8
    us, plain = row["us"], row["stream_us"]
    assert list(us) == ["P", "U", "D", "S", "P U", "U D", "D S", "P U D", "U D S", "P U D S"]
    assert row["waits_us"]["U D"] == us["U D"] - us["U"] - us["D"]
    assert row["beyond_us"]["layer"] == us["P U D S"] - plain["two overlapping"]
    assert {"command", "date", "commit", "device"} <= found.keys() and "P U D S" not in capsys.readouterr().err
    # Two routings: each reads what the GEMMs read, in one launch or in two.
    weights, sms = row["weight_bytes"], 2
    assert weights == row["active_experts"] * 3 * 256 * 128
    by_launch = [(role, size, ctas) for role, size, ctas, _ in library.read]
    assert by_launch.count(("stream", weights, sms)) == by_launch.count(("stream", weights, sms // 2)) == 2
    assert by_launch.count(("stream_overlapping", weights * 2 // 3, sms)) == 2
    assert by_launch.count(("stream_overlapping", weights // 3, sms)) == 2
    assert all(whole for *_, whole in library.read)


@needs_interpreter
def test_of_the_ragged_form(account, monkeypatch, capsys):
    monkeypatch.setattr(account, "load", lambda path: Library())
    told = ["--shapes", "small", "--dtype", "fp8", "--tokens", "2", "--routings", "uniform", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["account.py", "--ragged", *told])
    assert account.main() == 0
    assert "form=ragged" in capsys.readouterr().out


@needs_interpreter
def test_a_wrong_layer_is_not_timed(account, monkeypatch, capsys):
    monkeypatch.setattr(account, "load", lambda path: Library(lost=1))
    told = ["--shapes", "small", "--dtype", "fp8", "--tokens", "1", "--routings", "uniform", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["account.py", *told])
    assert account.main() == 1
    assert "not timed" in capsys.readouterr().out


@needs_interpreter
def test_launches_that_are_not_the_layer_are_noticed(account, monkeypatch):
    kernel = account.CuteFusedMoE(SHAPE, "both", Library())
    given = kernel.inputs(SHAPE, torch.tensor([[0, 1], [2, 1]], dtype=torch.int32))
    config = kernel.configs[0]
    assert account.wrong(kernel, config, given) is None
    monkeypatch.setattr(account, "together", lambda parts, names: parts["P"])
    assert "other bits" in account.wrong(kernel, config, given)


@pytest.mark.skipif(building.dsl_version() is None, reason="needs the CuTe DSL (pip install rampwrap[cute])")
def test_the_streaming_kernels_compile(tmp_path):
    from rampwrap.kernels.cute.build import emit

    for variant in STREAMS:
        found = gate.inspect(gate.cubin(emit.compile_variant(variant, tmp_path).read_bytes()))
        assert gate.why_unfit(found, variant) is None and found.stack_bytes == 0 and not found.instructions
        assert variant.shared_bytes == variant.config.stages * (STREAM_CHUNK + 8) <= 227 * 1024
