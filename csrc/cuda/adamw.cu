// AdamW over all tensors in one launch, moments of 32 or 8 bits: a program finds its tensor in the table by its number.
#include <cuda_runtime.h>

#include "cuda/adamw.h"
#include "cuda/adamw_body.h"

namespace fastpt::cuda {
namespace {

__device__ const DynamicMap kMaps[2] = {dynamic_map(true), dynamic_map(false)};

__device__ void copy_maps(DynamicMap* to) {
  static_assert(sizeof(kMaps) == kThreads * sizeof(uint4));
  reinterpret_cast<uint4*>(to)[threadIdx.x] = reinterpret_cast<const uint4*>(kMaps)[threadIdx.x];
}

__device__ uint32_t largest_of_sharers(uint32_t value) {
  for (int distance = kScaleThreads / 2; distance > 0; distance /= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// Through one tile of each thread: parameter, gradient and master of 4 bytes, moments of 4 bytes and of 1; the maps.
// cuda-check: adamw_kernel 18 loads and 18 stores of 16 bytes
__global__ void __launch_bounds__(kThreads, 2)
    adamw_kernel(const AdamWRow* __restrict__ rows, int64_t row_count, AdamW constants, const float* grad_scale) {
  __shared__ alignas(16) DynamicMap maps[2];
  const AdamWRow& row = rows[row_of_program(rows, row_count, blockIdx.x)];
  if (grad_scale != nullptr) constants.grad_scale = *grad_scale;
  if (row.exp_avg_absmax != nullptr) {
    copy_maps(maps);
    __syncthreads();
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - row.first_program) * kProgramValues;
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t tile_first = first + tile * kTileValues;
    if (tile_first >= row.size) return;
    AdamWThread own;
    update_tile(row, constants, maps[0].code, maps[1].code, tile_first, thread, own);
    if (row.exp_avg_absmax != nullptr) {
      own.largest = largest_of_sharers(own.largest);
      own.largest_sq = largest_of_sharers(own.largest_sq);
    }
    store_moments(row, maps[0].last, maps[1].last, tile_first, thread, own);
  }
}

}  // namespace

int launch_adamw(const AdamWRow* rows, int64_t row_count, int64_t programs, const AdamW& constants,
                 const float* grad_scale, void* stream) {
  if (programs == 0) return cudaSuccess;
  adamw_kernel<<<static_cast<unsigned>(programs), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      rows, row_count, constants, grad_scale);
  return cudaGetLastError();
}

}  // namespace fastpt::cuda
