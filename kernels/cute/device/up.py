"""The first launch of the two-launch form: h = silu(x W_gate^T) * (x W_up^T), in FP8 quantised again."""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, GridConstant, Int32, Int64, const_expr
from cutlass.experimental.cuda import TensorMap

from rampwrap.kernels.cute.configs import PRODUCER_REGISTERS, PRODUCER_THREADS, SCALE, CuteConfig
from rampwrap.kernels.cute.device import ptx
from rampwrap.kernels.cute.device.boxes import describe
from rampwrap.kernels.cute.device.pipeline import GroupedGemm

FP8_MAX = 448.0
# Keeps the scale of an all-zero group finite; far below any real activation.
MIN_ABS = 1e-10


class Up(GroupedGemm):
    """Tiles of rows / 2 columns of h: their gate rows and up rows, taken in turn by eight, so that a thread holds both.

    The 128 columns that share a scale are those of one tile, or of a cluster of tiles that exchange their maxima.
    """

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        self.cluster = max(1, SCALE // (self.rows // 2)) if self.fp8 else 1

    def describe_w13(self, w13, experts, hidden, columns, l2_fetch):
        """The descriptor of its boxes. Rows of shared memory are 8 gate rows, 8 up rows, ...; row r of the m-th 64 of a warp is column
        r * mt + m of it."""
        extents = (hidden, 8, 2 * experts, columns // (8 * self.mt), self.mt)
        return describe(w13, extents, (self.mt, columns, 8 * self.mt, 1), self.box, l2_fetch)

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
        experts, hidden, columns = w13.shape[0], x.shape[1], h.shape[1]
        mma, weights, tokens = self.make_mma()
        boxes = self.describe_w13(w13, experts, hidden, columns, l2_fetch)
        tiles_n = columns // (self.rows // 2)
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
            grid=(self.grid_of(num_blocks, tiles_n, max_ctas), 1, 1),
            block=(self.config.threads, 1, 1),
            cluster=(self.cluster, 1, 1) if self.cluster > 1 else None,
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
        memory, shared_w, shared_x, shared_s, full, empty = self.allocate(weights, tokens)
        exchange = self.allocate_exchange(memory)
        num_slots, hidden, columns = h.shape[0], x.shape[1], h.shape[1]
        tiles_n = columns // (self.rows // 2)
        if warp == 0:
            ptx.prefetch_descriptor(boxes.get_ptr().toint())
        self.init_barriers(full, empty, exchange[4], warp)
        # All that is read here was written by the launches before; they are done from here on, so that the launch
        # after this one may rely on it as well.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        num_blocks = post_padded[0] // self.block_m
        if cta < num_blocks * tiles_n:
            # A cluster goes through the tiles together: its CTAs are neighbours in a group of 128 columns.
            rank = cta % self.cluster
            start, stop, by = cta // self.cluster, num_blocks * (tiles_n // self.cluster), ctas // self.cluster
            if warp < PRODUCER_THREADS // 32:
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
                self.produce(
                    boxes.get_ptr().toint(), shared_w, x, x_scale, sorted_ids, expert_ids, shared_x, shared_s, full, empty,
                    num_slots, top_k, group_m, num_blocks, tiles_n // self.cluster, start, stop, by, rank, thread, warp,
                )  # fmt: skip
            else:
                cute.arch.setmaxregister_increase(self.config.consumer_registers)
                self.consume(
                    mma, shared_w, shared_x, shared_s, exchange, w13_scale, sorted_ids, expert_ids, h, h_scale, full, empty,
                    num_slots, hidden, columns, group_m, num_blocks, tiles_n // self.cluster, start, stop, by, rank,
                    thread - PRODUCER_THREADS, warp - PRODUCER_THREADS // 32,
                )  # fmt: skip
            if const_expr(self.cluster > 1):
                # A CTA has all maxima of its peers before it ends, but compute-sanitizer cannot see that.
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()

    def allocate_exchange(self, memory):
        """Shared memory of the epilogue: slot of each token; FP8: 448 / maximum, and maxima of warps and of CTAs."""
        slots = memory.allocate_tensor(Int32, cute.make_layout((self.block_m, 2)), byte_alignment=16)
        if not self.fp8:
            return slots, None, None, None, None
        inverse = memory.allocate_tensor(Float32, cute.make_layout(self.block_m), byte_alignment=16)
        of_warps = memory.allocate_tensor(
            Float32, cute.make_layout((self.block_m, self.config.warp_n)), byte_alignment=16
        )
        if self.cluster == 1:
            return slots, inverse, of_warps, None, None
        of_ctas = memory.allocate_tensor(Float32, cute.make_layout((self.block_m, self.cluster, 2)), byte_alignment=16)
        return slots, inverse, of_warps, of_ctas, memory.allocate_array(Int64, 2)

    def box_at(self, expert, tile, m):
        """Where the m-th box of a tile begins along all dimensions but the first two."""
        return 2 * expert, tile * self.box_warps, m

    @cute.jit
    def produce(
        self, boxes, shared_w, x, x_scale, sorted_ids, expert_ids, shared_x, shared_s, full, empty,
        num_slots, top_k, group_m, num_blocks, tiles_n, start, stop, by, rank, thread, warp,
    ):  # fmt: skip
        hidden = x.shape[1]
        x_address, row_bytes = x.iterator.toint(), Int64(hidden) * self.width
        scale_address, scales_address, row_scales = Int64(0), Int32(0), Int64(0)
        if const_expr(self.fp8):
            scale_address, scales_address = x_scale.iterator.toint(), shared_s.iterator.toint()
            row_scales = Int64(x_scale.shape[1])
        tokens_address, weights_address = shared_x.iterator.toint(), shared_w.iterator.toint()
        stage, phase = Int32(0), Int32(1)
        # What a tile needs is loaded a tile ahead.
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert, slots = expert_ids[block], self.load_slots(sorted_ids, block, thread)
        for index in cutlass.range(start, self.end_of(start, stop, by), by, unroll=1):
            rows = self.rows_of(slots, top_k, num_slots)
            now_expert, now_tile = expert, tile
            block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
            expert = expert_ids[block]
            ahead = slots
            if const_expr(self.looks_ahead):
                ahead = self.load_slots(sorted_ids, block, thread)
            if now_expert >= 0:
                for step in cutlass.range(hidden // self.step, unroll=1):
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if warp == 0:
                        self.copy_weights(
                            boxes, weights_address, full, stage, step, now_expert, now_tile * self.cluster + rank
                        )
                    self.copy_tokens(
                        rows, x_address, row_bytes, scale_address, row_scales, tokens_address, scales_address,
                        stage, step, thread,
                    )  # fmt: skip
                    cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                    stage, phase = self.next_stage(stage, phase)
            self.next_slots(slots, ahead, sorted_ids, block, thread)

    @cute.jit
    def consume(
        self, mma, shared_w, shared_x, shared_s, exchange, w13_scale, sorted_ids, expert_ids, h, h_scale, full, empty,
        num_slots, hidden, columns, group_m, num_blocks, tiles_n, start, stop, by, rank, consumer, warp,
    ):  # fmt: skip
        lane = consumer % 32
        steps = hidden // self.step
        weights, tokens, acc = self.fragments(mma, shared_w, shared_x, consumer)
        total = acc
        scale_of = None
        if const_expr(self.fp8):
            total = cute.make_rmem_tensor(acc.shape, Float32)
            scale_of = cute.make_tensor(w13_scale.iterator, cute.make_layout(1 << 30))
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        block, tile = self.tile_of(start, num_blocks, tiles_n, group_m)
        expert, slot = expert_ids[block], self.slot_of(sorted_ids, block, num_slots, consumer)
        for index in cutlass.range(start, self.end_of(start, stop, by), by, unroll=1):
            now_expert, now_slot = expert, slot
            column_tile = tile * self.cluster + rank
            if now_expert >= 0:
                if const_expr(self.fp8):
                    group = column_tile * (self.rows // 2) // SCALE
                    gate_at, up_at = self.scales_at(now_expert, group, hidden, columns)
                    stage, phase = self.multiply_fp8(
                        mma, weights, tokens, acc, total, shared_s, scale_of, scale_of, gate_at, up_at, full, empty,
                        stage, phase, steps, lane,
                    )  # fmt: skip
                else:
                    stage, phase = self.multiply_bf16(mma, weights, tokens, acc, full, empty, stage, phase, steps)
                # The next tile's are on their way while this one is finished.
                block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
                expert, slot = expert_ids[block], self.slot_of(sorted_ids, block, num_slots, consumer)
                self.activate(total)
                group = column_tile * (self.rows // 2) // SCALE
                self.share(total, exchange, now_slot, h_scale, group, columns, turn, rank, consumer, warp)
                self.store(total, exchange, h, column_tile, columns, turn, consumer, warp)
                turn += 1
            else:
                block, tile = self.tile_of(self.tile_after(index, stop, by), num_blocks, tiles_n, group_m)
                expert, slot = expert_ids[block], self.slot_of(sorted_ids, block, num_slots, consumer)

    @cute.jit
    def activate(self, total):
        """Leaves silu(gate) * up where the gate was."""
        for m in cutlass.range_constexpr(self.mt):
            for t in cutlass.range_constexpr(self.pairs):
                for j in cutlass.range_constexpr(2):
                    i = const_expr(m * self.regs + t * 4 + j)
                    gate = total[i]
                    # exp(-gate) is infinite below -88, and its reciprocal zero, as it should be.
                    total[i] = gate * total[i + 2] * cute.arch.rcp_approx(1.0 + cute.math.exp(-gate, fastmath=True))

    @cute.jit
    def share(self, total, exchange, slot, h_scale, group, columns, turn, rank, consumer, warp):
        """Slots of the tokens, -1 for none, and in FP8 448 / maximum of each token's group, in shared memory.

        Slots are kept in turn: what the last tile's stores read stays as it is while other warps are a tile ahead.
        """
        slots, inverse, of_warps, of_ctas, peers = exchange
        lane = consumer % 32
        if consumer < self.block_m:
            slots[consumer, turn % 2] = slot
        if const_expr(self.fp8):
            self.maxima_of_warp(total, of_warps, lane, warp)
            self.meet()
            if consumer < self.block_m:
                most = self.most_of_warps(of_warps, consumer)
                if const_expr(self.cluster > 1):
                    most = self.most_of_cluster(most, of_ctas, peers, turn, rank, consumer)
                scale = most * (1.0 / FP8_MAX)
                inverse[consumer] = 1.0 / scale
                if slot >= 0 and rank == 0:
                    # 64-bit, as slots * I / 128 may pass 2^31.
                    at = h_scale.iterator.toint() + (Int64(slot) * (columns // SCALE) + group) * 4
                    ptx.store_global_f32(at, scale)
        self.meet()

    @cute.jit
    def maxima_of_warp(self, total, of_warps, lane, warp):
        """The largest magnitude of each token among this warp's columns, in shared memory."""
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                most = Float32(MIN_ABS)
                for m in cutlass.range_constexpr(self.mt):
                    value = total[m * self.regs + t * 4 + j]
                    most = cute.arch.fmax(most, cute.arch.fmax(value, -value))
                for distance in cutlass.range_constexpr(3):
                    most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, 4 << distance))
                if lane < 4:
                    of_warps[t * 8 + lane * 2 + j, warp] = most

    @cute.jit
    def most_of_warps(self, of_warps, consumer):
        """The largest of what the warps found for a thread's token."""
        most = of_warps[consumer, 0]
        for other in cutlass.range_constexpr(1, self.config.warp_n):
            most = cute.arch.fmax(most, of_warps[consumer, other])
        return most

    @cute.jit
    def init_peers(self, peers):
        """Two barriers on which each of the cluster's CTAs arrives once for each token."""
        for turn in cutlass.range_constexpr(2):
            cute.arch.mbarrier_init(peers + turn, self.cluster * self.block_m)

    @cute.jit
    def scales_at(self, expert, group, hidden, columns):
        """Where the scales of a group of 128 columns of h begin in those of w13: its gate rows', and its up rows'."""
        row = expert * (2 * columns // SCALE) + group
        return row * (hidden // SCALE), (row + columns // SCALE) * (hidden // SCALE)

    @cute.jit
    def most_of_cluster(self, most, of_ctas, peers, turn, rank, consumer):
        """The largest `most` of the thread of the same token in every CTA of the cluster.

        Barriers and values are used in turn: a peer can be a tile ahead, but not two.
        """
        place = turn % 2
        value_at = of_ctas.iterator.toint() + ((place * self.cluster + rank) * self.block_m + consumer) * 4
        barrier_at = peers.toint() + place * 8
        for peer in cutlass.range_constexpr(self.cluster):
            ptx.store_peer(ptx.peer_address(value_at, peer), most)
            ptx.arrive_peer(ptx.peer_address(barrier_at, peer))
        cute.arch.mbarrier_wait(peers + place, turn // 2 % 2)
        cute.arch.fence_acq_rel_cluster()
        for peer in cutlass.range_constexpr(self.cluster):
            most = cute.arch.fmax(most, of_ctas[consumer, peer, place])
        return most

    @cute.jit
    def store(self, total, exchange, h, column_tile, columns, turn, consumer, warp):
        """Writes the tile's columns of h; a thread's mt columns of a token are neighbours."""
        slots, inverse = exchange[0], exchange[1]
        lane = consumer % 32
        column = column_tile * (self.rows // 2) + warp * (8 * self.mt) + lane // 4 * self.mt
        address = h.iterator.toint() + Int64(column) * self.width
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                token = t * 8 + lane % 4 * 2 + j
                values = []
                for m in cutlass.range_constexpr(self.mt):
                    value = total[m * self.regs + t * 4 + j]
                    if const_expr(self.fp8):
                        value = value * inverse[token]
                    values.append(value)
                words = ptx.pack_words(values, self.fp8)
                ptx.store_row(address, slots[token, turn % 2], columns * self.width, words, self.mt * self.width)


class UpFp8(Up):
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


class UpBf16(Up):
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
