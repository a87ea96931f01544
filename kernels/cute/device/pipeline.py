"""What the kernels share: tiles, shared memory, the producer warpgroup and the multiplying consumers.

A tile is `rows` weight rows of one expert times one M block of `block_m` slots. Weights are the M operand of wgmma (so
that block_m can be any multiple of 8), tokens its N operand, and a step is 128 bytes of K: with 128-byte rows the
shared layout is the same in FP8 and bf16. Per stage:

    weights     TMA, one box for each 64 rows of each warpgroup
    tokens      128 bytes of each slot's row, gathered by cp.async, 16 bytes a thread
    scales      FP8: the scale of each slot for this step, 4 bytes a slot

`full` barriers count the 128 producer threads (their copies, when they land) and the TMA bytes, `empty` barriers the
consumer warps. Rows of the accumulator that a thread holds are r and r + 8 of every 16, r = lane / 4, and its columns
2 * (lane % 4) and the next of every 8. Which weight row lies in which row of shared memory is up to the TMA box, so
the boxes are cut so that a thread's values are neighbours in the output.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator

from rampwrap.kernels.cute.configs import PRODUCER_THREADS, STEP_BYTES, CuteConfig
from rampwrap.kernels.cute.device import ptx

# The producers gather 16 rows at a time: eight threads a row, 16 bytes a thread.
CHUNK_BYTES = 16
CHUNKS = STEP_BYTES // CHUNK_BYTES
ROWS_AT_A_TIME = PRODUCER_THREADS // CHUNKS
CONSUMERS_BARRIER = 1


class GroupedGemm:
    """A grouped GEMM over M blocks; subclasses give the weight boxes, what a row of tokens is, and the epilogue.

    Everything here is a Python constant while the DSL traces; the methods are inlined into one kernel.
    """

    def __init__(self, config: CuteConfig) -> None:
        self.config = config
        self.fp8 = config.dtype == "fp8"
        self.dtype: Any = Float8E4M3FN if self.fp8 else BFloat16
        self.width = config.element_bytes
        self.block_m, self.rows, self.stages = config.block_m, config.rows, config.stages
        self.groups = config.warpgroups
        self.mt = config.block_n // 16  # 64-row tiles of a warpgroup
        self.step = config.step
        self.pairs = config.block_m // 8  # pairs of token columns of a thread
        self.regs = config.block_m // 2  # accumulators of a thread for one 64-row tile
        self.consumers = 32 * config.warp_n
        self.token_passes = -(-config.block_m // ROWS_AT_A_TIME)
        self.scale_passes = -(-config.block_m // PRODUCER_THREADS) if self.fp8 else 0
        # FP8: products of 64-row tiles under way at once, each in registers of its own beside the scaled sums.
        self.sets = config.product_sets
        # Short wgmma have no time to hide the scaling in, but wait for each other where they add to the same registers:
        # all tiles' first, then all tiles' second, and so on, to be waited for once.
        self.together = self.sets == self.mt and config.block_m <= 48
        # The producers' registers hold the slots of one more tile only where a thread copies few rows.
        self.looks_ahead = config.block_m <= (64 if config.warp_n > 4 else 128)
        self.box_rows = 64 * self.groups
        self.cluster = 1
        # With a K loop for each width, accumulators of a first step that are read without having been written count as alive in
        # all of them together, 416 registers in bf16, and ptxas spills them and waits behind each wgmma.
        self.zeroed = config.form == "ragged"

    # ---- host side

    def make_mma(self):
        """The wgmma of a step, and the shared layouts of weights and tokens."""
        shape = (64, self.block_m, 32 if self.fp8 else 16)
        k = OperandMajorMode.K
        if self.fp8:
            op = warpgroup.MmaF8Op(self.dtype, self.dtype, Float32, shape, warpgroup.OperandSource.SMEM, k, k)
        else:
            op = warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, warpgroup.OperandSource.SMEM, k, k)
        mma = cute.make_tiled_mma(cute.make_mma_atom(op), (self.groups, 1, 1))
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        weights = cute.tile_to_shape(atom, (self.rows, self.step, self.stages), order=(0, 1, 2))
        tokens = cute.tile_to_shape(atom, (self.block_m, self.step, self.stages), order=(0, 1, 2))
        return mma, weights, tokens

    @property
    def box_warps(self) -> int:
        """Sixteens of rows of a box: of each consumer warp."""
        return self.box_rows // 16

    @property
    def box(self) -> tuple[int, ...]:
        """A TMA box along (K, 8 rows, eights, warps, m) of a view of weights."""
        return (self.step, 8, 2, self.box_warps, 1)

    @cute.jit
    def grid_of(self, num_blocks: Int32, tiles_n: Int32, max_ctas: Int32):
        """CTAs to launch: one a tile up to `max_ctas`, whole clusters, at least one."""
        most = max_ctas // self.cluster * self.cluster
        return cutlass.max(cutlass.min(num_blocks * tiles_n, most), self.cluster)

    # ---- device side

    def allocate(self, weights, tokens):
        """Shared memory of the pipeline: weights, tokens, scales, barriers (full, then empty)."""
        memory = SmemAllocator()
        shared_w = memory.allocate_tensor(self.dtype, weights.outer, byte_alignment=1024, swizzle=weights.inner)
        shared_x = memory.allocate_tensor(self.dtype, tokens.outer, byte_alignment=1024, swizzle=tokens.inner)
        scales = None
        if self.fp8:
            layout = cute.make_layout((self.block_m, self.stages))
            scales = memory.allocate_tensor(Float32, layout, byte_alignment=16)
        full = memory.allocate_array(Int64, 2 * self.stages)
        return memory, shared_w, shared_x, scales, full, full + self.stages

    @cute.jit
    def init_barriers(self, full, empty, peers, warp):
        """Every thread calls it; afterwards the barriers of all CTAs of the cluster may be used.

        `peers`: those of `init_peers`; None outside clusters.
        """
        if warp == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, PRODUCER_THREADS + 1)
                    cute.arch.mbarrier_init(empty + stage, self.config.warp_n)
                if const_expr(self.cluster > 1):
                    self.init_peers(peers)
            cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def tile_of(self, index, num_blocks, tiles_n, group_m):
        """(M block, column tile) of the index-th tile: `group_m` blocks side by side go through the columns together."""
        first = quotient(index, group_m * tiles_n) * group_m
        height = cutlass.min(num_blocks - first, group_m)
        inside = index - first * tiles_n
        tile = quotient(inside, height)
        return first + inside - tile * height, tile

    def end_of(self, start, stop, by):
        """Where the loop of a CTA over its tiles stops, which counts from `start` by `by`."""
        return stop

    @cute.jit
    def tile_after(self, index, stop, by):
        """The index of the tile that this CTA does next; any valid one after its last."""
        return cutlass.min(index, stop - 1 - by) + by

    @cute.jit
    def slot_of(self, sorted_ids, block, num_slots, consumer):
        """The slot of the consumer-th token of a block, -1 for none; the load is under way, nothing waits for it."""
        slot = sorted_ids[block * self.block_m + cutlass.min(consumer, self.block_m - 1)]
        return slot | ((num_slots - 1 - slot) >> 31)

    def copy_boxes(self, boxes, target, full, stage, step, num_bytes, place):
        """Starts the copies of one step of a tile's weights: boxes one behind the other in shared memory, from the address of stage 0 on.

        `place` says the coordinates behind K of the m-th, `num_bytes` is all that the TMA brings for the step; the first producer warp calls it.
        """
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, num_bytes)
            for m in range(self.rows // self.box_rows):
                to = target + (stage * self.rows + m * self.box_rows) * STEP_BYTES
                ptx.copy_box(to, boxes, (step * self.step, *place(m)), (full + stage).toint())

    def copy_weights(self, boxes, target, full, stage, step, expert, tile):
        """`copy_boxes` of a tile of an expert."""
        place = lambda m: (0, *self.box_at(expert, tile, m))  # noqa: E731
        self.copy_boxes(boxes, target, full, stage, step, self.rows * STEP_BYTES, place)

    @cute.jit
    def gather_rows(self, sorted_ids, block, divisor, num_slots, thread):
        """The rows of the tokens that this producer thread copies, -1 for none: slot // divisor."""
        return self.rows_of(self.load_slots(sorted_ids, block, thread), divisor, num_slots)

    @cute.jit
    def load_slots(self, sorted_ids, block, thread):
        """Slots that this producer thread copies, -1 past the block: thread / 8 and every 16th of the tokens, and

        in FP8 thread and every 128th of the scales. All loads are under way at once, and wait for nothing here.
        """
        slots = cute.make_rmem_tensor(self.token_passes + self.scale_passes, Int32)
        for i in cutlass.range_constexpr(self.token_passes + self.scale_passes):
            if const_expr(i < self.token_passes):
                row = i * ROWS_AT_A_TIME + thread // CHUNKS
                past = const_expr((i + 1) * ROWS_AT_A_TIME > self.block_m)
            else:
                row = (i - self.token_passes) * PRODUCER_THREADS + thread
                past = const_expr((i - self.token_passes + 1) * PRODUCER_THREADS > self.block_m)
            if const_expr(past):
                # All ones where the row is past the block.
                slots[i] = sorted_ids[block * self.block_m + cutlass.min(row, self.block_m - 1)] | (
                    (self.block_m - 1 - row) >> 31
                )
            else:
                slots[i] = sorted_ids[block * self.block_m + row]
        return slots

    @cute.jit
    def next_slots(self, slots, ahead, sorted_ids, block, thread):
        """Into `slots` those of the next tile, `ahead` if they are on their way already."""
        if const_expr(not self.looks_ahead):
            ahead = self.load_slots(sorted_ids, block, thread)
        for i in cutlass.range_constexpr(cute.size(slots)):
            slots[i] = ahead[i]

    @cute.jit
    def rows_of(self, slots, divisor, num_slots):
        """Rows of the slots of `load_slots`, -1 for none."""
        rows = cute.make_rmem_tensor(cute.size(slots), Int32)
        for i in cutlass.range_constexpr(cute.size(slots)):
            slot = slots[i]
            rows[i] = quotient(slot, divisor) | (slot >> 31) | ((num_slots - 1 - slot) >> 31)
        return rows

    @cute.jit
    def copy_tokens(
        self, rows, x_address, row_bytes, scale_address, row_scales, shared_x, shared_s, stage, step, thread
    ):
        """Starts the copies of one step of the rows, and in FP8 of their scales."""
        chunk, first = thread % CHUNKS, thread // CHUNKS
        # The 128-byte swizzle: 16-byte chunk c of row r stands where chunk c ^ (r % 8) would.
        target = shared_x + (stage * self.block_m + first) * STEP_BYTES + (chunk ^ (first % 8)) * CHUNK_BYTES
        source = x_address + (step * STEP_BYTES + chunk * CHUNK_BYTES)
        for i in cutlass.range_constexpr(self.token_passes):
            offset = const_expr(i * ROWS_AT_A_TIME * STEP_BYTES)
            ptx.copy_16_bytes(target, offset, source, rows[i], Int32(row_bytes))
        if const_expr(self.fp8):
            target = shared_s + (stage * self.block_m + thread) * 4
            for i in cutlass.range_constexpr(self.scale_passes):
                row = rows[self.token_passes + i]
                offset = const_expr(i * PRODUCER_THREADS * 4)
                ptx.copy_4_bytes(target, offset, scale_address + step * 4, row, Int32(row_scales) * 4)

    @cute.jit
    def next_stage(self, stage, phase):
        """The stage after this one, and the phase its barrier is in."""
        stage += 1
        if stage == self.stages:
            stage = Int32(0)
            phase = phase ^ 1
        return stage, phase

    @cute.jit
    def fragments(self, mma, shared_w, shared_x, consumer):
        """Operands of a consumer thread in shared memory, and its accumulators."""
        group = consumer // 128
        thread = mma.get_slice(cute.make_layout(self.groups, stride=128)(group))
        weights = mma.make_fragment_A(thread.partition_A(shared_w))
        tokens = mma.make_fragment_B(thread.partition_B(shared_x))
        acc = cute.make_rmem_tensor(thread.partition_shape_C((self.rows, self.block_m)), Float32)
        return weights, tokens, acc

    @cute.jit
    def multiply_bf16(self, mma, weights, tokens, acc, full, empty, stage, phase, steps):
        """acc = weights x tokens over `steps`; a stage is handed back when the wgmma after its own is under way."""
        if const_expr(self.zeroed):
            acc.fill(0.0)
        last = stage
        for step in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            cute.arch.fence_proxy("async.shared", space="cta")
            warpgroup.fence()
            for k in cutlass.range_constexpr(cute.size(weights, mode=[2])):
                mma.set(warpgroup.Field.ACCUMULATE, True if const_expr(k > 0 or self.zeroed) else step > 0)
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

    @cute.jit
    def multiply_fp8(
        self,
        mma,
        weights,
        tokens,
        acc,
        total,
        scales,
        low,
        high,
        scale_at,
        scale_up,
        full,
        empty,
        stage,
        phase,
        steps,
        lane,
    ):
        """total = sum over steps of (weights x tokens) * weight scale * token scale, in float32.

        The FP8 tensor core adds with about 14 bits, and every 128 columns have scales of their own: each step starts
        from zero. `low` are the scales of accumulator rows r, at `scale_at` for the first step, `high` those of r + 8
        at `scale_up`. Lanes hold the scales of 32 steps, so that only every 32nd step waits for memory. Of `acc` the
        first `sets` 64-row tiles are used: a tile is scaled while the wgmma of the next ones go on.
        """
        total.fill(0.0)
        lows, highs = Float32(0.0), Float32(0.0)
        for step in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            cute.arch.fence_proxy("async.shared", space="cta")
            warpgroup.fence()
            if const_expr(self.together):
                for k in cutlass.range_constexpr(cute.size(weights, mode=[2])):
                    mma.set(warpgroup.Field.ACCUMULATE, const_expr(k > 0))
                    cute.gemm(mma, acc, weights[(None, None, k, stage)], tokens[(None, None, k, stage)], acc)
                warpgroup.commit_group()
            else:
                for m in cutlass.range_constexpr(self.sets):
                    self.start_product(mma, weights, tokens, acc, m, stage)
            if step % 32 == 0:
                mine = cutlass.min(step + lane, steps - 1)
                lows = low[scale_at + mine]
                if const_expr(high is not None):
                    highs = high[scale_up + mine]
            by_low = cute.arch.shuffle_sync(lows, step % 32)
            by_high = by_low
            if const_expr(high is not None):
                by_high = cute.arch.shuffle_sync(highs, step % 32)
            factor = cute.make_rmem_tensor(2 * self.pairs, Float32)
            if const_expr(self.sets > 1):
                self.load_factors(scales, factor, stage, lane)
            for m in cutlass.range_constexpr(self.mt):
                if const_expr(not self.together or m == 0):
                    warpgroup.wait_group(const_expr(0 if self.together else min(self.sets, self.mt - m) - 1))
                if const_expr(self.sets == 1):
                    # Registers are short: fetched for each tile.
                    self.load_factors(scales, factor, stage, lane)
                if const_expr(m == (0 if self.together else self.mt - 1)):
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(empty + stage)
                self.add_product(acc, total, factor, by_low, by_high, m)
                if const_expr(m + self.sets < self.mt):
                    warpgroup.fence()
                    self.start_product(mma, weights, tokens, acc, m + self.sets, stage)
            stage, phase = self.next_stage(stage, phase)
        return stage, phase

    @cute.jit
    def start_product(self, mma, weights, tokens, acc, m: cutlass.Constexpr, stage):
        """Starts the wgmma of one step of the m-th 64 rows of each warpgroup, a group to wait for."""
        product = cute.append_ones(acc[(None, m % self.sets, None)], up_to_rank=3)
        for k in cutlass.range_constexpr(cute.size(weights, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, const_expr(k > 0))
            rows = cute.append_ones(weights[(None, m, k, stage)], up_to_rank=2)
            cute.gemm(mma, product, rows, tokens[(None, None, k, stage)], product)
        warpgroup.commit_group()

    @cute.jit
    def load_factors(self, scales, factor, stage, lane):
        """The scales of a thread's tokens for a step."""
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                factor[2 * t + j] = scales[(t * 8 + lane % 4 * 2 + j, stage)]

    @cute.jit
    def add_product(self, acc, total, factor, by_low, by_high, m: cutlass.Constexpr):
        """Adds the product of the m-th 64 rows, scaled."""
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                i = const_expr(m % self.sets * self.regs + t * 4 + j)
                o = const_expr(m * self.regs + t * 4 + j)
                total[o] = total[o] + acc[i] * (factor[2 * t + j] * by_low)
                total[o + 2] = total[o + 2] + acc[i + 2] * (factor[2 * t + j] * by_high)

    @cute.jit
    def meet(self):
        """Waits for all consumer warps."""
        cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.consumers)


def quotient(value, divisor):
    """value // divisor of numbers that are not negative: unsigned, which is half the instructions."""
    return Int32(Uint32(value) // Uint32(divisor))
