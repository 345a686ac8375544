// lora_swiglu on the CPU: gate and up by lora_linear, then their activation, which finds them in cache where they fit.
// The definition is fastpt/ops/lora_linear.py.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "cpu/lora_linear.h"

namespace fastpt {
namespace {

using Tensors = std::vector<at::Tensor>;
using Linear = std::tuple<Tensors, Tensors>(const at::Tensor&, at::TensorList, const OptionalTensors&,
                                            const OptionalTensors&, const OptionalTensors&, at::ArrayRef<double>,
                                            double, at::IntArrayRef);
using Swiglu = at::Tensor(const at::Tensor&, const at::Tensor&);

std::tuple<at::Tensor, Tensors, Tensors> lora_swiglu(const at::Tensor& x, at::TensorList weights,
                                                     const OptionalTensors& biases, const OptionalTensors& lora_a,
                                                     const OptionalTensors& lora_b, at::ArrayRef<double> scales,
                                                     double dropout_p, at::IntArrayRef seeds) {
  auto& dispatcher = c10::Dispatcher::singleton();
  static const auto linear = dispatcher.findSchemaOrThrow("fastpt::lora_linear", "").typed<Linear>();
  static const auto swiglu = dispatcher.findSchemaOrThrow("fastpt::swiglu", "").typed<Swiglu>();
  TORCH_CHECK(weights.size() == 2, "lora_swiglu: ", weights.size(), " weights; they must be gate's and up's");
  auto [ys, xas] = linear.call(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds);
  return {swiglu.call(ys[0], ys[1]), ys, xas};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("lora_swiglu", &fastpt::lora_swiglu);
}
