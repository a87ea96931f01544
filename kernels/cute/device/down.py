"""The second launch of the two-launch form: rows of slots = topk_weight * (h W_down^T), by programmatic launch.

It starts while the launch before it ends: weights do not depend on that one, so the first stages of them are on their
way before the wait for h.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, GridConstant, Int32, Int64, const_expr
from cutlass.experimental.cuda import TensorMap

from rampwrap.kernels.cute.configs import PRODUCER_REGISTERS, PRODUCER_THREADS, SCALE
from rampwrap.kernels.cute.device import ptx
from rampwrap.kernels.cute.device.boxes import describe
from rampwrap.kernels.cute.device.pipeline import GroupedGemm


class Down(GroupedGemm):
    """Tiles of `rows` columns of the output, K the intermediate size, one row of tokens a slot."""

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
        experts, columns, hidden = w2.shape[0], h.shape[1], slots.shape[1]
        mma, weights, tokens = self.make_mma()
        # Rows r and r + 8 of the m-th 64 of a warp are its columns r * 2 mt + 2 m and the next.
        mt = self.mt
        boxes = describe(
            w2, (columns, 8, 2 * mt, hidden // (16 * mt), experts), (2 * mt, 1, 16 * mt, hidden), self.box, l2_fetch
        )
        self.kernel(
            mma,
            boxes,
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
        memory, shared_w, shared_x, shared_s, full, empty = self.allocate(weights, tokens)
        shared_slots = memory.allocate_tensor(Int32, cute.make_layout((self.block_m, 2)), byte_alignment=16)
        shared_weights = memory.allocate_tensor(Float32, cute.make_layout((self.block_m, 2)), byte_alignment=16)
        num_slots, hidden, columns = slots.shape[0], slots.shape[1], h.shape[1]
        tiles_n = hidden // self.rows
        cute.arch.griddepcontrol_launch_dependents()
        if warp == 0:
            ptx.prefetch_descriptor(boxes.get_ptr().toint())
        self.init_barriers(full, empty, None, warp)
        # Routing was complete before the up launch let this one start; only h is still being written.
        num_blocks = post_padded[0] // self.block_m
        stop = num_blocks * tiles_n
        if cta < stop:
            if warp < PRODUCER_THREADS // 32:
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
                self.produce(
                    boxes.get_ptr().toint(), shared_w, h, h_scale, sorted_ids, expert_ids, shared_x, shared_s, full, empty,
                    num_slots, group_m, num_blocks, tiles_n, cta, stop, ctas, thread, warp,
                )  # fmt: skip
            else:
                cute.arch.setmaxregister_increase(self.config.consumer_registers)
                self.consume(
                    mma, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, sorted_ids, expert_ids,
                    topk_weights, slots, full, empty, num_slots, hidden, columns, group_m, num_blocks, tiles_n,
                    cta, stop, ctas, thread - PRODUCER_THREADS, warp - PRODUCER_THREADS // 32,
                )  # fmt: skip
        else:
            # A launch that did not wait could end before the one it depends on, and let the next begin too early.
            cute.arch.griddepcontrol_wait()

    def box_at(self, expert, tile, m):
        """As in `Up`."""
        return 2 * m, tile * self.box_warps, expert

    @cute.jit
    def produce(
        self, boxes, shared_w, h, h_scale, sorted_ids, expert_ids, shared_x, shared_s, full, empty,
        num_slots, group_m, num_blocks, tiles_n, start, stop, by, thread, warp,
    ):  # fmt: skip
        columns = h.shape[1]
        steps = columns // self.step
        h_address, row_bytes = h.iterator.toint(), Int64(columns) * self.width
        scale_address, scales_address, row_scales = Int64(0), Int32(0), Int64(0)
        if const_expr(self.fp8):
            scale_address, scales_address = h_scale.iterator.toint(), shared_s.iterator.toint()
            row_scales = Int64(h_scale.shape[1])
        tokens_address, weights_address = shared_x.iterator.toint(), shared_w.iterator.toint()
        early = Int32(0)
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert, slots = expert_ids[block], self.load_slots(sorted_ids, block, thread)
        if expert >= 0:
            early = cutlass.min(steps, self.stages)
            if warp == 0:
                for step in cutlass.range(early, unroll=1):
                    self.copy_weights(boxes, weights_address, full, step, step, expert, tile)
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(1)
        for index in cutlass.range(start, self.end_of(start, stop, by), by, unroll=1):
            # What a tile needs is loaded a tile ahead.
            rows = self.rows_of(slots, 1, num_slots)
            now_expert, now_tile = expert, tile
            block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
            expert = expert_ids[block]
            ahead = slots
            if const_expr(self.looks_ahead):
                ahead = self.load_slots(sorted_ids, block, thread)
            if now_expert >= 0:
                for step in cutlass.range(steps, unroll=1):
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if warp == 0 and step >= early:
                        self.copy_weights(boxes, weights_address, full, stage, step, now_expert, now_tile)
                    self.copy_tokens(
                        rows,
                        h_address,
                        row_bytes,
                        scale_address,
                        row_scales,
                        tokens_address,
                        scales_address,
                        stage,
                        step,
                        thread,
                    )
                    cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                    stage, phase = self.next_stage(stage, phase)
            early = Int32(0)
            self.next_slots(slots, ahead, sorted_ids, block, thread)

    @cute.jit
    def consume(
        self, mma, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, sorted_ids, expert_ids,
        topk_weights, slots, full, empty, num_slots, hidden, columns, group_m, num_blocks, tiles_n,
        start, stop, by, consumer, warp,
    ):  # fmt: skip
        lane = consumer % 32
        steps = columns // self.step
        weights, tokens, acc = self.fragments(mma, shared_w, shared_x, consumer)
        total = acc
        scale_of = None
        if const_expr(self.fp8):
            total = cute.make_rmem_tensor(acc.shape, Float32)
            scale_of = cute.make_tensor(w2_scale.iterator, cute.make_layout(1 << 30))
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert, slot = expert_ids[block], self.slot_of(sorted_ids, block, num_slots, consumer)
        for index in cutlass.range(start, self.end_of(start, stop, by), by, unroll=1):
            now_expert, now_slot = expert, slot
            weight = topk_weights[cutlass.max(now_slot, 0)]
            first = tile * self.rows + warp * (16 * self.mt)
            if now_expert >= 0:
                if const_expr(self.fp8):
                    at = (now_expert * (hidden // SCALE) + first // SCALE) * (columns // SCALE)
                    stage, phase = self.multiply_fp8(
                        mma, weights, tokens, acc, total, shared_s, scale_of, None, at, at, full, empty,
                        stage, phase, steps, lane,
                    )  # fmt: skip
                else:
                    stage, phase = self.multiply_bf16(mma, weights, tokens, acc, full, empty, stage, phase, steps)
                # The next tile's are on their way while this one is finished.
                block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
                expert, slot = expert_ids[block], self.slot_of(sorted_ids, block, num_slots, consumer)
                # In turn: what the last tile's stores read stays as it is while other warps are a tile ahead.
                if consumer < self.block_m:
                    shared_slots[consumer, turn % 2] = now_slot
                    shared_weights[consumer, turn % 2] = weight
                self.meet()
                column = first + lane // 4 * (2 * self.mt)
                self.store(total, shared_slots, shared_weights, slots, column, hidden, turn % 2, lane)
                turn += 1
            else:
                block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
                expert, slot = expert_ids[block], self.slot_of(sorted_ids, block, num_slots, consumer)

    @cute.jit
    def store(self, total, shared_slots, shared_weights, slots, column, hidden, place, lane):
        """Writes the tile's columns of the slots' rows; a thread's 2 mt columns of a token are neighbours."""
        address = slots.iterator.toint() + Int64(column) * 2
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                token = t * 8 + lane % 4 * 2 + j
                weight = shared_weights[token, place]
                values = []
                for m in cutlass.range_constexpr(self.mt):
                    for half in cutlass.range_constexpr(2):
                        values.append(total[m * self.regs + t * 4 + half * 2 + j] * weight)
                words = ptx.pack_words(values, False)
                ptx.store_row(address, shared_slots[token, place], hidden * 2, words, self.mt * 4)


class DownFp8(Down):
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


class DownBf16(Down):
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
