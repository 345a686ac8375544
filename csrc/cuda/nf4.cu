// NF4: unpacked to float32, bfloat16 or float16 in one launch, nested scales included; packed, and its scales nested.
#include <cuda_runtime.h>

#include "cuda/nf4.h"
#include "cuda/nf4_body.h"
#include "cuda/nf4_pack_body.h"

namespace fastpt::cuda {
namespace {

// cuda-check: nf4_kernel 2 loads and 16 stores of 16 bytes
__global__ void __launch_bounds__(kThreads) nf4_kernel(Nf4Task task) {
  __shared__ Nf4Shared shared;
  const int thread = static_cast<int>(threadIdx.x);
  nf4_load_all(task, blockIdx.x, thread, shared);
  __syncthreads();
  nf4_store_all(task, blockIdx.x, thread, shared);
}

// Eight codes are four bytes.
// cuda-check: nf4_pack_kernel 4 loads and 0 stores of 16 bytes
__global__ void __launch_bounds__(kThreads) nf4_pack_kernel(Nf4PackTask task) {
  const int thread = static_cast<int>(threadIdx.x);
  Nf4PackThread own;
  nf4_pack_load(task, blockIdx.x, thread, own);
  for (int g = 0; g < kNf4PackGroups; ++g)
    for (int distance = kNf4Sharers / 2; distance > 0; distance /= 2)
      own.largest[g] = max(own.largest[g], __shfl_xor_sync(0xffffffffu, own.largest[g], distance));
  nf4_pack_store(task, blockIdx.x, thread, own);
}

// Of a 64th of the values: nothing to stream.
// cuda-check: nf4_nest_kernel 0 loads and 0 stores of 16 bytes
__global__ void __launch_bounds__(kThreads) nf4_nest_kernel(Nf4NestTask task) {
  __shared__ Nf4NestShared shared;
  const int thread = static_cast<int>(threadIdx.x);
  nf4_nest_load(task, blockIdx.x, thread, shared);
  __syncthreads();
  nf4_nest_store(task, blockIdx.x, thread, shared);
}

template <typename Task>
int launch(void (*kernel)(Task), const Task& task, int64_t programs, void* stream) {
  if (programs == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(programs), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(task);
  return cudaGetLastError();
}

}  // namespace

int launch_nf4_dequantize(const Nf4Task& task, void* stream) {
  return launch(nf4_kernel, task, nf4_programs_of(task.size), stream);
}

int launch_nf4_pack(const Nf4PackTask& task, void* stream) {
  return launch(nf4_pack_kernel, task, nf4_pack_programs_of(task.size), stream);
}

int launch_nf4_nest(const Nf4NestTask& task, void* stream) {
  return launch(nf4_nest_kernel, task, nf4_nest_programs_of(task.size), stream);
}

}  // namespace fastpt::cuda
