// swiglu for float and bfloat16 on the CPU; the definition is fastpt/ops/swiglu.py.
#include <tuple>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/swiglu_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task: below this a thread costs more than it saves

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(), "swiglu: gate is ", gate.sizes(),
              " ", gate.scalar_type(), ", up is ", up.sizes(), " ", up.scalar_type(), "; they must be equal");
  static const auto reference = reference_of<at::Tensor(const at::Tensor&, const at::Tensor&)>("fastpt::swiglu");
  if (!is_native(gate)) return reference(gate, up);
  const auto g = gate.contiguous(), u = up.contiguous();
  auto out = at::empty(g.sizes(), g.options());
  by_dtype(g, [&]<typename T>() {
    const auto kernel = FASTPT_BY_ISA(swiglu_forward<T>);
    const T *gp = g.const_data_ptr<T>(), *upp = u.const_data_ptr<T>();
    T* op = out.mutable_data_ptr<T>();
    at::parallel_for(0, g.numel(), kGrain,
                     [&](int64_t lo, int64_t hi) { kernel(hi - lo, gp + lo, upp + lo, op + lo); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                   const at::Tensor& up) {
  static const auto reference =
      reference_of<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
          "fastpt::swiglu_backward");
  if (!is_native(gate)) return reference(grad, gate, up);
  const auto d = grad.contiguous(), g = gate.contiguous(), u = up.contiguous();
  auto dgate = at::empty(g.sizes(), g.options()), dup = at::empty(g.sizes(), g.options());
  by_dtype(g, [&]<typename T>() {
    const auto kernel = FASTPT_BY_ISA(swiglu_backward<T>);
    const T *dp = d.const_data_ptr<T>(), *gp = g.const_data_ptr<T>(), *upp = u.const_data_ptr<T>();
    T *dgp = dgate.mutable_data_ptr<T>(), *dupp = dup.mutable_data_ptr<T>();
    at::parallel_for(0, g.numel(), kGrain,
                     [&](int64_t lo, int64_t hi) { kernel(hi - lo, dp + lo, gp + lo, upp + lo, dgp + lo, dupp + lo); });
  });
  return {dgate, dup};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("swiglu", &fastpt::swiglu);
  m.impl("swiglu_backward", &fastpt::swiglu_backward);
}
