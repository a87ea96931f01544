"""What a kernel is, and the shapes of published layers."""

import pytest

from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.protocol import (
    check_configs,
    config_key,
    format_config,
    index_by_key,
    kernel_version,
    refusal,
    why_not_launched,
)
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.schema import dump

# The models' config.json: experts, experts of a token, hidden_size, moe_intermediate_size, and the tensor parallelism here.
PUBLISHED = {
    "olmoe": (64, 8, 2048, 1024, 1),  # allenai/OLMoE-1B-7B-0924
    "mixtral-8x7b": (8, 2, 4096, 14336, 1),  # mistralai/Mixtral-8x7B-v0.1
    "qwen3-30b": (128, 8, 2048, 768, 1),  # Qwen/Qwen3-30B-A3B
    "qwen3-235b": (128, 8, 4096, 1536, 1),  # Qwen/Qwen3-235B-A22B
    "qwen3-next-80b": (512, 10, 2048, 512, 1),  # Qwen/Qwen3-Next-80B-A3B-Instruct
    "deepseek-v3": (256, 8, 7168, 2048, 1),  # deepseek-ai/DeepSeek-V3
    "deepseek-v3-tp8": (256, 8, 7168, 2048, 8),
    "gpt-oss-120b": (128, 4, 2880, 2880, 1),  # openai/gpt-oss-120b
    "glm-4.5-air": (128, 8, 4096, 1408, 1),  # zai-org/GLM-4.5-Air
    "kimi-k2-tp8": (384, 8, 7168, 2048, 8),  # moonshotai/Kimi-K2-Instruct
}


def test_named_shapes_are_those_of_the_models():
    found = {name: (s.num_experts, s.top_k, s.hidden_size, s.intermediate_size, s.dtype) for name, s in SHAPES.items()}
    assert found == {name: (e, k, h, i // tp, "bf16") for name, (e, k, h, i, tp) in PUBLISHED.items()}
    assert all(shape.num_local_experts == shape.num_experts for shape in SHAPES.values())


def test_weight_bytes_are_those_of_the_model():
    """OLMoE's 16 layers hold 6.44e9 expert weights of its 6.92e9: 3 matrices of each of 64 experts."""
    assert SHAPES["olmoe"].weight_bytes == 2 * 64 * 3 * 2048 * 1024
    assert MoEShape(64, 8, 2048, 1024, "fp8").weight_bytes == 64 * 3 * 2048 * 1024
    assert MoEShape(64, 8, 2048, 1024, "fp16", num_local_experts=16).weight_bytes == 2 * 16 * 3 * 2048 * 1024


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((0, 1, 64, 64), "num_experts"),
        ((8, 0, 64, 64), "top_k"),
        ((8, 9, 64, 64), "top_k"),
        ((8, 2, 0, 64), "hidden_size"),
        ((8, 2, 64, 0), "intermediate_size"),
        ((8, 2, 64, 64, "int3"), "dtype 'int3' is unknown"),
        ((8, 2, 64, 64, "bf16", 9), "num_local_experts"),
        ((8, 2, 64, 64, "bf16", 0), "num_local_experts"),
    ],
)
def test_a_bad_shape_is_refused_by_name(values, named):
    with pytest.raises(InputError, match=named):
        MoEShape(*values)


def test_the_least_and_the_most_are_shapes():
    assert MoEShape(1, 1, 1, 1).num_local_experts == 1
    assert dump(MoEShape(8, 8, 64, 64, "bf16", 1))["num_local_experts"] == 1
    assert "num_local_experts" not in dump(MoEShape(8, 8, 64, 64))
    assert str(MoEShape(8, 2, 64, 32, "fp8", 4)) == "E=8 (4 here) top_k=2 H=64 I=32 fp8"
    assert str(MoEShape(8, 2, 64, 32)) == "E=8 top_k=2 H=64 I=32 bf16"


def test_configs_are_known_by_their_content():
    assert config_key({"b": 1, "a": 2}) == config_key({"a": 2, "b": 1}) != config_key({"a": 2, "b": 2})
    assert index_by_key([{"a": 1}, {"a": 2}]) == {config_key({"a": 1}): 0, config_key({"a": 2}): 1}
    assert format_config({"block_m": 16, "block_n": 64}) == "block_m=16 block_n=64"
    assert check_configs([{"a": 1}, {"a": 2}], "k") == ({"a": 1}, {"a": 2})
    with pytest.raises(ConfigError, match="k has no configs"):
        check_configs([], "k")
    with pytest.raises(ConfigError, match=r"k lists the config b=2 a=1 twice \(at 0 and 2\)"):
        check_configs([{"a": 1, "b": 2}, {"a": 3}, {"b": 2, "a": 1}], "k")


def test_optional_members():
    class Kernel:
        version = 3

        def supports(self, config, shape):
            return "no" if config["a"] else None

    assert kernel_version(Kernel()) == "3" and kernel_version(object()) == "0"
    shape = SHAPES["olmoe"]
    assert refusal(Kernel(), {"a": 1}, shape) == "no" and refusal(Kernel(), {"a": 0}, shape) is None
    assert refusal(object(), {"a": 1}, shape) is None


def test_what_may_be_launched_besides_the_list():
    """`supports` is asked only about what looks like a listed config; without it the list is all there is."""

    class Kernel:
        configs = ({"a": 0, "b": True}, {"a": 1, "b": False}, {"a": 1, "b": False, "c": 2})

        def supports(self, config, shape):
            return "a is too large." if config["a"] > 5 else None

    shape = SHAPES["olmoe"]
    assert all(why_not_launched(Kernel(), config, shape) is None for config in Kernel.configs)
    assert why_not_launched(Kernel(), {"b": True, "a": 5}, shape) is None
    assert why_not_launched(Kernel(), {"a": 6, "b": True}, shape) == "a is too large."
    for strange in ({"a": 1}, {"a": "1", "b": True}, {"a": 1, "b": 1}, {"a": 1, "b": True, "d": 2}, {}):
        assert "other keys or types" in why_not_launched(Kernel(), strange, shape)
    silent = type("Silent", (), {"configs": Kernel.configs})()
    assert why_not_launched(silent, {"a": 2, "b": True}, shape) == "it is not in the kernel's list"
    assert why_not_launched(silent, {"a": 1, "b": False}, shape) is None
