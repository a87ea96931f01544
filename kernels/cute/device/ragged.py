"""The ragged form: two launches whose tiles are as wide as the tokens of their block.

Everything is as in `up` and `down` but the consumers. block_m is the most that a block holds, and the alignment puts a block's tokens
first and padding behind them. So every 8th row tells how many eights of tokens there are, one lane looks at each, and the
narrowest of `CuteConfig.widths` that holds them is the N of the tile's wgmma. A block of few tokens, of which skewed routings
have most, then costs what it would with a small block_m, while a hot expert has few blocks. Tiles differ in what they cost, so
CTAs take them forwards and backwards in turn.

N is part of the instruction: the consumers hold a K loop and an epilogue of each width, and branch once a tile. Accumulators live
inside a branch. Shared memory is laid out for the widest; narrower ones use the first rows of a stage.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import attrs
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from rampwrap.kernels.cute.configs import SCALE, CuteConfig
from rampwrap.kernels.cute.device.down import Down, DownBf16, DownFp8
from rampwrap.kernels.cute.device.pipeline import GroupedGemm, quotient
from rampwrap.kernels.cute.device.up import Up, UpBf16, UpFp8


class Ragged(GroupedGemm):
    """A GEMM over blocks of up to block_m tokens; `plain` is that of one width, whose K loop and epilogue it uses."""

    plain: type[GroupedGemm]

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        self.widths = config.widths
        self.narrow = [self.plain(attrs.evolve(config, block_m=width)) for width in self.widths]

    def as_wide_as(self, total):
        """The GEMM whose sums these are."""
        (found,) = (its for its in self.narrow if its.mt * its.regs == cute.size(total))
        return found

    @cute.jit
    def end_of(self, start, stop, by):
        """As of every GEMM, of CTAs that go through the tiles forwards and backwards in turn: of a last round that is not whole."""
        rounds = quotient(stop, by)
        left = stop - rounds * by
        place = start + rounds % 2 * (by - 1 - 2 * start)
        return (rounds + cutlass.min(cutlass.max(left - place, 0), 1)) * by

    @cute.jit
    def tile_after(self, index, stop, by):
        """As of every GEMM; who had the first tile of a round has the last one of the next, so that CTAs have as much to do where
        tiles become narrower."""
        after = index + by
        turn = quotient(after, by)
        place = after - turn * by
        return cutlass.min(after + turn % 2 * (by - 1 - 2 * place), stop - 1)

    @cute.jit
    def load_of(self, sorted_ids, block, consumer):
        """What the consumer-th row of a block holds, and the first one behind a lane's eight rows; the loads are under way, nothing waits."""
        first, last = block * self.block_m, const_expr(self.block_m - 1)
        behind = consumer % 32 * 8 + 8
        return sorted_ids[first + cutlass.min(consumer, last)], sorted_ids[first + cutlass.min(behind, last)]

    @cute.jit
    def look_at(self, index, num_blocks, tiles_n, group_m, sorted_ids, expert_ids, consumer):
        """(column tile, expert, *`load_of`) of the index-th tile."""
        block, tile = self.tile_of(index, num_blocks, tiles_n, group_m)
        expert = expert_ids[block]
        slot, behind = self.load_of(sorted_ids, block, consumer)
        return tile, expert, slot, behind

    @cute.jit
    def told_by(self, slot, behind, num_slots, consumer):
        """(a thread's slot, -1 for none; into how many eights of rows the block's tokens reach, at least one) by what was loaded."""
        past = self.block_m - 9 - consumer % 32 * 8  # negative where a lane's next eight rows are none of the block
        more = (behind | (num_slots - 1 - behind) | past) >= 0
        return slot | ((num_slots - 1 - slot) >> 31), cute.arch.popc(cute.arch.vote_ballot_sync(more)) + 1

    def fits(self, which, eights):
        """Whether a width is the narrowest that holds so many eights."""
        below = self.widths[which - 1] // 8 if which else 0
        if which == len(self.widths) - 1:
            return eights > below
        return (eights > below) & (eights <= self.widths[which] // 8)

    @cute.jit
    def operands(self, which: cutlass.Constexpr, shared_w, shared_x, consumer):
        """(wgmma, weights, tokens, accumulators) of a width: the first rows of every stage of tokens."""
        narrow, step = self.narrow[which], const_expr(self.step)
        rows = cute.make_layout(
            ((8, narrow.block_m // 8), (step, 1), self.stages), stride=((step, 8 * step), (1, 0), self.block_m * step)
        )
        mma, _, _ = narrow.make_mma()
        return mma, *narrow.fragments(mma, shared_w, cute.make_tensor(shared_x.iterator, rows), consumer)


class RaggedUp(Ragged, Up):
    """Tiles as of `Up`."""

    plain = Up

    @cute.jit
    def consume(
        self, mma, shared_w, shared_x, shared_s, exchange, w13_scale, sorted_ids, expert_ids, h, h_scale, full, empty,
        num_slots, hidden, columns, group_m, num_blocks, tiles_n, start, stop, by, rank, consumer, warp,
    ):  # fmt: skip
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        tile, expert, slot, behind = self.look_at(start, num_blocks, tiles_n, group_m, sorted_ids, expert_ids, consumer)
        for index in cutlass.range(start, self.end_of(start, stop, by), by, unroll=1):
            now_expert, now_tile = expert, tile * self.cluster + rank
            now_slot, eights = self.told_by(slot, behind, num_slots, consumer)
            # The next tile's are on their way while this one is multiplied.
            after = self.tile_after(index, stop, by)
            tile, expert, slot, behind = self.look_at(
                after, num_blocks, tiles_n, group_m, sorted_ids, expert_ids, consumer
            )
            if now_expert >= 0:
                for which in cutlass.range_constexpr(len(self.narrow)):
                    if self.fits(which, eights):
                        stage, phase = self.consume_tile(
                            which, shared_w, shared_x, shared_s, exchange, w13_scale, h, h_scale, full, empty,
                            hidden, columns, now_expert, now_tile, now_slot, turn, stage, phase, rank, consumer, warp,
                        )  # fmt: skip
                turn += 1

    @cute.jit
    def consume_tile(
        self, which: cutlass.Constexpr, shared_w, shared_x, shared_s, exchange, w13_scale, h, h_scale, full, empty,
        hidden, columns, expert, column_tile, slot, turn, stage, phase, rank, consumer, warp,
    ):  # fmt: skip
        narrow, steps = self.narrow[which], hidden // self.step
        mma, weights, tokens, acc = self.operands(which, shared_w, shared_x, consumer)
        total = cute.make_rmem_tensor(acc.shape, Float32) if const_expr(self.fp8) else acc
        group = column_tile * (self.rows // 2) // SCALE
        if const_expr(self.fp8):
            scale_of = cute.make_tensor(w13_scale.iterator, cute.make_layout(1 << 30))
            gate_at, up_at = self.scales_at(expert, group, hidden, columns)
            stage, phase = narrow.multiply_fp8(
                mma, weights, tokens, acc, total, shared_s, scale_of, scale_of, gate_at, up_at, full, empty,
                stage, phase, steps, consumer % 32,
            )  # fmt: skip
        else:
            stage, phase = narrow.multiply_bf16(mma, weights, tokens, acc, full, empty, stage, phase, steps)
        narrow.activate(total)
        # As for the widest: every token of it arrives at the barriers of a cluster.
        self.share(total, exchange, slot, h_scale, group, columns, turn, rank, consumer, warp)
        narrow.store(total, exchange, h, column_tile, columns, turn, consumer, warp)
        return stage, phase

    def maxima_of_warp(self, total, of_warps, lane, warp):
        """As of the GEMM of their width."""
        self.as_wide_as(total).maxima_of_warp(total, of_warps, lane, warp)


class RaggedDown(Ragged, Down):
    """Tiles as of `Down`."""

    plain = Down

    @cute.jit
    def consume(
        self, mma, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, sorted_ids, expert_ids,
        topk_weights, slots, full, empty, num_slots, hidden, columns, group_m, num_blocks, tiles_n,
        start, stop, by, consumer, warp,
    ):  # fmt: skip
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        tile, expert, slot, behind = self.look_at(start, num_blocks, tiles_n, group_m, sorted_ids, expert_ids, consumer)
        for index in cutlass.range(start, self.end_of(start, stop, by), by, unroll=1):
            now_expert, first = expert, tile * self.rows + warp * (16 * self.mt)
            now_slot, eights = self.told_by(slot, behind, num_slots, consumer)
            weight = topk_weights[cutlass.max(now_slot, 0)]
            # The next tile's are on their way while this one is multiplied.
            after = self.tile_after(index, stop, by)
            tile, expert, slot, behind = self.look_at(
                after, num_blocks, tiles_n, group_m, sorted_ids, expert_ids, consumer
            )
            if now_expert >= 0:
                for which in cutlass.range_constexpr(len(self.narrow)):
                    if self.fits(which, eights):
                        stage, phase = self.consume_tile(
                            which, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, slots, full,
                            empty, hidden, columns, now_expert, first, now_slot, weight, turn % 2, stage, phase, consumer,
                        )  # fmt: skip
                turn += 1

    @cute.jit
    def consume_tile(
        self, which: cutlass.Constexpr, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, slots, full,
        empty, hidden, columns, expert, first, slot, weight, place, stage, phase, consumer,
    ):  # fmt: skip
        narrow, steps, lane = self.narrow[which], columns // self.step, consumer % 32
        mma, weights, tokens, acc = self.operands(which, shared_w, shared_x, consumer)
        total = cute.make_rmem_tensor(acc.shape, Float32) if const_expr(self.fp8) else acc
        if const_expr(self.fp8):
            scale_of = cute.make_tensor(w2_scale.iterator, cute.make_layout(1 << 30))
            at = (expert * (hidden // SCALE) + first // SCALE) * (columns // SCALE)
            stage, phase = narrow.multiply_fp8(
                mma, weights, tokens, acc, total, shared_s, scale_of, None, at, at, full, empty,
                stage, phase, steps, lane,
            )  # fmt: skip
        else:
            stage, phase = narrow.multiply_bf16(mma, weights, tokens, acc, full, empty, stage, phase, steps)
        if consumer < const_expr(narrow.block_m):
            shared_slots[consumer, place] = slot
            shared_weights[consumer, place] = weight
        self.meet()
        narrow.store(total, shared_slots, shared_weights, slots, first + lane // 4 * (2 * self.mt), hidden, place, lane)
        return stage, phase


class RaggedUpFp8(RaggedUp, UpFp8):
    """With the arguments of its plain one."""


class RaggedUpBf16(RaggedUp, UpBf16):
    """With the arguments of its plain one."""


class RaggedDownFp8(RaggedDown, DownFp8):
    """With the arguments of its plain one."""


class RaggedDownBf16(RaggedDown, DownBf16):
    """With the arguments of its plain one."""
