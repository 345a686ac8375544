// rms_norm and add_rms_norm for float and bfloat16 on the CPU; the definition is fastpt/ops/rms_norm.py.
#include <optional>
#include <tuple>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/rms_norm_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

// offset + weight in float32; checks the weight on the way.
Tensor scale_of(const Tensor& x, const Tensor& weight, double offset) {
  TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: weight is ", weight.sizes(),
              ", x is ", x.sizes(), "; weight must be [D] for x [..., D]");
  const auto wide = weight.to(at::kFloat).contiguous();
  return offset == 0 ? wide : wide.add(offset);
}

Tensor empty_row_numbers(const Tensor& x) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
}

// Writes s (unless residual is null), y and rstd; all contiguous.
void forward_rows(const Tensor& x, const Tensor* residual, const Tensor& scale, double eps, bool casts_first, Tensor* s,
                  Tensor& y, Tensor& rstd) {
  const int64_t D = x.size(-1), rows = rstd.numel();
  if (x.numel() == 0) return;
  by_dtype(x, [&]<typename T>() {
    const auto kernel = residual == nullptr ? (casts_first ? FASTPT_BY_ISA(rms_norm_rows<T, false, true>)
                                                           : FASTPT_BY_ISA(rms_norm_rows<T, false, false>))
                                            : (casts_first ? FASTPT_BY_ISA(rms_norm_rows<T, true, true>)
                                                           : FASTPT_BY_ISA(rms_norm_rows<T, true, false>));
    const T *xp = x.const_data_ptr<T>(), *rp = residual == nullptr ? nullptr : residual->const_data_ptr<T>();
    const float* scale_p = scale.const_data_ptr<float>();
    T *sp = s == nullptr ? nullptr : s->mutable_data_ptr<T>(), *yp = y.mutable_data_ptr<T>();
    float* rstd_p = rstd.mutable_data_ptr<float>();
    at::parallel_for(0, rows, row_grain(D), [&](int64_t lo, int64_t hi) {
      const int64_t at = lo * D;
      kernel(hi - lo, D, xp + at, rp == nullptr ? rp : rp + at, scale_p, static_cast<float>(eps),
             sp == nullptr ? sp : sp + at, yp + at, rstd_p + lo);
    });
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                                    bool casts_first) {
  static const auto reference =
      reference_of<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, double, bool)>("fastpt::rms_norm");
  const auto scale = scale_of(x, weight, offset);
  if (!is_native(x)) return reference(x, weight, eps, offset, casts_first);
  const auto rows = x.contiguous();
  auto y = at::empty(rows.sizes(), rows.options()), rstd = empty_row_numbers(rows);
  forward_rows(rows, nullptr, scale, eps, casts_first, nullptr, y, rstd);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double offset, bool casts_first) {
  static const auto reference = reference_of<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, double, double, bool)>("fastpt::add_rms_norm");
  TORCH_CHECK(x.sizes() == residual.sizes() && x.scalar_type() == residual.scalar_type(), "add_rms_norm: x is ",
              x.sizes(), " ", x.scalar_type(), ", residual is ", residual.sizes(), " ", residual.scalar_type(),
              "; they must be equal");
  const auto scale = scale_of(x, weight, offset);
  if (!is_native(x)) return reference(x, residual, weight, eps, offset, casts_first);
  const auto rows = x.contiguous(), others = residual.contiguous();
  auto y = at::empty(rows.sizes(), rows.options()), s = at::empty(rows.sizes(), rows.options()),
       rstd = empty_row_numbers(rows);
  forward_rows(rows, &others, scale, eps, casts_first, &s, y, rstd);
  return {y, s, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& x,
                                             const Tensor& rstd, const Tensor& weight, double offset,
                                             std::optional<at::ScalarType> weight_dtype) {
  static const auto reference =
      reference_of<std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                                              const Tensor&, double, std::optional<at::ScalarType>)>(
          "fastpt::rms_norm_backward");
  if (!is_native(x)) return reference(grad, grad_sum, x, rstd, weight, offset, weight_dtype);
  const auto g = grad.contiguous(), xc = x.contiguous(), scale = scale_of(x, weight, offset);
  const auto gs = grad_sum ? grad_sum->contiguous() : Tensor();
  const int64_t D = x.size(-1), rows = rstd.numel();
  auto dx = at::empty(xc.sizes(), xc.options()), dweight = at::zeros({weight_dtype ? D : 0}, rstd.options());
  if (x.numel() == 0) return {dx, stored(dweight, weight_dtype)};
  by_dtype(x, [&]<typename T>() {
    const auto kernel = FASTPT_BY_ISA(rms_norm_backward_rows<T>);
    const T *gp = g.const_data_ptr<T>(), *gsp = grad_sum ? gs.const_data_ptr<T>() : nullptr,
            *xp = xc.const_data_ptr<T>();
    const float *rstd_p = rstd.const_data_ptr<float>(), *scale_p = scale.const_data_ptr<float>();
    T* dxp = dx.mutable_data_ptr<T>();
    const auto block = [&](int64_t lo, int64_t hi, float* partial) {
      const int64_t at = lo * D;
      kernel(hi - lo, D, gp + at, gsp == nullptr ? gsp : gsp + at, xp + at, rstd_p + lo, scale_p, dxp + at, partial);
    };
    if (weight_dtype) {
      dweight = sum_row_blocks(rows, D, D, rstd.options(), block);
    } else {
      at::parallel_for(0, rows, row_grain(D), [&](int64_t lo, int64_t hi) { block(lo, hi, nullptr); });
    }
  });
  return {dx, stored(dweight, weight_dtype)};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("rms_norm", &fastpt::rms_norm);
  m.impl("add_rms_norm", &fastpt::add_rms_norm);
  m.impl("rms_norm_backward", &fastpt::rms_norm_backward);
}
