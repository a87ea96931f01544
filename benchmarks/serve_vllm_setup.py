"""What the engines of `serve_vllm.py` start from: configs of published models, plans, static tables, environments."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import attrs

from rampwrap.adapters.vllm_fused_moe import config_file, config_file_name
from rampwrap.checkpoint.model import read_layers
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.cute.build.library import VARIABLE
from rampwrap.measure.join import join
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import DISABLE, OWN_PLANS, PLANS, SHIPPED, Plans
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan
from rampwrap.policy.static import static_table, write_static

ROOT = pathlib.Path(__file__).parent.parent
MAX_TOKENS = 8192
"Of a step."
ARMS = ("installed", "static", "deep_gemm", "vllm_triton", "plugin_triton", "plugin_defaults", "plugin")
PLUGINS = ("plugin_triton", "plugin_defaults", "plugin")
"""With rampwrap; plugin_triton has no CuTe kernels, as after 'pip install rampwrap' and nothing else, plugin_defaults no plan, not even
one that comes with rampwrap."""
COMMON = {
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


QWEN3_30B = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
# As the published FP8 checkpoint has it: routers and the output stay in bf16.
BLOCK_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(48))],
}
# As checkpoints that are called FP8-dynamic have it.
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
CHANNEL_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FP8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": BLOCK_FP8["modules_to_not_convert"],
}
# A scale a tensor, for activations too, as older checkpoints have it.
STATIC_FP8 = {name: its for name, its in BLOCK_FP8.items() if name != "weight_block_size"} | {
    "activation_scheme": "static"
}


@attrs.frozen
class Model:
    """A published architecture without its weights, and the tables that its plan and its static table come from."""

    config: dict[str, Any]
    timings: tuple[str, ...]
    "Of our kernels, for the plan; none where it is profiled in the run."
    static: str
    """Of vLLM's kernel, for the static table: a timing table, or the results of the race that was triton_vs_vllm.py; "" for
    none."""
    kv_gb: float


MODELS = {
    "olmoe": Model(
        COMMON
        | {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "vocab_size": 50304,
        },
        ("benchmarks/results/h200-v2-triton-olmoe-bf16.npz", "benchmarks/results/h200-v2-cute-olmoe-bf16.npz"),
        "benchmarks/results/h200-vllm_fused_moe-olmoe-bf16.npz",
        13.0,
    ),
    "qwen3-30b": Model(
        QWEN3_30B,
        ("benchmarks/results/h200-v2-triton-qwen3-30b-bf16.npz", "benchmarks/results/h200-v2-cute-qwen3-30b-bf16.npz"),
        "benchmarks/results/h200-triton_vs_vllm-bf16.json",
        9.0,
    ),
    "qwen3-30b-fp8": Model(
        QWEN3_30B | {"quantization_config": BLOCK_FP8},
        ("benchmarks/results/h200-v2-cute-qwen3-30b-fp8.npz",),
        "benchmarks/results/h200-sweep-vllm-qwen3-30b-fp8.npz",
        9.0,
    ),
    "qwen3-30b-fp8-channel": Model(QWEN3_30B | {"quantization_config": CHANNEL_FP8}, (), "", 9.0),
    "qwen3-30b-fp8-static": Model(QWEN3_30B | {"quantization_config": STATIC_FP8}, (), "", 9.0),
}


def requests_of(prompt: int) -> tuple[int, ...]:
    """How many prompts of a length are measured at once: as many as fill a step, and one alone."""
    return tuple(dict.fromkeys((max(1, MAX_TOKENS // prompt), 1)))


def static_file(source: pathlib.Path, name: str) -> str:
    """A table tuned per token count under uniform routing, as text of vLLM's JSON file."""
    if source.suffix == ".npz":
        timings = Timings.load(source)
        return write_static(static_table(timings, "uniform"), timings.configs)
    rows = json.loads(source.read_text())["results"][name]
    best = {str(row["num_tokens"]): row["best"]["vllm"][0] for row in rows if row["label"].endswith("uniform")}
    return json.dumps(best, indent=4)


def prepare(name: str, folder: pathlib.Path, arguments: argparse.Namespace, gpu: str) -> dict[str, Any]:
    """Writes the model's config, its plan, the static table, and an entry point where rampwrap is not installed."""
    model = MODELS[name]
    config = model.config | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    for part in ("model", "plans", "no plans", "static", "site/rampwrap-0.dist-info"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (shape,) = read_layers(folder / "model").shapes
    tables = arguments.timings or [ROOT / table for table in model.timings]
    timings = join([Timings.load(table) for table in tables]) if tables else None
    assert timings is None or timings.shape == shape, f"{timings.shape} was profiled, {name} has {shape}"
    if arguments.profile_budget:
        profiled(folder, arguments, gpu, timings.kernel if timings is not None else "triton_fused_moe")
    elif arguments.shipped_plans:  # which serve beside an empty folder
        if arguments.stand_in:
            stand_in(shape, folder / "plans", device_on(gpu))
    else:
        assert timings is not None, (
            f"no table of {name} is here; add --profile-budget 60, or --shipped-plans for defaults"
        )
        make_plan(timings, source=" + ".join(table.name for table in tables)).save(
            folder / "plans" / f"{name}.plan.json"
        )
    device = timings.device.name if timings is not None else device_on(gpu).name
    if model.static:
        table = folder / "static" / config_file_name(shape, device)
        table.write_text(static_file(ROOT / model.static, name))
    (folder / "site/rampwrap-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: rampwrap\nVersion: 0\n")
    (folder / "site/rampwrap-0.dist-info/entry_points.txt").write_text(
        "[vllm.general_plugins]\nrampwrap = rampwrap.engines.vllm:register\n"
    )
    return {"config": config, "shape": shape, "shipped": str(config_file(shape, device) or "")}


def stand_in(shape: MoEShape, folder: pathlib.Path, device: Device) -> None:
    """Where rampwrap brings no plan for a layer on this GPU, those for another one, under this one's name."""
    shipped = Plans.read(SHIPPED)
    if any(plan.shape == shape and plan.device.same_kind(device) for _, plan in shipped.found):
        return
    for path, plan in shipped.found:
        if plan.shape == shape:
            print(f"rampwrap brings no plan for {device.label}; {pathlib.Path(path).name} stands in", flush=True)
            attrs.evolve(plan, device=device).save(folder / pathlib.Path(path).name)


def device_on(gpu: str) -> Device:
    """That of another process: this one needs no GPU."""
    code = "import attrs, json; from rampwrap.kernel.device import Device; print(json.dumps(attrs.asdict(Device.current())))"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Device(**json.loads(done.stdout))


def match(path: str, device: Device) -> str:
    """Which plan an engine serves, where it was measured, and why it was taken for this GPU."""
    plan = Plan.load(path)
    tables = plan.provenance.get("table", "?")
    where = "comes with rampwrap" if pathlib.Path(path).parent == SHIPPED else "is in the folder of the run"
    how = "the GPU's name" if plan.device.label == device.label else f"properties alike: of {plan.device.label}"
    return f"{pathlib.Path(path).name}, which {where}, matched by {how} ({device.label}), of {tables}"


def profiled(folder: pathlib.Path, arguments: argparse.Namespace, gpu: str, kernel: str) -> None:
    """Makes the plan on this machine, for a version of a kernel or a GPU that no table was measured with."""
    command = [sys.executable, "-m", "rampwrap", "profile", "--engine", "vllm", "--model", str(folder / "model")]
    command += [
        "--kernel",
        kernel,
        "--budget",
        f"{arguments.profile_budget:g}s",
        "--out",
        str(folder / "plans"),
        "--quiet",
    ]
    tokens = {1, 128, 1024, MAX_TOKENS, *arguments.batch_size, *arguments.prompts}
    command += ["--batch-size", *map(str, sorted(tokens))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": gpu})


CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")


def environment_of(
    arm: str, folder: pathlib.Path, gpu: str, deep_gemm: bool = False, cold: bool = False
) -> dict[str, str]:
    """What an engine's process starts with; `deep_gemm` leaves DeepGEMM on, as a user's vLLM has it, in all arms alike, and
    `cold` gives each arm empty caches of its own, so that it starts as on a new machine."""
    names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    paths = [str(ROOT), *([] if "rampwrap" in names else [str(folder / "site")]), os.environ.get("PYTHONPATH", "")]
    out = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": gpu,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "rampwrap_pool",
    }
    # DeepGEMM runs FP8 dense layers, and experts where it is told to: on Hopper vLLM's own choice for them is Triton. It
    # compiles with nvcc as it goes; its warm-up would compile 503 kernels, over three minutes, of which a run needs few.
    # The variable stays unset: where somebody sets it, to 1 even, vLLM 0.26 takes DeepGEMM for experts too.
    if deep_gemm:
        out.pop("VLLM_USE_DEEP_GEMM", None)
        out["VLLM_DEEP_GEMM_WARMUP"] = "skip"
    else:
        out.setdefault("VLLM_USE_DEEP_GEMM", "0")
    out.pop("VLLM_TUNED_CONFIG_FOLDER", None)
    if arm == "static":
        out["VLLM_TUNED_CONFIG_FOLDER"] = str(folder / "static")
    if cold:
        out |= {name: str(folder / "caches" / arm / name) for name in CACHES}
    if arm == "plugin_triton":
        out[VARIABLE] = str(folder / "no kernels")
    if arm == "plugin_defaults":
        out |= {PLANS: str(folder / "no plans"), OWN_PLANS: "1"}
    elif arm in PLUGINS:
        out[PLANS] = str(folder / "plans")
    else:
        out[DISABLE] = "1"
    return out


def settings_of(
    name: str, made: dict[str, Any], folder: pathlib.Path, arguments: argparse.Namespace, arm: str
) -> dict[str, Any]:
    """What an engine reads first."""
    config, shape = made["config"], made["shape"]
    options: dict[str, Any] = {}
    if arguments.mode == "eager":
        options["enforce_eager"] = True
    elif arguments.mode == "piecewise":
        options["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    if arguments.capture_sizes and arguments.mode != "eager":
        options["cudagraph_capture_sizes"] = arguments.capture_sizes
    if arm == "deep_gemm":
        options["moe_backend"] = "deep_gemm"
    if arm == "vllm_triton":  # its CUTLASS runs FP8 by channel where nothing is said
        options["moe_backend"] = "triton"
    kv_gb = MODELS[name].kv_gb * config["num_hidden_layers"] / MODELS[name].config["num_hidden_layers"]
    return {
        "model": str(folder / "model"),
        "fp8": shape.dtype == "fp8",
        "layers": config["num_hidden_layers"],
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "vocabulary": config["vocab_size"],
        "max_tokens": MAX_TOKENS,
        "max_seqs": max(512, *arguments.batch_size),
        "max_model_len": max([2048, *(prompt + 8 for prompt in arguments.prompts)]),
        "kv_bytes": int(kv_gb * 1e9),
        "share": 0.1,
        "options": options,
    }


def needed_gb(made: dict[str, Any], settings: dict[str, Any]) -> float:
    """GPU memory of one engine: weights, cache, activations and graphs."""
    config, shape = made["config"], made["shape"]
    weights = config["num_hidden_layers"] * shape.weight_bytes + 4 * config["vocab_size"] * config["hidden_size"]
    return float(weights * 1.1 + settings["kv_bytes"]) / 1e9 + 9.0


def free_gb(gpu: str) -> float:
    code = "import torch; print(torch.cuda.mem_get_info()[0] / 1e9)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
    )
    return float(done.stdout)
