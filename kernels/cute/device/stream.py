"""A launch that only reads the weights of some experts: the floor under a GEMM that has to read them.

CTAs take equal consecutive shares of the bytes and copy them to shared memory, `stages` chunks under way at a time. Nobody
looks at them, so a chunk's place is free again as soon as it has landed, and one thread is enough.

The overlapping one starts while the launch before it ends, with its first chunks, as `down` does; it ends after that one.
"""

# The DSL traces this code: its values are the DSL's own classes, which carry no static types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, attr-defined"

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.memory import SmemAllocator

from rampwrap.kernels.cute.configs import STREAM_CHUNK, CuteConfig
from rampwrap.kernels.cute.device import ptx


class Stream:
    """Reads uint8 [experts, bytes] of the experts in int32 [active] with up to `max_ctas` CTAs; writes nothing."""

    overlapping = False

    def __init__(self, config: CuteConfig) -> None:
        self.stages = config.stages

    @cute.jit
    def __call__(self, weights: cute.Tensor, experts: cute.Tensor, max_ctas: Int32, stream: cuda.CUstream):
        self.kernel(weights, experts).launch(
            grid=(max_ctas, 1, 1),
            block=(32, 1, 1),
            stream=stream,
            use_pdl=self.overlapping,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, weights: cute.Tensor, experts: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator()
        target = memory.allocate_array(Uint8, self.stages * STREAM_CHUNK)
        full = memory.allocate_array(Int64, self.stages)
        if const_expr(self.overlapping):
            cute.arch.griddepcontrol_launch_dependents()
        if thread == 0:
            for stage in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init_fence()
            each = weights.shape[1] // STREAM_CHUNK
            chunks = experts.shape[0] * each
            share, more = chunks // ctas, chunks % ctas
            first = cta * share + cutlass.min(cta, more)
            count = share + cutlass.min(cutlass.max(more - cta, 0), 1)
            early = cutlass.min(count, self.stages)
            for index in cutlass.range(early, unroll=1):
                self.copy(weights, experts, target, full, first + index, index, each)
            if const_expr(self.overlapping):
                cute.arch.griddepcontrol_wait()
            stage, phase = Int32(0), Int32(0)
            for index in cutlass.range(count, unroll=1):
                cute.arch.mbarrier_wait(full + stage, phase)
                if index + self.stages < count:
                    self.copy(weights, experts, target, full, first + index + self.stages, stage, each)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase = phase ^ 1

    @cute.jit
    def copy(self, weights, experts, target, full, chunk, stage, each):
        """Starts the copy of one chunk of all active experts' bytes."""
        expert = experts[chunk // each]
        at = Int64(expert) * weights.shape[1] + (chunk % each) * STREAM_CHUNK
        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, STREAM_CHUNK)
        ptx.copy_bulk(
            target.toint() + stage * STREAM_CHUNK,
            weights.iterator.toint() + at,
            Int32(STREAM_CHUNK),
            (full + stage).toint(),
        )


class StreamOverlapping(Stream):
    """As `Stream`, by programmatic launch."""

    overlapping = True
