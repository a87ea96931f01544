"""The first launch of the ragged form: h = silu(x W_gate^T) * (x W_up^T), each expert as wide as its tokens."""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from rampwrap.kernels.cute.configs import PRODUCER_REGISTERS, PRODUCER_THREADS
from rampwrap.kernels.cute.device.ragged import Ragged
from rampwrap.kernels.cute.device.up import Up


class RaggedUp(Ragged, Up):
    """Units of 128 columns of h, all that share a scale: no clusters."""

    plain = Up

    def launch_pieces(
        self, x, x_scale, w13, w13_scale, sorted_ids, counts, h, h_scale, partials, marks,
        top_k, memory, reread, base, slope, overhead, max_ctas, stream,
    ):  # fmt: skip
        experts, hidden, columns = w13.shape[0], x.shape[1], h.shape[1]
        mmas, weights, tokens = self.make_mmas()
        # As `Up.launch`: 8 gate rows, 8 up rows, ...
        row, mt = Int64(hidden), self.mt
        view = cute.make_layout(
            (hidden, 8, 2 * experts, columns // (8 * mt), mt), stride=(1, row * mt, row * columns, row * (8 * mt), row)
        )
        tma, tma_w = self.make_tma(cute.make_tensor(w13.iterator, view), weights.inner)
        self.kernel(
            mmas, tma, tma_w, x, x_scale, w13_scale, sorted_ids, counts, h, h_scale, partials, marks,
            top_k, memory, reread, base, slope, overhead, weights, tokens,
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
        x: cute.Tensor,
        x_scale: cute.Tensor,
        w13_scale: cute.Tensor,
        sorted_ids: cute.Tensor,
        counts: cute.Tensor,
        h: cute.Tensor,
        h_scale: cute.Tensor,
        partials: cute.Tensor,
        marks: cute.Tensor,
        top_k: Int32,
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
        exchange = self.allocate_exchange(room)
        shared = self.allocate_split(room)
        num_slots, hidden, columns = h.shape[0], x.shape[1], h.shape[1]
        self.set_work(columns // (self.rows // 2), hidden // self.step, memory, reread, base, slope, overhead)
        if warp == 0:
            cpasync.prefetch_descriptor(tma)
        self.init_barriers(full, empty, None, warp)
        # All that is read here was written by the launches before; they are done from here on, so that the launch
        # after this one may rely on it as well.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self.split(counts, shared, cta, ctas, thread, warp)
        if warp < PRODUCER_THREADS // 32:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            target, source = self.box_partition(tma, tma_w, shared_w, 2)
            self.produce_pieces(
                shared, tma, source, target, x, x_scale, sorted_ids, shared_x, shared_s, full, empty,
                num_slots, top_k, thread, warp,
            )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            self.consume_pieces(
                shared, mmas, shared_w, shared_x, shared_s, exchange, w13_scale, sorted_ids, h, h_scale,
                partials, marks, full, empty, hidden, columns, cta, thread - PRODUCER_THREADS,
                warp - PRODUCER_THREADS // 32,
            )  # fmt: skip

    @cute.jit
    def produce_pieces(
        self, shared, tma, source, target, x, x_scale, sorted_ids, shared_x, shared_s, full, empty,
        num_slots, top_k, thread, warp,
    ):  # fmt: skip
        x_address, row_bytes = x.iterator.toint(), Int64(x.shape[1]) * self.width
        scale_address, scales_address, row_scales = Int64(0), Int32(0), Int64(0)
        if const_expr(self.fp8):
            scale_address, scales_address = x_scale.iterator.toint(), shared_s.iterator.toint()
            row_scales = Int64(x_scale.shape[1])
        tokens_address = shared_x.iterator.toint()
        stage, phase = Int32(0), Int32(1)
        pieces, place = self.share_of(shared)
        for index in cutlass.range(pieces, unroll=1):
            place, expert, tokens, row, group, begin, end = self.piece(shared, index, place)
            rows = self.rows_of(self.slots_of(sorted_ids, row, tokens, thread), top_k, num_slots)
            for step in cutlass.range(begin, end, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if warp == 0:
                    self.copy_weights(tma, source, target, full, stage, step, expert, group)
                self.copy_tokens(
                    rows, x_address, row_bytes, scale_address, row_scales, tokens_address, scales_address,
                    stage, step, thread,
                )  # fmt: skip
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                stage, phase = self.next_stage(stage, phase)

    @cute.jit
    def consume_pieces(
        self, shared, mmas, shared_w, shared_x, shared_s, exchange, w13_scale, sorted_ids, h, h_scale,
        partials, marks, full, empty, hidden, columns, cta, consumer, warp,
    ):  # fmt: skip
        stage, phase = Int32(0), Int32(0)
        pieces, place = self.share_of(shared)
        for index in cutlass.range(pieces, unroll=1):
            place, expert, tokens, row, group, begin, end = self.piece(shared, index, place)
            # All ones past the tokens.
            slot = sorted_ids[row + cutlass.min(consumer, tokens - 1)] | ((tokens - 1 - consumer) >> 31)
            for which in cutlass.range_constexpr(len(self.widths)):
                below = const_expr(self.widths[which - 1] if which else 0)
                if tokens > below and tokens <= const_expr(self.widths[which]):
                    stage, phase = self.consume_piece(
                        which, mmas[which], shared_w, shared_x, shared_s, exchange, w13_scale, h, h_scale, partials,
                        marks, full, empty, hidden, columns, cta, expert, group, begin, end, self.work.steps, slot, index,
                        stage, phase, consumer, warp,
                    )  # fmt: skip

    @cute.jit
    def consume_piece(
        self, which: cutlass.Constexpr, mma, shared_w, shared_x, shared_s, exchange, w13_scale, h, h_scale, partials,
        marks, full, empty, hidden, columns, cta, expert, group, begin, end, steps, slot, turn, stage, phase,
        consumer, warp,
    ):  # fmt: skip
        narrow = self.narrow[which]
        weights, tokens, acc = self.operands(narrow, mma, shared_w, shared_x, consumer)
        total = cute.make_rmem_tensor(acc.shape, Float32) if const_expr(self.fp8) else acc
        if const_expr(self.fp8):
            scale_of = cute.make_tensor(w13_scale.iterator, cute.make_layout(1 << 30))
            gate_at, up_at = narrow.scales_at(expert, group, hidden, columns)
            stage, phase = narrow.multiply_fp8(
                mma, weights, tokens, acc, total, shared_s, scale_of, scale_of, gate_at + begin, up_at + begin,
                full, empty, stage, phase, end - begin, consumer % 32,
            )  # fmt: skip
        else:
            stage, phase = self.multiply_added(mma, weights, tokens, acc, full, empty, stage, phase, end - begin)
        if begin > 0:
            self.leave(which, total, partials, marks, cta, cutlass.min(cutlass.max(end - steps + 1, 0), 1), consumer)
        else:
            if end < steps:
                self.collect(which, total, partials, marks, cta, consumer)
            self.finish(which, total, exchange, slot, h, h_scale, group, columns, turn, consumer, warp)
        return stage, phase

    @cute.jit
    def finish(
        self, which: cutlass.Constexpr, total, exchange, slot, h, h_scale, group, columns, turn, consumer, warp
    ):  # fmt: skip
        """Stores a unit whose sums are whole."""
        narrow = self.narrow[which]
        narrow.activate(total)
        narrow.share(total, exchange, slot, h_scale, group, columns, turn, 0, consumer, warp)
        narrow.store(total, exchange, h, group, columns, turn, consumer, warp)


class RaggedUpFp8(RaggedUp):
    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        x_scale: cute.Tensor,
        w13: cute.Tensor,
        w13_scale: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_counts: cute.Tensor,
        h: cute.Tensor,
        h_scale: cute.Tensor,
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
            x, x_scale, w13, w13_scale, sorted_token_ids, expert_counts, h, h_scale, partials, marks,
            top_k, memory, reread, base, slope, overhead, max_ctas, stream,
        )  # fmt: skip


class RaggedUpBf16(RaggedUp):
    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        w13: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_counts: cute.Tensor,
        h: cute.Tensor,
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
            x, None, w13, None, sorted_token_ids, expert_counts, h, None, partials, marks,
            top_k, memory, reread, base, slope, overhead, max_ctas, stream,
        )  # fmt: skip
