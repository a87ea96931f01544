"""The protocol of fragments in a model: CTAs that run in any interleaving, on any number of SMs, launch after launch.

What a CTA does to marks and fragments is that of `device.ragged`; a step here is what cannot be divided there. CTAs begin in
order, and those of the next launch when all of this one have begun; they touch nothing before this one has ended.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rampwrap.kernels.cute.schedule import WIDTHS, Work, pieces

WORK = Work(WIDTHS["fp8"], 2, 12, 1771, 960, 350, 13, 1500)


class Memory:
    """What lives from launch to launch."""

    def __init__(self, ctas):
        self.marks, self.fragments = [0] * ctas, [None] * ctas


def program(cta, mine, memory, done, before, *, forget=False):
    """A CTA; yields between what others can see, True while it only waits. `done` gets (expert, row, group, steps) of each unit."""
    while not before():  # griddepcontrol.wait
        yield True
    for piece in mine:
        sums = list(range(piece.begin, piece.end))
        yield False
        if not piece.owned():
            assert memory.marks[cta] == 0
            memory.fragments[cta] = sums
            yield False
            memory.marks[cta] = 1 + (piece.end == WORK.steps)
            continue
        other, mark = cta, 1 if piece.end < WORK.steps else 2
        while mark == 1:
            other += 1
            while memory.marks[other] == 0:
                yield True
            mark = memory.marks[other]
            yield False
            sums += memory.fragments[other]
        for place in range(cta + 1, other + 1):
            yield False
            memory.marks[place] = 0 if not forget else memory.marks[place]
        done.append((piece.expert, piece.first_row, piece.group, sums))


def run(launches, ctas, sms, seed, **options):
    """Runs launches, each of its counts, one behind the other; (units of each, marks left).

    Raises:
        TimeoutError: everything that runs waits.
    """
    rng, memory, finished = random.Random(seed), Memory(ctas), []
    waiting, running, units = [], [], []
    for number, counts in enumerate(launches):
        done = []
        units.append(done)
        finished.append(set())
        before = lambda number=number: number == 0 or len(finished[number - 1]) == ctas  # noqa: E731
        for cta, mine in enumerate(pieces(WORK, counts, ctas)):
            waiting.append((number, cta, program(cta, mine, memory, done, before, **options)))
    idle = 0
    while waiting or running:
        while waiting and len(running) < sms:
            running.append(waiting.pop(0))
        number, cta, some = running[rng.randrange(len(running))]
        try:
            idle = idle + 1 if next(some) else 0
        except StopIteration:
            idle = 0
            running.remove((number, cta, some))
            finished[number].add(cta)
        if idle > 50 * sms + 1000:
            raise TimeoutError(f"{len(running)} CTAs wait for each other")
    return units, memory.marks


counts = st.lists(st.one_of(st.just(0), st.integers(1, 12), st.integers(1, 200)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(counts, min_size=1, max_size=3), st.sampled_from([2, 5, 16]), st.integers(2, 20), st.integers(0, 99))
def test_every_unit_is_whole_and_in_order_and_no_mark_is_left(launches, ctas, sms, seed):
    units, marks = run(launches, ctas, sms, seed)
    assert not any(marks)
    for counts, done in zip(launches, units, strict=True):
        assert all(sums == list(range(WORK.steps)) for *_, sums in done)
        assert len(done) == len({unit[:3] for unit in done}) == sum(WORK.units(count) for count in counts)


def test_the_model_finds_what_is_wrong():
    """Marks that are not cleared make the next launch take old sums; on a single SM the owner waits for a CTA that cannot begin."""
    with pytest.raises(AssertionError):
        run([[40], [40]], 5, 5, 0, forget=True)
    with pytest.raises(TimeoutError, match="1 CTAs wait"):
        run([[40]], 5, 1, 0)
