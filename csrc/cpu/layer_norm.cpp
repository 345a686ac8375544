// layer_norm and add_layer_norm for float and bfloat16 on the CPU; the definition is fastpt/ops/layer_norm.py.
#include <optional>
#include <tuple>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "common/dropout.h"
#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/layer_norm_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;
using Dtype = std::optional<at::ScalarType>;

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
                                                       Dtype weight_dtype, Dtype bias_dtype) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, Dtype, Dtype)>(
      "fastpt::layer_norm_backward");
  if (!is_native(x)) return reference(grad, x, mean, rstd, weight, weight_dtype, bias_dtype);
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
        kernel(hi - lo, D, gp + lo * D, xp + lo * D, mean_p + lo, rstd_p + lo, wp, nullptr, dxp + lo * D,
               weight_dtype ? partial : nullptr, bias_dtype ? partial + D : nullptr);
      };
      if (weight_dtype || bias_dtype) {
        sums = sum_row_blocks(rows, D, 2 * D, rstd.options(), block);
      } else {
        at::parallel_for(0, rows, row_grain(D), [&](int64_t lo, int64_t hi) { block(lo, hi, nullptr); });
      }
    });
  }
  return {dx, stored(sums.slice(0, 0, weight_dtype ? D : 0), weight_dtype),
          stored(sums.slice(0, D, bias_dtype ? 2 * D : D), bias_dtype)};
}

// Calls body.operator()<X, R>() with the types of x and of the residual: equal, or bfloat16 and float.
template <typename Body>
void by_stream(const Tensor& x, const Tensor& residual, Body&& body) {
  if (residual.scalar_type() == at::kBFloat16) {
    body.template operator()<c10::BFloat16, c10::BFloat16>();
  } else if (x.scalar_type() == at::kBFloat16) {
    body.template operator()<c10::BFloat16, float>();
  } else {
    body.template operator()<float, float>();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double eps,
                                                          double dropout_p, int64_t seed) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, double, double,
      int64_t)>("fastpt::add_layer_norm");
  TORCH_CHECK(x.sizes() == residual.sizes(), "add_layer_norm: x is ", x.sizes(), ", residual is ", residual.sizes(),
              "; they must be equal");
  const auto w = wide_parameter(x, weight, "weight", 1), b = wide_parameter(x, bias, "bias", 0);
  if (!is_native(x) || !is_native(residual)) return reference(x, residual, weight, bias, eps, dropout_p, seed);
  const auto xc = x.contiguous(), rc = residual.contiguous();
  auto y = at::empty_like(rc), s = at::empty_like(rc), mean = at::empty(x.sizes().slice(0, x.dim() - 1), w.options()),
       rstd = at::empty_like(mean);
  if (x.numel() == 0) return {y, s, mean, rstd};
  const auto dropout = dropout_of(dropout_p);
  by_stream(x, residual, [&]<typename X, typename R>() {
    const auto kernel = dropout_p > 0 ? FASTPT_BY_ISA(add_layer_norm_rows<X, R, true>)
                                      : FASTPT_BY_ISA(add_layer_norm_rows<X, R, false>);
    const int64_t D = x.size(-1);
    const X* xp = xc.const_data_ptr<X>();
    const R* rp = rc.const_data_ptr<R>();
    const float *wp = w.const_data_ptr<float>(), *bp = b.const_data_ptr<float>();
    R *sp = s.mutable_data_ptr<R>(), *yp = y.mutable_data_ptr<R>();
    float *mean_p = mean.mutable_data_ptr<float>(), *rstd_p = rstd.mutable_data_ptr<float>();
    at::parallel_for(0, mean.numel(), row_grain(D), [&](int64_t lo, int64_t hi) {
      const int64_t at = lo * D;
      kernel(lo, hi - lo, D, xp + at, rp + at, dropout, seed, wp, bp, static_cast<float>(eps), sp + at, yp + at,
             mean_p + lo, rstd_p + lo);
    });
  });
  return {y, s, mean, rstd};
}

// dx (empty when it would equal ds), ds, dweight, dbias.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& summed, const Tensor& mean,
    const Tensor& rstd, const std::optional<Tensor>& weight, at::ScalarType dtype, double dropout_p, int64_t seed,
    Dtype weight_dtype, Dtype bias_dtype) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
      const std::optional<Tensor>&, at::ScalarType, double, int64_t, Dtype, Dtype)>("fastpt::add_layer_norm_backward");
  const bool has_dx = dropout_p > 0 || dtype != summed.scalar_type();
  auto dx = at::empty(has_dx ? summed.sizes() : at::IntArrayRef{0}, summed.options().dtype(dtype));
  if (!is_native(summed) || !is_native(dx))
    return reference(grad, grad_sum, summed, mean, rstd, weight, dtype, dropout_p, seed, weight_dtype, bias_dtype);
  const auto g = grad.contiguous(), sc = summed.contiguous(), w = wide_parameter(summed, weight, "weight", 1);
  const auto gs = grad_sum ? grad_sum->contiguous() : Tensor();
  const int64_t D = summed.size(-1), rows = rstd.numel();
  auto ds = at::empty_like(sc), sums = at::zeros({2 * D}, rstd.options());  // dweight, then dbias
  const auto dropout = dropout_of(dropout_p);
  if (summed.numel() > 0) {
    by_stream(dx, summed, [&]<typename X, typename R>() {
      const auto kernel = dropout_p > 0 ? FASTPT_BY_ISA(add_layer_norm_backward_rows<X, R, true>)
                                        : FASTPT_BY_ISA(add_layer_norm_backward_rows<X, R, false>);
      const R *gp = g.const_data_ptr<R>(), *gsp = grad_sum ? gs.const_data_ptr<R>() : nullptr,
              *sp = sc.const_data_ptr<R>();
      const float *mean_p = mean.const_data_ptr<float>(), *rstd_p = rstd.const_data_ptr<float>(),
                  *wp = w.const_data_ptr<float>();
      R* dsp = ds.mutable_data_ptr<R>();
      X* dxp = has_dx ? dx.mutable_data_ptr<X>() : nullptr;
      const auto block = [&](int64_t lo, int64_t hi, float* partial) {
        const int64_t at = lo * D;
        kernel(lo, hi - lo, D, gp + at, gsp == nullptr ? gsp : gsp + at, sp + at, dropout, seed, mean_p + lo,
               rstd_p + lo, wp, dsp + at, dxp == nullptr ? dxp : dxp + at, weight_dtype ? partial : nullptr,
               bias_dtype ? partial + D : nullptr);
      };
      if (weight_dtype || bias_dtype) {
        sums = sum_row_blocks(rows, D, 2 * D, rstd.options(), block);
      } else {
        at::parallel_for(0, rows, row_grain(D), [&](int64_t lo, int64_t hi) { block(lo, hi, nullptr); });
      }
    });
  }
  return {dx, ds, stored(sums.slice(0, 0, weight_dtype ? D : 0), weight_dtype),
          stored(sums.slice(0, D, bias_dtype ? 2 * D : D), bias_dtype)};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("layer_norm", &fastpt::layer_norm);
  m.impl("layer_norm_backward", &fastpt::layer_norm_backward);
  m.impl("add_layer_norm", &fastpt::add_layer_norm);
  m.impl("add_layer_norm_backward", &fastpt::add_layer_norm_backward);
}
