"""A model's `config.json` as the shapes of its MoE layers on one rank, read as the engine that serves it reads it."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from rampwrap.checkpoint.arithmetic import activations, arithmetic_of
from rampwrap.checkpoint.config import beside, first, flat, kinds_of, levels_of, listed, read_config, short
from rampwrap.checkpoint.layers import MOST_LAYERS, sparse_layers
from rampwrap.checkpoint.quantisation import GROUP, PLAIN, Reader, Stored, reader_of
from rampwrap.errors import InputError
from rampwrap.kernel.shape import SCALES, MoEShape

# One quantity, the names it has in published configs; the first one present counts. Those of the experts alone come
# before those that may be of dense layers.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_HIDDEN = ("moe_hidden_size", "moe_latent_size", "routed_expert_hidden_size", "hidden_size", "d_model", "n_embd")
_INTERMEDIATE = (
    *("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"),
    *("ffn_hidden_size", "intermediate_size"),
)
# float32 checkpoints are served in bf16 by vLLM, where the GPU has it, and in fp16 by SGLang.
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "float32", "float": "float32"}
_OF_FLOAT32 = {"sglang": "fp16"}
# What SGLang makes one expert more of, under tensor parallelism alone: by architecture (or the model_type of configs
# without one), the numbers of routed experts for which it does.
_FUSED: dict[str, tuple[str, tuple[int, ...]]] = {
    "DeepseekV3ForCausalLM": ("deepseek_v3", (256,)),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa", (256,)),
    "Glm4MoeForCausalLM": ("glm4_moe", ()),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", ()),
    "Qwen3NextForCausalLM": ("qwen3_next", ()),
}
MOST = 1 << 24
"No size of a layer is larger; a config that says so is damaged."
MOST_KINDS = 16


@attrs.frozen
class Alike:
    """Layers of a model that are the same on a rank, or stay with the engine for the same reason.

    Attributes:
        numbers: of the layers; none where the config does not say how many there are.
        shapes: of one layer: one, or two where ranks have unlike numbers of experts; none that stays with the engine.
        form: how their experts are stored, of `rampwrap.checkpoint.quantisation.FORMS`.
        reason: a sentence on why they stay with the engine; "" where they need not.
    """

    numbers: tuple[int, ...]
    shapes: tuple[MoEShape, ...]
    form: str = PLAIN
    reason: str = ""


@attrs.frozen
class Layers:
    """The routed layers of a model on one rank.

    Attributes:
        alike: in the order of the layers.
        kinds: the model's types and architectures.
    """

    alike: tuple[Alike, ...]
    kinds: tuple[str, ...] = ()

    @property
    def shapes(self) -> tuple[MoEShape, ...]:
        """Each once, in the order of the layers."""
        return tuple(dict.fromkeys(shape for its in self.alike for shape in its.shapes))

    @property
    def left(self) -> tuple[str, ...]:
        """A sentence for each reason why some of its layers stay with the engine."""
        count = sum(max(1, len(its.numbers)) for its in self.alike)
        return tuple(
            f"{max(1, len(its.numbers))} of {count} routed layers stay with the engine: {its.reason}"
            for its in self.alike
            if its.reason
        )


@attrs.frozen
class Ranks:
    """How an engine spreads a layer.

    Attributes:
        tp_size: tensor-parallel ranks; each has a slice of every expert.
        expert_parallel: the ranks share out whole experts instead; where they do not come out even, the first ranks
            have one more and there are two shapes.
        redundant_experts: copies that expert parallelism adds; ids are then those of physical experts.
        fused_shared_experts: shared experts that the engine makes routed ones, which every token visits; None for what it
            does by itself.
    """

    tp_size: int = 1
    expert_parallel: bool = False
    redundant_experts: int = 0
    fused_shared_experts: int | None = None

    def __attrs_post_init__(self) -> None:
        if self.tp_size < 1:
            raise InputError(f"tp_size is {self.tp_size}; give at least 1.")
        if self.redundant_experts < 0:
            raise InputError(f"redundant_experts is {self.redundant_experts}; give 0 or more.")
        if self.redundant_experts and not self.expert_parallel:
            raise InputError(
                f"redundant_experts is {self.redundant_experts} without expert parallelism, which alone has them; add --ep."
            )
        if self.fused_shared_experts is not None and not 0 <= self.fused_shared_experts < MOST:
            raise InputError(f"fused_shared_experts is {self.fused_shared_experts}; give 0 or more.")

    @property
    def arguments(self) -> str:
        """The options of the command line that name it, each after a space."""
        given = (
            ("--tp-size", self.tp_size if self.tp_size > 1 else None),
            ("--ep", "" if self.expert_parallel else None),
            ("--num-redundant-experts", self.redundant_experts or None),
            ("--fused-shared-experts", self.fused_shared_experts),
        )
        return "".join(f" {name} {value}".rstrip() for name, value in given if value is not None)


def read_layers(
    model: str | os.PathLike[str], ranks: Ranks | None = None, *, dtype: str | None = None, engine: str | None = None
) -> Layers:
    """The shapes of a model's routed layers on one rank, each once, and what is said of layers that have none here.

    Args:
        model: the folder with ``config.json``, the file itself, or the name of a model that Hugging Face's cache has.
        ranks: how the layers are spread; one rank by default.
        dtype: ``bf16``, ``fp16`` or ``fp8``, in place of what the config says.
        engine: ``sglang`` fuses the shared expert of some models into the layer, which is then one of an expert more;
            ``transformers`` and ``vllm`` do not.

    Raises:
        InputError: no readable config, no routed layer, or none that our kernels compute; with the reason.
    """
    found = layers_of(model, ranks, dtype=dtype, engine=engine)
    if not found.shapes:
        raise InputError(found.alike[0].reason)
    return found


def layers_of(
    model: str | os.PathLike[str], ranks: Ranks | None = None, *, dtype: str | None = None, engine: str | None = None
) -> Layers:
    """As `read_layers`, also of models no layer of which our kernels compute.

    Raises:
        InputError: no readable config, or no routed layer.
    """
    where, raw = read_config(model)
    levels = levels_of(raw, where)
    config = flat(levels)
    kinds = kinds_of(levels)
    other = arithmetic_of(kinds, config, where)
    try:
        columns = [_numbers(config, names, where) for names in (_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE)]
        sparse = sparse_layers(config, where)
        rows = _together(where, columns, sparse)
    except InputError:
        if other:  # its experts may have sizes by other names
            raise InputError(other) from None
        raise
    plain = dtype or _plain_dtype(config, where, engine)
    stored: Reader = (lambda layer: Stored(plain)) if dtype else reader_of(config, beside(where, config), where)
    activation_of = activations(kinds, config, where)
    ranks = ranks or Ranks()
    alike: dict[tuple[tuple[MoEShape, ...], str, str], list[int]] = {}
    for layer, (num_experts, top_k, hidden_size, intermediate_size) in rows:
        its = stored(layer)
        shapes: tuple[MoEShape, ...] = ()
        activation = activation_of(layer)
        reason = activation if isinstance(activation, str) else _not_ours(its)
        reason = other or (reason and f"{where} {reason}.")
        if not reason and not isinstance(activation, str):
            sizes, scales = (num_experts, top_k, hidden_size, intermediate_size), its.scales
            whole = MoEShape(*sizes, its.dtype or plain, activation=activation, scales=scales)
            shared = ranks.fused_shared_experts
            if shared is None and engine == "sglang" and not ranks.expert_parallel:
                shared = _shared(whole, raw, config)
            whole = _with_shared(whole, shared or 0)
            try:
                shapes = tuple(_on_a_rank(whole, ranks, where))
            except InputError as error:
                reason = str(error)
        alike.setdefault((shapes, its.form, reason), []).append(layer)
    if not alike:
        raise InputError(f"{where} has no layer with more than one expert; is it a mixture of experts?")
    return Layers(tuple(Alike(tuple(numbers) if sparse else (), *key) for key, numbers in alike.items()), tuple(kinds))


def _not_ours(form: Stored) -> str:
    served = f"our kernels run bf16, fp16 and FP8 with scales for {GROUP}x{GROUP} blocks, channels or tensors"
    return f"is quantised, {form.why_not}; {served}" if form.why_not else ""


def _numbers(config: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[int, ...]:
    """One number for all layers, or one for each."""
    name, found = first(config, names)
    if found is None:
        raise InputError(f"{where} names none of {', '.join(names)} as whole numbers; is it a mixture of experts?")
    values = found if isinstance(found, list) else [found]
    if not values or not all(type(value) is int and 0 <= value <= MOST for value in values):
        raise InputError(
            f"{where} has {name}={short(found)}; give whole numbers from 0 to {MOST}, one for all layers or one for each."
        )
    return tuple(values)


def _together(
    where: str, columns: Sequence[tuple[int, ...]], sparse: tuple[int, list[int]] | None
) -> list[tuple[int, tuple[int, ...]]]:
    """The number and the sizes of each layer that has experts: a single number stands for every layer.

    Lists shorter than the model's number of layers are of kinds that each layer has, such as Ernie's experts
    of texts and of pictures.
    """
    lengths = sorted({len(column) for column in columns} - {1})
    if len(lengths) > 1:
        raise InputError(
            f"{where} has experts, top_k or sizes for {' and for '.join(map(str, lengths))} layers; they must be as many."
        )
    listed = lengths[0] if lengths else 1
    count, sparse_ones = sparse or (listed, [])
    if listed > MOST_LAYERS or (listed > MOST_KINDS and not count <= listed <= count + MOST_KINDS):
        least = min(count, MOST_LAYERS)
        raise InputError(
            f"{where} has experts, top_k or sizes for {listed} layers; give them for {least}, or one for all."
        )
    kinds = list(zip(*(column * listed if len(column) == 1 else column for column in columns), strict=True))
    if sparse is None:
        rows = list(enumerate(kinds)) if lengths else [(1, kinds[0])]  # the first one is often dense
    elif count <= listed:  # drafts for speculative decoding may follow
        rows = [(layer, kinds[layer]) for layer in sparse_ones]
    else:
        rows = [(layer, kind) for layer in sparse_ones for kind in dict.fromkeys(kinds)]
    return [(layer, sizes) for layer, sizes in rows if sizes[0] > 1]


def _with_shared(whole: MoEShape, shared: int) -> MoEShape:
    """The layer with shared experts as routed ones that every token visits."""
    experts = whole.num_experts + shared
    return attrs.evolve(whole, num_experts=experts, top_k=whole.top_k + shared, num_local_experts=experts)


def _shared(whole: MoEShape, raw: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """How many shared experts SGLang makes routed ones of a layer by itself."""
    architecture = next(iter(listed(raw.get("architectures"))), config.get("model_type"))
    for name, (kind, counts) in _FUSED.items():
        if architecture in (name, kind) and (not counts or whole.num_experts in counts):
            shared = config.get("n_shared_experts")
            if name.startswith("Qwen"):
                shared = int(config.get("shared_expert_intermediate_size") == whole.intermediate_size)
            if type(shared) is int and 0 < shared < MOST and (shared == 1 or name == "Glm4MoeForCausalLM"):
                return shared
    return 0


def _on_a_rank(whole: MoEShape, ranks: Ranks, where: str) -> list[MoEShape]:
    size, inter = ranks.tp_size, whole.intermediate_size
    if ranks.expert_parallel:
        experts = whole.num_experts + ranks.redundant_experts
        if size > experts:
            raise InputError(f"{where} has {experts} experts, fewer than {size} ranks; use fewer ranks.")
        if ranks.redundant_experts and experts % size:
            raise InputError(
                f"{size} ranks do not divide {experts} physical experts of {where} ({ranks.redundant_experts} redundant), "
                "which engines ask for; use another number."
            )
        least, extra = divmod(experts, size)
        locals_ = ([least + 1] if extra else []) + [least]
        return [_refined(attrs.evolve(whole, num_experts=experts, num_local_experts=local), where) for local in locals_]
    if inter % size:
        raise InputError(f"{size} ranks do not divide intermediate_size={inter} of {where}; use a divisor.")
    return [_refined(attrs.evolve(whole, intermediate_size=inter // size), where)]


def _refined(shape: MoEShape, where: str) -> MoEShape:
    """A rank's layer with blocks of scales that divide its sizes: vLLM repeats the scales of larger ones for 64 or 32."""
    if shape.dtype != "fp8" or not shape.scale_group:
        return shape
    group = math.gcd(shape.scale_group, shape.intermediate_size, shape.hidden_size)
    if group == shape.scale_group:
        return shape
    if group < min(filter(None, SCALES.values())):
        raise InputError(
            f"a slice of one rank has intermediate_size={shape.intermediate_size} and hidden_size={shape.hidden_size} of "
            f"{where}, which blocks of scales of no less than 32 do not divide; use fewer ranks, or --ep."
        )
    return attrs.evolve(shape, scales=f"block-{group}")


def _plain_dtype(config: Mapping[str, Any], where: str, engine: str | None) -> str:
    """What weights that are not quantised are served in.

    Raises:
        InputError: an unknown type.
    """
    field, stored = first(config, ("dtype", "torch_dtype"))
    name = "bfloat16" if stored is None else str(stored).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(f"{where} has {field}={short(stored)}; use bfloat16, float16 or FP8 weights, or pass --dtype.")
    if _DTYPES[name] != "float32":
        return _DTYPES[name]
    if engine == "transformers":
        raise InputError(
            f"{where} has {field}={short(stored)}, in which transformers computes it; load it as bfloat16 and pass --dtype bf16."
        )
    return _OF_FLOAT32.get(engine or "", "bf16")
