// nf4_linear on the CPU: lora_linear whose 4-bit weights are unpacked panel by panel where a task uses them. The
// definition is fastpt/ops/nf4_linear.py.
#include <tuple>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/lora_linear.h"

namespace fastpt {
namespace {

LinearOutputs nf4_linear(const at::Tensor& x, at::TensorList weights, const OptionalTensors& absmax,
                         const OptionalTensors& nested, const OptionalTensors& biases, const OptionalTensors& lora_a,
                         const OptionalTensors& lora_b, at::ArrayRef<double> scales, double dropout_p,
                         at::IntArrayRef seeds) {
  static const auto reference = reference_of<decltype(nf4_linear)>("fastpt::nf4_linear");
  if (!is_native(x)) return reference(x, weights, absmax, nested, biases, lora_a, lora_b, scales, dropout_p, seeds);
  const Nf4Lists lists{absmax, nested};
  return linear_forward(x, read_projections(x, weights, biases, lora_a, lora_b, scales, seeds, &lists), dropout_p);
}

LinearGradients nf4_linear_backward(at::TensorList grads, const at::Tensor& x, at::TensorList weights,
                                    const OptionalTensors& absmax, const OptionalTensors& nested,
                                    const OptionalTensors& lora_a, const OptionalTensors& lora_b, at::TensorList xas,
                                    at::ArrayRef<double> scales, double dropout_p, at::IntArrayRef seeds, bool wants_x,
                                    const c10::List<bool>& wants, bool in_float32) {
  static const auto reference = reference_of<decltype(nf4_linear_backward)>("fastpt::nf4_linear_backward");
  if (!is_native(x))
    return reference(grads, x, weights, absmax, nested, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants,
                     in_float32);
  const Nf4Lists lists{absmax, nested};
  const auto projections =
      read_projections(x, weights, no_tensors(weights.size()), lora_a, lora_b, scales, seeds, &lists);
  auto found = linear_backward(grads, x, projections, xas, dropout_p, wants_x, wants);
  return in_float32 ? found : rounded(std::move(found), weights, lora_a, lora_b);
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("nf4_linear", &fastpt::nf4_linear);
  m.impl("nf4_linear_backward", &fastpt::nf4_linear_backward);
}
