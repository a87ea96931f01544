"""How the ragged form cuts a GEMM: every expert as wide as its tokens, every CTA an equal share of the predicted cost.

The work stands in a line: experts that have tokens in order, of each its groups of 256 weight rows, of a group the passes over
the expert's tokens (at most the widest wgmma each; later ones find the weights in L2), of a pass the steps of 128 bytes of K.
A group in a pass is a *unit*: one tile of sums. CTA i of n takes the steps between the i-th and the next of n equal cuts of the
line's cost. So at most the first and the last unit of a CTA are shared with others:

* the CTA that has a unit's first step owns it, and does it last of all;
* every other CTA that has steps of a unit has them at the beginning of its share: a *fragment*, which it does first and whose
  sums it leaves in memory, so that the owner finds them there at its own end. Owners add them in the order of the CTAs.

A cut that would leave fewer than `FRAGMENTS` steps of a unit on either side moves to that side's end of the unit, and where a
CTA's share is smaller than that there are fewer CTAs. All of it follows from the counts and the number of CTAs alone.

`Work` is whole numbers only, without a branch: the kernels run the same code on numbers of the GPU (`device.ragged`).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import attrs

WIDTHS = {"fp8": (8, 16, 24, 32, 48, 64, 96), "bf16": (8, 16, 24, 32, 48, 64, 96, 128)}
"""Tokens of a unit: the N of its wgmma. With 128 FP8 needs one more register than a thread has."""
UNIT_ROWS = 256
"Weight rows of a unit."
PADDING = 8
"An expert's rows begin at a multiple of it."
FRAGMENTS, NARROW = (2, 4), 16
"""The fewest steps of a unit that a CTA does, of widths up to `NARROW` and of wider ones: leaving and taking the sums of a fragment
is 1 KB a token each way. With 4 for all, the gate+up of one token would wait for CTAs with 9 to 11 steps where the mean is 8."""
TICK = 4
"Costs are counted in 2^4 clocks: the line of 8192 tokens of a large layer is then below 2^31."


@attrs.frozen
class Work:
    """The line of one GEMM; numbers of Python here, of the GPU in the kernels.

    Costs are clocks of one SM, `memory` and `reread` its share of the bandwidth: the reading of a step takes as long as it takes
    all SMs together.
    """

    widths: tuple[int, ...]
    groups: Any
    "Units of an expert in one pass."
    steps: Any
    "Of a unit."
    memory: Any
    "Clocks of reading the weights of a step."
    reread: Any
    "The same from L2; at most `memory`."
    base: Any
    "Of multiplying a step, whatever its width, ..."
    slope: Any
    "... and more for each token."
    overhead: Any
    "Of a unit besides its steps: storing it."

    @staticmethod
    def least(a: Any, b: Any) -> Any:
        """The smaller of two numbers."""
        return min(a, b)

    @staticmethod
    def most(a: Any, b: Any) -> Any:
        """The larger of two numbers."""
        return max(a, b)

    @staticmethod
    def divide(a: Any, b: Any) -> Any:
        """a // b of numbers that are not negative."""
        return a // b

    def some(self, number: Any) -> Any:
        """1 of a number above zero, else 0."""
        return self.least(self.most(number, 0), 1)

    # ---- an expert

    def rows(self, count: Any) -> Any:
        """Rows of the alignment that hold an expert's tokens."""
        return self.divide(count + (PADDING - 1), PADDING) * PADDING

    def passes(self, count: Any) -> Any:
        """Passes over an expert's tokens; 0 without any."""
        widest = self.widths[-1] // PADDING
        return self.divide(self.divide(count + (PADDING - 1), PADDING) + (widest - 1), widest)

    def pass_rows(self, count: Any) -> Any:
        """Rows of each pass but the last, which has no more; of an expert with tokens."""
        passes = self.most(self.passes(count), 1)
        blocks = self.divide(count + (PADDING - 1), PADDING)
        return self.divide(blocks + passes - 1, passes) * PADDING

    def width(self, tokens: Any) -> Any:
        """The narrowest wgmma that holds so many tokens."""
        found = self.widths[0]
        for below, above in itertools.pairwise(self.widths):
            found = found + self.some(tokens - below) * (above - below)
        return found

    def step_cost(self, width: Any, reading: Any) -> Any:
        """Ticks of a step of a unit of a width, its part of the storing included; `reading` is `memory` or `reread`.

        The next unit's weights are read while one is stored: reading hides both or neither.
        """
        multiplying = self.base + self.slope * width + self.divide(self.overhead, self.steps)
        return self.most(reading, multiplying) >> TICK

    def step_costs(self, count: Any) -> tuple[Any, Any]:
        """Of an expert: of a step in its first pass, and in any later one."""
        width = self.width(self.pass_rows(count))
        return self.step_cost(width, self.memory), self.step_cost(width, self.reread)

    def units(self, count: Any) -> Any:
        """Of an expert; 0 without tokens."""
        return self.groups * self.passes(count)

    def cost(self, count: Any) -> Any:
        """Ticks of an expert; 0 without tokens."""
        first, later = self.step_costs(count)
        passes = self.passes(count)
        return self.groups * self.steps * (first * self.some(passes) + later * self.most(passes - 1, 0))

    # ---- cuts

    def fragment(self, width: Any) -> Any:
        """The fewest steps of a unit of a width that a CTA does."""
        return FRAGMENTS[0] + (FRAGMENTS[1] - FRAGMENTS[0]) * self.some(width - NARROW)

    def least_share(self, count: Any) -> Any:
        """Ticks of the shortest fragment of an expert, in its first pass; of one without tokens no more than of one token."""
        width = self.width(self.pass_rows(count))
        return self.fragment(width) * self.step_cost(width, self.memory)

    def ctas(self, total: Any, least: Any, available: Any) -> Any:
        """CTAs among which a line is cut, at least one: so few that a share is no less than the largest `least_share`."""
        return self.most(self.least(available, self.divide(total, least)), 1)

    def place(self, total: Any, ctas: Any, index: Any) -> Any:
        """Where in a line the index-th of its equal shares begins, before it is moved to a step; for index = ctas its end."""
        each = self.divide(total, ctas)
        return index * each + self.least(index, total - each * ctas)

    def cut(self, place: Any, count: Any) -> tuple[Any, Any]:
        """(unit, step) of a place inside the part of the line that an expert of `count` > 0 tokens has.

        The unit is one of the expert's, or for a cut behind its last step the next expert's first, as step 0 always is the
        next unit's.
        """
        first, later = self.step_costs(count)
        passes = self.passes(count)
        head, tail = self.steps * first, self.steps * later
        group = self.divide(place, head + (passes - 1) * tail)
        inside = place - group * (head + (passes - 1) * tail)
        beyond = self.most(inside - head, 0)
        in_later = self.some(inside - head + 1)
        before = self.divide(beyond, tail)
        step = self.divide(
            inside - in_later * (inside - (beyond - before * tail)),
            first + in_later * (later - first),
        )
        unit = group * passes + in_later + before
        # To the unit's beginning if too few steps lie before the cut, else to its end if too few lie behind.
        fragment = self.fragment(self.width(self.pass_rows(count)))
        enough = self.least(fragment, self.divide(self.steps + 1, 2))
        step = step * self.some(step - enough + 1)
        ended = self.some(step + fragment - self.steps) * self.some(step)
        return unit + ended, step * (1 - ended)

    # ---- a unit

    def group_and_pass(self, unit: Any, count: Any) -> tuple[Any, Any]:
        """Of a unit of an expert, by its number there."""
        passes = self.passes(count)
        group = self.divide(unit, passes)
        return group, unit - group * passes

    def tokens(self, turn: Any, count: Any) -> Any:
        """Tokens of an expert's pass."""
        return self.least(self.pass_rows(count), count - turn * self.pass_rows(count))


@attrs.frozen
class Piece:
    """Steps of one unit that a CTA does: the whole unit, its beginning, or a fragment."""

    expert: int
    first_row: int
    "Of the alignment."
    tokens: int
    width: int
    group: int
    begin: int
    end: int
    cost: int
    "Ticks."

    def owned(self) -> bool:
        """Whether the CTA puts the unit together and stores it."""
        return self.begin == 0


def line_cost(work: Work, counts: Sequence[int]) -> int:
    """Ticks of a whole GEMM."""
    return sum(int(work.cost(count)) for count in counts)


def least_share(work: Work, counts: Sequence[int]) -> int:
    """Ticks that a CTA has at the least, of those that share a line."""
    return max(int(work.least_share(count)) for count in counts)


def cuts(work: Work, counts: Sequence[int], available: int) -> list[tuple[int, int]]:
    """The first (unit, step) of each CTA's share, units counted through all experts, and the end of the line behind the last.

    CTAs beyond those that share the line are not in it.
    """
    total = line_cost(work, counts)
    ctas = work.ctas(total, least_share(work, counts), available)
    found = []
    units = passed = 0
    place = work.place(total, ctas, 0)
    for count in counts:
        cost = work.cost(count)
        while cost and passed <= place < passed + cost:
            unit, step = work.cut(place - passed, count)
            found.append((units + unit, step))
            place = work.place(total, ctas, len(found))
        units, passed = units + work.units(count), passed + cost
    return [*found, (units, 0)] if total else [(0, 0)] * 2


def pieces(work: Work, counts: Sequence[int], available: int) -> list[list[Piece]]:
    """What each CTA does, in its order; CTAs that get nothing have an empty list."""
    owners = []
    row = 0
    for expert, count in enumerate(counts):
        owners += [(expert, row, unit, count) for unit in range(work.units(count))]
        row += work.rows(count)
    found: list[list[Piece]] = [[] for _ in range(available)]
    marks = cuts(work, counts, available)
    for cta, ((unit, step), (last, stop)) in enumerate(itertools.pairwise(marks)):
        for at in range(unit, last + (stop > 0)):
            expert, first_row, inside, count = owners[at]
            group, turn = work.group_and_pass(inside, count)
            tokens = work.tokens(turn, count)
            begin, end = step if at == unit else 0, stop if at == last else work.steps
            each = work.step_costs(count)[turn > 0]
            first_row += turn * work.pass_rows(count)
            found[cta].append(
                Piece(expert, first_row, tokens, work.width(tokens), group, begin, end, each * (end - begin))
            )
    return found
