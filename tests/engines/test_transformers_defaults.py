"""transformers without a plan on a Hopper: the CuTe kernels' defaults, on the CPU stand-ins of `test_cute_moe`."""

import importlib.util
import logging
import pathlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")
pytest.importorskip("triton")

from rampwrap.adapters import cute_moe
from rampwrap.engines import defaults
from rampwrap.engines import transformers as engine
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.triton.interpreter import INTERPRETED
from rampwrap.plan import folder as places
from rampwrap.plan.folder import OneWarning

if not INTERPRETED.value:
    pytest.skip("the stand-ins run on a CPU", allow_module_level=True)

path = pathlib.Path(__file__).parents[1] / "adapters" / "test_cute_moe.py"
spec = importlib.util.spec_from_file_location("test_cute_moe", path)
cute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cute)
SHAPE = MoEShape(8, 2, 256, 128)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A Hopper with a library of CuTe kernels and without plans."""
    made = cute.StandIns()
    monkeypatch.setattr(cute_moe, "load", lambda path=None: made)
    monkeypatch.setattr(Device, "current", classmethod(lambda cls: Device("NVIDIA H200", 132, capability="9.0")))
    monkeypatch.setenv(places.PLANS, str(tmp_path))
    monkeypatch.setenv(places.OWN_PLANS, "1")
    monkeypatch.delenv(defaults.PLANS_ONLY, raising=False)
    monkeypatch.setattr(engine, "_serving", None)
    monkeypatch.setattr(engine, "_warn", OneWarning(logging.getLogger("rampwrap")))
    return made


def layer(num_tokens=12, ids=None):
    """The arguments of the operator, and the layer's result."""
    kernel = cute.kernel_of(SHAPE)
    its = kernel.inputs(SHAPE, cute.routing(SHAPE, num_tokens) if ids is None else ids)
    return [its[name] for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")], kernel.reference(
        SHAPE, its
    )


def test_the_cute_kernels_defaults_serve(library, caplog):
    """Each token count its default, and one warning that says how to have a plan or the Triton kernel."""
    for tokens in (1, 12, 48):
        arguments, want = layer(tokens)
        assert cute.error(engine.experts(*arguments), want) < 5e-3
        (service,) = engine.serving().services.values()
        first = cute_moe.from_keys(service.kernel.default_config(tokens), "bf16").variants[0].symbol
        assert first in {symbol for symbol, _ in library.calls}, tokens
        library.calls.clear()
    assert service.kernel.name == "cute_moe" and sum(service.dispatcher.launch_counts) == 3
    (record,) = caplog.records
    said = record.getMessage()
    assert "default configs of cute_moe" in said and "rampwrap profile --engine transformers" in said
    assert "RAMPWRAP_PLANS_ONLY=1 for those of triton_fused_moe" in said


def test_experts_of_other_ranks_add_nothing(library):
    """transformers' ids of those equal the number of experts here."""
    for tokens in (3, 40):
        arguments, _ = layer(tokens)
        ids = arguments[4].clone()
        ids[::2, 0] = SHAPE.num_experts
        x, w13, w2, weights, _ = arguments
        # The same slots with weight nothing, by an expert that is here.
        known = torch.where(ids == SHAPE.num_experts, 0, ids)
        want = engine.experts(x, w13, w2, torch.where(ids == SHAPE.num_experts, 0.0, weights), known)
        assert cute.error(engine.experts(x, w13, w2, weights, ids), want.double()) < 5e-3


def test_tensors_that_start_anywhere_run_the_triton_kernel(library):
    arguments, want = layer()
    room = torch.empty(arguments[0].numel() + 1, dtype=torch.bfloat16)
    room[1:] = arguments[0].view(-1)
    arguments[0] = room[1:].view(arguments[0].shape)
    assert cute.error(engine.experts(*arguments), want) < 1e-2 and not library.calls


def test_many_tokens_run_the_triton_kernel(library, monkeypatch):
    monkeypatch.setattr(engine, "MANY_TOKENS", 40)
    for tokens in (39, 40):
        arguments, want = layer(tokens)
        assert cute.error(engine.experts(*arguments), want) < 1e-2
        assert bool(library.calls) == (tokens == 39)
        library.calls.clear()


def test_determinism_counts_when_it_is_asked_for(library, monkeypatch):
    """A trainer turns it on after the first call, and off."""
    arguments, want = layer(1)
    for asked in (False, True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda asked=asked: asked)
        assert cute.error(engine.experts(*arguments), want) < 1e-2
        assert bool(library.calls) != asked
        library.calls.clear()


def test_a_broken_installation_stops_no_model(library, monkeypatch):
    """The CuTe kernels were not asked for: whatever is wrong with them, the Triton kernel runs."""

    def fails(path=None):
        raise PermissionError(13, "Permission denied", "/root/.cache/rampwrap")

    monkeypatch.setattr(cute_moe, "load", fails)
    arguments, want = layer()
    assert cute.error(engine.experts(*arguments), want) < 1e-2 and not library.calls


def test_a_first_launch_that_fails_hands_over_to_the_triton_kernel(library, monkeypatch, caplog):
    """A driver without our kernels says so when they are launched; what fails later is not ours to hide."""
    arguments, want = layer(12)
    monkeypatch.setattr(library, "function", lambda variant: no_image)
    for _ in range(2):
        assert cute.error(engine.experts(*arguments), want) < 1e-2
    (service,) = engine.serving().services.values()
    assert service.kernel.name == "triton_fused_moe" and "no kernel image" in caplog.records[-1].getMessage()
    monkeypatch.undo()


def test_a_later_launch_that_fails_is_told(library, monkeypatch):
    arguments, _ = layer(12)
    engine.experts(*arguments)
    (service,) = engine.serving().services.values()
    monkeypatch.setattr(service.dispatcher, "_launch", no_image)
    with pytest.raises(RuntimeError, match="no kernel image"):
        engine.experts(*arguments)


def no_image(*_, **__):
    raise RuntimeError("no kernel image is available for execution on the device")


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    """Layers of one model on two GPUs: nobody but we makes the second one current."""
    entered = []

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    for where in ("cpu", "cuda:0", "cuda:1"):
        with engine.current(torch.device(where)):
            pass
    assert entered == [torch.device("cuda:1"), None]


@pytest.mark.parametrize("why", ["switch", "determinism", "not built"])
def test_the_triton_kernel_serves_otherwise(library, monkeypatch, why):
    if why == "switch":
        monkeypatch.setenv(defaults.PLANS_ONLY, "1")
    elif why == "determinism":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr(library, "must_compile", lambda variants: True)
    arguments, want = layer()
    assert cute.error(engine.experts(*arguments), want) < 1e-2 and not library.calls
    (service,) = engine.serving().services.values()
    assert service.kernel.name == "triton_fused_moe"
