"""What a layer does with gate and up: its text, its place in files, what is refused."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.errors import InputError
from rampwrap.kernel.activation import SILU, SWIGLU_OAI, Activation
from rampwrap.kernel.shape import MoEShape
from rampwrap.schema import dump, read

PLAIN = {"num_experts": 8, "top_k": 2, "hidden_size": 128, "intermediate_size": 64, "dtype": "bf16"}
SHAPE = MoEShape(8, 2, 128, 64)


@pytest.mark.parametrize(
    ("text", "activation"),
    [
        ("silu", SILU),
        ("silu:limit=10", Activation(limit=10.0)),
        ("swiglu_oai", SWIGLU_OAI),
        ("silu:limit=7,alpha=1.702,beta=1", SWIGLU_OAI),
        ("silu:beta=-0.5", Activation(beta=-0.5)),
        ("gelu_tanh", Activation("gelu_tanh")),
    ],
)
def test_text(text, activation):
    """What the command line takes; `str` gives it back."""
    assert Activation.parse(text) == activation
    assert Activation.parse(str(activation)) == activation


_NUMBER = st.floats(1e-6, 1e6)


@given(st.none() | _NUMBER, _NUMBER, _NUMBER)
def test_text_and_files_lose_nothing(limit, alpha, beta):
    """Of any number, however many digits it has."""
    activation = Activation("silu", limit, alpha, beta)
    assert Activation.parse(str(activation)) == activation
    shape = attrs.evolve(SHAPE, activation=activation)
    assert read(dump(shape), MoEShape, InputError) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relu2", "'relu2' is unknown; use one of silu, gelu_tanh"),
        ("silu:limit=0", "limit of an activation is 0.0; give a finite number above 0"),
        ("silu:limit=nan", "limit of an activation is nan"),
        ("silu:alpha=-1", "alpha of an activation is -1.0"),
        ("silu:beta=inf", "beta of an activation is inf; give a finite number."),
        ("silu:limit=ten", "not understood; write silu"),
        ("silu:limits=10", "not understood; write silu"),
        ("gelu_tanh:limit=7", "gelu_tanh:limit=7 is unknown: limit, alpha and beta are those of silu"),
    ],
)
def test_refused(text, message):
    """One sentence that says what to write."""
    with pytest.raises(InputError, match=message):
        Activation.parse(text)


def test_files_of_layers():
    """A file without an activation is of SiLU, as all older ones are, and SiLU is not written; others differ as layers."""
    assert read(PLAIN, MoEShape, InputError) == SHAPE and dump(SHAPE) == PLAIN
    clamped = attrs.evolve(SHAPE, activation=Activation(limit=10.0))
    assert dump(clamped) == {**PLAIN, "activation": {"name": "silu", "limit": 10.0}}
    assert clamped != SHAPE and str(clamped) == f"{SHAPE} silu:limit=10"
    with pytest.raises(InputError, match=r"activation\.limit: True is not a finite number"):
        read({**PLAIN, "activation": {"name": "silu", "limit": True}}, MoEShape, InputError)
    with pytest.raises(InputError, match="activation: activation 'relu2' is unknown"):
        read({**PLAIN, "activation": {"name": "relu2"}}, MoEShape, InputError)
