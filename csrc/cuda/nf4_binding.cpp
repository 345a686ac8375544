// nf4_dequantize on CUDA.
#include <optional>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/nf4.h"
#include "cuda/nf4.h"

namespace fastpt::cuda {
namespace {

using at::Tensor;

std::optional<Dtype> dtype_of(at::ScalarType type) {
  if (type == at::kFloat) return Dtype::float32;
  if (type == at::kBFloat16) return Dtype::bfloat16;
  if (type == at::kHalf) return Dtype::float16;
  return std::nullopt;
}

bool is_aligned(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested,
                      at::IntArrayRef shape, at::ScalarType dtype) {
  static const auto reference = reference_of<decltype(nf4_dequantize)>("fastpt::nf4_dequantize");
  const auto type = dtype_of(dtype);
  if (!type) return reference(packed, absmax, nested, shape, dtype);
  const int64_t size = c10::multiply_integers(shape);
  check_nf4(packed, absmax, nested, size);
  TORCH_CHECK(absmax.device() == packed.device() && (!nested || nested->device() == packed.device()),
              "nf4: packed is on ", packed.device(), ", absmax on ", absmax.device(), "; one call is for one device");
  const c10::cuda::CUDAGuard guard(packed.device());
  const Tensor bytes = packed.contiguous(), scales = absmax.contiguous(),
               more = nested ? nested->contiguous() : Tensor();
  auto out = at::empty(shape, packed.options().dtype(dtype));
  Nf4Task task{};
  task.packed = bytes.const_data_ptr<uint8_t>();
  if (nested)
    task.scales = {nullptr, scales.const_data_ptr<uint8_t>(), more.const_data_ptr<float>()};
  else
    task.scales = {scales.const_data_ptr<float>(), nullptr, nullptr};
  task.out = out.mutable_data_ptr();
  task.size = size;
  task.type = *type;
  task.is_aligned = is_aligned(task.packed, 4) && is_aligned(task.out, 16);
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch_nf4_dequantize(task, c10::cuda::getCurrentCUDAStream().stream())));
  return out;
}

}  // namespace
}  // namespace fastpt::cuda

TORCH_LIBRARY_IMPL(fastpt, CUDA, m) {
  m.impl("nf4_dequantize", &fastpt::cuda::nf4_dequantize);
}
