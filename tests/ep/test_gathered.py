"""Rows to every rank and sums back, where nobody knows owners: several tensors of one process are the memory of several ranks."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from rampwrap.ep.gathered import Gathered, wanted
from rampwrap.ep.layout import PROTOCOL, placed, views_of
from rampwrap.kernels.ep import host
from rampwrap.kernels.triton.interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="without the interpreter these kernels need several GPUs")
HIDDEN, MOST = 96, 6


class Quiet:
    """A board on which nobody is missed."""

    def exchange(self, phase: str, line: Any) -> list[Any]:
        return [line]

    def reset(self) -> None:
        pass


def made(num_ranks: int, dtype: torch.dtype = torch.bfloat16, token_bytes: int = 512) -> list[Gathered]:
    """The ranks, their memory full of NaN."""
    regions = placed(wanted(num_ranks, MOST, token_bytes, HIDDEN, dtype))
    memories = [torch.full((regions[-1].end,), 0xFF, dtype=torch.uint8) for _ in range(num_ranks)]
    bases = torch.tensor([its.data_ptr() for its in memories])
    ranks = []
    for rank, memory in enumerate(memories):
        views = views_of(regions, memory)
        offsets = {its.name: its.offset for its in regions}
        fault = torch.zeros(1, dtype=torch.int64)
        mapped = host.Mapped(rank, num_ranks, bases, views, offsets, fault, None, None, 1.0)
        mapped.begin()
        ranks.append(Gathered(mapped, Quiet()))  # type: ignore[arg-type]
    return ranks


def drawn(count: int, generator: torch.Generator, kind: str) -> list[torch.Tensor]:
    """What engines send of a token: its row, weights, ids, and maybe scales of the row and a number."""
    row = torch.randn(count, HIDDEN, generator=generator)
    weights = torch.rand(count, 3, generator=generator)
    ids = torch.randint(0, 9, (count, 3), generator=generator)
    if kind == "bf16":
        return [row.bfloat16(), weights, ids.int()]
    more = torch.randint(0, 9, (count,), generator=generator)
    return [row.to(torch.float8_e4m3fn), weights, ids, torch.rand(count, 1, generator=generator), more]


def gathered(
    ranks: list[Gathered], brought: list[Any], counts: list[int], monkeypatch: Any
) -> list[list[torch.Tensor]]:
    """All send, then all wait."""
    real, launches = host.gather, []
    with monkeypatch.context() as patched:
        patched.setattr(host, "gather", lambda *its: launches.append(its) or real(*its, waits=False))
        found = [rank.gather(its, counts) for rank, its in zip(ranks, brought, strict=True)]
    for launch in launches:
        real(*launch, sends=False)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[3], [2, 5], [0, 4, 1]], ids=str)
def test_steps(counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any type and length by rank and token, the sums of all ranks, and no fault."""
    ranks, generator = made(len(counts), dtype), torch.Generator().manual_seed(len(counts))
    for step, kind in enumerate(("bf16", "fp8", "bf16")):
        brought = [drawn(count, generator, kind) for count in counts]
        assert not any(rank.refusal(its, counts) for rank, its in zip(ranks, brought, strict=True))
        for found in gathered(ranks, brought, counts, monkeypatch):
            for field, its in zip(found, zip(*brought, strict=True), strict=True):
                wanted_rows = torch.cat(its)
                assert field.shape == wanted_rows.shape and field.dtype == wanted_rows.dtype
                assert torch.equal(field.contiguous().view(torch.uint8), wanted_rows.contiguous().view(torch.uint8))
        y = [torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype) for _ in ranks]
        assert all(rank.takes(its, counts) for rank, its in zip(ranks, y, strict=True))
        real = host.add
        with monkeypatch.context() as patched:  # all push, then all add
            patched.setattr(host, "add", lambda *its: None)
            outs = [rank.scatter(its, counts) for rank, its in zip(ranks, y, strict=True)]
        total = functools.reduce(torch.add, (its.float() for its in y)).to(dtype)
        for rank, out, its in zip(ranks, outs, total.split(counts), strict=True):
            real(rank._mapped, out, None, counts)
            assert torch.equal(out, its)
            assert rank.fault() is None and int(rank._mapped.views["header"][0]) == step + 1


def test_sums_in_the_place_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts may work in place: a rank that has all its sums writes there."""
    (its,) = made(1)
    pushed: list[torch.Tensor] = []
    monkeypatch.setattr(host, "push", lambda mapped, y, counts: pushed.append(y))
    monkeypatch.setattr(host, "add", lambda *its: None)
    (rows,) = gathered([its], [[torch.zeros(2, HIDDEN).bfloat16()]], [2], monkeypatch)[0]
    rows.fill_(3)
    its.scatter(rows, [2])
    elsewhere = torch.full((2, HIDDEN), 3.0).bfloat16()
    its.scatter(elsewhere, [2])
    assert torch.equal(pushed[0], rows) and pushed[0].data_ptr() != rows.data_ptr()
    assert pushed[1].data_ptr() == elsewhere.data_ptr()


def test_what_goes_another_way() -> None:
    (its,) = made(1, token_bytes=200)
    row = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    assert its.refusal([row], [2]) is None
    assert "7 tokens are more than max_tokens_per_rank=6" in str(its.refusal([row], [7]))
    assert "6 tensors are more than 5" in str(its.refusal([row] * 6, [2]))
    assert "rows of 3 bytes are no multiple of 4" in str(its.refusal([torch.zeros(2, 3, dtype=torch.uint8)], [2]))
    assert "rows of 1536 bytes are longer than token_bytes" in str(
        its.refusal([row[:, None].expand(2, 8, HIDDEN)], [2])
    )
    assert not its.takes(row.float(), [2]) and not its.takes(row, [3]) and not its.takes(row[:, 1:], [2])


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named; and after a reset on every rank all begins anew."""
    ranks = made(2)
    brought = [drawn(count, torch.Generator().manual_seed(1), "bf16") for count in (2, 1)]
    ranks[0].gather(brought[0], [2, 1])
    assert str(ranks[0].fault()).startswith("rank 1 did not arrive at dispatch of step 1 within 1 s")
    for rank in ranks:
        rank.reset()
    for found in gathered(ranks, brought, [2, 1], monkeypatch):
        assert torch.equal(found[0], torch.cat([its[0] for its in brought]))
    assert [rank.fault() for rank in ranks] == [None] * 2


@pytest.mark.parametrize(
    ("each", "said"),
    [
        ([{"token_bytes": 8}, {"token_bytes": 12}], "ranks disagree in token_bytes: rank 0 has 8, rank 1 has 12; give"),
        ([{"version": 1}, {}], f"ranks disagree in version of the protocol: rank 0 has 1, rank 1 has {PROTOCOL}; give"),
        ([{}, {}], "rank 0 runs on a CPU"),
    ],
)
def test_ranks_that_cannot_open(ranks: Any, each: list[dict[str, int]], said: str) -> None:
    for answer in ranks.run(2, "opens_gathered", each):
        assert said in answer


@pytest.mark.parametrize("counts", [[0, 0], [2, 1]], ids=str)
def test_rows_of_no_whole_words_have_no_sums_that_are_flags(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where nobody has a token: there is no room, and half a word is none."""
    monkeypatch.setitem(made.__globals__, "HIDDEN", 33)
    ranks = made(2)
    maps = [its._mapped for its in ranks]
    assert not any(its.marks(counts) for its in maps)
    fields = [[torch.zeros(count, 1, dtype=torch.int32)] for count in counts]
    gathered(ranks, fields, counts, monkeypatch)
    for its in maps:
        host.push(its, torch.ones(sum(counts), 33).bfloat16(), counts)
    for its, count in zip(maps, counts, strict=True):
        out = torch.empty(count, 33).bfloat16()
        host.add(its, out, None, counts)
        assert int(its.fault) == 0 and bool((out == 2.0).all())
