"""What goes wrong among ranks: one sentence on each of them, and no hang."""

from typing import Any

import pytest
import torch

from rampwrap.ep.group import ExpertParallel
from rampwrap.ep.layout import Layout
from rampwrap.ep.sent import Sent
from rampwrap.errors import InputError
from rampwrap.kernel.shape import MoEShape

SHAPE = MoEShape(8, 2, 64, 32)
ARGUMENTS = {"shape": SHAPE, "max_tokens_per_rank": 4, "timeout_s": 20.0}
OPEN, COMBINE = ("open",), ("combine", torch.zeros(4, 64))
UNEQUAL = MoEShape(8, 2, 128, 32)


def tokens(count: int, hidden: int = 64) -> tuple[Any, ...]:
    return (
        torch.zeros(count, hidden, dtype=torch.bfloat16),
        torch.zeros(count, 2, dtype=torch.int64),
        torch.ones(count, 2),
    )


def dispatch(*counts: int) -> list[Any]:
    return [("dispatch", *tokens(count)) for count in counts]


COMPLETE = (dispatch(2, 2), COMBINE)


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (
            [{}, {"shape": UNEQUAL}],
            "ranks disagree in hidden_size: rank 0 has 64, rank 1 has 128; give all ranks the same",
        ),
        ([{}, {"max_tokens_per_rank": 5}], "ranks disagree in max_tokens_per_rank: rank 0 has 4, rank 1 has 5"),
        ([{"payload": "bf16"}, {"partials": "fp32"}], "ranks disagree in partials: rank 0 has bf16, rank 1 has fp32"),
        ([{"experts": [[0, 1]] * 2}, {"experts": [[1, 2]] * 2}], "expert 1 is on ranks 0 and 1; give a copy an id"),
        ([{"experts": [[0, 1]] * 2}, {"experts": [[3, 2]] * 2}], "expert 4 is on no rank; place every expert"),
    ],
)
def test_ranks_that_disagree(ranks: Any, each: list[dict[str, Any]], said: str) -> None:
    for answer in ranks.run(2, "refused", ARGUMENTS | {"each": each}, [OPEN]):
        assert said in answer[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"placement": [0, 1]}, "placement is a list; give a Placement"),
        ({"timeout_s": 0}, "timeout_s is 0; give seconds above 0"),
        ({"backend": "nvshmem"}, "backend 'nvshmem' is unknown; use one of"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ExpertParallel(None, SHAPE, 4, **arguments)  # type: ignore[arg-type]


def test_what_is_wrong_with_ids_is_said_of_them() -> None:
    layout = Layout(SHAPE, 2, 4)
    hidden, weights = torch.zeros(3, SHAPE.hidden_size).bfloat16(), torch.zeros(3, SHAPE.top_k)
    fewer = torch.zeros(2, SHAPE.top_k, dtype=torch.int32)
    found = Sent(hidden, fewer, weights, None).refusal(layout, torch.device("cpu"))
    assert found == f"topk_ids is int32 (2, {SHAPE.top_k}) on cpu; give int32 or int64 (3, {SHAPE.top_k}) on cpu."


def test_another_version(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rampwrap.ep import terms
    from rampwrap.ep.owners import contiguous
    from rampwrap.errors import GroupError

    def made() -> terms.Terms:
        placement = contiguous(8, 2, 0)
        return terms.Terms.of(Layout(SHAPE, 2, 4), placement, torch.device("cpu"), "collectives", None)

    ours, said = made(), f"disagree in version of the protocol: rank 0 has {terms.PROTOCOL}, rank 1 has 7"
    monkeypatch.setattr(terms, "PROTOCOL", 7)
    with pytest.raises(GroupError, match=said):
        terms.check([ours, made()])


def test_a_call_that_one_rank_refuses(ranks: Any) -> None:
    """Too many tokens, another width, an output of another shape: the others hear why, and the next step is sound."""
    calls = [
        OPEN,
        dispatch(5, 2),
        [("dispatch", *tokens(2)), ("dispatch", *tokens(1, hidden=32))],
        dispatch(2, 2),
        [COMBINE, ("combine", torch.zeros(3, 64))],
        ("combine_into", (4, 64)),
        COMBINE,
        dispatch(0, 4),
        COMBINE,
    ]
    first, second = ranks.run(2, "refused", ARGUMENTS, calls)
    assert first[1] == "InputError: 5 tokens are more than max_tokens_per_rank=4; open with more, or cut the batch."
    assert second[1] == f"GroupError: rank 0 refused dispatch: {first[1].removeprefix('InputError: ')}"
    assert first[2].startswith("GroupError: rank 1 refused dispatch: hidden_states is bfloat16 (1, 32) on cpu; give")
    assert second[2].startswith("InputError: hidden_states is bfloat16 (1, 32)")
    assert second[4].startswith(
        "InputError: expert_output is float32 (3, 64); give floating point [4, 64] or [4, 2, 64]"
    )
    assert first[4].startswith("GroupError: rank 1 refused combine: expert_output is")
    for said in (first, second):
        assert said[5] == "InputError: out is torch.bfloat16 of shape (4, 64); give contiguous torch.bfloat16 (2, 64)."
        assert [said[place] for place in (0, 3, 6, 7, 8)] == [None] * 5


def test_calls_out_of_order(ranks: Any) -> None:
    """On all ranks, or on one: then on every rank a sentence, and after a reset all is well."""
    calls = [
        COMBINE,
        ("reset",),
        OPEN,
        OPEN,
        COMBINE,
        dispatch(2, 2),
        dispatch(2, 2),
        COMBINE,
        dispatch(2, 2),
        [COMBINE, *dispatch(2)],
        ("reset",),
        dispatch(2, 2),
        COMBINE,
        ("close",),
        ("close",),
        dispatch(2, 2),
    ]
    for said in ranks.run(2, "refused", ARGUMENTS, calls):
        assert said[0] == "InputError: combine was called on a closed ExpertParallel; call open() on every rank."
        assert said[1] == "InputError: reset was called on a closed ExpertParallel; call open() on every rank."
        assert said[3] == "InputError: this ExpertParallel is open already; close() it first."
        assert said[4] == "InputError: combine was called without a dispatch; call dispatch first."
        assert said[6].startswith("InputError: dispatch was called twice without a combine; call combine, or reset()")
        assert said[9].startswith(
            "GroupError: ranks are out of step: rank 0 is at combine, rank 1 is at dispatch; let all"
        )
        assert said[15].startswith("InputError: dispatch was called on a closed ExpertParallel")
        assert [said[place] for place in (2, 5, 7, 8, 10, 11, 12, 13, 14)] == [None] * 9


def test_a_second_group(ranks: Any) -> None:
    """A second workspace for the same group is another micro-batch's; another group on the same ranks is refused."""
    for said in ranks.run(2, "refused", ARGUMENTS, [OPEN, ("second", 2), ("second", -2), *COMPLETE]):
        assert said[:2] == [None, None] and said[3:] == [None, None]
        assert said[2] == "GroupError: rank 0 cannot open this group: it has another one open; close() that first."


def test_a_rank_that_is_late(ranks: Any) -> None:
    """The others give up, it hears so when it comes, and after a reset all is well: at dispatch, and at combine."""
    number, late = 3, 2
    # One second is waited, two are slept, so that all come to a reset at about the same time.

    def all_but_last(call: Any) -> list[Any]:
        return [call] * late + [("sleep", 2.0)]

    every = dispatch(*[1] * number)
    combine = ("combine", torch.zeros(number, 64))
    calls = [
        OPEN,
        [*dispatch(*[1] * late), ("sleep", 2.0)],
        [*[("sleep", 1.0)] * late, *dispatch(1)],
        combine,
        ("reset",),
    ]
    calls += [every, all_but_last(combine), [("sleep", 1.0)] * late + [combine], ("reset",), every, combine]
    arguments = ARGUMENTS | {"timeout_s": 1.0, "experts": [[*range(7)], [7], [8]][:number]}
    arguments["shape"] = MoEShape(6 + number, 2, 64, 32)
    for rank, said in enumerate(ranks.run(number, "refused", arguments, calls)):
        for place, phase in ((1, "dispatch"), (6, "combine")):
            answer = said[place if rank != late else place + 1]
            assert answer == (
                f"GroupError: rank {late} did not arrive at {phase} within 1 s; see what became of it, "
                "then call reset() on every rank."
            )
        assert said[3] == "InputError: combine was called after a failure; call reset() on every rank."
        assert [said[place] for place in (0, 4, 5, 8, 9, 10)] == [None] * 6


def test_memory_is_shared_by_gpus_only(ranks: Any) -> None:
    for said in ranks.run(2, "refused", ARGUMENTS | {"backend": "symmetric"}, [OPEN, COMBINE]):
        assert said[0] == "GroupError: rank 0 runs on a CPU; use the backend 'collectives'."
        assert "closed" in said[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "smoke"}, "backend 'smoke' is unknown"),
        ({"shape": MoEShape(9, 2, 64, 32)}, "9 experts cannot be divided equally among 2 ranks"),
        ({"payload": "fp8"}, "hidden_size=64 is no multiple of 128, as rows in fp8 need"),
        ({"payload": "fp32"}, "payload is 'fp32'; a layer in bf16 sends bf16 or fp8"),
        ({"partials": "fp8"}, "partials is 'fp8'; a layer in bf16 adds bf16 or fp32"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank"),
    ],
)
def test_arguments(arguments: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    with pytest.raises(ValueError, match=said):
        ExpertParallel(None, **{"shape": SHAPE, "max_tokens_per_rank": 4} | arguments)  # type: ignore[arg-type]
