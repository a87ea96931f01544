"""Dispatch and combine among processes of gloo, against one process that has all tokens."""

import pathlib
import runpy
from typing import Any

import pytest
import torch

from rampwrap.ep.owners import contiguous
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common import reference

SHAPE = MoEShape(12, 3, 128, 128)
HELP = runpy.run_path(str(pathlib.Path(__file__).parent / "on_ranks.py"))


def batch(counts: list[int], kind: str, seed: int, shape: MoEShape = SHAPE) -> list[dict[str, torch.Tensor]]:
    """What each rank brings, by rank; `kind` is of the routing."""
    generator = torch.Generator().manual_seed(seed)
    brought = []
    for count in counts:
        size = (count, shape.top_k)
        ids = torch.rand(count, shape.num_experts, generator=generator).argsort(1)[:, : shape.top_k]
        if kind == "one expert":
            ids = torch.full(size, shape.num_experts - 1)
        elif kind == "dropped":
            ids = torch.where(torch.rand(size, generator=generator) < 0.5, -1, ids)
            ids[torch.rand(size, generator=generator) < 0.1] = shape.num_experts + 3
        elif kind == "twice":
            ids = ids[:, :1].expand(size)
        hidden = torch.randn(count, shape.hidden_size, generator=generator)
        weights = torch.rand(size, generator=generator)
        brought.append({"hidden_states": hidden.bfloat16(), "topk_ids": ids.contiguous(), "topk_weights": weights})
    return brought


def expected(brought: list[dict[str, torch.Tensor]], shape: MoEShape, ranks: int, **its: Any) -> list[dict[str, Any]]:
    """What each rank must see and get, on one process."""
    ids, weights = (torch.cat([b[name] for b in brought]) for name in ("topk_ids", "topk_weights"))
    rows = torch.cat([b["hidden_states"] for b in brought])
    if its.get("payload") == "fp8":
        rows = reference.dequantise(*reference.quantise(rows)).bfloat16()
    experts = its.get("experts") or [contiguous(shape.num_experts, ranks, r).experts.tolist() for r in range(ranks)]
    partial_dtype = torch.float32 if its.get("partials") == "fp32" else torch.bfloat16
    total = torch.zeros(rows.shape)
    found = []
    for mine in experts:
        here = torch.isin(ids, torch.tensor(mine))
        slots = HELP["by_slot"](rows, ids, here)
        part = torch.zeros(rows.shape)
        for k in range(shape.top_k):
            part[here[:, k]] += weights[here[:, k], k, None] * slots[here[:, k], k].float()
        read = here.any(1)
        total[read] += part.to(partial_dtype).float()[read]
        counts = torch.tensor([int((ids == expert).sum()) for expert in mine], dtype=torch.int32)
        found.append({"rows": rows[read], "read": read, "expert_counts": counts})
    out = total.bfloat16().split([len(b["topk_ids"]) for b in brought])
    return [one | {"out": its, "topk_weights": weights} for one, its in zip(found, out, strict=True)]


ROUTINGS = ("spread", "one expert", "dropped", "twice")
COUNTS = {2: ([3, 3], [0, 5], [4, 0], [0, 0]), 3: ([1, 7, 0],), 4: ([2, 2, 2, 2], [0, 16, 1, 0])}


@pytest.mark.parametrize("known", [False, True], ids=["told", "known"])
@pytest.mark.parametrize(
    ("number", "given"),
    [
        (2, {}),
        (2, {"payload": "fp8", "masked": True}),
        (3, {"partials": "fp32"}),
        (4, {"experts": [[0, 11, 3], [1], [5, 4, 2, 6, 7], [8, 10, 9]], "payload": "fp8"}),
    ],
)
def test_rows_and_sums(ranks: Any, number: int, given: dict[str, Any], known: bool) -> None:
    """Zero tokens on some ranks, all to one expert, -1 and larger ids, duplicates, uneven counts: the same bits as one process."""
    rounds = [batch(counts, kind, seed) for seed, counts in enumerate(COUNTS[number]) for kind in ROUTINGS]
    arguments = {"shape": SHAPE, "max_tokens_per_rank": 16} | given
    answers = ranks.run(number, "rounds", arguments, rounds, known, False)
    for step, brought in enumerate(rounds):
        wanted = expected(brought, SHAPE, number, **given)
        for rank in range(number):
            seen = answers[rank][step]
            for name, value in wanted[rank].items():
                assert torch.equal(seen[name], value), (step, rank, name)
            assert seen["out"].shape == (len(brought[rank]["topk_ids"]), SHAPE.hidden_size)


def test_paths_and_runs_give_the_same_bits(ranks: Any) -> None:
    """Summed by the kernel or here, all rows sent or only those that are read, once or again."""
    rounds = [batch([2, 9, 0, 5], kind, 7) for kind in ROUTINGS] * 2
    first, *others = [
        ranks.run(
            4,
            "rounds",
            {"shape": SHAPE, "max_tokens_per_rank": 16, "partials": "fp32", "masked": masked},
            rounds,
            known,
            summed,
        )
        for known, summed, masked in ((True, False, None), (False, False, False), (False, True, True))
    ]
    assert "masked" in others[1][0][0]["path"] and "all rows" in others[0][0][0]["path"]
    for step in range(4):
        for rank in range(4):
            one = first[rank][step]
            for other in (first[rank][step + 4], *(its[rank][step] for its in others)):
                assert torch.equal(one["out"], other["out"]) and torch.equal(one["rows"], other["rows"])


@pytest.mark.parametrize(
    ("number", "given"), [(2, {}), (3, {"partials": "fp32"}), (4, {"payload": "fp8", "masked": True})]
)
def test_layers_by_source(ranks: Any, number: int, given: dict[str, Any]) -> None:
    """The same bits as in one run, for each kind of routing and uneven counts; a source without tokens is left out."""
    rounds = [batch(counts, kind, seed) for seed, counts in enumerate(COUNTS[number]) for kind in ROUTINGS]
    arguments = {"shape": SHAPE, "max_tokens_per_rank": 16} | given
    whole = ranks.run(number, "layers", arguments, rounds, True)
    pieces = ranks.run(number, "layers", arguments | {"by_source_tokens": 0, "by_source": True}, rounds, given == {})
    for step, brought in enumerate(rounds):
        sources = sum(len(its["topk_ids"]) > 0 for its in brought)
        for rank in range(number):
            assert torch.equal(whole[rank][step][0], pieces[rank][step][0]), (step, rank)
            assert (whole[rank][step][1], pieces[rank][step][1]) == (1, sources)


def test_e4m3_rows_are_taken_as_they_are(ranks: Any) -> None:
    brought = batch([3, 2], "spread", 3)
    given = []
    for its in brought:
        rows, scales = reference.quantise(its["hidden_states"])
        given.append(its | {"hidden_states": rows, "scales": scales})
    arguments = {"shape": SHAPE, "max_tokens_per_rank": 4, "payload": "fp8"}
    for one, two in zip(
        *(ranks.run(2, "rounds", arguments, [its], False, False) for its in (brought, given)), strict=True
    ):
        assert torch.equal(one[0]["out"], two[0]["out"]) and torch.equal(one[0]["rows"], two[0]["rows"])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_whole_layer(ranks: Any, dtype: str) -> None:
    """A wrapped kernel on each rank's experts, against the layer in float64."""
    shape = MoEShape(6, 2, 128, 128, dtype)
    brought = batch([3, 0], "spread", 11, shape)
    weights = reference.random_weights(shape, torch.device("cpu"), 0)
    outs = ranks.run(2, "whole_layer", shape, brought, weights, dtype)
    inputs = {name: torch.cat([its[name] for its in brought]) for name in brought[0]} | weights
    wanted = reference.layer(shape, inputs)
    torch.testing.assert_close(torch.cat(outs).double(), wanted, rtol=0.03, atol=0.03)


def test_blocks_are_those_of_the_gathered_ids(ranks: Any) -> None:
    from rampwrap.kernels.triton.align.host import align_tokens

    brought = batch([5, 2], "dropped", 5)
    ids = torch.cat([its["topk_ids"] for its in brought]).int()
    for rank, found in enumerate(ranks.run(2, "alignment", SHAPE, brought, 4)):
        expert_map = torch.from_numpy(contiguous(12, 2, rank).expert_map)
        blocks = align_tokens(ids, 4, 6, expert_map=expert_map)
        rows = int(blocks.num_tokens_post_padded)
        assert torch.equal(found[0], blocks.sorted_token_ids) and torch.equal(found[3], blocks.expert_counts)
        assert torch.equal(found[1][: rows // 4], blocks.expert_ids[: rows // 4])
