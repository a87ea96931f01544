"""torch's grouped GEMM as a kernel, on torch's CPU path."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rampwrap.adapters.torch_grouped_mm import TorchGroupedMM
from rampwrap.dispatch.host import Dispatcher
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.protocol import Kernel
from rampwrap.kernel.shape import MoEShape

if not hasattr(torch.nn.functional, "grouped_mm"):
    pytest.skip("this torch has no grouped_mm", allow_module_level=True)

SHAPE = MoEShape(8, 2, 128, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def routing(num_tokens, num_experts=8):
    generator = torch.Generator().manual_seed(num_tokens)
    rows = [torch.randperm(num_experts, generator=generator)[:2] for _ in range(num_tokens)]
    return torch.stack(rows).int().to(DEVICE)


@pytest.mark.parametrize("ids", [routing(1), routing(37), routing(19, 3), torch.tensor([[5, 0]] * 9, device=DEVICE)])
def test_layer(ids):
    """The float64 layer, with experts without tokens and with hot ones; the same bits every time."""
    kernel = TorchGroupedMM(SHAPE)
    inputs = kernel.inputs(SHAPE, ids)
    out = torch.full_like(inputs["hidden_states"], float("nan"))
    assert kernel.launch(kernel.configs[0], **inputs, out=out) is out
    reference = kernel.reference(SHAPE, inputs)
    assert (out.double() - reference).norm() < 8e-3 * reference.norm()
    assert torch.equal(out, kernel.launch(kernel.configs[0], **inputs))


def test_kernel():
    """A Kernel of one config, that a Dispatcher takes."""
    kernel = TorchGroupedMM(SHAPE)
    assert isinstance(kernel, Kernel)
    grid = kernel.grid(kernel.configs[0], MoEShape(64, 8, 2048, 1024))
    assert grid.persistent and grid.launches == (8, 8)
    inputs = kernel.inputs(SHAPE, routing(4))
    assert torch.equal(Dispatcher(kernel)(**inputs), kernel.launch(kernel.configs[0], **inputs))
    assert kernel.launch(kernel.configs[0], **kernel.inputs(SHAPE, routing(1)[:0])).shape == (0, 128)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MoEShape(8, 2, 128, 64, "fp16"), "dtype fp16"),
        (MoEShape(8, 2, 100, 64), "hidden_size=100"),
        (MoEShape(8, 2, 128, 64, num_local_experts=4), "4 of 8 experts are here"),
    ],
)
def test_refused_shapes(shape, message):
    """With the reason."""
    with pytest.raises(ConfigError, match=message):
        TorchGroupedMM(shape)


def test_refused_calls():
    """Another config, other dtypes."""
    kernel = TorchGroupedMM(SHAPE)
    inputs = kernel.inputs(SHAPE, routing(2))
    with pytest.raises(ConfigError, match="has nothing to tune"):
        kernel.launch({"block_m": 16}, **inputs)
    with pytest.raises(InputError, match="w13 is float32"):
        kernel.launch(kernel.configs[0], **(inputs | {"w13": inputs["w13"].float()}))
