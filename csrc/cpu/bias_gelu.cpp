// bias_gelu for float and bfloat16 on the CPU; the definition is fastpt/ops/bias_gelu.py.
#include <optional>
#include <string_view>
#include <tuple>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/bias_gelu_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

bool is_tanh(std::string_view approximate) {
  TORCH_CHECK(approximate == "tanh" || approximate == "none", "bias_gelu: approximate is '", approximate,
              "'; use 'tanh' or 'none'");
  return approximate == "tanh";
}

// The bias in float32, zeros where there is none.
Tensor wide_bias(const Tensor& x, const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.dim() > 0, "bias_gelu: x has no dims; it must be [..., D]");
  if (!bias) return at::zeros({x.size(-1)}, x.options().dtype(at::kFloat));
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(-1), "bias_gelu: bias is ", bias->sizes(), ", x is ",
              x.sizes(), "; bias must be [D] for x [..., D]");
  return bias->to(at::kFloat).contiguous();
}

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, std::string_view approximate) {
  static const auto reference =
      reference_of<Tensor(const Tensor&, const std::optional<Tensor>&, std::string_view)>("fastpt::bias_gelu");
  const bool tanh = is_tanh(approximate);
  const auto b = wide_bias(x, bias);
  if (!is_native(x)) return reference(x, bias, approximate);
  const auto xc = x.contiguous();
  auto out = at::empty_like(xc);
  if (x.numel() == 0) return out;
  by_dtype(x, [&]<typename T>() {
    const auto kernel = tanh ? FASTPT_BY_ISA(bias_gelu_rows<T, true>) : FASTPT_BY_ISA(bias_gelu_rows<T, false>);
    const int64_t D = x.size(-1);
    const T* xp = xc.const_data_ptr<T>();
    const float* bp = b.const_data_ptr<float>();
    T* op = out.mutable_data_ptr<T>();
    at::parallel_for(0, x.numel() / D, row_grain(D),
                     [&](int64_t lo, int64_t hi) { kernel(hi - lo, D, xp + lo * D, bp, op + lo * D); });
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                              std::string_view approximate, std::optional<at::ScalarType> bias_dtype) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, std::optional<at::ScalarType>)>(
      "fastpt::bias_gelu_backward");
  const bool tanh = is_tanh(approximate);
  const auto b = wide_bias(x, bias);
  if (!is_native(x)) return reference(grad, x, bias, approximate, bias_dtype);
  const auto g = grad.contiguous(), xc = x.contiguous();
  const int64_t D = x.size(-1), rows = D == 0 ? 0 : x.numel() / D;
  auto dx = at::empty_like(xc), dbias = at::zeros({bias_dtype ? D : 0}, b.options());
  if (x.numel() == 0) return {dx, stored(dbias, bias_dtype)};
  by_dtype(x, [&]<typename T>() {
    const auto kernel =
        tanh ? FASTPT_BY_ISA(bias_gelu_backward_rows<T, true>) : FASTPT_BY_ISA(bias_gelu_backward_rows<T, false>);
    const T *gp = g.const_data_ptr<T>(), *xp = xc.const_data_ptr<T>();
    const float* bp = b.const_data_ptr<float>();
    T* dxp = dx.mutable_data_ptr<T>();
    const auto block = [&](int64_t lo, int64_t hi, float* partial) {
      kernel(hi - lo, D, gp + lo * D, xp + lo * D, bp, dxp + lo * D, partial);
    };
    if (bias_dtype) {
      dbias = sum_row_blocks(rows, D, D, b.options(), block);
    } else {
      at::parallel_for(0, rows, row_grain(D), [&](int64_t lo, int64_t hi) { block(lo, hi, nullptr); });
    }
  });
  return {dx, stored(dbias, bias_dtype)};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("bias_gelu", &fastpt::bias_gelu);
  m.impl("bias_gelu_backward", &fastpt::bias_gelu_backward);
}
