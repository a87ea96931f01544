// Reading weights in boxes by the TMA: what the order of requests and the L2 promotion of the descriptor give.
//
//     nvcc -arch=sm_90a -O3 -std=c++17 -o boxes benchmarks/boxes.cu && ./boxes
//
// One thread an SM, or two, reads 805 MB of bf16 as the CuTe kernels' producers do: tiles of `rows` weight rows, K columns, 128 bytes of each
// row a stage. GB/s, medians of six; nobody looks at what was read. Columns:
//
//     in order    bulk copies of as many bytes that lie one behind the other: the most that this way of reading gives
//     none, 64, 128, 256   boxes of 128 rows, L2 promotion of so many bytes
//     pairs, fours         promotion 128, but two or four steps of a tile are asked for at once
//     evict first          promotion 128 with that cache hint

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

constexpr size_t BYTES = 805306368;  // w13 of Qwen3-30B
constexpr int SMS = 132, BOX_ROWS = 128, STEP = 64, STEP_BYTES = 128;

struct Way {
  const char* name;
  bool in_order, evict_first;
  int promotion, at_once;
};
constexpr Way WAYS[] = {{"in order", true, false, 0, 1}, {"none", false, false, 0, 1},  {"64", false, false, 1, 1},
                        {"128", false, false, 2, 1},     {"256", false, false, 3, 1},   {"pairs", false, false, 2, 2},
                        {"fours", false, false, 2, 4},   {"evict first", false, true, 2, 1}};

__device__ void wait(uint32_t barrier, int phase) {
  asm volatile("{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra W; D: }" ::"r"(barrier), "r"(phase));
}

__device__ void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, bool evict_first) {
  if (evict_first) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(column),
                 "r"(row), "r"(barrier) : "memory");
  }
}

// A CTA takes every gridDim.x-th tile, `stages` steps under way; at_once of them are asked for when as many have landed.
__global__ void read_tiles(const __grid_constant__ CUtensorMap map, const char* weights, int rows, int steps, int tiles, int stages, int at_once, bool in_order,
                           bool evict_first) {
  extern __shared__ char memory[];
  if (threadIdx.x) return;
  const int stage_bytes = rows * STEP_BYTES;
  const uint32_t target = (uint32_t(__cvta_generic_to_shared(memory)) + 1023) / 1024 * 1024, full = target + stages * stage_bytes;
  for (int stage = 0; stage < stages; stage++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * stage));
  asm volatile("fence.mbarrier_init.release.cluster;");
  const int total = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) * steps;
  auto ask = [&](int i) {
    const int tile = blockIdx.x + i / steps * gridDim.x, step = i % steps;
    const uint32_t to = target + i % stages * stage_bytes, barrier = full + 8 * (i % stages);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(stage_bytes));
    if (in_order) {
      const char* from = weights + (long(tile) * steps + step) * stage_bytes;
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(stage_bytes),
                   "r"(barrier) : "memory");
    } else {
      for (int row = 0; row < rows; row += BOX_ROWS) copy_box(to + row * STEP_BYTES, &map, step * STEP, tile * rows + row, barrier, evict_first);
    }
  };
  int asked = 0, landed = 0;
  while (asked < min(total, stages)) ask(asked++);
  for (int i = 0; i < total; i++) {
    wait(full + 8 * (i % stages), i / stages % 2);
    if (++landed < at_once) continue;
    for (landed = 0; landed < at_once && asked < total; landed++) ask(asked++);
    landed = 0;
  }
}

int main() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult query;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query);
  auto encode = decltype(&cuTensorMapEncodeTiled)(found);
  char* weights;
  cudaMalloc(&weights, BYTES);
  cudaMemset(weights, 1, BYTES);
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  cudaFuncSetAttribute(read_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
  cudaEvent_t before, after;
  cudaEventCreate(&before);
  cudaEventCreate(&after);
  printf("%s\n%5s %4s %6s %6s %7s", device.name, "K", "rows", "CTAs", "KB", "stages");
  for (const Way& way : WAYS) printf(" %11s", way.name);
  printf("\n");
  for (int columns : {2048, 768})
    for (int rows : {128, 256})
      for (int ctas : {1, 2})
        for (int kilobytes : {96, 128, 192}) {
          const int stages = kilobytes * 1024 / ctas / (rows * STEP_BYTES);
          if (stages < 2) continue;
          printf("%5d %4d %6d %6d %7d", columns, rows, ctas, kilobytes, stages);
          const long all_rows = BYTES / (2 * columns) / rows * rows;
          for (const Way& way : WAYS) {
            if (way.at_once > 1 && way.at_once > stages / 2) {
              printf(" %11s", "-");
              continue;
            }
            CUtensorMap map;
            cuuint64_t extents[] = {cuuint64_t(columns), cuuint64_t(all_rows)}, strides[] = {cuuint64_t(columns) * 2};
            cuuint32_t box[] = {STEP, BOX_ROWS}, apart[] = {1, 1};
            CUresult made = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, weights, extents, strides, box, apart, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CUtensorMapL2promotion(way.promotion), CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
            if (made != CUDA_SUCCESS) return printf("\nno descriptor: error %d\n", made), 1;
            std::vector<float> times;
            for (int i = 0; i < 8; i++) {
              cudaEventRecord(before);
              read_tiles<<<SMS * ctas, 32, stages * (rows * STEP_BYTES + 8) + 1024>>>(map, weights, rows, columns / STEP, int(all_rows / rows), stages, way.at_once,
                                                                                     way.in_order, way.evict_first);
              cudaEventRecord(after);
              cudaEventSynchronize(after);
              float ms = 0;
              cudaEventElapsedTime(&ms, before, after);
              if (i > 1) times.push_back(ms);
            }
            if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return printf("\n%s\n", cudaGetErrorString(error)), 1;
            std::sort(times.begin(), times.end());
            printf(" %11.0f", double(all_rows) * columns * 2 / times[times.size() / 2] / 1e6);
          }
          printf("\n");
        }
}
