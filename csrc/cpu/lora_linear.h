// lora_linear on the CPU, what forward and backward share: the projections of one call, operands packed for gemm_tile,
// and adapters in parts. A float32 adapter beside bfloat16 activations enters as three bfloat16 parts that add up to it
// exactly, so its products run on the bfloat16 units and lose nothing. The definition is fastpt/ops/lora_linear.py.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/dropout.h"
#include "cpu/gemm.h"
#include "cpu/nf4.h"
#include "cpu/tasks.h"

namespace fastpt {

constexpr int64_t kRows = 128;  // rows of a tile: with kPanel columns in float32 it fills most of L1
constexpr int64_t kPanel = 64;

inline int64_t even(int64_t n) {
  return n + n % 2;
}

// Everything about a call but the data.
struct Projection {
  at::Tensor
      weight;  // [O, D], of x's dtype or float32, it or its transpose contiguous; or contiguous bytes [O, D / 2] of
  std::optional<Nf4Weight> nf4;
  at::Tensor bias;  // float32 [O], or undefined
  at::Tensor a, b;  // [R, D], [O, R], both float32 or both of x's dtype, contiguous, or undefined
  float scale;
  int64_t seed;

  int64_t out() const { return weight.size(0); }
  int64_t in() const { return weight.size(1) * (nf4 ? 2 : 1); }
  int64_t rank() const { return a.defined() ? a.size(0) : 0; }
};

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// What 4-bit weights come with: their scales, none for other weights.
struct Nf4Lists {
  const OptionalTensors &absmax, &nested;
};

// A matrix as a projection holds it.
inline at::Tensor dense(const at::Tensor& matrix) {
  return matrix.t().is_contiguous() ? matrix : matrix.contiguous();
}

std::vector<Projection> read_projections(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                         const OptionalTensors& lora_a, const OptionalTensors& lora_b,
                                         at::ArrayRef<double> scales, at::ArrayRef<int64_t> seeds,
                                         const Nf4Lists* nf4 = nullptr);

inline OptionalTensors no_tensors(size_t n) {
  OptionalTensors none;
  for (size_t i = 0; i < n; ++i) none.push_back(std::nullopt);
  return none;
}

inline bool any_nf4(const std::vector<Projection>& projections) {
  return std::any_of(projections.begin(), projections.end(), [](const Projection& p) { return p.nf4.has_value(); });
}

// x as rows [T, D], contiguous; an odd width of bfloat16 gets a zero column, which gemm_tile reads.
at::Tensor gemm_rows(const at::Tensor& x);

// Dropout of the low-rank term's input: the rule picks, sums over what is kept are multiplied by the factor.
struct Dropout {
  explicit Dropout(double p) : drops(p > 0), factor(dropout_of(p).scale), rule{dropout_of(p).threshold, 1.0f} {}
  bool drops;
  float factor;
  DropoutRule rule;
};

// x [T, D] with zeros where the projection's seed drops it.
at::Tensor dropped(const at::Tensor& x, const Dropout& dropout, int64_t seed);

// y [T, O] and the low-rank hidden xa [T, R] of each projection, for rows x as gemm_rows gives them. On all threads;
// inside a parallel region on the caller's, with the same result.
void project(const at::Tensor& x, const std::vector<Projection>& projections, const Dropout& dropout,
             std::vector<at::Tensor>& ys, std::vector<at::Tensor>& xas);

// Which gradients are wanted of one projection.
struct Wants {
  bool weight, bias, a, b;
};

// Where they go: x's like x, those of weights in float32 or x's dtype, the others float32.
struct Gradients {
  at::Tensor x;
  std::vector<at::Tensor> weights, biases, a, b;
};

// The backward of project, on threads as project is; what is not wanted is left alone.
void project_backward(const at::Tensor& x, const std::vector<Projection>& projections, at::TensorList grads,
                      const std::vector<at::Tensor>& xas, const Dropout& dropout, bool wants_x,
                      const std::vector<Wants>& wants, Gradients& out);

// Into how many numbers of type T one number of an adapter goes.
template <typename T>
int64_t parts_of(const at::Tensor& adapter) {
  return std::is_same_v<T, c10::BFloat16> && adapter.scalar_type() == at::kFloat ? 3 : 1;
}

// The parts of each row (a [R, D] -> [parts * R, D]), or of each column (b [O, R] -> [O, parts * R]).
at::Tensor row_parts(const at::Tensor& a, int64_t parts);
at::Tensor column_parts(const at::Tensor& b, int64_t parts);

using Jobs = std::vector<std::function<void()>>;

inline void run(const Jobs& jobs) {
  for_each_task(jobs.size(), [&](int64_t, int64_t i) { jobs[i](); });
}

// The second operand [depth, columns] of a product in panels of kPanel columns, as gemm_tile reads them.
template <typename T>
class Packed {
 public:
  Packed() = default;
  Packed(int64_t depth, int64_t columns) : depth_(depth), columns_(columns) {}  // its panels come from elsewhere
  Packed(int64_t depth, int64_t columns, const at::TensorOptions& options)
      : depth_(depth),
        columns_(columns),
        data_(at::empty({panels(), even(depth), kPanel}, options)),
        panel_0_(data_.mutable_data_ptr<T>()) {}

  int64_t depth() const { return depth_; }
  int64_t panels() const { return (columns_ + kPanel - 1) / kPanel; }
  int64_t width(int64_t p) const { return std::min(kPanel, columns_ - p * kPanel); }
  const T* panel(int64_t p) const { return panel_0_ + p * even(depth_) * kPanel; }

  // Jobs that fill it from rows, B[k, n] = source[k, n] (zeros after the last one), or from columns, B[k, n] =
  // source[n, k]; source [.., ..] is of T or float32 and contiguous, and must outlive them. Each reads whole rows.
  void add_rows(Jobs& jobs, const at::Tensor& source) {
    for (int64_t k = 0; k < even(depth_); k += kPanel)
      add_job(jobs, source, [this, k](const auto* from, int64_t rows, int64_t ld) { fill_rows(k, from, rows, ld); });
  }
  void add_transposed(Jobs& jobs, const at::Tensor& source) {
    for (int64_t p = 0; p < panels(); ++p)
      add_job(jobs, source, [this, p](const auto* from, int64_t, int64_t ld) { fill_transposed(p, from, ld); });
  }
  // From a matrix B, it or its transpose contiguous.
  void add(Jobs& jobs, const at::Tensor& source) {
    if (source.is_contiguous()) {
      add_rows(jobs, source);
    } else {
      add_transposed(jobs, source.t());
    }
  }

 private:
  template <typename Fill>
  static void add_job(Jobs& jobs, const at::Tensor& source, Fill fill) {
    jobs.push_back([source, fill] {
      if (source.scalar_type() == c10::CppTypeToScalarType<T>::value)
        fill(source.const_data_ptr<T>(), source.size(0), source.size(1));
      else
        fill(source.const_data_ptr<float>(), source.size(0), source.size(1));
    });
  }
  template <typename S>
  void fill_rows(int64_t first, const S* source, int64_t rows, int64_t ld);
  template <typename S>
  void fill_transposed(int64_t p, const S* source, int64_t ld);

  int64_t depth_ = 0, columns_ = 0;
  at::Tensor data_;
  T* panel_0_ = nullptr;
};

// Panel p of a 4-bit weight as it would stand in a Packed: of its transpose (columns are kPanel of its rows), or of
// itself. A whole weight is never unpacked.
template <typename T>
void unpack_transposed(const Projection& projection, int64_t p, T* panel);
template <typename T>
void unpack_columns(const Projection& projection, int64_t p, T* panel);

// For how many row tiles a task unpacks a panel: for all, or fewer where that leaves threads without a task.
inline int64_t tiles_of_unpacked(int64_t panels, int64_t tiles) {
  const int64_t shares = (4 * at::get_num_threads() + panels - 1) / panels;
  return std::max(std::min<int64_t>(tiles, 4), (tiles + shares - 1) / shares);
}

// C [rows, columns] (+)= A · B where B is the first `depth` rows of a panel. float32 sums are cut: one long sum would
// round more than the blocks of a library's GEMM do. Rows go as a multiple of 16 and a rest, so that there are few
// different heights: each is a kernel of its own that brgemm compiles and keeps.
template <typename T>
void multiply(int64_t rows, int64_t columns, int64_t depth, int64_t lda, const T* a, const T* panel, bool accumulate,
              int64_t ldc, float* c) {
  constexpr int64_t kDepth = std::is_same_v<T, float> ? 64 : int64_t{1} << 40;
  const int64_t whole = rows / 16 * 16;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t n = std::min(kDepth, depth - k);
    const bool adds = accumulate || k > 0;
    const T* b = panel + k * kPanel;
    if (whole > 0) gemm_tile(whole, columns, n, lda, kPanel, ldc, adds, a + k, b, c);
    if (whole < rows)
      gemm_tile(rows - whole, columns, n, lda, kPanel, ldc, adds, a + whole * lda + k, b, c + whole * ldc);
  }
}

// [rows, padded], of which only the columns that pad `columns` are written, with zeros.
template <typename T>
at::Tensor empty_padded(int64_t rows, int64_t columns, int64_t padded, const at::TensorOptions& options) {
  auto out = at::empty({rows, padded}, options);
  T* data = out.mutable_data_ptr<T>();
  for (int64_t r = 0; r < rows; ++r) std::fill(data + r * padded + columns, data + (r + 1) * padded, T(0.0f));
  return out;
}

// A piece of scratch memory for each worker.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t numbers, const at::TensorOptions& options)
      : stride_((numbers + 63) / 64 * 64), data_(at::empty({at::get_num_threads(), stride_}, options)) {}
  T* of(int64_t worker) const { return data_.template mutable_data_ptr<T>() + worker * stride_; }

 private:
  int64_t stride_;
  at::Tensor data_;
};

inline int64_t row_tiles(int64_t n) {
  return (n + kRows - 1) / kRows;
}

// What the ops return of native dtypes: ys and xas; dx, dweights, dbiases, da and db.
using LinearOutputs = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
using LinearGradients = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
                                   std::vector<at::Tensor>, std::vector<at::Tensor>>;
LinearOutputs linear_forward(const at::Tensor& x, const std::vector<Projection>& projections, double dropout_p);
LinearGradients linear_backward(at::TensorList grads, const at::Tensor& x, const std::vector<Projection>& projections,
                                at::TensorList xas, double dropout_p, bool wants_x, const c10::List<bool>& wants);

// The gradients in their tensors' dtypes, all but those of biases.
inline LinearGradients rounded(LinearGradients grads, at::TensorList weights, const OptionalTensors& lora_a,
                               const OptionalTensors& lora_b) {
  auto& [dx, dweights, dbiases, da, db] = grads;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].is_floating_point()) dweights[i] = dweights[i].to(weights[i].scalar_type());
    if (const auto a = lora_a.get(i)) da[i] = da[i].to(a->scalar_type());
    if (const auto b = lora_b.get(i)) db[i] = db[i].to(b->scalar_type());
  }
  return grads;
}

}  // namespace fastpt
