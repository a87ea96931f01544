"""What published models' configs say of their routed layers, and what is read of them: a shape or a true sentence.

The numbers are those of the models' config.json as of November 2026, only the fields that count, in a form of our own.
"""

import importlib
import inspect
import json
import pathlib
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from rampwrap.checkpoint.model import Ranks, layers_of, read_layers
from rampwrap.errors import InputError, RampwrapError
from rampwrap.kernel.activation import SILU, Activation
from rampwrap.kernel.shape import SCALES, MoEShape

QWEN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
DEEPSEEK = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
MIXTRAL = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GATES = {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(94)] + ["lm_head"]}
MINIMAX_GATES = {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
INT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            "input_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.self_attn*"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["mlp.gate", "lm_head"]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def config(kind: str, names: tuple[str, str, str], sizes: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    """A config with (experts, top_k, hidden, intermediate) under the names that its family has."""
    experts, top_k, hidden, intermediate = sizes
    common = {"model_type": kind, "hidden_size": hidden, "hidden_act": "silu", "torch_dtype": "bfloat16"}
    return common | dict(zip(names, (experts, top_k, intermediate), strict=True)) | more


def inside(name: str, its: dict[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "hidden_size": 1, name: its, **more}


A3B = (128, 8, 2048, 768)
V3 = (256, 8, 7168, 2048)
K2 = (384, 8, 7168, 2048)
DENSE = {"num_hidden_layers": 61, "first_k_dense_replace": 3, "intermediate_size": 18432, "n_shared_experts": 1}
# Model, its config, and "E k H I dtype" of its layers or a part of the sentence.
PUBLISHED: list[tuple[str, dict[str, Any], str]] = [
    ("OLMoE-1B-7B", config("olmoe", ("num_experts", *MIXTRAL[1:]), (64, 8, 2048, 1024)), "64 8 2048 1024 bf16"),
    ("Mixtral-8x7B", config("mixtral", MIXTRAL, (8, 2, 4096, 14336)), "8 2 4096 14336 bf16"),
    ("Mixtral-8x22B", config("mixtral", MIXTRAL, (8, 2, 6144, 16384)), "8 2 6144 16384 bf16"),
    (
        "Qwen1.5-MoE-A2.7B",
        config("qwen2_moe", QWEN, (60, 4, 2048, 1408), intermediate_size=5632),
        "60 4 2048 1408 bf16",
    ),
    ("Qwen2-57B-A14B", config("qwen2_moe", QWEN, (64, 8, 3584, 2560), intermediate_size=18944), "64 8 3584 2560 bf16"),
    (
        "Qwen3-30B-A3B",
        config("qwen3_moe", QWEN, A3B, intermediate_size=6144, mlp_only_layers=[]),
        "128 8 2048 768 bf16",
    ),
    ("Qwen3-30B-A3B-FP8", config("qwen3_moe", QWEN, A3B, quantization_config=BLOCKS | GATES), "128 8 2048 768 fp8"),
    ("Qwen3-30B-A3B-AWQ", config("qwen3_moe", QWEN, A3B, quantization_config=AWQ), "quant_method='awq'"),
    ("Qwen3-30B-A3B-NVFP4", config("qwen3_moe", QWEN, A3B, quantization_config=NVFP4), "quant_algo='NVFP4'"),
    ("Qwen3-235B-A22B", config("qwen3_moe", QWEN, (128, 8, 4096, 1536), decoder_sparse_step=1), "128 8 4096 1536 bf16"),
    (
        "Qwen3-Coder-480B-FP8",
        config("qwen3_moe", QWEN, (160, 8, 6144, 2560), quantization_config=BLOCKS | GATES),
        "160 8 6144 2560 fp8",
    ),
    ("Qwen3-Next-80B-A3B", config("qwen3_next", QWEN, (512, 10, 2048, 512)), "512 10 2048 512 bf16"),
    (
        "Qwen3-VL-30B-A3B",
        inside(
            "text_config", config("qwen3_vl_moe_text", QWEN, A3B), "qwen3_vl_moe", vision_config={"hidden_act": "gelu"}
        ),
        "128 8 2048 768 bf16",
    ),
    (
        "Qwen3-Omni-30B-A3B",
        inside("thinker_config", {"text_config": config("qwen3_omni_moe_text", QWEN, A3B)}, "qwen3_omni_moe"),
        "128 8 2048 768 bf16",
    ),
    (
        "Qwen3.5-35B-A3B",
        inside("text_config", config("qwen3_5_moe_text", QWEN, (256, 8, 2048, 512)), "qwen3_5_moe"),
        "256 8 2048 512 bf16",
    ),
    (
        "DeepSeek-V2-Lite",
        config("deepseek_v2", DEEPSEEK, (64, 6, 2048, 1408), first_k_dense_replace=1),
        "64 6 2048 1408 bf16",
    ),
    ("DeepSeek-V3", config("deepseek_v3", DEEPSEEK, V3, quantization_config=BLOCKS, **DENSE), "256 8 7168 2048 fp8"),
    (
        "DeepSeek-V3.2",
        config("deepseek_v32", DEEPSEEK, V3, quantization_config=BLOCKS | {"scale_fmt": "ue8m0"}, **DENSE),
        "256 8 7168 2048 fp8",
    ),
    (
        "DeepSeek-V4-Flash",
        config(
            "deepseek_v4",
            DEEPSEEK,
            (256, 6, 4096, 2048),
            quantization_config=BLOCKS,
            expert_dtype="fp4",
            swiglu_limit=10,
        ),
        "expert_dtype='fp4'",
    ),
    (
        "DeepSeek-R1-NVFP4",
        config("deepseek_v3", DEEPSEEK, V3, quantization_config=NVFP4, **DENSE),
        "quant_algo='NVFP4'",
    ),
    ("Moonlight-16B-A3B", config("deepseek_v3", DEEPSEEK, (64, 6, 2048, 1408)), "64 6 2048 1408 bf16"),
    ("Kimi-K2-Instruct", config("kimi_k2", DEEPSEEK, K2, quantization_config=BLOCKS), "384 8 7168 2048 fp8"),
    ("Kimi-K2-Thinking", config("kimi_k2", DEEPSEEK, K2, quantization_config=INT4), "weights.type='int'"),
    (
        "Kimi-K2.5",
        inside("text_config", config("kimi_k2", DEEPSEEK, K2, quantization_config=INT4), "kimi_k25"),
        "weights.type='int'",
    ),
    (
        "Kimi-Linear-48B-A3B",
        config("kimi_linear", ("num_experts", "num_experts_per_token", QWEN[2]), (256, 8, 2304, 1024)),
        "256 8 2304 1024 bf16",
    ),
    ("GLM-4.5", config("glm4_moe", DEEPSEEK, (160, 8, 5120, 1536), first_k_dense_replace=3), "160 8 5120 1536 bf16"),
    (
        "GLM-4.5-FP8",
        config("glm4_moe", DEEPSEEK, (160, 8, 5120, 1536), quantization_config=CHANNEL),
        "160 8 5120 1536 fp8 channel",
    ),
    ("GLM-4.5-Air", config("glm4_moe", DEEPSEEK, (128, 8, 4096, 1408)), "128 8 4096 1408 bf16"),
    ("GLM-4.7-Flash", config("glm4_moe_lite", DEEPSEEK, (64, 4, 2048, 1536)), "64 4 2048 1536 bf16"),
    (
        "GLM-5-FP8",
        config("glm_moe_dsa", DEEPSEEK, (256, 8, 6144, 2048), quantization_config=BLOCKS),
        "256 8 6144 2048 fp8",
    ),
    (
        "GLM-5.3-Flash",
        inside("text_config", config("glm5_next_text", DEEPSEEK, (288, 8, 4096, 2048), swiglu_limit=10.0), "glm5_next"),
        "288 8 4096 2048 bf16 silu:limit=10",
    ),
    (
        "MiniMax-M2",
        config("minimax_m2", MIXTRAL, (256, 8, 3072, 1536), quantization_config=BLOCKS | MINIMAX_GATES),
        "256 8 3072 1536 fp8",
    ),
    ("MiniMax-Text-01", config("minimax", MIXTRAL, (32, 2, 6144, 9216)), "32 2 6144 9216 bf16"),
    (
        "MiniMax-M3",
        inside(
            "text_config",
            config("minimax_m3_vl_text", MIXTRAL, (128, 4, 6144, 3072), swiglu_alpha=1.702, hidden_act="swigluoai"),
            "minimax_m3_vl",
        ),
        "128 4 6144 3072 bf16 swiglu_oai",
    ),
    ("gpt-oss-120b", config("gpt_oss", MIXTRAL, (128, 4, 2880, 2880), quantization_config=MXFP4), "biases"),
    (
        "Llama-4-Scout",
        inside("text_config", config("llama4_text", MIXTRAL, (16, 1, 5120, 8192)), "llama4"),
        "weights the tokens before",
    ),
    (
        "MiMo-V2-Flash",
        config(
            *("mimo_v2_flash", DEEPSEEK, (256, 8, 4096, 2048)),
            **{"num_hidden_layers": 48, "moe_layer_freq": [0] + [1] * 47, "quantization_config": BLOCKS},
        ),
        "256 8 4096 2048 fp8",
    ),
    (
        "Nemotron-3-Nano",
        config("nemotron_h", DEEPSEEK, (128, 6, 2688, 1856), mlp_hidden_act="relu2", hidden_act=None),
        "no gate",
    ),
    (
        "Gemma-4-26B-A4B",
        inside(
            "text_config",
            config("gemma4_text", ("num_experts", "top_k_experts", QWEN[2]), (128, 8, 2816, 704))
            | {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "enable_moe_block": True},
            "gemma4",
        ),
        "128 8 2816 704 bf16 gelu_tanh",
    ),
    (
        "Muse-Spark",
        config("muse_spark", QWEN, (256, 8, 8192, 4096), moe_hidden_size=4096),
        "a norm after each expert",
    ),
    (
        "LongCat-Flash",
        config(
            *("longcat_flash", ("n_routed_experts", "moe_topk", "expert_ffn_hidden_size"), (512, 12, 6144, 2048)),
            **{"ffn_hidden_size": 12288, "zero_expert_num": 256, "num_layers": 28},
        ),
        "512 12 6144 2048 bf16",
    ),
    (
        "Step-3.5-Flash",
        config("step3p5", ("moe_num_experts", "moe_top_k", QWEN[2]), (288, 8, 4096, 1280)),
        "288 8 4096 1280 bf16",
    ),
    (
        "Ling-flash-2.0",
        config("bailing_moe", QWEN, (256, 8, 4096, 1024), first_k_dense_replace=1),
        "256 8 4096 1024 bf16",
    ),
    ("Mistral-Large-4", config("mistral4", DEEPSEEK, (128, 4, 6144, 6144)), "128 4 6144 6144 bf16"),
    (
        "Hunyuan-A13B",
        config("hunyuan_v1_moe", ("num_experts", "moe_topk", QWEN[2]), (64, 8, 4096, 3072))
        | {"moe_topk": [8] * 32, "moe_intermediate_size": [3072] * 32, "num_hidden_layers": 32},
        "64 8 4096 3072 bf16",
    ),
    (
        "DBRX",
        {
            **{"model_type": "dbrx", "d_model": 6144, "torch_dtype": "bfloat16", "n_layers": 40},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        "16 4 6144 10752 bf16",
    ),
    ("Grok-2", {**config("git", MIXTRAL, (8, 2, 8192, 16384)), "architectures": ["Grok1ForCausalLM"]}, "GELU"),
    (
        "ERNIE-4.5-21B-A3B",
        config("ernie4_5_moe", ("moe_num_experts", "moe_k", QWEN[2]), (64, 6, 2560, 1536), moe_layer_start_index=1)
        | {"num_hidden_layers": 28, "moe_layer_end_index": 27, "moe_layer_interval": 1},
        "64 6 2560 1536 bf16",
    ),
    (
        "ERNIE-4.5-VL-28B-A3B",
        config("ernie4_5_moe_vl", ("moe_num_experts", "moe_k", QWEN[2]), (64, 6, 2560, 1536))
        | {"moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "num_hidden_layers": 28},
        "64 6 2560 1536 bf16; 64 6 2560 512 bf16",
    ),
    (
        "LFM2-8B-A1B",
        config("lfm2_moe", QWEN, (32, 4, 2048, 1792), num_dense_layers=2, num_hidden_layers=24, hidden_act=None),
        "32 4 2048 1792 bf16",
    ),
    ("Phi-3.5-MoE", config("phimoe", MIXTRAL, (16, 2, 4096, 6400)), "16 2 4096 6400 bf16"),
    (
        "Jamba-1.5-Mini",
        config(
            "jamba", ("num_experts", *MIXTRAL[1:]), (16, 2, 4096, 14336), expert_layer_period=2, expert_layer_offset=1
        )
        | {"num_hidden_layers": 32},
        "16 2 4096 14336 bf16",
    ),
    ("Granite-3.1-3B-A800M", config("granitemoe", MIXTRAL, (40, 8, 1536, 512)), "40 8 1536 512 bf16"),
]


def write(folder: pathlib.Path, config: dict[str, Any], **beside: Any) -> pathlib.Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def read_model(
    model: Any, *, dtype: str | None = None, engine: str | None = None, **ranks: Any
) -> tuple[MoEShape, ...]:
    return read_layers(model, Ranks(**ranks), dtype=dtype, engine=engine).shapes


def shapes_of(text: str) -> list[MoEShape]:
    """Of rows ``E k H I dtype``, and then scales or an activation where the layer has some."""
    found = []
    for row in (part.split() for part in text.split(";")):
        scales = next((its for its in row[5:] if its in SCALES), "block-128")
        activation = next((Activation.parse(its) for its in row[5:] if its not in SCALES), SILU)
        found.append(MoEShape(*map(int, row[:4]), row[4], activation=activation, scales=scales))
    return found


def names_shapes(said: str) -> bool:
    return re.match(r"(\d+ ){4}(bf16|fp8)", said) is not None


def test_as_many_as_the_figure_says() -> None:
    assert len({name for name, _, _ in PUBLISHED}) == len(PUBLISHED) >= 42


@pytest.mark.parametrize(("config", "said"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED])
def test_published(config: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, config)
    if not names_shapes(said):
        with pytest.raises(InputError, match=re.escape(said)):
            read_model(folder)
        return
    layers = read_layers(folder)
    assert list(layers.shapes) == shapes_of(said) and not layers.left


@pytest.mark.parametrize(
    ("config", "said"),
    [
        # Each was once read as plain layers, some of them of other sizes.
        (config("deepseek_v4", DEEPSEEK, (384, 6, 7168, 3072), quantization_config=BLOCKS, expert_dtype="fp4"), "expert_dtype='fp4'"),
        (inside("text_config", config("kimi_k3_text", DEEPSEEK, (896, 16, 7168, 3072), moe_latent_size=3584), "kimi_k3"), "SiTU"),
        (inside("text_config", config("muse_spark_text", QWEN, (256, 8, 8192, 4096)), "muse_spark"), "norm after each"),
        (config("nemotron_h", DEEPSEEK, (512, 22, 4096, 2688), moe_latent_size=1024, mlp_hidden_act="relu2"), "no gate"),
        (config("step3p7", QWEN, (288, 8, 4096, 1280), swiglu_limits=[7.0] * 4, num_hidden_layers=4), "swiglu_limits=7.0"),
        (
            config("bailing_moe_v3", QWEN, (512, 8, 2560, 768), expert_swiglu_limit_list=[7.0] * 2, num_hidden_layers=2),
            "expert_swiglu_limit_list=7.0",
        ),
        (config("qwen3_moe", QWEN, A3B, swiglu_alpha=1.702), "swiglu_alpha=1.702"),
    ],
)  # fmt: skip
def test_what_was_read_wrongly_once(config: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read_layers(write(tmp_path, config))


@pytest.mark.parametrize("kind", ["step3p7", "bailing_moe_v3"])
def test_layers_without_a_limit_among_those_with_one(kind: str, tmp_path: pathlib.Path) -> None:
    limits = {"expert_swiglu_limit_list" if kind.startswith("bailing") else "swiglu_limits": [0, 0, 7.0, 0]}
    layers = read_layers(write(tmp_path, config(kind, QWEN, (288, 8, 4096, 1280), num_hidden_layers=4, **limits)))
    assert list(layers.shapes) == [MoEShape(288, 8, 4096, 1280)]
    assert [its.numbers for its in layers.alike] == [(0, 1, 3), (2,)] and "1 of 4 routed layers" in layers.left[0]


def test_widths_of_experts_alone_come_first(tmp_path: pathlib.Path) -> None:
    """A latent width that experts compute in, and the experts' own feed-forward size before the dense layers'."""
    names = ("n_routed_experts", "moe_topk", "expert_ffn_hidden_size")
    for more, want in (
        ({"ffn_hidden_size": 12288}, MoEShape(512, 12, 6144, 2048)),
        ({"ffn_hidden_size": 12288, "moe_latent_size": 1024}, MoEShape(512, 12, 1024, 2048)),
        ({"ffn_hidden_size": 12288, "moe_hidden_size": 4096}, MoEShape(512, 12, 4096, 2048)),
        ({"routed_expert_hidden_size": 3072, "intermediate_size": 9}, MoEShape(512, 12, 3072, 2048)),
    ):
        assert read_model(write(tmp_path, config("longcat_flash", names, (512, 12, 6144, 2048), **more))) == (want,)


BASE = config("qwen3_moe", QWEN, A3B)
LAYERS = BASE | {"num_hidden_layers": 4}
PLAIN, FP8 = "128 8 2048 768 bf16", "128 8 2048 768 fp8"
BLOCK_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}


def groups(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    """compressed-tensors with groups of (targets, weights)."""
    found = {
        f"group_{number}": {"targets": targets, "weights": weights, "input_activations": DYNAMIC}
        for number, (targets, weights) in enumerate(pairs)
    }
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": found, **more}}


OTHER = CHANNEL["config_groups"]["group_0"]["weights"]


def activated(quantised: dict[str, Any], weights: dict[str, Any] | None = None, **activations: Any) -> dict[str, Any]:
    """A config of one group with other words about its weights and activations."""
    group = quantised["config_groups"]["group_0"]
    changed = {
        "weights": group["weights"] | (weights or {}),
        "input_activations": group["input_activations"] | activations,
    }
    return {"quantization_config": quantised | {"config_groups": {"group_0": group | changed}}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        # A group of their own, whatever the others are.
        (groups((["re:.*mlp.experts.*"], BLOCK_WEIGHTS), (["re:.*self_attn.*"], OTHER)), FP8),
        (groups((["re:.*self_attn.*"], BLOCK_WEIGHTS), (["re:.*mlp.experts.*"], OTHER)), "strategy='group'"),
        (groups((["Linear"], BLOCK_WEIGHTS), (["re:.*experts.*"], OTHER)), "strategy='group'"),
        (
            groups(
                (["Linear"], OTHER), (["model.layers.3.mlp.experts", "re:.*layers.[012].mlp.experts.*"], BLOCK_WEIGHTS)
            ),
            FP8,
        ),
        (groups((["re:.*self_attn.*"], OTHER)), PLAIN),
        (groups((["re:.*shared_experts.*"], OTHER), (["Linear"], BLOCK_WEIGHTS)), FP8),
        (groups((["re:.*down_proj"], OTHER), (["Linear"], BLOCK_WEIGHTS)), "only some projections"),
        # Exempt from all groups.
        (groups((["Linear"], OTHER), ignore=["lm_head", "re:.*experts.*"]), PLAIN),
        (groups((["Linear"], BLOCK_WEIGHTS), ignore=["re:.*self_attn.*", "re:.*mlp.gate$"]), FP8),
        ({"quantization_config": BLOCKS | {"modules_to_not_convert": ["experts"]}}, PLAIN),
        (
            {"quantization_config": BLOCKS | {"ignored_layers": [f"model.layers.{n}.mlp.experts" for n in range(4)]}},
            PLAIN,
        ),
        ({"quantization_config": AWQ | {"modules_to_not_convert": ["mlp"]}}, PLAIN),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": {r"-:.*\.experts\..*": {}}}}, PLAIN),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": {r"-:.*attn.*": {}}}}, "'gptq'"),
        # Experts in another dtype than the layers around them.
        ({"quantization_config": BLOCKS, "expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        ({"quantization_config": BLOCKS, "expert_dtype": "fp8"}, FP8),
        ({"quantization_config": BLOCKS, "expert_dtype": "bfloat16"}, PLAIN),
        ({"expert_dtype": "fp8"}, "expert_dtype='fp8'"),
        ({"quantization_config": BLOCKS | {"moe_quant_algo": "NVFP4"}}, "moe_quant_algo='NVFP4'"),
        # Scales that no kernel of ours reads.
        ({"quantization_config": BLOCKS | {"activation_scheme": "static"}}, "activation_scheme='static'"),
        ({"quantization_config": BLOCKS | {"fmt": "e5m2"}}, "fmt='e5m2'"),
        (groups((["Linear"], BLOCK_WEIGHTS | {"strategy": "tensor"})), "strategy='group'"),
        # Scales by channel and by tensor.
        ({"quantization_config": CHANNEL}, f"{FP8} channel"),
        (activated(CHANNEL, dynamic=False), "input_activations.dynamic=False"),
        (activated(CHANNEL, strategy="tensor"), "input_activations.strategy='tensor'"),
        (activated(CHANNEL, weights={"symmetric": False}), "weights.symmetric=False"),
        (activated(CHANNEL, weights={"strategy": "tensor"}), f"{FP8} tensor"),
        (activated(CHANNEL, weights={"strategy": "tensor"}, dynamic=False), "input_activations.strategy='token'"),
        (activated(CHANNEL, weights={"strategy": "tensor"}, dynamic=False, strategy="tensor"), f"{FP8} static"),
        ({"quantization_config": BLOCKS | {"weight_block_size": None}}, f"{FP8} tensor"),
        ({"quantization_config": BLOCKS | {"weight_block_size": None, "activation_scheme": "static"}}, f"{FP8} static"),
        ({"quantization_config": BLOCKS | {"weight_block_size": None, "fmt": "e5m2"}}, "fmt='e5m2'"),
        # ModelOpt in config.json.
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, f"{FP8} static"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}},
            PLAIN,
        ),
        # Patterns that are none, or would never end.
        (groups((["re:(("], BLOCK_WEIGHTS)), "which is none"),
        (groups((["re:(a+)+$"], BLOCK_WEIGHTS)), "too intricate"),
        (groups((["re:.*.*.*.*.*.*x"], BLOCK_WEIGHTS)), "too intricate"),
        (groups((7, BLOCK_WEIGHTS)), "targets=7"),
        (groups((["Linear"], BLOCK_WEIGHTS), ignore={"a": 1}), "ignore={'a': 1}"),
        # Clamps and switches.
        ({"swiglu_limit": 0}, PLAIN),
        ({"swiglu_limits": [0, 7.0, None, 0]}, PLAIN),
        ({"swiglu_limits": [7.0] * 4}, "swiglu_limits=7.0"),
        ({"model_type": "exaone_moe", "swiglu_limits": [7.0] * 4}, f"{PLAIN} silu:limit=7"),
        (
            {"model_type": "exaone_moe", "swiglu_limits": [0, 7, 7, 9]},
            f"{PLAIN}; {PLAIN} silu:limit=7; {PLAIN} silu:limit=9",
        ),
        ({"model_type": "glm5_next_text"}, f"{PLAIN} silu:limit=10"),
        ({"model_type": "glm5_next_text", "swiglu_limit": 7}, f"{PLAIN} silu:limit=7"),
        ({"model_type": "glm5_next_text", "swiglu_limit": 0}, PLAIN),
        ({"model_type": "glm5_next_text", "swiglu_limit": -1}, "has swiglu_limit=-1: limit of an activation is -1"),
        ({"model_type": "glm5_next_text", "swiglu_alpha": 1.7}, "swiglu_alpha=1.7"),
        (
            {"model_type": "minimax_m3_text", "swiglu_limit": 5, "swiglu_beta": 2},
            f"{PLAIN} silu:limit=5,alpha=1.702,beta=2",
        ),
        ({"model_type": "minimax_m3_text", "swiglu_alpha": 0}, "alpha of an activation is 0.0"),
        ({"model_type": "step3p5", "swiglu_limits": [7.0] * 4}, "swiglu_limits=7.0"),
        ({"model_type": "bailing_moe", "expert_swiglu_limit_list": [7.0] * 4}, "expert_swiglu_limit_list=7.0"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh'"),
        ({"hidden_act": "swigluoai"}, "hidden_act='swigluoai'"),
        ({"swiglu_limit": "high"}, "swiglu_limit='high'"),
        ({"swiglu_limit": True}, "swiglu_limit=True"),
        ({"moe_apply_router_weight_on_input": True}, "before the experts"),
        ({"enable_moe_block": False}, "enable_moe_block=False"),
        # Other widths than the model's.
        ({"moe_latent_size": 1024}, "128 8 1024 768 bf16"),
        ({"moe_hidden_size": 512, "moe_latent_size": None}, "128 8 512 768 bf16"),
        # Layers without experts.
        ({"mlp_only_layers": [0, 1]}, PLAIN),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "none with experts by mlp_only_layers"),
        ({"first_k_dense_replace": 4}, "none with experts by first_k_dense_replace=4"),
        ({"decoder_sparse_step": 5}, "none with experts by decoder_sparse_step=5"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({"moe_layer_freq": [0, 0, 0, 0]}, "none with experts"),
        ({"moe_layers_enum": "1,3", "num_experts": [128, 64, 128, 32]}, f"64{PLAIN[3:]}; 32{PLAIN[3:]}"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "moe"], "num_experts": [8, 128, 8, 128]}, PLAIN),
        ({"first_k_dense_replace": 1, "moe_intermediate_size": [6144, 768, 512, 768]}, f"{PLAIN}; 128 8 2048 512 bf16"),
        ({"mlp_only_layers": "no"}, "mlp_only_layers='no'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"first_k_dense_replace": True}, "first_k_dense_replace=True"),
    ],
)
def test_experts_are_told_apart(more: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, LAYERS | more)
    if names_shapes(said):
        assert list(read_model(folder)) == shapes_of(said)
    else:
        with pytest.raises(InputError, match=re.escape(said)):
            read_model(folder)


TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    ("more", "form"),
    [
        ({}, "plain"),
        ({"quantization_config": BLOCKS}, "fp8_block"),
        ({"quantization_config": BLOCKS | {"weight_block_size": [64, 64]}}, "fp8_block"),
        ({"quantization_config": BLOCKS | {"weight_block_size": None}}, "fp8_tensor"),
        ({"quantization_config": BLOCKS | {"weight_block_size": None, "activation_scheme": "static"}}, "fp8_static"),
        ({"quantization_config": BLOCKS, "expert_dtype": "fp4"}, "mxfp4"),
        ({"quantization_config": BLOCKS, "expert_dtype": "int3"}, "other"),
        ({"quantization_config": CHANNEL}, "fp8_channel"),
        (groups((["Linear"], BLOCK_WEIGHTS)), "fp8_block"),
        (groups((["Linear"], TENSOR)), "fp8_tensor"),
        ({"quantization_config": INT4}, "int4"),
        (groups((["Linear"], {"num_bits": 4, "type": "float", "group_size": 16})), "nvfp4"),
        (groups((["Linear"], {"num_bits": 4, "type": "float", "group_size": 32})), "mxfp4"),
        (groups((["Linear"], {"num_bits": 4, "type": "float", "group_size": [32]})), "other"),
        (groups((["Linear"], TENSOR | {"strategy": ["tensor"]})), "other"),
        (groups((["re:.*self_attn.*"], TENSOR)), "plain"),
        ({"quantization_config": NVFP4}, "nvfp4"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "fp8_static"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": ["FP8"]}}, "other"),
        ({"quantization_config": AWQ}, "int4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "other"),
        ({"quantization_config": MXFP4}, "mxfp4"),
    ],
)
def test_the_form_by_which_an_engine_chooses_its_kernel(
    more: dict[str, Any], form: str, tmp_path: pathlib.Path
) -> None:
    """Also of layers that our kernels do not run."""
    assert [its.form for its in layers_of(write(tmp_path, LAYERS | more)).alike] == [form]


def test_static_scales_of_compressed_tensors(tmp_path: pathlib.Path) -> None:
    static = {"targets": ["Linear"], "weights": TENSOR, "input_activations": TENSOR | {"dynamic": False}}
    more = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": static}}}
    assert layers_of(write(tmp_path, LAYERS | more)).alike[0].form == "fp8_static"


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, "hf_quant_config.json.quant_algo='NVFP4'"),
        ({"quant_algo": "FP8"}, f"{FP8} static"),
        ({"quant_algo": "NVFP4", "exclude_modules": ["*mlp.experts*", "lm_head"]}, PLAIN),
        ({"quant_algo": None, "kv_cache_quant_algo": "FP8"}, PLAIN),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"model.layers.1.mlp.experts.0": {"quant_algo": "W4A8"}},
            },
            "1 of 4 routed layers stay with the engine",
        ),
        ([1], "quantization=[1]"),
    ],
)
def test_modelopts_own_file(quantization: Any, said: str, tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, LAYERS, hf_quant_config={"producer": {"name": "modelopt"}, "quantization": quantization})
    if names_shapes(said):
        assert list(read_model(folder)) == shapes_of(said)
    elif said.startswith("1 of"):
        layers = read_layers(folder)
        assert list(layers.shapes) == shapes_of(PLAIN) and said in layers.left[0] and "W4A8" in layers.left[0]
    else:
        with pytest.raises(InputError, match=re.escape(said)):
            read_model(folder)
    # What config.json itself says counts first, as in the engines.
    write(tmp_path, LAYERS | {"quantization_config": BLOCKS})
    assert list(read_model(folder)) == shapes_of(FP8)


def test_layers_that_stay_with_the_engine_are_counted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rampwrap.cli.main import main

    limits = [0, 7.0, 7.0, 0]
    ignored = {"quantization_config": BLOCKS | {"modules_to_not_convert": ["model.layers.3"]}}
    layers = read_layers(write(tmp_path, LAYERS | ignored | {"swiglu_limits": limits}))
    assert list(layers.shapes) == shapes_of(f"{FP8}; {PLAIN}")
    assert len(layers.left) == 1 and layers.left[0].startswith("2 of 4 routed layers stay with the engine: ")
    command = ["profile", "--engine", "vllm", "--model", str(tmp_path), "--kernel", "sim", "--dry-run", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["left"] == list(layers.left)


@pytest.mark.parametrize(
    ("more", "ranks", "want"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, Ranks(8), MoEShape(257, 9, 7168, 256)),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, Ranks(8), MoEShape(256, 8, 7168, 256)),
        ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 384}, Ranks(), MoEShape(384, 8, 7168, 2048)),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, Ranks(8, True), MoEShape(256, 8, 7168, 2048, "bf16", 32)),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, Ranks(8, True, 32), MoEShape(288, 8, 7168, 2048, "bf16", 36)),
        ({"architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 160}, Ranks(), MoEShape(161, 9, 7168, 2048)),
        ({"model_type": "deepseek_v3"}, Ranks(), MoEShape(257, 9, 7168, 2048)),
        ({"model_type": "deepseek_v3"}, Ranks(8, False, 0, 0), MoEShape(256, 8, 7168, 256)),
        ({"model_type": "else"}, Ranks(fused_shared_experts=2), MoEShape(258, 10, 7168, 2048)),
    ],
)
def test_sglang_makes_the_shared_expert_one_more(
    more: dict[str, Any], ranks: Ranks, want: MoEShape, tmp_path: pathlib.Path
) -> None:
    folder = write(tmp_path, config("deepseek_v3", DEEPSEEK, V3, n_shared_experts=1) | more)
    assert read_layers(folder, ranks, engine="sglang").shapes == (want,)
    assert read_layers(folder, attrs.evolve(ranks, fused_shared_experts=None), engine="vllm").shapes[0].num_experts in (
        *(256, 384, 160, 288),
    )


def test_ranks_as_options(tmp_path: pathlib.Path) -> None:
    assert Ranks().arguments == Ranks(1).arguments == ""
    assert (
        Ranks(8).arguments == " --tp-size 8" and Ranks(fused_shared_experts=0).arguments == " --fused-shared-experts 0"
    )
    assert Ranks(4, True, 32).arguments == " --tp-size 4 --ep --num-redundant-experts 32"


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ((4, False, 16), "without expert parallelism"),
        ((4, True, 3), "4 ranks do not divide 131 physical experts"),
        ((4, True, -1), "redundant_experts is -1"),
        ((0, True, 0), "tp_size is 0"),
        ((1, False, 0, -1), "fused_shared_experts is -1"),
    ],
)
def test_ranks_that_no_engine_has(ranks: Any, said: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=said):
        read_layers(write(tmp_path, BASE), Ranks(*ranks))


def test_slices_that_cut_blocks_of_scales_have_smaller_ones(tmp_path: pathlib.Path) -> None:
    """As vLLM repeats the scales of a block for 64 or 32 where those divide a slice, and no smaller ones."""
    folder = write(tmp_path, BASE | {"quantization_config": BLOCKS})
    assert read_model(folder, tp_size=2) == (MoEShape(128, 8, 2048, 384, "fp8"),)
    assert read_model(folder, tp_size=4) == (MoEShape(128, 8, 2048, 192, "fp8", scales="block-64"),)
    assert read_model(folder, tp_size=8) == (MoEShape(128, 8, 2048, 96, "fp8", scales="block-32"),)
    with pytest.raises(InputError, match=r"intermediate_size=48 .* blocks of scales of no less than 32 do not divide"):
        read_model(folder, tp_size=16)
    write(tmp_path, BASE | {"quantization_config": CHANNEL})
    assert read_model(folder, tp_size=16) == (MoEShape(128, 8, 2048, 48, "fp8", scales="channel"),)


def test_a_mark_at_the_beginning_and_any_locale(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    text = json.dumps(BASE | {"_name_or_path": "größe/模型"}, ensure_ascii=False)
    (tmp_path / "config.json").write_text("\ufeff" + text, encoding="utf-8")
    assert list(read_model(tmp_path)) == shapes_of(PLAIN)


def test_a_model_of_hugging_faces_cache_by_its_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--Qwen--Qwen3" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    write(snapshot, BASE)
    find = hub.try_to_load_from_cache
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *names: find(*names, cache_dir=tmp_path))
    monkeypatch.chdir(tmp_path)
    assert list(read_model("Qwen/Qwen3")) == shapes_of(PLAIN)
    with pytest.raises(InputError, match="Qwen/Qwen4 is no readable model config"):
        read_model("Qwen/Qwen4")


ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "silu",
    "fp8",
    [],
    {},
    [[]],
]
ODD += [
    [1, 2],
    [128, 128],
    {"a": 1},
    [None] * 3,
    "re:(a+)+$",
    "re:((",
    "*",
    "Linear",
    "dense",
    ["re:.*"] * 50,
    "9" * 5000,
]


def _mutants(rng: random.Random) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Configs with one to three faults: a value replaced, a field lost, renamed or doubled in a list, bytes damaged."""
    while True:
        _, whole, _ = rng.choice(PUBLISHED)
        made = json.loads(json.dumps(whole))
        for _ in range(rng.randint(1, 3)):
            at: Any = made
            while isinstance(at, dict | list) and at:
                key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
                if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
                    at = at[key]
                    continue
                kind = rng.random()
                if kind < 0.6:
                    at[key] = rng.choice(ODD)
                elif kind < 0.75:
                    at.pop(key)
                elif kind < 0.9:
                    at[key] = [at[key]] * rng.choice([0, 1, 2, 61, 2_000])
                elif isinstance(at, dict):
                    at[rng.choice(["num_experts", "expert_dtype", "swiglu_limit", "mlp_only_layers"])] = at.pop(key)
                break
        raw = json.dumps(made).encode()
        if rng.random() < 0.15:
            place = rng.randrange(len(raw))
            raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + rng.choice([0, 1, 40]) :]
        yield whole, raw


@pytest.mark.slow
def test_a_thousand_mutated_configs(tmp_path: pathlib.Path) -> None:
    """Only a shape that the fields still say, or one sentence of ours, at once."""
    rng, path = random.Random(13), tmp_path / "config.json"
    counts = {"read": 0, "refused": 0}
    for _, (_, raw) in zip(range(1000), _mutants(rng), strict=False):
        path.write_bytes(raw)
        options = rng.choice([{}, {"tp_size": 2}, {"tp_size": 4, "expert_parallel": True}, {"engine": "sglang"}])
        start = time.monotonic()
        try:
            shapes = read_model(tmp_path, **options)
        except RampwrapError as error:
            counts["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, raw
        else:
            counts["read"] += 1
            said = set(_whole_numbers(json.loads(raw)))
            for its in shapes:
                slices = options.get("tp_size", 1) if "expert_parallel" not in options else 1
                assert its.intermediate_size * slices in said and its.hidden_size in said, raw
                assert {its.num_experts, its.num_experts - 1} & said and {its.top_k, its.top_k - 1} & said, raw
        assert time.monotonic() - start < 5, raw  # seconds; 0.3 on an idle core
    print(counts)
    assert sum(counts.values()) == 1000 and min(counts.values()) > 50


def _whole_numbers(value: Any) -> Iterator[int]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for its in inner:
        yield from _whole_numbers(its)
    if type(value) is int:
        yield value


# Of what transformers' own default configs lack to make a model, in a form that its model takes.
MENDED: dict[str, dict[str, Any]] = {
    "DeepseekV2Config": {"num_experts_per_tok": 6},
    "DeepseekOcr2Config": {},
    "Dots1Config": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv"] * 32},
}
REFUSED_MODELS = "clamped|biases|gate|before the experts|activation|rows of embeddings|attention has experts|norm after"


@pytest.mark.slow
def test_every_config_class_of_transformers_with_experts(tmp_path: pathlib.Path) -> None:
    """Read as its model has them: the model is made without weights, and its experts' parameters are compared."""
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    root = pathlib.Path(transformers.__file__).parent / "models"
    counts = {"right": 0, "refused": 0, "unmade": 0, "classes": 0}
    for file in sorted(root.glob("*/configuration_*.py")):
        if not re.search("expert|moe", file.read_text(encoding="utf-8"), re.IGNORECASE):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if not issubclass(kind, transformers.PretrainedConfig) or kind.__module__ != module.__name__:
                continue
            try:
                made = kind(**MENDED.get(name, {}))
                text = made.to_json_string(use_diff=False)
            except Exception:  # some have no defaults at all
                continue
            if not re.search(r'"[^"]*(expert|moe)[^"]*"', text):
                continue
            counts["classes"] += 1
            (tmp_path / "config.json").write_text(text, encoding="utf-8")
            try:
                found = {(s.num_experts, s.hidden_size, s.intermediate_size) for s in read_model(tmp_path)}
                said = ""
            except RampwrapError as error:
                found, said = set(), str(error)
            if kind not in MODEL_MAPPING:
                counts["refused" if said else "unmade"] += 1
                continue
            try:
                with torch.device("meta"):
                    model = transformers.AutoModel.from_config(made)
            except Exception:  # a model whose own defaults do not make one
                counts["refused" if said else "unmade"] += 1
                continue
            has = set(_experts(model))
            if not has:
                assert said or name in ("AriaConfig", "AriaTextConfig"), (name, found)
            elif said:
                assert re.search(REFUSED_MODELS, said), (name, said)
            else:
                assert found == has, (name, found, has)
            counts["refused" if said else "right"] += 1
    print(counts)
    assert counts["right"] >= 40


def _experts(model: Any) -> Iterator[tuple[int, int, int]]:
    """(experts, hidden, intermediate) of the experts modules of a model of transformers, but for those of what sees for it.

    (Dots3 Note's vision tower has experts, ever more from layer to layer; read and planned for is the language model.)
    """
    for path, module in model.named_modules():
        if path.startswith("vision"):
            continue
        w13, w2 = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if getattr(w13, "ndim", 0) == 3 and getattr(w2, "ndim", 0) == 3:
            experts, hidden, intermediate = w2.shape
            yield experts, hidden, intermediate
