"""What operands of a layer must be: each of them alone wrong, by shape, type, layout, alignment and absence."""

from typing import Any

import attrs
import pytest

torch = pytest.importorskip("torch")

from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8, Contract, Operands, scale_shapes

BF16 = MoEShape(4, 2, 256, 384)
SHAPES = {
    "bf16": BF16,
    "fp16": attrs.evolve(BF16, dtype="fp16"),
    "fp8": attrs.evolve(BF16, dtype="fp8"),
    "rank": attrs.evolve(BF16, num_local_experts=3),
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}


def operands(shape: MoEShape, tokens: int = 5, **others: Any) -> Operands:
    """As the contract says, with an output."""
    experts, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    weight = TYPES[shape.dtype]
    active = torch.bfloat16 if shape.dtype == "fp8" else weight
    its: dict[str, Any] = {
        "hidden_states": torch.zeros(tokens, hidden, dtype=active),
        "w13": torch.zeros(experts, 2 * inter, hidden, dtype=weight),
        "w2": torch.zeros(experts, hidden, inter, dtype=weight),
        "topk_weights": torch.zeros(tokens, shape.top_k),
        "topk_ids": torch.zeros(tokens, shape.top_k, dtype=torch.int32),
        "out": torch.zeros(tokens, hidden, dtype=active),
    }
    if shape.dtype == "fp8":
        its["w13_scale"], its["w2_scale"] = torch.zeros(experts, 6, 2), torch.zeros(experts, 2, 3)
    if shape.num_local_experts < shape.num_experts:
        its["expert_map"] = torch.zeros(shape.num_experts, dtype=torch.int32)
    return Operands(**its | others)


def refused(shape: MoEShape, said: str, contract: Contract | None = None, **others: Any) -> None:
    with pytest.raises(InputError, match=said):
        (contract or Contract(shape)).check(operands(shape, **others))


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_right(name: str) -> None:
    """Also without an output, with ids of 64 bits, weights of any floating type, and no tokens."""
    shape = SHAPES[name]
    contract = Contract(shape)
    for tokens in (0, 1, 5):
        contract.check(operands(shape, tokens))
        contract.check(operands(shape, tokens, out=None))
        contract.check(operands(shape, tokens, topk_ids=torch.zeros(tokens, 2, dtype=torch.int64)))
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            contract.check(operands(shape, tokens, topk_weights=torch.zeros(tokens, 2, dtype=kind)))


@pytest.mark.parametrize("name", SHAPES)
def test_each_alone_wrong(name: str) -> None:
    """One row or column more, another type, not contiguous."""
    shape = SHAPES[name]
    good = operands(shape)
    for field in attrs.fields(Operands):
        tensor = getattr(good, field.name)
        if tensor is None:
            continue
        for place in range(tensor.dim()):
            longer = list(tensor.shape)
            longer[place] += 1
            if (field.name, place) != ("hidden_states", 0):  # says how many tokens there are
                refused(shape, rf"^{field.name} is ", **{field.name: torch.zeros(longer, dtype=tensor.dtype)})
        refused(shape, rf"^{field.name} is uint8 of shape", **{field.name: tensor.to(torch.uint8)})
        apart = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
        refused(shape, rf"^{field.name} is .* and not contiguous; give contiguous", **{field.name: apart})
    refused(shape, r"^topk_ids is int32 of shape \(6, 2\)", topk_ids=torch.zeros(6, 2, dtype=torch.int32))
    refused(shape, r"hidden_states has shape \(5,\); give \[num_tokens, 256\]", hidden_states=torch.zeros(5))


def test_scales_come_with_fp8_and_with_nothing_else() -> None:
    """Both of them."""
    scales = {"w13_scale": torch.zeros(4, 6, 2), "w2_scale": torch.zeros(4, 2, 3)}
    assert scale_shapes(SHAPES["fp8"]) == {name: tuple(scale.shape) for name, scale in scales.items()}
    for name, scale in scales.items():
        refused(SHAPES["fp8"], "FP8 weights come with scales", **{name: None})
        refused(SHAPES["bf16"], "Scales were given for a bf16 layer", **{name: scale})
    refused(SHAPES["fp16"], "Scales were given for a fp16 layer", **scales)


def test_a_rank_of_some_experts_says_which() -> None:
    refused(SHAPES["rank"], "3 of 4 experts are on this rank; give expert_map", expert_map=None)
    Contract(BF16).check(operands(BF16, expert_map=torch.zeros(4, dtype=torch.int32)))


def test_a_kernel_may_ask_for_less_and_for_more() -> None:
    """Strided tensors; starts at multiples of 16 bytes; one type of routing weights."""
    apart = torch.zeros(5, 512, dtype=torch.bfloat16)[:, ::2]
    Contract(BF16, contiguous=False).check(operands(BF16, hidden_states=apart, out=apart))
    refused(
        BF16,
        r"^out is bfloat16 of shape \(5, 255\); give bfloat16 \(5, 256\)",
        Contract(BF16, contiguous=False),
        out=apart[:, 1:],
    )
    one = Contract(BF16, topk_weights=(torch.float32,))
    one.check(operands(BF16))
    refused(BF16, "^topk_weights is float16 .*give contiguous float32", one, topk_weights=torch.zeros(5, 2).half())
    for shift in (1, 4, 8):
        moved = torch.zeros(5 * 256 + 8, dtype=torch.bfloat16)[shift : shift + 5 * 256].view(5, 256)
        both = Contract(BF16, aligned=("w13", "hidden_states"))
        if moved.data_ptr() % 16:
            refused(BF16, "^hidden_states does not start at a multiple of 16 bytes", both, hidden_states=moved)
        else:
            both.check(operands(BF16, hidden_states=moved))
        Contract(BF16, aligned=("w13", "w2")).check(operands(BF16, hidden_states=moved))


def test_sizes_are_read_off_the_tensors() -> None:
    """Ids that mean an expert are those of the map where there is one; an output is made like the hidden states."""
    for name, experts in (("bf16", 4), ("rank", 3)):
        its = operands(SHAPES[name])
        assert (its.num_tokens, its.top_k, its.num_slots, its.num_local_experts, its.num_experts) == (
            5,
            2,
            10,
            experts,
            4,
        )
        assert (its.hidden_size, its.intermediate_size) == (256, 384) and its.output() is its.out
        made = attrs.evolve(its, out=None).output()
        assert made.shape == (5, 256) and made.dtype == torch.bfloat16
