"""SGLang with the hook against SGLang without it: time of prefill and decode steps, first tokens, and what the hook ran.

    python benchmarks/serve_sglang.py --layers 8 --batch-size 8 64 256 --prompts 2048 --profile-budget 30 --out OUT.json

Dummy weights behind a config.json that this script writes, routing as random routers make it, CUDA graphs of decode steps. Arms, each
an SGLang in a process of its own on one GPU, measured in turn:

    installed   SGLang as it comes (RAMPWRAP_DISABLE=1)
    plugin      SGLang that finds rampwrap by its entry point, and a plan

The plan comes from a table of vLLM's kernel, which has the same source, under the name of this GPU; with `--profile-budget` it
is measured in the installed arm, on SGLang's own kernel, before the plugin starts. With `--whole` an `sglang.Engine` with the
plugin serves greedy requests first, while the installed arm starts: that SGLang serves with the hook, no figure. Needs SGLang
importable, 0.5.17 or later. An error of an arm comes with the end of its log.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import attrs
import numpy as np
from common import geometric_mean, stamp
from serve_vllm import Arm, say
from serve_vllm_setup import MODELS, ROOT, device_on

from rampwrap.checkpoint.model import read_layers
from rampwrap.measure.timings import Timings
from rampwrap.plan.folder import DISABLE, OWN_PLANS, PLANS
from rampwrap.plan.make import make_plan
from rampwrap.plan.plan import Plan

TABLES = {name: MODELS[name].static for name in ("olmoe",)} | {
    "qwen3-30b": "benchmarks/results/h200-vllm_fused_moe-qwen3-30b-bf16.npz"
}
"Of vLLM's kernel."
ARMS = ("installed", "plugin")
LENGTH = 32
"Prompt tokens of each sequence of a decode step."
MOST_CONFIGS = 8
"Of a profile in the run: each is two kernels to compile."


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TABLES, default="olmoe")
    parser.add_argument("--config", default="{}", help="JSON laid over the model's config; another shape needs --plan")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048])
    parser.add_argument("--steps", type=int, default=32, help="of each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--profile-budget", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--plan", type=pathlib.Path, help="in place of the table's")
    parser.add_argument("--server", default="{}", help="JSON laid over the arguments of SGLang's server")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--logs", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    return parser.parse_args(given)


def prepare(arguments: argparse.Namespace, folder: pathlib.Path) -> tuple[dict[str, Any], Plan]:
    """Writes the model's config, the plan and an entry point; what an arm reads first, and the plan."""
    for part in ("model", "plans", "site/rampwrap-0.dist-info"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    config = MODELS[arguments.model].config | {"num_hidden_layers": arguments.layers} | json.loads(arguments.config)
    (folder / "model/config.json").write_text(json.dumps(config))
    (shape,) = read_layers(folder / "model").shapes
    if arguments.plan is not None:
        plan = Plan.load(arguments.plan)
    else:
        table = ROOT / TABLES[arguments.model]
        plan = make_plan(Timings.load(table), source=table.name)
    assert plan.shape == shape, f"the plan is for {plan.shape}, the model has {shape}"
    plan = attrs.evolve(plan, device=device_on(os.environ.get("CUDA_VISIBLE_DEVICES", "0")))
    plan.save(folder / "plans/a.plan.json")
    (folder / "site/rampwrap-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: rampwrap\nVersion: 0\n")
    (folder / "site/rampwrap-0.dist-info/entry_points.txt").write_text(
        "[sglang.srt.plugins]\nrampwrap = rampwrap.engines.sglang:register\n"
    )
    most = max(arguments.batch_size)
    rows = max([8192, LENGTH * most, *arguments.prompts])
    server = {
        "model_path": str(folder / "model"),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": {"bf16": "bfloat16", "fp16": "float16"}[shape.dtype],
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "context_length": 8192,
        "max_total_tokens": rows + most * (LENGTH + arguments.turns * arguments.steps + 32),
        "max_running_requests": max(most, 8),
        "chunked_prefill_size": rows,
        "disable_radix_cache": True,
        "mem_fraction_static": 0.5,
        "cuda_graph_bs_decode": sorted(arguments.batch_size),
        "disable_prefill_cuda_graph": True,
        "random_seed": 0,
        "log_level": "info",
    }
    shape_arguments = {
        name: getattr(shape, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size", "dtype")
    }
    return {
        "server": server | json.loads(arguments.server),
        "vocabulary": config["vocab_size"],
        "shape": shape_arguments,
    }, plan


def environment_of(arm: str, folder: pathlib.Path) -> dict[str, str]:
    """What an arm's process starts with."""
    paths = [str(ROOT), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    out = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        PLANS: str(folder / "plans"),
        OWN_PLANS: "1",
    }
    return out | ({DISABLE: "1"} if arm == "installed" else {})


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two arms' outputs are apart: greedy tokens that agree, of the first step and of all, and logits."""
    a, b = (np.array(its["tokens"]) for its in (one, other))
    apart = [
        float(np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(x))
        for x, y in zip(one["logits"], other["logits"], strict=True)
    ]
    return {"first_tokens": float((a[0] == b[0]).mean()), "tokens": float((a == b).mean()), "logits": apart}


def turns(engines: dict[str, Arm], arguments: argparse.Namespace, start: float) -> list[dict[str, Any]]:
    """Every step in turn, in all arms: host milliseconds a step, and GPU microseconds of one step under the profiler."""
    rows: list[dict[str, Any]] = []
    cells = [("decode", batch) for batch in arguments.batch_size] + [
        ("prefill", length) for length in arguments.prompts
    ]
    for kind, size in cells:
        its: dict[str, Any] = {"kind": kind, "size": size}
        given = {"requests": 1, "length": size} if kind == "prefill" else {}
        steps = arguments.steps if kind == "decode" else max(2, arguments.steps // 4)
        milliseconds: dict[str, list[float]] = {name: [] for name in engines}
        for arm in engines.values():
            if kind == "decode":
                arm("begin", requests=size, length=LENGTH)
            arm(kind, steps=3, **given)
        for turn in range(arguments.turns):
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                milliseconds[name] += engines[name](kind, steps=steps, **given)["ms"]
        for name, arm in engines.items():
            its[name] = arm(kind, steps=4, profile=True, **given) | {"ms": float(np.median(milliseconds[name]))}
        rows.append(its)
        said = ", ".join(
            f"{n} {its[n]['ms']:.3f} ms, GPU {its[n]['gpu_us']:.0f} us, experts {its[n]['moe_us']:.0f} us"
            for n in engines
        )
        say(start, f"{kind} {size}: {said}")
    return rows


def main() -> int:
    arguments, start = arguments_of(), time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="serve-sglang-"))
    logs = arguments.logs or folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    settings, plan = prepare(arguments, folder)
    script, found = ("serve_sglang_arm.py",), {"stamp": stamp(), "model": arguments.model, "layers": arguments.layers}
    running: list[Arm] = []

    def begin(name: str) -> Arm:
        running.append(Arm(name, settings, environment_of(name, folder), logs / f"{name}.log", script))
        return running[-1]

    try:
        engines = {"installed": begin("installed")}
        whole = None
        if arguments.whole:  # what its scheduler counted is in the log alone
            more = settings | {"requests": 8, "length": LENGTH, "steps": 24}
            environment = environment_of("plugin", folder) | {"RAMPWRAP_STATS": "2"}
            whole = Arm("whole", more, environment, logs / "whole.log", (*script, "--whole"))
            running.append(whole)
        found["installed"] = engines["installed"].started()
        say(start, f"installed: {found['installed']}")
        if whole is not None:
            try:
                found["whole"] = whole.started()
                say(start, "whole engine: " + json.dumps({k: v for k, v in found["whole"].items() if k != "tokens"}))
            except RuntimeError as error:  # the other arms can tell more
                found["whole"] = {"error": str(error)}
                say(start, str(error))
        if arguments.profile_budget:
            chosen = dict.fromkeys(plan.static.index(tokens) for tokens in (*arguments.batch_size, *arguments.prompts))
            chosen |= dict.fromkeys(range(len(plan.configs)))
            configs = [dict(plan.configs[index]) for index in list(chosen)[:MOST_CONFIGS]]
            tokens = sorted({*arguments.batch_size, *arguments.prompts})
            its = {"out": str(folder / "plans/b.plan.json"), "configs": configs, "tokens": tokens}
            found["profile"] = engines["installed"]("profile", budget_s=arguments.profile_budget, **its)
            say(start, f"profile: {found['profile']}")
        engines["plugin"] = begin("plugin")
        found["plugin"] = engines["plugin"].started()
        say(start, f"plugin: {found['plugin']}")
        outputs = {name: arm("outputs", requests=8, length=LENGTH, steps=8) for name, arm in engines.items()}
        outputs["again"] = engines["installed"]("outputs", requests=8, length=LENGTH, steps=8)
        found["differences"] = differences(outputs["installed"], outputs["plugin"])
        found["noise"] = differences(outputs["installed"], outputs["again"])
        say(start, f"plugin to installed: {found['differences']}; installed to itself: {found['noise']}")
        found["results"] = turns(engines, arguments, start)
        found["stats"] = engines["plugin"]("stats")
    finally:
        if arguments.out is not None:  # first: an engine may take its time to end
            arguments.out.write_text(json.dumps(found, indent=1))
        for arm in running:
            arm.stop()
    for number in ("gpu_us", "ms"):
        for kind in ("decode", "prefill"):
            cells = [its for its in found["results"] if its["kind"] == kind and its["plugin"][number]]
            gains = [its["installed"][number] / its["plugin"][number] for its in cells]
            if gains:
                print(
                    f"{kind}, {number}: plugin over installed {[round(its, 3) for its in gains]}, mean {geometric_mean(gains):.3f}x"
                )
    hooked = [layer for source in found["stats"]["sources"] for layer in source["layers"]]
    launches = sum(one["launches"] for layer in hooked for one in layer["configs"])
    print(
        f"the hook chose {launches} launches in {len(hooked)} layers and buckets, modes {sorted({its['mode'] for its in hooked})}"
    )
    return 0 if launches else 1


if __name__ == "__main__":
    sys.exit(main())
