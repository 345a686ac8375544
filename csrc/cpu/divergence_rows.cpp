// divergence_rows for float and bfloat16 on the CPU; the definition is fastpt/ops/linear_divergence.py: rows_reference.
#include <optional>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/divergence_rows_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

Tensor divergence_rows(const Tensor& z, const Tensor& teacher, const std::optional<Tensor>& row_weight, double beta,
                       double temperature, const Tensor& gradient) {
  static const auto reference =
      reference_of<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, double, const Tensor&)>(
          "fastpt::divergence_rows");
  TORCH_CHECK(z.dim() == 2 && z.sizes() == teacher.sizes() && z.sizes() == gradient.sizes() &&
                  z.scalar_type() == gradient.scalar_type(),
              "divergence_rows: z is ", z.sizes(), ", teacher ", teacher.sizes(), ", gradient ", gradient.sizes(), " ",
              gradient.scalar_type(), "; all must be [N, V], the gradient of z's dtype ", z.scalar_type());
  if (!is_native(z) || !is_native(teacher) || !gradient.is_contiguous())
    return reference(z, teacher, row_weight, beta, temperature, gradient);
  const int64_t rows = z.size(0), V = z.size(1);
  auto found = at::empty({rows}, z.options().dtype(at::kFloat));
  if (z.numel() == 0) return found.zero_();
  const auto own = z.contiguous(), theirs = teacher.contiguous();
  const auto weights = row_weight ? row_weight->to(at::kFloat).contiguous() : Tensor();
  by_dtype(z, [&]<typename T>() {
    by_dtype(theirs, [&]<typename U>() {
      const auto kernel = FASTPT_BY_ISA(divergence_row<T, U>);
      const T* zp = own.const_data_ptr<T>();
      T* gp = gradient.mutable_data_ptr<T>();
      const U* tp = theirs.const_data_ptr<U>();
      const float* wp = row_weight ? weights.const_data_ptr<float>() : nullptr;
      float* fp = found.mutable_data_ptr<float>();
      at::parallel_for(0, rows, 1, [&](int64_t lo, int64_t hi) {
        std::vector<float> scratch(2 * V);
        for (int64_t i = lo; i < hi; ++i)
          fp[i] = static_cast<float>(kernel(V, zp + i * V, tp + i * V, gp + i * V, wp == nullptr ? 1.0f : wp[i],
                                            static_cast<float>(beta), static_cast<float>(temperature), scratch.data(),
                                            scratch.data() + V));
      });
    });
  });
  return found;
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("divergence_rows", &fastpt::divergence_rows);
}
