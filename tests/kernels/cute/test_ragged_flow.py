"""Producers and consumers of the ragged form go through the same stages, by the kernels' own code on numbers of Python.

Copies, barriers and products are noted instead of done; what they are noted with says who does what, in which stage and phase.
"""

import types

import numpy as np
import pytest

from rampwrap.kernels.cute.build import build as building
from rampwrap.kernels.cute.configs import RAGGED
from rampwrap.kernels.cute.schedule import WIDTHS, Work, pieces

if building.dsl_version() is None:
    pytest.skip("needs the CuTe DSL (pip install rampwrap[cute])", allow_module_level=True)
from rampwrap.kernels.cute.build import emit  # tells the DSL the architecture
from rampwrap.kernels.cute.device import pipeline, ragged, ragged_down, ragged_up

TOP_K, CTAS, FULL, EMPTY = 2, 5, 1000, 2000
COUNTS = [0, 1, 8, 9, 49, 0, 131, 2, 96, 97]
MODULES = {"up": ragged_up, "down": ragged_down}


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    for module in (pipeline, ragged, ragged_up, ragged_down):
        monkeypatch.setattr(module, "Int32", int)
        if hasattr(module, "quotient"):
            monkeypatch.setattr(module, "quotient", lambda value, divisor: value // divisor)
    for module in MODULES.values():
        monkeypatch.setattr(module, "Int64", int)
        monkeypatch.setattr(module, "const_expr", lambda value: value)
    monkeypatch.setattr(ragged.cutlass, "range", lambda *of, unroll: range(*of))
    monkeypatch.setattr(ragged.cutlass, "range_constexpr", range)


def tensor(*shape):
    return types.SimpleNamespace(shape=shape, iterator=types.SimpleNamespace(toint=lambda: 0))


def made(role, dtype, log, monkeypatch):
    """A GEMM whose copies, waits and products are noted, the split of each CTA, and what the host says of it."""
    gemm = emit.KERNELS[f"ragged_{role}", dtype](RAGGED[dtype])
    work = Work(WIDTHS[dtype], 2, 9, 1771, 960, 350, 13, 1500)
    gemm.set_work(work.groups, work.steps, work.memory, work.reread, work.base, work.slope, work.overhead)
    kind = type(gemm)
    arch = MODULES[role].cute.arch
    monkeypatch.setattr(arch, "mbarrier_wait", lambda barrier, phase: log.append(("wait", barrier, phase)))
    monkeypatch.setattr(arch, "cp_async_mbarrier_arrive_noinc", lambda barrier: log.append(("arrive", barrier)))
    monkeypatch.setattr(arch, "griddepcontrol_wait", lambda: log.append(("launch before",)))
    gemm.next_stage = lambda stage, phase: kind.next_stage.__wrapped__(gemm, stage, phase)
    gemm.copy_weights = lambda tma, source, target, full, *its: log.append(("weights", *its))
    gemm.copy_tokens = lambda rows, *its: log.append(("tokens", *its[-3:-1], rows))
    gemm.slots_of = lambda ids, row, tokens, thread: ids[row : row + tokens].tolist()
    gemm.rows_of = lambda slots, divisor, num_slots: [slot // divisor for slot in slots]
    counts = Counts(COUNTS)
    numbers = [gemm.numbers(counts, expert) for expert in range(len(COUNTS))]
    before, totals = prefix(numbers)
    splits = []
    for cta in range(CTAS):
        shared = np.zeros((4, len(COUNTS) + 1), int).astype(object), np.zeros(8, int).astype(object), None
        for expert, (its, upto) in enumerate(zip(numbers, before, strict=True)):
            kind.enter.__wrapped__(gemm, expert, its, upto, totals, shared, cta, CTAS)
        kind.close.__wrapped__(gemm, totals, shared, cta, CTAS)
        splits.append(shared)
    return gemm, splits, work


class Counts(list):
    """Tokens of experts, as a tensor of the kernels."""

    @property
    def shape(self):
        return (len(self),)


def prefix(numbers):
    """(what stands before each, all of it): sums of the first four of `Ragged.numbers` behind the count, the largest of the last."""
    some = np.array([its[1:] for its in numbers])
    sums = np.cumsum(some[:, :4], 0)
    return (sums - some[:, :4]).tolist(), [*sums[-1].tolist(), int(some[:, 4].max())]


def sorted_ids():
    """Slots of each expert, from a multiple of 8 on; others are out of range."""
    found, slot = [], 0
    for count in COUNTS:
        found += [*range(slot, slot + count), *[9999] * (-count % 8)]
        slot += count
    return np.array(found)


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("role", ["up", "down"])
def test_stages_steps_and_rows(role, dtype, monkeypatch):
    log = []
    gemm, splits, work = made(role, dtype, log, monkeypatch)
    ids, kind = sorted_ids(), type(gemm)
    slots_of = {}
    for cta, mine in enumerate(pieces(work, COUNTS, CTAS)):
        # ---- what is produced
        log.clear()
        data = [tensor(400, 9 * 128), tensor(400, 9), ids, tensor(), tensor(), FULL, EMPTY, 800]
        more = [TOP_K] if role == "up" else []
        kind.produce_pieces.__wrapped__(gemm, splits[cta], None, None, None, *data, *more, 0, 0)
        stage_of = [n % gemm.stages for n in range(sum(piece.end - piece.begin for piece in mine))]
        wanted = [(piece, step) for piece in mine for step in range(piece.begin, piece.end)]
        weights = [its[1:] for its in log if its[0] == "weights"]
        assert weights == [(stage_of[n], step, p.expert, p.group) for n, (p, step) in enumerate(wanted)]
        for n, (piece, _) in enumerate(wanted):
            slots = ids[piece.first_row : piece.first_row + piece.tokens]
            assert (slots < 9999).all()
            slots_of[piece.expert, piece.first_row] = slots.tolist()
            (rows,) = [its[3] for its in [it for it in log if it[0] == "tokens"][n : n + 1]]
            assert rows == [slot // (TOP_K if role == "up" else 1) for slot in slots]
        waits = [its[1:] for its in log if its[0] == "wait"]
        assert waits == [(EMPTY + stage_of[n], 1 - n // gemm.stages % 2) for n in range(len(wanted))]
        assert [its[1] for its in log if its[0] == "arrive"] == [FULL + stage for stage in stage_of]
        if role == "down":
            # Weights of the first piece's first stages stand before the wait for the launch before, and nothing else does.
            before = log[: log.index(("launch before",))]
            early = min(gemm.stages, mine[0].end - mine[0].begin)
            assert [its[0] for its in before] == ["weights"] * early and log.count(("launch before",)) == 1
        # A stage is written only behind the wait for its being free.
        order = [its for its in log if its[0] in ("wait", "tokens")]
        assert [its[0] for its in order] == ["wait", "tokens"] * len(wanted)
        # ---- what is consumed
        seen = []

        def consume(which, *its, role=role, seen=seen, gemm=gemm):
            cta_at, expert, group, begin, end, steps = its[14:20]
            if role == "up":
                slot, turn, stage, phase, *_ = its[20:]
            else:
                slot, _, turn, stage, phase, *_ = its[20:]
            seen.append((which, cta_at, expert, group, begin, end, steps, slot, turn, stage, phase))
            for _ in range(end - begin):
                stage, phase = gemm.next_stage(stage, phase)
            return stage, phase

        gemm.consume_piece = consume
        consumer = 3
        arguments = {
            "up": [[None] * 9, 0, 0, 0, 0, 0, ids, 0, 0, 0, 0, FULL, EMPTY, 0, 0, cta, consumer, 0],
            "down": [[None] * 9, 0, 0, 0, 0, 0, 0, ids, np.zeros(9999), 0, 0, 0, FULL, EMPTY, 0, 0, cta, consumer, 0],
        }[role]
        kind.consume_pieces.__wrapped__(gemm, splits[cta], *arguments)
        stage, phase = 0, 0
        assert len(seen) == len(mine)
        for index, (piece, its) in enumerate(zip(mine, seen, strict=True)):
            which, *rest = its
            slot = slots_of[piece.expert, piece.first_row][consumer] if consumer < piece.tokens else -1
            assert gemm.widths[which] == piece.width
            assert rest == [
                *(cta, piece.expert, piece.group, piece.begin, piece.end, work.steps),
                *(slot, index, stage, phase),
            ]
            for _ in range(piece.end - piece.begin):
                stage, phase = gemm.next_stage(stage, phase)


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_fragments_lie_apart_and_come_back_in_order(dtype, monkeypatch):
    """CTAs 1 and 2 leave the rest of a unit of CTA 0, by every thread and at every width: each finds what its like left."""
    gemm = emit.KERNELS["ragged_up", dtype](RAGGED[dtype])
    memory, marks, cleared = {}, {}, []
    monkeypatch.setattr(ragged.ragged_ptx, "store_four", lambda address, four: memory.setdefault(address, list(four)))
    monkeypatch.setattr(ragged.ragged_ptx, "load_four", memory.__getitem__)
    monkeypatch.setattr(ragged.ragged_ptx, "publish", marks.__setitem__)
    monkeypatch.setattr(ragged.ragged_ptx, "await_mark", marks.__getitem__)
    monkeypatch.setattr(ragged.ragged_ptx, "clear_mark", cleared.append)
    monkeypatch.setattr(ragged.cute.arch, "sync_warp", lambda: None)
    monkeypatch.setattr(ragged, "const_expr", lambda value: value)
    monkeypatch.setattr(ragged, "Int64", int)
    kind, fragments, zeros = type(gemm), tensor(), tensor()
    gemm.meet = lambda: None
    gemm.sums_at = lambda *its: kind.sums_at.__wrapped__(gemm, *its)
    for which, width in enumerate(gemm.widths):
        memory.clear()
        marks.clear()
        cleared.clear()
        for cta in (1, 2):
            for consumer in range(256):
                sums = [cta * 1e6 + consumer * 1000 + place for place in range(width)]
                kind.leave.__wrapped__(gemm, which, sums, fragments, zeros, cta, cta - 1, consumer)
        assert len(memory) == 2 * 256 * width // 4 and marks == {4: 1, 8: 2}
        most = 256 * gemm.widths[-1] * 4  # bytes of a CTA's place, as the host allocates
        assert {address // most for address in memory} == {1, 2} and not any(address % 16 for address in memory)
        for consumer in range(256):
            total = [0.5] * width
            kind.collect.__wrapped__(gemm, which, total, fragments, zeros, 0, consumer)
            assert total == [3e6 + 2 * consumer * 1000 + 2 * place + 0.5 for place in range(width)]
        assert cleared == [4, 8]
