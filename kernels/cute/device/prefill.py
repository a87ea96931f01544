"""What the kernels of the prefill form share: tokens are the M operand of wgmma, weights its N operand.

A tile is 128 tokens of one expert times 256 weight rows. Two consumer warpgroups hold 64 tokens each and all 256 rows. With
tokens as M a thread has two tokens and therefore two token scales, where with tokens as N it has 32: an FP8 step of 128
x 128 x 128 costs a warp about 115 instructions instead of 200. Products are of 128 rows, beside sums of 256. One
warpgroup scales while the tensor cores work for the other.

Per stage, 128 bytes of K:

    weights     TMA, two boxes of 128 rows
    tokens      128 bytes of each row
    scales      FP8: of each token for this step, and of both boxes of weights

`full` barriers count the TMA bytes and the threads of the producers that copy otherwise, `empty` barriers the consumer
warps. The last 64 tokens of a block are skipped where all of them are padding.

A thread holds columns 8 j + 2 q and the next, q = lane % 4, of tokens r and r + 8. The weight boxes are cut so that these
are neighbours in the output: `run` times 2 of them, 16 bytes.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator

from rampwrap.kernels.cute.configs import STEP_BYTES, CuteConfig
from rampwrap.kernels.cute.device.boxes import describe
from rampwrap.kernels.cute.device.pipeline import GroupedGemm

BOX_ROWS = 128
"Weight rows of a TMA box, and of one FP8 product: those that share a scale."
GROUP_TOKENS = 64
"Tokens of a consumer warpgroup."


class PrefillGemm(GroupedGemm):
    """A grouped GEMM over blocks of 128 tokens; subclasses give where tokens come from, the boxes and the epilogue."""

    run: int
    "Pairs of neighbouring output columns that a thread stores at once: 16 bytes of them."
    copying: int
    "Producer threads that arrive at a `full` barrier for copies of their own."

    def __init__(self, config: CuteConfig) -> None:
        self.config = config
        self.fp8 = config.dtype == "fp8"
        self.dtype: Any = Float8E4M3FN if self.fp8 else BFloat16
        self.width = config.element_bytes
        self.block_m, self.rows, self.stages = config.block_m, config.rows, config.stages
        self.step = config.step
        self.consumers = 32 * config.warp_n
        self.cluster, self.box_rows = 1, BOX_ROWS
        self.product_rows = BOX_ROWS if self.fp8 else self.rows
        self.sums = self.rows // 2  # of a thread: two tokens, a quarter of the rows

    # ---- host side

    def make_mma(self):
        """The wgmma of a product, and the shared layouts of weights and tokens."""
        shape = (GROUP_TOKENS, self.product_rows, 32 if self.fp8 else 16)
        k = OperandMajorMode.K
        if self.fp8:
            op = warpgroup.MmaF8Op(self.dtype, self.dtype, Float32, shape, warpgroup.OperandSource.SMEM, k, k)
        else:
            op = warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, warpgroup.OperandSource.SMEM, k, k)
        mma = cute.make_tiled_mma(cute.make_mma_atom(op), (self.block_m // GROUP_TOKENS, 1, 1))
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        weights = cute.tile_to_shape(atom, (self.rows, self.step, self.stages), order=(0, 1, 2))
        tokens = cute.tile_to_shape(atom, (self.block_m, self.step, self.stages), order=(0, 1, 2))
        return mma, weights, tokens

    @property
    def box_runs(self) -> int:
        """Eights of `run` rows of a box."""
        return BOX_ROWS // (8 * self.run)

    def describe_weights(self, w, rows_of_all, l2_fetch):
        """The descriptor of all weight rows [rows_of_all, K], row e + 2 j + 2 run q + 8 run i as (K, e, q, j, i): row 2 q + e + 8 j + 8 run i
        of a box in shared memory."""
        run = self.run
        extents = (w.shape[2], 2, 4, run, rows_of_all // (8 * run))
        return describe(w, extents, (1, 2 * run, 2, 8 * run), (self.step, 2, 4, run, self.box_runs), l2_fetch)

    # ---- device side

    def allocate(self, weights, tokens):
        """Shared memory of the pipeline: weights, tokens, scales of tokens and of weights, barriers (full, then empty)."""
        memory = SmemAllocator()
        shared_w = memory.allocate_tensor(self.dtype, weights.outer, byte_alignment=1024, swizzle=weights.inner)
        shared_x = memory.allocate_tensor(self.dtype, tokens.outer, byte_alignment=1024, swizzle=tokens.inner)
        scales = weight_scales = None
        if self.fp8:
            scales = memory.allocate_tensor(Float32, cute.make_layout((self.block_m, self.stages)), byte_alignment=16)
            weight_scales = memory.allocate_tensor(Float32, cute.make_layout((2, self.stages)), byte_alignment=16)
        full = memory.allocate_array(Int64, 2 * self.stages)
        return shared_w, shared_x, scales, weight_scales, full, full + self.stages

    @cute.jit
    def init_barriers(self, full, empty, warp):
        """Every thread calls it; afterwards the barriers may be used."""
        if warp == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, self.copying + 1)
                    cute.arch.mbarrier_init(empty + stage, self.config.warp_n)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    def copy_pair(self, boxes, target, full, stage, step, first, second, num_bytes):
        """`copy_boxes` of a tile's two."""
        place = lambda m: (0, 0, 0, (second if m else first) * self.box_runs)  # noqa: E731
        self.copy_boxes(boxes, target, full, stage, step, num_bytes, place)

    @cute.jit
    def operands(self, mma, shared_x, shared_w, group):
        """Operands of a consumer thread in shared memory, and its products (in bf16 its sums)."""
        thread = mma.get_slice(cute.make_layout(self.block_m // GROUP_TOKENS, stride=128)(group))
        tokens = mma.make_fragment_A(thread.partition_A(shared_x))
        weights = mma.make_fragment_B(thread.partition_B(shared_w))
        acc = cute.make_rmem_tensor(thread.partition_shape_C((self.block_m, self.product_rows)), Float32)
        return tokens, weights, acc

    @cute.jit
    def skip(self, full, empty, stage, phase, steps):
        """Hands every stage of a tile back unused."""
        for _ in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + stage)
            stage, phase = self.next_stage(stage, phase)
        return stage, phase

    @cute.jit
    def multiply(
        self, mma, tokens, weights, acc, total, scales, weight_scales, full, empty, stage, phase, steps, row, by
    ):  # fmt: skip
        """total = sum over steps of tokens x weights, in FP8 scaled, also with `by`, a pair for this thread's two tokens.

        `row` is the first of them, the other 8 further.
        """
        if const_expr(self.fp8):
            stage, phase = self.multiply_scaled(
                mma, tokens, weights, acc, total, scales, weight_scales, full, empty, stage, phase, steps, row, by
            )  # fmt: skip
        else:
            stage, phase = self.multiply_plain(mma, tokens, weights, acc, full, empty, stage, phase, steps)
        return stage, phase

    @cute.jit
    def multiply_plain(self, mma, tokens, weights, acc, full, empty, stage, phase, steps):
        """acc = tokens x weights; a stage is handed back when the wgmma after its own is under way."""
        last = stage
        for step in cutlass.range(steps, unroll=1):
            self.wait_for(full + stage, phase)
            warpgroup.fence()
            for k in cutlass.range_constexpr(cute.size(tokens, mode=[2])):
                mma.set(warpgroup.Field.ACCUMULATE, True if const_expr(k > 0) else step > 0)
                cute.gemm(mma, acc, tokens[(None, None, k, stage)], weights[(None, None, k, stage)], acc)
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
    def multiply_scaled(
        self, mma, tokens, weights, acc, total, scales, weight_scales, full, empty, stage, phase, steps, row, by
    ):  # fmt: skip
        """total = sum over steps of (tokens x weights) * token scale * weight scale, in float32.

        The FP8 tensor core adds with about 14 bits, and every 128 columns have scales of their own: each product starts
        from zero. The warpgroups are left to themselves: one scales while the tensor cores work for the other. A pair of
        barriers that made them take turns was 0-4 % slower, a lag of one step between them level, of two 10 % slower.
        """
        total.fill(0.0)
        self.wait_for(full + stage, phase)
        for step in cutlass.range(steps, unroll=1):
            after, after_phase = self.next_stage(stage, phase)
            for n in cutlass.range_constexpr(self.rows // BOX_ROWS):
                warpgroup.fence()
                for k in cutlass.range_constexpr(cute.size(tokens, mode=[2])):
                    mma.set(warpgroup.Field.ACCUMULATE, const_expr(k > 0))
                    a = cute.append_ones(tokens[(None, 0, k, stage)], up_to_rank=2)
                    b = cute.append_ones(weights[(None, n, k, stage)], up_to_rank=2)
                    cute.gemm(mma, acc, a, b, acc)
                warpgroup.commit_group()
                # Only now, as is the wait for the next stage: a warpgroup's way from one product to the next is what bounds a step.
                if const_expr(n == 0):
                    low, high = scales[row, stage], scales[row + 8, stage]
                    if const_expr(by is not None):
                        low, high = low * by[0], high * by[1]
                scale = weight_scales[n, stage]
                by_low, by_high = low * scale, high * scale
                if const_expr(n == self.rows // BOX_ROWS - 1):  # noqa: SIM102  (known when compiled)
                    if step + 1 < steps:
                        self.wait_for(full + after, after_phase)
                warpgroup.wait_group(0)
                if const_expr(n == self.rows // BOX_ROWS - 1):
                    # One lane speaks for all, also for their loads of scales.
                    cute.arch.sync_warp()
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(empty + stage)
                for i in cutlass.range_constexpr(BOX_ROWS // 8):
                    at, o = const_expr(4 * i), const_expr(n * (BOX_ROWS // 2) + 4 * i)
                    total[o] = total[o] + acc[at] * by_low
                    total[o + 1] = total[o + 1] + acc[at + 1] * by_low
                    total[o + 2] = total[o + 2] + acc[at + 2] * by_high
                    total[o + 3] = total[o + 3] + acc[at + 3] * by_high
            stage, phase = after, after_phase
        return stage, phase

    @cute.jit
    def wait_for(self, full, phase):
        """Waits for a stage, and for wgmma to see what was copied by threads."""
        cute.arch.mbarrier_wait(full, phase)
        if const_expr(self.copying > 32):
            cute.arch.fence_proxy("async.shared", space="cta")

    def stored_at_once(self, first: int, i: int, half: int) -> list[int]:
        """Places in a thread's sums of the neighbouring columns of one store: the i-th of box `first` // 64, token r + 8 half."""
        return [first + 4 * (i * self.run + j) + 2 * half + e for j in range(self.run) for e in range(2)]


def bytes_of_a_step(config: CuteConfig, tokens: bool) -> int:
    """That the TMA brings for a stage: the weights', and the tokens' with their scales."""
    scales = 4 * config.block_m if config.dtype == "fp8" else 0
    return (config.rows + (config.block_m if tokens else 0)) * STEP_BYTES + (scales if tokens else 0)
