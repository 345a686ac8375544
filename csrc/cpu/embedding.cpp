// embedding on the CPU: rows copied; in the backward every thread owns a range of the vocabulary and adds its tokens in
// their order, so the sums are the same for any number of threads. The definition is fastpt/ops/embedding.py.
#include <algorithm>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/embedding_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

void check(const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t t = 0; t < count; ++t)
    TORCH_CHECK_INDEX(ids[t] >= 0 && ids[t] < rows, "embedding: id ", ids[t], " of token ", t, " is not in [0, ", rows,
                      ")");
}

Tensor embedding(const Tensor& ids, const Tensor& weight) {
  static const auto reference = reference_of<Tensor(const Tensor&, const Tensor&)>("fastpt::embedding");
  if (!is_native(weight)) return reference(ids, weight);
  const auto index = ids.contiguous(), table = weight.contiguous();
  const int64_t D = weight.size(1), tokens = ids.numel();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  check(rows, tokens, weight.size(0));
  auto shape = ids.sizes().vec();
  shape.push_back(D);
  auto out = at::empty(shape, weight.options());
  by_dtype(weight, [&]<typename T>() {
    const T* from = table.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, tokens, row_grain(D), [&](int64_t lo, int64_t hi) {
      for (int64_t t = lo; t < hi; ++t) std::copy_n(from + rows[t] * D, D, to + t * D);
    });
  });
  return out;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, int64_t rows, int64_t padding_idx,
                          at::ScalarType dtype) {
  static const auto reference = reference_of<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, at::ScalarType)>(
      "fastpt::embedding_backward");
  if (!is_native(grad)) return reference(grad, ids, rows, padding_idx, dtype);
  const auto index = ids.contiguous(), dense = grad.contiguous();
  const int64_t D = grad.size(-1), tokens = ids.numel();
  const int64_t* row = index.const_data_ptr<int64_t>();
  check(row, tokens, rows);
  auto sums = at::empty({rows, D}, dense.options().dtype(at::kFloat));
  float* zeroed = sums.mutable_data_ptr<float>();
  at::parallel_for(0, rows * D, int64_t{1} << 20,
                   [&](int64_t lo, int64_t hi) { std::fill(zeroed + lo, zeroed + hi, 0.0f); });
  // Ranges with about equally many tokens: the ids of language crowd at the low end.
  const int64_t ranges = std::clamp<int64_t>(tokens * D / kRowGrain, 1, at::get_num_threads());
  std::vector<int64_t> sorted(row, row + tokens), bounds(ranges + 1, rows);
  std::sort(sorted.begin(), sorted.end());
  bounds[0] = 0;
  for (int64_t r = 1; r < ranges; ++r) bounds[r] = sorted[tokens * r / ranges];
  by_dtype(dense, [&]<typename T>() {
    const T* from = dense.const_data_ptr<T>();
    float* to = sums.mutable_data_ptr<float>();
    at::parallel_for(0, ranges, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t t = 0; t < tokens; ++t) {
        if (row[t] >= bounds[lo] && row[t] < bounds[hi] && row[t] != padding_idx)
          FASTPT_BY_ISA(add_row<T>)(D, from + t * D, to + row[t] * D);
      }
    });
  });
  return sums.to(dtype);
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("embedding", &fastpt::embedding);
  m.impl("embedding_backward", &fastpt::embedding_backward);
}
