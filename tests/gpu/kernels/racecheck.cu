// What compute-sanitizer's racecheck makes of a pipeline with mbarriers: one producer warp, two consumer warps, two stages.
//
//     nvcc -arch=sm_90a -O2 -lineinfo -o racecheck racecheck.cu && compute-sanitizer --tool racecheck ./racecheck
//
// Copies: 0 plain stores, 1 cp.async with cp.async.mbarrier.arrive.noinc, 2 cp.async.bulk, 3 cp.async that is waited for.
// Release of a stage: 0 every lane arrives, 1 __syncwarp and one lane, 2 one lane, 3 WRONG, every lane before it reads.
// By PTX 0 and 1 are in order and 3 is a race. Version 2025.3.1 reports 1, 2 and 3 with every copy, and nothing for 0: an
// arrival counts for the lane that made it, __syncwarp does not pass it on. 2026.4.0 reports bulk copies with 0 as well.

#include <cstdint>
#include <cstdio>

constexpr int WIDTH = 64, STAGES = 2, STEPS = 16;

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ void wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{ .reg .pred p; L: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra D; bra L; D: }" ::"r"(shared_address(barrier)), "r"(phase)
      : "memory");
}

template <int COPY>
__device__ void copy(float* stage, const float* from, uint64_t* full, int lane) {
  if constexpr (COPY == 2) {
    if (lane) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 256;" ::"r"(shared_address(full)) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(shared_address(stage)), "l"(from),
                 "r"(shared_address(full))
                 : "memory");
  } else {
    for (int i = lane; i < WIDTH; i += 32) {
      if constexpr (COPY == 0) stage[i] = from[i];
      else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(stage + i)), "l"(from + i) : "memory");
    }
    if constexpr (COPY == 1) asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full)) : "memory");
    if constexpr (COPY == 3) asm volatile("cp.async.wait_all;" ::: "memory");
    if constexpr (COPY != 1) arrive(full);
  }
}

template <int COPY, int RELEASE>
__global__ void pipeline(const float* in, float* out) {
  __shared__ alignas(128) float stages[STAGES][WIDTH];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  const int lane = threadIdx.x % 32, consumer = threadIdx.x - 32;
  const bool every = RELEASE == 0 || RELEASE == 3;
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; ++i) init(full + i, COPY == 2 ? 1 : 32), init(empty + i, every ? WIDTH : WIDTH / 32);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  float sum = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    const int at = step % STAGES, phase = step / STAGES % 2;
    if (consumer < 0) {
      wait(empty + at, phase ^ 1);
      copy<COPY>(stages[at], in + step * WIDTH, full + at, lane);
    } else {
      wait(full + at, phase);
      if (RELEASE == 3) arrive(empty + at);
      const volatile float* stage = stages[at];
      sum += stage[consumer] + 2 * stage[(consumer * 5 + 1) % WIDTH];
      if (RELEASE == 0) arrive(empty + at);
      if (RELEASE == 1) __syncwarp();
      if ((RELEASE == 1 || RELEASE == 2) && lane == 0) arrive(empty + at);
    }
  }
  if (consumer >= 0) out[consumer] = sum;
}

template <int COPY, int RELEASE>
void run(const float* in, float* out) {
  pipeline<COPY, RELEASE><<<1, 32 + WIDTH>>>(in, out);
  printf("copies %d, release %d: %s\n", COPY, RELEASE, cudaGetErrorString(cudaDeviceSynchronize()));
  fflush(stdout);
}

template <int COPY>
void run_all(const float* in, float* out) {
  run<COPY, 0>(in, out), run<COPY, 1>(in, out), run<COPY, 2>(in, out), run<COPY, 3>(in, out);
}

int main() {
  float *in, *out;
  cudaMalloc(&in, STEPS * WIDTH * sizeof(float)), cudaMalloc(&out, WIDTH * sizeof(float));
  cudaMemset(in, 0, STEPS * WIDTH * sizeof(float));
  run_all<0>(in, out), run_all<1>(in, out), run_all<2>(in, out), run_all<3>(in, out);
}
