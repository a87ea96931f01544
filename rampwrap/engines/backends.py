"""Which kernel an engine itself runs a routed layer with on Hopper (H100, H200), by default.

Read in the engines' own choosers, release by release, on a platform that says it is sm_90; a user's flags may ask for
another. What is not in the table is not known.
"""

import re

import attrs

from rampwrap.checkpoint.model import Alike, Layers, Ranks
from rampwrap.checkpoint.quantisation import PLAIN
from rampwrap.engines import vllm_cutlass

TRITON = "Triton"
CUTLASS = "vLLM's CUTLASS"


@attrs.frozen
class Backend:
    """A kernel of an engine.

    Attributes:
        name: what the engine calls it.
        hooked: whether its layers come by our hook.
        remark: what else decides, in a clause; "" for nothing.
    """

    name: str
    hooked: bool = False
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.remark})" if self.remark else self.name


@attrs.frozen
class _Row:
    engine: str
    forms: tuple[str, ...]
    backend: Backend
    expert_parallel: bool | None = None
    "None: with it and without."
    kind: str = ""
    "The beginning of the only model types that it is for."
    since: tuple[int, ...] = ()
    until: tuple[int, ...] = (1 << 30,)
    "Releases, the first one and the first one after it."


_FUSED = Backend(TRITON, hooked=True)
_GROUPED = Backend("grouped_mm", hooked=True, remark="another implementation may decode small batches")
_WITHOUT_NVCC = "DeepGEMM where there is no nvcc and ninja for it"
_MONOLITHIC = Backend("triton_kernels of OpenAI", remark="which routes inside, so that no hook comes between")
_WEIGHTS = ("int4", "mxfp4", "mxfp8", "nvfp4")
_ROWS = (
    _Row("vllm", _WEIGHTS, _MONOLITHIC, kind="gpt_oss"),
    _Row("vllm", (PLAIN,), _FUSED),
    _Row("vllm", ("fp8_block",), _FUSED, expert_parallel=False),
    _Row("vllm", ("fp8_block",), Backend("FlashInfer CUTLASS", remark=_WITHOUT_NVCC), expert_parallel=True),
    _Row("vllm", ("fp8_static",), Backend("FlashInfer CUTLASS", remark="Triton where FlashInfer is not there")),
    _Row("vllm", ("fp8_tensor",), _FUSED),
    _Row("vllm", ("fp8_channel",), Backend(CUTLASS, hooked=vllm_cutlass.SERVED)),
    _Row("vllm", _WEIGHTS, Backend("Marlin"), until=(0, 32)),
    _Row("vllm", _WEIGHTS, Backend("Humming"), since=(0, 32)),
    _Row("sglang", ("mxfp4",), _MONOLITHIC, kind="gpt_oss"),
    _Row("sglang", ("mxfp4",), Backend("FlashInfer MXFP4"), kind="deepseek_v4"),
    _Row("sglang", ("mxfp4",), Backend("Marlin"), kind="mimo_v2"),
    _Row("sglang", (PLAIN, "fp8_block", "fp8_tensor", "fp8_static"), _FUSED),
    _Row("sglang", ("int4", "nvfp4"), Backend("Marlin")),
    _Row("transformers", (PLAIN,), _GROUPED),
)
"The first that applies counts."


def backend_of(
    engine: str, form: str, *, expert_parallel: bool = False, kinds: tuple[str, ...] = (), version: str = ""
) -> Backend | None:
    """What an engine runs layers with whose experts are stored in a form; None where that is not known.

    Args:
        form: of `rampwrap.checkpoint.quantisation.FORMS`.
        expert_parallel: over several ranks.
        kinds: the model's types and architectures.
        version: of the engine; the newest whose sources were read where it is "".
    """
    number = numbers(version)
    for row in _ROWS:
        if (
            row.engine == engine
            and form in row.forms
            and row.expert_parallel in (None, expert_parallel)
            and (not row.kind or any(kind.startswith(row.kind) for kind in kinds))
            and (row.since <= number < row.until if number else row.until > (1 << 29,))
        ):
            return row.backend
    return None


def backend_for(engine: str, layers: Layers, alike: Alike, ranks: Ranks, version: str = "") -> Backend | None:
    """That of some layers of a model, spread over ranks."""
    parallel = ranks.expert_parallel and ranks.tp_size > 1
    return backend_of(engine, alike.form, expert_parallel=parallel, kinds=layers.kinds, version=version)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 5, 23) of 0.5.23.post1."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
