"""The first launch of the prefill form: h = silu(x W_gate^T) * (x W_up^T), in FP8 quantised, in the order of the blocks.

Row r of block b is row 128 b + r of h, so that the second launch reads it by TMA. Of a tile's two boxes of weight rows the
first are gate rows, the second the up rows of the same 128 columns of h: a thread holds both of a column, four lanes all
128 that share a scale, and nothing is exchanged between warps.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, GridConstant, Int32, Int64, const_expr
from cutlass.experimental.cuda import TensorMap

from rampwrap.kernels.cute.configs import PRODUCER_REGISTERS, PRODUCER_THREADS, SCALE, CuteConfig
from rampwrap.kernels.cute.device import ptx
from rampwrap.kernels.cute.device.pipeline import CHUNK_BYTES, CHUNKS, ROWS_AT_A_TIME, quotient
from rampwrap.kernels.cute.device.prefill import BOX_ROWS, GROUP_TOKENS, PrefillGemm, bytes_of_a_step
from rampwrap.kernels.cute.device.up import FP8_MAX, MIN_ABS


class PrefillUp(PrefillGemm):
    """Tiles of 128 columns of h."""

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        self.run = 8 if self.fp8 else 4
        self.copying = PRODUCER_THREADS
        self.passes = self.block_m // ROWS_AT_A_TIME

    def launch(
        self,
        x,
        x_scale,
        w13,
        w13_scale,
        sorted_ids,
        expert_ids,
        post_padded,
        h,
        h_scale,
        top_k,
        group_m,
        num_blocks,
        max_ctas,
        l2_fetch,
        stream,
    ):
        experts, columns = w13.shape[0], h.shape[1]
        mma, weights, tokens = self.make_mma()
        boxes = self.describe_weights(w13, experts * (2 * columns), l2_fetch)
        self.kernel(
            mma,
            boxes,
            x,
            x_scale,
            w13_scale,
            sorted_ids,
            expert_ids,
            post_padded,
            h,
            h_scale,
            top_k,
            group_m,
            weights,
            tokens,
        ).launch(
            grid=(self.grid_of(num_blocks, columns // BOX_ROWS, max_ctas), 1, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        boxes: GridConstant[TensorMap],
        x: cute.Tensor,
        x_scale: cute.Tensor,
        w13_scale: cute.Tensor,
        sorted_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        post_padded: cute.Tensor,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        weights: cute.ComposedLayout,
        tokens: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared_w, shared_x, shared_s, shared_ws, full, empty = self.allocate(weights, tokens)
        hidden, columns = x.shape[1], h.shape[1]
        tiles_n = columns // BOX_ROWS
        if warp == 0:
            ptx.prefetch_descriptor(boxes.get_ptr().toint())
        self.init_barriers(full, empty, warp)
        # All that is read here was written by the launches before; they are done from here on, so that the launch
        # after this one may rely on it as well.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        num_blocks = post_padded[0] // self.block_m
        stop = num_blocks * tiles_n
        if cta < stop:
            num_slots = x.shape[0] * top_k
            if warp < PRODUCER_THREADS // 32:
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
                self.produce(
                    boxes.get_ptr().toint(), x, x_scale, w13_scale, sorted_ids, expert_ids, shared_w, shared_x, shared_s, shared_ws,
                    full, empty, num_slots, top_k, columns, group_m, num_blocks, tiles_n, cta, stop, ctas, thread, warp,
                )  # fmt: skip
            else:
                cute.arch.setmaxregister_increase(self.config.consumer_registers)
                self.consume(
                    mma, shared_w, shared_x, shared_s, shared_ws, sorted_ids, expert_ids, h, h_scale, full, empty,
                    num_slots, hidden, group_m, num_blocks, tiles_n,
                    cta, stop, ctas, thread - PRODUCER_THREADS, warp - PRODUCER_THREADS // 32,
                )  # fmt: skip

    @cute.jit
    def produce(
        self, boxes, x, x_scale, w13_scale, sorted_ids, expert_ids, shared_w, shared_x, shared_s, shared_ws,
        full, empty, num_slots, top_k, columns, group_m, num_blocks, tiles_n, start, stop, by, thread, warp,
    ):  # fmt: skip
        hidden = x.shape[1]
        chunk, first = thread % CHUNKS, thread // CHUNKS
        # The 128-byte swizzle: 16-byte chunk c of row r stands where chunk c ^ (r % 8) would.
        to_tokens = shared_x.iterator.toint() + first * (CHUNKS * CHUNK_BYTES) + (chunk ^ (first % 8)) * CHUNK_BYTES
        x_at = x.iterator.toint() + chunk * CHUNK_BYTES
        weights_address = shared_w.iterator.toint()
        stage, phase = Int32(0), Int32(1)
        for index in cutlass.range(start, stop, by, unroll=1):
            # Not loaded a tile ahead: registers are short, and the stages under way last longer than these loads.
            block, tile = self.tile_of(index, num_blocks, tiles_n, group_m)
            expert, slots = expert_ids[block], self.load_slots(sorted_ids, block, thread)
            box = expert * (2 * tiles_n) + tile
            at = cute.make_rmem_tensor(self.passes, Int64)
            for i in cutlass.range_constexpr(self.passes):
                at[i] = self.address_of(slots[i], num_slots, top_k, x_at, hidden * self.width)
            scale_at = Int64(0)
            if const_expr(self.fp8):
                scale_at = self.address_of(
                    slots[self.passes], num_slots, top_k, x_scale.iterator.toint(), hidden // SCALE * 4
                )
            if expert >= 0:
                for step in cutlass.range(hidden // self.step, unroll=1):
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if warp == 0:
                        self.copy_pair(
                            boxes, weights_address, full, stage, step, box, box + tiles_n,
                            bytes_of_a_step(self.config, False),
                        )  # fmt: skip
                        if const_expr(self.fp8):
                            # Scales of both boxes; a row of scales is one of weights' 128.
                            ptx.copy_4_bytes(
                                shared_ws.iterator.toint() + (stage * 2 + thread) * 4,
                                0,
                                w13_scale.iterator.toint() + Int64(step) * 4,
                                (box + thread * tiles_n) | ((1 - thread) >> 31),
                                hidden // SCALE * 4,
                            )
                    to_stage = to_tokens + stage * (self.block_m * CHUNKS * CHUNK_BYTES)
                    for i in cutlass.range_constexpr(self.passes):
                        ptx.copy_16(to_stage, i * ROWS_AT_A_TIME * CHUNKS * CHUNK_BYTES, at[i])
                        at[i] = at[i] + CHUNKS * CHUNK_BYTES
                    if const_expr(self.fp8):
                        ptx.copy_4(shared_s.iterator.toint() + (stage * self.block_m + thread) * 4, 0, scale_at)
                        scale_at += 4
                    cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                    stage, phase = self.next_stage(stage, phase)

    @cute.jit
    def address_of(self, slot, num_slots, top_k, first, row_bytes):
        """Where the row of a slot begins; far below zero for padding, which is not copied.

        Were padding to read one certain row instead, all CTAs would wait for one slice of L2: `up` of 8192 tokens took 470
        us in FP8 and 1007 us in bf16.
        """
        padding = Int64((num_slots - 1 - slot) >> 31) << 62
        return first + Int64(quotient(slot, top_k)) * row_bytes + padding

    @cute.jit
    def load_slots(self, sorted_ids, block, thread):
        """Slots whose rows this thread copies, thread / 8 and every 16th, and in FP8 that whose scale it copies."""
        slots = cute.make_rmem_tensor(self.passes + (1 if self.fp8 else 0), Int32)
        first = block * self.block_m
        for i in cutlass.range_constexpr(self.passes):
            slots[i] = sorted_ids[first + i * ROWS_AT_A_TIME + thread // CHUNKS]
        if const_expr(self.fp8):
            slots[self.passes] = sorted_ids[first + thread]
        return slots

    @cute.jit
    def consume(
        self, mma, shared_w, shared_x, shared_s, shared_ws, sorted_ids, expert_ids, h, h_scale, full, empty,
        num_slots, hidden, group_m, num_blocks, tiles_n, start, stop, by, consumer, warp,
    ):  # fmt: skip
        lane, group = consumer % 32, warp // 4
        steps = hidden // self.step
        row = warp * 16 + lane // 4
        tokens, weights, acc = self.operands(mma, shared_x, shared_w, group)
        total = acc
        if const_expr(self.fp8):
            total = cute.make_rmem_tensor(self.sums, Float32)
        stage, phase = Int32(0), Int32(0)
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert, second = self.tile_data(sorted_ids, expert_ids, block)
        for index in cutlass.range(start, stop, by, unroll=1):
            now_expert, both = expert, second < num_slots
            now_row, now_tile = block * self.block_m + row, tile
            block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
            expert, second = self.tile_data(sorted_ids, expert_ids, block)
            if now_expert >= 0:
                if both or group == 0:
                    stage, phase = self.multiply(
                        mma, tokens, weights, acc, total, shared_s, shared_ws, full, empty, stage, phase, steps,
                        row, None,
                    )  # fmt: skip
                    self.activate(total)
                    for half in cutlass.range_constexpr(2):
                        self.store(total, h, h_scale, now_row + 8 * half, now_tile, lane, half)
                else:
                    stage, phase = self.skip(full, empty, stage, phase, steps)

    @cute.jit
    def tile_data(self, sorted_ids, expert_ids, block):
        """Expert of a block, and slot of the second warpgroup's first token; nothing waits for the loads."""
        second = ptx.load_i32(sorted_ids.iterator.toint(), block * self.block_m + GROUP_TOKENS)
        return ptx.load_i32(expert_ids.iterator.toint(), block), second

    @cute.jit
    def activate(self, total):
        """Leaves silu(gate) * up where the gate was."""
        for i in cutlass.range_constexpr(self.sums // 2):
            gate = total[i]
            # exp(-gate) is infinite below -88, and its reciprocal zero, as it should be.
            up = total[self.sums // 2 + i]
            total[i] = gate * up * cute.arch.rcp_approx(1.0 + cute.math.exp(-gate, fastmath=True))

    @cute.jit
    def store(self, total, h, h_scale, row, tile, lane, half: cutlass.Constexpr):
        """Writes a thread's columns of one row of h, 16 bytes at a time, and in FP8 the scale of the four lanes' columns."""
        inverse = Float32(1.0)
        runs = const_expr(BOX_ROWS // (8 * self.run))
        if const_expr(self.fp8):
            most = Float32(MIN_ABS)
            for i in cutlass.range_constexpr(self.sums // 4):
                value = total[4 * (i // 2) + 2 * half + i % 2]
                most = cute.arch.fmax(most, cute.arch.fmax(value, -value))
            for distance in cutlass.range_constexpr(2):
                most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, 1 << distance))
            scale = most * (1.0 / FP8_MAX)
            inverse = 1.0 / scale
            at = h_scale.iterator.toint() + (Int64(tile) * h_scale.shape[1] + row) * 4
            ptx.store_f32_if(at, scale, lane % 4 == 0)
        address = h.iterator.toint() + Int64(tile * BOX_ROWS + lane % 4 * (2 * self.run)) * self.width
        for i in cutlass.range_constexpr(runs):
            values = [total[place] * inverse for place in self.stored_at_once(0, i, half)]
            offset = const_expr(i * 8 * self.run * self.width)
            ptx.store_row(address + offset, row, h.shape[1] * self.width, ptx.pack_words(values, self.fp8), 16)


class PrefillUpFp8(PrefillUp):
    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        x_scale: cute.Tensor,
        w13: cute.Tensor,
        w13_scale: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        num_blocks: Int32,
        max_ctas: Int32,
        l2_fetch: Int32,
        stream: cuda.CUstream,
    ):
        self.launch(
            x, x_scale, w13, w13_scale, sorted_token_ids, expert_ids, num_tokens_post_padded, h, h_scale,
            top_k, group_m, num_blocks, max_ctas, l2_fetch, stream,
        )  # fmt: skip


class PrefillUpBf16(PrefillUp):
    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        w13: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        h: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        num_blocks: Int32,
        max_ctas: Int32,
        l2_fetch: Int32,
        stream: cuda.CUstream,
    ):
        self.launch(
            x, None, w13, None, sorted_token_ids, expert_ids, num_tokens_post_padded, h, None,
            top_k, group_m, num_blocks, max_ctas, l2_fetch, stream,
        )  # fmt: skip
