// The passes of Head over the panels of the vocabulary. Included by linear_cross_entropy.h alone.
#pragma once

namespace fastpt {
namespace {

// The panel's rows with an even stride, which pairs of bfloat16 need.
template <typename T>
const T* Head<T>::weight_rows(int64_t slot, int64_t p) const {
  const T* weight = weight_.const_data_ptr<T>() + p * panel_ * D_;
  if (stride_ == D_) return weight;
  T* rows = data<T>(padded_weight_) + slot * panel_ * stride_;
  for (int64_t j = 0; j < classes_of(p); ++j) std::copy_n(weight + j * D_, D_, rows + j * stride_);
  return rows;
}

template <typename T>
void Head<T>::transpose_panel(int64_t slot, int64_t p) const {
  const int64_t n = classes_of(p);
  T* to = transposed_panel(slot);
  transpose(n, D_, D_, panel_, weight_.const_data_ptr<T>() + p * panel_ * D_, to);
  if (n % 2 != 0)
    for (int64_t d = 0; d < D_; ++d) to[d * panel_ + n] = T(0);
}

template <typename T>
float* Head<T>::compute_logits(int64_t slot, int64_t p, int64_t b, const T* rows) const {
  float* z = data<float>(logits_) + slot * panel_ * kBlock;
  for (int64_t k = 0; k < D_; k += kDepth)
    gemm_tile(classes_of(p), columns(b), std::min(kDepth, D_ - k), stride_, kBlock, kBlock, k > 0, rows + k,
              hidden_block(b) + k * kBlock, z);
  const float* bias = bias_.defined() ? data<float>(bias_) + p * panel_ : nullptr;
  FASTPT_BY_ISA(finish_logits)(classes_of(p), columns(b), bias, scale_, softcap_, z);
  return z;
}

// drop(row, class in the panel) for the rows of the range whose target lies in panel p.
template <typename T>
template <typename Drop>
void Head<T>::each_target(int64_t p, int64_t first_row, int64_t end_row, Drop&& drop) const {
  for (int64_t i = first_row; i < std::min(end_row, rows_); ++i) {
    const int64_t j = target(i) - p * panel_;
    if (j >= 0 && j < classes_of(p)) drop(i, j);
  }
}

template <typename T>
void Head<T>::add_to_dhidden(int64_t slot, int64_t p, int64_t b) const {
  gemm_tile(D_, columns(b), classes_of(p), panel_, kBlock, kBlock, p != first_panel(slot), transposed_panel(slot),
            tile(slot), dhidden_block(slot, b));
}

// Where an entry of a B operand [n, kBlock] lies.
template <typename T>
int64_t place_in_b(int64_t j, int64_t c) {
  return std::is_same_v<T, float> ? j * kBlock + c : j / 2 * 2 * kBlock + 2 * c + j % 2;
}

template <typename T>
std::vector<RowStats> Head<T>::statistics(bool has_moments, bool forms_gradients) {
  const bool wants_hidden = forms_gradients && out.hidden.defined(), keeps = forms_gradients && shifts_.defined();
  target_logit_.assign(rows_, 0.0f);
  std::fill_n(data<float>(running_), running_.numel(), std::numeric_limits<float>::lowest());
  std::fill_n(data<double>(sums_), sums_.numel(), 0.0);
  over_slots([&](int64_t slot, int64_t first, int64_t end) {
    for (int64_t p = first; p < end; ++p) {
      const T* weight = weight_rows(slot, p);
      if (wants_hidden) transpose_panel(slot, p);
      for (int64_t b = 0; b < blocks(); ++b) {
        const float* z = compute_logits(slot, p, b, weight);
        const int64_t r0 = b * kBlock;
        T *rows = keeps ? probs_of(p) + r0 : nullptr, *as_b = wants_hidden ? tile(slot) : nullptr;
        const Softmax state = softmax(slot, r0);
        float alpha[kBlock];
        const bool has_moved = FASTPT_BY_ISA(tile_softmax<T>)(classes_of(p), columns(b), z, softcap_, has_moments,
                                                              state, alpha, capacity_, rows, as_b);
        // The target's entry, by far the largest, goes in unrounded at the end.
        each_target(p, r0, r0 + kBlock, [&](int64_t i, int64_t j) {
          target_logit_[i] = z[j * kBlock + i - r0];
          if (keeps) rows[j * capacity_ + i - r0] = T(0);
          if (wants_hidden) as_b[place_in_b<T>(j, i - r0)] = T(0);
        });
        if (keeps) std::copy_n(state.shift, columns(b), data<float>(shifts_) + p * capacity_ + r0);
        if (!wants_hidden) continue;
        if (has_moved && p != first) FASTPT_BY_ISA(scale_columns)(D_, columns(b), alpha, dhidden_block(slot, b));
        add_to_dhidden(slot, p, b);
      }
    }
  });
  std::vector<RowStats> stats(rows_);
  for (int64_t r = 0; r < rows_; ++r) stats[r] = combine(r);
  return stats;
}

// The slots' sums brought to one maximum, in double and in the order of the vocabulary.
template <typename T>
RowStats Head<T>::combine(int64_t r) const {
  float max = std::numeric_limits<float>::lowest();
  for (int64_t slot = 0; slot < slots_; ++slot) max = std::max(*softmax(slot, r).max, max);
  double sum = 0, sum_xe = 0, sum_z = 0;
  for (int64_t slot = 0; slot < slots_; ++slot) {
    const Softmax s = softmax(slot, r);
    const double shift = static_cast<double>(*s.shift) - max, factor = std::exp(shift);
    sum += factor * *s.sum;
    sum_xe += factor == 0.0 ? 0.0 : factor * (*s.sum_xe + *s.sum * shift);
    sum_z += *s.sum_z;
  }
  const double log_sum = std::log(sum), logit = target_logit_[r];
  return {logit - max - log_sum, log_sum - sum_xe / sum, max, log_sum, sum_z / static_cast<double>(V_), logit >= max};
}

// What e^(z - shift) of each slot and row is multiplied by to be the gradient of the product hidden · weight.
template <typename T>
std::vector<float> Head<T>::factors(const std::vector<RowStats>& stats, const std::vector<LossGradient>& loss) const {
  std::vector<float> factor(slots_ * capacity_, 0.0f);
  for (int64_t slot = 0; slot < slots_; ++slot)
    for (int64_t r = 0; r < rows_; ++r)
      factor[slot * capacity_ + r] = static_cast<float>(
          loss[r].of_p * scale_ * std::exp(*softmax(slot, r).shift - stats[r].max - stats[r].log_sum));
  return factor;
}

// Brings what panel p kept under an earlier shift to the slot's last one.
template <typename T>
void Head<T>::settle_shifts(int64_t slot, int64_t p) const {
  const float *kept = data<float>(shifts_) + p * capacity_, *last = softmax(slot, 0).shift;
  for (int64_t r = 0; r < rows_; ++r) {
    if (kept[r] == last[r]) continue;
    const float factor = static_cast<float>(std::exp(static_cast<double>(kept[r]) - last[r]));
    for (int64_t j = 0; j < classes_of(p); ++j) {
      T& e = probs_of(p)[j * capacity_ + r];
      e = T(factor * static_cast<float>(e));
    }
  }
}

// dweight of panel p += rows [n, tokens] x hidden, what every class gets (may be null) and the targets' own entries.
template <typename T>
void Head<T>::add_to_dweight(int64_t p, const T* rows, const T* hidden_as_b, int64_t ldb, const float* of_all) const {
  const int64_t n = classes_of(p);
  float* dweight = data<float>(out.weight) + p * panel_ * D_;
  gemm_tile(n, D_, padded_, capacity_, ldb, D_, start_ > 0, rows, hidden_as_b, dweight);
  for (int64_t j = 0; of_all != nullptr && j < n; ++j)
    FASTPT_BY_ISA(add_scaled<float>)(D_, 1.0f, of_all, dweight + j * D_);
  each_target(p, 0, rows_, [&](int64_t i, int64_t j) {
    FASTPT_BY_ISA(add_scaled<T>)(D_, at_target_[i], data<T>(chunk_) + i * stride_, dweight + j * D_);
  });
}

template <typename T>
void Head<T>::add_gradients(const std::vector<RowStats>& stats, const std::vector<LossGradient>& loss, double of_all) {
  const std::vector<float> factor = factors(stats, loss);
  at_target_.resize(rows_);
  for (int64_t r = 0; r < rows_; ++r) {
    const double t = softcap_ > 0.0f ? target_logit_[r] / softcap_ : 0.0, slope = scale_ * (1.0 - t * t);
    at_target_[r] = static_cast<float>((std::exp(stats[r].logprob) * loss[r].of_p + loss[r].of_target) * slope);
  }
  const auto times = [](std::vector<float> sum, double by) {
    for (float& value : sum) value = static_cast<float>(value * by);
    return sum;
  };
  if (probs_.defined()) {
    const auto to_weight =
        times(of_all != 0 && out.weight.defined() ? hidden_sum() : std::vector<float>{}, of_all * scale_);
    over_slots([&](int64_t slot, int64_t first, int64_t end) {
      const float* by = factor.data() + slot * capacity_;
      T *scaled = data<T>(scaled_) + slot * capacity_ * D_,
        *packed = data<T>(packed_rows_) + slot * capacity_ * stride_;
      for (int64_t r = 0; out.weight.defined() && r < padded_; ++r)
        FASTPT_BY_ISA(scale_to<T>)(D_, by[r], data<T>(chunk_) + r * stride_, scaled + r * D_);
      const T* as_b = out.weight.defined() ? pack(padded_, D_, D_, scaled, packed) : nullptr;
      for (int64_t p = first; p < end; ++p) {
        settle_shifts(slot, p);
        if (as_b != nullptr) add_to_dweight(p, probs_of(p), as_b, D_, to_weight.empty() ? nullptr : to_weight.data());
        if (!out.bias.defined()) continue;
        float* dbias = data<float>(out.bias) + p * panel_;
        for (int64_t j = 0; j < classes_of(p); ++j)
          dbias[j] += FASTPT_BY_ISA(dot<T>)(padded_, probs_of(p) + j * capacity_, by) +
                      static_cast<float>(static_cast<double>(rows_) * of_all * scale_);
        each_target(p, 0, rows_, [&](int64_t i, int64_t j) { dbias[j] += at_target_[i]; });
      }
    });
  }
  if (out.hidden.defined())
    finish_dhidden(factor, times(of_all != 0 ? weight_sum() : std::vector<float>{}, of_all * scale_));
}

template <typename T>
void Head<T>::add_gradients(const TokenGradients& g) {
  at_target_.resize(rows_);
  const T* as_b = nullptr;
  if (out.weight.defined()) as_b = pack(padded_, D_, stride_, data<T>(chunk_), data<T>(packed_rows_));
  over_slots([&](int64_t slot, int64_t first, int64_t end) {
    T *probs = out.weight.defined() ? probs_of(slot) : nullptr,
      *tile_as_b = out.hidden.defined() ? tile(slot) : nullptr;
    for (int64_t p = first; p < end; ++p) {
      const T* weight = weight_rows(slot, p);
      float* dbias = out.bias.defined() ? data<float>(out.bias) + p * panel_ : nullptr;
      if (tile_as_b != nullptr) transpose_panel(slot, p);
      for (int64_t b = 0; b < blocks(); ++b) {
        const float* z = compute_logits(slot, p, b, weight);
        const int64_t r0 = b * kBlock;
        T* rows = probs == nullptr ? nullptr : probs + r0;
        const TokenGradients of_block{g.max + r0,        g.log_sum + r0, g.of_p + r0,
                                      g.of_p_log_p + r0, g.of_all + r0,  g.of_target + r0};
        FASTPT_BY_ISA(tile_gradient<T>)
        (classes_of(p), columns(b), z, of_block, scale_, softcap_, dbias, capacity_, rows, tile_as_b);
        each_target(p, r0, r0 + kBlock, [&](int64_t i, int64_t j) {
          const double logit = z[j * kBlock + i - r0], log_p = logit - g.max[i] - g.log_sum[i];
          const double t = softcap_ > 0.0f ? logit / softcap_ : 0.0, slope = scale_ * (1.0 - t * t);
          const double dz = std::exp(log_p) * (g.of_p[i] + g.of_p_log_p[i] * std::max(log_p, -104.0)) + g.of_all[i];
          at_target_[i] = static_cast<float>((dz + g.of_target[i]) * slope);
          if (dbias != nullptr) dbias[j] += static_cast<float>(g.of_target[i] * slope);
          if (rows != nullptr) rows[j * capacity_ + i - r0] = T(0);
          if (tile_as_b != nullptr) tile_as_b[place_in_b<T>(j, i - r0)] = T(0);
        });
        if (tile_as_b != nullptr) add_to_dhidden(slot, p, b);
      }
      if (as_b != nullptr) add_to_dweight(p, probs, as_b, stride_, nullptr);
    }
  });
  if (out.hidden.defined()) finish_dhidden(std::vector<float>(slots_ * capacity_, 1.0f), {});
}

// The slots' sums, each times its factor, brought together in the order of the vocabulary and rounded once.
template <typename T>
void Head<T>::finish_dhidden(const std::vector<float>& factor, const std::vector<float>& of_all) const {
  const T* weight = weight_.const_data_ptr<T>();
  at::parallel_for(0, blocks(), 1, [&](int64_t lo, int64_t hi) {
    std::vector<float> sum(D_), part(slots_ * kBlock * D_);
    for (int64_t b = lo; b < hi; ++b) {
      for (int64_t slot = 0; slot < slots_; ++slot)
        transpose(D_, columns(b), kBlock, D_, dhidden_block(slot, b), part.data() + slot * kBlock * D_);
      for (int64_t r = b * kBlock; r < std::min(rows_, (b + 1) * kBlock); ++r) {
        if (of_all.empty()) {
          std::fill(sum.begin(), sum.end(), 0.0f);
        } else {
          std::copy(of_all.begin(), of_all.end(), sum.begin());
        }
        for (int64_t slot = 0; slot < slots_; ++slot) FASTPT_BY_ISA(add_scaled<float>)
        (D_, factor[slot * capacity_ + r], part.data() + (slot * kBlock + r - b * kBlock) * D_, sum.data());
        FASTPT_BY_ISA(add_scaled<T>)(D_, at_target_[r], weight + target(r) * D_, sum.data());
        FASTPT_BY_ISA(round_to<T>)(D_, sum.data(), data<T>(out.hidden) + row(r) * D_);
      }
    }
  });
}

// The sum of the weight's rows, and of the chunk's hidden rows, [D]: what label smoothing pulls towards.
template <typename T>
std::vector<float> Head<T>::weight_sum() const {
  std::vector<float> parts(panels_ * D_, 0.0f), sum(D_);
  at::parallel_for(0, panels_, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t j = lo * panel_; j < std::min(hi * panel_, V_); ++j) FASTPT_BY_ISA(add_scaled<T>)
    (D_, 1.0f, weight_.const_data_ptr<T>() + j * D_, parts.data() + j / panel_ * D_);
  });
  for (int64_t d = 0; d < D_; ++d) {
    double total = 0;
    for (int64_t p = 0; p < panels_; ++p) total += parts[p * D_ + d];
    sum[d] = static_cast<float>(total);
  }
  return sum;
}

template <typename T>
std::vector<float> Head<T>::hidden_sum() const {
  std::vector<float> sum(D_, 0.0f);
  for (int64_t r = 0; r < rows_; ++r) FASTPT_BY_ISA(add_scaled<T>)(D_, 1.0f, data<T>(chunk_) + r * stride_, sum.data());
  return sum;
}

}  // namespace
}  // namespace fastpt
