// layer_norm for float and bfloat16 on the CPU; the definition is fastpt/ops/layer_norm.py.
#include <optional>
#include <tuple>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/layer_norm_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

// A parameter in float32, or D times what its absence stands for.
Tensor wide_parameter(const Tensor& x, const std::optional<Tensor>& parameter, const char* name, double absent) {
  TORCH_CHECK(x.dim() > 0, "layer_norm: x has no dims; it must be [..., D]");
  if (!parameter) return at::full({x.size(-1)}, absent, x.options().dtype(at::kFloat));
  TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == x.size(-1), "layer_norm: ", name, " is ",
              parameter->sizes(), ", x is ", x.sizes(), "; ", name, " must be [D] for x [..., D]");
  return parameter->to(at::kFloat).contiguous();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, double)>("fastpt::layer_norm");
  const auto w = wide_parameter(x, weight, "weight", 1), b = wide_parameter(x, bias, "bias", 0);
  if (!is_native(x)) return reference(x, weight, bias, eps);
  const auto xc = x.contiguous();
  auto y = at::empty_like(xc), mean = at::empty(x.sizes().slice(0, x.dim() - 1), w.options()),
       rstd = at::empty_like(mean);
  if (x.numel() == 0) return {y, mean, rstd};
  by_dtype(x, [&]<typename T>() {
    const auto kernel = FASTPT_BY_ISA(layer_norm_rows<T>);
    const int64_t D = x.size(-1);
    const T* xp = xc.const_data_ptr<T>();
    const float *wp = w.const_data_ptr<float>(), *bp = b.const_data_ptr<float>();
    T* yp = y.mutable_data_ptr<T>();
    float *mean_p = mean.mutable_data_ptr<float>(), *rstd_p = rstd.mutable_data_ptr<float>();
    at::parallel_for(0, mean.numel(), row_grain(D), [&](int64_t lo, int64_t hi) {
      kernel(hi - lo, D, xp + lo * D, wp, bp, static_cast<float>(eps), yp + lo * D, mean_p + lo, rstd_p + lo);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const std::optional<Tensor>& weight,
                                                       bool wants_weight, bool wants_bias) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool, bool)>(
      "fastpt::layer_norm_backward");
  if (!is_native(x)) return reference(grad, x, mean, rstd, weight, wants_weight, wants_bias);
  const auto g = grad.contiguous(), xc = x.contiguous(), w = wide_parameter(x, weight, "weight", 1);
  const int64_t D = x.size(-1), rows = rstd.numel();
  auto dx = at::empty_like(xc), sums = at::zeros({2 * D}, rstd.options());  // dweight, then dbias
  if (x.numel() > 0) {
    by_dtype(x, [&]<typename T>() {
      const auto kernel = FASTPT_BY_ISA(layer_norm_backward_rows<T>);
      const T *gp = g.const_data_ptr<T>(), *xp = xc.const_data_ptr<T>();
      const float *mean_p = mean.const_data_ptr<float>(), *rstd_p = rstd.const_data_ptr<float>(),
                  *wp = w.const_data_ptr<float>();
      T* dxp = dx.mutable_data_ptr<T>();
      const auto block = [&](int64_t lo, int64_t hi, float* partial) {
        kernel(hi - lo, D, gp + lo * D, xp + lo * D, mean_p + lo, rstd_p + lo, wp, dxp + lo * D,
               wants_weight ? partial : nullptr, wants_bias ? partial + D : nullptr);
      };
      if (wants_weight || wants_bias) {
        sums = sum_row_blocks(rows, D, 2 * D, rstd.options(), block);
      } else {
        at::parallel_for(0, rows, row_grain(D), [&](int64_t lo, int64_t hi) { block(lo, hi, nullptr); });
      }
    });
  }
  // Outputs of an op may not share memory, hence the copy of D floats.
  return {dx, sums.slice(0, 0, wants_weight ? D : 0).clone(), sums.slice(0, D, wants_bias ? 2 * D : D).clone()};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("layer_norm", &fastpt::layer_norm);
  m.impl("layer_norm_backward", &fastpt::layer_norm_backward);
}
