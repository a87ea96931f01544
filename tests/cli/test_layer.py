"""A layer by its options: what they make, and that a message's command makes the same layer again."""

import shlex

import click
import pytest
from click.testing import CliRunner

from rampwrap.cli.command import request
from rampwrap.cli.layer import LayerRequest, layer_options, shape_name
from rampwrap.cli.profile_request import ProfileRequest
from rampwrap.errors import InputError
from rampwrap.kernel.activation import SWIGLU_OAI, Activation
from rampwrap.kernel.shape import MoEShape
from rampwrap.plan.plan import shape_arguments

SHAPES = [
    MoEShape(8, 2, 128, 64),
    MoEShape(8, 2, 128, 64, "fp8", 4),
    MoEShape(8, 2, 128, 64, activation=SWIGLU_OAI),
    MoEShape(8, 2, 128, 64, "fp16", activation=Activation("gelu_tanh")),
    MoEShape(8, 2, 128, 64, "fp8", scales="block-64"),
    MoEShape(8, 2, 128, 64, "fp8", activation=SWIGLU_OAI, scales="channel"),
]


def parsed(arguments: str) -> MoEShape:
    """The layer that a command makes of these arguments."""
    made: list[MoEShape] = []
    command = click.command()(layer_options(lambda **given: made.append(request(LayerRequest, given).shape())))
    done = CliRunner().invoke(command, shlex.split(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return made[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_options_of_a_layer_name_it(shape):
    """What messages tell people to type."""
    assert parsed(shape_arguments(shape)) == shape


def test_names_of_files_differ():
    """Layers that differ in anything have files of their own, by names that any file system takes."""
    names = [shape_name(shape) for shape in SHAPES]
    assert len(set(names)) == len(names) and not any(set(name) & set(":,= /") for name in names)
    assert names[2] == "E8-k2-H128-I64-bf16-silu_limit7_alpha1.702_beta1"


def test_a_model_says_its_own_activation(tmp_path):
    """Rather than passing over what was asked for."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    asked = ProfileRequest(engine="vllm", layer=LayerRequest(model=str(tmp_path), activation="gelu_tanh"))
    with pytest.raises(InputError, match="--activation gelu_tanh is for a layer given by its sizes"):
        asked.layers()
