// dora_norm for float and bfloat16 weights on the CPU: tiles of W, to which s B A is added while they are in the cache.
// The definition is fastpt/ops/dora_norm.py.
#include <algorithm>
#include <cmath>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/tasks.h"
#define FASTPT_KERNELS "cpu/dora_norm_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

constexpr int64_t kDepth = 64;
constexpr int64_t kTileRows = 64, kTileColumns = 256;  // with a panel of A 80 KB at rank 16: within a core's L2

Tensor dora_norm(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scale) {
  static const auto reference =
      reference_of<Tensor(const Tensor&, const Tensor&, const Tensor&, double)>("fastpt::dora_norm");
  if (!is_native(weight) || lora_a.scalar_type() == at::kDouble) return reference(weight, lora_a, lora_b, scale);
  const int64_t O = weight.size(0), D = weight.size(1), R = lora_a.size(0);
  const auto w = weight.contiguous(), a = lora_a.to(at::kFloat).contiguous(),
             b = lora_b.to(at::kFloat).mul(scale).contiguous();
  auto out = at::empty({O}, weight.options().dtype(at::kFloat));
  float* norms = out.mutable_data_ptr<float>();
  const float *ap = a.const_data_ptr<float>(), *bp = b.const_data_ptr<float>();
  by_dtype(w, [&]<typename T>() {
    const auto widen = FASTPT_BY_ISA(widen_tile<T>);
    const auto square = FASTPT_BY_ISA(add_squares);
    const T* wp = w.const_data_ptr<T>();
    auto scratch = at::empty({at::get_num_threads(), kTileRows * kTileColumns}, out.options());
    float* tiles = scratch.mutable_data_ptr<float>();
    for_each_task((O + kTileRows - 1) / kTileRows, [&](int64_t worker, int64_t task) {
      float* tile = tiles + worker * kTileRows * kTileColumns;
      const int64_t first = task * kTileRows, rows = std::min(kTileRows, O - first);
      float* sums = norms + first;
      std::fill(sums, sums + rows, 0.0f);
      for (int64_t d = 0; d < D; d += kTileColumns) {
        const int64_t columns = std::min(kTileColumns, D - d);
        widen(rows, columns, wp + first * D + d, D, tile, kTileColumns);
        for (int64_t k = 0; k < R; k += kDepth)  // a longer float32 sum would round more than a library's
          gemm_tile(rows, columns, std::min(kDepth, R - k), R, D, kTileColumns, true, bp + first * R + k,
                    ap + k * D + d, tile);
        square(rows, columns, tile, kTileColumns, sums);
      }
      for (int64_t r = 0; r < rows; ++r) sums[r] = std::sqrt(sums[r]);
    });
  });
  return out;
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("dora_norm", &fastpt::dora_norm);
}
