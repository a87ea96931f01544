"""The second launch of the prefill form: rows of slots = topk_weight * (h W_down^T), h in the order of the blocks."""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, GridConstant, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.experimental.cuda import TensorMap

from rampwrap.kernels.cute.configs import PRODUCER_REGISTERS, PRODUCER_THREADS, SCALE, CuteConfig
from rampwrap.kernels.cute.device import ptx
from rampwrap.kernels.cute.device.prefill import BOX_ROWS, GROUP_TOKENS, PrefillGemm, bytes_of_a_step


class PrefillDown(PrefillGemm):
    """Tiles of 256 columns of the output, K the intermediate size; rows of h lie as the blocks list them."""

    run = 4

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        # One warp, which copies the scales of weights; all else comes by TMA.
        self.copying = 32 if self.fp8 else 0

    def launch(
        self,
        h,
        h_scale,
        w2,
        w2_scale,
        sorted_ids,
        expert_ids,
        post_padded,
        topk_weights,
        slots,
        group_m,
        num_blocks,
        max_ctas,
        l2_fetch,
        stream,
    ):
        experts, hidden = w2.shape[0], slots.shape[1]
        mma, weights, tokens = self.make_mma()
        boxes = self.describe_weights(w2, experts * hidden, l2_fetch)
        tma_h, tma_rows = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), h, cute.slice_(tokens, (None, None, 0)), (self.block_m, self.step)
        )
        self.kernel(
            mma,
            boxes,
            tma_h,
            tma_rows,
            h,
            h_scale,
            w2_scale,
            sorted_ids,
            expert_ids,
            post_padded,
            topk_weights,
            slots,
            group_m,
            weights,
            tokens,
        ).launch(
            grid=(self.grid_of(num_blocks, hidden // self.rows, max_ctas), 1, 1),
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
        tma_h: cute.CopyAtom,
        tma_rows: cute.Tensor,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        w2_scale: cute.Tensor,
        sorted_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        post_padded: cute.Tensor,
        topk_weights: cute.Tensor,
        slots: cute.Tensor,
        group_m: Int32,
        weights: cute.ComposedLayout,
        tokens: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared_w, shared_x, shared_s, shared_ws, full, empty = self.allocate(weights, tokens)
        hidden, columns = slots.shape[1], h.shape[1]
        tiles_n = hidden // self.rows
        cute.arch.griddepcontrol_launch_dependents()
        if warp == 0:
            ptx.prefetch_descriptor(boxes.get_ptr().toint())
            cpasync.prefetch_descriptor(tma_h)
        self.init_barriers(full, empty, warp)
        # Routing was complete before the up launch let this one start; only h is still being written.
        num_blocks = post_padded[0] // self.block_m
        stop = num_blocks * tiles_n
        if cta < stop:
            if warp < PRODUCER_THREADS // 32:
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
                if warp == 0:
                    self.produce(
                        boxes.get_ptr().toint(), tma_h, tma_rows, h_scale, w2_scale, expert_ids, shared_w, shared_x, shared_s, shared_ws,
                        full, empty, hidden, columns, group_m, num_blocks, tiles_n, cta, stop, ctas, thread,
                    )  # fmt: skip
            else:
                cute.arch.setmaxregister_increase(self.config.consumer_registers)
                self.consume(
                    mma, shared_w, shared_x, shared_s, shared_ws, sorted_ids, expert_ids, topk_weights, slots,
                    full, empty, hidden, columns, group_m, num_blocks, tiles_n,
                    cta, stop, ctas, thread - PRODUCER_THREADS, warp - PRODUCER_THREADS // 32,
                )  # fmt: skip
        else:
            # A launch that did not wait could end before the one it depends on, and let the next begin too early.
            cute.arch.griddepcontrol_wait()

    @cute.jit
    def produce(
        self, boxes, tma_h, tma_rows, h_scale, w2_scale, expert_ids, shared_w, shared_x, shared_s, shared_ws,
        full, empty, hidden, columns, group_m, num_blocks, tiles_n, start, stop, by, lane,
    ):  # fmt: skip
        steps = columns // self.step
        of_a_tile = const_expr(self.rows // BOX_ROWS)
        weights_address, num_bytes = shared_w.iterator.toint(), const_expr(bytes_of_a_step(self.config, True))
        rows = cute.local_tile(tma_rows, (self.block_m, self.step), (None, None))
        to_rows, from_rows = cpasync.tma_partition(
            tma_h, 0, cute.make_layout(1), cute.group_modes(shared_x, 0, 2), cute.group_modes(rows, 0, 2)
        )
        scales_at, row_scales, padded = Int64(0), Int32(0), Int64(0)
        if const_expr(self.fp8):
            scales_at, row_scales, padded = h_scale.iterator.toint(), columns // SCALE, Int64(h_scale.shape[1])
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert = expert_ids[block]
        early = Int32(0)
        if expert >= 0:
            early = cutlass.min(steps, self.stages)
            box = expert * (hidden // BOX_ROWS) + tile * of_a_tile
            for step in cutlass.range(early, unroll=1):
                self.copy_pair(boxes, weights_address, full, step, step, box, box + 1, num_bytes)
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(1)
        for index in cutlass.range(start, stop, by, unroll=1):
            now_expert, now_block = expert, block
            box = now_expert * (hidden // BOX_ROWS) + tile * of_a_tile
            # What a tile needs is loaded a tile ahead.
            block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
            expert = expert_ids[block]
            if now_expert >= 0:
                for step in cutlass.range(steps, unroll=1):
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if step >= early:
                        self.copy_pair(boxes, weights_address, full, stage, step, box, box + 1, num_bytes)
                    cute.copy(
                        tma_h, from_rows[(None, now_block, step)], to_rows[(None, stage)], tma_bar_ptr=full + stage
                    )
                    if const_expr(self.fp8):
                        with cute.arch.elect_one():
                            ptx.copy_bulk(
                                shared_s.iterator.toint() + stage * (4 * self.block_m),
                                scales_at + (Int64(step) * padded + Int64(now_block * self.block_m)) * 4,
                                const_expr(4 * self.block_m),
                                (full + stage).toint(),
                            )
                        # Scales of both boxes; a row of scales is one of weights' 128.
                        ptx.copy_4_bytes(
                            shared_ws.iterator.toint() + (stage * 2 + lane) * 4,
                            0,
                            w2_scale.iterator.toint() + Int64(step) * 4,
                            (box + lane) | ((of_a_tile - 1 - lane) >> 31),
                            row_scales * 4,
                        )
                        cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                    stage, phase = self.next_stage(stage, phase)
            early = Int32(0)

    @cute.jit
    def slot_at(self, sorted_ids, at, num_slots):
        """The slot of a row, -1 for none; the load is under way, nothing waits for it."""
        slot = ptx.load_i32(sorted_ids.iterator.toint(), at)
        return slot | ((num_slots - 1 - slot) >> 31)

    @cute.jit
    def consume(
        self, mma, shared_w, shared_x, shared_s, shared_ws, sorted_ids, expert_ids, topk_weights, slots, full, empty,
        hidden, columns, group_m, num_blocks, tiles_n, start, stop, by, consumer, warp,
    ):  # fmt: skip
        lane, group = consumer % 32, warp // 4
        num_slots = slots.shape[0]
        steps = columns // self.step
        row = warp * 16 + lane // 4
        tokens, weights, acc = self.operands(mma, shared_x, shared_w, group)
        total = acc
        if const_expr(self.fp8):
            total = cute.make_rmem_tensor(self.sums, Float32)
        stage, phase = Int32(0), Int32(0)
        weight_at = topk_weights.iterator.toint()
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert, low, high, second = self.tile_data(sorted_ids, expert_ids, block, row, num_slots)
        by_low = ptx.load_f32(weight_at, cutlass.max(low, 0))
        by_high = ptx.load_f32(weight_at, cutlass.max(high, 0))
        for index in cutlass.range(start, stop, by, unroll=1):
            now_expert, now_low, now_high, both = expert, low, high, second >= 0
            column = tile * self.rows + lane % 4 * (2 * self.run)
            # What a tile needs is loaded a tile ahead, its routing weights when its slots are known.
            block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
            expert, low, high, second = self.tile_data(sorted_ids, expert_ids, block, row, num_slots)
            if now_expert >= 0 and (both or group == 0):
                stage, phase = self.multiply(
                    mma, tokens, weights, acc, total, shared_s, shared_ws, full, empty, stage, phase, steps,
                    row, (by_low, by_high),
                )  # fmt: skip
                now_by_low, now_by_high = by_low, by_high
                by_low = ptx.load_f32(weight_at, cutlass.max(low, 0))
                by_high = ptx.load_f32(weight_at, cutlass.max(high, 0))
                address = slots.iterator.toint() + Int64(column) * 2
                self.store(total, address, hidden, now_low, now_by_low, 0)
                self.store(total, address, hidden, now_high, now_by_high, 1)
            else:
                if now_expert >= 0:
                    stage, phase = self.skip(full, empty, stage, phase, steps)
                by_low = ptx.load_f32(weight_at, cutlass.max(low, 0))
                by_high = ptx.load_f32(weight_at, cutlass.max(high, 0))

    @cute.jit
    def tile_data(self, sorted_ids, expert_ids, block, row, num_slots):
        """Expert of a block, slots of this thread's two tokens and of the second warpgroup's first; -1 for none."""
        first = block * self.block_m
        return (
            ptx.load_i32(expert_ids.iterator.toint(), block),
            self.slot_at(sorted_ids, first + row, num_slots),
            self.slot_at(sorted_ids, first + row + 8, num_slots),
            self.slot_at(sorted_ids, first + GROUP_TOKENS, num_slots),
        )

    @cute.jit
    def store(self, total, address, hidden, slot, weight, half: cutlass.Constexpr):
        """Writes a thread's columns of one slot's row, 16 bytes at a time; four lanes write 64 together."""
        for n in cutlass.range_constexpr(self.rows // BOX_ROWS):
            for i in cutlass.range_constexpr(BOX_ROWS // (8 * self.run)):
                places = const_expr(self.stored_at_once(n * (BOX_ROWS // 2), i, half))
                # FP8 sums were weighted with the scales.
                values = [total[place] if const_expr(self.fp8) else total[place] * weight for place in places]
                words = ptx.pack_words(values, False)
                offset = const_expr(2 * (n * BOX_ROWS + i * 8 * self.run))
                ptx.store_row(address + offset, slot, hidden * 2, words, 16)


class PrefillDownFp8(PrefillDown):
    @cute.jit
    def __call__(
        self,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        w2: cute.Tensor,
        w2_scale: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        topk_weights: cute.Tensor,
        slots: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        num_blocks: Int32,
        max_ctas: Int32,
        l2_fetch: Int32,
        stream: cuda.CUstream,
    ):
        self.launch(
            h, h_scale, w2, w2_scale, sorted_token_ids, expert_ids, num_tokens_post_padded, topk_weights, slots,
            group_m, num_blocks, max_ctas, l2_fetch, stream,
        )  # fmt: skip


class PrefillDownBf16(PrefillDown):
    @cute.jit
    def __call__(
        self,
        h: cute.Tensor,
        w2: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        topk_weights: cute.Tensor,
        slots: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        num_blocks: Int32,
        max_ctas: Int32,
        l2_fetch: Int32,
        stream: cuda.CUstream,
    ):
        self.launch(
            h, None, w2, None, sorted_token_ids, expert_ids, num_tokens_post_padded, topk_weights, slots,
            group_m, num_blocks, max_ctas, l2_fetch, stream,
        )  # fmt: skip
