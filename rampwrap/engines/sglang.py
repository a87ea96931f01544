"""SGLang: its Triton fused MoE runs the config that a plan picks for the routing, by one hook around one function.

SGLang finds `register` through the entry point group ``sglang.srt.plugins`` and calls it in every process. The hook
stands around `_prepare_fused_moe_run`, which has the routing and has not yet aligned: it offers SGLang the config by
SGLang's own override, for this call alone. What it chooses from:

* in eager steps (without CUDA graphs, which 0.5.17 has for prefill too by default) the plan's policy, by the histogram
  of the layer's step before, copied to the host without waiting;
* under capture of a CUDA graph the plan's static config for the token count: a graph would freeze any other choice.

Plans are those of kernel ``vllm_fused_moe``: SGLang's kernel has the same source and the same parameters. They are
measured in vLLM, not in SGLang. Without one that fits, with an override of somebody else's, with tuned files that ask
for TMA (which plans do not know), in deterministic mode, and with RAMPWRAP_DISABLE=1, SGLang stays as it is.
"""

import importlib
import importlib.metadata
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rampwrap.adapters.vllm_fused_moe import KEYS, refusal
from rampwrap.dispatch.lagged import Lagged
from rampwrap.dispatch.spans import capturing
from rampwrap.engines.backends import numbers
from rampwrap.kernel.device import Device
from rampwrap.kernel.shape import MoEShape
from rampwrap.observe.registry import watch
from rampwrap.observe.tally import Telemetry
from rampwrap.plan.folder import HOOK_KERNELS, OneWarning, Plans, disabled, made_elsewhere
from rampwrap.plan.plan import Plan, shape_arguments
from rampwrap.policy.policies import WaveCost
from rampwrap.policy.static import StaticTable
from rampwrap.routing.drift import Sums

CHECKED = ("0.5.17", "0.5.23")
"""Oldest and newest release whose own functions the tests called. Older ones are left as they are; later ones are served where they
keep the contract, with a line in the log."""
PACKAGE = "sglang.srt.layers.moe.moe_runner.triton_utils"
TARGET = f"{PACKAGE}.fused_moe._prepare_fused_moe_run"
POSITIONAL = ("hidden_states", "w1", "w2", "topk_ids")
KEYWORDS = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant", "block_shape")
"Parameters of the function, all of them required, the latter by keyword only."
TABLES = ("E", "N", "dtype", "block_n", "block_k", "per_channel_quant", "down_moe")
"Parameters of the function that reads SGLang's tuned files."
FUSED_SWIGLU = "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"
"With it SGLang permutes the rows of w13 and fuses the activation into the first GEMM: another kernel than plans measured."
COMMAND = "rampwrap profile --engine sglang"
KERNELS = HOOK_KERNELS["sglang"]
"Whose plans serve."
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

_log = logging.getLogger("rampwrap")
_warn = OneWarning(_log)


def register() -> None:
    """The plugin: registers the hook, once, where SGLang and the plans allow it."""
    if disabled():
        return
    found = importlib.metadata.version("sglang")
    if (reason := too_old(found)) is not None:
        _warn("version", "rampwrap leaves SGLang %s as it is: %s.", found, reason)
        return
    plans = Plans.read()
    for sentence in plans.broken:
        _warn(sentence, "rampwrap cannot read a plan: %s", sentence)
    if not any(plan.kernel in KERNELS for _, plan in plans.every):
        _warn(
            "no plans",
            "rampwrap leaves SGLang as it is: %s has no plan of kernel %s; %s.",
            plans.where,
            KERNELS[0],
            plans.remedy(f"{COMMAND} --model DIR"),
        )
        return
    try:
        parts = ("fused_moe", "fused_moe_triton_config")
        reason = mismatch(
            importlib.import_module(PACKAGE), *(importlib.import_module(f"{PACKAGE}.{part}") for part in parts)
        )
        registry = importlib.import_module("sglang.srt.plugins.hook_registry")
        register_hook, around = registry.HookRegistry.register, registry.HookType.AROUND
    except (ImportError, AttributeError) as error:
        reason = str(error)
    if reason is not None:
        _warn("signature", "rampwrap leaves SGLang %s as it is: %s.", found, reason)
        return
    if numbers(found) > numbers(CHECKED[-1]):
        _log.info(
            "SGLang %s is newer than %s, the last whose functions rampwrap's tests called; it keeps the contract and is served.",
            found,
            CHECKED[-1],
        )
    hooks = getattr(registry.HookRegistry, "_hooks", {}).get(TARGET, ())
    if not any(isinstance(getattr(hook, "__self__", None), Around) for _, hook, *_ in hooks):
        register_hook(TARGET, Around(plans).call, around)


def too_old(version: str) -> str | None:
    """Why a release of SGLang is not served, in a clause; None from the first that was read on."""
    return f"it is older than {CHECKED[0]}" if numbers(version) < numbers(CHECKED[0]) else None


def mismatch(package: Any, fused_moe: Any, tables: Any) -> str | None:
    """What differs from the SGLang that this hook was made for, in a clause; None if nothing does.

    Args:
        package: SGLang's module `PACKAGE`, which holds the override.
        fused_moe: its module with the function that the hook stands around.
        tables: its module that reads tuned files.
    """
    function = getattr(fused_moe, "_prepare_fused_moe_run", None)
    if function is None:
        return "it has no _prepare_fused_moe_run"
    parameters = inspect.signature(function).parameters.values()
    named = {
        kind: tuple(p.name for p in parameters if p.kind is kind)
        for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    if tuple(named.values()) != (POSITIONAL, KEYWORDS) or len(list(parameters)) != len(POSITIONAL + KEYWORDS):
        return f"_prepare_fused_moe_run has parameters ({', '.join(p.name for p in parameters)})"
    if not hasattr(package, "_config") or not hasattr(package, "get_config"):
        return f"{PACKAGE} has no config to override"
    if not hasattr(tables, "get_exec"):
        return f"{tables.__name__} has no get_exec"
    parameters = inspect.signature(tables.get_moe_configs).parameters.values()
    if tuple(p.name for p in parameters) != TABLES:
        return f"get_moe_configs has parameters ({', '.join(p.name for p in parameters)})"
    return None


class Around:
    """The hook and what it remembers: a `Layers` for each shape of a layer."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans
        self._layers: dict[MoEShape, Layers | None] = {}
        self._ignored = False  # whether SGLang ran another config than it was given

    def call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """SGLang's function, with our config where a plan has one."""
        try:
            config = self._config(dict(zip(POSITIONAL, args, strict=False)) | kwargs)
        except Exception as error:  # a hook never keeps an engine from serving
            _warn(f"error {type(error).__name__}", "rampwrap leaves a layer of SGLang as it is: %s", error)
            config = None
        if config is None:
            return original(*args, **kwargs)
        package: Any = importlib.import_module(PACKAGE)
        before = package._config
        # SGLang's own override_config stays set when the call raises.
        package._config = dict(config)
        try:
            made = original(*args, **kwargs)
        finally:
            package._config = before
        if dict(made[0]) != config:
            self._ignored = True
            _warn(
                "ignored",
                "rampwrap leaves SGLang as it is from here on: it ran %s where it was given %s.",
                made[0],
                dict(config),
            )
        return made

    def _config(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if self._ignored or importlib.import_module(PACKAGE).get_config():
            return None
        shape = shape_of(given)
        if shape is None:
            return None
        if shape not in self._layers:
            self._layers[shape] = None  # where the search fails it is not made again at every step
            self._layers[shape] = self._find(shape, given)
        layers = self._layers[shape]
        return None if layers is None else layers.choose(given["topk_ids"], given["w1"].data_ptr())

    def _find(self, shape: MoEShape, given: Mapping[str, Any]) -> "Layers | None":
        """The plan of a shape; None, said once, where there is none or SGLang's own files know better."""
        device = Device.current()
        reason = pinned(shape, given)
        if reason is None:
            if (found := plan_for(self._plans, shape, device)) is not None:
                path, plan = found
                _log.info("rampwrap serves %s of SGLang with %s%s.", shape, path, made_elsewhere(plan, device))
                return Layers(plan)
            remedy = self._plans.remedy(f"{COMMAND} {shape_arguments(shape)}")
            reason = f"no plan in {self._plans.where} is for it on {device.name}; {remedy}"
        _warn(f"left {shape}", "rampwrap leaves %s of SGLang as it is: %s.", shape, reason)
        return None


def shape_of(given: Mapping[str, Any]) -> MoEShape | None:
    """The layer of a call, as one of local experts; None for a quantisation that plans do not know."""
    dtype = DTYPES.get(given["hidden_states"].dtype)
    if any(given[name] for name in ("use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant")):
        return None
    if given["use_fp8_w8a8"]:
        dtype = "fp8" if list(given["block_shape"] or ()) == [128, 128] else None
    experts, rows, hidden = given["w1"].shape
    top_k = given["topk_ids"].shape[1]
    if dtype is None or top_k > experts or rows % 2 or tuple(given["w2"].shape) != (experts, hidden, rows // 2):
        return None
    return MoEShape(experts, top_k, hidden, rows // 2, dtype)


def pinned(shape: MoEShape, given: Mapping[str, Any]) -> str | None:
    """Why SGLang's own choice must stand for a layer, in a clause; None where it need not."""
    if shape.dtype != "fp8" and os.environ.get(FUSED_SWIGLU, "").lower() not in ("", "0", "n", "no", "false"):
        return f"{FUSED_SWIGLU} is set, which makes another kernel of it"
    tables = importlib.import_module(f"{PACKAGE}.fused_moe_triton_config")
    if tables.get_exec().deterministic.enable_deterministic_inference:
        return "deterministic inference pins its config"
    blocks = given["block_shape"] or (0, 0)
    kind = "fp8_w8a8" if shape.dtype == "fp8" else None
    for down in (False, True):
        tuned = tables.get_moe_configs(
            shape.num_experts, shape.intermediate_size, kind, *blocks, per_channel_quant=False, down_moe=down
        )
        if any(config.get("USE_TMA") for config in (tuned or {}).values()):
            return "its tuned file uses TMA, which plans do not know"
    return None


def plan_for(plans: Plans, shape: MoEShape, device: Device) -> tuple[str, Plan] | None:
    """The plan of a layer of local experts, and where it lies: a user's own first, of several the last by name."""
    fitting = ((path, plan) for path, plan in reversed(plans.every) if plan.kernel in KERNELS)
    return next((its for its in fitting if _fits(its[1], shape, device)), None)


def _fits(plan: Plan, shape: MoEShape, device: Device) -> bool:
    its = plan.shape
    sizes = ("top_k", "hidden_size", "intermediate_size", "dtype")
    return (
        its.num_local_experts == shape.num_experts
        and all(getattr(its, name) == getattr(shape, name) for name in sizes)
        and plan.device.same_kind(device)
        and all(set(config) == set(KEYS) and refusal(config, shape.dtype) is None for config in plan.configs)
    )


class Layers:
    """All layers of one shape, and the plan they share; `rampwrap.stats` counts it as a source.

    A layer is known by the address of its weights, its last histogram by layer and bucket.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.shape, self.kernel = plan, plan.shape, Named(plan.kernel)
        self.policy: WaveCost = plan.policy()
        tokens = tuple(bucket.num_tokens for bucket in plan.buckets) or (1,)
        self._near = StaticTable("buckets", tokens, tuple(range(len(tokens))))
        self._tokens = tokens
        self._seen: dict[tuple[int, int], Lagged] = {}
        self._names: dict[int, str] = {}
        self._counts: dict[tuple[str, int, str], dict[int, int]] = {}
        self._sums: dict[tuple[str, int, str], Sums] = {}
        watch(self)

    def choose(self, topk_ids: torch.Tensor, address: int) -> Mapping[str, Any] | None:
        """The config for a batch, counted; None, for SGLang's own choice, for an empty one and beyond what was profiled."""
        num_tokens = len(topk_ids)
        if not num_tokens or self.policy.beyond(num_tokens):
            return None
        position = self._near.index(num_tokens)
        name = self._names.setdefault(address, f"experts.{len(self._names)}")
        if capturing():
            index, mode = self.plan.static.index(num_tokens), "captured"
        else:
            state = self._seen.get((address, position))
            if state is None:
                state = self._seen[address, position] = Lagged(self.shape.num_local_experts)
            counts, mode = state.latest(), "lagged"
            if counts is not None:
                sums = self._sums.get((name, position, mode))
                if sums is None:
                    sums = self._sums[name, position, mode] = Sums(*self.plan.model.profiled)
                sums.add(counts)
            if counts is None or not counts.any():
                index = self.plan.static.index(num_tokens)
            else:
                index = self.policy.index(counts, num_tokens)
            state.read(topk_ids, None)
        ran = self._counts.setdefault((name, position, mode), {})
        ran[index] = ran.get(index, 0) + 1
        return self.plan.configs[index]

    def telemetry(self) -> list[Telemetry]:
        """Host launches, and of eager ones the routing; replays of a captured graph are not seen."""
        rows = []
        for key, counted in list(self._counts.items()):
            (name, position, mode), ran = key, dict(counted)
            sums = self._sums.get(key, Sums()).numbers()
            rows.append(Telemetry(name, self._tokens[position], mode, ran, sum(ran.values()), **sums))
        return rows


class Named:
    """A kernel of which only the name is needed here."""

    def __init__(self, name: str) -> None:
        self.name = name
