// NF4 to float32, bfloat16 or float16 in one launch: a scale that is nested is decoded by the threads that need it.
#include <cuda_runtime.h>

#include "cuda/nf4.h"
#include "cuda/nf4_body.h"

namespace fastpt::cuda {
namespace {

// Sixteen words lie in sixteen banks: any threads may read any of them at once.
// cuda-check: nf4_kernel 0 loads and 8 stores of 16 bytes
__global__ void __launch_bounds__(kThreads) nf4_kernel(Nf4Task task) {
  __shared__ float numbers[kNf4Codes];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    FASTPT_UNROLL
    for (uint32_t code = 0; code < kNf4Codes; ++code) numbers[code] = nf4_value(code);
  }
  Nf4Thread own;
  nf4_load_all(task, blockIdx.x, thread, own);
  __syncthreads();
  nf4_store_all(task, numbers, blockIdx.x, thread, own);
}

}  // namespace

int launch_nf4_dequantize(const Nf4Task& task, void* stream) {
  if (task.size == 0) return cudaSuccess;
  nf4_kernel<<<static_cast<unsigned>(nf4_programs_of(task.size)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      task);
  return cudaGetLastError();
}

}  // namespace fastpt::cuda
