"""The contract with vLLM against sources that keep it, and against every way that we know to break it silently."""

import dataclasses
import pathlib

import pytest

from rampwrap.engines import vllm_contract as contract

LAYER = "model_executor/layers/fused_moe"
KERNEL, CONFIG, TRITON = f"{LAYER}/modular_kernel.py", f"{LAYER}/config.py", f"{LAYER}/experts/triton_moe.py"
# vLLM as far as the contract reads it.
TREE = {
    "__init__.py": "",
    "_version.py": "__version__ = version = '0.33.0'\n",
    "forward_context.py": """
class ForwardContext:
    no_compile_layers: dict
def get_forward_context(): ...
def is_forward_context_available(): ...
""",
    "config/vllm.py": "def get_current_vllm_config_or_none(): ...\n",
    "v1/worker/workspace.py": """
class WorkspaceManager:
    def get_simultaneous(self, *shapes_and_dtypes): ...
def current_workspace_manager(): ...
def is_workspace_manager_initialized(): ...
""",
    f"{LAYER}/activation.py": "class MoEActivation:\n    SILU = 'silu'\n",
    f"{LAYER}/prepare_finalize/no_dp_ep.py": "class MoEPrepareAndFinalizeNoDPEPModular: ...\n",
    f"{LAYER}/experts/lora_experts_mixin.py": "class LoRAExpertsMixin:\n    _lora_context = None\n",
    TRITON: """
class TritonExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):
    def __init__(self, moe_config, quant_config):
        self.quantization_emulation = False
    @staticmethod
    def _supports_anything(): ...
    def apply(self): ...
""",
    KERNEL: """
class FusedMoEExperts(ABC):
    post_gemm2_hook: object = None
    def __init__(self, moe_config): self.moe_config = moe_config
class FusedMoEExpertsModular(FusedMoEExperts):
    def moe_problem_size(self, a1, w1, w2, topk_ids): ...
class FusedMoEKernelModularImpl:
    def _allocate_buffers(self, out_dtype, device, M_chunk, M_full, N, K, top_k, global_num_experts, local_num_experts,
                          expert_tokens_meta, activation): ...
    def _prepare(self, hidden_states):
        self.prepare_finalize.prepare(hidden_states, defer_input_quant=self.fused_experts.expects_unquantized_inputs)
    def _fused_experts(self, in_dtype, a1q, a1q_scale, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
                       local_num_experts, expert_map, apply_router_weight_on_input, expert_tokens_meta,
                       output_alias=None): ...
    def apply(self, hidden_states):
        return self._fused_experts(in_dtype=None, a1q=hidden_states)
class FusedMoEKernel:
    def __init__(self, prepare_finalize, fused_experts): ...
""",
    CONFIG: """
class FusedMoEQuantDesc:
    dtype: object = None
    shape: object = None
    scale: object = None
    bias: object = None
    zp: object = None
class FusedMoEQuantConfig:
    _a1: object
    _a2: object
    _w1: object
    _w2: object
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    def per_act_token_quant(self): ...
    def per_out_ch_quant(self): ...
    def quant_dtype(self): ...
    def weight_quant_dtype(self): ...
    def block_shape(self): ...
    def w1_scale(self): ...
    def w2_scale(self): ...
    def w1_bias(self): ...
    def w2_bias(self): ...
    def a1_scale(self): ...
    def a2_scale(self): ...
class FusedMoEParallelConfig:
    tp_size: int
    dp_size: int
    ep_size: int
    tp_rank: int
    dp_rank: int
    ep_rank: int
    use_ep: bool
class FusedMoEConfig:
    num_experts: int
    num_local_experts: int
    num_logical_experts: int
    experts_per_token: int
    hidden_dim: int
    activation: object
    in_dtype: object
    moe_parallel_config: object
    max_num_tokens: int = 512
    has_bias: bool = False
    is_lora_enabled: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    activation_situ_beta: float | None = None
    intermediate_size_per_partition: int = -1
""",
}


def write(folder: pathlib.Path, tree: dict[str, str]) -> pathlib.Path:
    for file, text in tree.items():
        path = folder / "vllm" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "vllm"


def test_sources_that_keep_it(tmp_path):
    assert contract.faults(write(tmp_path, TREE)) == []


BROKEN = {
    "a step between the GEMMs": (TRITON, "def apply", "def _scale_rows(self): ...\n    def apply", "_scale_rows"),
    "state of its own": (TRITON, "emulation = False", "emulation = False; self.norm = 1", "norm, which rampwrap"),
    "a hook of all experts": (KERNEL, "post_gemm2_hook: object", "pre_gemm1_hook: object", "has pre_gemm1_hook"),
    "another base": (TRITON, "(LoRAExpertsMixin,", "(Mixin, LoRAExpertsMixin,", "inherits from Mixin"),
    "no such class": (TRITON, "class TritonExperts", "class TritonMoE", "TritonExperts is not in"),
    "a new argument": (KERNEL, "output_alias=None", "output_alias=None, row_scale=None", "takes row_scale, which"),
    "an argument gone": (KERNEL, "a1q, a1q_scale,", "a1q,", "takes no a1q_scale"),
    "another order": (KERNEL, "a1q, a1q_scale,", "a1q_scale, a1q,", "in another order"),
    "arguments by place": (KERNEL, "_fused_experts(in_dtype=None, a1q", "_fused_experts(None, a1q", "not named"),
    "nobody calls it": (KERNEL, "return self._fused_experts(", "return self._experts(", "never calls _fused_experts"),
    "activations as they come": (KERNEL, "self.fused_experts.expects_unq", "self.unq", "expect unquantized inputs"),
    "another constructor": (KERNEL, "prepare_finalize, fused_experts", "prepare_finalize, experts", "takes experts"),
    "other buffers": (KERNEL, "M_chunk, M_full", "num_tokens", "_allocate_buffers takes num_tokens"),
    "another workspace": ("v1/worker/workspace.py", "*shapes_and_dtypes", "shapes", "get_simultaneous takes shapes"),
    "a workspace by lane": ("v1/worker/workspace.py", "_manager():", "_manager(lane):", "takes lane"),
    "a setting that must be given": (CONFIG, "num_experts: int", "num_experts: int\n    k: int", "must be given k"),
    "a setting gone": (CONFIG, "has_bias: bool = False", "biased: bool = False", "FusedMoEConfig has no has_bias"),
    "a property gone": (CONFIG, "def w1_bias", "def w13_bias", "FusedMoEQuantConfig has no w1_bias"),
    "another word for SiLU": (f"{LAYER}/activation.py", "'silu'", "'swiglu'", "SILU is 'swiglu'"),
    "no layers by name": ("forward_context.py", "no_compile_layers", "layers", "no no_compile_layers"),
    "an old release": ("_version.py", "0.33.0", "0.25.1", "vLLM 0.25.1 is older than 0.26"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_new_is_a_fault(tmp_path, case):
    """Said by name; nothing else is."""
    file, old, new, says = BROKEN[case]
    assert old in TREE[file]
    (said,) = contract.faults(write(tmp_path, TREE | {file: TREE[file].replace(old, new)}))
    assert says in said


@pytest.mark.parametrize("file", [file for file in TREE if file not in ("__init__.py", "_version.py")])
def test_a_file_that_is_not_there(tmp_path, file):
    said = contract.faults(write(tmp_path, {name: text for name, text in TREE.items() if name != file}))
    missing = (
        "SILU is None" if "activation" in file else "ForwardContext" if "forward" in file else file.removeprefix(LAYER)
    )
    assert any(missing in one for one in said)


@pytest.mark.parametrize(("version", "strict"), [("0.33.0", []), ("0.34.0", ["is set"]), ("0.1.dev1+gabc", ["is set"])])
def test_an_operator_who_wants_no_surprise(tmp_path, monkeypatch, version, strict):
    """RAMPWRAP_STRICT_VLLM=1: nothing above the newest release that was read, whatever its sources say."""
    root = write(tmp_path, TREE | {"_version.py": f"__version__ = version = '{version}'\n"})
    assert contract.faults(root) == []
    monkeypatch.setenv(contract.STRICT, "1")
    said = contract.faults(root)
    assert len(said) == len(strict) and all(part in one for part, one in zip(strict, said, strict=True))


def test_the_installed_one(tmp_path, monkeypatch):
    """Found as Python would find it, and not imported."""
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, TREE | {"__init__.py": "raise RuntimeError('imported')"})
    assert contract.sources() == tmp_path / "vllm" and contract.faults() == []


def test_no_vllm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert contract.faults() == ["vLLM is not installed"]


@pytest.mark.parametrize(
    ("version", "number"),
    [("0.26.0", (0, 26)), ("0.33.1rc2", (0, 33)), ("1.2", (1, 2)), ("0.1.dev5+gabc", None), ("main", None)],
)
def test_numbers(version, number):
    assert contract.release(version) == number


@dataclasses.dataclass
class FusedMoEConfig:
    """Of some release to come."""

    num_experts: int = 8
    moe_backend: str = "auto"
    activation_situ_beta: float | None = None
    rocm: bool = False
    new: float = 1.0
    names: tuple = ()
    made: list = dataclasses.field(default_factory=list)
    tensor: object = None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_experts": 9, "moe_backend": "triton"}, None),
        ({"activation_situ_beta": 7.0}, "FusedMoEConfig.activation_situ_beta is 7.0, which rampwrap does not know"),
        ({"new": 0.5}, "new is 0.5"),
        ({"new": 1, "made": []}, None),
        ({"rocm": None}, None),
        ({"rocm": True}, "rocm is True"),
        ({"activation_situ_beta": False}, None),
        ({"made": [1]}, "made is [1]"),
        ({"tensor": object()}, "tensor is <object"),
    ],
)
def test_settings(change, says):
    """What a layer is judged by and what says nothing are free; all else must be at its default."""
    said = contract.strange("FusedMoEConfig", FusedMoEConfig(**change))
    assert said is None if says is None else says in said
