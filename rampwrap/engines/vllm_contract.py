"""What vLLM's sources must hold for our launch to mean the same as its own: a contract, instead of a list of versions.

The plugin stands in for one method of vLLM and reads a few of its classes. That can go wrong loudly, when a name is gone,
and silently, when a release adds a step between the two GEMMs, an argument or a setting that we would ignore. So the
contract names what we know, and what is new is a fault: `faults` reads vLLM's files (a parse, no import, no GPU, 0.2 s),
`strange` a layer's own settings, of which one we do not know must be at its default.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import attrs

from rampwrap.plan.folder import enabled

OLDEST, NEWEST = "0.26", "0.33"
"First and last release whose sources were read and whose classes run in our tests."
STRICT = "RAMPWRAP_STRICT_VLLM"
"Set to 1, releases above `NEWEST` stay as they are, whatever the contract says."

_LAYER = "model_executor/layers/fused_moe"
_KERNEL, _CONFIG = f"{_LAYER}/modular_kernel.py", f"{_LAYER}/config.py"
_TRITON = f"{_LAYER}/experts/triton_moe.py"
_WORKSPACE, _FORWARD = "v1/worker/workspace.py", "forward_context.py"
_IMPL = "FusedMoEKernelModularImpl"

SIGNATURES: Mapping[tuple[str, str, str], tuple[str, ...]] = {
    (_KERNEL, "FusedMoEKernel", "__init__"): ("prepare_finalize", "fused_experts"),
    (_KERNEL, _IMPL, "_fused_experts"): (
        *("in_dtype", "a1q", "a1q_scale", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts"),
        *("local_num_experts", "expert_map", "apply_router_weight_on_input", "expert_tokens_meta", "output_alias"),
    ),
    (_KERNEL, _IMPL, "_allocate_buffers"): (
        *("out_dtype", "device", "M_chunk", "M_full", "N", "K", "top_k", "global_num_experts", "local_num_experts"),
        *("expert_tokens_meta", "activation"),
    ),
    (_KERNEL, "FusedMoEExpertsModular", "moe_problem_size"): ("a1", "w1", "w2", "topk_ids"),
    (_WORKSPACE, "WorkspaceManager", "get_simultaneous"): ("*shapes_and_dtypes",),
    (_WORKSPACE, "", "current_workspace_manager"): (),
    (_WORKSPACE, "", "is_workspace_manager_initialized"): (),
    (_FORWARD, "", "get_forward_context"): (),
    (_FORWARD, "", "is_forward_context_available"): (),
    ("config/vllm.py", "", "get_current_vllm_config_or_none"): (),
}
"By file, class and function its parameters after self, all of them: an argument that we do not know may carry a meaning."

BASES: Mapping[tuple[str, str], tuple[str, ...]] = {
    (_TRITON, "TritonExperts"): ("LoRAExpertsMixin", "mk.FusedMoEExpertsModular"),
    (f"{_LAYER}/experts/lora_experts_mixin.py", "LoRAExpertsMixin"): (),
    (_KERNEL, "FusedMoEExpertsModular"): ("FusedMoEExperts",),
    (_KERNEL, "FusedMoEExperts"): ("ABC",),
}
"The class whose layers we take, and those it inherits from."

MEMBERS = frozenset(
    {
        *("__init__", "is_supported_config", "activation_format", "expects_unquantized_inputs"),
        *("finalize_weight_and_reduce_impl", "activation", "workspace_shapes", "workspace_dtype", "apply", "moe_sum"),
        *("moe_problem_size", "adjust_N_for_activation", "is_monolithic", "process_weights_after_loading"),
        *("output_hidden_dim", "consumes_expert_mask", "_apply_router_weight_in_gemm2", "_finalize_expert_output"),
        *("post_gemm2_hook", "_uses_post_gemm2_hook", "_run_post_gemm2_hook", "_lora_context", "set_lora_context"),
        *("apply_w13_lora", "apply_w2_lora", "moe_config", "quant_config", "activation_config"),
        *("quantization_emulation", "max_num_tokens", "num_dispatchers", "gemm1_alpha", "gemm1_beta"),
        *("gemm1_clamp_limit", "quant_dtype", "weight_quant_dtype", "block_shape", "per_act_token_quant"),
        *("per_out_ch_quant", "a1_scale", "a2_scale", "a1_gscale", "a2_gscale", "w1_scale", "w2_scale", "w1_zp"),
        *("w2_zp", "w1_bias", "w2_bias", "g1_alphas", "g2_alphas"),
    }
)
"Methods and attributes of those classes, and what they set on themselves. What only says where they can be used is free."
_FREE = ("_supports_", "supports_")

READ: Mapping[str, frozenset[str]] = {
    "FusedMoEConfig": frozenset(
        {
            *("num_experts", "num_local_experts", "num_logical_experts", "experts_per_token", "hidden_dim"),
            *("intermediate_size_per_partition", "activation", "in_dtype", "max_num_tokens", "has_bias"),
            *("is_lora_enabled", "moe_parallel_config", "swiglu_limit", "swiglu_alpha", "swiglu_beta"),
        }
    ),
    "FusedMoEParallelConfig": frozenset({"tp_size", "ep_size", "dp_size", "tp_rank", "ep_rank", "dp_rank", "use_ep"}),
    "FusedMoEQuantConfig": frozenset({"_a1", "_a2", "_w1", "_w2", "gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta"}),
    "FusedMoEQuantDesc": frozenset({"dtype", "shape", "scale", "bias"}),
}
"Fields by which a layer is judged (`rampwrap.engines.vllm_layer.layer_shape`)."

MEANINGLESS: Mapping[str, frozenset[str]] = {
    "FusedMoEConfig": frozenset(
        {
            *("intermediate_size", "device", "routing_method", "router_logits_dtype", "hidden_dim_unpadded"),
            *("intermediate_pad", "intermediate_size_per_partition_unpadded", "moe_backend"),
            *("elastic_ep_max_dp_size", "has_hash_routing", "require_decomposed_backend", "shared_expert_prefix"),
            *("skip_final_all_reduce", "defer_moe_finalize_max_num_tokens", "max_capture_size"),
            *("tp_shard_with_padding",),
        }
    ),
    "FusedMoEParallelConfig": frozenset({"pcp_size", "pcp_rank", "sp_size", "all2all_backend", "enable_eplb"}),
    "FusedMoEQuantConfig": frozenset({"is_scale_swizzled"}),
    "FusedMoEQuantDesc": frozenset(),
}
"""Fields that say nothing to the launch, whatever their value: loading, routing before it, reduction after it, other back
ends. All others, those of releases to come among them, must be at their default."""

_PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "FusedMoEConfig": (),
    "FusedMoEParallelConfig": (),
    "FusedMoEQuantConfig": (
        *("quant_dtype", "weight_quant_dtype", "block_shape", "w1_scale", "w2_scale", "w1_bias", "w2_bias"),
        *("a1_scale", "a2_scale", "per_act_token_quant", "per_out_ch_quant"),
    ),
    "FusedMoEQuantDesc": (),
}


def sources() -> pathlib.Path | None:
    """The folder of the vLLM that Python would import, without importing it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except ValueError:  # a module that was made by hand has none
        return None
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return next((pathlib.Path(place) for place in places if pathlib.Path(place, "__init__.py").is_file()), None)


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number; None of a version that names none, as of a build from a branch."""
    found = re.match(r"(\d+)\.(\d+)(?!\.dev)", version)
    return (int(found[1]), int(found[2])) if found else None


def beyond(version: str) -> bool:
    """Whether a version is above `NEWEST`, or names no release at all."""
    number, newest = release(version), release(NEWEST)
    return number is None or newest is None or number > newest


def source_version(root: pathlib.Path) -> str:
    """What vLLM's files say they are; "" where they do not."""
    try:
        text = (root / "_version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^__version__ = (?:version = )?['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else ""


def faults(root: pathlib.Path | None = None) -> list[str]:
    """Why vLLM cannot be served, as sentences without a full stop; empty where it can.

    Args:
        root: the folder ``vllm`` of a release; the installed one where absent.
    """
    root = sources() if root is None else root
    if root is None:
        return ["vLLM is not installed"]
    version = source_version(root)
    if enabled(STRICT) and beyond(version):
        return [f"{STRICT} is set, and vLLM was read up to {NEWEST}"]
    number, oldest = release(version), release(OLDEST)
    if number is not None and oldest is not None and number < oldest:
        return [f"vLLM {version} is older than {OLDEST}"]
    return list(_faults(_Sources(root)))


def strange(owner: str, config: Any, but: Iterable[str] = ()) -> str | None:
    """The first setting of a vLLM's config that we do not know and that is not at its default; None where there is none.

    Args:
        owner: its class as in `READ`, of which `config` may be a subclass.
        config: a dataclass.
        but: fields that the caller looked at himself.
    """
    known = READ.get(owner, frozenset()) | MEANINGLESS.get(owner, frozenset()) | frozenset(but)
    for field in dataclasses.fields(config):
        if field.name in known:
            continue
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        # Switches of other hardware are None where it is not there (`rocm_aiter_fmoe_enabled`, on every GPU of NVIDIA).
        if (value is None or value is False) and (default is None or default is False):
            continue
        if value is not default and not (isinstance(value, str | int | float | tuple | list) and value == default):
            return f"{owner}.{field.name} is {value!r:.60}, which rampwrap does not know"
    return None


@attrs.frozen
class _Sources:
    """vLLM's files as trees, each read once."""

    root: pathlib.Path
    _trees: dict[str, ast.Module | None] = attrs.field(factory=dict, init=False)

    def tree(self, file: str) -> ast.Module | None:
        if file not in self._trees:
            path = self.root / file
            self._trees[file] = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
        return self._trees[file]

    def owner(self, file: str, name: str) -> ast.Module | ast.ClassDef | None:
        """A class of a file; the file itself for ""."""
        tree = self.tree(file)
        if tree is None or not name:
            return tree
        return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def class_faults(
    root: pathlib.Path,
    file: str,
    owner: str,
    signatures: Mapping[str, tuple[str, ...]],
    optional: Mapping[str, tuple[str, ...]],
    members: Collection[str] | None = None,
    bases: tuple[str, ...] | None = None,
) -> list[str]:
    """What a class has changed in, as `faults`.

    Args:
        root: the folder ``vllm`` of a release.
        file, owner: where the class is, and its name.
        signatures: by method its parameters after self, all of them.
        optional: likewise, of methods that may be absent.
        members: of the class, all that are known; None where others do not matter.
        bases: what it inherits from; None where that does not matter.
    """
    files = _Sources(root)
    node = files.owner(file, owner)
    if not isinstance(node, ast.ClassDef):
        return [f"{owner} is not in {file}"]
    expected = dict(signatures) | {name: its for name, its in optional.items() if _parameters(node, name) is not None}
    found = list(_signatures(files, {(file, owner, name): its for name, its in expected.items()}))
    return found + list(_new(node, members, bases))


def new_arguments(root: pathlib.Path, file: str, function: str, known: Collection[str]) -> list[str]:
    """Parameters of a function of a release that are not known, as `faults`; or that it is gone."""
    found = _parameters(_Sources(root).tree(file), function)
    if found is None:
        return [f"{function} is not in {file}"]
    new = [name for name in found if name not in known]
    return [f"{function} {_difference('takes', new, [])}"] if new else []


def _new(node: ast.ClassDef, members: Collection[str] | None, bases: tuple[str, ...] | None) -> Iterator[str]:
    found = tuple(ast.unparse(base) for base in node.bases)
    if bases is not None and found != bases:
        yield f"{node.name} inherits from {', '.join(found) or 'nothing'}"
    known = _members(node) if members is None else members
    if new := sorted(one for one in _members(node) if one not in known and not one.startswith(_FREE)):
        yield f"{node.name} has {', '.join(new)}, which rampwrap does not know"


def _signatures(files: _Sources, signatures: Mapping[tuple[str, str, str], tuple[str, ...]]) -> Iterator[str]:
    for (file, owner, name), expected in signatures.items():
        found = _parameters(files.owner(file, owner), name)
        of = f"{owner}.{name}" if owner else name
        if found is None:
            yield f"{of} is not in {file}"
        elif found != expected:
            new = [one for one in found if one not in expected]
            gone = [one for one in expected if one not in found]
            yield f"{of} {_difference('takes', new, gone) or 'takes its arguments in another order'}"


def _faults(files: _Sources) -> Iterator[str]:
    yield from _signatures(files, SIGNATURES)
    yield from _calls(files)
    for (file, owner), expected in BASES.items():
        node = files.owner(file, owner)
        if not isinstance(node, ast.ClassDef):
            yield f"{owner} is not in {file}"
            continue
        yield from _new(node, MEMBERS, expected)
    yield from _settings(files)
    silu = _members(files.owner(f"{_LAYER}/activation.py", "MoEActivation"), values=True).get("SILU")
    if silu != "'silu'":
        yield f"MoEActivation.SILU is {silu}"
    if files.owner(f"{_LAYER}/prepare_finalize/no_dp_ep.py", "MoEPrepareAndFinalizeNoDPEPModular") is None:
        yield f"MoEPrepareAndFinalizeNoDPEPModular is not in {_LAYER}/prepare_finalize/no_dp_ep.py"
    if "no_compile_layers" not in _members(files.owner(_FORWARD, "ForwardContext")):
        yield "ForwardContext has no no_compile_layers"


def _calls(files: _Sources) -> Iterator[str]:
    """Our stand-in takes arguments by name, and activations unquantised where it asks for them."""
    kernel = files.owner(_KERNEL, _IMPL)
    if kernel is None:
        return
    calls = [node for node in ast.walk(kernel) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    ours = [node for node in calls if node.func.attr == "_fused_experts"]  # type: ignore[attr-defined]
    if not ours:
        yield f"{_IMPL} never calls _fused_experts"
    if any(node.args for node in ours):
        yield f"{_IMPL} calls _fused_experts with arguments that are not named"
    deferred = [key for node in calls for key in node.keywords if key.arg == "defer_input_quant"]
    if not any(ast.unparse(key.value).endswith(".expects_unquantized_inputs") for key in deferred):
        yield f"{_IMPL} does not ask its experts whether they expect unquantized inputs"


def _settings(files: _Sources) -> Iterator[str]:
    for owner, read in READ.items():
        node = files.owner(_CONFIG, owner)
        if not isinstance(node, ast.ClassDef):
            yield f"{owner} is not in {_CONFIG}"
            continue
        members = _members(node, values=True)
        if gone := sorted(name for name in (*read, *_PROPERTIES[owner]) if name not in members):
            yield f"{owner} has no {', '.join(gone)}"
        fields = {item.target.id: item for item in node.body if _is_field(item)}  # type: ignore[attr-defined]
        required = [name for name, field in fields.items() if field.value is None]  # type: ignore[attr-defined]
        if new := [name for name in required if name not in read | MEANINGLESS[owner]]:
            yield f"{owner} must be given {', '.join(new)}, which rampwrap does not know"


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _parameters(owner: ast.Module | ast.ClassDef | None, name: str) -> tuple[str, ...] | None:
    """Names of a function's parameters, self left out, a star before what takes any number; None where it is not."""
    for node in [] if owner is None else owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            given = node.args
            names = [one.arg for one in (*given.posonlyargs, *given.args)]
            names += [f"*{given.vararg.arg}"] if given.vararg else []
            names += [one.arg for one in given.kwonlyargs] + ([f"**{given.kwarg.arg}"] if given.kwarg else [])
            static = any(ast.unparse(one) == "staticmethod" for one in node.decorator_list)
            return tuple(names[1:] if isinstance(owner, ast.ClassDef) and not static else names)
    return None


def _members(owner: ast.Module | ast.ClassDef | None, values: bool = False) -> dict[str, str]:
    """Methods and attributes of a class, and what its methods set on ``self``; with `values` those of attributes."""
    found: dict[str, str] = {}
    for node in [] if owner is None else owner.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = ""
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets: Iterable[ast.expr] = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            value = "" if node.value is None else ast.unparse(node.value)
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    if owner is not None and not values:
        set_on = [
            node for node in ast.walk(owner) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        ]
        found |= {node.attr: "" for node in set_on if ast.unparse(node.value) == "self"}
    return found


def _difference(verb: str, new: list[str], gone: list[str]) -> str:
    parts = [f"{verb} {', '.join(new)}, which rampwrap does not know"] if new else []
    parts += [f"{verb} no {', '.join(gone)}"] if gone else []
    return " and ".join(parts)
