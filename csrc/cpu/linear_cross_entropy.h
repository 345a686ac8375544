// The head on the CPU, panel by panel of the vocabulary: logits^T [n, tokens] = weight [n, D] x hidden^T, so that the
// weight is read as it lies, softmax statistics run along vectors of tokens, and e^(z - shift), rounded once, is at the
// same time an operand of dhidden^T += weight^T [D, n] x e (summed as flash attention does, one pass and two GEMMs) and
// of dweight [n, D] = e x hidden, which needs e kept for a chunk of tokens. Threads take contiguous ranges of panels.
// Included by linear_cross_entropy.cpp alone.
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

constexpr int64_t kBlock = 64;  // tokens of a tile
constexpr float kSlack = 8.0f;  // e^8 leaves every dtype its relative precision

// The running softmax of tokens over a range of classes: sums of e^x, x e^x (x = z - shift) and z.
struct Softmax {
  float *max, *shift;
  double *sum, *sum_xe, *sum_z;
};

// dz_v = p_v (of_p + of_p_log_p log p_v) + of_all + of_target [v = target] of each token, with log p = z - max -
// log_sum: against a rounded logsumexp every p of the token would share its rounding.
struct TokenGradients {
  const float *max, *log_sum, *of_p, *of_p_log_p, *of_all, *of_target;
};

}  // namespace fastpt

#define FASTPT_KERNELS "cpu/linear_cross_entropy_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

constexpr int64_t kPanel = 384;            // classes of a panel: as deep as dhidden's GEMM needs, weight^T stays in L2
constexpr int64_t kChunkBytes = 56 << 20;  // held per chunk of tokens
constexpr int64_t kMinRows = 128;          // below, reading the head would cost more than multiplying by it

using OptionalTensor = std::optional<at::Tensor>;

struct RowStats {
  double logprob, entropy, max, log_sum, mean_logit;
  bool is_top1;
};

// Of one row, what its dz is made of while the softmax runs: dz_v = of_p p_v + of_target [v = target].
struct LossGradient {
  double of_p, of_target;
};

struct Gradients {
  at::Tensor hidden, weight, bias;  // undefined where not wanted; weight and bias in float
};

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// B [K, N] from its transpose, and from B itself, as gemm_tile wants it: bfloat16 in pairs of rows, float as it is.
void pack_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const c10::BFloat16* Bt, c10::BFloat16* packed) {
  pack_vnni_transposed(K, N, ldbt, ldp, Bt, packed);
}
void pack_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const float* Bt, float* packed) {
  transpose(N, K, ldbt, ldp, Bt, packed);
}
const c10::BFloat16* pack(int64_t K, int64_t N, int64_t ldb, const c10::BFloat16* B, c10::BFloat16* packed) {
  pack_vnni(K, N, ldb, ldb, B, packed);
  return packed;
}
const float* pack(int64_t, int64_t, int64_t, const float* B, float*) {
  return B;
}

// The arguments of the ops, made contiguous, and the loop over chunks of kept rows (tokens that have a target).
template <typename T>
class Head {
 public:
  Head(const char* name, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
       const OptionalTensor& kept, int64_t ignore_index, const OptionalTensor& bias, std::optional<double> softcap,
       double logit_scale, std::array<bool, 5> wants = {})
      : hidden_(hidden.contiguous()),
        weight_(weight.contiguous()),
        targets_(targets.contiguous()),
        scale_(static_cast<float>(logit_scale)),
        softcap_(static_cast<float>(softcap.value_or(0.0))),
        D_(hidden.size(1)),
        V_(weight.size(0)) {
    if (bias) bias_ = bias->to(at::kFloat).contiguous();
    keep_rows(name, kept, ignore_index);
    panel_ = std::min(kPanel, round_up(V_, 2));
    panels_ = (V_ + panel_ - 1) / panel_;
    slots_ = std::clamp<int64_t>(at::get_num_threads(), 1, panels_);
    stride_ = round_up(D_, 2);
    const auto wide = hidden_.options().dtype(at::kFloat);
    if (wants[0]) out.hidden = at::zeros(hidden_.sizes(), hidden_.options());
    if (wants[1]) out.weight = kept_.empty() ? at::zeros(weight_.sizes(), wide) : at::empty(weight_.sizes(), wide);
    if (wants[2]) out.bias = at::zeros({V_}, wide);
  }

  int64_t size() const { return static_cast<int64_t>(kept_.size()); }
  int64_t row(int64_t i) const { return kept_[start_ + i]; }
  int64_t target(int64_t i) const { return targets_.const_data_ptr<int64_t>()[row(i)]; }
  int64_t classes() const { return V_; }
  int64_t padded() const { return padded_; }

  // Calls body(rows) for chunk after chunk; within it the members below speak of that chunk. `keeps_probs`: the
  // gradients of weight and bias come from add_gradients() after statistics().
  template <typename Body>
  void each_chunk(bool keeps_probs, Body&& body) {
    allocate(keeps_probs);
    for (start_ = 0; start_ < size(); start_ += capacity_) {
      rows_ = std::min(capacity_, size() - start_);
      padded_ = pad(rows_);
      gather();
      body(rows_);
    }
  }

  // Softmax statistics of the chunk's rows (entropy and mean logit if it has_moments); if it forms_gradients, also what
  // add_gradients(stats, ...) is made from.
  std::vector<RowStats> statistics(bool has_moments, bool forms_gradients);

  // Adds to `out` a loss's gradient: loss[i] is that of row i, of_all that of every logit (0 where there is a softcap).
  void add_gradients(const std::vector<RowStats>& stats, const std::vector<LossGradient>& loss, double of_all);

  // Adds to `out` a gradient with statistics from before, vectors of padded() values: the logits are computed again.
  void add_gradients(const TokenGradients& gradient);

  Gradients out;

 private:
  template <typename U>
  static U* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<U>() : nullptr;
  }
  // Rows past the last are zeros, so that tiles have few different widths.
  static int64_t pad(int64_t rows) { return round_up(rows, rows > kBlock ? kBlock : 16); }

  void keep_rows(const char* name, const OptionalTensor& kept, int64_t ignore_index) {
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
  }

  // Buffers for chunks of equal length within kChunkBytes.
  void allocate(bool keeps_probs) {
    const auto same = hidden_.options(), wide = same.dtype(at::kFloat);
    const bool wants_rows = out.weight.defined() || out.bias.defined();
    const int64_t itemsize = sizeof(T), probs = wants_rows ? (keeps_probs ? panels_ : slots_) * panel_ : 0;
    const int64_t bytes = probs * (itemsize + (keeps_probs ? 4 / panel_ : 0)) + slots_ * (D_ * (2 * itemsize + 4) + 32);
    const int64_t most = std::max(kMinRows, kChunkBytes / bytes / kBlock * kBlock);
    const int64_t chunks = (size() + most - 1) / most;
    capacity_ = chunks == 0 ? 0 : pad((size() + chunks - 1) / chunks);
    const int64_t tiles = round_up(capacity_, kBlock);
    chunk_ = at::empty({capacity_, stride_}, same);
    hidden_as_b_ = at::empty({tiles * stride_}, same);
    if (stride_ != D_) padded_weight_ = at::zeros({slots_, panel_, stride_}, same);
    logits_ = at::empty({slots_, panel_, kBlock}, wide);
    running_ = at::empty({2, slots_, capacity_}, wide);
    sums_ = at::empty({3, slots_, capacity_}, wide.dtype(at::kDouble));
    if (out.hidden.defined()) {
      transposed_ = at::empty({slots_, D_, panel_}, same);
      tile_ = at::empty({slots_, panel_, kBlock}, same);
      dhidden_ = at::empty({slots_, tiles * D_}, wide);
    }
    if (!wants_rows) return;
    probs_ = at::empty({keeps_probs ? panels_ : slots_, panel_, capacity_}, same);
    if (keeps_probs) shifts_ = at::empty({panels_, capacity_}, wide);
    scaled_ = at::empty({keeps_probs ? slots_ : 0, capacity_, D_}, same);
    packed_rows_ = at::empty({keeps_probs ? slots_ : 1, capacity_ * stride_}, same);
  }

  // The chunk's hidden rows, also as [D, kBlock] operands.
  void gather() {
    T* to = data<T>(chunk_);
    const T* from = hidden_.const_data_ptr<T>();
    std::fill(to, to + padded_ * stride_, T(0));
    for (int64_t i = 0; i < rows_; ++i) std::copy_n(from + row(i) * D_, D_, to + i * stride_);
    at::parallel_for(0, blocks(), 1, [&](int64_t lo, int64_t hi) {
      for (int64_t b = lo; b < hi; ++b)
        pack_transposed(D_, columns(b), stride_, kBlock, to + b * kBlock * stride_, hidden_block(b));
    });
  }

  // body(slot, first_panel, end_panel): a slot is one thread's contiguous range of panels and its scratch memory.
  template <typename Body>
  void over_slots(Body&& body) const {
    at::parallel_for(0, slots_, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t slot = lo; slot < hi; ++slot) body(slot, first_panel(slot), first_panel(slot + 1));
      gemm_release();
    });
  }
  int64_t first_panel(int64_t slot) const { return panels_ * slot / slots_; }
  int64_t classes_of(int64_t p) const { return std::min(panel_, V_ - p * panel_); }
  int64_t blocks() const { return round_up(padded_, kBlock) / kBlock; }
  int64_t columns(int64_t b) const { return std::min(kBlock, padded_ - b * kBlock); }

  T* hidden_block(int64_t b) const { return data<T>(hidden_as_b_) + b * kBlock * stride_; }
  T* transposed_panel(int64_t slot) const { return data<T>(transposed_) + slot * panel_ * D_; }
  T* tile(int64_t slot) const { return data<T>(tile_) + slot * panel_ * kBlock; }
  T* probs_of(int64_t index) const { return data<T>(probs_) + index * panel_ * capacity_; }
  float* dhidden_block(int64_t slot, int64_t b) const {
    return data<float>(dhidden_) + (slot * round_up(capacity_, kBlock) + b * kBlock) * D_;
  }
  Softmax softmax(int64_t slot, int64_t first_row) const {
    const int64_t at = slot * capacity_ + first_row, all = slots_ * capacity_;
    float* maxima = data<float>(running_) + at;
    double* sums = data<double>(sums_) + at;
    return {maxima, maxima + all, sums, sums + all, sums + 2 * all};
  }

  const T* weight_rows(int64_t slot, int64_t p) const;
  void transpose_panel(int64_t slot, int64_t p) const;
  float* compute_logits(int64_t slot, int64_t p, int64_t b, const T* rows) const;
  template <typename Drop>
  void each_target(int64_t p, int64_t first_row, int64_t end_row, Drop&& drop) const;
  void add_to_dhidden(int64_t slot, int64_t p, int64_t b) const;
  RowStats combine(int64_t r) const;
  std::vector<float> factors(const std::vector<RowStats>& stats, const std::vector<LossGradient>& loss) const;
  void settle_shifts(int64_t slot, int64_t p) const;
  void add_to_dweight(int64_t p, const T* rows, const T* hidden_as_b, int64_t ldb, const float* of_all) const;
  void finish_dhidden(const std::vector<float>& factor, const std::vector<float>& of_all) const;
  std::vector<float> weight_sum() const;
  std::vector<float> hidden_sum() const;

  // Depth of a float sum before it joins the others: one sum over all of D would round more than eager's blocks do.
  static constexpr int64_t kDepth = std::is_same_v<T, float> ? 64 : std::numeric_limits<int64_t>::max();

  at::Tensor hidden_, weight_, targets_, bias_;
  std::vector<int64_t> kept_;
  float scale_, softcap_;
  int64_t D_, V_, panel_, panels_, slots_, stride_;
  int64_t capacity_ = 0, start_ = 0, rows_ = 0, padded_ = 0;  // of the buffers; of the chunk: first kept row, rows
  at::Tensor chunk_, hidden_as_b_;                            // the chunk's hidden rows
  at::Tensor padded_weight_, transposed_, logits_, tile_;     // of one panel, per slot
  at::Tensor running_, sums_, dhidden_;                       // over a slot's panels
  at::Tensor probs_, shifts_;                                 // e^(z - shift) of the chunk by panel, and the shifts
  at::Tensor scaled_, packed_rows_;                           // hidden rows times their factor, per slot
  std::vector<float> target_logit_, at_target_;
};

}  // namespace
}  // namespace fastpt

#include "cpu/linear_cross_entropy_passes.h"
