"""The one-launch form: out += topk_weight * (silu(x W_gate^T) * (x W_up^T)) W_down^T, and h never leaves the SMs.

A cluster of 256 / rows CTAs computes the 128 columns of h that share a scale, each CTA its rows / 2 of them; the CTAs
store what they have into the shared memory of all, and then share the output columns: each multiplies the whole group of
h with its own columns of w2. A step of the second product is `rows` rows of w2 times 128 bytes, as in the first, so both
go through one pipeline, and weights of the second are on their way while h is being made.

Groups of 128 columns are summed in global memory, in float32: 64 bf16 additions (top-8 of an intermediate size of 1024)
would be off by 1e-2. The order of these additions is the hardware's, so last bits differ from launch to launch.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, GridConstant, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.experimental.cuda import TensorMap
from cutlass.memory import SmemAllocator

from rampwrap.kernels.cute.configs import (
    MAX_REGISTERS,
    PRODUCER_REGISTERS,
    PRODUCER_THREADS,
    SCALE,
    SM_REGISTERS,
    STEP_BYTES,
    CuteConfig,
)
from rampwrap.kernels.cute.device import mega_ptx, ptx
from rampwrap.kernels.cute.device.boxes import describe
from rampwrap.kernels.cute.device.exchange import Exchange

LAUNCH_GRANULE = 8
# Of a consumer thread besides accumulators; with fewer some configs spill.
MORE_REGISTERS = 72


def registers(config: CuteConfig, ctas: int) -> int:
    """What setmaxnreg can give a consumer thread where `ctas` CTAs share an SM."""
    at_launch = SM_REGISTERS // (ctas * config.threads) // LAUNCH_GRANULE * LAUNCH_GRANULE
    left = at_launch * config.threads - PRODUCER_THREADS * PRODUCER_REGISTERS
    return min(MAX_REGISTERS, left // (32 * config.warp_n) // LAUNCH_GRANULE * LAUNCH_GRANULE)


class Mega(Exchange):
    """Tiles as in `Up`; then `hidden` / 256 tiles of `rows` output columns for each CTA."""

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        self.span_steps = SCALE // self.step  # steps of the second product
        self.side = min(self.mt, 2)  # 64-row tiles whose values a thread adds side by side
        self.resident = config.ctas_per_sm
        # Fewer products under way than in Up where they would leave too few registers for the second half.
        tiles, each = self.mt, self.regs
        free = registers(config, self.resident) - MORE_REGISTERS - tiles * each
        self.sets = max(1, min(self.sets, free // each))
        self.together = self.together and self.sets == tiles

    def launch(  # type: ignore[override]  # more operands than one GEMM has
        self, x, x_scale, w13, w13_scale, w2, w2_scale, sorted_ids, expert_ids, post_padded, topk_weights, out,
        top_k, group_m, num_blocks, max_ctas, l2_fetch, stream,
    ):  # fmt: skip
        experts, hidden, columns = w13.shape[0], x.shape[1], w2.shape[2]
        mma, weights, tokens = self.make_mma()
        # One of its own for the second product: setting a field of it in one loop makes it unusable in another.
        mma2, _, _ = self.make_mma()
        boxes = self.describe_w13(w13, experts, hidden, columns, l2_fetch)
        # As in Down, for `side` 64-row tiles at a time: a warp's 8 rows of lanes then add 128 contiguous bytes.
        side = self.side
        boxes2 = describe(
            w2,
            (columns, 8, 2 * side, hidden // (16 * side), experts),
            (2 * side, 1, 16 * side, hidden),
            self.box,
            # In FP8 a cluster wants the 128 bytes of a row that are its columns of h, and no more of it.
            Int32(STEP_BYTES) if const_expr(self.fp8) else l2_fetch,
        )
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        h_layout = cute.tile_to_shape(atom, (self.block_m, self.step, self.span_steps), order=(0, 1, 2))
        self.kernel(
            mma, mma2, boxes, boxes2, x, x_scale, w13_scale, w2_scale, sorted_ids, expert_ids, post_padded,
            topk_weights, out, columns, top_k, group_m, weights, tokens, h_layout,
        ).launch(
            grid=(self.grid_of(num_blocks, columns // (self.rows // 2), max_ctas), 1, 1),
            block=(self.config.threads, 1, 1),
            cluster=(self.cluster, 1, 1) if self.cluster > 1 else None,
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=self.resident,
            preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        mma2: cute.TiledMma,
        boxes: GridConstant[TensorMap],
        boxes2: GridConstant[TensorMap],
        x: cute.Tensor,
        x_scale: cute.Tensor,
        w13_scale: cute.Tensor,
        w2_scale: cute.Tensor,
        sorted_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        post_padded: cute.Tensor,
        topk_weights: cute.Tensor,
        out: cute.Tensor,
        columns: Int32,
        top_k: Int32,
        group_m: Int32,
        weights: cute.ComposedLayout,
        tokens: cute.ComposedLayout,
        h_layout: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = SmemAllocator()
        shared_w = memory.allocate_tensor(self.dtype, weights.outer, byte_alignment=1024, swizzle=weights.inner)
        shared_x = memory.allocate_tensor(self.dtype, tokens.outer, byte_alignment=1024, swizzle=tokens.inner)
        shared_h = memory.allocate_tensor(self.dtype, h_layout.outer, byte_alignment=1024, swizzle=h_layout.inner)
        shared_s = None
        if const_expr(self.fp8):
            layout = cute.make_layout((self.block_m, self.stages))
            shared_s = memory.allocate_tensor(Float32, layout, byte_alignment=16)
        full = memory.allocate_array(Int64, 2 * self.stages)
        empty = full + self.stages
        exchange = self.allocate_exchange(memory)
        num_slots, hidden = topk_weights.shape[0], out.shape[1]
        tiles_n = columns // (self.rows // 2 * self.cluster)
        # All that is read here, and the zeros that are added to, was written by the launches before.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        num_blocks = post_padded[0] // self.block_m
        if cta < num_blocks * tiles_n * self.cluster:
            self.init_barriers(full, empty, exchange[4], warp)
            # A cluster goes through the groups of 128 columns of h together.
            rank = cta % self.cluster
            start, stop, by = cta // self.cluster, num_blocks * tiles_n, ctas // self.cluster
            if warp < PRODUCER_THREADS // 32:
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
                self.produce_both(
                    boxes.get_ptr().toint(), boxes2.get_ptr().toint(), shared_w, x, x_scale, sorted_ids, expert_ids, shared_x, shared_s,
                    full, empty, num_slots, top_k, group_m, num_blocks, tiles_n, start, stop, by, rank, thread, warp,
                )  # fmt: skip
            else:
                cute.arch.setmaxregister_increase(const_expr(registers(self.config, self.resident)))
                self.consume_both(
                    mma, mma2, shared_w, shared_x, shared_h, shared_s, exchange, w13_scale, w2_scale, sorted_ids, expert_ids,
                    topk_weights, out, full, empty, num_slots, hidden, columns, top_k, group_m, num_blocks, tiles_n,
                    start, stop, by, rank, thread - PRODUCER_THREADS, warp - PRODUCER_THREADS // 32,
                )  # fmt: skip

    @cute.jit
    def column_tile(self, turn, index, count, rank):
        """Tile of output columns that a CTA works on in its turn-th turn: clusters start at different ones, so that
        those of one M block do not add to the same bytes at the same time."""
        return (turn + index) % count * self.cluster + rank

    @cute.jit
    def copy_second(self, boxes, target, full, stage, step, tile, expert):
        """As `copy_weights`, of w2."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.rows * STEP_BYTES)
            for m in cutlass.range_constexpr(self.rows // self.box_rows):
                warps = (tile * (self.mt // self.side) + m // self.side) * self.box_warps
                ptx.copy_box(
                    target + (stage * self.rows + m * self.box_rows) * STEP_BYTES,
                    boxes,
                    (step * self.step, Int32(0), 2 * (m % self.side), warps, expert),
                    (full + stage).toint(),
                )

    @cute.jit
    def produce_both(
        self, boxes, boxes2, shared_w, x, x_scale, sorted_ids, expert_ids, shared_x, shared_s,
        full, empty, num_slots, top_k, group_m, num_blocks, tiles_n, start, stop, by, rank, thread, warp,
    ):  # fmt: skip
        hidden = x.shape[1]
        tiles_h = hidden // (self.rows * self.cluster)
        x_address, row_bytes = x.iterator.toint(), Int64(hidden) * self.width
        scale_address, scales_address, row_scales = Int64(0), Int32(0), Int64(0)
        if const_expr(self.fp8):
            scale_address, scales_address = x_scale.iterator.toint(), shared_s.iterator.toint()
            row_scales = Int64(x_scale.shape[1])
        tokens_address, weights_address = shared_x.iterator.toint(), shared_w.iterator.toint()
        stage, phase = Int32(0), Int32(1)
        for index in cutlass.range(start, stop, by, unroll=1):
            block, group = self.tile_of(index, num_blocks, tiles_n, group_m)
            expert = expert_ids[block]
            if expert >= 0:
                rows = self.gather_rows(sorted_ids, block, top_k, num_slots, thread)
                for step in cutlass.range(hidden // self.step, unroll=1):
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if warp == 0:
                        self.copy_weights(
                            boxes, weights_address, full, stage, step, expert, group * self.cluster + rank
                        )
                    self.copy_tokens(
                        rows, x_address, row_bytes, scale_address, row_scales, tokens_address, scales_address,
                        stage, step, thread,
                    )  # fmt: skip
                    cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                    stage, phase = self.next_stage(stage, phase)
                for turn in cutlass.range(tiles_h, unroll=1):
                    tile = self.column_tile(turn, index, tiles_h, rank)
                    for step in cutlass.range_constexpr(self.span_steps):
                        cute.arch.mbarrier_wait(empty + stage, phase)
                        if warp == 0:
                            at = group * self.span_steps + step
                            self.copy_second(boxes2, weights_address, full, stage, at, tile, expert)
                        cute.arch.mbarrier_arrive(full + stage)
                        stage, phase = self.next_stage(stage, phase)

    @cute.jit
    def consume_both(
        self, mma, mma2, shared_w, shared_x, shared_h, shared_s, exchange, w13_scale, w2_scale, sorted_ids, expert_ids,
        topk_weights, out, full, empty, num_slots, hidden, columns, top_k, group_m, num_blocks, tiles_n,
        start, stop, by, rank, consumer, warp,
    ):  # fmt: skip
        lane = consumer % 32
        steps, tiles_h = hidden // self.step, hidden // (self.rows * self.cluster)
        weights, tokens, acc = self.fragments(mma, shared_w, shared_x, consumer)
        h = mma2.make_fragment_B(
            mma2.get_slice(cute.make_layout(self.groups, stride=128)(consumer // 128)).partition_B(shared_h)
        )
        total = acc
        scale_of, scale_of2 = None, None
        if const_expr(self.fp8):
            total = cute.make_rmem_tensor(acc.shape, Float32)
            scale_of = cute.make_tensor(w13_scale.iterator, cute.make_layout(1 << 30))
            scale_of2 = cute.make_tensor(w2_scale.iterator, cute.make_layout(1 << 30))
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        for index in cutlass.range(start, stop, by, unroll=1):
            block, group = self.tile_of(index, num_blocks, tiles_n, group_m)
            expert = expert_ids[block]
            if expert >= 0:
                if const_expr(self.fp8):
                    gate_at, up_at = self.scales_at(expert, group, hidden, columns)
                    stage, phase = self.multiply_fp8(
                        mma, weights, tokens, acc, total, shared_s, scale_of, scale_of, gate_at, up_at, full, empty,
                        stage, phase, steps, lane,
                    )  # fmt: skip
                else:
                    stage, phase = self.multiply_bf16(mma, weights, tokens, acc, full, empty, stage, phase, steps)
                self.activate(total)
                self.share_rows(
                    total, exchange, sorted_ids, topk_weights, block, num_slots, top_k, turn, rank, consumer, warp
                )
                self.spread(total, exchange, shared_h, turn, rank, consumer, warp)
                stage, phase = self.multiply_second(
                    mma2, weights, h, total, exchange, scale_of2, out, full, empty, stage, phase, index, tiles_h, group,
                    expert, hidden, columns, rank, lane, warp,
                )  # fmt: skip
                turn += 1

    @cute.jit
    def multiply_second(
        self, mma, weights, h, total, exchange, scale_of, out, full, empty, stage, phase, index, tiles_h, group,
        expert, hidden, columns, rank, lane, warp,
    ):  # fmt: skip
        """Adds to `out` h times this CTA's columns of w2; h is in shared memory now, and its registers are free."""
        wide = const_expr(64 * self.side * self.groups)  # columns of `side` 64-row tiles of all warpgroups
        for turn in cutlass.range(tiles_h, unroll=1):
            tile = self.column_tile(turn, index, tiles_h, rank)
            first = tile * self.rows + warp * (16 * self.side)
            scales = []
            if const_expr(self.fp8):
                for q in cutlass.range_constexpr(self.mt // self.side):
                    block = expert * (hidden // SCALE) + (first + q * wide) // SCALE
                    scales.append(scale_of[block * (columns // SCALE) + group])
            for step in cutlass.range_constexpr(self.span_steps):
                cute.arch.mbarrier_wait(full + stage, phase)
                warpgroup.fence()
                for k in cutlass.range_constexpr(cute.size(weights, mode=[2])):
                    mma.set(warpgroup.Field.ACCUMULATE, const_expr(step > 0 or k > 0))
                    cute.gemm(mma, total, weights[(None, None, k, stage)], h[(None, None, k, step)], total)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + stage)
                stage, phase = self.next_stage(stage, phase)
            self.add(total, exchange, scales, out, first + lane // 4 * (2 * self.side), hidden, lane)
        return stage, phase

    @cute.jit
    def add(self, total, exchange, scales, out, column, hidden, lane):
        """Adds a tile to the tokens' rows; a thread's 2 * side columns are neighbours."""
        rows, factors = exchange[0], exchange[1]
        address = out.iterator.toint() + Int64(column) * 4
        wide = const_expr(64 * self.side * self.groups)
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                token = t * 8 + lane % 4 * 2 + j
                row, factor = rows[token], factors[token]
                for q in cutlass.range_constexpr(self.mt // self.side):
                    by = factor
                    if const_expr(self.fp8):
                        by = factor * scales[q]
                    values = []
                    for m in cutlass.range_constexpr(self.side):
                        for half in cutlass.range_constexpr(2):
                            values.append(total[(q * self.side + m) * self.regs + t * 4 + half * 2 + j] * by)
                    mega_ptx.add_row(address + q * wide * 4, row, hidden * 4, values)


class MegaFp8(Mega):
    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        x_scale: cute.Tensor,
        w13: cute.Tensor,
        w13_scale: cute.Tensor,
        w2: cute.Tensor,
        w2_scale: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        topk_weights: cute.Tensor,
        out: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        num_blocks: Int32,
        max_ctas: Int32,
        l2_fetch: Int32,
        stream: cuda.CUstream,
    ):
        self.launch(
            x, x_scale, w13, w13_scale, w2, w2_scale, sorted_token_ids, expert_ids, num_tokens_post_padded,
            topk_weights, out, top_k, group_m, num_blocks, max_ctas, l2_fetch, stream,
        )  # fmt: skip


class MegaBf16(Mega):
    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        w13: cute.Tensor,
        w2: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        topk_weights: cute.Tensor,
        out: cute.Tensor,
        top_k: Int32,
        group_m: Int32,
        num_blocks: Int32,
        max_ctas: Int32,
        l2_fetch: Int32,
        stream: cuda.CUstream,
    ):
        self.launch(
            x, None, w13, None, w2, None, sorted_token_ids, expert_ids, num_tokens_post_padded,
            topk_weights, out, top_k, group_m, num_blocks, max_ctas, l2_fetch, stream,
        )  # fmt: skip
