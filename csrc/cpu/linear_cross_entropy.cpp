// linear_cross_entropy and token_stats for float and bfloat16 on the CPU; definitions in
// fastpt/ops/linear_cross_entropy.py and token_stats.py, the work in linear_cross_entropy.h.
#include "cpu/linear_cross_entropy.h"

#include <tuple>
#include <ATen/ops/full.h>
#include <torch/library.h>

namespace fastpt {
namespace {

#define HEAD_ARGUMENTS                                                                                       \
  const at::Tensor &hidden, const at::Tensor &weight, const at::Tensor &targets, const OptionalTensor &kept, \
      int64_t ignore_index, const OptionalTensor &bias, const OptionalTensor &low_hidden,                    \
      const OptionalTensor &low_weight, const OptionalTensor &class_weight, std::optional<double> softcap,   \
      double logit_scale
#define HEAD_VALUES \
  hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale

// An adapter on the head and class weights are rare enough for the chunked PyTorch reference.
bool is_native_head(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& low_hidden,
                    const OptionalTensor& class_weight) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                  hidden.scalar_type() == weight.scalar_type(),
              "hidden is ", hidden.sizes(), " ", hidden.scalar_type(), ", weight is ", weight.sizes(), " ",
              weight.scalar_type(), "; they must be [T, D] and [V, D] of one dtype");
  return is_native(hidden) && !low_hidden && !class_weight && hidden.size(1) > 0 && weight.size(0) > 0;
}

at::Tensor or_empty(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.defined() ? tensor : at::empty({0}, like.options().dtype(at::kFloat));
}

// The memory behind a TokenGradients; rows that are not set have a gradient of 0.
class GradientVectors {
 public:
  explicit GradientVectors(int64_t rows) : rows_(rows), values_(6 * rows, 0.0f) {}
  void set(int64_t i, std::array<float, 6> fields) {
    for (int64_t f = 0; f < 6; ++f) values_[f * rows_ + i] = fields[f];
  }
  TokenGradients view() const {
    const float* v = values_.data();
    return {v, v + rows_, v + 2 * rows_, v + 3 * rows_, v + 4 * rows_, v + 5 * rows_};
  }

 private:
  int64_t rows_;
  std::vector<float> values_;
};

using Stats = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LossAndGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Stats token_stats(HEAD_ARGUMENTS) {
  static const auto reference = reference_of<Stats(HEAD_ARGUMENTS)>("fastpt::token_stats");
  if (!is_native_head(hidden, weight, low_hidden, class_weight)) return reference(HEAD_VALUES);
  const auto wide = hidden.options().dtype(at::kFloat);
  const int64_t T = hidden.size(0);
  auto logprob = at::zeros({T}, wide), entropy = at::zeros({T}, wide), max_logit = at::zeros({T}, wide),
       log_sum = at::zeros({T}, wide), mean_logit = at::zeros({T}, wide),
       is_top1 = at::zeros({T}, wide.dtype(at::kBool));
  by_dtype(hidden, [&]<typename T>() {
    Head<T> head("token_stats", hidden, weight, targets, kept, ignore_index, bias, softcap, logit_scale);
    head.each_chunk(false, [&](int64_t rows) {
      const auto stats = head.statistics(true, false);
      const auto set = [&](const at::Tensor& vector, int64_t t, double value) {
        vector.mutable_data_ptr<float>()[t] = static_cast<float>(value);
      };
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t = head.row(i);
        set(logprob, t, stats[i].logprob);
        set(entropy, t, stats[i].entropy);
        set(max_logit, t, stats[i].max);
        set(log_sum, t, stats[i].log_sum);
        set(mean_logit, t, stats[i].mean_logit);
        is_top1.mutable_data_ptr<bool>()[t] = stats[i].is_top1;
      }
    });
  });
  return {logprob, entropy, max_logit, log_sum, mean_logit, is_top1};
}

#define STATS_ARGUMENTS                                                                                                \
  const at::Tensor &dlogprob, const at::Tensor &dentropy, const at::Tensor &dlogsumexp, const at::Tensor &dmean_logit, \
      const at::Tensor &entropy, const at::Tensor &max_logit, const at::Tensor &log_sum

Grads token_stats_backward(STATS_ARGUMENTS, HEAD_ARGUMENTS, std::array<bool, 5> wants) {
  static const auto reference =
      reference_of<Grads(STATS_ARGUMENTS, HEAD_ARGUMENTS, std::array<bool, 5>)>("fastpt::token_stats_backward");
  if (!is_native_head(hidden, weight, low_hidden, class_weight))
    return reference(dlogprob, dentropy, dlogsumexp, dmean_logit, entropy, max_logit, log_sum, HEAD_VALUES, wants);
  Gradients out;
  const auto dlp = dlogprob.contiguous(), dh = dentropy.contiguous(), dl = dlogsumexp.contiguous(),
             dm = dmean_logit.contiguous();
  const auto at = [](const at::Tensor& tensor, int64_t t) { return tensor.const_data_ptr<float>()[t]; };
  by_dtype(hidden, [&]<typename T>() {
    Head<T> head("token_stats", hidden, weight, targets, kept, ignore_index, bias, softcap, logit_scale, wants);
    head.each_chunk(false, [&](int64_t rows) {
      GradientVectors g(head.padded());
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t = head.row(i);
        g.set(i, {at(max_logit, t), at(log_sum, t), at(dl, t) - at(dlp, t) - at(dh, t) * at(entropy, t), -at(dh, t),
                  at(dm, t) / static_cast<float>(head.classes()), at(dlp, t)});
      }
      head.add_gradients(g.view());
    });
    out = head.out;
  });
  const auto none = or_empty({}, hidden);
  return {or_empty(out.hidden, hidden), or_empty(out.weight, hidden), or_empty(out.bias, hidden), none, none.clone()};
}

LossAndGrads linear_cross_entropy(HEAD_ARGUMENTS, double label_smoothing, double z_loss, bool is_mean,
                                  std::array<bool, 5> wants) {
  static const auto reference = reference_of<LossAndGrads(HEAD_ARGUMENTS, double, double, bool, std::array<bool, 5>)>(
      "fastpt::linear_cross_entropy");
  if (!is_native_head(hidden, weight, low_hidden, class_weight))
    return reference(HEAD_VALUES, label_smoothing, z_loss, is_mean, wants);
  Gradients out;
  double loss = 0;
  by_dtype(hidden, [&]<typename T>() {
    Head<T> head("linear_cross_entropy", hidden, weight, targets, kept, ignore_index, bias, softcap, logit_scale,
                 wants);
    const bool wants_gradients = wants[0] || wants[1] || wants[2];
    const double share = is_mean ? 1.0 / static_cast<double>(std::max<int64_t>(1, head.size())) : 1.0;
    const double of_all = -share * label_smoothing / static_cast<double>(head.classes());
    // Under a softcap, what smoothing gives a logit depends on the logit: the gradient then takes a pass of its own.
    const bool in_one_pass = !softcap || label_smoothing == 0;
    head.each_chunk(in_one_pass, [&](int64_t rows) {
      const auto stats = head.statistics(label_smoothing > 0, wants_gradients && in_one_pass);
      std::vector<LossGradient> gradient(rows);
      for (int64_t i = 0; i < rows; ++i) {
        const double lse = stats[i].max + stats[i].log_sum;
        loss -= share * (1 - label_smoothing) * stats[i].logprob;
        if (label_smoothing > 0) loss += share * label_smoothing * (lse - stats[i].mean_logit);
        if (z_loss != 0) loss += share * z_loss * lse * lse;
        gradient[i] = {share * (1 + 2 * z_loss * lse), -share * (1 - label_smoothing)};
      }
      if (wants_gradients && in_one_pass) head.add_gradients(stats, gradient, of_all);
      if (!wants_gradients || in_one_pass) return;
      GradientVectors g(head.padded());
      for (int64_t i = 0; i < rows; ++i)
        g.set(i, {static_cast<float>(stats[i].max), static_cast<float>(stats[i].log_sum),
                  static_cast<float>(gradient[i].of_p), 0.0f, static_cast<float>(of_all),
                  static_cast<float>(gradient[i].of_target)});
      head.add_gradients(g.view());
    });
    out = head.out;
  });
  const auto none = or_empty({}, hidden);
  auto total = at::full({}, loss, hidden.options().dtype(at::kFloat));
  return {total,       or_empty(out.hidden, hidden), or_empty(out.weight, hidden), or_empty(out.bias, hidden), none,
          none.clone()};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("token_stats", &fastpt::token_stats);
  m.impl("token_stats_backward", &fastpt::token_stats_backward);
  m.impl("linear_cross_entropy", &fastpt::linear_cross_entropy);
}
