// geglu for float and bfloat16 on the CPU; the definition is fastpt/ops/geglu.py.
#include <string_view>
#include <tuple>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/geglu_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task: below this a thread costs more than it saves

bool is_tanh(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  TORCH_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(), "geglu: gate is ", gate.sizes(),
              " ", gate.scalar_type(), ", up is ", up.sizes(), " ", up.scalar_type(), "; they must be equal");
  TORCH_CHECK(approximate == "tanh" || approximate == "none", "geglu: approximate is '", approximate,
              "'; use 'tanh' or 'none'");
  return approximate == "tanh";
}

at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  static const auto reference =
      reference_of<at::Tensor(const at::Tensor&, const at::Tensor&, std::string_view)>("fastpt::geglu");
  const bool tanh = is_tanh(gate, up, approximate);
  if (!is_native(gate)) return reference(gate, up, approximate);
  const auto g = gate.contiguous(), u = up.contiguous();
  auto out = at::empty(g.sizes(), g.options());
  by_dtype(g, [&]<typename T>() {
    const auto kernel = tanh ? FASTPT_BY_ISA(geglu_forward<T, true>) : FASTPT_BY_ISA(geglu_forward<T, false>);
    const T *gp = g.const_data_ptr<T>(), *upp = u.const_data_ptr<T>();
    T* op = out.mutable_data_ptr<T>();
    at::parallel_for(0, g.numel(), kGrain,
                     [&](int64_t lo, int64_t hi) { kernel(hi - lo, gp + lo, upp + lo, op + lo); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> geglu_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                                                  std::string_view approximate) {
  static const auto reference = reference_of<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, std::string_view)>("fastpt::geglu_backward");
  const bool tanh = is_tanh(gate, up, approximate);
  if (!is_native(gate)) return reference(grad, gate, up, approximate);
  const auto d = grad.contiguous(), g = gate.contiguous(), u = up.contiguous();
  auto dgate = at::empty(g.sizes(), g.options()), dup = at::empty(g.sizes(), g.options());
  by_dtype(g, [&]<typename T>() {
    const auto kernel = tanh ? FASTPT_BY_ISA(geglu_backward<T, true>) : FASTPT_BY_ISA(geglu_backward<T, false>);
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
  m.impl("geglu", &fastpt::geglu);
  m.impl("geglu_backward", &fastpt::geglu_backward);
}
