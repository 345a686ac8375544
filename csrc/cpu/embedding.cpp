// embedding on the CPU: rows copied; in the backward every thread owns a range of the vocabulary and adds its tokens in
// their order, so the sums are the same for any number of threads. The definition is fastpt/ops/embedding.py.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/embedding_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

constexpr size_t kAlignment = 64;

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

// Memory of large gradients that were let go, kept for the next step. A fresh one costs a page fault every 4 KiB: 47 MB
// of MiniLM's vocabulary took 20 to 40 ms on two Zen 5 cores in a virtual machine, zeroing what is there 1 to 3 ms.
class KeptBlocks {
 public:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto at = blocks_.begin(); at != blocks_.end(); ++at) {
      if (at->first != bytes) continue;
      void* memory = at->second;
      blocks_.erase(at);
      return memory;
    }
    return nullptr;
  }

  void give(size_t bytes, void* memory) {
    const std::lock_guard lock(mutex_);
    blocks_.emplace_back(bytes, memory);
    if (blocks_.size() <= kMost) return;
    std::free(blocks_.front().second);
    blocks_.erase(blocks_.begin());
  }

 private:
  static constexpr size_t kMost = 2;  // input and output embeddings of one model
  std::mutex mutex_;
  std::vector<std::pair<size_t, void*>> blocks_;
};

constexpr size_t kLarge = size_t{1} << 25;  // from here on malloc always maps and unmaps

// Zeros of the system's: a large calloc is mapped, not written, so a page costs nothing until a token's row is in it
// (at::zeros would write all of them: see benchmarks/ops/bench_embedding.py). Large ones come back to be used again.
Tensor untouched_zeros(int64_t rows, int64_t columns) {
  static KeptBlocks& kept = *new KeptBlocks;  // outlives tensors that are freed at exit
  const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(columns) * sizeof(float);
  void* memory = bytes >= kLarge ? kept.take(bytes) : nullptr;
  const bool is_used = memory != nullptr;
  if (!is_used) memory = std::calloc(bytes + kAlignment, 1);
  TORCH_CHECK(memory != nullptr, "embedding: no memory for a gradient of ", bytes, " bytes");
  const auto address = reinterpret_cast<uintptr_t>(memory);
  float* aligned = reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
  if (is_used)
    at::parallel_for(0, rows * columns, int64_t{1} << 20,
                     [&](int64_t lo, int64_t hi) { std::fill(aligned + lo, aligned + hi, 0.0f); });
  const auto done = [memory, bytes](void*) {
    if (bytes >= kLarge) {
      kept.give(bytes, memory);
    } else {
      std::free(memory);
    }
  };
  return at::from_blob(aligned, {rows, columns}, done, at::TensorOptions().dtype(at::kFloat));
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
  auto sums = untouched_zeros(rows, D);
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
