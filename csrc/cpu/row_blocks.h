// Column sums over many rows that come out bit for bit the same for any number of threads: rows are cut into blocks by
// their count alone, every block fills its own float32 partial row, and the partials are added in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace fastpt {

constexpr int64_t kRowGrain = 16384;  // elements per task: below this a thread costs more than it saves

inline int64_t row_grain(int64_t width) {
  return std::max<int64_t>(1, kRowGrain / std::max<int64_t>(1, width));
}

// Calls body(first_row, end_row, partial) for every block, in parallel; partial is the block's zeroed row of `columns`
// floats. Returns the sums [columns]. At most 64 partials, of at least 32 rows each.
template <typename Body>
at::Tensor sum_row_blocks(int64_t rows, int64_t width, int64_t columns, const at::TensorOptions& options, Body&& body) {
  const int64_t per_block = std::max<int64_t>(32, (rows + 63) / 64), blocks = (rows + per_block - 1) / per_block;
  auto sums = at::zeros({columns}, options), partials = at::zeros({blocks, columns}, options);
  float *sum = sums.mutable_data_ptr<float>(), *partial = partials.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, row_grain(per_block * width), [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b) body(b * per_block, std::min(rows, (b + 1) * per_block), partial + b * columns);
  });
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < columns; ++i) sum[i] += partial[b * columns + i];
  return sums;
}

// Sums in the dtype that an op was asked to store them in. A copy in every case: an op's outputs may not share memory.
inline at::Tensor stored(const at::Tensor& sums, std::optional<at::ScalarType> dtype) {
  return sums.to(dtype.value_or(at::kFloat), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace fastpt
