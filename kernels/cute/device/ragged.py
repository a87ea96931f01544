"""What both GEMMs of the ragged form share: the split on the GPU, one copy of the K loop for each width, fragments.

`schedule` says how the work is cut. Every CTA makes the cut for itself, from the counts that the alignment wrote: a thread
takes two experts, prefix sums tell where in the line they stand, and whoever has the expert in which this CTA's
share begins or ends computes that cut. CTAs agree because they compute the same numbers; nothing is exchanged.

wgmma's width is part of the instruction, so the consumers hold a K loop and an epilogue for each of `WIDTHS` and branch once a
piece. Accumulators live inside a branch. Shared memory is laid out for the widest; narrower ones use the first rows.

Fragments (pieces that do not begin with their unit's first step), as tests/kernels/cute/test_ragged_marks.py models them:

    who does it     stores its sums to `partials`, its own place there; all its consumer threads meet, one of them publishes the
                    CTA's mark: 1, or 2 where the piece ends its unit
    the owner       multiplies its own steps first, then takes the next CTAs' sums in order until one has mark 2

* Nobody waits in a circle. A CTA waits only for CTAs of higher number, and for what they do before they wait for anybody: a
  fragment is the first piece of its CTA (tests/kernels/cute/test_ragged_schedule.py).
* It waits only for CTAs that run or will run. The grid is one CTA an SM, and the next launch may start only when every CTA of this
  one has begun (`launch_dependents`), so it holds no place that is waited for. Where another kernel has some of the SMs, CTAs
  begin in order: of those that run only the last can wait for one that does not run yet; all others end and make room.
* Marks are zero before and after each launch: every published mark belongs to exactly one unit, whose one owner clears it,
  after all of its threads have read it. The launch behind sees that: it touches marks only behind its `griddepcontrol.wait`,
  that is after this one has ended and its stores are visible. So a graph can be replayed without a memset, and no launch
  counter is needed. Marks must be zeroed once, when they are allocated.
* A CTA has at most one fragment in a launch, so a place in `partials` is written once between two launches' ends.
* Sums are read past L1; the mark is read by every thread that reads sums, with acquire, behind a release of a thread that met all
  who stored them.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from typing import Any

import attrs
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from rampwrap.kernels.cute.configs import RAGGED_EXPERTS, CuteConfig
from rampwrap.kernels.cute.device import ragged_ptx
from rampwrap.kernels.cute.device.pipeline import CHUNKS, PRODUCER_THREADS, ROWS_AT_A_TIME, GroupedGemm, quotient
from rampwrap.kernels.cute.schedule import WIDTHS, Work

SUMS = 4
"Numbers of which prefix sums are made: rows, units, cost, experts with tokens."
WARPS = RAGGED_EXPERTS // 64
"Warps whose threads have an expert, two each."
CUTS = 8
"Room for the five numbers of a CTA's cuts."


class DeviceWork(Work):
    """`Work` on numbers of the GPU."""

    @staticmethod
    def least(a: Any, b: Any) -> Any:
        return cutlass.min(a, b)

    @staticmethod
    def most(a: Any, b: Any) -> Any:
        return cutlass.max(a, b)

    @staticmethod
    def divide(a: Any, b: Any) -> Any:
        return quotient(a, b)


class Ragged(GroupedGemm):
    """A GEMM over experts as `schedule` cuts it; `plain` is the GEMM of a fixed width whose loop and epilogue it uses."""

    plain: type[GroupedGemm]

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        self.widths = WIDTHS[config.dtype]
        self.narrow = [self.plain(attrs.evolve(config, form="two", block_m=width)) for width in self.widths]

    def make_mmas(self):
        """The wgmma of each width, and the shared layouts of the widest."""
        _, weights, tokens = self.make_mma()
        return tuple(narrow.make_mma()[0] for narrow in self.narrow), weights, tokens

    def set_work(self, groups, steps, memory, reread, base, slope, overhead):
        """The line of the GEMM, for everything that is traced from here on: loops take no object but `self`."""
        self.work = DeviceWork(self.widths, groups, steps, memory, reread, base, slope, overhead)

    # ---- the split

    def allocate_split(self, memory):
        """Shared memory of the split: (table of experts with tokens, cuts of this CTA, sums of each warp).

        table   expert, tokens, first row, first unit; behind the last one the number of units
        cuts    first unit, its first step, last unit, where in it the share ends, place of the first expert in the table
        """
        table = memory.allocate_tensor(Int32, cute.make_layout((4, RAGGED_EXPERTS + 1)), byte_alignment=16)
        cuts = memory.allocate_tensor(Int32, cute.make_layout(CUTS), byte_alignment=16)
        sums = memory.allocate_tensor(Int32, cute.make_layout((SUMS + 1, WARPS), stride=(1, 8)), byte_alignment=16)
        return table, cuts, sums

    @cute.jit
    def split(self, counts, shared, cta, ctas, thread, warp):
        """Fills the shared memory of `allocate_split`; every thread of the CTA calls it.

        A thread has two neighbouring experts, whose numbers do not wait for each other.
        """
        _, cuts, sums = shared
        lane = thread % 32
        if thread < CUTS:
            cuts[thread] = Int32(0)
        first, second = self.numbers(counts, 2 * thread), self.numbers(counts, 2 * thread + 1)
        own = [first[1 + which] + second[1 + which] for which in range(SUMS)]
        upto = list(own)
        least = cutlass.max(first[1 + SUMS], second[1 + SUMS])
        for distance in cutlass.range_constexpr(5):
            # Lanes below the distance get their own number back, and leave it out.
            reaches = self.work.some(lane - ((1 << distance) - 1))
            for which in cutlass.range_constexpr(SUMS):
                upto[which] = upto[which] + reaches * cute.arch.shuffle_sync_up(
                    upto[which], 1 << distance, mask_and_clamp=0
                )
            least = cutlass.max(least, cute.arch.shuffle_sync_bfly(least, 1 << distance))
        if lane == 31 and warp < WARPS:
            for which in cutlass.range_constexpr(SUMS):
                sums[which, warp] = upto[which]
            sums[SUMS, warp] = least
        cute.arch.sync_threads()
        before = [upto[which] - own[which] for which in range(SUMS)]
        totals = [Int32(0)] * (SUMS + 1)
        for other in cutlass.range_constexpr(WARPS):
            lower = self.work.some(warp - other)
            for which in cutlass.range_constexpr(SUMS):
                its = sums[which, other]
                before[which] = before[which] + lower * its
                totals[which] = totals[which] + its
            totals[SUMS] = cutlass.max(totals[SUMS], sums[SUMS, other])
        self.enter(2 * thread, first, before, totals, shared, cta, ctas)
        before = [before[which] + first[1 + which] for which in range(SUMS)]
        self.enter(2 * thread + 1, second, before, totals, shared, cta, ctas)
        if thread == 0:
            self.close(totals, shared, cta, ctas)
        cute.arch.sync_threads()

    def numbers(self, counts, expert):
        """(tokens, rows, units, cost, 1 if it has tokens, least share) of an expert; as without tokens of one that is none."""
        most = counts.shape[0]
        count = counts[self.work.least(expert, most - 1)] * self.work.some(most - expert)
        some, least = self.work.some(count), self.work.least_share(count)
        return count, self.work.rows(count), self.work.units(count), self.work.cost(count), some, least

    @cute.jit
    def enter(self, expert, its, before, totals, shared, cta, ctas):
        """Writes an expert's row of the table, and the cuts that lie in it; `before` and `totals` are sums of `numbers`."""
        table, cuts, _ = shared
        count, _, its_units, its_cost, _, _ = its
        rows, units, passed, active = before
        here, there = self.places(totals, cta, ctas)
        if count > 0:
            table[0, active] = expert
            table[1, active] = count
            table[2, active] = rows
            table[3, active] = units
            if here >= passed and here < passed + its_cost:
                unit, step = self.work.cut(here - passed, count)
                cuts[0] = units + unit
                cuts[1] = step
                # A cut behind its last step is the next one's first.
                cuts[4] = active + self.work.some(unit - its_units + 1)
            if there >= passed and there < passed + its_cost:
                unit, step = self.work.cut(there - passed, count)
                cuts[2] = units + unit
                cuts[3] = step

    def places(self, totals, cta, ctas):
        """Where in the line a CTA's share begins and ends."""
        sharing, total = self.work.ctas(totals[2], totals[SUMS], ctas), totals[2]
        return self.work.place(total, sharing, cta), self.work.place(total, sharing, cta + 1)

    @cute.jit
    def close(self, totals, shared, cta, ctas):
        """Writes the end of the table and, for the CTA that has it, of the line, which lies in no expert.

        CTAs beyond those that share the line keep zeros, which is no piece.
        """
        table, cuts, _ = shared
        table[3, totals[3]] = totals[1]
        if cta == self.work.ctas(totals[2], totals[SUMS], ctas) - 1:
            cuts[2] = totals[1]

    def share_of(self, shared):
        """(pieces, place of the first one's expert in the table) of this CTA."""
        cuts = shared[1]
        return cuts[2] - cuts[0] + cutlass.min(cuts[3], 1), cuts[4]

    def piece(self, shared, index, place):
        """(place in the table, expert, tokens, first row, group, begin, end) of a CTA's index-th piece.

        `place`: that of the piece before it, or of `share_of`.
        """
        table, cuts, _ = shared
        unit = cuts[0] + index
        place = place + self.work.some(unit - table[3, place + 1] + 1)
        expert, count, row, inside = table[0, place], table[1, place], table[2, place], unit - table[3, place]
        group, turn = self.work.group_and_pass(inside, count)
        begin = cuts[1] * (1 - cutlass.min(index, 1))
        end = self.work.steps - (self.work.steps - cuts[3]) * (1 - self.work.some(cuts[2] - unit))
        return place, expert, self.work.tokens(turn, count), row + turn * self.work.pass_rows(count), group, begin, end

    # ---- a piece

    @cute.jit
    def slots_of(self, sorted_ids, row, tokens, thread):
        """As `load_slots`, of so many tokens from a row of the alignment on."""
        slots = cute.make_rmem_tensor(self.token_passes + self.scale_passes, Int32)
        for i in cutlass.range_constexpr(self.token_passes + self.scale_passes):
            if const_expr(i < self.token_passes):
                at = i * ROWS_AT_A_TIME + thread // CHUNKS
            else:
                at = (i - self.token_passes) * PRODUCER_THREADS + thread
            slots[i] = sorted_ids[row + cutlass.min(at, tokens - 1)] | ((tokens - 1 - at) >> 31)
        return slots

    @cute.jit
    def operands(self, narrow, mma, shared_w, shared_x, consumer):
        """As `fragments`, of a width that is not the widest: the first rows of every stage of tokens."""
        width, step = const_expr(narrow.block_m), const_expr(self.step)
        rows = cute.make_layout(
            ((8, width // 8), (step, 1), self.stages), stride=((step, 8 * step), (1, 0), self.block_m * step)
        )
        return narrow.fragments(mma, shared_w, cute.make_tensor(shared_x.iterator, rows), consumer)

    @cute.jit
    def sums_at(self, partials, cta, consumer):
        """Where the first four sums of a consumer thread lie in a CTA's place; the next four lie `SUMS_APART` bytes on."""
        most = const_expr(self.mt * self.regs * self.consumers * 4)
        return partials.iterator.toint() + Int64(cta) * most + consumer * 16

    def fours(self, which):
        """Of a consumer thread's sums, how many groups of four."""
        return self.narrow[which].mt * self.narrow[which].regs // 4

    @cute.jit
    def leave(self, which: cutlass.Constexpr, total, partials, marks, cta, ends, consumer):
        """Leaves the sums of a fragment for the unit's owner; `ends` is whether the piece ends its unit, 1 or 0."""
        address = self.sums_at(partials, cta, consumer)
        for i in cutlass.range_constexpr(self.fours(which)):
            four = [total[4 * i + j] for j in range(4)]
            ragged_ptx.store_four(address + i * (16 * self.consumers), four)
        self.meet()
        if consumer == 0:
            ragged_ptx.publish(marks.iterator.toint() + Int64(cta) * 4, 1 + ends)

    @cute.jit
    def collect(self, which: cutlass.Constexpr, total, partials, marks, cta, consumer):
        """Adds to the sums of a unit's beginning those of the CTAs that do the rest of it."""
        other, mark = cta, Int32(1)
        while mark == 1:
            other += 1
            mark = ragged_ptx.await_mark(marks.iterator.toint() + Int64(other) * 4)
            cute.arch.sync_warp()  # wgmma wants whole warps, however often each lane asked
            address = self.sums_at(partials, other, consumer)
            for i in cutlass.range_constexpr(self.fours(which)):
                four = ragged_ptx.load_four(address + i * (16 * self.consumers))
                for j in cutlass.range_constexpr(4):
                    total[4 * i + j] = total[4 * i + j] + four[j]
        self.meet()  # every thread has read the marks
        if consumer < other - cta:
            ragged_ptx.clear_mark(marks.iterator.toint() + Int64(cta + 1 + consumer) * 4)

    @cute.jit
    def multiply_added(self, mma, weights, tokens, acc, full, empty, stage, phase, steps):
        """As `multiply_bf16`, from zeros and not from whatever the registers hold: accumulators of the first step that are read without
        having been written count as alive in every branch before, those of all widths together, and ptxas then spills them
        and waits behind each wgmma."""
        acc.fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        last = stage
        for step in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            cute.arch.fence_proxy("async.shared", space="cta")
            warpgroup.fence()
            for k in cutlass.range_constexpr(cute.size(weights, mode=[2])):
                cute.gemm(mma, acc, weights[(None, None, k, stage)], tokens[(None, None, k, stage)], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if step > 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + last)
            last = stage
            stage, phase = self.next_stage(stage, phase)
        warpgroup.wait_group(0)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(empty + last)
        return stage, phase
