// nf4_quantize and nf4_dequantize on CUDA.
#include <optional>
#include <tuple>
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

// Codes of scales in a map, and the map, their offset and maxima in one tensor: [256 + 1 + a maximum for each 256].
std::tuple<Tensor, Tensor> nest(const Tensor& absmax, const Tensor& scales_map, void* stream) {
  TORCH_CHECK(scales_map.numel() == kNf4MapSize && scales_map.scalar_type() == at::kFloat &&
                  scales_map.device() == absmax.device(),
              "nf4_quantize: the map is ", scales_map.sizes(), " ", scales_map.scalar_type(), " on ",
              scales_map.device(), "; it must be float32 [256] on ", absmax.device());
  const int64_t scales = absmax.numel();
  auto codes = at::empty({scales}, absmax.options().dtype(at::kByte));
  auto nested = at::empty({kNf4MapSize + 1 + nf4_nest_programs_of(scales)}, absmax.options());
  nested.narrow(0, 0, kNf4MapSize).copy_(scales_map.reshape({kNf4MapSize}));
  auto offset = nested.narrow(0, kNf4MapSize, 1);
  if (scales > 0)
    offset.copy_(absmax.mean());
  else
    offset.zero_();
  const Nf4NestTask task{absmax.const_data_ptr<float>(), codes.mutable_data_ptr<uint8_t>(),
                         nested.mutable_data_ptr<float>(), scales};
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch_nf4_nest(task, stream)));
  return {codes, nested};
}

std::tuple<Tensor, Tensor, Tensor> nf4_quantize(const Tensor& weight, const std::optional<Tensor>& scales_map) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const auto type = dtype_of(weight.scalar_type());
  const Tensor values = (type ? weight : weight.to(at::kFloat)).contiguous();
  const int64_t size = values.numel();
  auto packed = at::empty({blocks_of(size, 2)}, values.options().dtype(at::kByte));
  auto absmax = at::empty({blocks_of(size, kNf4Block)}, values.options().dtype(at::kFloat));
  Nf4PackTask task{};
  task.values = values.const_data_ptr();
  task.packed = packed.mutable_data_ptr<uint8_t>();
  task.absmax = absmax.mutable_data_ptr<float>();
  task.size = size;
  task.type = type.value_or(Dtype::float32);
  task.is_aligned = is_aligned(task.values, 16) && is_aligned(task.packed, 4);
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch_nf4_pack(task, stream)));
  if (!scales_map) return {packed, absmax, at::empty({0}, absmax.options())};
  auto [codes, nested] = nest(absmax, *scales_map, stream);
  return {packed, codes, nested};
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
  task.is_aligned = is_aligned(task.packed, 16) && is_aligned(task.out, 16);
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch_nf4_dequantize(task, c10::cuda::getCurrentCUDAStream().stream())));
  return out;
}

}  // namespace
}  // namespace fastpt::cuda

TORCH_LIBRARY_IMPL(fastpt, CUDA, m) {
  m.impl("nf4_quantize", &fastpt::cuda::nf4_quantize);
  m.impl("nf4_dequantize", &fastpt::cuda::nf4_dequantize);
}
