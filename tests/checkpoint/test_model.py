"""The config.json of models as layer shapes, and the plans that `rampwrap profile --engine` makes of them."""

import json
import pathlib
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rampwrap.checkpoint import arithmetic, quantisation
from rampwrap.checkpoint import config as configs
from rampwrap.checkpoint import model as models
from rampwrap.checkpoint.model import Ranks, read_layers
from rampwrap.cli.main import main
from rampwrap.errors import InputError
from rampwrap.kernel.device import SIMULATED
from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.plan import folder as places

OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
FP8 = DEEPSEEK["quantization_config"]
DBRX = {
    "model_type": "dbrx",
    "d_model": 6144,
    "ffn_config": {
        "ffn_act_fn": {"name": "silu"},
        "ffn_hidden_size": 10752,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
}
BLOCKS = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128},
        }
    },
}


def write(folder: pathlib.Path, **config: object) -> pathlib.Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_model(
    model: Any, *, dtype: str | None = None, engine: str | None = None, **ranks: Any
) -> tuple[MoEShape, ...]:
    return read_layers(model, Ranks(**ranks), dtype=dtype, engine=engine).shapes


@pytest.mark.parametrize(
    ("config", "options", "want"),
    [
        (OLMOE, {}, [SHAPES["olmoe"]]),
        (OLMOE | {"torch_dtype": "float32"}, {}, [SHAPES["olmoe"]]),
        (OLMOE | {"torch_dtype": "float16"}, {}, [attrs.evolve(SHAPES["olmoe"], dtype="fp16")]),
        (OLMOE, {"dtype": "fp8"}, [attrs.evolve(SHAPES["olmoe"], dtype="fp8")]),
        (QWEN3, {}, [SHAPES["qwen3-30b"]]),
        (QWEN3, {"tp_size": 2}, [MoEShape(128, 8, 2048, 384)]),
        (QWEN3, {"tp_size": 8, "expert_parallel": True}, [MoEShape(128, 8, 2048, 768, num_local_experts=16)]),
        (
            OLMOE,
            {"tp_size": 6, "expert_parallel": True},
            [MoEShape(64, 8, 2048, 1024, num_local_experts=n) for n in (11, 10)],
        ),
        (OLMOE, {"expert_parallel": True}, [SHAPES["olmoe"]]),
        (MIXTRAL, {}, [SHAPES["mixtral-8x7b"]]),
        (DEEPSEEK, {"tp_size": 8}, [attrs.evolve(SHAPES["deepseek-v3-tp8"], dtype="fp8")]),
        (QWEN3 | {"quantization_config": BLOCKS}, {}, [attrs.evolve(SHAPES["qwen3-30b"], dtype="fp8")]),
        ({"model_type": "qwen3_vl_moe", "hidden_size": 99, "text_config": QWEN3}, {}, [SHAPES["qwen3-30b"]]),
        (
            {
                "d_model": 6144,
                "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
            },
            {},
            [MoEShape(16, 4, 6144, 10752)],
        ),
        (DBRX, {}, [MoEShape(16, 4, 6144, 10752)]),
        (DBRX | {"ffn_config": DBRX["ffn_config"] | {"ffn_act_fn": None}}, {}, [MoEShape(16, 4, 6144, 10752)]),
        (QWEN3 | {"num_experts": None, "num_local_experts": 128}, {}, [SHAPES["qwen3-30b"]]),
        (QWEN3 | {"quantization_config": None, "dtype": None}, {}, [SHAPES["qwen3-30b"]]),
        (
            {"model_type": "omni", "thinker_config": {"hidden_size": 1, "text_config": QWEN3}},
            {},
            [SHAPES["qwen3-30b"]],
        ),
        ({**QWEN3, "text_config": None, "ffn_config": [1]}, {}, [SHAPES["qwen3-30b"]]),
        (
            QWEN3 | {"num_experts": [1, 128, 64], "moe_intermediate_size": [6144, 768, 768]},
            {},
            [SHAPES["qwen3-30b"], MoEShape(64, 8, 2048, 768)],
        ),
    ],
)
def test_shapes(tmp_path: pathlib.Path, config: dict, options: dict, want: list[MoEShape]) -> None:
    assert list(read_model(write(tmp_path, **config), **options)) == want
    assert list(read_model(tmp_path / "config.json", **options)) == want


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}, {}, "num_experts"),
        (MIXTRAL | {"num_local_experts": 1, "num_experts_per_tok": 1}, {}, "no layer with more than one expert"),
        (MIXTRAL | {"model_type": "gpt_oss"}, {}, "biases"),
        (MIXTRAL | {"hidden_act": "relu2"}, {}, "relu2"),
        (OLMOE | {"quantization_config": {"quant_method": "awq"}}, {}, "awq"),
        (
            DEEPSEEK
            | {
                "quantization_config": {
                    "quant_method": "fp8",
                    "activation_scheme": "static",
                    "weight_block_size": [128, 128],
                }
            },
            {},
            "activation_scheme='static'; our kernels run bf16, fp16 and FP8 with scales for 128x128 blocks, channels or",
        ),
        (OLMOE | {"torch_dtype": "int8"}, {}, "int8"),
        (OLMOE, {"tp_size": 3}, "do not divide intermediate_size=1024"),
        (OLMOE, {"tp_size": 65, "expert_parallel": True}, "fewer than 65 ranks"),
        (OLMOE, {"tp_size": 0}, "tp_size is 0"),
        (OLMOE | {"num_experts": "many"}, {}, "num_experts='many'; give whole numbers"),
        (OLMOE | {"num_experts": None}, {}, "names none of num_experts"),
        (OLMOE | {"num_experts": True}, {}, "num_experts=True"),
        (OLMOE | {"num_experts": 64.0}, {}, "num_experts=64.0"),
        (OLMOE | {"num_experts": [64, None]}, {}, r"num_experts=\[64, None\]"),
        (OLMOE | {"num_experts": []}, {}, r"num_experts=\[\]"),
        (OLMOE | {"hidden_size": 10**30}, {}, "hidden_size=10+; give whole numbers"),
        (OLMOE | {"num_experts": [64, 64], "num_experts_per_tok": [8, 8, 8]}, {}, "for 2 and for 3 layers"),
        (DBRX | {"ffn_config": DBRX["ffn_config"] | {"ffn_act_fn": {"name": "gelu"}}}, {}, "ffn_act_fn.name='gelu'"),
        (DBRX | {"ffn_config": DBRX["ffn_config"] | {"ffn_act_fn": "gelu"}}, {}, "ffn_act_fn='gelu'"),
        (DBRX | {"ffn_config": None}, {}, "names none of num_experts"),
        (DEEPSEEK | {"quantization_config": FP8 | {"weight_block_size": 128}}, {}, "weight_block_size=128;"),
        (
            DEEPSEEK | {"quantization_config": FP8 | {"weight_block_size": [64, 128]}},
            {},
            r"weight_block_size=\[64, 128\]",
        ),
        (DEEPSEEK | {"quantization_config": "fp8"}, {}, "quantization_config='fp8'"),
        (
            QWEN3 | {"quantization_config": BLOCKS | {"config_groups": None}},
            {},
            "quantization_config.config_groups=None",
        ),
        (QWEN3 | {"quantization_config": BLOCKS | {"config_groups": {"a": 1}}}, {}, "config_groups.a has no weights"),
        (QWEN3 | {"quantization_config": BLOCKS | {"config_groups": {"a": {"weights": [1]}}}}, {}, "a has no weights"),
        (QWEN3 | {"compression_config": [BLOCKS]}, {}, "compression_config="),
        (QWEN3 | {"dtype": {"a": "bfloat16"}}, {}, "dtype={'a': 'bfloat16'}"),
    ],
)
def test_what_cannot_be_profiled_says_why(tmp_path: pathlib.Path, config: dict, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_model(write(tmp_path, **config), **options)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
SOME = st.sampled_from([0, 1, 2, 8, 64, 128, 768, [128, 128], "silu", "fp8", "compressed-tensors", "float", "block"])
JSON = st.recursive(
    SCALARS | SOME, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
FIELDS = (
    *(*models._EXPERTS, *models._TOP_K, *models._HIDDEN, *models._INTERMEDIATE, *arithmetic._ACTIVATION),
    *(*quantisation._FIELDS, *configs._NESTED, "dtype", "torch_dtype", "model_type"),
)
QUANTISED = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["fp8", "compressed-tensors"]) | JSON},
    optional={
        "weight_block_size": JSON,
        "config_groups": st.dictionaries(
            st.sampled_from(["group_0", "group_1"]),
            JSON
            | st.fixed_dictionaries(
                {},
                optional={
                    "weights": JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(quantisation._BLOCK_FP8, JSON)),
                },
            ),
        )
        | JSON,
    },
)
ODD = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)
NESTED = st.dictionaries(st.sampled_from(configs._NESTED), ODD, max_size=1)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([OLMOE, QWEN3, DEEPSEEK, DBRX, QWEN3 | {"quantization_config": BLOCKS}, {}]),
    ODD,
    NESTED,
    st.none() | QUANTISED,
    st.sampled_from([{}, {"tp_size": 2}, {"tp_size": 3, "expert_parallel": True}]),
)
def test_no_config_is_a_traceback(
    tmp_path: pathlib.Path, base: dict, odd: dict, nested: dict, quantised: dict | None, options: dict
) -> None:
    """Whatever JSON stands in the known fields: shapes, or one sentence of ours."""
    more = {} if quantised is None else {"quantization_config": quantised}
    folder = write(tmp_path, **{**base, **odd, **nested, **more})
    try:
        shapes = read_model(folder, **options)
    except InputError as error:
        assert "\n" not in str(error).replace(str(tmp_path), "")
    else:
        assert shapes and all(isinstance(its, MoEShape) for its in shapes)


def test_nesting_without_end_is_refused(tmp_path: pathlib.Path) -> None:
    for depth in (900, 100_000):
        (tmp_path / "config.json").write_text('{"text_config": ' * depth + "1" + "}" * depth)
        with pytest.raises(InputError, match=r"config\.json"):
            read_model(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_unreadable_configs(tmp_path: pathlib.Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_model(tmp_path)


def test_profile_engine_makes_plans_that_the_hooks_find(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command, all shapes, into the folder where the hooks look, resumable."""
    model = tmp_path / "model"
    model.mkdir()
    write(model, **OLMOE)
    monkeypatch.setenv(places.PLANS, str(tmp_path / "plans"))
    command = ["profile", "--engine", "vllm", "--model", str(model), "--kernel", "sim", "--quiet"]
    command += ["--tp-size", "6", "--ep", "--batch-size", "8", "64", "--eval-batch-size", "16"]
    assert main(command) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    found = places.Plans.read()
    assert len(found.found) == 2 and not found.broken
    for local in (10, 11):
        shape = MoEShape(64, 8, 2048, 1024, num_local_experts=local)
        assert found.find(shape, SIMULATED, ("sim",)) is not None
    assert found.find(SHAPES["olmoe"], SIMULATED, ("sim",)) is None
    assert "num_local" not in found.why_not(SHAPES["olmoe"], SIMULATED, ("triton_fused_moe",))


def test_profile_engine_refuses(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--engine", "vllm"]) == 1
    assert "--model" in capsys.readouterr().err
    assert main(["profile", "--engine", "vllm", "--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_dry_run_of_a_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, **OLMOE)
    assert main(["profile", "--engine", "vllm", "--model", str(tmp_path), "--kernel", "sim", "--dry-run"]) == 0
    assert "cells" in capsys.readouterr().out
