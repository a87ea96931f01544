"""The second launch of the ragged form, by programmatic launch: rows of slots = topk_weight * (h W_down^T)."""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from rampwrap.kernels.cute.configs import PRODUCER_REGISTERS, PRODUCER_THREADS, SCALE
from rampwrap.kernels.cute.device.down import Down
from rampwrap.kernels.cute.device.ragged import Ragged


class RaggedDown(Ragged, Down):
    """Units of 256 columns of the output."""

    plain = Down

    def launch_pieces(
        self, h, h_scale, w2, w2_scale, sorted_ids, counts, topk_weights, slots, partials, marks,
        memory, reread, base, slope, overhead, max_ctas, stream,
    ):  # fmt: skip
        experts, columns, hidden = w2.shape[0], h.shape[1], slots.shape[1]
        mmas, weights, tokens = self.make_mmas()
        # As `Down.launch`.
        row, mt = Int64(columns), self.mt
        view = cute.make_layout(
            (columns, 8, 2 * mt, hidden // (16 * mt), experts),
            stride=(1, row * (2 * mt), row, row * (16 * mt), row * hidden),
        )
        tma, tma_w = self.make_tma(cute.make_tensor(w2.iterator, view), weights.inner)
        self.kernel(
            mmas, tma, tma_w, h, h_scale, w2_scale, sorted_ids, counts, topk_weights, slots, partials, marks,
            memory, reread, base, slope, overhead, weights, tokens,
        ).launch(
            grid=(max_ctas, 1, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mmas: tuple[Any, ...],
        tma: cute.CopyAtom,
        tma_w: cute.Tensor,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        w2_scale: cute.Tensor,
        sorted_ids: cute.Tensor,
        counts: cute.Tensor,
        topk_weights: cute.Tensor,
        slots: cute.Tensor,
        partials: cute.Tensor,
        marks: cute.Tensor,
        memory: Int32,
        reread: Int32,
        base: Int32,
        slope: Int32,
        overhead: Int32,
        weights: cute.ComposedLayout,
        tokens: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        room, shared_w, shared_x, shared_s, full, empty = self.allocate(weights, tokens)
        shared_slots = room.allocate_tensor(Int32, cute.make_layout((self.block_m, 2)), byte_alignment=16)
        shared_weights = room.allocate_tensor(Float32, cute.make_layout((self.block_m, 2)), byte_alignment=16)
        shared = self.allocate_split(room)
        num_slots, hidden, columns = slots.shape[0], slots.shape[1], h.shape[1]
        self.set_work(hidden // self.rows, columns // self.step, memory, reread, base, slope, overhead)
        cute.arch.griddepcontrol_launch_dependents()
        if warp == 0:
            cpasync.prefetch_descriptor(tma)
        self.init_barriers(full, empty, None, warp)
        # Routing was complete before the up launch let this one start; only h is still being written.
        self.split(counts, shared, cta, ctas, thread, warp)
        if warp < PRODUCER_THREADS // 32:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            target, source = self.box_partition(tma, tma_w, shared_w, 2)
            self.produce_pieces(
                shared, tma, source, target, h, h_scale, sorted_ids, shared_x, shared_s, full, empty, num_slots,
                thread, warp,
            )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            self.consume_pieces(
                shared, mmas, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, sorted_ids,
                topk_weights, slots, partials, marks, full, empty, hidden, columns, cta, thread - PRODUCER_THREADS,
                warp - PRODUCER_THREADS // 32,
            )  # fmt: skip

    @cute.jit
    def produce_pieces(
        self, shared, tma, source, target, h, h_scale, sorted_ids, shared_x, shared_s, full, empty, num_slots,
        thread, warp,
    ):  # fmt: skip
        h_address, row_bytes = h.iterator.toint(), Int64(h.shape[1]) * self.width
        scale_address, scales_address, row_scales = Int64(0), Int32(0), Int64(0)
        if const_expr(self.fp8):
            scale_address, scales_address = h_scale.iterator.toint(), shared_s.iterator.toint()
            row_scales = Int64(h_scale.shape[1])
        tokens_address = shared_x.iterator.toint()
        pieces, place = self.share_of(shared)
        # Weights of the first stages are on their way before the wait for h.
        early = Int32(0)
        if pieces > 0:
            _, expert, _, _, group, begin, end = self.piece(shared, Int32(0), place)
            early = cutlass.min(end - begin, self.stages)
            if warp == 0:
                for step in cutlass.range(early, unroll=1):
                    self.copy_weights(tma, source, target, full, step, begin + step, expert, group)
        # A CTA without a piece waits as well: it would end before the launch that it depends on, and let the next begin.
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(1)
        for index in cutlass.range(pieces, unroll=1):
            place, expert, tokens, row, group, begin, end = self.piece(shared, index, place)
            rows = self.rows_of(self.slots_of(sorted_ids, row, tokens, thread), 1, num_slots)
            for step in cutlass.range(begin, end, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if warp == 0 and step - begin >= early:
                    self.copy_weights(tma, source, target, full, stage, step, expert, group)
                self.copy_tokens(
                    rows, h_address, row_bytes, scale_address, row_scales, tokens_address, scales_address,
                    stage, step, thread,
                )  # fmt: skip
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                stage, phase = self.next_stage(stage, phase)
            early = Int32(0)

    @cute.jit
    def consume_pieces(
        self, shared, mmas, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, sorted_ids,
        topk_weights, slots, partials, marks, full, empty, hidden, columns, cta, consumer, warp,
    ):  # fmt: skip
        # Behind it the up launch has ended, and no mark or fragment of its is left.
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(0)
        pieces, place = self.share_of(shared)
        for index in cutlass.range(pieces, unroll=1):
            place, expert, tokens, row, group, begin, end = self.piece(shared, index, place)
            # All ones past the tokens.
            slot = sorted_ids[row + cutlass.min(consumer, tokens - 1)] | ((tokens - 1 - consumer) >> 31)
            weight = topk_weights[cutlass.max(slot, 0)]
            for which in cutlass.range_constexpr(len(self.widths)):
                below = const_expr(self.widths[which - 1] if which else 0)
                if tokens > below and tokens <= const_expr(self.widths[which]):
                    stage, phase = self.consume_piece(
                        which, mmas[which], shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale, slots,
                        partials, marks, full, empty, hidden, columns, cta, expert, group, begin, end, self.work.steps,
                        slot, weight, index, stage, phase, consumer, warp,
                    )  # fmt: skip

    @cute.jit
    def consume_piece(
        self, which: cutlass.Constexpr, mma, shared_w, shared_x, shared_s, shared_slots, shared_weights, w2_scale,
        slots, partials, marks, full, empty, hidden, columns, cta, expert, group, begin, end, steps, slot, weight,
        turn, stage, phase, consumer, warp,
    ):  # fmt: skip
        narrow = self.narrow[which]
        weights, tokens, acc = self.operands(narrow, mma, shared_w, shared_x, consumer)
        total = cute.make_rmem_tensor(acc.shape, Float32) if const_expr(self.fp8) else acc
        first = group * self.rows + warp * (16 * self.mt)
        if const_expr(self.fp8):
            scale_of = cute.make_tensor(w2_scale.iterator, cute.make_layout(1 << 30))
            at = (expert * (hidden // SCALE) + first // SCALE) * (columns // SCALE) + begin
            stage, phase = narrow.multiply_fp8(
                mma, weights, tokens, acc, total, shared_s, scale_of, None, at, at, full, empty,
                stage, phase, end - begin, consumer % 32,
            )  # fmt: skip
        else:
            stage, phase = self.multiply_added(mma, weights, tokens, acc, full, empty, stage, phase, end - begin)
        if begin > 0:
            self.leave(which, total, partials, marks, cta, cutlass.min(cutlass.max(end - steps + 1, 0), 1), consumer)
        else:
            if end < steps:
                self.collect(which, total, partials, marks, cta, consumer)
            self.finish(
                which, total, shared_slots, shared_weights, slots, first, hidden, slot, weight, turn, consumer
            )  # fmt: skip
        return stage, phase

    @cute.jit
    def finish(
        self, which: cutlass.Constexpr, total, shared_slots, shared_weights, slots, first, hidden, slot, weight,
        turn, consumer,
    ):  # fmt: skip
        """Stores a unit whose sums are whole."""
        narrow = self.narrow[which]
        # In turn: what the last unit's stores read stays as it is while other warps are a unit ahead.
        if consumer < const_expr(narrow.block_m):
            shared_slots[consumer, turn % 2] = slot
            shared_weights[consumer, turn % 2] = weight
        self.meet()
        column = first + consumer % 32 // 4 * (2 * self.mt)
        narrow.store(total, shared_slots, shared_weights, slots, column, hidden, turn % 2, consumer % 32)


class RaggedDownFp8(RaggedDown):
    @cute.jit
    def __call__(
        self,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        w2: cute.Tensor,
        w2_scale: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_counts: cute.Tensor,
        topk_weights: cute.Tensor,
        slots: cute.Tensor,
        partials: cute.Tensor,
        marks: cute.Tensor,
        top_k: Int32,
        memory: Int32,
        reread: Int32,
        base: Int32,
        slope: Int32,
        overhead: Int32,
        max_ctas: Int32,
        stream: cuda.CUstream,
    ):
        self.launch_pieces(
            h, h_scale, w2, w2_scale, sorted_token_ids, expert_counts, topk_weights, slots, partials, marks,
            memory, reread, base, slope, overhead, max_ctas, stream,
        )  # fmt: skip


class RaggedDownBf16(RaggedDown):
    @cute.jit
    def __call__(
        self,
        h: cute.Tensor,
        w2: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_counts: cute.Tensor,
        topk_weights: cute.Tensor,
        slots: cute.Tensor,
        partials: cute.Tensor,
        marks: cute.Tensor,
        top_k: Int32,
        memory: Int32,
        reread: Int32,
        base: Int32,
        slope: Int32,
        overhead: Int32,
        max_ctas: Int32,
        stream: cuda.CUstream,
    ):
        self.launch_pieces(
            h, None, w2, None, sorted_token_ids, expert_counts, topk_weights, slots, partials, marks,
            memory, reread, base, slope, overhead, max_ctas, stream,
        )  # fmt: skip
