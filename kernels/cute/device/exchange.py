"""The middle of the one-launch form: the CTAs of a cluster put their columns of h together.

CTAs send values straight into each other's shared memory, with barriers that count the bytes: no fence of the whole GPU,
which takes about a microsecond, is between the two products.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from rampwrap.kernels.cute.configs import SCALE, STEP_BYTES, CuteConfig
from rampwrap.kernels.cute.device import mega_ptx, ptx
from rampwrap.kernels.cute.device.pipeline import CHUNK_BYTES, CHUNKS
from rampwrap.kernels.cute.device.up import FP8_MAX, Up


class Exchange(Up):
    """An up-projection whose cluster holds 128 columns of h, in FP8 quantised, in the shared memory of each of its CTAs."""

    def __init__(self, config: CuteConfig) -> None:
        super().__init__(config)
        self.cluster = config.cluster

    def allocate_exchange(self, memory):
        """Shared memory of the middle: row of `out` and factor of each token; FP8: 448 / maximum, maxima of warps and
        of CTAs; in clusters the barriers of `init_barriers`."""
        each = cute.make_layout(self.block_m)
        rows = memory.allocate_tensor(Int32, each, byte_alignment=16)
        factors = memory.allocate_tensor(Float32, each, byte_alignment=16)
        quantising, peers = None, None
        if self.fp8:
            inverse = memory.allocate_tensor(Float32, each, byte_alignment=16)
            layout = cute.make_layout((self.block_m, self.config.warp_n))
            of_warps = memory.allocate_tensor(Float32, layout, byte_alignment=16)
            of_ctas = None
            if self.cluster > 1:
                layout = cute.make_layout((self.block_m, self.cluster))
                of_ctas = memory.allocate_tensor(Float32, layout, byte_alignment=16)
            quantising = inverse, of_warps, of_ctas
        if self.cluster > 1:
            peers = memory.allocate_array(Int64, 2)
        inverse, of_warps, of_ctas = quantising or (None, None, None)
        return rows, factors, inverse, (of_warps, of_ctas), peers

    @cute.jit
    def init_peers(self, peers):
        """[0] completes when every CTA of the cluster has left the h of the tile before, in FP8 with the bytes of their
        maxima; [1] with the bytes of h.

        Neither can be a turn ahead: h comes after the maxima of its turn, and the maxima of the next turn come after h.
        """
        cute.arch.mbarrier_init(peers, 1 if self.fp8 else self.cluster)
        cute.arch.mbarrier_init(peers + 1, 1)

    @cute.jit
    def share_rows(
        self, total, exchange, sorted_ids, topk_weights, block, num_slots, top_k, turn, rank, consumer, warp
    ):
        """In shared memory: the row of `out` of each token, -1 for none, what its sums are to be multiplied with, and in
        FP8 448 / maximum of its group. Afterwards h of the tile before is no longer read in any CTA of the cluster."""
        rows, factors, inverse, (of_warps, of_ctas), peers = exchange
        lane = consumer % 32
        if const_expr(self.fp8):
            self.maxima_of_warp(total, of_warps, lane, warp)
        self.meet()
        if const_expr(self.cluster > 1):
            if consumer == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(peers + 1, self.block_m * SCALE * self.width)
                if const_expr(self.fp8):
                    cute.arch.mbarrier_arrive_and_expect_tx(peers, self.block_m * self.cluster * 4)
            if const_expr(not self.fp8):  # noqa: SIM102  (decided while tracing, the inner one in the kernel)
                if consumer < self.cluster:
                    mega_ptx.arrive_peer(ptx.peer_address(peers.toint(), consumer))
        if consumer < self.block_m:
            slot = sorted_ids[block * self.block_m + consumer]
            row, factor = Int32(-1), Float32(0.0)
            if slot < num_slots:
                row = slot // top_k
                factor = topk_weights[slot]
            if const_expr(self.fp8):
                most = self.most_of_warps(of_warps, consumer)
                if const_expr(self.cluster > 1):
                    most = self.most_of_peers(most, of_ctas, peers, turn, rank, consumer)
                scale = most * (1.0 / FP8_MAX)
                inverse[consumer] = 1.0 / scale
                factor = factor * scale
            elif const_expr(self.cluster > 1):
                cute.arch.mbarrier_wait(peers, turn % 2)
            rows[consumer] = row
            factors[consumer] = factor
        self.meet()

    @cute.jit
    def most_of_peers(self, most, of_ctas, peers, turn, rank, consumer):
        """The largest `most` of the thread of the same token in every CTA of the cluster."""
        value_at = of_ctas.iterator.toint() + (rank * self.block_m + consumer) * 4
        for peer in cutlass.range_constexpr(self.cluster):
            barrier = ptx.peer_address(peers.toint(), peer)
            mega_ptx.send_f32(ptx.peer_address(value_at, peer), most, barrier)
        cute.arch.mbarrier_wait(peers, turn % 2)
        for peer in cutlass.range_constexpr(self.cluster):
            most = cute.arch.fmax(most, of_ctas[consumer, peer])
        return most

    @cute.jit
    def spread(self, total, exchange, shared_h, turn, rank, consumer, warp):
        """Stores this CTA's columns of h in every CTA of the cluster; afterwards all of the group is here."""
        inverse, peers = exchange[2], exchange[4]
        lane = consumer % 32
        num_bytes = const_expr(self.mt * self.width)
        # Only whole words can be sent: `fold` lanes put theirs together, and take turns with the CTAs they send it to.
        fold = const_expr(max(1, 4 // num_bytes) if self.cluster > 1 else 1)
        place = lane // 4 % fold
        byte = (rank * (self.rows // 2) + warp * (8 * self.mt) + lane // 4 * self.mt) * self.width - place * num_bytes
        step, chunk, inside = byte // STEP_BYTES, byte // CHUNK_BYTES % CHUNKS, byte % CHUNK_BYTES
        base = shared_h.iterator.toint() + step * (self.block_m * STEP_BYTES) + inside
        sends = const_expr((self.cluster + fold - 1) // fold)
        bases, barriers = [], []
        if const_expr(self.cluster > 1):
            ranks = [(place + send * fold) % self.cluster for send in range(sends)]
            bases = [ptx.peer_address(base, peer) for peer in ranks]
            barriers = [ptx.peer_address(peers.toint() + 8, peer) for peer in ranks]
        for t in cutlass.range_constexpr(self.pairs):
            for j in cutlass.range_constexpr(2):
                in_eight = lane % 4 * 2 + j
                # The 128-byte swizzle: 16-byte chunk c of row r stands where chunk c ^ (r % 8) would.
                at = (t * 8 + in_eight) * STEP_BYTES + (chunk ^ in_eight) * CHUNK_BYTES
                values = []
                for m in cutlass.range_constexpr(self.mt):
                    value = total[m * self.regs + t * 4 + j]
                    if const_expr(self.fp8):
                        value = value * inverse[t * 8 + in_eight]
                    values.append(value)
                words = ptx.pack_words(values, self.fp8)
                if const_expr(self.cluster == 1):
                    mega_ptx.store_shared(base + at, words, num_bytes)
                else:
                    word = words[0]
                    if const_expr(fold > 1):
                        word = word << (place * (8 * num_bytes))
                        word = word | cute.arch.shuffle_sync_bfly(word, 4)
                    if const_expr(fold > 2):
                        word = word | cute.arch.shuffle_sync_bfly(word, 8)
                    for send in cutlass.range_constexpr(sends):
                        if const_expr(fold > self.cluster):
                            if place < self.cluster:
                                mega_ptx.send_b32(bases[send] + at, word, barriers[send])
                        else:
                            mega_ptx.send_b32(bases[send] + at, word, barriers[send])
        if const_expr(self.cluster == 1):
            cute.arch.fence_proxy("async.shared", space="cta")
            self.meet()
        else:
            cute.arch.mbarrier_wait(peers + 1, turn % 2)
            cute.arch.fence_proxy("async.shared", space="cta")
