// The head on the CPU, in tiles: hidden [N, D] x weight [V, D] panel by panel of the vocabulary, softmax while a tile
// of logits is in cache, gradients from the chunk of logits that was kept or from recomputed tiles. Threads take
// contiguous ranges of panels and sum their own dhidden, added in order. Included by linear_cross_entropy.cpp alone.
#pragma once

#include <array>
#include <cmath>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"

namespace fastpt {

// Of one row within one panel: max of the logits, sum of e^x, x e^x (x = z - max) and z.
struct PanelStats {
  float max;
  double sum, sum_xe, sum_z;  // of float lanes
};

// dz_v = p_v (of_p + of_p_log_p log p_v) + of_all + of_target [v = target], with log p = z - max - log_sum: against a
// rounded logsumexp every p of the row would share its rounding.
struct RowGradient {
  float max, log_sum, of_p, of_p_log_p, of_all, of_target;
  int64_t target;
};

}  // namespace fastpt

#define FASTPT_KERNELS "cpu/linear_cross_entropy_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

constexpr int64_t kBlock = 64;              // rows of a tile
constexpr int64_t kPanelBytes = 512 << 10;  // of packed weight: it stays in L2 beside a tile
constexpr int64_t kChunkBytes = 56 << 20;   // held per chunk of rows: logits, statistics, dhidden sums
constexpr int64_t kMinRows = 128;           // below, packing the head would cost more than multiplying by it

using OptionalTensor = std::optional<at::Tensor>;

struct RowStats {
  float logprob, entropy, max, log_sum, mean_logit;
  bool is_top1;
};

// B [K, N] from its transpose, as gemm_tile wants it.
void pack_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const c10::BFloat16* Bt, c10::BFloat16* packed) {
  pack_vnni_transposed(K, N, ldbt, ldp, Bt, packed);
}
void pack_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const float* Bt, float* packed) {
  transpose(N, K, ldbt, ldp, Bt, packed);
}

// The same from B itself: float needs no packing.
const c10::BFloat16* pack(int64_t K, int64_t N, int64_t ldb, const c10::BFloat16* B, c10::BFloat16* packed) {
  pack_vnni(K, N, ldb, N, B, packed);
  return packed;
}
const float* pack(int64_t, int64_t, int64_t, const float* B, float*) {
  return B;
}

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct Gradients {
  at::Tensor hidden, weight, bias;  // undefined where not wanted; weight and bias in float
};

// The arguments of the ops, made contiguous, and the loop over chunks of kept rows.
template <typename T>
class Head {
 public:
  Head(const char* name, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
       const OptionalTensor& kept, int64_t ignore_index, const OptionalTensor& bias, std::optional<double> softcap,
       double logit_scale)
      : hidden_(hidden.contiguous()),
        weight_(weight.contiguous()),
        targets_(targets.contiguous()),
        scale_(static_cast<float>(logit_scale)),
        softcap_(static_cast<float>(softcap.value_or(0.0))),
        D_(hidden.size(1)),
        V_(weight.size(0)) {
    if (bias) bias_ = bias->to(at::kFloat).contiguous();
    const int64_t* y = targets_.const_data_ptr<int64_t>();
    if (kept) {
      const auto indices = kept->contiguous();
      const int64_t* k = indices.const_data_ptr<int64_t>();
      kept_.assign(k, k + indices.numel());
    } else {
      for (int64_t t = 0; t < targets_.numel(); ++t)
        if (y[t] != ignore_index) kept_.push_back(t);
    }
    for (const int64_t t : kept_) {
      TORCH_CHECK(t >= 0 && t < hidden_.size(0), name, ": kept row ", t, " is not in [0, ", hidden_.size(0), ")");
      TORCH_CHECK(y[t] >= 0 && y[t] < V_, name, ": target ", y[t], " of row ", t, " is not in [0, ", V_,
                  "), nor the ignore_index ", ignore_index);
    }
    const int64_t fitting = kPanelBytes / std::max<int64_t>(1, D_ * static_cast<int64_t>(sizeof(T)));
    panel_ = std::min(std::clamp<int64_t>(fitting / 32 * 32, 32, 256), round_up(std::max<int64_t>(V_, 1), 32));
    panels_ = (V_ + panel_ - 1) / panel_;
    slots_ = std::clamp<int64_t>(panels_, 1, at::get_num_threads());
    stride_ = round_up(D_, 2);
  }

  int64_t size() const { return static_cast<int64_t>(kept_.size()); }
  int64_t row(int64_t i) const { return kept_[start_ + i]; }
  int64_t target(int64_t i) const { return targets_.const_data_ptr<int64_t>()[row(i)]; }
  int64_t classes() const { return V_; }

  Gradients gradients(std::array<bool, 5> wants) const {
    const auto wide = hidden_.options().dtype(at::kFloat);
    Gradients out;
    if (wants[0]) out.hidden = at::zeros(hidden_.sizes(), hidden_.options());
    if (wants[1]) out.weight = at::zeros(weight_.sizes(), wide);
    if (wants[2]) out.bias = at::zeros({V_}, wide);
    return out;
  }

  // Calls body(rows) for chunk after chunk; within it the members below speak of that chunk.
  template <typename Body>
  void each_chunk(bool keeps_logits, const Gradients& out, Body&& body) {
    keeps_logits_ = keeps_logits;
    const int64_t floats = panels_ * static_cast<int64_t>((keeps_logits ? panel_ : 0) + sizeof(PanelStats) / 4) +
                           (out.hidden.defined() ? slots_ * D_ : D_);
    const int64_t most = std::max(kMinRows, kChunkBytes / 4 / std::max<int64_t>(1, floats));
    const int64_t chunks = (size() + most - 1) / most;
    padded_ = chunks == 0 ? 0 : round_up((size() + chunks - 1) / chunks, 16);
    allocate(out);
    for (start_ = 0; start_ < size(); start_ += padded_) {
      rows_ = std::min(padded_, size() - start_);
      gather();
      body(rows_);
    }
  }

  // Softmax statistics of the chunk's rows; keeps the logits when gradients() is to use them.
  std::vector<RowStats> statistics();

  // Adds what the gradient of the chunk's logits, given row by row, means for the inputs.
  void add_gradients(const std::vector<RowGradient>& gradient, Gradients& out);

 private:
  template <typename U>
  static U* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<U>() : nullptr;
  }

  void allocate(const Gradients& out) {
    const auto same = hidden_.options(), wide = same.dtype(at::kFloat);
    chunk_ = at::zeros({padded_, stride_}, same);
    packed_ = at::empty({slots_, panel_ * stride_}, same);
    tiles_ = keeps_logits_ ? at::empty({panels_, padded_, panel_}, wide) : at::empty({slots_, kBlock, panel_}, wide);
    if (out.hidden.defined() || out.weight.defined() || out.bias.defined())
      dz_ = at::empty({slots_, kBlock, panel_}, same);
    if (out.hidden.defined()) {
      packed_rows_ = at::empty({slots_, panel_ * D_}, same);
      dhidden_ = at::empty({slots_, padded_, D_}, wide);
    }
    if (out.weight.defined()) {
      packed_chunk_ = at::empty({padded_ * D_}, same);
      dz_transposed_ = at::empty({slots_, panel_, padded_}, same);
    }
  }

  // The chunk's hidden rows; rows past the last are zeros, so that tiles have few different heights.
  void gather() {
    T* to = data<T>(chunk_);
    const T* from = hidden_.const_data_ptr<T>();
    for (int64_t i = 0; i < rows_; ++i) std::copy_n(from + row(i) * D_, D_, to + i * stride_);
    std::fill(to + rows_ * stride_, to + padded_ * stride_, T(0));
  }

  // body(slot, panel) for every panel; a slot is one thread's contiguous range of panels and its scratch memory.
  template <typename Body>
  void over_panels(Body&& body) const {
    at::parallel_for(0, slots_, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t slot = lo; slot < hi; ++slot)
        for (int64_t p = first_panel(slot); p < first_panel(slot + 1); ++p) body(slot, p);
      gemm_release();
    });
  }
  int64_t first_panel(int64_t slot) const { return panels_ * slot / slots_; }
  int64_t columns(int64_t p) const { return std::min(panel_, V_ - p * panel_); }
  int64_t height(int64_t r0) const { return std::min(kBlock, round_up(rows_, 16) - r0); }

  T* packed_panel(int64_t slot) const { return data<T>(packed_) + slot * panel_ * stride_; }
  float* tile(int64_t slot, int64_t p, int64_t r0) const {
    return data<float>(tiles_) + (keeps_logits_ ? (p * padded_ + r0) * panel_ : slot * kBlock * panel_);
  }

  void pack_panel(int64_t slot, int64_t p) const {
    pack_transposed(D_, columns(p), D_, panel_, weight_.const_data_ptr<T>() + p * panel_ * D_, packed_panel(slot));
  }

  float* compute_logits(int64_t slot, int64_t p, int64_t r0) const {
    float* z = tile(slot, p, r0);
    const T *rows = data<T>(chunk_) + r0 * stride_, *packed = packed_panel(slot);
    for (int64_t k = 0; k < D_; k += kDepth)
      gemm_tile(height(r0), columns(p), std::min(kDepth, D_ - k), stride_, panel_, panel_, k > 0, rows + k,
                packed + k * panel_, z);
    const float* bias = bias_.defined() ? data<float>(bias_) + p * panel_ : nullptr;
    FASTPT_BY_ISA(finish_logits)(height(r0), columns(p), panel_, bias, scale_, softcap_, z);
    return z;
  }

  RowStats combine(const std::vector<PanelStats>& partial, int64_t r, float target_logit) const;

  // Depth of a float sum before it joins the others: one sum over all of D would round more than eager's blocks do.
  static constexpr int64_t kDepth = std::is_same_v<T, float> ? 64 : std::numeric_limits<int64_t>::max();

  at::Tensor hidden_, weight_, targets_, bias_;
  std::vector<int64_t> kept_;
  float scale_, softcap_;
  int64_t D_, V_, slots_, panel_, panels_, stride_;
  bool keeps_logits_ = false;
  int64_t padded_ = 0, start_ = 0, rows_ = 0;  // of the chunk: height of its buffers, first kept row, rows
  at::Tensor chunk_, packed_, tiles_, dz_, packed_rows_, dhidden_, packed_chunk_, dz_transposed_;
};

template <typename T>
std::vector<RowStats> Head<T>::statistics() {
  std::vector<PanelStats> partial(panels_ * padded_);
  std::vector<float> target_logit(rows_);
  over_panels([&](int64_t slot, int64_t p) {
    pack_panel(slot, p);
    for (int64_t r0 = 0; r0 < rows_; r0 += kBlock) {
      const float* z = compute_logits(slot, p, r0);
      const int64_t valid = std::min(kBlock, rows_ - r0);
      FASTPT_BY_ISA(tile_statistics)(valid, columns(p), panel_, z, partial.data() + p * padded_ + r0);
      for (int64_t r = 0; r < valid; ++r) {
        const int64_t j = target(r0 + r) - p * panel_;
        if (j >= 0 && j < columns(p)) target_logit[r0 + r] = z[r * panel_ + j];
      }
    }
  });
  std::vector<RowStats> stats(rows_);
  at::parallel_for(0, rows_, 16, [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) stats[r] = combine(partial, r, target_logit[r]);
  });
  return stats;
}

// The panels' sums brought to one maximum, in double and in the order of the vocabulary.
template <typename T>
RowStats Head<T>::combine(const std::vector<PanelStats>& partial, int64_t r, float target_logit) const {
  float max = std::numeric_limits<float>::lowest();
  for (int64_t p = 0; p < panels_; ++p) max = std::max(partial[p * padded_ + r].max, max);
  double sum = 0, sum_xe = 0, sum_z = 0;
  for (int64_t p = 0; p < panels_; ++p) {
    const PanelStats& s = partial[p * padded_ + r];
    const double shift = static_cast<double>(s.max) - max, factor = std::exp(shift);
    sum += factor * s.sum;
    sum_xe += factor * (s.sum_xe + s.sum * shift);
    sum_z += s.sum_z;
  }
  const double log_sum = std::log(sum);
  return {static_cast<float>(static_cast<double>(target_logit) - max - log_sum),
          static_cast<float>(log_sum - sum_xe / sum),
          max,
          static_cast<float>(log_sum),
          static_cast<float>(sum_z / static_cast<double>(V_)),
          target_logit >= max};
}

template <typename T>
void Head<T>::add_gradients(const std::vector<RowGradient>& gradient, Gradients& out) {
  const T* weight = weight_.const_data_ptr<T>();
  const int64_t padded = round_up(rows_, 16);
  const T* chunk_as_b = nullptr;
  if (out.weight.defined()) chunk_as_b = pack(padded, D_, stride_, data<T>(chunk_), data<T>(packed_chunk_));
  const int64_t chunk_ldb = std::is_same_v<T, float> ? stride_ : D_;
  std::vector<float> at_target(rows_);
  over_panels([&](int64_t slot, int64_t p) {
    const int64_t n = columns(p), first = p * panel_;
    T* dz = data<T>(dz_) + slot * kBlock * panel_;
    T* dz_transposed = data<T>(dz_transposed_) + slot * panel_ * padded_;
    float* dbias = out.bias.defined() ? data<float>(out.bias) + first : nullptr;
    const T* panel_as_b = nullptr;
    if (!keeps_logits_) pack_panel(slot, p);
    if (out.hidden.defined())
      panel_as_b = pack(n, D_, D_, weight + first * D_, data<T>(packed_rows_) + slot * panel_ * D_);
    for (int64_t r0 = 0; r0 < rows_; r0 += kBlock) {
      float* z = keeps_logits_ ? tile(slot, p, r0) : compute_logits(slot, p, r0);
      const int64_t valid = std::min(kBlock, rows_ - r0), h = height(r0);
      FASTPT_BY_ISA(tile_gradient<T>)
      (valid, n, panel_, z, gradient.data() + r0, first, scale_, softcap_, dbias, at_target.data() + r0, panel_, dz);
      std::fill(dz + valid * panel_, dz + h * panel_, T(0));
      if (out.hidden.defined())
        gemm_tile(h, D_, n, panel_, D_, D_, p != first_panel(slot), dz, panel_as_b,
                  data<float>(dhidden_) + (slot * padded_ + r0) * D_);
      if (out.weight.defined()) transpose(h, n, panel_, padded_, dz, dz_transposed + r0);
    }
    if (!out.weight.defined()) return;
    float* dweight = data<float>(out.weight) + first * D_;
    gemm_tile(n, D_, padded, padded_, chunk_ldb, D_, true, dz_transposed, chunk_as_b, dweight);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t j = target(r) - first;
      if (j >= 0 && j < n)
        FASTPT_BY_ISA(add_scaled<T>)(D_, at_target[r], data<T>(chunk_) + r * stride_, dweight + j * D_);
    }
  });
  if (!out.hidden.defined()) return;
  at::parallel_for(0, rows_, 16, [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) FASTPT_BY_ISA(sum_parts<T>)
    (D_, slots_, padded_ * D_, data<float>(dhidden_) + r * D_, at_target[r], weight + target(r) * D_,
     data<T>(out.hidden) + row(r) * D_);
  });
}

}  // namespace
}  // namespace fastpt
